// decoder on the CPU: one step of token rows through all blocks; its products, norms and attention are rainkernels'
// own. Reference: rainkernels/reference/decoder.py
#include "cpu/decoder.h"

#include <omp.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include <algorithm>
#include <cstring>

#include "cpu/attention.h"
#include "cpu/decoder_edits.h"
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
// Of the narrow products of low-rank updates: a tile of few rows.
constexpr int64_t kNarrowOutputs = 8;

// Neighbouring rows of one member with an adapter.
struct Run {
  const Adapter* adapter;
  int64_t begin, rows;
};

std::vector<Run> runs_of(const DecoderStack& stack, const StepPart* parts, int num_parts) {
  std::vector<Run> runs;
  int64_t row = 0;
  for (int i = 0; i < num_parts; row += parts[i++].rows) {
    if (parts[i].member == 0 || parts[i].rows == 0) continue;
    const Adapter* const adapter = &stack.adapters[parts[i].member - 1];
    if (!runs.empty() && runs.back().adapter == adapter && runs.back().begin + runs.back().rows == row)
      runs.back().rows += parts[i].rows;
    else
      runs.push_back({adapter, row, parts[i].rows});
  }
  return runs;
}

// The greatest rank of an update of one product.
int64_t max_rank(const std::vector<Run>& runs) {
  int rank = 0;
  for (const Run& run : runs)
    for (const BlockUpdate& b : *run.adapter)
      rank = std::max({rank, b.qkv.rank, b.out.rank, b.gate_up.rank, b.down.rank});
  return rank;
}

// Attention of all parts of a step, in their order.
struct Attentions {
  std::vector<AttentionParams> calls;
  std::vector<int64_t> room;  // where the workspace of each begins
  int64_t floats = 0;         // of all
  // Each call alone would leave all threads but one idle: they run at the same time, one thread each.
  bool together = false;

  Attentions(const DecoderShape& s, const StepPart* parts, int num_parts, int threads) {
    double most = 0.0, all = 0.0;
    for (int i = 0; i < num_parts; ++i) {
      AttentionParams p{};
      p.layout = parts[i].layout;
      p.num_qo_heads = s.num_qo_heads;
      p.num_kv_heads = s.num_kv_heads;
      p.head_dim = p.head_dim_v = s.head_dim;
      p.dtype = Dtype::f32;
      p.num_threads = threads;
      calls.push_back(p);
      const double work = attention_work(p);
      most = std::max(most, work);
      all += work;
    }
    together = threads > 1 && most < kSerialAttention && all >= kSerialAttention;
    for (AttentionParams& p : calls) {
      if (together) p.num_threads = 1;
      room.push_back(together ? floats : 0);
      floats = std::max(floats, room.back() + attention_workspace_floats(p));
    }
  }
};

// Under AddressSanitizer the pieces of a workspace lie apart, and nothing may touch what is between them: else a step
// past the end of one would be one into the next, which it takes for right.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kFence = 16;
void fence(float* p, int64_t floats) {
  __asan_poison_memory_region(p, sizeof(float) * floats);
}
void unfence(float* p, int64_t floats) {
  __asan_unpoison_memory_region(p, sizeof(float) * floats);
}
#else
constexpr int64_t kFence = 0;
void fence(float*, int64_t) {}
void unfence(float*, int64_t) {}
#endif

// Pieces of the workspace. base: null where only the size is asked for.
struct Room {
  float* const base;
  float *x, *residual, *normed, *qkv, *mixed, *gate_up, *gated, *wanted, *narrow, *attention;
  int64_t floats;

  Room(const DecoderShape& s, int64_t rows, int64_t num_wanted, int64_t rank, int64_t attention_floats, float* base)
      : base(base) {
    const int64_t heads = int64_t{s.num_qo_heads} * s.head_dim, keys = int64_t{s.num_kv_heads} * s.head_dim;
    floats = 0;
    const auto take = [&](int64_t size) {
      float* const at = base + floats;
      const int64_t room = (size + 15) / 16 * 16 + kFence;
      if (base != nullptr) fence(at + size, room - size);
      floats += room;
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
    narrow = take(rows * rank);
    attention = take(attention_floats);
  }
  ~Room() {
    if (base != nullptr) unfence(base, floats);
  }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
};

// The update of one run by one product: u = x down^T, then y += scale u up^T part by part.
struct Update {
  Product narrow;
  const LinearUpdate* linear;
  float* y;
};

// What the blocks of a step have in common.
struct Pass {
  const DecoderStack& stack;
  const DecoderStep& step;
  std::vector<Run> runs;
  int64_t rank;
  Attentions attentions;
  Room room;
  std::vector<Update> updates;  // of the product that runs

  Pass(const DecoderStack& stack, const DecoderStep& step)
      : stack(stack),
        step(step),
        runs(runs_of(stack, step.parts, step.num_parts)),
        rank(max_rank(runs)),
        attentions(stack.shape, step.parts, step.num_parts, step.num_threads),
        room(stack.shape, step.rows, step.num_wanted, rank, attentions.floats, step.workspace) {
    for (size_t i = 0; i < attentions.calls.size(); ++i)
      attentions.calls[i].workspace = room.attention + attentions.room[i];
  }
};

StepFault check(const DecoderStack& stack, const DecoderStep& step) {
  int r = 0;
  for (int i = 0; i < step.num_parts; ++i) {
    const int64_t num_slots = stack.pools[step.parts[i].member].num_slots;
    for (const int end = r + step.parts[i].rows; r < end; ++r) {
      if (step.ids[r] < 0 || step.ids[r] >= stack.shape.vocab) return {StepRule::id, r, 0};
      if (step.positions[r] < 0 || step.positions[r] >= step.max_positions) return {StepRule::position, r, 0};
      if (step.slots[r] < 0 || step.slots[r] >= num_slots) return {StepRule::slot, r, 0};
    }
  }
  for (int i = 0; i < step.num_wanted; ++i)
    if (step.wanted[i] < 0 || step.wanted[i] >= step.rows) return {StepRule::wanted, i, 0};
  return check_edits(stack, step);
}

void attend(Pass& pass, size_t index) {
  const DecoderShape& s = pass.stack.shape;
  const DecoderBlock& block = pass.stack.blocks[index];
  const DecoderStep& step = pass.step;
  const Room& room = pass.room;
  const int64_t heads = int64_t{s.num_qo_heads} * s.head_dim, keys = int64_t{s.num_kv_heads} * s.head_dim;
  const int64_t width = heads + 2 * keys;
  const DecoderKernels& k = kernels();
  // All rows are in their slots before any attends: parts of one member see each other.
  int64_t row = 0;
  for (int i = 0; i < step.num_parts; ++i) {
    const MemberPools& pools = pass.stack.pools[step.parts[i].member];
    const int64_t end = row + step.parts[i].rows;
    // Rows that share a slot are padding: nothing reads what they leave there.
    const bool parallel = (end - row) * width > kSerialWork;
#pragma omp parallel for schedule(static) num_threads(step.num_threads) if (parallel)
    for (int64_t r = row; r < end; ++r) {
      const int64_t at = step.positions[r] * s.head_dim, slot = step.slots[r] * keys;
      k.rotate_row(s, block, room.qkv + r * width, step.cos + at, step.sin + at, pools.k[index] + slot,
                   pools.v[index] + slot);
    }
    AttentionParams& p = pass.attentions.calls[i];
    p.q = room.qkv + row * width;
    p.q_stride_row = width;
    p.q_stride_head = s.head_dim;
    p.k_pool = pools.k[index];
    p.v_pool = pools.v[index];
    p.out = room.mixed + row * heads;
    p.sinks = block.sinks;
    p.scale = block.scale;
    p.softcap = block.softcap;
    p.window = block.window;
    row = end;
  }
  const std::vector<AttentionParams>& calls = pass.attentions.calls;
  if (pass.attentions.together) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(step.num_threads)
    for (size_t i = 0; i < calls.size(); ++i) attention(calls[i]);
  } else {  // outside of any region: inside of one, of one thread too, OpenMP starts new threads for each of
            // attention's
    for (const AttentionParams& p : calls) attention(p);
  }
}

void gate(const DecoderShape& s, const DecoderStep& step, const Room& room) {
  const DecoderKernels& k = kernels();
  const int64_t n = s.intermediate;
  const bool parallel = step.rows * n > kSerialWork;
#pragma omp parallel for schedule(static) num_threads(step.num_threads) if (parallel)
  for (int r = 0; r < step.rows; ++r) k.gated_row(room.gate_up + r * 2 * n, room.gated + r * n, s.intermediate);
}

// Thread i's part of n of a product, in pieces of `size` outputs.
void share(const Product& p, int64_t size, int64_t i, int64_t n) {
  const int64_t pieces = (p.out + size - 1) / size;
  const int64_t begin = pieces * i / n * size, end = pieces * (i + 1) / n * size;
  if (begin < end) kernels().product(p, begin, std::min(end, p.out));
}

// Thread i's part of n of a product and its updates, which touch neither other rows nor each other's outputs.
void share_updated(const Product& p, const std::vector<Update>& updates, int64_t i, int64_t n) {
  for (const Update& u : updates) share(u.narrow, kNarrowOutputs, i, n);
  share(p, kOutputs, i, n);
  if (updates.empty()) return;
  if (n > 1) {
#pragma omp barrier
  }
  for (const Update& u : updates) {
    const float* narrow = u.narrow.y;
    for (const LowRank& part : u.linear->parts) {
      const int64_t blocks = (part.size + 15) / 16;
      const Expansion e{&part, narrow, u.narrow.out, u.y, p.out, u.narrow.rows};
      kernels().expand(e, blocks * i / n, blocks * (i + 1) / n);
      narrow += part.rank;
    }
  }
}

void run_product(const Product& p, const std::vector<Update>& updates, int threads) {
  if (p.rows == 0) return;  // an empty step, or nothing wanted
  if (threads == 1 || p.rows * p.in * p.out < kSerialProduct) return share_updated(p, updates, 0, 1);
#pragma omp parallel num_threads(threads)
  share_updated(p, updates, omp_get_thread_num(), omp_get_num_threads());
}

// A product of block `index` over all rows, updated where they belong to a member with an adapter.
void run_linear(Pass& pass, size_t index, Linear DecoderBlock::* linear, LinearUpdate BlockUpdate::* update,
                const float* from, int64_t in, float* to, int64_t out) {
  const Linear& base = pass.stack.blocks[index].*linear;
  pass.updates.clear();
  for (const Run& run : pass.runs) {
    const LinearUpdate& u = (*run.adapter)[index].*update;
    if (u.parts.empty()) continue;
    float* const narrow = pass.room.narrow + run.begin * pass.rank;
    pass.updates.push_back(
        {{from + run.begin * in, u.down, nullptr, narrow, run.rows, in, u.rank}, &u, to + run.begin * out});
  }
  run_product({from, base.weight, base.bias, to, pass.step.rows, in, out}, pass.updates, pass.step.num_threads);
}

}  // namespace

void linear_rows(const Linear& linear, const float* from, int64_t in, float* to, int64_t out, int64_t rows,
                 int threads) {
  run_product({from, linear.weight, linear.bias, to, rows, in, out}, {}, threads);
}

int64_t decoder_workspace_floats(const DecoderStack& stack, const std::vector<StepPart>& parts, int num_wanted,
                                 int threads) {
  const int count = static_cast<int>(parts.size());
  int64_t rows = 0;
  for (const StepPart& part : parts) rows += part.rows;
  const Attentions attentions(stack.shape, parts.data(), count, threads);
  const int64_t rank = max_rank(runs_of(stack, parts.data(), count));
  return Room(stack.shape, rows, num_wanted, rank, attentions.floats, nullptr).floats;
}

StepFault decoder_step(const DecoderStack& stack, const DecoderStep& step) {
  const StepFault fault = check(stack, step);
  if (fault.rule != StepRule::ok) return fault;
  Pass pass(stack, step);
  const DecoderShape& s = stack.shape;
  const Room& room = pass.room;
  const int64_t rows = step.rows, hidden = s.hidden, heads = int64_t{s.num_qo_heads} * s.head_dim;
  const int64_t width = heads + 2 * int64_t{s.num_kv_heads} * s.head_dim, row_bytes = sizeof(float) * hidden;
  const NormRows stream{room.x, room.residual, room.normed, rows, s.hidden, step.num_threads};
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(room.x + r * hidden, stack.embedding + step.ids[r] * hidden, row_bytes);
  std::memset(room.residual, 0, rows * row_bytes);
  add_norm(stream, stack.blocks[0].attention_norm);
  for (size_t i = 0; i < stack.blocks.size(); ++i) {
    const DecoderBlock& block = stack.blocks[i];
    run_linear(pass, i, &DecoderBlock::qkv, &BlockUpdate::qkv, room.normed, hidden, room.qkv, width);
    attend(pass, i);
    run_linear(pass, i, &DecoderBlock::out, &BlockUpdate::out, room.mixed, heads, room.x, hidden);
    add_norm_at(stack, step, static_cast<int>(i), StackTap::attn_out, stream, block.mlp_norm);
    run_linear(pass, i, &DecoderBlock::gate_up, &BlockUpdate::gate_up, room.normed, hidden, room.gate_up,
               2 * int64_t{s.intermediate});
    gate(s, step, room);
    run_linear(pass, i, &DecoderBlock::down, &BlockUpdate::down, room.gated, s.intermediate, room.x, hidden);
    const bool last = i + 1 == stack.blocks.size();
    add_norm_at(stack, step, static_cast<int>(i), StackTap::mlp_out, stream,
                last ? stack.norm : stack.blocks[i + 1].attention_norm);
  }
  for (int64_t i = 0, r = 0; i < step.num_parts; ++i)
    for (const int64_t end = r + step.parts[i].rows; r < end; ++r)
      if (step.parts[i].states != nullptr)
        std::memcpy(step.parts[i].states + step.slots[r] * hidden, room.normed + r * hidden, row_bytes);
  for (int64_t i = 0; i < step.num_wanted; ++i)
    std::memcpy(room.wanted + i * hidden, room.normed + step.wanted[i] * hidden, row_bytes);
  linear_rows(stack.head, room.wanted, s.hidden, step.logits, s.vocab, step.num_wanted, step.num_threads);
  return fault;
}

}  // namespace rainkernels
