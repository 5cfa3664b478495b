// The module rainkernels._C. Each family binds itself in csrc/bindings/<family>.cpp; checks live in rainkernels/ops.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#ifdef RK_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;

void bind_tree(py::module_& m);
void bind_kv(py::module_& m);
void bind_attention(py::module_& m);
void bind_logits(py::module_& m);
void bind_edits(py::module_& m);
void bind_decoder(py::module_& m);

PYBIND11_MODULE(_C, m) {
  m.doc() = "rainkernels native lanes. Takes raw addresses: call it through rainkernels.ops, which checks them.";
  m.attr("__version__") = RAINKERNELS_VERSION;
  m.def("isa", [] { return rainkernels::isa_name(rainkernels::detected_isa()); });
#ifdef RK_WITH_CUDA
  m.attr("has_cuda") = true;
  m.def("cuda_device_count", &rainkernels::cuda_device_count);
  m.def("cuda_runtime_version", &rainkernels::cuda_runtime_version);
  m.def("cuda_error_name", &rainkernels::cuda_error_name);
#else
  m.attr("has_cuda") = false;
  m.def("cuda_device_count", [] { return 0; });
  m.def("cuda_runtime_version", [] { return 0; });
  m.def("cuda_error_name", [](int) { return "cuda is not compiled in"; });
#endif
  bind_tree(m);
  bind_kv(m);
  bind_attention(m);
  bind_logits(m);
  bind_edits(m);
  bind_decoder(m);
}
