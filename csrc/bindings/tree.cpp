// Binds the `tree` family. Addresses come as integers from rainkernels/ops/tree.py, which has checked what they point
// to.
#include "cpu/tree.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>
#ifdef RK_WITH_CUDA
#include "cuda/tree.h"
#endif

namespace py = pybind11;
using namespace rainkernels;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Forest make_forest(const std::vector<Address>& fields, const std::vector<int32_t>& dims,
                   const std::vector<double>& params, bool dynamic_children, bool similarity, bool is_double) {
  if (fields.size() != kNumFields || dims.size() != 7 || params.size() != 6) {
    throw std::invalid_argument("TreeForest: expected 16 fields, 7 dims and 6 params");
  }
  Forest f;
  for (size_t i = 0; i < fields.size(); ++i) f.field[i] = at<void>(fields[i]);
  f.dims = {dims[0], dims[1], dims[2], dims[3], dims[4], dims[5], dims[6]};
  f.params = {params[0], params[1], params[2], params[3], params[4], params[5], dynamic_children, similarity};
  f.is_double = is_double;
  return f;
}

SelectArgs select_args(Address tree_ids, int64_t n, Address skip, Address status, Address node, Address path,
                       Address depth) {
  return {at<int32_t>(tree_ids), n, at<int32_t>(skip), at<int32_t>(status), at<int32_t>(node), at<int32_t>(path),
          at<int32_t>(depth)};
}

ExpandArgs expand_args(Address tree_ids, int64_t n, Address nodes, Address priors, int64_t width, Address num_children,
                       Address set_length, Address first_slot) {
  return {at<int32_t>(tree_ids),
          n,
          at<int32_t>(nodes),
          at<void>(priors),
          width,
          at<int32_t>(num_children),
          at<int32_t>(set_length),
          at<int32_t>(first_slot)};
}

AddChildArgs add_child_args(Address tree_ids, int64_t n, Address nodes, Address prior, bool mix, Address slot) {
  return {at<int32_t>(tree_ids), n, at<int32_t>(nodes), at<void>(prior), mix, at<int32_t>(slot)};
}

BackupArgs backup_args(Address tree_ids, int64_t n, Address path, Address depth, Address value, Address embedding,
                       int64_t embedding_rows, Address dropped) {
  return {at<int32_t>(tree_ids), n,
          at<int32_t>(path),     at<int32_t>(depth),
          at<void>(value),       at<float>(embedding),
          embedding_rows,        at<int32_t>(dropped)};
}

BestChildArgs best_child_args(Address tree_ids, int64_t n, Address slot, Address visits, Address direct,
                              Address value) {
  return {at<int32_t>(tree_ids), n, at<int32_t>(slot), at<void>(visits), at<int32_t>(direct), at<void>(value)};
}

RerootArgs reroot_args(Address tree_ids, int64_t n, Address slots, Address freed) {
  return {at<int32_t>(tree_ids), n, at<int32_t>(slots), at<uint8_t>(freed)};
}

MarkArgs mark_args(Address tree_ids, int64_t n, Address path, Address depth, int32_t delta) {
  return {at<int32_t>(tree_ids), n, at<int32_t>(path), at<int32_t>(depth), delta};
}

// name(forest, *args, threads) -> error word
template <class Args, class... In>
void bind_cpu(py::module_& m, const char* name, Args (*pack)(In...), int64_t (*run)(const Forest&, const Args&, int)) {
  m.def(name, [pack, run](const Forest& f, In... in, int threads) {
    const Args args = pack(in...);
    const py::gil_scoped_release release;
    return run(f, args, threads);
  });
}
#define RK_BIND_CPU(name, Args) bind_cpu(m, "tree_" #name, &name##_args, &tree_##name);

#ifdef RK_WITH_CUDA
// name_cuda(forest, *args, address of the error word, stream) -> cudaError_t
template <class Args, class... In>
void bind_cuda(py::module_& m, const char* name, Args (*pack)(In...),
               int (*run)(const Forest&, const Args&, int64_t*, void*)) {
  m.def(name, [pack, run](const Forest& f, In... in, Address error, Address stream) {
    return run(f, pack(in...), at<int64_t>(error), at<void>(stream));
  });
}
#define RK_BIND_CUDA(name, Args) bind_cuda(m, "tree_" #name "_cuda", &name##_args, &tree_##name##_cuda);
#endif

}  // namespace

void bind_tree(py::module_& m) {
  py::class_<Forest>(m, "TreeForest", "Addresses, sizes and constants of a forest; keeps nothing alive.")
      .def(py::init(&make_forest), py::arg("fields"), py::arg("dims"), py::arg("params"), py::arg("dynamic_children"),
           py::arg("similarity"), py::arg("is_double"));
  RK_TREE_OPS(RK_BIND_CPU)
#ifdef RK_WITH_CUDA
  RK_TREE_OPS(RK_BIND_CUDA)
#endif
}
