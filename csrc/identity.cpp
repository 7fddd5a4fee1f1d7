// Tells whether Python containers still hold the very objects that they held when their contents were noted.
//
// A compiled model asks this before each call, for some thousand containers with some ten thousand objects. So only
// identities are compared; apart from iterators and attributes that a class computes, nothing is called or created.
//
// Hazard: computed attributes, iterators, and finalizers (which any allocation may trigger) are Python code, which may
// change the containers and the two lists during the comparison. So this code holds its own reference to whatever it
// uses, and reads lengths again each time; otherwise it would read freed memory.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

#include "tensor_notes.h"

namespace {

// Compares what a container yields, one object after another, with what was noted.
class Noted {
 public:
  // The caller holds a reference to `items`.
  explicit Noted(PyObject* items) : items_(items), count_(PyTuple_GET_SIZE(items)) {}

  bool next_is(PyObject* object) { return index_ < count_ && PyTuple_GET_ITEM(items_, index_++) == object; }
  bool at_end() const { return index_ == count_; }

 private:
  PyObject* items_;
  Py_ssize_t count_;
  Py_ssize_t index_ = 0;
};

// A number that changes whenever the dict does (PEP 509), so that an untouched dict need not be compared. From Python
// 3.13 on it is always 0, which means that it is not known.
#if PY_VERSION_HEX < 0x030D0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
uint64_t version_of(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }
#pragma GCC diagnostic pop
#else
uint64_t version_of(PyObject*) { return 0; }
#endif

// Owns a reference, and releases it at the end of its block.
class Held {
 public:
  explicit Held(PyObject* own) : object_(own) {}
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

PyObject* or_none(PyObject* object) { return object != nullptr ? object : Py_None; }

bool same_dict(PyObject* dict, Noted& noted) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &key, &value)) {
    if (!noted.next_is(key) || !noted.next_is(value)) return false;
  }
  return true;
}

// The dict of an object or a class. A new reference; null without an error where there is none.
PyObject* attributes_of(PyObject* object) {
  if (PyType_Check(object)) {
    auto* type = reinterpret_cast<PyTypeObject*>(object);
#if PY_VERSION_HEX >= 0x030C0000
    return PyType_GetDict(type);
#else
    Py_XINCREF(type->tp_dict);
    return type->tp_dict;
#endif
  }
  PyObject* dict = PyObject_GenericGetDict(object, nullptr);
  if (dict == nullptr) PyErr_Clear();
  return dict;
}

// Compares the entry of a dict, or the attribute of an object, under a name; if there is none, None is compared. Any
// error other than AttributeError stays set.
bool same_entry(PyObject* owner, PyObject* name, Noted& noted) {
  if (PyDict_Check(owner)) {
    PyObject* found = PyDict_GetItemWithError(owner, name);
    if (found == nullptr && PyErr_Occurred() != nullptr) return false;
    return noted.next_is(or_none(found));
  }
  const Held found(PyObject_GetAttr(owner, name));
  if (found.get() == nullptr) {
    if (PyErr_ExceptionMatches(PyExc_AttributeError) == 0) return false;
    PyErr_Clear();
  }
  return noted.next_is(or_none(found.get()));
}

// Compares what a container yields. A set yields what it holds, even if its class overrides iteration. An error of the
// iterator stays set.
bool same_iteration(PyObject* container, Noted& noted) {
  getiterfunc iterate = PyObject_GetIter;
  if (PyAnySet_Check(container)) iterate = (PyFrozenSet_Check(container) ? PyFrozenSet_Type : PySet_Type).tp_iter;
  const Held iterator(iterate(container));
  if (iterator.get() == nullptr) return false;
  while (true) {
    const Held item(PyIter_Next(iterator.get()));
    if (item.get() == nullptr) return PyErr_Occurred() == nullptr;
    if (!noted.next_is(item.get())) return false;
  }
}

// Compares in the order of `contents` in harmonica_rt/model/identity.py. `version`, if there is one, is that of the
// container's dict when it was last found to be the same; 0 if it never was. Returns false with an error set if the
// comparison failed.
bool same_contents(PyObject* container, PyObject* items, uint64_t* version) {
  Noted noted(items);
  bool same = true;
  if (PyDict_Check(container)) {
    const uint64_t now = version_of(container);
    if (version != nullptr && now != 0 && *version == now) return true;
    same = same_dict(container, noted);
    if (version != nullptr && same && noted.at_end()) *version = now;
  } else if (PyList_Check(container)) {
    for (Py_ssize_t i = 0; same && i < PyList_GET_SIZE(container); ++i) {
      same = noted.next_is(PyList_GET_ITEM(container, i));
    }
  } else if (PyAnySet_Check(container)) {
    same = same_iteration(container, noted);
  } else if (PyTuple_Check(container)) {
    same = same_entry(PyTuple_GET_ITEM(container, 0), PyTuple_GET_ITEM(container, 1), noted);
  } else if (PyCell_Check(container)) {
    same = noted.next_is(or_none(PyCell_GET(container)));
  } else if (PyFunction_Check(container)) {
    same = noted.next_is(PyFunction_GET_CODE(container)) &&
           noted.next_is(or_none(PyFunction_GET_DEFAULTS(container))) &&
           noted.next_is(or_none(PyFunction_GET_KW_DEFAULTS(container)));
  } else if (const Held attributes(attributes_of(container)); attributes.get() != nullptr) {
    PyObject* kind = PyType_Check(container) ? reinterpret_cast<PyTypeObject*>(container)->tp_mro
                                             : reinterpret_cast<PyObject*>(Py_TYPE(container));
    const uint64_t now = version_of(attributes.get());
    const bool untouched = version != nullptr && now != 0 && *version == now;
    same = noted.next_is(kind) && (untouched || (same_dict(attributes.get(), noted) && noted.at_end()));
    if (version != nullptr && same) *version = now;
    return same;
  } else {
    same = same_iteration(container, noted);
  }
  return same && noted.at_end();
}

// Whether nothing was done to a dict since it was last found to be the same. Most containers are such dicts, so
// nothing else is read of them, and no reference is taken: no Python code runs here.
bool is_untouched(PyObject* container, const uint64_t* version) {
  return version != nullptr && PyDict_Check(container) && *version != 0 && *version == version_of(container);
}

PyObject* first_change(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if ((count != 2 && count != 3) || !PyList_Check(arguments[0]) || !PyList_Check(arguments[1]) ||
      PyList_GET_SIZE(arguments[0]) != PyList_GET_SIZE(arguments[1])) {
    PyErr_SetString(PyExc_TypeError, "first_change takes two lists of one length: containers, and their contents");
    return nullptr;
  }
  PyObject* versions = count == 3 ? arguments[2] : nullptr;
  const auto bytes = static_cast<Py_ssize_t>(sizeof(uint64_t));
  if (versions != nullptr &&
      (!PyByteArray_Check(versions) || PyByteArray_GET_SIZE(versions) != PyList_GET_SIZE(arguments[0]) * bytes)) {
    PyErr_SetString(PyExc_TypeError, "versions are a bytearray of eight bytes per container");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(arguments[0]) && i < PyList_GET_SIZE(arguments[1]); ++i) {
    const bool has_version = versions != nullptr && (i + 1) * bytes <= PyByteArray_GET_SIZE(versions);
    uint64_t* version = has_version ? reinterpret_cast<uint64_t*>(PyByteArray_AS_STRING(versions)) + i : nullptr;
    if (is_untouched(PyList_GET_ITEM(arguments[0], i), version)) continue;
    const Held container(Py_NewRef(PyList_GET_ITEM(arguments[0], i)));
    const Held items(Py_NewRef(PyList_GET_ITEM(arguments[1], i)));
    if (!PyTuple_Check(items.get()) || (PyTuple_Check(container.get()) && PyTuple_GET_SIZE(container.get()) != 2)) {
      PyErr_SetString(PyExc_TypeError, "contents are tuples, and so is a pair of an owner and a name");
      return nullptr;
    }
    if (!same_contents(container.get(), items.get(), version)) {
      return PyErr_Occurred() == nullptr ? PyLong_FromSsize_t(i) : nullptr;
    }
  }
  return PyLong_FromLong(-1);
}

using Function = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyCFunction method(Function function) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)); }

PyMethodDef methods[] = {
    {"first_change", method(first_change), METH_FASTCALL,
     "first_change(containers, contents, versions=None) -> index of the first container that holds other objects, or -1"},
    {"versions_of", method(harmonica::versions_of), METH_FASTCALL,
     "versions_of(tensors, torch.Tensor) -> eight bytes per tensor of a list"},
    {"addresses_of", method(harmonica::addresses_of), METH_FASTCALL,
     "addresses_of(tensors, torch.Tensor) -> eight bytes per tensor of a list"},
    {"layouts_of", method(harmonica::layouts_of), METH_FASTCALL,
     "layouts_of(tensors, torch.Tensor) -> bytes, and the list of addresses; tensors may be None"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", "Host-side helpers of harmonica-rt.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

// torch loads this library for its operators; Python also imports it as a module, for these functions.
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
