// Sums over one tile of ids: the statistics of a mixture and the ranks. Included once per instruction set.
// Every distribution is shifted by its own largest value of the tile, and differences are taken between shifted
// logits: constants added to a whole row, however large, cancel before anything is rounded.
#pragma once

#include "cpu/logits.h"
#include "cpu/simd_math.h"

namespace rainkernels {
namespace RK_ISA {
namespace {

constexpr float kInf = __builtin_huge_valf();
constexpr float kLargest = 3.4028234663852886e38f;
constexpr int kTileVectors = kLogitsTile / 16, kBlockVectors = kLogitsBlock / 16;
constexpr int kTileGroups = kLogitsTile / kBlockVectors;

struct Sum4 {
  F16 part[4];
  RK_ALWAYS Sum4() {
    for (int j = 0; j < 4; ++j) part[j] = zero();
  }
  RK_ALWAYS void take(int j, F16 x) { part[j] = add(part[j], x); }
  RK_ALWAYS float all() const { return sum(add(add(part[0], part[1]), add(part[2], part[3]))); }
};

template <class T>
RK_ALWAYS inline const T* model_row(const MixParams& p, int model, int row) {
  return static_cast<const T*>(p.logits[model]) + row * p.row_stride[model];
}

inline void group_maxima(const float* z, float* groups) {
  for (int b = 0; b < kLogitsTile / kLogitsBlock; ++b) {
    F16 top = splat(-kInf);
    for (int v = 0; v < kBlockVectors; ++v) top = max(top, load(z + b * kLogitsBlock + v * 16));
    store(groups + b * 16, top);
  }
}

inline float largest_group(const float* groups) {
  return largest(max(max(load(groups), load(groups + 16)), max(load(groups + 32), load(groups + 48))));
}

// Nothing may be shifted by -inf: a tile without tokens then sums to 0 instead of NaN.
inline float finite_shift(float top) {
  return top > -kInf ? top : 0.0f;
}

// The first n of sixteen logits, -inf after.
template <class T>
RK_ALWAYS inline F16 load_logits(const T* from, int n) {
  return n >= 16 ? load16(from) : keep_lanes(load_some(from, n), 0, n, splat(-kInf));
}

// Largest of n logits; +inf where one is NaN.
template <class T>
inline float tile_top(const T* from, int n) {
  F16 top = splat(-kInf);
  for (int v = 0; v * 16 < n; ++v) {
    const F16 h = load_logits(from + v * 16, n - v * 16);
    top = max(top, select_less(h, splat(kInf), h, splat(kInf)));
  }
  return largest(top);
}

// e * difference where e > 0: a token without probability adds nothing, whatever the difference is.
RK_ALWAYS inline F16 weighted(F16 e, F16 difference) {
  return select_less(zero(), e, mul(e, difference), zero());
}

// From the mixed logits of tile t, before bias. A model that holds NaN or +inf gets the shift +inf.
template <class T>
inline void tile_stats(const MixParams& p, int row, int t, int n, const RowScratch& to) {
  const int models = p.num_models, from = t * kLogitsTile, vectors = (n + 15) / 16;
  float* const shift = to.stats + static_cast<int64_t>(t) * stat_floats(models);
  float* const total = shift + models + 1;
  float* const entropy = total + models + 1;
  float *const kl_mix = entropy + 1, *const kl_ref = kl_mix + models;
  const F16 log2e = splat(kLog2e);
  float mix_weight[kLogitsTile], mix_lowered[kLogitsTile], first[kLogitsTile];
  shift[0] = finite_shift(to.mix_shift[t]);
  total[0] = to.mix_sum[t];
  Sum4 negative;
  for (int v = 0; v < vectors; ++v) {
    const F16 lowered = sub(load(to.score + from + v * 16), splat(shift[0]));
    const F16 e = exp2_16(mul(lowered, log2e));
    store(mix_lowered + v * 16, lowered);
    store(mix_weight + v * 16, e);
    negative.take(v % 4, weighted(e, lowered));
  }
  *entropy = negative.all();
  for (int i = 0; i < models; ++i) {
    const T* h = model_row<T>(p, i, row) + from;
    const float top = tile_top(h, n);
    shift[1 + i] = finite_shift(top);
    if (top == kInf) {
      total[1 + i] = kl_mix[i] = kl_ref[i] = 0.0f;
      for (int v = 0; i == 0 && v < vectors; ++v) store(first + v * 16, zero());
      continue;
    }
    Sum4 sums, from_mix, to_first;
    for (int v = 0; v < vectors; ++v) {
      const F16 lowered = sub(load_logits(h + v * 16, n - v * 16), splat(shift[1 + i]));
      const F16 e = exp2_16(mul(lowered, log2e));
      if (i == 0) store(first + v * 16, lowered);
      sums.take(v % 4, e);
      from_mix.take(v % 4, weighted(load(mix_weight + v * 16), sub(load(mix_lowered + v * 16), lowered)));
      to_first.take(v % 4, weighted(e, sub(lowered, load(first + v * 16))));
    }
    total[1 + i] = sums.all();
    kl_mix[i] = from_mix.all();
    kl_ref[i] = to_first.all();
  }
}

template <class T>
inline void rank_tiles(const RankParams& p, int row, int token, RankTile* to, int begin, int end) {
  const T* const base = static_cast<const T*>(p.base) + row * p.base_stride;
  const T* const aligned = static_cast<const T*>(p.aligned) + row * p.aligned_stride;
  const F16 log2e = splat(kLog2e), one = splat(1.0f);
  float lanes[16];
  store(lanes, load_some(base + token, 1));
  const F16 own = splat(lanes[0]);
  for (int t = begin; t < end; ++t) {
    const int from = t * kLogitsTile, n = p.vocab - from < kLogitsTile ? p.vocab - from : kLogitsTile;
    RankTile& r = to[t];
    r.shift_base = finite_shift(tile_top(base + from, n));
    r.shift_aligned = finite_shift(tile_top(aligned + from, n));
    Sum4 sum_base, sum_aligned, kl, above;
    for (int v = 0; v * 16 < n; ++v) {
      const int at = from + v * 16, left = n - v * 16;
      const F16 b = load_logits(base + at, left);
      const F16 lowered_b = sub(b, splat(r.shift_base));
      const F16 lowered_a = sub(load_logits(aligned + at, left), splat(r.shift_aligned));
      const F16 e = exp2_16(mul(lowered_a, log2e));
      sum_base.take(v % 4, exp2_16(mul(lowered_b, log2e)));
      sum_aligned.take(v % 4, e);
      kl.take(v % 4, weighted(e, sub(lowered_a, lowered_b)));
      const F16 earlier = at < token ? keep_lanes(one, 0, token - at, zero()) : zero();
      above.take(v % 4, keep_lanes(select_less(own, b, one, select_less(b, own, zero(), earlier)), 0, left, zero()));
    }
    r.sum_base = sum_base.all();
    r.sum_aligned = sum_aligned.all();
    r.kl = kl.all();
    r.above = above.all();
  }
}

}  // namespace
}  // namespace RK_ISA
}  // namespace rainkernels
