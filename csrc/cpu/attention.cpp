// tree_attention driver on the CPU: splits the plan into units for the threads.   Reference:
// rainkernels/reference/attention.py Enough blocks x KV heads: a unit runs all chunks of a block and writes its rows.
// Otherwise a unit is one chunk, partials go to the workspace and a second pass merges them in position order; both
// ways round alike.
#include "cpu/attention.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "cpu/isa.h"

namespace rainkernels {
namespace {

// 256 MiB of partials: a prefill that needs more has units enough.
constexpr int64_t kMaxPartFloats = int64_t{1} << 26;

const AttentionKernels& kernels() {
#if defined(RK_HAS_X86_ISAS)
  switch (detected_isa()) {
    case Isa::avx512:
      return avx512::attention_kernels;
    case Isa::avx2:
      return avx2::attention_kernels;
    default:
      break;
  }
#endif
  return baseline::attention_kernels;
}

bool splits_chunks(const AttentionParams& p, const LayoutHeader& h) {
  if (p.num_threads == 1 || h.max_block_chunks <= 1) return false;
  const int units = h.num_blocks * p.num_kv_heads;
  if (h.num_parts * part_floats(h.group, p.head_dim_v) * p.num_kv_heads > kMaxPartFloats) return false;
  return units < 4 * p.num_threads && !(h.num_blocks == 1 && units % p.num_threads == 0);
}

int64_t aligned_scratch(const AttentionParams& p, const LayoutHeader& h) {
  return (scratch_floats(h.max_block_rows, h.group, p.head_dim, p.head_dim_v) + 1023) / 1024 * 1024;
}

void run_blocks(const AttentionParams& p, const LayoutView& plan, int threads) {
  const LayoutHeader& h = *plan.header;
  const AttentionKernels& k = kernels();
  const int64_t scratch = aligned_scratch(p, h);
  const int units = h.num_blocks * p.num_kv_heads;
  const auto one = [&](int u, int thread) {
    // Late blocks come first: in a causal prefill they have the most keys.
    const int block = h.num_blocks - 1 - u / p.num_kv_heads;
    const int chunks = plan.block_chunk[block + 1] - plan.block_chunk[block];
    k.run(p, {block, u % p.num_kv_heads, 0, chunks, nullptr}, p.workspace + thread * scratch);
  };
  if (threads == 1) {
    for (int u = 0; u < units; ++u) one(u, 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int u = 0; u < units; ++u) one(u, omp_get_thread_num());
}

void run_chunks(const AttentionParams& p, const LayoutView& plan, int threads) {
  const LayoutHeader& h = *plan.header;
  const AttentionKernels& k = kernels();
  const int64_t scratch = aligned_scratch(p, h);
  float* const parts = p.workspace + threads * scratch;
  const auto rows = [&](int b) { return int64_t{plan.block_row[b + 1] - plan.block_row[b]}; };
  const auto part = [&](int b, int head, int chunk) {
    return parts + part_floats(h.group, p.head_dim_v) *
                       (p.num_kv_heads * (plan.block_part[b] + rows(b) * chunk) + rows(b) * head);
  };
  const int tasks = h.num_block_chunks * p.num_kv_heads, ends = h.num_blocks * p.num_kv_heads;
#pragma omp parallel num_threads(threads)
  {
    float* const mine = p.workspace + omp_get_thread_num() * scratch;
#pragma omp for schedule(dynamic, 1)
    for (int t = 0; t < tasks; ++t) {
      const int at = t / p.num_kv_heads, head = t % p.num_kv_heads;
      const int b = static_cast<int>(std::upper_bound(plan.block_chunk, plan.block_chunk + h.num_blocks + 1, at) -
                                     plan.block_chunk) -
                    1;
      const int chunk = at - plan.block_chunk[b];
      k.run(p, {b, head, chunk, chunk + 1, part(b, head, chunk)}, mine);
    }
#pragma omp for schedule(dynamic, 1)
    for (int u = 0; u < ends; ++u) {
      const int b = u / p.num_kv_heads, head = u % p.num_kv_heads;
      const int64_t stride = part_floats(h.group, p.head_dim_v) * p.num_kv_heads * rows(b);
      k.finish(p, {b, head, 0, plan.block_chunk[b + 1] - plan.block_chunk[b], nullptr}, part(b, head, 0), stride, mine);
    }
  }
}

float value_of(const void* v, int64_t i, Dtype dtype) {
  if (dtype == Dtype::f32) return static_cast<const float*>(v)[i];
  const uint16_t bits = static_cast<const uint16_t*>(v)[i];
  return dtype == Dtype::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

void set_value(void* v, int64_t i, float x, Dtype dtype) {
  if (dtype == Dtype::f32)
    static_cast<float*>(v)[i] = x;
  else
    static_cast<uint16_t*>(v)[i] = dtype == Dtype::bf16 ? float_to_bf16(x) : float_to_f16(x);
}

}  // namespace

double attention_work(const AttentionParams& p) {
  const LayoutHeader& h = *LayoutView(p.layout).header;
  const uint64_t pairs =
      static_cast<uint64_t>(static_cast<uint32_t>(h.work_hi)) << 32 | static_cast<uint32_t>(h.work_lo);
  return static_cast<double>(pairs) * p.num_qo_heads * (p.head_dim + p.head_dim_v);
}

int64_t attention_workspace_floats(const AttentionParams& p) {
  const LayoutHeader& h = *LayoutView(p.layout).header;
  const int64_t partials = splits_chunks(p, h) ? h.num_parts * part_floats(h.group, p.head_dim_v) * p.num_kv_heads : 0;
  return p.num_threads * aligned_scratch(p, h) + partials;
}

void attention(const AttentionParams& p) {
  const LayoutView plan(p.layout);
  if (attention_work(p) < kSerialAttention)
    run_blocks(p, plan, 1);
  else if (splits_chunks(p, *plan.header))
    run_chunks(p, plan, p.num_threads);
  else
    run_blocks(p, plan, p.num_threads);
}

void merge_state(const void* v_a, const float* lse_a, const void* v_b, const float* lse_b, void* v, float* lse,
                 int64_t rows, int dim, Dtype dtype, int num_threads) {
  const int threads = rows * dim < 65536 ? 1 : num_threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const MergeWeights w = merge_weights(lse_a[r], lse_b[r]);
    // An empty side drops out whatever its v holds; any other NaN stays, under a weight of 0 too.
    const bool has_a = lse_a[r] != -INFINITY, has_b = lse_b[r] != -INFINITY;
    for (int64_t i = r * dim; i < (r + 1) * dim; ++i) {
      const float a = has_a ? w.a * value_of(v_a, i, dtype) : 0.0f, b = has_b ? w.b * value_of(v_b, i, dtype) : 0.0f;
      set_value(v, i, a + b, dtype);
    }
    lse[r] = w.lse;
  }
}

}  // namespace rainkernels
