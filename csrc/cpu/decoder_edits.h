// The sums and norms between the products of a decoder step, with the edits and captures of hidden states there.
#pragma once

#include "cpu/decoder.h"

namespace rainkernels {

// Rows that a product has just made, the residual they are added to, and the norm's output.
struct NormRows {
  float *x, *residual, *normed;  // [rows, hidden]
  int64_t rows;
  int hidden, threads;
};

// The first slot outside its table, else the first captured row that the step does not have.
StepFault check_edits(const DecoderStack& stack, const DecoderStep& step);

// residual += x; normed = its norm
void add_norm(const NormRows& rows, const RmsNorm& norm);

// The same behind the attention (attn_out) or the mlp (mlp_out, with block_out once it is summed) of a block.
void add_norm_at(const DecoderStack& stack, const DecoderStep& step, int layer, StackTap tap, const NormRows& rows,
                 const RmsNorm& norm);

}  // namespace rainkernels
