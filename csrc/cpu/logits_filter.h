// Which tokens a row keeps. Every filter keeps a prefix of one order, score descending and then id ascending, so a cut
// is a score and how many of its equals stay. Cuts are found by bits of the score, in linear time whatever the values.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/logits.h"

namespace rainkernels {

// Unsigned integers in the order of the floats; both zeros are one.
inline uint32_t ordered_bits(float x) {
  const uint32_t u = float_bits(x + 0.0f);
  return u >> 31 ? ~u : u | 0x80000000u;
}

struct Cut {
  uint32_t key;    // ordered_bits of the lowest score kept
  int64_t equals;  // how many of that score, by id
};

// The shortest prefix of the order whose weight is at least `target`; weights null: each counts one.
inline Cut find_cut(const float* score, const float* weight, int n, double target) {
  constexpr int kBits[3] = {11, 11, 10};
  double sums[2048];
  int64_t counts[2048];
  uint32_t prefix = 0;
  double above = 0;
  int shift = 32;
  for (int level = 0; level < 3; ++level) {
    const int bits = kBits[level], size = 1 << bits;
    std::memset(sums, 0, sizeof(double) * size);
    std::memset(counts, 0, sizeof(int64_t) * size);
    shift -= bits;
    for (int i = 0; i < n; ++i) {
      const uint32_t key = ordered_bits(score[i]);
      if (level > 0 && (key >> shift >> bits) != prefix) continue;
      const uint32_t bin = (key >> shift) & (size - 1);
      sums[bin] += weight == nullptr ? 1.0 : weight[i];
      ++counts[bin];
    }
    // Where rounding leaves the target out of reach, the lowest bin that holds something.
    int at = -1;
    double before = above;
    for (int bin = size - 1; bin >= 0; --bin) {
      if (counts[bin] == 0) continue;
      at = bin;
      before = above;
      if (above + sums[bin] >= target) break;
      above += sums[bin];
    }
    above = before;
    prefix = prefix << bits | static_cast<uint32_t>(at);
    if (level == 2) {
      const double each = sums[at] / static_cast<double>(counts[at]);
      const double wanted = each > 0 ? std::ceil((target - above) / each) : 1.0;
      const double most = static_cast<double>(counts[at]);
      return {prefix, static_cast<int64_t>(std::min(std::max(wanted, 1.0), most))};
    }
  }
  return {0, n};
}

// What one row may still draw: `n` candidates of the scratch, in id order.
class Candidates {
 public:
  Candidates(const RowScratch& scratch, int number) : s_(scratch), n_(number) {}

  int size() const { return n_; }
  double total() const {
    double sum = 0;
    for (int i = 0; i < n_; ++i) sum += s_.mass[i];
    return sum;
  }
  void keep_count(int64_t k) {
    if (k < n_) keep(find_cut(s_.value, nullptr, n_, static_cast<double>(k)), false);
  }
  void keep_mass(double target) { keep(find_cut(s_.value, s_.mass, n_, target), true); }
  void keep_lowered(float top, float scale, float limit) {
    int kept = 0;
    for (int i = 0; i < n_; ++i) {
      if ((s_.value[i] - top) * scale >= limit) move(i, kept++, true);
    }
    n_ = kept;
  }
  // Index of the first candidate whose prefix of the masses exceeds `target`, else of the last with any mass.
  int walk(double target) const {
    double running = 0;
    int last = 0;
    for (int i = 0; i < n_; ++i) {
      if (!(s_.mass[i] > 0)) continue;
      last = i;
      running += s_.mass[i];
      if (running > target) break;
    }
    return last;
  }

 private:
  void move(int from, int to, bool with_mass) {
    s_.value[to] = s_.value[from];
    s_.id[to] = s_.id[from];
    if (with_mass) s_.mass[to] = s_.mass[from];
  }
  void keep(Cut cut, bool with_mass) {
    int kept = 0;
    for (int i = 0; i < n_; ++i) {
      const uint32_t key = ordered_bits(s_.value[i]);
      if (key > cut.key || (key == cut.key && cut.equals-- > 0)) move(i, kept++, with_mass);
    }
    n_ = kept;
  }

  const RowScratch& s_;
  int n_;
};

// A score that at least k tokens reach, near the k-th largest: the k-th largest of disjoint groups' maxima.
inline float score_of_count(const RowScratch& s, int tiles, int64_t k, float* spare) {
  constexpr int kBlocks = kLogitsTile / kLogitsBlock, kLanes = 16;
  int n = 0;
  if (tiles >= 2 * k) {
    for (; n < tiles; ++n) spare[n] = s.tile_max[n];
  } else if (int64_t{tiles} * kBlocks >= 2 * k) {
    for (; n < tiles * kBlocks; ++n)
      spare[n] = *std::max_element(s.group_max + n * kLanes, s.group_max + (n + 1) * kLanes);
  } else if (int64_t{tiles} * kBlocks * kLanes >= k) {
    n = tiles * kBlocks * kLanes;
    std::memcpy(spare, s.group_max, sizeof(float) * n);
  } else {
    return -std::numeric_limits<float>::infinity();
  }
  std::nth_element(spare, spare + k - 1, spare + n, [](float a, float b) { return a > b; });
  return spare[k - 1];
}

}  // namespace rainkernels
