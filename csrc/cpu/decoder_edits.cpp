// Edits and captures of a decoder step: the last table of a place runs inside the residual add and norm behind it,
// those before it in place. Both give a row the same bits.   Reference: rainkernels/reference/decoder.py
#include "cpu/decoder_edits.h"

#include <algorithm>
#include <cstring>

#include "cpu/edits.h"

namespace rainkernels {
namespace {

// Elements read and written below which waking a second thread costs more than it saves.
constexpr int64_t kSerialWork = 1 << 16;

EditParams params_of(const NormRows& rows) {
  EditParams p{};
  p.x = rows.x;
  p.x_stride = p.residual_stride = p.out_stride = rows.hidden;
  p.dtype = p.weight_dtype = Dtype::f32;
  p.rows = rows.rows;
  p.hidden = rows.hidden;
  p.num_threads = rows.threads;
  return p;
}

EditParams norm_params(const NormRows& rows, const RmsNorm& norm) {
  EditParams p = params_of(rows);
  p.residual = rows.residual;
  p.out = rows.normed;
  p.weight = norm.weight;
  p.fused = true;
  p.eps = norm.eps;
  p.tap = EditTap::mlp_out;
  p.cast = NormCast::llama;
  return p;
}

// The sites of one place, in the order they were given.
struct Sites {
  const DecoderStack& stack;
  const DecoderStep& step;
  const std::vector<int>* at;  // null: none

  Sites(const DecoderStack& stack, const DecoderStep& step, int layer, StackTap tap)
      : stack(stack), step(step), at(nullptr) {
    if (step.edit_slots != nullptr && !stack.sites.empty()) at = &stack.sites_at[layer][static_cast<int>(tap)];
  }
  size_t size() const { return at == nullptr ? 0 : at->size(); }
  void hand_to(EditParams& p, size_t i) const {
    const EditSite& site = stack.sites[(*at)[i]];
    p.table = site.table;
    p.slots = step.edit_slots + int64_t{site.column} * step.rows;
  }
  // The first n, on rows.x.
  void run(const NormRows& rows, size_t n) const {
    for (size_t i = 0; i < n; ++i) {
      EditParams p = params_of(rows);
      hand_to(p, i);
      edits(p);
    }
  }
};

// Copies the captured rows of one place; it is x, or what x and another sum up to.
void capture(const DecoderStep& step, int layer, StackTap tap, int hidden, const float* x, const float* other) {
  for (int c = 0; c < step.num_captures; ++c) {
    const StepCapture& wanted = step.captures[c];
    if (wanted.layer != layer || wanted.tap != tap) continue;
    for (int64_t i = 0; i < wanted.num_rows; ++i) {
      float* const to = wanted.out + i * hidden;
      const float* const from = x + wanted.rows[i] * hidden;
      if (other == nullptr) {
        std::memcpy(to, from, sizeof(float) * hidden);
      } else {
        const float* const added = other + wanted.rows[i] * hidden;
        for (int j = 0; j < hidden; ++j) to[j] = added[j] + from[j];
      }
    }
  }
}

// x becomes the sum, and the residual what leaves every number as it is when x is added, -0 too.
void sum_into_x(const NormRows& rows) {
  const int64_t n = rows.rows * rows.hidden;
  float *const x = rows.x, *const residual = rows.residual;
#pragma omp parallel for schedule(static) num_threads(rows.threads) if (n > kSerialWork)
  for (int64_t i = 0; i < n; ++i) x[i] = residual[i] + x[i];
  std::fill_n(residual, n, -0.0f);
}

}  // namespace

StepFault check_edits(const DecoderStack& stack, const DecoderStep& step) {
  for (size_t s = 0; step.edit_slots != nullptr && s < stack.sites.size(); ++s) {
    const EditSite& site = stack.sites[s];
    const int32_t* const slots = step.edit_slots + int64_t{site.column} * step.rows;
    for (int r = 0; r < step.rows; ++r)
      if (slots[r] < 0 || slots[r] >= site.table.num_slots) return {StepRule::edit_slot, r, static_cast<int64_t>(s)};
  }
  for (int c = 0; c < step.num_captures; ++c)
    for (int64_t i = 0; i < step.captures[c].num_rows; ++i)
      if (step.captures[c].rows[i] < 0 || step.captures[c].rows[i] >= step.rows) return {StepRule::capture_row, i, c};
  return {StepRule::ok, 0, 0};
}

void add_norm(const NormRows& rows, const RmsNorm& norm) {
  edits(norm_params(rows, norm));
}

void add_norm_at(const DecoderStack& stack, const DecoderStep& step, int layer, StackTap tap, const NormRows& rows,
                 const RmsNorm& norm) {
  const Sites made(stack, step, layer, tap);
  Sites summed(stack, step, layer, StackTap::block_out);
  if (tap != StackTap::mlp_out) summed.at = nullptr;
  EditParams p = norm_params(rows, norm);
  capture(step, layer, tap, rows.hidden, rows.x, nullptr);
  if (summed.size() == 0) {
    if (made.size() > 0) {
      made.run(rows, made.size() - 1);
      made.hand_to(p, made.size() - 1);
    }
    edits(p);
    if (tap == StackTap::mlp_out) capture(step, layer, StackTap::block_out, rows.hidden, rows.residual, nullptr);
    return;
  }
  made.run(rows, made.size());
  capture(step, layer, StackTap::block_out, rows.hidden, rows.x, rows.residual);
  if (summed.size() > 1) {
    sum_into_x(rows);
    summed.run(rows, summed.size() - 1);
  }
  summed.hand_to(p, summed.size() - 1);
  p.tap = EditTap::block_out;
  edits(p);
}

}  // namespace rainkernels
