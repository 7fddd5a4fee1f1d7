// Reads versions, addresses and layouts of many tensors at once, as bytes, which are quick to hash and to compare.
//
// A compiled model asks for the versions and addresses of all its parameters before each call, to tell whether any was
// written to or moved; an operator on CUDA, for the layouts of its arguments. Each tensor is unpacked each time: a Python
// tensor may come to stand for another one (torch.utils.swap_tensors).

#include "tensor_notes.h"  // first: it says how Python's own header is to be read

#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

namespace harmonica {
namespace {

constexpr int64_t kAlignment = 16;  // bytes; Triton compiles another kernel for addresses that are no multiple of it

int64_t version_of(const at::Tensor& tensor) {
  return static_cast<int64_t>(tensor.unsafeGetTensorImpl()->version_counter().current_version());
}

int64_t address_of(const at::Tensor& tensor) { return reinterpret_cast<int64_t>(tensor.data_ptr()); }

// What Python holds of a tensor that it was given; null with an error set for any other object.
const at::Tensor* unpacked(PyObject* object, PyObject* tensor_type) {
  if (PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(tensor_type)) != 0) return &THPVariable_Unpack(object);
  PyErr_Format(PyExc_TypeError, "expected a tensor, got an object of type %s", Py_TYPE(object)->tp_name);
  return nullptr;
}

// The arguments of each function: a list, and torch.Tensor. Nothing here runs Python code, so the list stays as it is.
bool are_arguments(PyObject* const* arguments, Py_ssize_t count) {
  if (count == 2 && PyList_Check(arguments[0]) && PyType_Check(arguments[1])) return true;
  PyErr_SetString(PyExc_TypeError, "expected a list of tensors, and torch.Tensor");
  return false;
}

// Calls `read` and turns what torch throws (inference tensors have no version, some tensors no address) into an error.
template <typename Read>
bool guarded(Read read) {
  try {
    return read();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return false;
  }
}

// Eight bytes per tensor of a list, as `read` gives them for one.
template <typename Read>
PyObject* bytes_of(PyObject* const* arguments, Py_ssize_t count, Read read) {
  if (!are_arguments(arguments, count)) return nullptr;
  PyObject* tensors = arguments[0];
  const Py_ssize_t size = PyList_GET_SIZE(tensors);
  PyObject* result = PyBytes_FromStringAndSize(nullptr, size * static_cast<Py_ssize_t>(sizeof(int64_t)));
  if (result == nullptr) return nullptr;
  char* out = PyBytes_AS_STRING(result);
  const bool done = guarded([&] {
    for (Py_ssize_t i = 0; i < size; ++i, out += sizeof(int64_t)) {
      const at::Tensor* tensor = unpacked(PyList_GET_ITEM(tensors, i), arguments[1]);
      if (tensor == nullptr) return false;
      const int64_t value = read(*tensor);
      std::memcpy(out, &value, sizeof value);
    }
    return true;
  });
  if (!done) Py_CLEAR(result);
  return result;
}

// Appends what a kernel is compiled for, and what its arguments besides addresses are, of one tensor.
void append_layout(std::vector<int64_t>& layout, const at::Tensor& tensor, int64_t address) {
  layout.push_back(tensor.dim());
  layout.push_back(static_cast<int64_t>(tensor.scalar_type()));
  layout.push_back(static_cast<int64_t>(tensor.device().type()) << 16 | (tensor.get_device() & 0xffff));
  layout.push_back((address % kAlignment == 0 ? 1 : 0) | (address == 0 || tensor.is_neg() ? 2 : 0));
  layout.insert(layout.end(), tensor.sizes().begin(), tensor.sizes().end());
  layout.insert(layout.end(), tensor.strides().begin(), tensor.strides().end());
}

}  // namespace

PyObject* versions_of(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return bytes_of(arguments, count, version_of);
}

PyObject* addresses_of(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return bytes_of(arguments, count, address_of);
}

PyObject* layouts_of(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!are_arguments(arguments, count)) return nullptr;
  PyObject* tensors = arguments[0];
  const Py_ssize_t size = PyList_GET_SIZE(tensors);
  PyObject* addresses = PyList_New(size);
  if (addresses == nullptr) return nullptr;
  std::vector<int64_t> layout;
  const bool done = guarded([&] {
    layout.reserve(16 * static_cast<size_t>(size));
    for (Py_ssize_t i = 0; i < size; ++i) {
      PyObject* object = PyList_GET_ITEM(tensors, i);
      if (object == Py_None) {
        layout.push_back(-1);
        PyList_SET_ITEM(addresses, i, Py_NewRef(Py_None));
        continue;
      }
      const at::Tensor* tensor = unpacked(object, arguments[1]);
      if (tensor == nullptr) return false;
      const int64_t address = address_of(*tensor);
      append_layout(layout, *tensor, address);
      PyObject* number = PyLong_FromLongLong(address);
      if (number == nullptr) return false;
      PyList_SET_ITEM(addresses, i, number);
    }
    return true;
  });
  if (done) {
    const auto bytes = static_cast<Py_ssize_t>(layout.size() * sizeof(int64_t));
    return Py_BuildValue("(y#N)", reinterpret_cast<const char*>(layout.data()), bytes, addresses);
  }
  Py_DECREF(addresses);
  return nullptr;
}

}  // namespace harmonica
