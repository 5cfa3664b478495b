// Bindings of the attention family: raw addresses and sizes, checked by rainkernels/ops/attention.py.
#include "cpu/attention.h"

#include <pybind11/pybind11.h>

#include "cpu/attention_items.h"

namespace py = pybind11;
using rainkernels::AttentionParams;
using rainkernels::Dtype;
using rainkernels::PlanInputs;
using address = std::uintptr_t;

namespace {

const int32_t* ints(address at) {
  return reinterpret_cast<const int32_t*>(at);
}

PlanInputs plan_inputs(address parent, address start, address indptr, int segments, address slots, int64_t keys,
                       address row_segment, address row_position, int rows) {
  return {ints(parent), ints(start),       ints(indptr),       segments, ints(slots),
          keys,         ints(row_segment), ints(row_position), rows};
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_plan_check", [](address parent, address start, address indptr, int segments, address slots,
                                   int64_t keys, address row_segment, address row_position, int rows) {
    const auto found = rainkernels::check_plan(
        plan_inputs(parent, start, indptr, segments, slots, keys, row_segment, row_position, rows));
    return py::make_tuple(static_cast<int>(found.rule), found.index, found.max_slot);
  });
  m.def("attention_layout", [](address parent, address start, address indptr, int segments, address slots, int64_t keys,
                               address row_segment, address row_position, int rows, int group) {
    const auto layout = rainkernels::build_layout(
        plan_inputs(parent, start, indptr, segments, slots, keys, row_segment, row_position, rows), group);
    return py::bytearray(reinterpret_cast<const char*>(layout.data()), layout.size() * sizeof(int32_t));
  });
  m.def("attention_items", [](address parent, address start, address indptr, int segments, address slots, int64_t keys,
                              address row_segment, address row_position, int rows, int group, int rows_wide,
                              int rows_narrow, int chunk, int levels) {
    const auto table = rainkernels::build_items(
        plan_inputs(parent, start, indptr, segments, slots, keys, row_segment, row_position, rows),
        {group, rows_wide, rows_narrow, chunk, levels});
    return py::bytearray(reinterpret_cast<const char*>(table.data()), table.size() * sizeof(int32_t));
  });
  m.def("attention_workspace_floats", [](address layout, int qo_heads, int kv_heads, int dim, int dim_v, int threads) {
    AttentionParams p{};
    p.layout = ints(layout);
    p.num_qo_heads = qo_heads;
    p.num_kv_heads = kv_heads;
    p.head_dim = dim;
    p.head_dim_v = dim_v;
    p.num_threads = threads;
    return rainkernels::attention_workspace_floats(p);
  });
  m.def("attention_cpu",
        [](address q, address k_pool, address v_pool, address out, address lse, address sinks, address workspace,
           int64_t q_stride_row, int64_t q_stride_head, int dtype, double scale, double softcap, int64_t window,
           address layout, int qo_heads, int kv_heads, int dim, int dim_v, int threads) {
          const AttentionParams p{reinterpret_cast<const void*>(q),
                                  q_stride_row,
                                  q_stride_head,
                                  reinterpret_cast<const void*>(k_pool),
                                  reinterpret_cast<const void*>(v_pool),
                                  reinterpret_cast<void*>(out),
                                  reinterpret_cast<float*>(lse),
                                  reinterpret_cast<const float*>(sinks),
                                  reinterpret_cast<float*>(workspace),
                                  ints(layout),
                                  qo_heads,
                                  kv_heads,
                                  dim,
                                  dim_v,
                                  static_cast<Dtype>(dtype),
                                  static_cast<float>(scale),
                                  static_cast<float>(softcap),
                                  window,
                                  threads};
          py::gil_scoped_release release;
          rainkernels::attention(p);
        });
  m.def("merge_state_cpu", [](address v_a, address lse_a, address v_b, address lse_b, address v, address lse,
                              int64_t rows, int dim, int dtype, int threads) {
    py::gil_scoped_release release;
    rainkernels::merge_state(reinterpret_cast<const void*>(v_a), reinterpret_cast<const float*>(lse_a),
                             reinterpret_cast<const void*>(v_b), reinterpret_cast<const float*>(lse_b),
                             reinterpret_cast<void*>(v), reinterpret_cast<float*>(lse), rows, dim,
                             static_cast<Dtype>(dtype), threads);
  });
}
