// Functions for Python, see tensor_notes.cpp.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace harmonica {

PyObject* versions_of(PyObject* module, PyObject* const* arguments, Py_ssize_t count);
PyObject* addresses_of(PyObject* module, PyObject* const* arguments, Py_ssize_t count);
PyObject* layouts_of(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace harmonica
