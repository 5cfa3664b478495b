// Sums of tiles of ids, each about its own shift, joined in id order in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/logits.h"

namespace rainkernels {

inline int tiles_of(int vocab) {
  return static_cast<int>((int64_t{vocab} + kLogitsTile - 1) / kLogitsTile);
}

inline double logit_at(const void* logits, int64_t at, Dtype dtype) {
  if (dtype == Dtype::f32) return static_cast<const float*>(logits)[at];
  const uint16_t bits = static_cast<const uint16_t*>(logits)[at];
  return dtype == Dtype::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

// A sum of tiles about its own shift: total * exp(top).
struct LogSum {
  double top, total;
  double lse() const { return top + std::log(total); }
};

inline LogSum join(const float* shift, const float* sum, int tiles, int stride) {
  LogSum r{-std::numeric_limits<double>::infinity(), 0};
  for (int t = 0; t < tiles; ++t) {
    const double x = shift[static_cast<int64_t>(t) * stride];
    if (sum[static_cast<int64_t>(t) * stride] > 0 && x > r.top) r.top = x;
  }
  for (int t = 0; t < tiles; ++t) {
    const int64_t at = static_cast<int64_t>(t) * stride;
    if (sum[at] > 0) r.total += sum[at] * std::exp(shift[at] - r.top);
  }
  return r;
}

// KL(a || b) from sums of e_a * ((x_a - shift_a) - (x_b - shift_b)) per tile.
inline double divergence(const float* part, const float* shift_a, const float* sum_a, const LogSum& a,
                         const float* shift_b, const LogSum& b, int tiles, int stride) {
  double sum = 0;
  for (int t = 0; t < tiles; ++t) {
    const int64_t at = static_cast<int64_t>(t) * stride;
    const double factor = sum_a[at] > 0 ? std::exp(shift_a[at] - a.top) : 0.0;
    if (factor > 0) {
      const double offset = (shift_a[at] - a.top) - (shift_b[at] - b.top);
      sum += factor * (part[at] + static_cast<double>(sum_a[at]) * offset);
    }
  }
  return sum / a.total - (std::log(a.total) - std::log(b.total));
}

}  // namespace rainkernels
