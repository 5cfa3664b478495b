// kv_write, kv_copy on the CPU: bandwidth-bound copies of rows.   Reference: rainkernels/reference/kv.py
#include "cpu/kv.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace rainkernels {
namespace {

constexpr int64_t kSerialBytes = 1 << 20;

void write_head(const KvWriteParams& p, const KvSide& side, int64_t head) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const int32_t slot = p.slot_mapping[t];
    if (slot >= 0) std::memcpy(kv_target(side, slot, head, p.num_heads), kv_source(side, t, head), side.row_bytes);
  }
}

// Heads side by side in memory: a token is one copy.
void write_tokens(const KvWriteParams& p, const KvSide& side) {
  const int64_t bytes = p.num_heads * side.row_bytes;
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const int32_t slot = p.slot_mapping[t];
    if (slot >= 0) std::memcpy(kv_target(side, slot, 0, p.num_heads), kv_source(side, t, 0), bytes);
  }
}

}  // namespace

int64_t kv_write(const KvWriteParams& p, int num_threads) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    if (p.slot_mapping[t] < -1 || p.slot_mapping[t] >= p.num_slots) return t;
  }
  const int64_t bytes = p.num_tokens * p.num_heads * (p.k.row_bytes + p.v.row_bytes);
  if (bytes < kSerialBytes || num_threads == 1) {
    for (const KvSide* side : {&p.k, &p.v}) {
      if (side->stride_head == side->row_bytes) {
        write_tokens(p, *side);
      } else {
        for (int64_t h = 0; h < p.num_heads; ++h) write_head(p, *side, h);
      }
    }
    return -1;
  }
  // Heads, not tokens, are dealt to the threads: rows that name one slot keep their order.
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t i = 0; i < 2 * p.num_heads; ++i) write_head(p, i < p.num_heads ? p.k : p.v, i % p.num_heads);
  return -1;
}

void kv_copy(char* k_pool, int64_t k_bytes, char* v_pool, int64_t v_bytes, const int32_t* src, const int32_t* dst,
             int64_t n) {
  std::vector<int32_t> read(src, src + n);
  std::sort(read.begin(), read.end());
  const bool staged =
      std::any_of(dst, dst + n, [&](int32_t slot) { return std::binary_search(read.begin(), read.end(), slot); });
  const auto copy = [&](char* pool, int64_t bytes) {
    std::vector<char> kept;
    if (staged) {
      kept.resize(n * bytes);
      for (int64_t i = 0; i < n; ++i) std::memcpy(kept.data() + i * bytes, pool + src[i] * bytes, bytes);
    }
    for (int64_t i = 0; i < n; ++i) {
      const char* from = staged ? kept.data() + i * bytes : pool + src[i] * bytes;
      if (dst[i] >= 0) std::memcpy(pool + dst[i] * bytes, from, bytes);
    }
  };
  copy(k_pool, k_bytes);
  copy(v_pool, v_bytes);
}

}  // namespace rainkernels
