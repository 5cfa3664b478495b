"""What every kernel of the logits family computes first: the mixed logit and the score of a token.

Passes over the same row recompute scores instead of storing them, so they must find the same bits again. Products enter
sums through `tl.fma` only, which leaves the compiler nothing to contract differently from one kernel to the next.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Tokens per tile: the unit of every sum, whatever the batch and the grid.
TILE = tl.constexpr(1024)
# Tokens per group: pass 1 keeps every group's largest score, and filters skip whole groups by it.
GROUP = tl.constexpr(64)
GROUPS = tl.constexpr(16)  # per tile
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(2147483647)  # beyond every token id and count

# Fields of the workspace, one value per tile each; four more follow for every model.
F_MAX = tl.constexpr(0)  # largest mixed logit
F_SUM = tl.constexpr(1)  # sum of exp(mixed logit - largest)
F_SCORE = tl.constexpr(2)  # largest score: mixed logit + bias, implausible tokens out
F_MASS = tl.constexpr(3)  # sum of exp((score - largest) / temperature)
F_PLAUSIBLE = tl.constexpr(4)  # largest logit of the plausibility model
F_CROSS = tl.constexpr(5)  # sum of exp(.) * (mixed logit - largest)
F_MODEL = tl.constexpr(6)  # + 4 * model: largest, sum of exp, mixture against model, model against model 0


@triton.jit
def load_weights(weights, row, N: tl.constexpr):
    """The row's weights as a tuple, and two flags: their sum is one in float32; they are finite and not all zero."""
    values = ()
    total = tl.zeros([], tl.float32)
    spoilt = tl.zeros([], tl.float32)
    largest = tl.zeros([], tl.float32)
    for i in tl.static_range(N):
        w = tl.load(weights + row * N + i)
        values = values + (w,)  # noqa: RUF005 (Triton has no starred expression)
        total += w
        spoilt += w * 0.0  # NaN for what is not finite
        largest = tl.maximum(largest, tl.abs(w))
    return values, tl.where(total == 1.0, 1, 0), tl.where(spoilt == 0, 1, 0) * tl.where(largest > 0, 1, 0)


@triton.jit
def mixed_logits(models, weights, unit, ids, limit, N: tl.constexpr):
    """Weighted sum of the models' logits: -inf where banned or id >= limit, NaN where a model holds NaN or +inf.

    With `unit` (weights that sum to one) the differences to the first used model are mixed. A model of weight 0 is
    not read: its loads are masked off.
    """
    z = tl.zeros_like(ids).to(tl.float32)
    first = z
    lowest = z
    sound = z
    started = tl.zeros([], tl.int32)
    for i in tl.static_range(N):
        w = weights[i]
        # In integers: comparisons of eight weights make vectors of bits, which LLVM lays out on the stack.
        used = tl.minimum(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
        h = tl.load(models[i] + ids, mask=ids < used * limit, other=0.0).to(tl.float32)
        begins = used * (1 - started) * unit
        z = tl.fma(tl.where(begins != 0, 1.0, w) + tl.zeros_like(h), h - first, z)
        first = tl.where(begins != 0, h, first)
        lowest = tl.minimum(lowest, h)
        sound = tl.where(h < float("inf"), sound, float("nan"))
        started = tl.maximum(started, used)
    z = tl.where(lowest == -float("inf"), -float("inf"), z) + sound
    return tl.where(ids < limit, z, -float("inf"))


@triton.jit
def scores(row, ids, N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PLAUSIBLE: tl.constexpr):
    """Mixed logit and score of `ids`; `row` is the tuple that `row_context` makes."""
    models, weights, unit, limit, bias, plausible, plausible_limit, best, floor = row
    z = mixed_logits(models, weights, unit, ids, limit, N)
    score = z
    if HAS_BIAS:
        score = score + tl.load(bias + ids, mask=ids < limit, other=0.0)
    if HAS_PLAUSIBLE:
        h = tl.load(plausible + ids, mask=ids < plausible_limit, other=0.0).to(tl.float32)
        h = tl.where(ids < plausible_limit, h, best)
        # A score that spoils the row (NaN, +inf) stays in sight.
        score = tl.where(h - best >= floor, score, tl.where(score < float("inf"), -float("inf"), score))
    return z, score


@triton.jit
def row_context(
    row, h0, h1, h2, h3, h4, h5, h6, h7, s0, s1, s2, s3, s4, s5, s6, s7, weights, bias, bias_stride,
    plausible, plausible_stride, plausibility, ws, pitch, tiles, vocab,
    N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PLAUSIBLE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The tuple `scores` takes, and 1 where weights and plausibility are usable."""
    models = (h0 + row * s0,)
    if N > 1:
        models = models + (h1 + row * s1,)  # noqa: RUF005
    if N > 2:
        models = models + (h2 + row * s2,)  # noqa: RUF005
    if N > 3:
        models = models + (h3 + row * s3,)  # noqa: RUF005
    if N > 4:
        models = models + (h4 + row * s4,)  # noqa: RUF005
    if N > 5:
        models = models + (h5 + row * s5,)  # noqa: RUF005
    if N > 6:
        models = models + (h6 + row * s6,)  # noqa: RUF005
    if N > 7:
        models = models + (h7 + row * s7,)  # noqa: RUF005
    values, unit, sound = load_weights(weights, row, N)
    bias_row = bias
    if HAS_BIAS:
        bias_row = bias + row * bias_stride
    plausible_row = plausible
    # Off: nothing is read, and every token counts as the best one.
    plausible_limit = tl.zeros([], tl.int32)
    best = tl.zeros([], tl.float32)
    floor = best - 1.0
    if HAS_PLAUSIBLE:
        plausible_row = plausible + row * plausible_stride
        alpha = tl.load(plausibility + row)
        top = largest_plausible(ws, pitch, tiles, TILES)
        usable = tl.where(tl.abs(top) < float("inf"), 1, 0)  # NaN is not
        on = tl.where(alpha > 0, usable, 0)
        sound = sound * tl.where(alpha == 0, 1, tl.where(alpha > 0, usable, 0)) * tl.where(alpha <= 1, 1, 0)
        plausible_limit = tl.where(on != 0, vocab, 0)
        best = tl.where(on != 0, top, 0.0)
        floor = tl.where(on != 0, tl.log(tl.where(on != 0, alpha, 1.0).to(tl.float64)).to(tl.float32), -1.0)
    context = (models, values, unit, vocab, bias_row, plausible_row, plausible_limit, best, floor)
    return context, sound


@triton.jit
def largest_plausible(ws, pitch, tiles, TILES: tl.constexpr):
    """Largest logit of the plausibility model in a row, NaN where it holds one."""
    tile = tl.arange(0, TILES)
    top = tl.load(ws + F_PLAUSIBLE * pitch + tile, mask=tile < tiles, other=-float("inf"))
    spoilt = tl.max(tl.where(top != top, 1, 0), axis=0)
    return tl.where(spoilt != 0, float("nan"), tl.max(top, axis=0))


@triton.jit
def exp_shifted(x, shift):
    """exp(x - shift), 0 where x is -inf, NaN where either is NaN or x is +inf."""
    return tl.exp2((x - shift) * LOG2E)


@triton.jit
def finite_shift(x):
    """A shift for sums of exponentials: the maximum, or 0 where nothing is there."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def inverse_temperature(temperature):
    """log2(e) / temperature in float32, 3e38 at most: differences of scores become base-2 exponents."""
    safe = tl.where(temperature > 1e-38, temperature, 1e-38).to(tl.float64)
    return tl.minimum((tl.zeros([], tl.float64) + 1.4426950408889634) / safe, 3e38).to(tl.float32)


@triton.jit
def uniform(seed, low, high):
    """Philox4x32-10 of key `seed` and counter (low, high), all 64 bits: a float64 in (0, 1) of 52 bits."""
    x0, x1 = low.to(tl.uint32), (low.to(tl.uint64) >> 32).to(tl.uint32)
    x2, x3 = high.to(tl.uint32), (high.to(tl.uint64) >> 32).to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed.to(tl.uint64) >> 32).to(tl.uint32)
    m0 = tl.full([], 0xD2511F53, tl.uint32)
    m1 = tl.full([], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        y0, y2 = tl.umulhi(m1, x2) ^ x1 ^ k0, tl.umulhi(m0, x0) ^ x3 ^ k1
        x1, x3 = m1 * x2, m0 * x0
        x0, x2 = y0, y2
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    bits = (x0.to(tl.uint64) << 20) ^ (x1 >> 12).to(tl.uint64)
    return (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16
