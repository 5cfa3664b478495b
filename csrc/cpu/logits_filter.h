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

// The shortest prefix of the order whose weight is at least `target`, `above` being there already; weights null: each
// counts one. Where rounding leaves the target out of reach, everything.
inline Cut find_cut(const float* score, const float* weight, int n, double target, double above = 0) {
  double sums[256];
  int64_t counts[256];
  uint32_t prefix = 0;
  for (int shift = 24;; shift -= 8) {
    std::memset(sums, 0, sizeof(sums));
    std::memset(counts, 0, sizeof(counts));
    for (int i = 0; i < n; ++i) {
      const uint32_t key = ordered_bits(score[i]);
      if (shift < 24 && (key >> shift >> 8) != prefix) continue;
      const uint32_t bin = (key >> shift) & 255;
      sums[bin] += weight == nullptr ? 1.0 : weight[i];
      ++counts[bin];
    }
    int at = 0;
    double before = above;
    for (int bin = 255; bin >= 0; --bin) {
      if (counts[bin] == 0) continue;
      at = bin;
      before = above;
      if (above + sums[bin] >= target) break;
      above += sums[bin];
    }
    above = before;
    prefix = prefix << 8 | static_cast<uint32_t>(at);
    if (shift == 0) {
      const double each = sums[at] / static_cast<double>(counts[at]);
      const double wanted = each > 0 ? std::ceil((target - above) / each) : 1.0;
      const double most = static_cast<double>(counts[at]);
      return {prefix, static_cast<int64_t>(std::min(std::max(wanted, 1.0), most))};
    }
  }
}

// The same for at most 128 scores, which sorting serves best.
inline Cut find_cut_of_few(const float* score, const float* weight, int n, double target) {
  uint64_t keys[128];
  for (int i = 0; i < n; ++i) keys[i] = uint64_t{ordered_bits(score[i])} << 32 | static_cast<uint32_t>(~i);
  std::sort(keys, keys + n, [](uint64_t a, uint64_t b) { return a > b; });
  Cut cut{0, 0};
  double running = 0;
  for (int j = 0; j < n && (j == 0 || running < target); ++j) {
    const uint32_t key = static_cast<uint32_t>(keys[j] >> 32);
    cut = {key, key == cut.key ? cut.equals + 1 : 1};
    running += weight == nullptr ? 1.0 : weight[static_cast<uint32_t>(~keys[j])];
  }
  return cut;
}

// The same by mass for many scores: bins of equal width find a short stretch of the order, and bits cut inside it.
inline Cut find_cut_of_many(const float* score, const float* mass, int n, double target, float top, float* spare) {
  constexpr int kBins = 2048;
  double sums[kBins] = {};
  int32_t counts[kBins] = {};
  float lowest = top;
  for (int i = 0; i < n; ++i) lowest = std::min(lowest, score[i]);
  const float per_bin = (kBins - 1) / (top - lowest);
  // Increases with the score and is the same for equals, so the cut lies in the bin where the sum passes the target.
  const auto bin_of = [&](float x) { return kBins - 1 - static_cast<int>((top - x) * per_bin); };
  // Scores all alike, or so far apart that the bins say nothing.
  if (!(per_bin > 0 && per_bin < std::numeric_limits<float>::max())) return find_cut(score, mass, n, target);
  for (int i = 0; i < n; ++i) {
    const int bin = bin_of(score[i]);
    sums[bin] += mass[i];
    ++counts[bin];
  }
  double above = 0, before = 0;
  int at = 0;
  for (int bin = kBins - 1; bin >= 0; --bin) {
    if (counts[bin] == 0) continue;
    at = bin;
    before = above;
    above += sums[bin];
    if (above >= target) break;
  }
  int m = 0;
  float* const masses = spare + n;
  for (int i = 0; i < n; ++i) {
    spare[m] = score[i];
    masses[m] = mass[i];
    m += bin_of(score[i]) == at;
  }
  return find_cut(spare, masses, m, target, before);
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
    const double target = static_cast<double>(k);
    if (k < n_)
      keep(few() ? find_cut_of_few(s_.value, nullptr, n_, target) : find_cut(s_.value, nullptr, n_, target), false);
  }
  void keep_mass(double target, float top) {
    if (few())
      keep(find_cut_of_few(s_.value, s_.mass, n_, target), true);
    else
      keep(find_cut_of_many(s_.value, s_.mass, n_, target, top, s_.spare), true);
  }
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
  bool few() const { return n_ <= 128; }
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
