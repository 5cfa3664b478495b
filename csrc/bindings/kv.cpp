// Bindings of the kv family: raw addresses, sizes and strides in bytes, checked by rainkernels/ops/kv.py.
#include "cpu/kv.h"

#include <pybind11/pybind11.h>
#ifdef RK_WITH_CUDA
#include "cuda/kv.h"
#endif

namespace py = pybind11;
using rainkernels::KvWriteParams;
using address = std::uintptr_t;

namespace {

KvWriteParams write_params(address k, int64_t k_token, int64_t k_head, address k_pool, int64_t k_bytes, address v,
                           int64_t v_token, int64_t v_head, address v_pool, int64_t v_bytes, address slots,
                           int64_t tokens, int64_t heads, int64_t num_slots) {
  return {{reinterpret_cast<const char*>(k), k_token, k_head, reinterpret_cast<char*>(k_pool), k_bytes},
          {reinterpret_cast<const char*>(v), v_token, v_head, reinterpret_cast<char*>(v_pool), v_bytes},
          reinterpret_cast<const int32_t*>(slots),
          tokens,
          heads,
          num_slots};
}

}  // namespace

void bind_kv(py::module_& m) {
  m.def("kv_write_cpu", [](address k, int64_t k_token, int64_t k_head, address k_pool, int64_t k_bytes, address v,
                           int64_t v_token, int64_t v_head, address v_pool, int64_t v_bytes, address slots,
                           int64_t tokens, int64_t heads, int64_t num_slots, int threads) {
    const KvWriteParams p = write_params(k, k_token, k_head, k_pool, k_bytes, v, v_token, v_head, v_pool, v_bytes,
                                         slots, tokens, heads, num_slots);
    py::gil_scoped_release release;
    return rainkernels::kv_write(p, threads);
  });
  m.def("kv_copy_cpu",
        [](address k_pool, int64_t k_bytes, address v_pool, int64_t v_bytes, address src, address dst, int64_t n) {
          py::gil_scoped_release release;
          rainkernels::kv_copy(reinterpret_cast<char*>(k_pool), k_bytes, reinterpret_cast<char*>(v_pool), v_bytes,
                               reinterpret_cast<const int32_t*>(src), reinterpret_cast<const int32_t*>(dst), n);
        });
#ifdef RK_WITH_CUDA
  m.def("kv_write_cuda", [](address k, int64_t k_token, int64_t k_head, address k_pool, int64_t k_bytes, address v,
                            int64_t v_token, int64_t v_head, address v_pool, int64_t v_bytes, address slots,
                            int64_t tokens, int64_t heads, int64_t num_slots, address stream) {
    const KvWriteParams p = write_params(k, k_token, k_head, k_pool, k_bytes, v, v_token, v_head, v_pool, v_bytes,
                                         slots, tokens, heads, num_slots);
    return rainkernels::kv_write_cuda(p, reinterpret_cast<void*>(stream));
  });
#endif
}
