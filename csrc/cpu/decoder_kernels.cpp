// decoder on the CPU: what lies between the products of a block.   Reference: rainkernels/reference/decoder.py
// Compiled once per instruction set. A row's bits depend on the row alone, and are the same on all of them.
#include <cmath>
#include <cstring>

#include "cpu/decoder.h"
#include "cpu/simd_math.h"

namespace rainkernels {
namespace RK_ISA {
namespace {

void norm_head(float* head, int dim, const RmsNorm& norm) {
  F16 squares = zero();
  for (int i = 0; i < dim; i += 16) {
    const F16 x = load_some(head + i, dim - i);
    squares = fma(x, x, squares);
  }
  const F16 scale = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(dim) + norm.eps));
  for (int i = 0; i < dim; i += 16) {
    const F16 x = mul(load_some(head + i, dim - i), scale);
    store_some(head + i, mul(load_some(norm.weight + i, dim - i), x), dim - i);
  }
}

// to = x * cos + (second half, first half of x) * sin; to may be x.
void rotate_head(const float* x, const float* cos, const float* sin, float* to, int dim) {
  const int half = dim / 2;
  for (int i = 0; i < half; i += 16) {
    const int n = half - i;
    const F16 a = load_some(x + i, n), b = load_some(x + half + i, n);
    const F16 low = add(mul(a, load_some(cos + i, n)), mul(b, load_some(sin + i, n)));
    const F16 high = add(mul(b, load_some(cos + half + i, n)), mul(a, load_some(sin + half + i, n)));
    store_some(to + i, low, n);
    store_some(to + half + i, high, n);
  }
}

void rotate_row(const DecoderShape& s, const DecoderBlock& block, float* qkv, const float* cos, const float* sin,
                float* k, float* v) {
  const int dim = s.head_dim;
  for (int h = 0; h < s.num_qo_heads; ++h, qkv += dim) {
    if (block.q_norm.weight != nullptr) norm_head(qkv, dim, block.q_norm);
    rotate_head(qkv, cos, sin, qkv, dim);
  }
  for (int h = 0; h < s.num_kv_heads; ++h, qkv += dim) {
    if (block.k_norm.weight != nullptr) norm_head(qkv, dim, block.k_norm);
    rotate_head(qkv, cos, sin, k + h * dim, dim);
  }
  std::memcpy(v, qkv, sizeof(float) * s.num_kv_heads * dim);
}

void gated_row(const float* gate_up, float* out, int n) {
  const F16 one = splat(1.0f), most = splat(127.0f), minus_log2e = splat(-1.4426950408889634f);
  for (int i = 0; i < n; i += 16) {
    const F16 gate = load_some(gate_up + i, n - i), up = load_some(gate_up + n + i, n - i);
    const F16 power = mul(gate, minus_log2e);
    // Beyond 2^127 the quotient is 0 either way; a NaN gate stays in the numerator.
    const F16 e = exp2_16(select_less(power, most, power, most));
    store_some(out + i, mul(div(gate, add(one, e)), up), n - i);
  }
}

}  // namespace

extern const DecoderKernels decoder_kernels{rotate_row, gated_row};

}  // namespace RK_ISA
}  // namespace rainkernels
