// mix_sample and rank on the CPU: rows over the threads, or the tiles of one row when rows are few.
// Reference: rainkernels/reference/logits.py
//
// One pass mixes a row into a scratch that stays in the cache and sums it; filters then look only at blocks whose
// largest score can survive. Sums of tiles are added in id order in double, so neither the batch nor the threads show
// in a row's bits.
#include "cpu/logits.h"

#include <omp.h>

#include <atomic>
#include <memory>

#include "cpu/isa.h"
#include "cpu/logits_row.h"

namespace rainkernels {
namespace {

// Logits below which waking a second thread costs more than it saves.
constexpr int64_t kSerialLogits = 32768;

// Memory of a calling thread for `rows` rows at a time; grows to the largest call and stays.
class Scratch {
 public:
  void reserve(int rows, int tiles, int models) {
    const int64_t width = int64_t{tiles} * kLogitsTile;
    row_floats_ = 6 * width + int64_t{tiles} * (kLogitsTile / 16 + 5 + stat_floats(models)) + 64;
    const int64_t wanted = rows * row_floats_;
    // Not touched here: candidates seldom need their whole room.
    if (wanted > size_) {
      memory_.reset();
      memory_.reset(new float[wanted]);
      size_ = wanted;
    }
    tiles_ = tiles;
    models_ = models;
  }
  RowScratch row(int i) const {
    const int64_t width = int64_t{tiles_} * kLogitsTile;
    float* at = memory_.get() + i * row_floats_;
    const auto take = [&at](int64_t n) {
      float* const mine = at;
      at += n;
      return mine;
    };
    RowScratch s{};
    s.score = take(width);
    s.group_max = take(int64_t{tiles_} * (kLogitsTile / 16));
    s.tile_max = take(tiles_);
    s.mix_shift = take(tiles_);
    s.mix_sum = take(tiles_);
    s.mass_sum = take(tiles_);
    s.model_max = take(tiles_);
    s.stats = take(int64_t{tiles_} * stat_floats(models_));
    s.value = take(width);
    s.mass = take(width);
    s.spare = take(2 * width);
    s.id = reinterpret_cast<int32_t*>(take(width));
    s.ranks = reinterpret_cast<RankTile*>(s.stats);
    return s;
  }

 private:
  std::unique_ptr<float[]> memory_;
  int64_t size_ = 0, row_floats_ = 0;
  int tiles_ = 0, models_ = 0;
};

Scratch& scratch() {
  static thread_local Scratch mine;
  return mine;
}

MixFault find_fault(const MixParams& p) {
  const auto first = [&p](MixRule rule, const auto* values, int64_t each, auto fine) -> MixFault {
    if (values == nullptr) return {MixRule::none, -1};
    for (int64_t i = 0; i < p.rows * each; ++i)
      if (!fine(values[i])) return {rule, static_cast<int>(i / each)};
    return {MixRule::none, -1};
  };
  const auto share = [](float x) { return x >= 0 && x <= 1; };
  const auto positive_share = [](float x) { return x > 0 && x <= 1; };
  const MixFault found[] = {
      first(MixRule::weights, p.weights, p.num_models, [](float x) { return std::isfinite(x); }),
      first(MixRule::temperature, p.temperature, 1, [](float x) { return x >= 0 && std::isfinite(x); }),
      first(MixRule::top_k, p.top_k, 1, [](int32_t x) { return x >= 0; }),
      first(MixRule::top_p, p.top_p, 1, positive_share),
      first(MixRule::min_p, p.min_p, 1, share),
      first(MixRule::plausibility, p.plausibility, 1, share),
  };
  for (const MixFault& f : found)
    if (f.rule != MixRule::none) return f;
  return {MixRule::none, -1};
}

void run_row(const MixParams& p, int row, const RowScratch& s) {
  const int tiles = tiles_of(p.vocab);
  MixRow work(p, row, s);
  if (work.needs_model_max()) work.model_max(0, tiles);
  work.finish(work.set_top() && work.mix(0, tiles));
}

// A few rows: all threads share the tiles of one row after the other.
void run_tiles(const MixParams& p, int row, const RowScratch& s, int threads) {
  const int tiles = tiles_of(p.vocab), parts = std::min(tiles, 4 * threads);
  MixRow work(p, row, s);
  const auto each = [&](auto&& one) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int i = 0; i < parts; ++i)
      one(static_cast<int>(int64_t{tiles} * i / parts), static_cast<int>(int64_t{tiles} * (i + 1) / parts));
  };
  if (work.needs_model_max()) each([&](int begin, int end) { work.model_max(begin, end); });
  std::atomic<bool> valid{work.set_top()};
  if (valid) {
    each([&](int begin, int end) {
      if (!work.mix(begin, end)) valid = false;
    });
  }
  work.finish(valid);
}

// One row's tiles as (shift, sum) of both models and the sums of rank and divergence.
void rank_row(const RankParams& p, int row, RankTile* part, int tiles) {
  const int64_t id =
      p.token_bytes == 8 ? static_cast<const int64_t*>(p.token)[row] : static_cast<const int32_t*>(p.token)[row];
  p.rank[row] = 0;
  p.kl[row] = p.logprob_base[row] = p.logprob_aligned[row] = kNan;
  if (id < 0 || id >= p.vocab) return;
  logits_kernels().rank(p, row, static_cast<int>(id), part, 0, tiles);
  constexpr int kStride = sizeof(RankTile) / sizeof(float);
  const LogSum base = join(&part->shift_base, &part->sum_base, tiles, kStride);
  const LogSum aligned = join(&part->shift_aligned, &part->sum_aligned, tiles, kStride);
  double above = 0;
  bool proper = base.total > 0 && aligned.total > 0;
  for (int t = 0; t < tiles; ++t) {
    above += part[t].above;
    proper = proper && std::isfinite(part[t].shift_base) && std::isfinite(part[t].shift_aligned);
  }
  if (!proper) return;
  p.rank[row] = static_cast<int32_t>(above) + 1;
  p.kl[row] = static_cast<float>(divergence(&part->kl, &part->shift_aligned, &part->sum_aligned, aligned,
                                            &part->shift_base, base, tiles, kStride));
  const double own_base = logit_at(p.base, row * p.base_stride + id, p.dtype);
  const double own_aligned = logit_at(p.aligned, row * p.aligned_stride + id, p.dtype);
  p.logprob_base[row] = static_cast<float>((own_base - base.top) - std::log(base.total));
  p.logprob_aligned[row] = static_cast<float>((own_aligned - aligned.top) - std::log(aligned.total));
}

}  // namespace

const LogitsKernels& logits_kernels() {
#if defined(RK_HAS_X86_ISAS)
  switch (detected_isa()) {
    case Isa::avx512:
      return avx512::logits_kernels;
    case Isa::avx2:
      return avx2::logits_kernels;
    default:
      break;
  }
#endif
  return baseline::logits_kernels;
}

MixFault mix_sample(const MixParams& p) {
  const MixFault fault = find_fault(p);
  if (fault.rule != MixRule::none || p.rows == 0) return fault;
  const int tiles = tiles_of(p.vocab);
  const int64_t work = int64_t{p.rows} * p.vocab * p.num_models;
  const int threads = work < kSerialLogits ? 1 : p.num_threads;
  Scratch& mine = scratch();
  if (threads == 1 || (p.rows % threads != 0 && p.rows < 4 * threads)) {
    mine.reserve(1, tiles, p.num_models);
    const RowScratch s = mine.row(0);
    for (int r = 0; r < p.rows; ++r) {
      if (threads == 1)
        run_row(p, r, s);
      else
        run_tiles(p, r, s, threads);
    }
    return fault;
  }
  mine.reserve(threads, tiles, p.num_models);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int r = 0; r < p.rows; ++r) {
    const RowScratch s = mine.row(omp_get_thread_num());
    run_row(p, r, s);
  }
  return fault;
}

void rank_tokens(const RankParams& p) {
  const int tiles = tiles_of(p.vocab);
  const int threads = int64_t{p.rows} * p.vocab < kSerialLogits ? 1 : p.num_threads;
  Scratch& mine = scratch();
  mine.reserve(threads, tiles, 2);
  if (threads == 1) {
    for (int r = 0; r < p.rows; ++r) rank_row(p, r, mine.row(0).ranks, tiles);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int r = 0; r < p.rows; ++r) rank_row(p, r, mine.row(omp_get_thread_num()).ranks, tiles);
}

}  // namespace rainkernels
