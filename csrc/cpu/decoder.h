// What the driver of the decoder family and its per-ISA kernels share on the CPU.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "rainkernels/decoder.h"

namespace rainkernels {

// K and V of one member, [num_slots, num_kv_heads, head_dim] per block.
struct MemberPools {
  std::vector<float*> k, v;
  int64_t num_slots;
};

// The updates of one product. No two parts have an output in common.
struct LinearUpdate {
  const float* down;  // [rank, in], those of the parts one below the other
  int rank;           // of all parts together
  std::vector<LowRank> parts;
};

struct BlockUpdate {
  LinearUpdate qkv, out, gate_up, down;
};

using Adapter = std::vector<BlockUpdate>;  // one per block

struct DecoderStack {
  DecoderShape shape;
  const float* embedding;  // [vocab, hidden]
  std::vector<DecoderBlock> blocks;
  RmsNorm norm;
  Linear head;
  std::vector<Adapter> adapters;
  std::vector<MemberPools> pools;  // of the members: one more than adapters
  std::vector<EditSite> sites;
  std::vector<std::array<std::vector<int>, kStackTaps>> sites_at;  // [blocks] indices of the sites of each place
};

enum class StepRule : int { ok = 0, id, position, slot, wanted, edit_slot, capture_row };

struct StepFault {
  StepRule rule;
  int64_t index;
  int64_t which;  // the site or the capture; else 0
};

// to [rows, out] = from [rows, in] weight^T + bias
void linear_rows(const Linear& linear, const float* from, int64_t in, float* to, int64_t out, int64_t rows,
                 int threads);
int64_t decoder_workspace_floats(const DecoderStack& stack, const std::vector<StepPart>& parts, int num_wanted,
                                 int threads);
// Runs the step, unless a rule is broken: then nothing is written.
StepFault decoder_step(const DecoderStack& stack, const DecoderStep& step);

// y [rows, out] = x [rows, in] weight [out, in]^T + bias, for the outputs [begin, end).
struct Product {
  const float *x, *weight, *bias;  // bias: null for none
  float* y;
  int64_t rows, in, out;
};

// y [rows, ...] at the outputs of a low-rank update += scale u up^T; u [rows, rank].
struct Expansion {
  const LowRank* part;
  const float* u;
  int64_t u_stride;
  float* y;
  int64_t y_stride, rows;
};

struct DecoderKernels {
  void (*product)(const Product& p, int64_t begin, int64_t end);
  // For the blocks [begin, end) of sixteen outputs.
  void (*expand)(const Expansion& e, int64_t begin, int64_t end);
  // One row of q, k and v: norms the heads where there are norms, turns q and k; q stays, k and v go to their slots.
  void (*rotate_row)(const DecoderShape& shape, const DecoderBlock& block, float* qkv, const float* cos,
                     const float* sin, float* k, float* v);
  // out = silu(gate) * up; gate_up holds n gates, then n ups.
  void (*gated_row)(const float* gate_up, float* out, int n);
};

namespace baseline {
extern const DecoderKernels decoder_kernels;
}
namespace avx2 {
extern const DecoderKernels decoder_kernels;
}
namespace avx512 {
extern const DecoderKernels decoder_kernels;
}

}  // namespace rainkernels
