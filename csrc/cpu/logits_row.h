// One row of mix_sample: what its parameters ask for, the draw, the statistics. The passes over the vocabulary are in
// cpu/logits_kernels.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/logits.h"
#include "cpu/logits_filter.h"
#include "cpu/logits_sums.h"

namespace rainkernels {

constexpr double kLog2eDouble = 1.4426950408889634074;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

const LogitsKernels& logits_kernels();

class MixRow {
 public:
  MixRow(const MixParams& p, int row, const RowScratch& s) : p_(p), s_(s), row_(row), tiles_(tiles_of(p.vocab)) {
    const float* weights = p.weights + static_cast<int64_t>(row) * p.num_models;
    float total = 0;
    for (int i = 0; i < p.num_models; ++i) {
      if (weights[i] == 0) continue;
      total += weights[i];
      plan_.model[plan_.count] = i;
      plan_.weight[plan_.count++] = weights[i];
    }
    plan_.differences = total == 1.0f;
    const float t = p.temperature[row];
    greedy_ = t == 0;
    plan_.scale = greedy_ ? 0 : static_cast<float>(std::min(kLog2eDouble / t, 3e38));
    k_ = p.top_k != nullptr && p.top_k[row] < p.vocab ? p.top_k[row] : 0;
    top_p_ = p.top_p != nullptr ? p.top_p[row] : 1;
    const float min_p = p.min_p != nullptr ? p.min_p[row] : 0;
    limit_ = min_p > 0 ? static_cast<float>(std::log2(static_cast<double>(min_p))) : kMinusInf;
    filtered_ = k_ > 0 || top_p_ < 1 || min_p > 0;
    const bool k_first = p.order == FilterOrder::k_p_min && k_ > 0;
    const bool others_first = p.order == FilterOrder::min_k_p && (k_ > 0 || min_p > 0);
    whole_ = top_p_ < 1 && !k_first && !others_first;
    plan_.masses = !greedy_ && (whole_ || !filtered_);
    const float alpha = p.plausibility != nullptr ? p.plausibility[row] : 0;
    plan_.plausible = alpha > 0;
    if (plan_.plausible) plan_.limit = static_cast<float>(std::log(static_cast<double>(alpha)));
  }

  bool needs_model_max() const { return plan_.plausible; }
  void model_max(int begin, int end) const {
    logits_kernels().model_max(p_, row_, p_.plausibility_model, s_.model_max, begin, end);
  }
  // After model_max of all tiles. False: the row is invalid.
  bool set_top() {
    if (plan_.plausible) plan_.top = *std::max_element(s_.model_max, s_.model_max + tiles_);
    return plan_.count > 0 && (!plan_.plausible || std::isfinite(plan_.top));
  }
  bool mix(int begin, int end) const { return logits_kernels().mix(p_, row_, plan_, s_, begin, end); }

  // After mix of all tiles.
  void finish(bool valid) {
    top_ = valid ? *std::max_element(s_.tile_max, s_.tile_max + tiles_) : kMinusInf;
    if (!(top_ > kMinusInf)) return give_up();
    int token;
    double prob = 1;
    if (greedy_)
      token = first_best();
    else if (filtered_)
      token = draw_filtered(&prob);
    else
      token = draw_whole(&prob);
    p_.token[row_] = token;
    p_.prob[row_] = static_cast<float>(prob);
    const LogSum mix = join(s_.mix_shift, s_.mix_sum, tiles_, 1);
    const double z = logits_kernels().mixed(p_, row_, plan_, token);
    p_.logprob[row_] = static_cast<float>((z - mix.top) - std::log(mix.total));
    if (p_.entropy != nullptr) statistics(token, mix);
  }

 private:
  void give_up() const {
    p_.token[row_] = -1;
    p_.prob[row_] = p_.logprob[row_] = kNan;
    if (p_.entropy == nullptr) return;
    p_.lse_mix[row_] = p_.log_z[row_] = p_.entropy[row_] = kNan;
    for (float* out : {p_.logprob_models, p_.lse_models, p_.kl_mix, p_.kl_ref})
      std::fill_n(out + static_cast<int64_t>(row_) * p_.num_models, p_.num_models, kNan);
  }

  double uniform() const {
    const int64_t* at = p_.position + static_cast<int64_t>(row_) * p_.position_words;
    const int64_t high = p_.position_words == 2 ? at[1] : 0;
    return philox_uniform(static_cast<uint64_t>(p_.seed[row_]), static_cast<uint64_t>(at[0]),
                          static_cast<uint64_t>(high));
  }

  int first_best() const {
    int t = 0;
    while (s_.tile_max[t] != top_) ++t;
    int id = t * kLogitsTile;
    while (s_.score[id] != top_) ++id;
    return id;
  }

  double tile_factor(int t) const {
    if (!(s_.mass_sum[t] > 0)) return 0;
    return std::exp2((static_cast<double>(s_.tile_max[t]) - top_) * plan_.scale);
  }

  double whole_mass() const {
    double total = 0;
    for (int t = 0; t < tiles_; ++t) total += s_.mass_sum[t] * tile_factor(t);
    return total;
  }

  int draw_whole(double* prob) const {
    const double total = whole_mass(), target = uniform() * total;
    double running = 0, before = 0;
    int chosen = 0;
    for (int t = 0; t < tiles_; ++t) {
      const double mass = s_.mass_sum[t] * tile_factor(t);
      if (!(mass > 0)) continue;
      chosen = t;
      before = running;
      running += mass;
      if (running > target) break;
    }
    const double factor = tile_factor(chosen);
    const int from = chosen * kLogitsTile;
    logits_kernels().masses(s_.score + from, kLogitsTile, s_.tile_max[chosen], plan_.scale, s_.mass);
    running = before;
    int last = 0;
    for (int i = 0; i < kLogitsTile; ++i) {
      if (!(s_.mass[i] > 0)) continue;
      last = i;
      running += s_.mass[i] * factor;
      if (running > target) break;
    }
    *prob = s_.mass[last] * factor / total;
    return from + last;
  }

  int draw_filtered(double* prob) const {
    const bool p_on = top_p_ < 1;
    const double total = whole_ ? whole_mass() : 0;
    float least = kMinusInf, limit = limit_;
    if (k_ > 0) least = score_of_count(s_, tiles_, k_, s_.spare);
    // Top-p between the two others: min-p must not take anything from what it sums over.
    const bool limit_last = p_.order == FilterOrder::k_p_min && k_ > 0 && p_on;
    if (limit_last) limit = kMinusInf;
    if (whole_) {
      // All tokens this far down hold less than what top-p may drop.
      const double dropped = (1.0 - top_p_) * total / p_.vocab;
      limit = std::max(limit, static_cast<float>(std::log2(dropped) - 0.01));
      limit = std::min(limit, 0.0f);
    }
    Candidates kept(s_, logits_kernels().gather(s_, tiles_, least, top_, plan_.scale, limit));
    if (k_ > 0) kept.keep_count(k_);
    logits_kernels().masses(s_.value, kept.size(), top_, plan_.scale, s_.mass);
    if (p_on) kept.keep_mass(top_p_ * (whole_ ? total : kept.total()), top_);
    if (limit_last) kept.keep_lowered(top_, plan_.scale, limit_);
    const double sum = kept.total();
    const int at = kept.walk(uniform() * sum);
    *prob = s_.mass[at] / sum;
    return s_.id[at];
  }

  void statistics(int token, const LogSum& mix) const {
    const int models = p_.num_models, stride = stat_floats(models);
    const float *shift = s_.stats, *sum = shift + models + 1, *entropy = sum + models + 1;
    const float *kl_mix = entropy + 1, *kl_ref = kl_mix + models;
    const int64_t at = static_cast<int64_t>(row_) * models;
    double expected = 0, log_z = mix.lse();
    for (int t = 0; t < tiles_; ++t) {
      const int64_t i = static_cast<int64_t>(t) * stride;
      const double factor = sum[i] > 0 ? std::exp(shift[i] - mix.top) : 0.0;
      if (factor > 0) expected += factor * (entropy[i] + static_cast<double>(sum[i]) * (shift[i] - mix.top));
    }
    p_.lse_mix[row_] = static_cast<float>(mix.lse());
    p_.entropy[row_] = static_cast<float>(std::log(mix.total) - expected / mix.total);
    LogSum first{};
    bool first_proper = true;
    for (int i = 0; i < models; ++i) {
      const LogSum own = join(shift + 1 + i, sum + 1 + i, tiles_, stride);
      bool proper = own.total > 0;
      for (int t = 0; t < tiles_; ++t)
        proper = proper && std::isfinite(shift[static_cast<int64_t>(t) * stride + 1 + i]);
      if (i == 0) first = own;
      if (i == 0) first_proper = proper;
      p_.kl_ref[at + i] = i == 0 ? 0.0f : kNan;
      p_.logprob_models[at + i] = p_.lse_models[at + i] = p_.kl_mix[at + i] = kNan;
      if (!proper) continue;
      const double h = logit_at(p_.logits[i], row_ * p_.row_stride[i] + token, p_.dtype);
      p_.lse_models[at + i] = static_cast<float>(own.lse());
      p_.logprob_models[at + i] = static_cast<float>((h - own.top) - std::log(own.total));
      p_.kl_mix[at + i] =
          static_cast<float>(divergence(kl_mix + i, shift, sum, mix, shift + 1 + i, own, tiles_, stride));
      if (i > 0 && first_proper) {
        p_.kl_ref[at + i] = static_cast<float>(
            divergence(kl_ref + i, shift + 1 + i, sum + 1 + i, own, shift + 1, first, tiles_, stride));
      }
      if (p_.weights[at + i] != 0) log_z -= static_cast<double>(p_.weights[at + i]) * own.lse();
    }
    p_.log_z[row_] = static_cast<float>(log_z);
  }

  const MixParams& p_;
  const RowScratch& s_;
  const int row_, tiles_;
  RowPlan plan_{};
  int64_t k_;
  float top_p_, limit_, top_ = 0;
  bool greedy_, filtered_, whole_;
};

}  // namespace rainkernels
