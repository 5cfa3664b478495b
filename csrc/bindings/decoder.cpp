// Bindings of the decoder family: raw addresses and sizes, checked by rainkernels/ops/decoder.py.
#include "cpu/decoder.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "cpu/attention.h"

namespace py = pybind11;
using namespace rainkernels;
using address = std::uintptr_t;

namespace {

template <class T>
T* at(address where) {
  return reinterpret_cast<T*>(where);
}

// Addresses of a block's weights in the order of rainkernels/ops/decoder.py, its three eps, scale, softcap, window.
DecoderBlock make_block(const std::array<address, 13>& w, const std::array<double, 5>& n, int64_t window) {
  const auto eps = [&](int i) { return static_cast<float>(n[i]); };
  DecoderBlock b{};
  b.attention_norm = {at<const float>(w[0]), eps(0)};
  b.qkv = {at<const float>(w[1]), at<const float>(w[2])};
  b.q_norm = {at<const float>(w[3]), eps(1)};
  b.k_norm = {at<const float>(w[4]), eps(1)};
  b.out = {at<const float>(w[5]), at<const float>(w[6])};
  b.mlp_norm = {at<const float>(w[7]), eps(2)};
  b.gate_up = {at<const float>(w[8]), at<const float>(w[9])};
  b.down = {at<const float>(w[10]), at<const float>(w[11])};
  b.sinks = at<const float>(w[12]);
  b.scale = eps(3);
  b.softcap = eps(4);
  b.window = window;
  return b;
}

}  // namespace

void bind_decoder(py::module_& m) {
  m.def("linear_rows",
        [](address weight, address bias, address from, int64_t in, address to, int64_t out, int64_t rows, int threads) {
          const py::gil_scoped_release release;
          linear_rows({at<const float>(weight), at<const float>(bias)}, at<const float>(from), in, at<float>(to), out,
                      rows, threads);
        });
  py::class_<DecoderStack>(m, "DecoderStack", "Weights of a stack of blocks by address; keeps nothing alive.")
      .def(py::init([](const std::array<int, 6>& s, address embedding, address norm, double eps, address head,
                       address head_bias) {
        DecoderStack stack{};
        stack.shape = {s[0], s[1], s[2], s[3], s[4], s[5]};
        stack.embedding = at<const float>(embedding);
        stack.norm = {at<const float>(norm), static_cast<float>(eps)};
        stack.head = {at<const float>(head), at<const float>(head_bias)};
        return stack;
      }))
      .def("add_block",
           [](DecoderStack& stack, const std::array<address, 13>& weights, const std::array<double, 5>& numbers,
              int64_t window) { stack.blocks.push_back(make_block(weights, numbers, window)); })
      .def("set_pools",
           [](DecoderStack& stack, const std::vector<address>& k_pools, const std::vector<address>& v_pools) {
             if (k_pools.size() != stack.blocks.size() || v_pools.size() != stack.blocks.size())
               throw std::invalid_argument("DecoderStack: expected one pair of pools per block");
             for (size_t i = 0; i < stack.blocks.size(); ++i) {
               stack.blocks[i].k_pool = at<float>(k_pools[i]);
               stack.blocks[i].v_pool = at<float>(v_pools[i]);
             }
           })
      .def("workspace_floats", [](const DecoderStack& stack, int rows,
                                  int wanted) { return decoder_workspace_floats(stack.shape, rows, wanted); })
      // The broken rule, 0 for none, and the first row that breaks it.
      .def("step",
           [](const DecoderStack& stack, address ids, address positions, address slots, int rows, address cos,
              address sin, int64_t max_positions, int64_t num_slots, address layout, address attention_workspace,
              address workspace, address states, address wanted, int num_wanted, address logits, int threads) {
             const DecoderStep step{at<const int64_t>(ids),
                                    at<const int64_t>(positions),
                                    at<const int32_t>(slots),
                                    rows,
                                    at<const float>(cos),
                                    at<const float>(sin),
                                    max_positions,
                                    num_slots,
                                    at<const int32_t>(layout),
                                    at<float>(attention_workspace),
                                    at<float>(workspace),
                                    at<float>(states),
                                    at<const int64_t>(wanted),
                                    num_wanted,
                                    at<float>(logits),
                                    threads};
             StepFault fault{};
             {
               const py::gil_scoped_release release;
               fault = decoder_step(stack, step);
             }
             return py::make_tuple(static_cast<int>(fault.rule), fault.index);
           });
}
