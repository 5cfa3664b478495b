// Loads, stores and functions of sixteen lanes, written once in terms of simd.h. Coefficients are
// least-maximum fits over the stated ranges; every step is one IEEE operation, so all instruction sets agree.
#pragma once

#include "cpu/simd.h"

namespace rainkernels {
namespace RK_ISA {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
static inline F16 load16(const Bf16* p) {
  return load_bf16(reinterpret_cast<const uint16_t*>(p));
}
static inline F16 load16(const Half* p) {
  return load_f16(reinterpret_cast<const uint16_t*>(p));
}
// The first n of 16 elements, zeros after; never reads past them.
template <class T>
static inline F16 load_some(const T* p, int n) {
  if (n >= 16) return load16(p);
  T piece[16];
  memset(piece, 0, sizeof(piece));
  for (int i = 0; i < n; ++i) piece[i] = p[i];
  return load16(piece);
}

static inline void put(float* p, float x) {
  *p = x;
}
static inline void put(Bf16* p, float x) {
  p->bits = float_to_bf16(x);
}
static inline void put(Half* p, float x) {
  p->bits = float_to_f16(x);
}
// The first n of 16 lanes, rounded to the storage type.
template <class T>
static inline void store_some(T* p, F16 a, int n) {
  float lanes[16];
  store(lanes, a);
  for (int i = 0; i < (n < 16 ? n : 16); ++i) put(p + i, lanes[i]);
}
static inline void store_some(float* p, F16 a, int n) {
  if (n >= 16) return store(p, a);
  store_some<float>(p, a, n);
}

// 2^x for x <= 128, relative error below 2^-23; 0 below -126; NaN stays NaN.
static inline F16 exp2_16(F16 x) {
  const F16 magic = splat(12582912.0f);
  const F16 shifted = add(x, magic);
  const F16 f = sub(x, sub(shifted, magic));
  F16 p = splat(0.00015353361959569156f);
  p = fma(p, f, splat(0.0013398875016719103f));
  p = fma(p, f, splat(0.00961843691766262f));
  p = fma(p, f, splat(0.055503323674201965f));
  p = fma(p, f, splat(0.24022647738456726f));
  p = fma(p, f, splat(0.6931471824645996f));
  p = fma(p, f, splat(1.0f));
  return select_less(x, splat(-126.0f), zero(), mul(p, power_of(shifted)));
}

static inline float exp2_one(float x) {
  float lanes[16];
  store(lanes, exp2_16(splat(x)));
  return lanes[0];
}

// tanh: odd polynomial near 0, 1 - 2 / (e^2|x| + 1) beyond.
static inline F16 tanh_16(F16 x) {
  const F16 z = mul(x, x);
  F16 p = splat(-0.005717044696211815f);
  p = fma(p, z, splat(0.020650586113333702f));
  p = fma(p, z, splat(-0.05374349653720856f));
  p = fma(p, z, splat(0.13331490755081177f));
  p = fma(p, z, splat(-0.3333328366279602f));
  const F16 near = fma(mul(p, z), x, x);
  const F16 size = magnitude(x);
  const F16 bounded = select_less(splat(10.0f), size, splat(10.0f), size);
  const F16 e = exp2_16(mul(bounded, splat(2.8853900817779268f)));
  const F16 far = with_sign(sub(splat(1.0f), div(splat(2.0f), add(e, splat(1.0f)))), x);
  return select_less(size, splat(0.625f), near, far);
}

// Sixteen lanes rounded to the storage type.
static inline void store16(float* p, F16 a) {
  store(p, a);
}
static inline void store16(Bf16* p, F16 a) {
  store_bf16(reinterpret_cast<uint16_t*>(p), a);
}
static inline void store16(Half* p, F16 a) {
  store_f16(reinterpret_cast<uint16_t*>(p), a);
}

static inline float tanh_one(float x) {
  float lanes[16];
  store(lanes, tanh_16(splat(x)));
  return lanes[0];
}

}  // namespace RK_ISA
}  // namespace rainkernels
