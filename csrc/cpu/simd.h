// Sixteen float lanes on every instruction set: one zmm, two ymm or sixteen scalars. Each operation is IEEE-exact per
// lane and every reduction has one fixed tree, so the sets agree bit for bit. Included once per ISA, inside its
// namespace's file.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(RK_ISA_avx512) || defined(RK_ISA_avx2)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own intrinsics start from an undefined register.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

#include "rainkernels/dtypes.h"

// For what is long or rare: one copy in a kernel's file, however many specialisations call it.
#define RK_OUT_OF_LINE __attribute__((noinline, unused))

namespace rainkernels {
namespace RK_ISA {

#if defined(RK_ISA_avx512)

struct F16 {
  __m512 v;
};
static inline F16 zero() {
  return {_mm512_setzero_ps()};
}
static inline F16 splat(float x) {
  return {_mm512_set1_ps(x)};
}
static inline F16 load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
static inline void store(float* p, F16 a) {
  _mm512_storeu_ps(p, a.v);
}
static inline F16 add(F16 a, F16 b) {
  return {_mm512_add_ps(a.v, b.v)};
}
static inline F16 sub(F16 a, F16 b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
static inline F16 mul(F16 a, F16 b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
static inline F16 div(F16 a, F16 b) {
  return {_mm512_div_ps(a.v, b.v)};
}
static inline F16 max(F16 a, F16 b) {
  return {_mm512_max_ps(a.v, b.v)};
}
static inline F16 fma(F16 a, F16 b, F16 c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
static inline F16 magnitude(F16 a) {
  return {_mm512_abs_ps(a.v)};
}
static inline F16 with_sign(F16 a, F16 sign) {
  return {_mm512_or_ps(_mm512_abs_ps(a.v), _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)))};
}
static inline F16 select_less(F16 a, F16 b, F16 yes, F16 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
// 2^n for lanes holding 1.5 * 2^23 + n.
static inline F16 power_of(F16 shifted) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(shifted.v), _mm512_set1_epi32(127)), 23))};
}
// Lanes in [lo, hi) keep a, the others take `other`.
static inline F16 keep_lanes(F16 a, int lo, int hi, F16 other) {
  const uint32_t below_hi = hi >= 16 ? 0xffffu : hi <= 0 ? 0u : (1u << hi) - 1;
  const uint32_t below_lo = lo >= 16 ? 0xffffu : lo <= 0 ? 0u : (1u << lo) - 1;
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(below_hi & ~below_lo), other.v, a.v)};
}
static inline F16 load16(const float* p) {
  return load(p);
}
static inline F16 load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
static inline F16 load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline float fold_sum(__m256 x) {
  const __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 t = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
static inline float sum(F16 a) {
  return fold_sum(_mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)));
}
static inline float largest(F16 a) {
  return _mm512_reduce_max_ps(a.v);
}

// In place: lane j of vector i <-> lane i of vector j.
static inline void transpose(F16* r) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  __m512 u[16];
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + 2 + j]);
      u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88),
                 d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    r[j].v = _mm512_shuffle_f32x4(a, c, 0x88);
    r[8 + j].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[4 + j].v = _mm512_shuffle_f32x4(b, d, 0x88);
    r[12 + j].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
// Sixteen columns of sixteen rows, transposed into `to`: the loads gather quarters of four rows, so that half of the
// shuffles of a transpose in registers go away.
#define RK_TRANSPOSES_FROM_MEMORY 1
static inline void transpose_rows(const float* const* from, int column, float* to, int ldt) {
  for (int k = 0; k < 4; ++k) {
    __m512 r[4];
    for (int i = 0; i < 4; ++i) {
      __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(from[i] + column + 4 * k));
      x = _mm512_insertf32x4(x, _mm_loadu_ps(from[4 + i] + column + 4 * k), 1);
      x = _mm512_insertf32x4(x, _mm_loadu_ps(from[8 + i] + column + 4 * k), 2);
      r[i] = _mm512_insertf32x4(x, _mm_loadu_ps(from[12 + i] + column + 4 * k), 3);
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1])),
                  b = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3])),
                  d = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
    _mm512_storeu_ps(to + (4 * k + 0) * ldt, _mm512_castpd_ps(_mm512_unpacklo_pd(a, c)));
    _mm512_storeu_ps(to + (4 * k + 1) * ldt, _mm512_castpd_ps(_mm512_unpackhi_pd(a, c)));
    _mm512_storeu_ps(to + (4 * k + 2) * ldt, _mm512_castpd_ps(_mm512_unpacklo_pd(b, d)));
    _mm512_storeu_ps(to + (4 * k + 3) * ldt, _mm512_castpd_ps(_mm512_unpackhi_pd(b, d)));
  }
}

// Bit i: lane i of a is at least lane i of b.
static inline uint32_t lanes_at_least(F16 a, F16 b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ);
}
// Stores rounded to nearest even, NaN as in dtypes.h.
static inline void store_bf16(uint16_t* p, F16 a) {
  const __m512i u = _mm512_castps_si512(a.v), high = _mm512_srli_epi32(u, 16);
  const __m512i even = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i value = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), even), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i bits = _mm512_mask_or_epi32(value, nan, high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits));
}
static inline void store_f16(uint16_t* p, F16 a) {
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(_mm512_castps_si512(a.v), 16), _mm512_set1_epi32(0x8000));
  const __m256i quiet = _mm512_cvtepi32_epi16(_mm512_or_si512(sign, _mm512_set1_epi32(0x7e00)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m256i value = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_mask_blend_epi16(nan, value, quiet));
}

#elif defined(RK_ISA_avx2)

struct F16 {
  __m256 a, b;
};
#define RK_EACH(expression_a, expression_b) {(expression_a), (expression_b)}
static inline F16 zero() {
  return RK_EACH(_mm256_setzero_ps(), _mm256_setzero_ps());
}
static inline F16 splat(float x) {
  return RK_EACH(_mm256_set1_ps(x), _mm256_set1_ps(x));
}
static inline F16 load(const float* p) {
  return RK_EACH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
}
static inline void store(float* p, F16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
static inline F16 add(F16 x, F16 y) {
  return RK_EACH(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b));
}
static inline F16 sub(F16 x, F16 y) {
  return RK_EACH(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b));
}
static inline F16 mul(F16 x, F16 y) {
  return RK_EACH(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b));
}
static inline F16 div(F16 x, F16 y) {
  return RK_EACH(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b));
}
static inline F16 max(F16 x, F16 y) {
  return RK_EACH(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b));
}
static inline F16 fma(F16 x, F16 y, F16 z) {
  return RK_EACH(_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
static inline F16 magnitude(F16 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return RK_EACH(_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b));
}
static inline F16 with_sign(F16 x, F16 s) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return RK_EACH(_mm256_or_ps(_mm256_andnot_ps(sign, x.a), _mm256_and_ps(sign, s.a)),
                 _mm256_or_ps(_mm256_andnot_ps(sign, x.b), _mm256_and_ps(sign, s.b)));
}
static inline F16 select_less(F16 x, F16 y, F16 yes, F16 no) {
  return RK_EACH(_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
                 _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)));
}
static inline __m256 power_of_half(__m256 x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(127)), 23));
}
static inline F16 power_of(F16 x) {
  return RK_EACH(power_of_half(x.a), power_of_half(x.b));
}
static inline __m256 keep_half(__m256 x, int lo, int hi, __m256 other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(lo), lane),
                                          _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(hi - 1)));
  return _mm256_blendv_ps(x, other, _mm256_castsi256_ps(outside));
}
static inline F16 keep_lanes(F16 x, int lo, int hi, F16 other) {
  return RK_EACH(keep_half(x.a, lo, hi, other.a), keep_half(x.b, lo - 8, hi - 8, other.b));
}
static inline F16 load16(const float* p) {
  return load(p);
}
static inline __m256i widen(const uint16_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline F16 load_bf16(const uint16_t* p) {
  return RK_EACH(_mm256_castsi256_ps(_mm256_slli_epi32(widen(p), 16)),
                 _mm256_castsi256_ps(_mm256_slli_epi32(widen(p + 8), 16)));
}
static inline __m256 half_floats(__m256i h) {
  const __m256i body = _mm256_slli_epi32(_mm256_and_si256(h, _mm256_set1_epi32(0x7fff)), 13);
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(h, _mm256_set1_epi32(0x8000)), 16);
  const __m256i special =
      _mm256_and_si256(_mm256_cmpgt_epi32(body, _mm256_set1_epi32(0x0f7fffff)), _mm256_set1_epi32(0x7f800000));
  const __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(body), _mm256_set1_ps(0x1p112f));
  return _mm256_or_ps(_mm256_castsi256_ps(_mm256_or_si256(sign, special)), value);
}
static inline F16 load_f16(const uint16_t* p) {
  return RK_EACH(half_floats(widen(p)), half_floats(widen(p + 8)));
}
static inline float fold_sum(__m256 x) {
  const __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 t = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_shuffle_ps(t, t, 1)));
}
static inline float sum(F16 x) {
  return fold_sum(_mm256_add_ps(x.a, x.b));
}
static inline float largest(F16 x) {
  const __m256 m = _mm256_max_ps(x.a, x.b);
  const __m128 s = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  const __m128 t = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_shuffle_ps(t, t, 1)));
}
static inline void transpose8(__m256* r) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
      u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
    }
  }
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    r[4 + j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
}
static inline void transpose(F16* r) {
  __m256 q[4][8];
  for (int i = 0; i < 8; ++i) {
    q[0][i] = r[i].a;
    q[1][i] = r[i].b;
    q[2][i] = r[8 + i].a;
    q[3][i] = r[8 + i].b;
  }
  for (int k = 0; k < 4; ++k) transpose8(q[k]);
  for (int i = 0; i < 8; ++i) {
    r[i] = {q[0][i], q[2][i]};
    r[8 + i] = {q[1][i], q[3][i]};
  }
}
// Bit i: lane i of x is at least lane i of y.
static inline uint32_t lanes_at_least(F16 x, F16 y) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ))) |
         static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ))) << 8;
}
#undef RK_EACH

// Stores rounded to nearest even, NaN as in dtypes.h.
static inline __m256i bf16_half(__m256 x) {
  const __m256i u = _mm256_castps_si256(x), high = _mm256_srli_epi32(u, 16);
  const __m256i even = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i value = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), even), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(value, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
static inline void store_bf16(uint16_t* p, F16 x) {
  const __m256i packed = _mm256_packus_epi32(bf16_half(x.a), bf16_half(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
static inline void store_f16(uint16_t* p, F16 x) {
  float lanes[16];
  store(lanes, x);
  for (int i = 0; i < 16; ++i) p[i] = float_to_f16(lanes[i]);
}

#else

struct F16 {
  float v[16];
};
#define RK_LANES(expression)                          \
  F16 r;                                              \
  for (int i = 0; i < 16; ++i) r.v[i] = (expression); \
  return r
static inline F16 zero() {
  RK_LANES(0.0f);
}
static inline F16 splat(float x) {
  RK_LANES(x);
}
static inline F16 load(const float* p) {
  RK_LANES(p[i]);
}
static inline void store(float* p, F16 a) {
  memcpy(p, a.v, sizeof(a.v));
}
static inline F16 add(F16 a, F16 b) {
  RK_LANES(a.v[i] + b.v[i]);
}
static inline F16 sub(F16 a, F16 b) {
  RK_LANES(a.v[i] - b.v[i]);
}
static inline F16 mul(F16 a, F16 b) {
  RK_LANES(a.v[i] * b.v[i]);
}
static inline F16 div(F16 a, F16 b) {
  RK_LANES(a.v[i] / b.v[i]);
}
static inline F16 max(F16 a, F16 b) {
  RK_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
static inline F16 fma(F16 a, F16 b, F16 c) {
  RK_LANES(__builtin_fmaf(a.v[i], b.v[i], c.v[i]));
}
#else
// Without the instruction: the product is exact in double, and a sum rounded to odd rounds to the right float.
static inline float fma_one(float a, float b, float c) {
  const double p = static_cast<double>(a) * b, q = c, s = p + q;
  const double back = s - p, error = (p - (s - back)) + (q - back);
  int64_t bits, error_bits;
  memcpy(&bits, &s, 8);
  memcpy(&error_bits, &error, 8);
  // Inexact and even: step towards the side of the error, which makes the last bit odd.
  const bool step = error != 0.0 && (bits & 1) == 0 && error == error;
  bits += step ? (((error_bits ^ bits) < 0) ? -1 : 1) : 0;
  double odd;
  memcpy(&odd, &bits, 8);
  return static_cast<float>(odd);
}
static RK_OUT_OF_LINE F16 fma(F16 a, F16 b, F16 c) {
  RK_LANES(fma_one(a.v[i], b.v[i], c.v[i]));
}
#endif
static inline F16 magnitude(F16 a) {
  RK_LANES(bits_float(float_bits(a.v[i]) & 0x7fffffffu));
}
static inline F16 with_sign(F16 a, F16 s) {
  RK_LANES(bits_float((float_bits(a.v[i]) & 0x7fffffffu) | (float_bits(s.v[i]) & 0x80000000u)));
}
static inline F16 select_less(F16 a, F16 b, F16 yes, F16 no) {
  RK_LANES(a.v[i] < b.v[i] ? yes.v[i] : no.v[i]);
}
static inline F16 power_of(F16 a) {
  RK_LANES(bits_float((float_bits(a.v[i]) + 127u) << 23));
}
static inline F16 keep_lanes(F16 a, int lo, int hi, F16 other) {
  RK_LANES(i >= lo && i < hi ? a.v[i] : other.v[i]);
}
static inline F16 load16(const float* p) {
  return load(p);
}
static inline F16 load_bf16(const uint16_t* p) {
  RK_LANES(bits_float(uint32_t{p[i]} << 16));
}
static RK_OUT_OF_LINE F16 load_f16(const uint16_t* p) {
  F16 r;
  for (int i = 0; i < 16; ++i) {
    const uint32_t sign = uint32_t{p[i] & 0x8000u} << 16, body = uint32_t{p[i] & 0x7fffu} << 13;
    const uint32_t special = body > 0x0f7fffffu ? 0x7f800000u : 0u;
    r.v[i] = bits_float(sign | special | float_bits(bits_float(body) * 0x1p112f));
  }
  return r;
}
static inline float fold(const float* x, float (*join)(float, float)) {
  float t[8];
  for (int i = 0; i < 8; ++i) t[i] = join(x[i], x[i + 8]);
  for (int width = 4; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) t[i] = join(t[i], t[i + width]);
  return t[0];
}
static inline float sum(F16 a) {
  return fold(a.v, [](float x, float y) { return x + y; });
}
static inline float largest(F16 a) {
  return fold(a.v, [](float x, float y) { return x > y ? x : y; });
}
static inline void transpose(F16* r) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const float kept = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = kept;
    }
  }
}
// Bit i: lane i of a is at least lane i of b.
static inline uint32_t lanes_at_least(F16 a, F16 b) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
  return bits;
}
#undef RK_LANES

// Stores rounded to nearest even, NaN as in dtypes.h.
static RK_OUT_OF_LINE void store_bf16(uint16_t* p, F16 a) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(a.v[i]);
}
static RK_OUT_OF_LINE void store_f16(uint16_t* p, F16 a) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_f16(a.v[i]);
}

#endif

}  // namespace RK_ISA
}  // namespace rainkernels
