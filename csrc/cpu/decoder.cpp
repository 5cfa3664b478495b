// decoder on the CPU: one step of token rows through all blocks; its products, norms and attention are rainkernels'
// own. Reference: rainkernels/reference/decoder.py
#include "cpu/decoder.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "cpu/attention.h"
#include "cpu/edits.h"
#include "cpu/isa.h"

namespace rainkernels {
namespace {

// Elements read and written below which waking a second thread costs more than it saves.
constexpr int64_t kSerialWork = 1 << 16;

const DecoderKernels& kernels() {
#if defined(RK_HAS_X86_ISAS)
  switch (detected_isa()) {
    case Isa::avx512:
      return avx512::decoder_kernels;
    case Isa::avx2:
      return avx2::decoder_kernels;
    default:
      break;
  }
#endif
  return baseline::decoder_kernels;
}

// Multiplications below which waking a second thread costs more than it saves, and outputs a thread takes at a time.
constexpr int64_t kSerialProduct = 1 << 19, kOutputs = 32;

// Pieces of the workspace.
struct Room {
  float *x, *residual, *normed, *qkv, *mixed, *gate_up, *gated, *wanted;
  int64_t floats;

  Room(const DecoderShape& s, int64_t rows, int64_t num_wanted, float* base) {
    const int64_t heads = int64_t{s.num_qo_heads} * s.head_dim, keys = int64_t{s.num_kv_heads} * s.head_dim;
    floats = 0;
    const auto take = [&](int64_t size) {
      float* const at = base + floats;
      floats += (size + 15) / 16 * 16;
      return at;
    };
    x = take(rows * s.hidden);
    residual = take(rows * s.hidden);
    normed = take(rows * s.hidden);
    qkv = take(rows * (heads + 2 * keys));
    mixed = take(rows * heads);
    gate_up = take(rows * 2 * s.intermediate);
    gated = take(rows * s.intermediate);
    wanted = take(num_wanted * s.hidden);
  }
};

StepFault check(const DecoderStack& stack, const DecoderStep& step) {
  for (int r = 0; r < step.rows; ++r) {
    if (step.ids[r] < 0 || step.ids[r] >= stack.shape.vocab) return {StepRule::id, r};
    if (step.positions[r] < 0 || step.positions[r] >= step.max_positions) return {StepRule::position, r};
    if (step.slots[r] < 0 || step.slots[r] >= step.num_slots) return {StepRule::slot, r};
  }
  for (int i = 0; i < step.num_wanted; ++i)
    if (step.wanted[i] < 0 || step.wanted[i] >= step.rows) return {StepRule::wanted, i};
  return {StepRule::ok, 0};
}

// residual += x; normed = its norm
void add_norm(const Room& room, const RmsNorm& norm, int64_t rows, int hidden, int threads) {
  EditParams p{};
  p.x = room.x;
  p.residual = room.residual;
  p.out = room.normed;
  p.x_stride = p.residual_stride = p.out_stride = hidden;
  p.weight = norm.weight;
  p.weight_dtype = p.dtype = Dtype::f32;
  p.rows = rows;
  p.hidden = hidden;
  p.fused = true;
  p.eps = norm.eps;
  p.tap = EditTap::mlp_out;
  p.cast = NormCast::llama;
  p.num_threads = threads;
  edits(p);
}

void attend(const DecoderStack& stack, const DecoderBlock& block, const DecoderStep& step, const Room& room) {
  const DecoderShape& s = stack.shape;
  const int64_t keys = int64_t{s.num_kv_heads} * s.head_dim, width = int64_t{s.num_qo_heads} * s.head_dim + 2 * keys;
  const DecoderKernels& k = kernels();
  // Rows that share a slot are padding: nothing reads what they leave there.
  const bool parallel = step.rows * width > kSerialWork;
#pragma omp parallel for schedule(static) num_threads(step.num_threads) if (parallel)
  for (int r = 0; r < step.rows; ++r) {
    const int64_t at = step.positions[r] * s.head_dim, slot = step.slots[r] * keys;
    k.rotate_row(s, block, room.qkv + r * width, step.cos + at, step.sin + at, block.k_pool + slot,
                 block.v_pool + slot);
  }
  AttentionParams p{};
  p.q = room.qkv;
  p.q_stride_row = width;
  p.q_stride_head = s.head_dim;
  p.k_pool = block.k_pool;
  p.v_pool = block.v_pool;
  p.out = room.mixed;
  p.sinks = block.sinks;
  p.workspace = step.attention_workspace;
  p.layout = step.layout;
  p.num_qo_heads = s.num_qo_heads;
  p.num_kv_heads = s.num_kv_heads;
  p.head_dim = p.head_dim_v = s.head_dim;
  p.dtype = Dtype::f32;
  p.scale = block.scale;
  p.softcap = block.softcap;
  p.window = block.window;
  p.num_threads = step.num_threads;
  attention(p);
}

void gate(const DecoderShape& s, const DecoderStep& step, const Room& room) {
  const DecoderKernels& k = kernels();
  const int64_t n = s.intermediate;
  const bool parallel = step.rows * n > kSerialWork;
#pragma omp parallel for schedule(static) num_threads(step.num_threads) if (parallel)
  for (int r = 0; r < step.rows; ++r) k.gated_row(room.gate_up + r * 2 * n, room.gated + r * n, s.intermediate);
}

}  // namespace

void linear_rows(const Linear& linear, const float* from, int64_t in, float* to, int64_t out, int64_t rows,
                 int threads) {
  if (rows == 0) return;  // an empty step, or nothing wanted
  const Product p{from, linear.weight, linear.bias, to, rows, in, out};
  const DecoderKernels& k = kernels();
  if (threads == 1 || rows * in * out < kSerialProduct) {
    k.product(p, 0, out);
    return;
  }
  const int64_t pieces = (out + kOutputs - 1) / kOutputs;
#pragma omp parallel num_threads(threads)
  {
    const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
    const int64_t begin = pieces * i / n * kOutputs, end = pieces * (i + 1) / n * kOutputs;
    if (begin < end) k.product(p, begin, std::min(end, out));
  }
}

int64_t decoder_workspace_floats(const DecoderShape& shape, int rows, int num_wanted) {
  return Room(shape, rows, num_wanted, nullptr).floats;
}

StepFault decoder_step(const DecoderStack& stack, const DecoderStep& step) {
  const StepFault fault = check(stack, step);
  if (fault.rule != StepRule::ok) return fault;
  const DecoderShape& s = stack.shape;
  const Room room(s, step.rows, step.num_wanted, step.workspace);
  const int64_t rows = step.rows, heads = int64_t{s.num_qo_heads} * s.head_dim;
  const int64_t width = heads + 2 * int64_t{s.num_kv_heads} * s.head_dim, row_bytes = sizeof(float) * s.hidden;
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(room.x + r * s.hidden, stack.embedding + step.ids[r] * s.hidden, row_bytes);
  std::memset(room.residual, 0, rows * row_bytes);
  for (const DecoderBlock& block : stack.blocks) {
    add_norm(room, block.attention_norm, rows, s.hidden, step.num_threads);
    linear_rows(block.qkv, room.normed, s.hidden, room.qkv, width, rows, step.num_threads);
    attend(stack, block, step, room);
    linear_rows(block.out, room.mixed, heads, room.x, s.hidden, rows, step.num_threads);
    add_norm(room, block.mlp_norm, rows, s.hidden, step.num_threads);
    linear_rows(block.gate_up, room.normed, s.hidden, room.gate_up, 2 * int64_t{s.intermediate}, rows,
                step.num_threads);
    gate(s, step, room);
    linear_rows(block.down, room.gated, s.intermediate, room.x, s.hidden, rows, step.num_threads);
  }
  add_norm(room, stack.norm, rows, s.hidden, step.num_threads);
  for (int64_t r = 0; step.states != nullptr && r < rows; ++r)
    std::memcpy(step.states + step.slots[r] * int64_t{s.hidden}, room.normed + r * s.hidden, row_bytes);
  for (int64_t i = 0; i < step.num_wanted; ++i)
    std::memcpy(room.wanted + i * s.hidden, room.normed + step.wanted[i] * s.hidden, row_bytes);
  linear_rows(stack.head, room.wanted, s.hidden, step.logits, s.vocab, step.num_wanted, step.num_threads);
  return fault;
}

}  // namespace rainkernels
