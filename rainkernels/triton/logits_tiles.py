"""First pass of `mix_sample`: one program per tile of a row reads the logits once and leaves the tile's partial sums."""

from __future__ import annotations

import triton
import triton.language as tl

from rainkernels.triton.logits_mix import (
    F_CROSS,
    F_MASS,
    F_MAX,
    F_MODEL,
    F_PLAUSIBLE,
    F_SCORE,
    F_SUM,
    GROUP,
    GROUPS,
    TILE,
    exp_shifted,
    finite_shift,
    inverse_temperature,
    row_context,
    scores,
)  # fmt: skip


@triton.jit
def plausible_tiles_kernel(plausible, stride, workspace, row_floats, pitch, vocab, tiles):
    """Largest logit of every tile of the plausibility model; NaN where the tile holds one."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    ids = tile * TILE + tl.arange(0, TILE)
    h = tl.load(plausible + row * stride + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
    top = tl.max(h, axis=0)
    spoilt = tl.max(tl.where(h != h, 1, 0), axis=0)
    tl.store(workspace + row * row_floats + F_PLAUSIBLE * pitch + tile, tl.where(spoilt != 0, float("nan"), top))


@triton.jit
def mix_tiles_kernel(
    h0, h1, h2, h3, h4, h5, h6, h7, s0, s1, s2, s3, s4, s5, s6, s7, weights, temperature, bias, bias_stride,
    plausible, plausible_stride, plausibility, workspace, row_floats, pitch, vocab, tiles,
    N: tl.constexpr, STATS: tl.constexpr, FILTERS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PLAUSIBLE: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Fields of one tile (`F_*`), with FILTERS its groups' largest scores. NaN anywhere makes a sum NaN."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    ws = workspace + row * row_floats
    context, _ = row_context(
        row, h0, h1, h2, h3, h4, h5, h6, h7, s0, s1, s2, s3, s4, s5, s6, s7, weights, bias, bias_stride,
        plausible, plausible_stride, plausibility, ws, pitch, tiles, vocab, N, HAS_BIAS, HAS_PLAUSIBLE, TILES,
    )  # fmt: skip
    t = tl.load(temperature + row)
    ids = tile * TILE + tl.arange(0, TILE)
    z, score = scores(context, ids, N, HAS_BIAS, HAS_PLAUSIBLE)

    top = tl.max(z, axis=0)
    shift = finite_shift(top)
    e = exp_shifted(z, shift)
    total = tl.sum(e, axis=0)
    tl.store(ws + F_MAX * pitch + tile, top)
    tl.store(ws + F_SUM * pitch + tile, total)

    top_score = top
    mass = total
    if HAS_BIAS or HAS_PLAUSIBLE:
        top_score = tl.max(score, axis=0)
        mass = tl.sum(exp_shifted(score, finite_shift(top_score)), axis=0)
    # Greedy rows draw no mass; theirs at temperature 1 only tells NaN from numbers.
    if (t != 1.0) & (t > 0.0):
        mass = tl.sum(tl.exp2((score - finite_shift(top_score)) * inverse_temperature(t)), axis=0)
    tl.store(ws + F_SCORE * pitch + tile, top_score)
    tl.store(ws + F_MASS * pitch + tile, mass)
    if FILTERS:
        groups = tl.max(tl.reshape(score, [GROUPS, GROUP]), axis=1)
        fields = F_MODEL + 4 * N
        tl.store(ws + fields * pitch + tile * GROUPS + tl.arange(0, GROUPS), groups)

    if STATS:
        tl.store(ws + F_CROSS * pitch + tile, tl.sum(tl.where(e > 0, e * (z - shift), 0.0), axis=0))
        models = context[0]
        for i in tl.static_range(N):
            # Read again: the tile lies in L1, and N copies of it would not fit the registers.
            h = tl.load(models[i] + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
            top_i = tl.max(h, axis=0)
            h = h - finite_shift(top_i)
            e_i = exp_shifted(h, 0.0)
            base = h
            if i > 0:
                base = tl.load(models[0] + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
                base = base - finite_shift(tl.max(base, axis=0))
            field = ws + (F_MODEL + 4 * i) * pitch + tile
            tl.store(field, top_i)
            tl.store(field + pitch, tl.sum(e_i, axis=0))
            tl.store(field + 2 * pitch, tl.sum(tl.where(e > 0, e * ((z - shift) - h), 0.0), axis=0))
            tl.store(field + 3 * pitch, tl.sum(tl.where(e_i > 0, e_i * (h - base), 0.0), axis=0))
