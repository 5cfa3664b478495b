// Bindings of the edits family: raw addresses, sizes and strides, checked by rainkernels/ops/edits.py.
#include "cpu/edits.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;
using rainkernels::Dtype;
using address = std::uintptr_t;

namespace {

template <class T>
T* at(address where) {
  return reinterpret_cast<T*>(where);
}

}  // namespace

void bind_edits(py::module_& m) {
  m.def("edits_cpu",
        [](address x, int64_t x_stride, address residual, int64_t residual_stride, address out, int64_t out_stride,
           address weight, int weight_dtype, address slots, int64_t rows, int hidden, int dtype, bool fused, double eps,
           int tap, int cast, double weight_offset, address directions, int64_t slot_step, int table_dtype,
           address scale, int64_t scale_step, address gram, address op, address alpha, address target, address count,
           address norm, int num_slots, int max_directions, int threads) {
          rainkernels::EditParams p{};
          p.x = at<void>(x);
          p.residual = at<void>(residual);
          p.out = at<void>(out);
          p.x_stride = x_stride;
          p.residual_stride = residual_stride;
          p.out_stride = out_stride;
          p.weight = at<const void>(weight);
          p.weight_dtype = static_cast<Dtype>(weight_dtype);
          p.slots = at<const int32_t>(slots);
          p.rows = rows;
          p.hidden = hidden;
          p.dtype = static_cast<Dtype>(dtype);
          p.fused = fused;
          p.eps = static_cast<float>(eps);
          p.tap = static_cast<rainkernels::EditTap>(tap);
          p.cast = static_cast<rainkernels::NormCast>(cast);
          p.weight_offset = static_cast<float>(weight_offset);
          p.table.directions = at<const void>(directions);
          p.table.slot_step = slot_step;
          p.table.dtype = static_cast<Dtype>(table_dtype);
          p.table.scale = at<const float>(scale);
          p.table.scale_step = scale_step;
          p.table.gram = at<const float>(gram);
          p.table.op = at<const int32_t>(op);
          p.table.alpha = at<const float>(alpha);
          p.table.target = at<const float>(target);
          p.table.count = at<const int32_t>(count);
          p.table.norm = at<const int32_t>(norm);
          p.table.num_slots = num_slots;
          p.table.max_directions = max_directions;
          p.num_threads = threads;
          py::gil_scoped_release release;
          return rainkernels::edits(p);
        });
}
