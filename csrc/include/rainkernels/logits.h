// mix_sample and rank: what all native code of the family shares.   Reference: rainkernels/reference/logits.py
#pragma once

#include "rainkernels/common.h"
#include "rainkernels/dtypes.h"

namespace rainkernels {

constexpr int kMaxModels = 8;
constexpr int kLogitsTile = 1024;  // ids of one partial sum
constexpr int kLogitsBlock = 256;  // ids of one vector of sixteen maxima
constexpr float kLog2e = 1.4426950408889634f;

// Orders shared with rainkernels/_logits_checks.py (ORDERS, PARAMETERS).
enum class FilterOrder : int { k_p_min = 0, min_k_p = 1, joint = 2 };
enum class MixRule : int { none = 0, weights, temperature, top_k, top_p, min_p, plausibility };

struct MixParams {
  const void* logits[kMaxModels];
  int64_t row_stride[kMaxModels];  // elements
  int num_models;
  Dtype dtype;
  int rows, vocab;
  const float* weights;      // [rows, num_models]
  const float* temperature;  // [rows], as all of the following; null: off
  const int32_t* top_k;
  const float *top_p, *min_p, *plausibility;
  int plausibility_model;
  FilterOrder order;
  const int64_t *seed, *position;  // [rows], [rows, position_words]
  int position_words;
  const float* bias;  // [rows, vocab] or null
  int64_t bias_stride;
  int32_t* token;
  float *prob, *logprob;
  // Statistics, all null without: [rows, num_models] or [rows].
  float *logprob_models, *lse_mix, *lse_models, *log_z, *entropy, *kl_mix, *kl_ref;
  int num_threads;
};

struct RankParams {
  const void *base, *aligned;
  int64_t base_stride, aligned_stride;
  Dtype dtype;
  int rows, vocab;
  const void* token;
  int token_bytes;  // 4 or 8
  int32_t* rank;
  float *kl, *logprob_base, *logprob_aligned;
  int num_threads;
};

// Philox4x32-10, Salmon et al. 2011: 52 bits of the draw named by a 128-bit counter, and a half, so never 0 or 1.
RK_LOCAL double philox_uniform(uint64_t key, uint64_t low, uint64_t high) {
  uint32_t x0 = static_cast<uint32_t>(low), x1 = static_cast<uint32_t>(low >> 32);
  uint32_t x2 = static_cast<uint32_t>(high), x3 = static_cast<uint32_t>(high >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int i = 0; i < 10; ++i) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * x0, p1 = uint64_t{0xCD9E8D57u} * x2;
    x0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(p1);
    x2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint64_t bits = ((uint64_t{x0} << 20) ^ (x1 >> 12)) & ((uint64_t{1} << 52) - 1);
  return (static_cast<double>(bits) + 0.5) * 0x1p-52;
}

}  // namespace rainkernels
