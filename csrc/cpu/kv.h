// The kv family on the CPU.
#pragma once

#include "rainkernels/kv.h"

namespace rainkernels {

// Index of the first token whose slot is below -1 or past the pool (nothing is written then), or -1.
int64_t kv_write(const KvWriteParams& p, int num_threads);

// Slots already checked; dst -1 skips. row bytes are those of a whole slot, all heads.
void kv_copy(char* k_pool, int64_t k_bytes, char* v_pool, int64_t v_bytes, const int32_t* src, const int32_t* dst,
             int64_t n);

}  // namespace rainkernels
