// Bindings of the logits family: raw addresses, sizes and strides, checked by rainkernels/ops/logits.py.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_logits(py::module_&) {}
