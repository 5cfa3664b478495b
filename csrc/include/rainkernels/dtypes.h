// Element types of the tensors and their conversions, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "rainkernels/common.h"

namespace rainkernels {

// Order shared with rainkernels/_checks.py (DTYPE_CODE).
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };

RK_LOCAL uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

RK_LOCAL float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

RK_LOCAL float bf16_to_float(uint16_t h) {
  return bits_float(uint32_t{h} << 16);
}

RK_LOCAL uint16_t float_to_bf16(float x) {
  const uint32_t u = float_bits(x);
  if (x != x) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

RK_LOCAL float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, body = uint32_t{h & 0x7fffu} << 13;
  if (body >= 0x0f800000u) return bits_float(sign | body | 0x7f800000u);  // infinity, NaN
  return bits_float(sign | float_bits(bits_float(body) * 0x1p112f));
}

RK_LOCAL uint16_t float_to_f16(float x) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, body = u & 0x7fffffffu;
  if (body > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (body >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (body < 0x38800000u) {  // below the smallest normal: adding 0.5 leaves the wanted bits at the bottom, rounded
    return static_cast<uint16_t>(sign | (float_bits(bits_float(body) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((body - 0x38000000u + 0xfff + ((body >> 13) & 1)) >> 13));
}

}  // namespace rainkernels
