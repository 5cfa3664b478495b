// The bindings of the tree and kv families over emulated kernels, as a module of its own. It is compiled with
// -Drainkernels=..., which renames the namespace, so that its types can live beside those of rainkernels._C.
#include <pybind11/pybind11.h>

#include <cstdlib>

#include "cpu/kv.h"
#include "cpu/tree.h"
#include "cuda_runtime.h"

namespace py = pybind11;

void bind_tree(py::module_& m);
void bind_kv(py::module_& m);

// The bindings name the CPU lane too, which is not part of this module.
namespace rainkernels {
#define RK_NO_CPU(name, Args)                            \
  int64_t tree_##name(const Forest&, const Args&, int) { \
    std::abort();                                        \
  }
RK_TREE_OPS(RK_NO_CPU)
int64_t kv_write(const KvWriteParams&, int) {
  std::abort();
}
void kv_copy(char*, int64_t, char*, int64_t, const int32_t*, const int32_t*, int64_t) {
  std::abort();
}
}  // namespace rainkernels

namespace {

constexpr unsigned kAll = 0xffffffffu;

// Kernels that misuse a barrier, for the emulator's own test.
void misuse(const std::string& kind) {
  cuda_emulator::launch(1, 64, 0, nullptr, [kind] {
    const unsigned lane = threadIdx.x % 32;
    if (kind == "half a block barrier" && threadIdx.x < 32) __syncthreads();
    if (kind == "half a block barrier" && threadIdx.x >= 32) __syncwarp(1u);
    if (kind == "two exchanges") lane < 16 ? __syncwarp() : static_cast<void>(__ballot_sync(kAll, 1));
    if (kind == "not in its mask") __syncwarp(0xffffu);
    if (kind == "absent lane") {
      if (lane == 31) return;
      __shfl_sync(kAll, lane, 31);
    }
  });
}

// out[i] = sum over the warp of the thread of x, by each way to exchange.
void sums(std::uintptr_t x_address, std::uintptr_t out_address, int n) {
  const auto* x = reinterpret_cast<const int64_t*>(x_address);
  auto* out = reinterpret_cast<int64_t*>(out_address);
  cuda_emulator::launch((n + 95) / 96, 96, 0, nullptr, [=] {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    int64_t sum = i < n ? x[i] : 0;
    const int64_t first = __shfl_sync(kAll, sum, 0);
    const bool odd = __any_sync(kAll, static_cast<int>(sum % 2)), all = __all_sync(kAll, i < n);
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAll, sum, bits);
    __syncthreads();
    const bool over = __syncthreads_or(i >= n);
    if (i < n) out[i] = 1000 * sum + 100 * (first % 10) + 4 * over + 2 * odd + all;
  });
}

}  // namespace

PYBIND11_MODULE(cuda_emulated, m) {
  m.doc() = "The CUDA kernels of the tree and kv families on emulated threads.";
  m.attr("has_cuda") = true;
  m.def("cuda_error_name", [](int error) { return "cuda error " + std::to_string(error); });
  m.def("set_order", &cuda_emulator::set_order);
  m.def("misuse", &misuse);
  m.def("sums", &sums);
  bind_tree(m);
  bind_kv(m);
}
