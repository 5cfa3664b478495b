// The two register tiles of attention: row-heads x keys for the scores, row-heads x values for P.V. A tile's shape does
// not touch the order in which one score or one output element is summed.
#pragma once

#include "cpu/simd.h"

namespace rainkernels {
namespace RK_ISA {
namespace {

#if defined(RK_ISA_avx512)
constexpr int kVectors = 4;  // 6 x 4 accumulators, 4 keys or values, 1 broadcast: 29 of 32 registers
#else
constexpr int kVectors = 1;
#endif
constexpr int kRows = 6;

using ScoreTile = void (*)(const float* q, int ldq, const float* keys, int dim, float* scores);
using ValueTile = void (*)(const float* p, const float* values, int64_t ldv, int num_keys, float* acc, int ldacc);

template <int R, int V>
void score_tile(const float* q, int ldq, const float* keys, int dim, float* scores) {
  F16 acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
  for (int d = 0; d < dim; ++d) {
    F16 k[V];
    for (int v = 0; v < V; ++v) k[v] = load(keys + d * kKeyTile + 16 * v);
    for (int r = 0; r < R; ++r) {
      const F16 x = splat(q[r * ldq + d]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(x, k[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(scores + r * kScoreStride + 16 * v, acc[r][v]);
}

template <int R, int V>
void value_tile(const float* p, const float* values, int64_t ldv, int num_keys, float* acc_at, int ldacc) {
  F16 acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = load(acc_at + r * ldacc + 16 * v);
  for (int j = 0; j < num_keys; ++j) {
    F16 x[V];
    for (int v = 0; v < V; ++v) x[v] = load(values + j * ldv + 16 * v);
    for (int r = 0; r < R; ++r) {
      const F16 w = splat(p[r * kScoreStride + j]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(w, x[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(acc_at + r * ldacc + 16 * v, acc[r][v]);
}

#if defined(RK_ISA_avx512)
#define RK_TILES(f, R) {f<R, 1>, f<R, 2>, f<R, 3>, f<R, 4>}
#else
#define RK_TILES(f, R) {f<R, 1>}
#endif
const ScoreTile kScoreTiles[kRows][kVectors] = {RK_TILES(score_tile, 1), RK_TILES(score_tile, 2),
                                                RK_TILES(score_tile, 3), RK_TILES(score_tile, 4),
                                                RK_TILES(score_tile, 5), RK_TILES(score_tile, 6)};
const ValueTile kValueTiles[kRows][kVectors] = {RK_TILES(value_tile, 1), RK_TILES(value_tile, 2),
                                                RK_TILES(value_tile, 3), RK_TILES(value_tile, 4),
                                                RK_TILES(value_tile, 5), RK_TILES(value_tile, 6)};
#undef RK_TILES

}  // namespace
}  // namespace RK_ISA
}  // namespace rainkernels
