// Fixed-order arithmetic on embeddings and the PUCT score. Every lane sums in the order defined here: 16 accumulators
// (element i goes to accumulator i % 16), then one tree that adds the upper half to the lower half four times.
#pragma once

#include "rainkernels/tree.h"

namespace rainkernels::RK_ISA {

constexpr int32_t kLanes = 16;
constexpr float kNormFloor = 1e-8f;   // as torch.nn.functional.cosine_similarity
constexpr float kBoundSlack = 1e-4f;  // far above the rounding error of a dot product of unit vectors
constexpr float kDissimilar = -2.0f;  // below every cosine and every allowed threshold

RK_HOST_DEVICE static inline float root_of(float x) {
#if defined(__CUDA_ARCH__)
  return sqrtf(x);
#else
  return __builtin_sqrtf(x);
#endif
}

RK_HOST_DEVICE static inline double root_of(double x) {
#if defined(__CUDA_ARCH__)
  return sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

#if defined(__GNUC__) && !defined(__CUDACC__)
// GCC lowers these to one zmm, two ymm or four xmm operations: the same additions on every instruction set.
typedef float Lanes __attribute__((vector_size(64)));
typedef float HalfLanes __attribute__((vector_size(32)));
typedef float QuarterLanes __attribute__((vector_size(16)));

static inline float fold(const Lanes& acc) {
  HalfLanes a, b;
  __builtin_memcpy(&a, &acc, sizeof a);
  __builtin_memcpy(&b, reinterpret_cast<const char*>(&acc) + sizeof a, sizeof b);
  a += b;
  QuarterLanes c, d;
  __builtin_memcpy(&c, &a, sizeof c);
  __builtin_memcpy(&d, reinterpret_cast<const char*>(&a) + sizeof c, sizeof d);
  c += d;
  return (c[0] + c[2]) + (c[1] + c[3]);
}

static inline void load(Lanes& v, const float* x) {
  __builtin_memcpy(&v, x, sizeof v);
}
static inline void store(float* x, const Lanes& v) {
  __builtin_memcpy(x, &v, sizeof v);
}
#else
#if defined(__CUDACC__)
#define RK_UNROLL _Pragma("unroll")
#else
#define RK_UNROLL
#endif
struct Lanes {
  float v[kLanes];
  RK_HOST_DEVICE float& operator[](int i) { return v[i]; }
};

#define RK_LANEWISE(op)                                                     \
  RK_HOST_DEVICE static inline Lanes operator op(Lanes a, const Lanes& b) { \
    RK_UNROLL for (int i = 0; i < kLanes; ++i) a.v[i] = a.v[i] op b.v[i];   \
    return a;                                                               \
  }                                                                         \
  RK_HOST_DEVICE static inline Lanes operator op(Lanes a, float b) {        \
    RK_UNROLL for (int i = 0; i < kLanes; ++i) a.v[i] = a.v[i] op b;        \
    return a;                                                               \
  }
RK_LANEWISE(+)
RK_LANEWISE(-)
RK_LANEWISE(*)
RK_LANEWISE(/)
#undef RK_LANEWISE

RK_HOST_DEVICE static inline float fold(Lanes acc) {
  RK_UNROLL for (int width = kLanes / 2; width > 0; width /= 2) {
    RK_UNROLL for (int i = 0; i < kLanes / 2; ++i) {
      if (i < width) acc.v[i] += acc.v[i + width];
    }
  }
  return acc.v[0];
}
RK_HOST_DEVICE static inline void load(Lanes& v, const float* x) {
  RK_UNROLL for (int i = 0; i < kLanes; ++i) v.v[i] = x[i];
}
RK_HOST_DEVICE static inline void store(float* x, const Lanes& v) {
  RK_UNROLL for (int i = 0; i < kLanes; ++i) x[i] = v.v[i];
}
#endif

// Adds x * y of the last dims, fewer than 16; element j goes to accumulator j. Padded with zeros rather than indexed,
// so that acc stays in a register.
RK_HOST_DEVICE static inline void add_products(Lanes& acc, const float* x, const float* y, int32_t size) {
#if defined(__CUDA_ARCH__)
  RK_UNROLL for (int j = 0; j < kLanes; ++j) {
    if (j < size) acc.v[j] += x[j] * y[j];
  }
#else
  if (size <= 0) return;
  float pad_x[kLanes] = {}, pad_y[kLanes] = {};
  for (int32_t j = 0; j < size && j < kLanes; ++j) pad_x[j] = x[j], pad_y[j] = y[j];
  Lanes a, b;
  load(a, pad_x);
  load(b, pad_y);
  acc = acc + a * b;
#endif
}

RK_HOST_DEVICE static inline void clear(Lanes& v) {
#if defined(__GNUC__) && !defined(__CUDACC__)
  v = Lanes{};
#else
  for (int i = 0; i < kLanes; ++i) v[i] = 0.0f;
#endif
}

// Adds a[lo:hi] * b[lo:hi] to acc; lo is a multiple of 16.
RK_HOST_DEVICE static inline void dot_into(Lanes& acc, const float* a, const float* b, int32_t lo, int32_t hi) {
  int32_t i = lo;
  for (; i + kLanes <= hi; i += kLanes) {
    Lanes x, y;
    load(x, a + i);
    load(y, b + i);
    acc = acc + x * y;
  }
  add_products(acc, a + i, b + i, hi - i);
}

// Cosine of two stored means, or kDissimilar as soon as Cauchy-Schwarz on the unread dims proves it below the
// threshold.
RK_HOST_DEVICE static inline float cosine_if_near(const TreeDims& d, const float* a, const float* tails_a,
                                                  const float* b, const float* tails_b, float threshold) {
  const float norm_a = tails_a[0] > kNormFloor ? tails_a[0] : kNormFloor;
  const float norm_b = tails_b[0] > kNormFloor ? tails_b[0] : kNormFloor;
  const float norms = norm_a * norm_b;
  const float limit = (threshold - kBoundSlack) * norms;
  Lanes acc;
  clear(acc);
  for (int32_t c = 0; c < d.blocks - 1; ++c) {
    dot_into(acc, a, b, c * kBlock, (c + 1) * kBlock);
    const bool at_power_of_two = ((c + 1) & c) == 0;  // a look costs as much as a block, so not after each
    if (at_power_of_two && fold(acc) + tails_a[c + 1] * tails_b[c + 1] < limit) return kDissimilar;
  }
  dot_into(acc, a, b, (d.blocks - 1) * kBlock, d.dim);
  return fold(acc) / norms;
}

// mean += (x - mean) / visits (a copy at the first one), then the norms of its tails.
RK_HOST_DEVICE static inline void update_mean(const TreeDims& d, float* mean, float* tails, const float* x, bool first,
                                              int32_t visits) {
  const float rate = 1.0f / static_cast<float>(visits);
  for (int32_t c = 0; c < d.blocks; ++c) {
    Lanes squares;
    clear(squares);
    int32_t i = c * kBlock;
    const int32_t end = i + kBlock < d.dim ? i + kBlock : d.dim;
    for (; i + kLanes <= end; i += kLanes) {
      Lanes e, m;
      load(e, x + i);
      if (!first) {
        load(m, mean + i);
        e = m + (e - m) * rate;
      }
      store(mean + i, e);
      squares = squares + e * e;
    }
    for (int32_t j = i; j < end; ++j) mean[j] = first ? x[j] : mean[j] + (x[j] - mean[j]) * rate;
    add_products(squares, mean + i, mean + i, end - i);
    tails[c] = fold(squares);
  }
  float sum = 0.0f;
  for (int32_t c = d.blocks - 1; c >= 0; --c) {
    sum += tails[c];
    tails[c] = root_of(sum);
  }
}

// Norm of the unbiased variance over `count` >= 2 means, rows[k] * dim floats into the pool.
RK_HOST_DEVICE static inline float variance_norm(const TreeDims& d, const float* pool, const int32_t* rows,
                                                 int32_t count) {
  const float total = static_cast<float>(count), degrees = static_cast<float>(count - 1);
  Lanes acc;
  clear(acc);
  int32_t i = 0;
  for (; i + kLanes <= d.dim; i += kLanes) {
    Lanes mean, var, x;
    clear(mean);
    clear(var);
    for (int32_t k = 0; k < count; ++k) {
      load(x, pool + static_cast<int64_t>(rows[k]) * d.dim + i);
      mean = mean + x;
    }
    mean = mean / total;
    for (int32_t k = 0; k < count; ++k) {
      load(x, pool + static_cast<int64_t>(rows[k]) * d.dim + i);
      var = var + (x - mean) * (x - mean);
    }
    var = var / degrees;
    acc = acc + var * var;
  }
  float rest[kLanes];
  for (int32_t j = 0; i + j < d.dim; ++j) {
    float mean = 0.0f, var = 0.0f;
    for (int32_t k = 0; k < count; ++k) mean += pool[static_cast<int64_t>(rows[k]) * d.dim + i + j];
    mean /= total;
    for (int32_t k = 0; k < count; ++k) {
      const float delta = pool[static_cast<int64_t>(rows[k]) * d.dim + i + j] - mean;
      var += delta * delta;
    }
    rest[j] = var / degrees;
  }
  add_products(acc, rest, rest, d.dim - i);
  return root_of(fold(acc));
}

RK_HOST_DEVICE static inline bool is_finite(float x) {
  return x - x == 0.0f;
}
RK_HOST_DEVICE static inline bool is_finite(double x) {
  return x - x == 0.0;
}

RK_HOST_DEVICE static inline bool all_finite(const float* x, int32_t size) {
  uint32_t bad = 0;
  for (int32_t i = 0; i < size; ++i) {
#if defined(__CUDA_ARCH__)
    const uint32_t bits = __float_as_uint(x[i]);
#else
    uint32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof bits);
#endif
    bad |= static_cast<uint32_t>((bits & 0x7f800000u) == 0x7f800000u);
  }
  return bad == 0;
}

// PUCT score of one child (see rainkernels.ops.tree.select); O is left out unless leaves are in flight.
template <class Real>
struct Scorer {
  const Tree<Real>& t;
  Real low, span, c_puct, spread;
  bool flying;

  RK_HOST_DEVICE Scorer(const Tree<Real>& tree, int32_t parent, Real c)
      : t(tree),
        low(t.bounds[0]),
        span(t.bounds[1] - t.bounds[0] + static_cast<Real>(1e-5)),
        c_puct(c),
        flying(t.header[kInFlight] > 0) {
    Real explored = t.visits[parent];
    if (flying) explored = explored + static_cast<Real>(t.in_flight[parent]);
    spread = root_of(explored);
  }

  RK_HOST_DEVICE Real operator()(int32_t slot) const {
    const Real n = t.visits[slot];
    const Real exploit = (t.values[slot] - low) / span;
    Real seen = Real(1) + n;
    if (flying) seen = seen + static_cast<Real>(t.in_flight[slot]);
    return (n == Real(0) ? Real(0) : exploit) + c_puct * t.priors[slot] * spread / seen;
  }
};

// Slot of the child with the greatest score; the first of equals. Requires count >= 1.
template <class Real>
RK_HOST_DEVICE static inline int32_t pick_child(const Tree<Real>& t, int32_t first, int32_t count, int32_t parent,
                                                Real c_puct) {
  const Scorer<Real> score(t, parent, c_puct);
  int32_t best = 0;
#if defined(__CUDA_ARCH__)
  Real top = score(first);
  for (int32_t k = 1; k < count; ++k) {
    const Real s = score(first + k);
    if (s > top) top = s, best = k;
  }
#else
  Real scores[kMaxChildren];  // scored apart from the comparison, so that the compiler can vectorise the divisions
  for (int32_t k = 0; k < count; ++k) scores[k] = score(first + k);
  for (int32_t k = 1; k < count; ++k) {
    if (scores[k] > scores[best]) best = k;
  }
#endif
  return first + best;
}

}  // namespace rainkernels::RK_ISA
