// Draws from rows of logits in double precision, on the host.
#pragma once

#include <cstdint>
#include <vector>

namespace rainkernels {

struct DrawRequest {
  const float* row;  // [vocab]
  int64_t vocab;
  double temperature;  // 0: the most likely token
  int64_t top_k;       // 0: all tokens
  double uniform;      // in (0, 1); NaN: the most likely token of the filtered distribution
  bool logprob;
};

struct DrawResult {
  int64_t token;         // -1: the row holds NaN, +inf, or nothing but -inf
  double prob, logprob;  // after filtering; under the raw logits, NaN if not asked for
};

// Requests for one row under one filter that follow each other share the work.
std::vector<DrawResult> draw_rows(const std::vector<DrawRequest>& requests, int num_threads);

}  // namespace rainkernels
