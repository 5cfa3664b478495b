// edits on the CPU: residual add, edit and RMSNorm of a few rows.   Reference: rainkernels/reference/edits.py
// Compiled once per instruction set. An edited row is read twice: once for its components along the directions, once to
// be changed; the rows of a block share every load of a direction. Each pass begins where the one before it ended, at
// what the first cache still holds: components and norm go from the last column to the first. Sums have one shape for
// all of this: a component is one chain of sixteen lanes over the row, a sum of squares two (even and odd vectors), so
// neither the block, the thread nor the instruction set enters a row's bits.
#include "cpu/edits.h"
#include "cpu/simd_math.h"

namespace rainkernels {
namespace RK_ISA {
namespace {

// Rows and directions whose running sums fit the registers.
#if defined(RK_ISA_avx512)
constexpr int kRows = 4, kGroup = 4;
#elif defined(RK_ISA_avx2)
constexpr int kRows = 2, kGroup = 2;
#else
constexpr int kRows = 1, kGroup = 1;
#endif
constexpr int kStep = 32;  // two vectors

enum class Form { in_place, mlp_out, block_out };

template <bool Whole, class T>
RK_ALWAYS inline F16 take(const T* p, int n) {
  if (Whole) return load16(p);
  return load_some(p, n);
}

template <bool Whole, class T>
RK_ALWAYS inline void keep(T* p, F16 a, int n) {
  if (Whole)
    store16(p, a);
  else
    store_some(p, a, n);
}

template <class T>
RK_ALWAYS inline F16 rounded(F16 a) {
  T piece[16];
  store16(piece, a);
  return load16(piece);
}

template <class T>
RK_ALWAYS inline T* row_of(void* base, int64_t stride, int32_t row) {
  return static_cast<T*>(base) + stride * row;
}

// The rows of a block: h is x, or residual + x where the whole block's output is edited.
template <class T, Form F, int R>
struct Rows {
  T *x[R], *residual[R], *out[R];

  RK_ALWAYS Rows(const EditParams& p, const int32_t* rows) {
    for (int r = 0; r < R; ++r) {
      x[r] = row_of<T>(p.x, p.x_stride, rows[r]);
      residual[r] = F == Form::in_place ? nullptr : row_of<T>(p.residual, p.residual_stride, rows[r]);
      out[r] = F == Form::in_place ? nullptr : row_of<T>(p.out, p.out_stride, rows[r]);
    }
  }
  RK_ALWAYS Rows(T* x0, T* residual0, T* out0) : x{x0}, residual{residual0}, out{out0} {}
  RK_ALWAYS Rows<T, F, 1> one(int r) const { return Rows<T, F, 1>(x[r], residual[r], out[r]); }
  template <bool Whole>
  RK_ALWAYS F16 edited_part(int r, int i, int n) const {
    const F16 h = take<Whole>(x[r] + i, n);
    return F == Form::block_out ? add(take<Whole>(residual[r] + i, n), h) : h;
  }
};

// What lies beyond the last whole vector: out of line, one row at a time, so that no specialisation repeats it.
template <class T, class U, Form F>
RK_OUT_OF_LINE F16 component_tail(const Rows<T, F, 1>& row, const U* u, int i, int n, F16 total) {
  return fma(row.template edited_part<false>(0, i, n), load_some(u + i, n), total);
}

// Components of R rows along J directions, one chain of sixteen lanes each.
template <class T, class U, Form F, int R, int J>
void components(const EditParams& p, const Rows<T, F, R>& rows, const U* directions, float (*c)[kMaxDirections],
                int at) {
  F16 total[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) total[r][j] = zero();
  const int d = p.hidden, whole = d / 16 * 16;
  if (whole < d) {
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < J; ++j)
        total[r][j] = component_tail<T, U, F>(rows.one(r), directions + int64_t{j} * d, whole, d - whole, total[r][j]);
  }
  for (int i = whole - 16; i >= 0; i -= 16) {
    F16 h[R];
    for (int r = 0; r < R; ++r) h[r] = rows.template edited_part<true>(r, i, 16);
    for (int j = 0; j < J; ++j) {
      const F16 u = load16(directions + int64_t{j} * d + i);
      for (int r = 0; r < R; ++r) total[r][j] = fma(h[r], u, total[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) c[r][at + j] = sum(total[r][j]);
}

// From raw sums to the factors of the stored directions.
void solve(const EditTableView& t, int slot, int k, float* c) {
  const int64_t at = int64_t{slot} * t.max_directions;
  const float* const scale = t.scale + slot * t.scale_step;
  float b[kMaxDirections];
  for (int j = 0; j < k; ++j) {
    float component = c[j] * scale[j];
    if (t.gram != nullptr) {
      const float* const row = t.gram + (at + j) * t.max_directions;
      for (int i = 0; i < j; ++i) component += b[i] * row[i];
    }
    const float bent = t.op[at + j] == static_cast<int>(EditOp::tanh) ? tanh_one(component) : 0.0f;
    b[j] = edit_coefficient(t.op[at + j], component, t.alpha[at + j], t.target[at + j], bent);
  }
  for (int j = 0; j < k; ++j) c[j] = b[j] * scale[j];
}

// h + sum of b_j u_j, two vectors of R rows; K directions, or k of them when K is 0. The sum of the steps is rounded
// on its own, so that a large h costs one rounding and not one per direction.
template <class T, class U, Form F, int R, int K, bool Whole>
RK_ALWAYS inline void changed(const EditParams& p, const Rows<T, F, R>& rows, const U* directions,
                              const float (*b)[kMaxDirections], int k, int i, F16 (*h)[2]) {
  const int n = p.hidden - i;
  for (int r = 0; r < R; ++r) h[r][0] = h[r][1] = zero();
  for (int j = 0; j < (K > 0 ? K : k); ++j) {
    const U* const u = directions + int64_t{j} * p.hidden + i;
    const F16 u0 = take<Whole>(u, n), u1 = take<Whole>(u + 16, n - 16);
    for (int r = 0; r < R; ++r) {
      const F16 step = splat(b[r][j]);
      h[r][0] = fma(step, u0, h[r][0]);
      h[r][1] = fma(step, u1, h[r][1]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) h[r][v] = add(rows.template edited_part<Whole>(r, i + 16 * v, n - 16 * v), h[r][v]);
}

// Writes two vectors of R rows and adds up the squares of what was written.
template <class T, Form F, int R, bool Whole>
RK_ALWAYS inline void written(const Rows<T, F, R>& rows, int i, int n, F16 (*h)[2], F16 (*squares)[2]) {
  // All loads before the first store: rows whose distance is a multiple of 4096 bytes would wait for each other.
  if (F == Form::mlp_out) {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < 2; ++v) h[r][v] = add(take<Whole>(rows.residual[r] + i + 16 * v, n - 16 * v), h[r][v]);
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < 2; ++v) {
      const int left = n - 16 * v;
      if (!Whole && left <= 0) continue;
      keep<Whole>((F == Form::in_place ? rows.x[r] : rows.residual[r]) + i + 16 * v, h[r][v], left);
      if (F == Form::in_place) continue;
      const F16 y = rounded<T>(h[r][v]);
      squares[r][v] = fma(y, y, squares[r][v]);
    }
  }
}

template <class T, class U, Form F>
RK_OUT_OF_LINE void changed_tail(const EditParams& p, const Rows<T, F, 1>& row, const U* directions,
                                 const float (*b)[kMaxDirections], int k, int i, F16 (*h)[2]) {
  changed<T, U, F, 1, 0, false>(p, row, directions, b, k, i, h);
}

template <class T, Form F>
RK_OUT_OF_LINE void written_tail(const Rows<T, F, 1>& row, int i, int n, F16 (*h)[2], F16 (*squares)[2]) {
  written<T, F, 1, false>(row, i, n, h, squares);
}

// The next row's directions, where it has its own: this pass waits for the second cache, they for the last one.
template <class U>
RK_ALWAYS inline void fetch_columns(const U* directions, int k, int d, int i) {
  for (int j = 0; directions != nullptr && j < k; ++j) {
    __builtin_prefetch(directions + int64_t{j} * d + i, 0, 2);
    if (sizeof(U) == 4) __builtin_prefetch(directions + int64_t{j} * d + i + 16, 0, 2);
  }
}

// Two vectors of what normalise() is about to write: its stores would wait for lines that no cache of this core holds.
template <class T, Form F, int R>
RK_ALWAYS inline void fetch_out(const Rows<T, F, R>& rows, int i) {
  for (int r = 0; F != Form::in_place && r < R; ++r) {
    __builtin_prefetch(rows.out[r] + i, 1, 2);
    if (sizeof(T) == 4) __builtin_prefetch(rows.out[r] + i + 16, 1, 2);
  }
}

template <class T, class U, Form F, int R, int K>
void update(const EditParams& p, const Rows<T, F, R>& rows, const U* directions, const float (*b)[kMaxDirections],
            int k, const float* factor, float* total, const U* next) {
  const int d = p.hidden;
  F16 h[R][2], squares[R][2];
  for (int r = 0; r < R; ++r) squares[r][0] = squares[r][1] = zero();
  const auto rescale = [&] {
    if (factor == nullptr) return;
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < 2; ++v) h[r][v] = factor[r] == 1.0f ? h[r][v] : mul(h[r][v], splat(factor[r]));
  };
  int i = 0;
  for (; i + kStep <= d; i += kStep) {
    if (R == 1) fetch_columns(next, k, d, i);
    fetch_out(rows, i);
    changed<T, U, F, R, K, true>(p, rows, directions, b, k, i, h);
    rescale();
    written<T, F, R, true>(rows, i, d - i, h, squares);
  }
  if (i < d) {
    for (int r = 0; r < R; ++r) changed_tail<T, U, F>(p, rows.one(r), directions, b + r, k, i, h + r);
    rescale();
    for (int r = 0; r < R; ++r) written_tail<T, F>(rows.one(r), i, d - i, h + r, squares + r);
  }
  for (int r = 0; r < R; ++r) total[r] = sum(add(squares[r][0], squares[r][1]));
}

// What norm options multiply one row by: the row's squares before and after, without writing anything.
template <class T, class U, Form F>
float rescale_factor(const EditParams& p, const Rows<T, F, 1>& row, const U* directions,
                     const float (*b)[kMaxDirections], int k, int norm) {
  const int d = p.hidden;
  F16 h[1][2], old[2] = {zero(), zero()}, now[2] = {zero(), zero()};
  const auto add_up = [&](F16 before, int v) {
    old[v] = fma(before, before, old[v]);
    now[v] = fma(h[0][v], h[0][v], now[v]);
  };
  int i = 0;
  for (; i + kStep <= d; i += kStep) {
    changed<T, U, F, 1, 0, true>(p, row, directions, b, k, i, h);
    for (int v = 0; v < 2; ++v) add_up(row.template edited_part<true>(0, i + 16 * v, 16), v);
  }
  if (i < d) {
    changed_tail<T, U, F>(p, row, directions, b, k, i, h);
    for (int v = 0; v < 2; ++v) add_up(row.template edited_part<false>(0, i + 16 * v, d - i - 16 * v), v);
  }
  return edit_rescale(norm, sum(add(old[0], old[1])), sum(add(now[0], now[1])));
}

template <class T, class W>
void normalise(const EditParams& p, const T* from, T* to, float squares) {
  const int d = p.hidden;
  const F16 rstd = splat(1.0f / __builtin_sqrtf(squares / static_cast<float>(d) + p.eps));
  const F16 offset = splat(p.weight_offset);
  const bool shifted = p.weight_offset != 0.0f, late = p.cast == NormCast::gemma;
  const W* const weight = static_cast<const W*>(p.weight);
  const auto one = [&](F16 y, F16 w) {
    y = mul(y, rstd);
    if (!late) y = rounded<T>(y);
    return mul(shifted ? add(offset, w) : w, y);
  };
  const int whole = d / 16 * 16, left = d - whole;
  if (left > 0) store_some(to + whole, one(load_some(from + whole, left), load_some(weight + whole, left)), left);
  for (int i = whole - 16; i >= 0; i -= 16) store16(to + i, one(load16(from + i), load16(weight + i)));
}

template <class T>
void normalise(const EditParams& p, int32_t row, float squares) {
  const T* const from = row_of<const T>(p.residual, p.residual_stride, row);
  T* const to = row_of<T>(p.out, p.out_stride, row);
  if (p.weight_dtype == Dtype::f32)
    normalise<T, float>(p, from, to, squares);
  else
    normalise<T, T>(p, from, to, squares);
}

template <class T, class U, Form F, int R>
void edit_rows(const EditParams& p, const int32_t* index, const U* next = nullptr) {
  const EditTableView& t = p.table;
  const Rows<T, F, R> rows(p, index);
  const int slot = p.slots[index[0]];
  const U* const directions = static_cast<const U*>(t.directions) + slot * t.slot_step;
  const int k = directions_in_use(t, slot), d = p.hidden;
  float b[R][kMaxDirections], factor[R], squares[R];
  int j = 0;
  for (; j + kGroup <= k; j += kGroup) components<T, U, F, R, kGroup>(p, rows, directions + int64_t{j} * d, b, j);
  for (; j < k; ++j) components<T, U, F, R, 1>(p, rows, directions + int64_t{j} * d, b, j);
  bool rescaled = false;
  for (int r = 0; r < R; ++r) {
    const int mine = p.slots[index[r]], norm = t.norm[mine];
    solve(t, mine, k, b[r]);
    factor[r] = norm == 0 ? 1.0f : rescale_factor<T, U, F>(p, Rows<T, F, 1>(p, index + r), directions, b + r, k, norm);
    rescaled = rescaled || factor[r] != 1.0f;
  }
  const float* const factors = rescaled ? factor : nullptr;
  constexpr int kCommon = kRows > 1 ? 4 : 0;  // four directions, unrolled where registers hold them
  if (kCommon > 0 && k == kCommon)
    update<T, U, F, R, kCommon>(p, rows, directions, b, k, factors, squares, next);
  else
    update<T, U, F, R, 0>(p, rows, directions, b, k, factors, squares, next);
  if (F != Form::in_place)
    for (int r = 0; r < R; ++r) normalise<T>(p, index[r], squares[r]);
}

template <class T, class U, Form F>
void edit_block(const EditParams& p, const int32_t* rows, int n, int32_t next) {
  for (; n >= kRows; n -= kRows, rows += kRows) edit_rows<T, U, F, kRows>(p, rows);
  const EditTableView& t = p.table;
  const bool own = next >= 0 && p.slots[next] != p.slots[rows[0]];
  const U* const then = own ? static_cast<const U*>(t.directions) + p.slots[next] * t.slot_step : nullptr;
  for (; n > 0; --n, ++rows) edit_rows<T, U, F, 1>(p, rows, then);
}

template <class T, class U>
void edit_typed(const EditParams& p, const int32_t* rows, int n, int32_t next) {
  if (!p.fused)
    edit_block<T, U, Form::in_place>(p, rows, n, next);
  else if (p.tap == EditTap::mlp_out)
    edit_block<T, U, Form::mlp_out>(p, rows, n, next);
  else
    edit_block<T, U, Form::block_out>(p, rows, n, next);
}

template <class T>
void edit_table(const EditParams& p, const int32_t* rows, int n, int32_t next) {
  if (p.table.dtype == Dtype::f32)
    edit_typed<T, float>(p, rows, n, next);
  else if (p.table.dtype == Dtype::bf16)
    edit_typed<T, Bf16>(p, rows, n, next);
  else
    edit_typed<T, Half>(p, rows, n, next);
}

template <class T>
void plain_typed(const EditParams& p, const int32_t* index, int n) {
  const int d = p.hidden;
  for (int r = 0; r < n; ++r) {
    const Rows<T, Form::mlp_out, 1> row(p, index + r);
    F16 h[1][2], squares[1][2] = {{zero(), zero()}};
    int i = 0;
    for (; i + kStep <= d; i += kStep) {
      for (int v = 0; v < 2; ++v) h[0][v] = load16(row.x[0] + i + 16 * v);
      written<T, Form::mlp_out, 1, true>(row, i, d - i, h, squares);
    }
    if (i < d) {
      for (int v = 0; v < 2; ++v) h[0][v] = load_some(row.x[0] + i + 16 * v, d - i - 16 * v);
      written_tail<T, Form::mlp_out>(row, i, d - i, h, squares);
    }
    normalise<T>(p, index[r], sum(add(squares[0][0], squares[0][1])));
  }
}

void edited(const EditParams& p, const int32_t* rows, int n, int32_t next) {
  if (p.dtype == Dtype::f32)
    edit_table<float>(p, rows, n, next);
  else if (p.dtype == Dtype::bf16)
    edit_table<Bf16>(p, rows, n, next);
  else
    edit_table<Half>(p, rows, n, next);
}

void plain(const EditParams& p, const int32_t* rows, int n) {
  if (p.dtype == Dtype::f32)
    plain_typed<float>(p, rows, n);
  else if (p.dtype == Dtype::bf16)
    plain_typed<Bf16>(p, rows, n);
  else
    plain_typed<Half>(p, rows, n);
}

}  // namespace

extern const EditKernels edit_kernels{plain, edited};

}  // namespace RK_ISA
}  // namespace rainkernels
