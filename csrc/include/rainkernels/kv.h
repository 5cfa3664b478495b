// Token slots: where one row of K or V lies. All strides and sizes are bytes, so one code path serves every dtype.
// Reference: rainkernels/reference/kv.py
#pragma once

#include <cstdint>

#include "rainkernels/common.h"

namespace rainkernels {

// One side (K or V) of a write: rows [tokens, heads, row_bytes] by strides, pool [slots, heads, row_bytes] contiguous.
struct KvSide {
  const char* rows;
  int64_t stride_token, stride_head;
  char* pool;
  int64_t row_bytes;
};

struct KvWriteParams {
  KvSide k, v;
  const int32_t* slot_mapping;  // [tokens]
  int64_t num_tokens, num_heads, num_slots;
};

static RK_INLINE bool slot_written(int32_t slot, int64_t num_slots) {
  return slot >= 0 && slot < num_slots;
}

static RK_INLINE const char* kv_source(const KvSide& side, int64_t token, int64_t head) {
  return side.rows + token * side.stride_token + head * side.stride_head;
}

static RK_INLINE char* kv_target(const KvSide& side, int64_t slot, int64_t head, int64_t num_heads) {
  return side.pool + (slot * num_heads + head) * side.row_bytes;
}

}  // namespace rainkernels
