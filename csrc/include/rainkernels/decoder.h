// A stack of Llama-like decoder blocks over one step of token rows: weights, and what a step brings.
// Reference: rainkernels/reference/decoder.py
#pragma once

#include <cstdint>

#include "rainkernels/edits.h"

namespace rainkernels {

// One linear layer: weight [out, in], bias [out] or null.
struct Linear {
  const float *weight, *bias;
};

struct RmsNorm {
  const float* weight;
  float eps;
};

struct DecoderBlock {
  RmsNorm attention_norm, q_norm, k_norm, mlp_norm;  // q_norm and k_norm over each head; weight null: none
  Linear qkv, out, gate_up, down;
  const float* sinks;  // [num_qo_heads] or null
  float scale, softcap;
  int64_t window;
};

// A low-rank update of some outputs of a product: y[:, first:first + size] += scale (x down^T) up^T
struct LowRank {
  const float* up;  // [size / 16 rounded up, rank, 16]: sixteen outputs at a time, 0 beyond size
  int first, size, rank;
  float scale;
};

struct DecoderShape {
  int hidden, intermediate, num_qo_heads, num_kv_heads, head_dim, vocab;
};

// Neighbouring rows of a step that belong to one member and attend by one plan over its pools.
struct StepPart {
  int member, rows;       // member 0: the stack as it is; i: with adapter i - 1
  const int32_t* layout;  // of the attention plan
  float* states;          // [num_slots of the member, hidden]: final states go to the rows' slots; null: not
};

// Places of a block: what `out` and `down` gave before it is added to the residual, and the residual after the mlp.
// Order shared with rainkernels/ops/_decoder_edits.py (TAPS).
enum class StackTap : int { attn_out = 0, mlp_out, block_out };
constexpr int kStackTaps = 3;

// Edits of the rows of one place, by the slots in row `column` of a step's edit_slots.
struct EditSite {
  int layer;
  StackTap tap;
  EditTableView table;
  int column;
};

// Rows of one place, as they are before the edits there.
struct StepCapture {
  int layer;
  StackTap tap;
  const int64_t* rows;  // [num_rows] rows of the step
  int64_t num_rows;
  float* out;  // [num_rows, hidden]
};

// One step. Faults are the first row that breaks a rule.
struct DecoderStep {
  const int64_t *ids, *positions;  // [rows]
  const int32_t* slots;            // [rows], 0 to num_slots - 1 of the row's member
  int rows;
  const StepPart* parts;  // [num_parts], their rows are all rows
  int num_parts;
  const float *cos, *sin;  // [max_positions, head_dim], the first half of sin negative
  int64_t max_positions;
  float* workspace;
  const int64_t* wanted;  // [num_wanted] rows whose logits are wanted
  int num_wanted;
  float* logits;  // [num_wanted, vocab]
  int num_threads;
  const int32_t* edit_slots;    // [columns, rows]; null: nothing is edited
  const StepCapture* captures;  // [num_captures]
  int num_captures;
};

}  // namespace rainkernels
