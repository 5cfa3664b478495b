// Attention over tree paths: the plan's flat layout, the call's parameters and the scalar maths.
// Reference: rainkernels/reference/attention.py
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "rainkernels/dtypes.h"

namespace rainkernels {

// Keys per chunk, in absolute path positions. A row's partial of a chunk never depends on how the path is split.
constexpr int kChunk = 256;
constexpr int kKeyTile = 64;
// Scores of a row: one chunk, plus room for the tile that begins in its last key.
constexpr int kScoreStride = kChunk + kKeyTile;

enum class PlanRule : int { ok = 0, indptr, parent, start, slot, row_segment, row_position };

// A run of keys at consecutive positions inside one chunk, seen by the local rows [row_lo, row_hi) of one block.
struct PlanEntry {
  int32_t key_offset;  // first key in LayoutView::keys
  int32_t position;    // absolute position of that key
  int32_t num_keys;
  int32_t row_lo, row_hi;
  int32_t contiguous;  // 1: the slots are consecutive
};

// Header of the flat int32 layout; offsets count int32 from its beginning.
struct LayoutHeader {
  int32_t num_rows, num_blocks, num_block_chunks, num_entries, num_keys, group;
  int32_t max_block_rows, max_block_chunks, num_parts;
  int32_t row_order, row_position, block_row, block_chunk, block_part, chunk_entry, entries, keys;
  int32_t work_lo, work_hi;  // sum over entries of keys x rows, 64 bits
};

struct LayoutView {
  const LayoutHeader* header;
  const int32_t* row_order;     // [num_rows] caller's index of each row, rows depth first
  const int32_t* row_position;  // [num_rows] in that order, -1 for padding
  const int32_t* block_row;     // [num_blocks + 1]
  const int32_t* block_chunk;   // [num_blocks + 1] into chunk_entry; chunk c of block b is block_chunk[b] + c
  const int32_t* block_part;    // [num_blocks + 1] sum of rows x chunks of the blocks before
  const int32_t* chunk_entry;   // [num_block_chunks + 1] into entries
  const PlanEntry* entries;     // depth first inside a chunk
  const int32_t* keys;          // slots

  RK_ALWAYS explicit LayoutView(const int32_t* raw)
      : header(reinterpret_cast<const LayoutHeader*>(raw)),
        row_order(raw + header->row_order),
        row_position(raw + header->row_position),
        block_row(raw + header->block_row),
        block_chunk(raw + header->block_chunk),
        block_part(raw + header->block_part),
        chunk_entry(raw + header->chunk_entry),
        entries(reinterpret_cast<const PlanEntry*>(raw + header->entries)),
        keys(raw + header->keys) {}
};

struct AttentionParams {
  const void* q;  // [num_rows, num_qo_heads, head_dim], strides in elements
  int64_t q_stride_row, q_stride_head;
  const void* k_pool;  // [num_slots, num_kv_heads, head_dim]
  const void* v_pool;  // [num_slots, num_kv_heads, head_dim_v]
  void* out;           // [num_rows, num_qo_heads, head_dim_v]
  float* lse;          // [num_rows, num_qo_heads] or null
  const float* sinks;  // [num_qo_heads] or null
  float* workspace;
  const int32_t* layout;
  int num_qo_heads, num_kv_heads, head_dim, head_dim_v;
  Dtype dtype;
  float scale, softcap;
  int64_t window;  // 0: none
  int num_threads;
};

RK_LOCAL int round_up_16(int n) {
  return (n + 15) & ~15;
}

// Floats of the scratch one thread needs; the order of the pieces is attention_kernels.cpp's own.
static inline int64_t scratch_floats(int max_block_rows, int group, int head_dim, int head_dim_v) {
  const int64_t m = int64_t{max_block_rows} * group, dv = round_up_16(head_dim_v);
  const int64_t per_row = round_up_16(head_dim) + kScoreStride + 2 * dv + 6;
  return (m + 1) * per_row + int64_t{kKeyTile} * (round_up_16(head_dim) + dv) + 256;
}

// Floats of one (block, chunk, KV head) partial: m rows of accumulators, then m maxima, then m sums.
static inline int64_t part_floats(int64_t m, int head_dim_v) {
  return m * (round_up_16(head_dim_v) + 2);
}

// Weights of two partials in the merge: w_a + w_b = 1 unless both are empty, NaN where an lse is NaN or +inf.
struct MergeWeights {
  float a, b, lse;
};

RK_LOCAL MergeWeights merge_weights(float lse_a, float lse_b) {
  if (lse_a == -INFINITY && lse_b == -INFINITY) return {0.0f, 0.0f, -INFINITY};
  const float top = lse_a > lse_b ? lse_a : lse_b;
  // inf - inf below would turn the lse into NaN; a NaN on either side passes through by itself.
  if (top == INFINITY && lse_a == lse_a && lse_b == lse_b) return {NAN, NAN, INFINITY};
  const float a = expf(lse_a - top), b = expf(lse_b - top), sum = a + b;
  return {a / sum, b / sum, top + logf(sum)};
}

}  // namespace rainkernels
