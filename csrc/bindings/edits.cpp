// Bindings of the edits family: raw addresses, sizes and strides, checked by rainkernels/ops/edits.py.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_edits(py::module_&) {}
