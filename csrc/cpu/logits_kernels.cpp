// The passes of the logits family over the vocabulary.   Reference: rainkernels/reference/logits.py
// Compiled once per instruction set. A tile of 1,024 ids is mixed into the row's scratch and summed while it lies in
// the first-level cache. Sums run over four accumulators of sixteen lanes and one fixed tree, about the tile's own
// largest value, so a tile's bits depend on its ids alone.
#include "cpu/logits.h"
#include "cpu/logits_tiles.h"
#include "cpu/simd_math.h"

namespace rainkernels {
namespace RK_ISA {
namespace {

// z of sixteen ids, every logit finite or the result is not.
template <class T>
RK_ALWAYS inline F16 mix_vector(const T* const* rows, const RowPlan& plan, int at, int n) {
  const F16 first = load_some(rows[0] + at, n);
  F16 z = plan.differences ? first : mul(splat(plan.weight[0]), first);
  for (int i = 1; i < plan.count; ++i) {
    const F16 h = load_some(rows[i] + at, n);
    z = fma(splat(plan.weight[i]), plan.differences ? sub(h, first) : h, z);
  }
  return z;
}

// The same with infinities: -inf in any model bans; `wrong` becomes 1 in lanes that make the row invalid.
template <class T>
RK_ALWAYS inline F16 mix_careful(const T* const* rows, const RowPlan& plan, int at, int n, F16* wrong) {
  const F16 inf = splat(kInf), lowest = splat(-kLargest), one = splat(1.0f);
  F16 banned = zero();
  for (int i = 0; i < plan.count; ++i) {
    const F16 h = load_some(rows[i] + at, n);
    banned = select_less(h, lowest, one, banned);
    *wrong = select_less(h, inf, *wrong, one);
  }
  const F16 z = select_less(zero(), banned, splat(-kInf), mix_vector(rows, plan, at, n));
  *wrong = select_less(z, inf, *wrong, one);
  return z;
}

template <class T>
struct Mixer {
  const MixParams& p;
  const RowPlan& plan;
  const RowScratch& to;
  int row;
  const T* rows[kMaxModels];  // of the models with weight

  RK_ALWAYS Mixer(const MixParams& params, int r, const RowPlan& how, const RowScratch& scratch)
      : p(params), plan(how), to(scratch), row(r) {
    for (int i = 0; i < plan.count; ++i) rows[i] = model_row<T>(p, plan.model[i], row);
  }

  // Two models whose weights sum to one, or one model: the forms decoding spends its time in.
  template <int kForm>
  RK_ALWAYS F16 vector(int at) const {
    if constexpr (kForm == 1) return load16(rows[0] + at);
    if constexpr (kForm == 2) {
      const F16 first = load16(rows[0] + at);
      return fma(splat(plan.weight[1]), sub(load16(rows[1] + at), first), first);
    }
    return mix_vector(rows, plan, at, 16);
  }

  // Mixes whole vectors; the result holds a NaN when some logit is not finite.
  template <int kForm>
  RK_ALWAYS F16 whole_vectors(float* z, float* groups, int from, int vectors) const {
    F16 check = zero();
    for (int v = 0; v < vectors; v += kBlockVectors) {
      F16 top = splat(-kInf);
      const int end = v + kBlockVectors < vectors ? v + kBlockVectors : vectors;
      for (int i = v; i < end; ++i) {
        const F16 x = vector<kForm>(from + i * 16);
        check = fma(x, zero(), check);
        top = max(top, x);
        store(z + i * 16, x);
      }
      store(groups + v / kBlockVectors * 16, top);
    }
    return check;
  }

  bool careful(float* z, float* groups, int from, int n) const {
    F16 wrong = zero();
    for (int v = 0; v < kTileVectors; ++v) {
      const int left = n - v * 16;
      F16 x = splat(-kInf);
      if (left > 0) {
        F16 here = zero();
        x = keep_lanes(mix_careful(rows, plan, from + v * 16, left, &here), 0, left, x);
        wrong = max(wrong, keep_lanes(here, 0, left, zero()));
      }
      store(z + v * 16, x);
    }
    group_maxima(z, groups);
    return largest(wrong) == 0.0f;
  }

  // Fills the last tile's end with -inf.
  RK_ALWAYS bool tile_scores(float* z, float* groups, int from, int n) const {
    F16 check;
    const int vectors = n / 16;
    if (plan.differences && plan.count == 2)
      check = whole_vectors<2>(z, groups, from, vectors);
    else if (plan.differences && plan.count == 1)
      check = whole_vectors<1>(z, groups, from, vectors);
    else
      check = whole_vectors<0>(z, groups, from, vectors);
    if (n < kLogitsTile) {
      for (int v = vectors; v < kTileVectors; ++v) {
        F16 x = splat(-kInf);
        const int left = n - v * 16;
        if (left > 0) {
          const F16 some = mix_vector(rows, plan, from + v * 16, left);
          check = fma(keep_lanes(some, 0, left, zero()), zero(), check);
          x = keep_lanes(some, 0, left, x);
        }
        store(z + v * 16, x);
      }
      group_maxima(z, groups);
    }
    const float clean = sum(check);
    return clean == clean || careful(z, groups, from, n);
  }

  void prefetch(int from, int vector) const {
    for (int i = 0; i < plan.count; ++i) __builtin_prefetch(rows[i] + from + vector * 16);
  }

  // Bias and plausibility, after everything that describes the mixture itself.
  bool adjust(float* z, float* groups, int from, int n) const {
    F16 wrong = zero();
    const float* bias = p.bias == nullptr ? nullptr : p.bias + row * p.bias_stride + from;
    const T* judge = plan.plausible ? model_row<T>(p, p.plausibility_model, row) + from : nullptr;
    for (int v = 0; v < kTileVectors && v * 16 < n; ++v) {
      const int left = n - v * 16;
      F16 x = load(z + v * 16);
      if (bias != nullptr) x = keep_lanes(add(x, load_some(bias + v * 16, left)), 0, left, x);
      wrong = select_less(x, splat(kInf), wrong, splat(1.0f));
      if (judge != nullptr) {
        const F16 below = sub(load_some(judge + v * 16, left), splat(plan.top));
        x = select_less(below, splat(plan.limit), splat(-kInf), x);
      }
      store(z + v * 16, x);
    }
    group_maxima(z, groups);
    return largest(wrong) == 0.0f;
  }

  bool tile(int t) const {
    const int from = t * kLogitsTile, n = p.vocab - from < kLogitsTile ? p.vocab - from : kLogitsTile;
    float *z = to.score + from, *groups = to.group_max + t * kTileGroups;
    if (!tile_scores(z, groups, from, n)) return false;
    to.mix_shift[t] = to.tile_max[t] = largest_group(groups);
    const bool adjusts = p.bias != nullptr || plan.plausible;
    const bool alike = plan.masses && !adjusts && plan.scale == kLog2e;
    const bool together = plan.masses && !adjusts && !alike;
    const F16 shift = splat(finite_shift(to.mix_shift[t])), log2e = splat(kLog2e), scale = splat(plan.scale);
    Sum4 total, mass;
    for (int v = 0; v < kTileVectors; v += 4) {
      for (int j = 0; j < 4; ++j) {
        prefetch(from + kLogitsTile, v + j);
        const F16 lowered = sub(load(z + (v + j) * 16), shift);
        total.take(j, exp2_16(mul(lowered, log2e)));
        if (together) mass.take(j, exp2_16(mul(lowered, scale)));
      }
    }
    to.mix_sum[t] = total.all();
    to.mass_sum[t] = alike ? to.mix_sum[t] : mass.all();
    if (p.entropy != nullptr) tile_stats<T>(p, row, t, n, to);
    if (!adjusts) return true;
    const bool fine = adjust(z, groups, from, n);
    to.tile_max[t] = largest_group(groups);
    if (plan.masses) {
      const F16 top = splat(finite_shift(to.tile_max[t]));
      Sum4 again;
      for (int v = 0; v < kTileVectors; v += 4)
        for (int j = 0; j < 4; ++j) again.take(j, exp2_16(mul(sub(load(z + (v + j) * 16), top), scale)));
      to.mass_sum[t] = again.all();
    }
    return fine;
  }
};

template <class T>
bool mix_tiles(const MixParams& p, int row, const RowPlan& plan, const RowScratch& to, int begin, int end) {
  const Mixer<T> mixer(p, row, plan, to);
  for (int t = begin; t < end; ++t)
    if (!mixer.tile(t)) return false;
  return true;
}

template <class T>
void model_tiles(const MixParams& p, int row, int model, float* tile_max, int begin, int end) {
  const T* from = model_row<T>(p, model, row);
  for (int t = begin; t < end; ++t) {
    const int n = p.vocab - t * kLogitsTile < kLogitsTile ? p.vocab - t * kLogitsTile : kLogitsTile;
    tile_max[t] = tile_top(from + t * kLogitsTile, n);
  }
}

template <class T>
float mixed_logit(const MixParams& p, int row, const RowPlan& plan, int id) {
  const T* rows[kMaxModels];
  for (int i = 0; i < plan.count; ++i) rows[i] = model_row<T>(p, plan.model[i], row);
  F16 wrong = zero();
  float lanes[16];
  store(lanes, mix_careful(rows, plan, id, 1, &wrong));
  return lanes[0];
}

bool mix(const MixParams& p, int row, const RowPlan& plan, const RowScratch& to, int begin, int end) {
  if (p.dtype == Dtype::f32) return mix_tiles<float>(p, row, plan, to, begin, end);
  if (p.dtype == Dtype::bf16) return mix_tiles<Bf16>(p, row, plan, to, begin, end);
  return mix_tiles<Half>(p, row, plan, to, begin, end);
}

void model_max(const MixParams& p, int row, int model, float* tile_max, int begin, int end) {
  if (p.dtype == Dtype::f32) return model_tiles<float>(p, row, model, tile_max, begin, end);
  if (p.dtype == Dtype::bf16) return model_tiles<Bf16>(p, row, model, tile_max, begin, end);
  model_tiles<Half>(p, row, model, tile_max, begin, end);
}

float mixed(const MixParams& p, int row, const RowPlan& plan, int id) {
  if (p.dtype == Dtype::f32) return mixed_logit<float>(p, row, plan, id);
  if (p.dtype == Dtype::bf16) return mixed_logit<Bf16>(p, row, plan, id);
  return mixed_logit<Half>(p, row, plan, id);
}

void masses(const float* from, int n, float top, float scale, float* to) {
  for (int i = 0; i < n; i += 16) {
    const F16 x = exp2_16(mul(sub(load_some(from + i, n - i), splat(top)), splat(scale)));
    store_some(to + i, x, n - i);
  }
}

int gather(const RowScratch& s, int tiles, float least, float top, float scale, float limit) {
  const F16 lowest = splat(least > -kInf ? least : -kLargest), shift = splat(top), by = splat(scale),
            bar = splat(limit);
  const auto passing = [&](F16 x) { return lanes_at_least(x, lowest) & lanes_at_least(mul(sub(x, shift), by), bar); };
  int n = 0;
  for (int t = 0; t < tiles; ++t) {
    if (passing(splat(s.tile_max[t])) == 0) continue;
    for (int b = 0; b < kLogitsTile / kLogitsBlock; ++b) {
      if (passing(load(s.group_max + t * kTileGroups + b * 16)) == 0) continue;
      const int from = t * kLogitsTile + b * kLogitsBlock;
      for (int i = from; i < from + kLogitsBlock; i += 16) {
        for (uint32_t left = passing(load(s.score + i)); left != 0; left &= left - 1) {
          const int id = i + __builtin_ctz(left);
          s.value[n] = s.score[id];
          s.id[n++] = id;
        }
      }
    }
  }
  return n;
}

void rank(const RankParams& p, int row, int token, RankTile* to, int begin, int end) {
  if (p.dtype == Dtype::f32) return rank_tiles<float>(p, row, token, to, begin, end);
  if (p.dtype == Dtype::bf16) return rank_tiles<Bf16>(p, row, token, to, begin, end);
  rank_tiles<Half>(p, row, token, to, begin, end);
}

}  // namespace

extern const LogitsKernels logits_kernels = {mix, model_max, mixed, masses, gather, rank};

}  // namespace RK_ISA
}  // namespace rainkernels
