"""`rank`: two passes, tiles and rows, over a base and an aligned model."""

from __future__ import annotations

import triton
import triton.language as tl

from rainkernels.triton.logits_mix import TILE, exp_shifted, finite_shift
from rainkernels.triton.logits_rows import combined, field, natural_log

# Fields of the workspace, one value per tile each.
R_ABOVE = tl.constexpr(0)  # tokens before the given one in the base model's order
R_BASE = tl.constexpr(1)  # largest logit of base; sum of exp follows
R_ALIGNED = tl.constexpr(3)  # largest logit of aligned; sum of exp follows
R_CROSS = tl.constexpr(5)  # sum of exp(aligned) * (aligned - base), shifted


@triton.jit
def rank_tiles_kernel(base, aligned, token, base_stride, aligned_stride, workspace, row_floats, pitch, vocab, tiles):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    ids = tile * TILE + tl.arange(0, TILE)
    inside = ids < vocab
    wanted = tl.load(token + row)
    own = tl.load(base + row * base_stride + tl.minimum(tl.maximum(wanted, 0), vocab - 1)).to(tl.float32)
    b = tl.load(base + row * base_stride + ids, mask=inside, other=-float("inf")).to(tl.float32)
    a = tl.load(aligned + row * aligned_stride + ids, mask=inside, other=-float("inf")).to(tl.float32)
    above = inside & ((b > own) | ((b == own) & (ids < wanted)))
    top_b = tl.max(b, axis=0)
    top_a = tl.max(a, axis=0)
    b = b - finite_shift(top_b)
    a = a - finite_shift(top_a)
    e = exp_shifted(a, 0.0)
    ws = workspace + row * row_floats + tile
    tl.store(ws + R_ABOVE * pitch, tl.sum(tl.where(above, 1, 0), axis=0).to(tl.float32))
    tl.store(ws + R_BASE * pitch, top_b)
    tl.store(ws + (R_BASE + 1) * pitch, tl.sum(exp_shifted(b, 0.0), axis=0))
    tl.store(ws + R_ALIGNED * pitch, top_a)
    tl.store(ws + (R_ALIGNED + 1) * pitch, tl.sum(e, axis=0))
    tl.store(ws + R_CROSS * pitch, tl.sum(tl.where(e > 0, e * (a - b), 0.0), axis=0))


@triton.jit
def rank_rows_kernel(
    base, aligned, token, base_stride, aligned_stride, workspace, row_floats, pitch, vocab, tiles,
    rank_out, kl_out, logprob_base_out, logprob_aligned_out, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    ws = workspace + row * row_floats
    wanted = tl.load(token + row)
    at = tl.minimum(tl.maximum(wanted, 0), vocab - 1)
    tops_b = field(ws, R_BASE, pitch, tiles, -float("inf"), TILES)
    best_b, _, sum_b = combined(tops_b, field(ws, R_BASE + 1, pitch, tiles, 0.0, TILES))
    tops_a = field(ws, R_ALIGNED, pitch, tiles, -float("inf"), TILES)
    sums_a = field(ws, R_ALIGNED + 1, pitch, tiles, 0.0, TILES)
    best_a, share, sum_a = combined(tops_a, sums_a)
    crosses = field(ws, R_CROSS, pitch, tiles, 0.0, TILES).to(tl.float64)
    shift = (tops_a - finite_shift(best_a)) - (tops_b - finite_shift(best_b))
    own = sums_a.to(tl.float64)
    apart = tl.where((share > 0) & (own > 0), share * (crosses + shift.to(tl.float64) * own), 0.0)
    kl = (tl.sum(apart, axis=0) / sum_a).to(tl.float32) + natural_log(sum_b / sum_a)
    above = tl.sum(field(ws, R_ABOVE, pitch, tiles, 0.0, TILES).to(tl.int32), axis=0)
    sound = tl.where(wanted == at, 1, 0) * tl.where(sum_a > 0, 1, 0) * tl.where(sum_b > 0, 1, 0)
    b = tl.load(base + row * base_stride + at).to(tl.float32)
    a = tl.load(aligned + row * aligned_stride + at).to(tl.float32)
    nan = tl.zeros([], tl.float32) + float("nan")
    tl.store(rank_out + row, tl.where(sound != 0, above + 1, 0))
    tl.store(kl_out + row, tl.where(sound != 0, kl, nan))
    tl.store(logprob_base_out + row, tl.where(sound != 0, (b - best_b) - natural_log(sum_b), nan))
    tl.store(logprob_aligned_out + row, tl.where(sound != 0, (a - best_a) - natural_log(sum_a), nan))
