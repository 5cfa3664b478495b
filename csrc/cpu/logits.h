// What the driver of the logits family and its per-ISA kernels share on the CPU.
#pragma once

#include <cstdint>

#include "rainkernels/logits.h"

namespace rainkernels {

struct MixFault {
  MixRule rule;
  int row;
};

MixFault mix_sample(const MixParams& p);
void rank_tokens(const RankParams& p);

// How one row is mixed and what is summed on the way.
struct RowPlan {
  int count;  // models of weight != 0
  int model[kMaxModels];
  float weight[kMaxModels];
  bool differences;  // weights sum to one: differences to the first model
  bool masses;       // sum the tempered masses as well as the mixture's
  float scale;       // log2(e) / temperature
  bool plausible;    // keep ids whose plausibility-model logit is within `limit` of `top`
  float top, limit;
};

// Sums of one tile about its own shift, so that nothing cancels: see csrc/cpu/logits_tiles.h.
// Shifts of the mixture and of every model, their sums, then entropy, kl_mix [models], kl_ref [models].
static constexpr int stat_floats(int models) {
  return 2 * (models + 1) + 1 + 2 * models;
}

struct RankTile {
  float shift_base, sum_base, shift_aligned, sum_aligned, kl, above;
};

// A row's scratch. Scores past the vocabulary are -inf up to a whole tile.
struct RowScratch {
  float* score;      // [tiles * kLogitsTile] mixed logits, after bias and plausibility
  float* group_max;  // [tiles * 64] lane maxima of each block
  float* tile_max;   // [tiles] of `score`
  float* mix_shift;  // [tiles] largest mixed logit before bias; -inf: nothing there
  float* mix_sum;    // [tiles] sum of exp(z - mix_shift)
  float* mass_sum;   // [tiles] sum of exp2((score - tile_max) * scale)
  float* model_max;  // [tiles] of the plausibility model; +inf where it holds NaN
  float* stats;      // [tiles * stat_floats]
  float* value;      // [tiles * kLogitsTile] candidates in id order
  float* mass;       // [tiles * kLogitsTile]
  float* spare;      // [2 * tiles * kLogitsTile]
  int32_t* id;       // [tiles * kLogitsTile]
  RankTile* ranks;   // [tiles], in place of `stats`
};

struct LogitsKernels {
  // Mixes tiles [begin, end) of a row into the scratch; false where the row is invalid.
  bool (*mix)(const MixParams& p, int row, const RowPlan& plan, const RowScratch& to, int begin, int end);
  void (*model_max)(const MixParams& p, int row, int model, float* tile_max, int begin, int end);
  // The mixed logit of one id.
  float (*mixed)(const MixParams& p, int row, const RowPlan& plan, int id);
  // to[i] = exp2((from[i] - top) * scale)
  void (*masses)(const float* from, int n, float top, float scale, float* to);
  // Ids of [0, tiles * kLogitsTile) with score >= least and (score - top) * scale >= limit, in id order; their number.
  int (*gather)(const RowScratch& s, int tiles, float least, float top, float scale, float limit);
  void (*rank)(const RankParams& p, int row, int token, RankTile* to, int begin, int end);
};

namespace baseline {
extern const LogitsKernels logits_kernels;
}
namespace avx2 {
extern const LogitsKernels logits_kernels;
}
namespace avx512 {
extern const LogitsKernels logits_kernels;
}

}  // namespace rainkernels
