// Bindings of the decoder family: raw addresses and sizes, checked by rainkernels/ops/decoder.py.
#include "cpu/decoder.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

namespace py = pybind11;
using namespace rainkernels;
using address = std::uintptr_t;

namespace {

template <class T>
T* at(address where) {
  return reinterpret_cast<T*>(where);
}

// Addresses of a block's weights in the order of rainkernels/ops/_decoder_native.py, its three eps, scale, softcap,
// window.
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

// Of one part of an update: address of up, first, size, rank, scale. Of a product: address of down, its parts.
using PartSpec = std::tuple<address, int, int, int, double>;
using UpdateSpec = std::pair<address, std::vector<PartSpec>>;
// Of a block: updates of qkv, out, gate_up and down.
using BlockSpec = std::array<UpdateSpec, 4>;

LinearUpdate make_update(const UpdateSpec& spec) {
  LinearUpdate update{at<const float>(spec.first), 0, {}};
  for (const auto& [up, first, size, rank, scale] : spec.second) {
    update.parts.push_back({at<const float>(up), first, size, rank, static_cast<float>(scale)});
    update.rank += rank;
  }
  return update;
}

// Of a part of a step: member, rows, address of the layout, address of the states.
using StepPartSpec = std::tuple<int, int, address, address>;

std::vector<StepPart> make_parts(const DecoderStack& stack, const std::vector<StepPartSpec>& specs) {
  std::vector<StepPart> parts;
  for (const auto& [member, rows, layout, states] : specs) {
    if (member < 0 || static_cast<size_t>(member) >= stack.pools.size())
      throw std::invalid_argument("DecoderStack: there is no such member");
    parts.push_back({member, rows, at<const int32_t>(layout), at<float>(states)});
  }
  return parts;
}

// Of a table of edits, in the order of table_arguments of rainkernels/ops/edits.py.
using TableSpec = std::array<int64_t, 13>;

EditTableView make_table(const TableSpec& spec) {
  const auto where = [&](int i) { return static_cast<address>(spec[i]); };
  EditTableView t{};
  t.directions = at<const void>(where(0));
  t.slot_step = spec[1];
  t.dtype = static_cast<Dtype>(spec[2]);
  t.scale = at<const float>(where(3));
  t.scale_step = spec[4];
  t.gram = at<const float>(where(5));
  t.op = at<const int32_t>(where(6));
  t.alpha = at<const float>(where(7));
  t.target = at<const float>(where(8));
  t.count = at<const int32_t>(where(9));
  t.norm = at<const int32_t>(where(10));
  t.num_slots = static_cast<int>(spec[11]);
  t.max_directions = static_cast<int>(spec[12]);
  return t;
}

// Of a place where rows are edited: layer, tap, table, column.
using SiteSpec = std::tuple<int, int, TableSpec, int>;

void set_edits(DecoderStack& stack, const std::vector<SiteSpec>& specs) {
  std::vector<EditSite> sites;
  std::vector<std::array<std::vector<int>, kStackTaps>> sites_at(stack.blocks.size());
  for (const auto& [layer, tap, table, column] : specs) {
    if (tap < 0 || tap >= kStackTaps) throw std::invalid_argument("DecoderStack: there is no such tap");
    sites_at.at(layer)[tap].push_back(static_cast<int>(sites.size()));
    sites.push_back({layer, static_cast<StackTap>(tap), make_table(table), column});
  }
  stack.sites = std::move(sites);
  stack.sites_at = std::move(sites_at);
}

// Of rows wanted from one place: layer, tap, address and number of the rows, address of the output.
using CaptureSpec = std::tuple<int, int, address, int64_t, address>;

std::vector<StepCapture> make_captures(const std::vector<CaptureSpec>& specs) {
  std::vector<StepCapture> captures;
  for (const auto& [layer, tap, rows, num_rows, out] : specs)
    captures.push_back({layer, static_cast<StackTap>(tap), at<const int64_t>(rows), num_rows, at<float>(out)});
  return captures;
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
        stack.pools.resize(1);
        return stack;
      }))
      .def("add_block",
           [](DecoderStack& stack, const std::array<address, 13>& weights, const std::array<double, 5>& numbers,
              int64_t window) { stack.blocks.push_back(make_block(weights, numbers, window)); })
      .def("add_adapter",
           [](DecoderStack& stack, const std::vector<BlockSpec>& specs) {
             if (specs.size() != stack.blocks.size())
               throw std::invalid_argument("DecoderStack: expected one update per block");
             Adapter adapter;
             for (const BlockSpec& s : specs)
               adapter.push_back({make_update(s[0]), make_update(s[1]), make_update(s[2]), make_update(s[3])});
             stack.adapters.push_back(std::move(adapter));
             stack.pools.resize(stack.adapters.size() + 1);
           })
      .def("set_pools",
           [](DecoderStack& stack, int member, const std::vector<address>& k_pools, const std::vector<address>& v_pools,
              int64_t num_slots) {
             if (k_pools.size() != stack.blocks.size() || v_pools.size() != stack.blocks.size())
               throw std::invalid_argument("DecoderStack: expected one pair of pools per block");
             MemberPools pools{{}, {}, num_slots};
             for (size_t i = 0; i < stack.blocks.size(); ++i) {
               pools.k.push_back(at<float>(k_pools[i]));
               pools.v.push_back(at<float>(v_pools[i]));
             }
             stack.pools.at(member) = std::move(pools);
           })
      .def("set_edits", &set_edits)
      .def("workspace_floats",
           [](const DecoderStack& stack, const std::vector<StepPartSpec>& parts, int wanted, int threads) {
             return decoder_workspace_floats(stack, make_parts(stack, parts), wanted, threads);
           })
      // The broken rule, 0 for none, the first row that breaks it, and of which site or capture.
      .def("step", [](const DecoderStack& stack, address ids, address positions, address slots, int rows,
                      const std::vector<StepPartSpec>& specs, address cos, address sin, int64_t max_positions,
                      address workspace, address wanted, int num_wanted, address logits, int threads,
                      address edit_slots, const std::vector<CaptureSpec>& capture_specs) {
        const std::vector<StepPart> parts = make_parts(stack, specs);
        const std::vector<StepCapture> captures = make_captures(capture_specs);
        const DecoderStep step{at<const int64_t>(ids),
                               at<const int64_t>(positions),
                               at<const int32_t>(slots),
                               rows,
                               parts.data(),
                               static_cast<int>(parts.size()),
                               at<const float>(cos),
                               at<const float>(sin),
                               max_positions,
                               at<float>(workspace),
                               at<const int64_t>(wanted),
                               num_wanted,
                               at<float>(logits),
                               threads,
                               at<const int32_t>(edit_slots),
                               captures.data(),
                               static_cast<int>(captures.size())};
        StepFault fault{};
        {
          const py::gil_scoped_release release;
          fault = decoder_step(stack, step);
        }
        return py::make_tuple(static_cast<int>(fault.rule), fault.index, fault.which);
      });
}
