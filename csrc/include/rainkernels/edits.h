// Edits of hidden states: the tables' codes, the call's parameters and the scalar rules.
// Reference: rainkernels/reference/edits.py
#pragma once

#include <cstdint>

#include "rainkernels/dtypes.h"

namespace rainkernels {

// Orders shared with rainkernels/reference/edits.py (OPS, NORMS) and rainkernels/ops/edits.py (TAPS, CASTS).
enum class EditOp : int { project = 0, boost, set, add, tanh };
enum class EditNorm : int { none = 0, preserve, cap };
enum class EditTap : int { mlp_out = 0, block_out };
enum class NormCast : int { llama = 0, gemma };

constexpr int kMaxDirections = 256;

struct EditTableView {
  const void* directions;  // direction j of slot s begins at element s * slot_step + j * hidden
  int64_t slot_step;       // 0: all slots share one basis
  Dtype dtype;
  const float* scale;  // of slot s at s * scale_step; length of direction j times scale[j] is 1
  int64_t scale_step;
  const float* gram;  // [num_slots, max_directions, max_directions]; null: components of the unedited row
  const int32_t* op;  // [num_slots, max_directions], as alpha and target
  const float* alpha;
  const float* target;
  const int32_t* count;  // [num_slots]; null: all directions
  const int32_t* norm;   // [num_slots]
  int num_slots, max_directions;
};

struct EditParams {
  void* x;                                        // [rows, hidden]; written by the unfused form
  void* residual;                                 // [rows, hidden], written by the fused form
  void* out;                                      // [rows, hidden], the fused form's normed rows
  int64_t x_stride, residual_stride, out_stride;  // elements
  const void* weight;                             // [hidden]
  Dtype weight_dtype;
  const int32_t* slots;  // [rows]; null: no edits
  int64_t rows;
  int hidden;
  Dtype dtype;
  bool fused;
  float eps;
  EditTap tap;
  NormCast cast;
  float weight_offset;
  EditTableView table;
  int num_threads;
};

// Directions of a slot that a kernel may read, whatever the table holds.
RK_LOCAL int directions_in_use(const EditTableView& t, int slot) {
  if (t.count == nullptr) return t.max_directions;
  const int n = t.count[slot];
  return n < 0 ? 0 : n > t.max_directions ? t.max_directions : n;
}

// Whether rows of this slot change at all.
RK_LOCAL bool slot_edits(const EditTableView& t, int slot) {
  if (slot <= 0) return false;
  const float* alpha = t.alpha + int64_t{slot} * t.max_directions;
  for (int j = 0; j < directions_in_use(t, slot); ++j)
    if (alpha[j] != 0.0f) return true;
  return false;
}

// The step along a unit direction whose component is c. `tanh_c` is used by the tanh op only.
RK_LOCAL float edit_coefficient(int op, float c, float alpha, float target, float tanh_c) {
  if (alpha == 0.0f) return 0.0f;
  switch (static_cast<EditOp>(op)) {
    case EditOp::project:
      return -alpha * c;
    case EditOp::boost:
      return alpha * c;
    case EditOp::set:
      return alpha * (target - c);
    case EditOp::add:
      return alpha;
    case EditOp::tanh:
      return alpha * tanh_c;
    default:
      return 0.0f;
  }
}

// What an edited row is multiplied by, from the sums of squares before and after. Remains below 2^-20 of the old length
// are rounding noise and stay as they are, and so do rows whose squares leave float32.
RK_LOCAL float edit_rescale(int norm, float before, float after) {
  const bool wanted =
      norm == static_cast<int>(EditNorm::preserve) || (norm == static_cast<int>(EditNorm::cap) && after > before);
  const bool fits = after > before * 0x1p-40f && after - after == 0.0f && before - before == 0.0f;
  return wanted && fits ? __builtin_sqrtf(before / after) : 1.0f;
}

}  // namespace rainkernels
