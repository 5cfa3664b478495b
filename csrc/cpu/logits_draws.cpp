// Draws in double precision: a token depends on its row, filter and uniform alone.   Reference:
// rainkernels/reference/draws.py
#include "cpu/logits_draws.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace rainkernels {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kFewTokens = 64;  // up to here a sorted list is kept while scanning

constexpr int64_t kSerialWork = 1 << 16;  // tokens looked at below which a second thread costs more than it saves

bool same_work(const DrawRequest& a, const DrawRequest& b) {
  return a.row == b.row && a.vocab == b.vocab && a.temperature == b.temperature && a.top_k == b.top_k;
}

// One row under one filter.
class Shaped {
 public:
  void shape(const DrawRequest& request) {
    request_ = request;
    ids_.clear();
    lse_ = kNaN;
    top_ = -INFINITY;
    best_ = 0;
    bool numbers = true;
    for (int64_t i = 0; i < request.vocab; ++i) {
      const double x = request.row[i];
      numbers &= x == x;
      if (x > top_) {
        top_ = x;
        best_ = i;
      }
    }
    valid_ = numbers && std::isfinite(top_);
    if (!valid_ || request.temperature == 0) return;
    const bool some = request.top_k > 0 && request.top_k < request.vocab;
    if (some) select(request.top_k);
    const int64_t n = some ? request.top_k : request.vocab;
    probs_.resize(n);
    cdf_.resize(n);
    const double most = some ? score(ids_[0]) : score(best_);
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      probs_[i] = std::exp(score(some ? ids_[i] : i) - most);
      cdf_[i] = sum += probs_[i];
    }
    // Rounding may have made lower ids as likely.
    if (!some) likeliest_ = std::find(probs_.begin(), probs_.end(), 1.0) - probs_.begin();
    if (!some && request.temperature == 1) lse_ = top_ + std::log(sum);
  }

  DrawResult draw(double uniform, bool logprob) {
    if (!valid_) return {-1, kNaN, kNaN};
    int64_t token = best_;
    double prob = 1;
    if (request_.temperature != 0) {
      const int64_t n = static_cast<int64_t>(cdf_.size());
      int64_t at = ids_.empty() ? likeliest_ : 0;
      if (uniform == uniform) {
        at = std::upper_bound(cdf_.begin(), cdf_.end(), uniform * cdf_.back()) - cdf_.begin();
        at = std::min(at, n - 1);
      }
      token = ids_.empty() ? at : ids_[at];
      prob = probs_[at] / cdf_.back();
    }
    return {token, prob, logprob ? request_.row[token] - lse() : kNaN};
  }

 private:
  // Differences first: with a tiny temperature every other score may become -inf, but the largest stays 0.
  double score(int64_t i) const {
    const double x = request_.row[i];
    return request_.temperature == 1 ? x : (x - top_) / request_.temperature;
  }

  // The k best, largest first, lower id first on ties.
  void select(int64_t k) {
    if (k > kFewTokens) {
      ids_.resize(request_.vocab);
      std::iota(ids_.begin(), ids_.end(), 0);
      const auto before = [this](int64_t a, int64_t b) {
        const double x = score(a), y = score(b);
        return x > y || (x == y && a < b);
      };
      std::partial_sort(ids_.begin(), ids_.begin() + k, ids_.end(), before);
      ids_.resize(k);
      return;
    }
    double scores[kFewTokens];
    int64_t count = 0;
    for (int64_t i = 0; i < request_.vocab; ++i) {
      const double x = score(i);
      if (count == k && !(x > scores[k - 1])) continue;
      if (count < k) {
        ids_.push_back(i);
        ++count;
      }
      int64_t at = count - 1;
      for (; at > 0 && x > scores[at - 1]; --at) {
        scores[at] = scores[at - 1];
        ids_[at] = ids_[at - 1];
      }
      scores[at] = x;
      ids_[at] = i;
    }
  }

  double lse() {
    if (lse_ != lse_) {
      double sum = 0;
      for (int64_t i = 0; i < request_.vocab; ++i) sum += std::exp(request_.row[i] - top_);
      lse_ = top_ + std::log(sum);
    }
    return lse_;
  }

  DrawRequest request_{};
  bool valid_ = false;
  double top_ = 0, lse_ = 0;
  int64_t best_ = 0, likeliest_ = 0;
  std::vector<int64_t> ids_;  // empty: all tokens
  std::vector<double> probs_, cdf_;
};

}  // namespace

std::vector<DrawResult> draw_rows(const std::vector<DrawRequest>& requests, int num_threads) {
  std::vector<DrawResult> results(requests.size());
  std::vector<size_t> groups;  // where requests for another row or filter begin
  int64_t work = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    if (i != 0 && same_work(requests[i - 1], requests[i])) continue;
    groups.push_back(i);
    work += requests[i].vocab;
  }
  const int count = static_cast<int>(groups.size());
  groups.push_back(requests.size());
  const bool parallel = num_threads > 1 && count > 1 && work > kSerialWork;
#pragma omp parallel num_threads(num_threads) if (parallel)
  {
    Shaped shaped;
#pragma omp for schedule(dynamic, 1)
    for (int g = 0; g < count; ++g) {
      shaped.shape(requests[groups[g]]);
      for (size_t i = groups[g]; i < groups[g + 1]; ++i)
        results[i] = shaped.draw(requests[i].uniform, requests[i].logprob);
    }
  }
  return results;
}

}  // namespace rainkernels
