// What the attention planner, its driver and the per-ISA kernels share on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "rainkernels/attention.h"

namespace rainkernels {

struct PlanInputs {
  const int32_t *parent, *start, *indptr;  // [segments], [segments], [segments + 1]
  int num_segments;
  const int32_t* slots;
  int64_t num_keys;
  const int32_t *row_segment, *row_position;
  int num_rows;
};

struct PlanCheck {
  PlanRule rule;
  int64_t index;
  int32_t max_slot;
};

// Segments and rows in depth-first order: the rows at and below a segment are one interval, its own rows first.
struct AttentionForest {
  std::vector<int32_t> rank;            // [segments] place in depth-first order
  std::vector<int32_t> segment_at;      // inverse of rank
  std::vector<int32_t> subtree;         // [segments] segments at and below
  std::vector<int32_t> row_lo, row_hi;  // [segments] sorted rows below, the segment's own included
  std::vector<int32_t> row_order;       // [rows]
};

PlanCheck check_plan(const PlanInputs& in);
AttentionForest order_forest(const PlanInputs& in);
std::vector<int32_t> build_layout(const PlanInputs& in, int group);

// Multiply-adds below which waking a second thread costs more than it saves.
constexpr double kSerialAttention = 1.0e6;
double attention_work(const AttentionParams& p);  // in multiply-adds
int64_t attention_workspace_floats(const AttentionParams& p);
void attention(const AttentionParams& p);
void merge_state(const void* v_a, const float* lse_a, const void* v_b, const float* lse_b, void* v, float* lse,
                 int64_t rows, int dim, Dtype dtype, int num_threads);

// Work of one thread: chunks [chunk_begin, chunk_end) of one block for one KV head. `part` null: the unit holds the
// block's only chunks and writes the output; otherwise it holds one chunk and leaves its partial there.
struct AttentionUnit {
  int block, kv_head, chunk_begin, chunk_end;
  float* part;
};

struct AttentionKernels {
  void (*run)(const AttentionParams& p, const AttentionUnit& unit, float* scratch);
  // Merges the partials of a block's chunks, `part_stride` floats apart, in position order and writes the output.
  void (*finish)(const AttentionParams& p, const AttentionUnit& unit, const float* parts, int64_t part_stride,
                 float* scratch);
};

namespace baseline {
extern const AttentionKernels attention_kernels;
}
namespace avx2 {
extern const AttentionKernels attention_kernels;
}
namespace avx512 {
extern const AttentionKernels attention_kernels;
}

}  // namespace rainkernels
