// decoder on the CPU: what lies between the products of a block.   Reference: rainkernels/reference/decoder.py
// Compiled once per instruction set. A row's bits depend on the row alone, and are the same on all of them.
#include <cmath>
#include <cstring>

#include "cpu/decoder.h"
#include "cpu/simd_math.h"

namespace rainkernels {
namespace RK_ISA {
namespace {

RK_OUT_OF_LINE F16 some(const float* p, int n) {
  return load_some(p, n);
}

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

// Products. Each output is one chain of sixteen lanes over the row, then one tree: its bits depend on its row of x and
// its row of the weight alone, whatever tile it lies in. Weights are read as they lie in the checkpoint.
#if defined(RK_ISA_avx512)
constexpr int kTileRows = 4, kTileOutputs = 4, kFewRows = 2, kFewOutputs = 8;
#elif defined(RK_ISA_avx2)
constexpr int kTileRows = 3, kTileOutputs = 2, kFewRows = 1, kFewOutputs = 4;
#else
constexpr int kTileRows = 1, kTileOutputs = 1, kFewRows = 1, kFewOutputs = 1;
#endif
// Weights are asked for this many outputs before they are used, into the second-level cache. The hardware looks ahead
// along a row only, and does too little of it where several rows of x are multiplied: 2 to 4 rows took 1.2 to 1.4
// times as long as one without this.
constexpr int kAhead = 16;
// Many rows are done in blocks: kBlockRows pieces of x of kPiece floats stay in the first-level cache while the same
// pieces of kBlockOutputs rows of the weight come from the second-level cache. Sums wait outside of registers between
// pieces.
constexpr int kBlockRows = 4 * kTileRows, kBlockOutputs = 16 * kTileOutputs, kPiece = 512;

// Which part of the rows a tile goes over, where that part of x lies, and where sums wait: null where it is the whole.
struct Piece {
  int64_t begin, end;
  bool first, last;
  const float* x;
  int64_t x_stride;
  float* sums;
};

// y [R, C] = the sums of R * C vectors, by the tree of sum().
template <int R, int C>
RK_ALWAYS inline void store_sums(const F16 (&sums)[R][C], float* y, int64_t ldy) {
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) y[r * ldy + c] = sum(sums[r][c]);
}

#if defined(RK_ISA_avx512)
// Sixteen trees at once: every addition adds halves of two vectors.
template <int R>
RK_ALWAYS inline void store_sums(const F16 (&sums)[R][4], float* y, int64_t ldy) {
  __m512 quarter[4];  // of output c: four partial sums per row, a row in each 128 bits
  for (int c = 0; c < 4; ++c) {
    __m512 half[2];
    for (int pair = 0; pair < 2; ++pair) {
      const __m512 a = sums[2 * pair < R ? 2 * pair : 0][c].v, b = sums[2 * pair + 1 < R ? 2 * pair + 1 : 0][c].v;
      half[pair] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    quarter[c] =
        _mm512_add_ps(_mm512_shuffle_f32x4(half[0], half[1], 0x88), _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
  }
  __m512 eighth[2];
  for (int pair = 0; pair < 2; ++pair) {
    const __m512 a = quarter[2 * pair], b = quarter[2 * pair + 1];
    eighth[pair] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  const __m512 all =
      _mm512_add_ps(_mm512_shuffle_ps(eighth[0], eighth[1], 0x88), _mm512_shuffle_ps(eighth[0], eighth[1], 0xdd));
  _mm_storeu_ps(y, _mm512_castps512_ps128(all));
  if (R > 1) _mm_storeu_ps(y + ldy, _mm512_extractf32x4_ps(all, 1));
  if (R > 2) _mm_storeu_ps(y + 2 * ldy, _mm512_extractf32x4_ps(all, 2));
  if (R > 3) _mm_storeu_ps(y + 3 * ldy, _mm512_extractf32x4_ps(all, 3));
}
#endif

template <int R, int C, bool Ahead>
RK_ALWAYS inline void tile(const Product& p, int64_t row, int64_t output, const Piece& piece) {
  F16 sums[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sums[r][c] = Ahead || piece.first ? zero() : load(piece.sums + (r * C + c) * 16);
  const float* const x = piece.x + row * piece.x_stride;
  const float* const w = p.weight + output * p.in + piece.begin;
  const int64_t size = piece.end - piece.begin;
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    F16 weights[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) weights[c] = load(w + c * p.in + i);
    if (Ahead) {
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) __builtin_prefetch(w + (c + kAhead) * p.in + i, 0, 2);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F16 a = load(x + r * piece.x_stride + i);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sums[r][c] = fma(a, weights[c], sums[r][c]);
    }
  }
  if (i < size) {
    const int n = static_cast<int>(size - i);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
        sums[r][c] = fma(some(x + r * piece.x_stride + i, n), some(w + c * p.in + i, n), sums[r][c]);
  }
  if (!Ahead && !piece.last) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) store(piece.sums + (r * C + c) * 16, sums[r][c]);
    return;
  }
  float* const y = p.y + row * p.out + output;
  store_sums(sums, y, p.out);
  if (p.bias == nullptr) return;
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) y[r * p.out + c] += p.bias[output + c];
}

template <int C, bool Ahead>
RK_ALWAYS inline void tiles(const Product& p, int64_t row, int rows, int64_t output, const Piece& piece) {
  switch (rows) {
    case 1:
      return tile<1, C, Ahead>(p, row, output, piece);
    case 2:
      return tile<2, C, Ahead>(p, row, output, piece);
    case 3:
      return tile<3, C, Ahead>(p, row, output, piece);
    default:
      return tile<4, C, Ahead>(p, row, output, piece);
  }
}

// Rows [from, to) of the outputs [output, output + C), in tiles of nearly the same size.
template <int C>
void columns(const Product& p, int64_t from, int64_t to, int64_t output, Piece piece) {
  const int64_t rows = to - from, count = (rows + kTileRows - 1) / kTileRows;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t begin = from + rows * b / count, end = from + rows * (b + 1) / count;
    // The first rows read the weights from memory, and ask for the next ones.
    if (C > 1 && begin == 0 && piece.sums == nullptr)
      tiles<C, true>(p, begin, static_cast<int>(end - begin), output, piece);
    else
      tiles<C, false>(p, begin, static_cast<int>(end - begin), output, piece);
    if (piece.sums != nullptr) piece.sums += kTileRows * C * 16;
  }
}

// Outputs [begin, end) of rows [from, to).
void block(const Product& p, int64_t from, int64_t to, int64_t begin, int64_t end, const Piece& whole) {
  Piece piece = whole;
  int64_t o = begin;
  for (; o + kTileOutputs <= end; o += kTileOutputs) {
    columns<kTileOutputs>(p, from, to, o, piece);
    if (piece.sums != nullptr) piece.sums += kBlockRows * kTileOutputs * 16;
  }
  for (; o < end; ++o) {
    columns<1>(p, from, to, o, piece);
    if (piece.sums != nullptr) piece.sums += kBlockRows * 16;
  }
}

void few_rows(const Product& p, int64_t begin, int64_t end) {
  const Piece whole{0, p.in, true, true, p.x, p.in, nullptr};
  int64_t o = begin;
  for (; o + kFewOutputs <= end; o += kFewOutputs) {
    if (p.rows == 1)
      tile<1, kFewOutputs, true>(p, 0, o, whole);
    else
      tile<kFewRows, kFewOutputs, true>(p, 0, o, whole);
  }
  for (; o < end; ++o) columns<1>(p, 0, p.rows, o, whole);
}

// Rows [from, to) of the outputs [begin, end), piece after piece. The pieces of x are brought together first: rows
// whose distance is a multiple of 4 KB would otherwise fight for the same places of the first-level cache.
void pieces(const Product& p, int64_t from, int64_t to, int64_t begin, int64_t end) {
  alignas(64) thread_local float sums[kBlockRows * kBlockOutputs * 16];
  alignas(64) thread_local float x[kBlockRows * kPiece];
  for (int64_t at = 0; at < p.in; at += kPiece) {
    const int64_t size = at + kPiece < p.in ? kPiece : p.in - at;
    for (int64_t r = from; r < to; ++r) std::memcpy(x + (r - from) * kPiece, p.x + r * p.in + at, sizeof(float) * size);
    const bool last = at + size == p.in;
    block(p, from, to, begin, end, {at, at + size, at == 0, last, x - from * kPiece, kPiece, sums});
  }
}

void product(const Product& p, int64_t begin, int64_t end) {
  if (p.rows <= kFewRows) return few_rows(p, begin, end);
  const Piece whole{0, p.in, true, true, p.x, p.in, nullptr};
  for (int64_t o = begin; o < end; o += kBlockOutputs) {
    const int64_t last = o + kBlockOutputs < end ? o + kBlockOutputs : end;
    for (int64_t row = 0; row < p.rows; row += kBlockRows) {
      const int64_t until = row + kBlockRows < p.rows ? row + kBlockRows : p.rows;
      // Few rows leave the weights to be read from memory, which is done in longer runs.
      if (p.rows <= kBlockRows || p.in <= kPiece)
        block(p, row, until, o, last, whole);
      else
        pieces(p, row, until, o, last);
    }
  }
}

// Low-rank updates. Each output is one chain over the rank, in a lane of its own.
template <int R>
RK_ALWAYS inline void expand_rows(const Expansion& e, int64_t row, int64_t begin, int64_t end) {
  const LowRank& part = *e.part;
  const F16 scale = splat(part.scale);
  const float* const u = e.u + row * e.u_stride;
  for (int64_t b = begin; b < end; ++b) {
    const float* const up = part.up + b * part.rank * 16;
    F16 sums[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[r] = zero();
    for (int j = 0; j < part.rank; ++j) {
      const F16 w = load(up + j * 16);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r] = fma(splat(u[r * e.u_stride + j]), w, sums[r]);
    }
    const int n = static_cast<int>(part.size - b * 16);
    for (int r = 0; r < R; ++r) {
      float* const y = e.y + (row + r) * e.y_stride + part.first + b * 16;
      store_some(y, fma(scale, sums[r], load_some(y, n)), n);
    }
  }
}

void expand(const Expansion& e, int64_t begin, int64_t end) {
  int64_t row = 0;
  for (; row + 4 <= e.rows; row += 4) expand_rows<4>(e, row, begin, end);
  for (; row < e.rows; ++row) expand_rows<1>(e, row, begin, end);
}

}  // namespace

extern const DecoderKernels decoder_kernels{product, expand, rotate_row, gated_row};

}  // namespace RK_ISA
}  // namespace rainkernels
