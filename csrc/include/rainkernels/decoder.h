// A stack of Llama-like decoder blocks over one step of token rows: weights, and what a step brings.
// Reference: rainkernels/reference/decoder.py
#pragma once

#include <cstdint>

#include "rainkernels/common.h"

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
  float *k_pool, *v_pool;  // [num_slots, num_kv_heads, head_dim]
};

struct DecoderShape {
  int hidden, intermediate, num_qo_heads, num_kv_heads, head_dim, vocab;
};

// One step. Faults are the first row that breaks a rule.
struct DecoderStep {
  const int64_t *ids, *positions;  // [rows]
  const int32_t* slots;            // [rows], 0 to num_slots - 1
  int rows;
  const float *cos, *sin;  // [max_positions, head_dim], the first half of sin negative
  int64_t max_positions, num_slots;
  const int32_t* layout;  // of the attention plan
  float *attention_workspace, *workspace;
  float* states;          // [num_slots, hidden]: final states are written to the rows' slots; null: not
  const int64_t* wanted;  // [num_wanted] rows whose logits are wanted
  int num_wanted;
  float* logits;  // [num_wanted, vocab]
  int num_threads;
};

}  // namespace rainkernels
