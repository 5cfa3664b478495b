"""Second pass of `mix_sample`: one program per row combines the tiles, filters, draws a token and measures."""

from __future__ import annotations

import triton
import triton.language as tl

from rainkernels.triton.logits_filter import BUFFER, SHORT, kept_prefix, key_of
from rainkernels.triton.logits_mix import (
    F_CROSS,
    F_MASS,
    F_MAX,
    F_MODEL,
    F_SCORE,
    F_SUM,
    FAR,
    GROUPS,
    LN2,
    LOG2E,
    TILE,
    finite_shift,
    inverse_temperature,
    row_context,
    scores,
    uniform,
)  # fmt: skip


@triton.jit
def field(ws, index, pitch, tiles, other, TILES: tl.constexpr):
    """One workspace field of all tiles of a row."""
    tile = tl.arange(0, TILES)
    return tl.load(ws + index * pitch + tile, mask=tile < tiles, other=other)


@triton.jit
def combined(tops, sums):
    """Largest logit of a row, the tiles' shares exp(top - largest) and the float64 sum of exp(logit - largest)."""
    top = tl.max(tops, axis=0)
    share = tl.exp2((tops - finite_shift(top)) * LOG2E).to(tl.float64)
    return top, share, tl.sum(tl.where(sums == 0, 0.0, share * sums.to(tl.float64)), axis=0)


@triton.jit
def natural_log(x):
    """ln of a positive float64 in float32 arithmetic."""
    return tl.log2(x.to(tl.float32)) * LN2


@triton.jit
def kept_of(score, key, ties, seen):
    """Which scores a filter keeps, and how many of exactly `key` there are; `seen` of those came before."""
    own = key_of(score)
    tied = tl.where(own == key, 1, 0)
    kept = tl.where(own > key, 1, 0) + tl.where(seen + tl.cumsum(tied, axis=0) <= ties, tied, 0)
    return kept, tl.sum(tied, axis=0), tied


@triton.jit
def filtered_masses(
    context, ws, pitch, tiles, vocab, key, ties, scale,
    BLOCK: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PLAUSIBLE: tl.constexpr,
):  # fmt: skip
    """Replace the tiles' masses by those of the kept tokens, shifted as before. Returns the last kept id of `key`."""
    seen = tl.zeros([], tl.int32)
    last = tl.zeros([], tl.int32) - 1
    for start in range(0, vocab, BLOCK):
        tile = start // TILE + tl.arange(0, BLOCK // TILE)
        top = finite_shift(tl.load(ws + F_SCORE * pitch + tile, mask=tile < tiles, other=0.0))
        ids = start + tl.arange(0, BLOCK)
        _, score = scores(context, ids, N, HAS_BIAS, HAS_PLAUSIBLE)
        kept, count, tied = kept_of(score, key, ties, seen)
        last = tl.maximum(last, tl.max(tl.where((kept * tied) != 0, ids, -1), axis=0))
        seen += count
        kept_scores = tl.reshape(tl.where(kept != 0, score, -float("inf")), [BLOCK // TILE, TILE])
        mass = tl.sum(tl.exp2((kept_scores - top[:, None]) * scale), axis=1)
        tl.store(ws + F_MASS * pitch + tile, mass, mask=tile < tiles)
    tl.debug_barrier()
    return last


@triton.jit
def draw_from_buffer(buffer, n, u, key, ties, best, scale):
    """Token of the inverse distribution function at `u` over the buffered candidates that are kept, and their mass."""
    ids_buffer = (buffer + BUFFER).to(tl.pointer_type(tl.int32), bitcast=True)
    total = tl.zeros([], tl.float64)
    before = tl.zeros([], tl.float64)
    token = tl.zeros([], tl.int32) + FAR
    final = tl.zeros([], tl.int32) - 1
    for walk in range(2):  # first the total, then the walk
        seen = tl.zeros([], tl.int32)
        for start in range(0, n, SHORT):
            at = start + tl.arange(0, SHORT)
            score = tl.load(buffer + at, mask=at < n, other=-float("inf"))
            ids = tl.load(ids_buffer + at, mask=at < n, other=FAR)
            kept, count, _ = kept_of(score, key, ties, seen)
            seen += count
            mass = tl.where(kept != 0, tl.exp2((score - best) * scale), 0.0).to(tl.float64)
            if walk == 0:
                total += tl.sum(mass, axis=0)
            else:
                running = before + tl.cumsum(mass, axis=0)
                token = tl.minimum(token, tl.min(tl.where((running > u * total) & (mass > 0), ids, FAR), axis=0))
                final = tl.maximum(final, tl.max(tl.where(mass > 0, ids, -1), axis=0))
                before += tl.sum(mass, axis=0)
    # Rounding may leave the walk past the end: then the last token that can be drawn.
    return tl.minimum(token, final), total


@triton.jit
def draw_tile(ws, pitch, tiles, u, best, scale, TILES: tl.constexpr):
    """The tile where the running mass exceeds the share `u` of the total; the mass before it, and the total."""
    tile = tl.arange(0, TILES)
    share = tl.exp2((field(ws, F_SCORE, pitch, tiles, -float("inf"), TILES) - best) * scale).to(tl.float64)
    masses = share * field(ws, F_MASS, pitch, tiles, 0.0, TILES).to(tl.float64)
    running = tl.cumsum(masses, axis=0)
    total = tl.max(running, axis=0)
    chosen = tl.min(tl.where(running > u * total, tile, TILES), axis=0)
    chosen = tl.minimum(chosen, tl.max(tl.where(masses > 0, tile, 0), axis=0))
    return chosen, tl.max(tl.where(tile < chosen, running, 0.0), axis=0), total


@triton.jit
def walk_tile(score, ids, top, share, key, last, before, goal, scale):
    """The first kept id of a tile whose running mass exceeds `goal`."""
    own = key_of(score)
    kept = (own > key) | ((own == key) & (ids <= last))
    mass = tl.where(kept, tl.exp2((score - finite_shift(top)) * scale), 0.0)
    running = before + tl.cumsum(mass.to(tl.float64), axis=0) * share
    token = tl.min(tl.where((running > goal) & (mass > 0), ids, FAR), axis=0)
    return tl.minimum(token, tl.max(tl.where(mass > 0, ids, -1), axis=0))


@triton.jit(do_not_specialize=["given", "order"])
def mix_rows_kernel(
    h0, h1, h2, h3, h4, h5, h6, h7, s0, s1, s2, s3, s4, s5, s6, s7, weights, temperature, top_k, top_p, min_p,
    given, order, seed, position, bias, bias_stride, plausible, plausible_stride, plausibility, workspace, row_floats, pitch, vocab,
    tiles, token_out, prob_out, logprob_out, logprob_models_out, lse_mix_out, lse_models_out, log_z_out, entropy_out,
    kl_mix_out, kl_ref_out,
    N: tl.constexpr, STATS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PLAUSIBLE: tl.constexpr,
    FILTERS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    ws = workspace + row * row_floats
    context, sound = row_context(
        row, h0, h1, h2, h3, h4, h5, h6, h7, s0, s1, s2, s3, s4, s5, s6, s7, weights, bias, bias_stride,
        plausible, plausible_stride, plausibility, ws, pitch, tiles, vocab, N, HAS_BIAS, HAS_PLAUSIBLE, TILES,
    )  # fmt: skip
    t = tl.load(temperature + row)
    k = tl.zeros([], tl.int32)
    p = tl.zeros([], tl.float32) + 1.0
    m = tl.zeros([], tl.float32)
    if FILTERS:
        # Which filters came, and in which order they act, is known at run time only: one kernel for all of them.
        if (given & 1) != 0:
            k = tl.load(top_k + row)
        if (given & 2) != 0:
            p = tl.load(top_p + row)
        if (given & 4) != 0:
            m = tl.load(min_p + row)
    # Comparisons are false for NaN.
    sound *= tl.where(t >= 0, 1, 0) * tl.where(t < float("inf"), 1, 0) * tl.where(k >= 0, 1, 0)
    sound *= tl.where(p > 0, 1, 0) * tl.where(p <= 1, 1, 0) * tl.where(m >= 0, 1, 0) * tl.where(m <= 1, 1, 0)

    tops = field(ws, F_MAX, pitch, tiles, -float("inf"), TILES)
    best_z, _, sum_z = combined(tops, field(ws, F_SUM, pitch, tiles, 0.0, TILES))
    top_scores = field(ws, F_SCORE, pitch, tiles, -float("inf"), TILES)
    best = tl.max(top_scores, axis=0)
    masses = field(ws, F_MASS, pitch, tiles, 0.0, TILES)
    # A NaN of any tile comes through the sums; a largest score of -inf leaves nothing to draw.
    sound *= tl.where(sum_z > 0, 1, 0) * tl.where(tl.sum(masses, axis=0) > 0, 1, 0)

    token = tl.zeros([], tl.int32) - 1
    prob = tl.zeros([], tl.float32) + float("nan")
    logprob = prob
    if sound != 0:
        tile = tl.arange(0, TILES)
        scale = inverse_temperature(t)
        at = position + row * 2
        u = uniform(tl.load(seed + row), tl.load(at), tl.load(at + 1))
        key = key_of(tl.zeros([], tl.float32) - float("inf"))
        last = tl.zeros([], tl.int32) + FAR
        before = tl.zeros([], tl.float64)
        total = tl.zeros([], tl.float64)
        if FILTERS:
            wanted = (t > 0.0) & ((k > 0) | (p < 1.0) | (m > 0.0))
            if wanted:
                groups = ws + (F_MODEL + 4 * N) * pitch
                listed = (groups + GROUPS * pitch).to(tl.pointer_type(tl.int32), bitcast=True)
                buffer = groups + 2 * GROUPS * pitch
                whole = tl.sum(tl.exp2((top_scores - best) * scale).to(tl.float64) * masses.to(tl.float64), axis=0)
                edge, ties, n_buffer = kept_prefix(
                    context, vocab, groups, tiles * GROUPS, listed, buffer, best, scale, whole, k, p, m, order,
                    BLOCK, N, HAS_BIAS, HAS_PLAUSIBLE,
                )  # fmt: skip
                key = edge.to(tl.int32)
                if n_buffer < 0:
                    last = filtered_masses(
                        context, ws, pitch, tiles, vocab, key, ties, scale,
                        BLOCK, N, HAS_BIAS, HAS_PLAUSIBLE,
                    )  # fmt: skip
                else:
                    token, total = draw_from_buffer(buffer, n_buffer, u, key, ties, best, scale)
        # One tile is read again: the one with the token, which is known if it came from the buffer.
        if token >= 0:
            chosen = token // TILE
        elif t == 0.0:
            top_scores = field(ws, F_SCORE, pitch, tiles, -float("inf"), TILES)
            chosen = tl.min(tl.where(top_scores == best, tile, TILES), axis=0)
        else:
            chosen, before, total = draw_tile(ws, pitch, tiles, u, best, scale, TILES)
        chosen = tl.minimum(chosen, tiles - 1)
        ids = chosen * TILE + tl.arange(0, TILE)
        z, score = scores(context, ids, N, HAS_BIAS, HAS_PLAUSIBLE)
        top = tl.max(score, axis=0)
        if t == 0.0:
            token = tl.min(tl.where(score == top, ids, FAR), axis=0)
            prob = tl.zeros([], tl.float32) + 1.0
        else:
            if token < 0:
                share = tl.exp2((top - best) * scale).to(tl.float64)
                token = walk_tile(score, ids, top, share, key, last, before, u * total, scale)
            mass = tl.sum(tl.where(ids == token, tl.exp2((score - best) * scale), 0.0), axis=0)
            prob = (mass.to(tl.float64) / total).to(tl.float32)
        logprob = (tl.sum(tl.where(ids == token, z, 0.0), axis=0) - best_z) - natural_log(sum_z)
    tl.store(token_out + row, token)
    tl.store(prob_out + row, prob)
    tl.store(logprob_out + row, logprob)

    if STATS:
        nan = tl.zeros([], tl.float32) + float("nan")
        values = context[1]
        models = context[0]
        # Fields of the tiles are loaded again where they are used: kept alive across the filters they would spill.
        tops = field(ws, F_MAX, pitch, tiles, -float("inf"), TILES)
        _, share_z, _ = combined(tops, field(ws, F_SUM, pitch, tiles, 0.0, TILES))
        lse = best_z + natural_log(sum_z)
        log_z = best_z.to(tl.float64) + natural_log(sum_z).to(tl.float64)
        shift_z = tops - finite_shift(best_z)
        sums = field(ws, F_SUM, pitch, tiles, 0.0, TILES).to(tl.float64)
        crosses = field(ws, F_CROSS, pitch, tiles, 0.0, TILES).to(tl.float64)
        live = (share_z > 0) & (sums > 0)
        cross = tl.sum(tl.where(live, share_z * (crosses + shift_z.to(tl.float64) * sums), 0.0), axis=0)
        tl.store(lse_mix_out + row, tl.where(sound != 0, lse, nan))
        entropy = natural_log(sum_z) - (cross / sum_z).to(tl.float32)
        tl.store(entropy_out + row, tl.where(sound != 0, entropy, nan))
        base_tops = field(ws, F_MODEL, pitch, tiles, -float("inf"), TILES)
        best_0, _, sum_0 = combined(base_tops, field(ws, F_MODEL + 1, pitch, tiles, 0.0, TILES))
        shift_0 = base_tops - finite_shift(best_0)
        for i in tl.static_range(N):
            at_i = F_MODEL + 4 * i
            tops_i = field(ws, at_i, pitch, tiles, -float("inf"), TILES)
            sums_i = field(ws, at_i + 1, pitch, tiles, 0.0, TILES)
            best_i, share_i, sum_i = combined(tops_i, sums_i)
            good = sound * tl.where(sum_i > 0, 1, 0)
            shift_i = tops_i - finite_shift(best_i)
            log_i = natural_log(sum_i)
            out = row * N + i
            h = tl.load(models[i] + tl.maximum(token, 0)).to(tl.float32)
            tl.store(logprob_models_out + out, tl.where(good != 0, (h - best_i) - log_i, nan))
            tl.store(lse_models_out + out, tl.where(good != 0, best_i + log_i, nan))
            log_z -= tl.where(
                values[i] != 0, values[i].to(tl.float64) * (best_i.to(tl.float64) + log_i.to(tl.float64)), 0.0
            )
            crosses = field(ws, at_i + 2, pitch, tiles, 0.0, TILES).to(tl.float64)
            apart = tl.where(live, share_z * (crosses + (shift_z - shift_i).to(tl.float64) * sums), 0.0)
            kl = (tl.sum(apart, axis=0) / sum_z).to(tl.float32) + natural_log(sum_i / sum_z)
            tl.store(kl_mix_out + out, tl.where(good != 0, kl, nan))
            crosses = field(ws, at_i + 3, pitch, tiles, 0.0, TILES).to(tl.float64)
            own = sums_i.to(tl.float64)
            apart = tl.where(
                (share_i > 0) & (own > 0), share_i * (crosses + (shift_i - shift_0).to(tl.float64) * own), 0.0
            )
            kl = (tl.sum(apart, axis=0) / sum_i).to(tl.float32) + natural_log(sum_0 / sum_i)
            good *= tl.where(sum_0 > 0, 1, 0)
            if i == 0:
                kl = tl.zeros([], tl.float32)
                good = sound
            tl.store(kl_ref_out + out, tl.where(good != 0, kl, nan))
        tl.store(log_z_out + row, tl.where(sound != 0, log_z.to(tl.float32), nan))
