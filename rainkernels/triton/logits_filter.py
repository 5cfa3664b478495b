"""Top-k, top-p and min-p of one row, on the device, by bounds and pivots instead of a sort.

Every filter keeps a prefix of one order (score descending, id ascending), so what is kept is a smallest key and how many
tokens of exactly that key. The search for it narrows an interval of keys by counting, and weighing, the tokens above a
few pivots. It looks at a buffer of candidates where the tokens in question fit one, and at the row otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rainkernels.triton.logits_mix import FAR, GROUP, scores

BUFFER = tl.constexpr(4096)  # candidates per row
PIVOTS = tl.constexpr(4)
SHORT = tl.constexpr(1024)  # candidates per step over a buffer
K_P_MIN = tl.constexpr(0)
MIN_K_P = tl.constexpr(1)
JOINT = tl.constexpr(2)


@triton.jit
def key_of(score):
    """An int32 that orders like the float32 `score`."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def score_of(key):
    """The float32 of an int32 key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def count_groups(groups, n, pivots):
    """How many of `n` groups have a largest score whose key is >= each pivot."""
    counts = tl.zeros([PIVOTS], tl.int32)
    for start in range(0, n, SHORT):
        at = start + tl.arange(0, SHORT)
        top = tl.load(groups + at, mask=at < n, other=-float("inf"))
        counts += tl.sum(tl.where(key_of(top)[:, None] >= pivots.to(tl.int32)[None, :], 1, 0), axis=0)
    return counts


@triton.jit
def weigh(score, pivots, best, scale):
    """How many scores have a key >= each pivot, and their mass relative to `best`."""
    above = key_of(score)[:, None] >= pivots.to(tl.int32)[None, :]
    mass = tl.exp2((score - best) * scale)
    masses = tl.sum(tl.where(above, mass[:, None], 0.0), axis=0)
    return tl.sum(tl.where(above, 1, 0), axis=0), masses.to(tl.float64)


@triton.jit
def weigh_buffer(buffer, n, pivots, best, scale):
    """`weigh` over `n` buffered scores."""
    counts = tl.zeros([PIVOTS], tl.int32)
    masses = tl.zeros([PIVOTS], tl.float64)
    for start in range(0, n, SHORT):
        at = start + tl.arange(0, SHORT)
        count, mass = weigh(tl.load(buffer + at, mask=at < n, other=-float("inf")), pivots, best, scale)
        counts += count
        masses += mass
    return counts, masses


@triton.jit
def weigh_row(
    context, vocab, pivots, best, scale,
    BLOCK: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PLAUSIBLE: tl.constexpr,
):  # fmt: skip
    """`weigh` over the whole row."""
    counts = tl.zeros([PIVOTS], tl.int32)
    masses = tl.zeros([PIVOTS], tl.float64)
    for start in range(0, vocab, BLOCK):
        _, score = scores(context, start + tl.arange(0, BLOCK), N, HAS_BIAS, HAS_PLAUSIBLE)
        count, mass = weigh(score, pivots, best, scale)
        counts += count
        masses += mass
    return counts, masses


@triton.jit
def gather(
    context, groups, n_groups, listed, buffer, low, high, best, scale,
    BLOCK: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PLAUSIBLE: tl.constexpr,
):  # fmt: skip
    """Copy the scores and ids of keys in [low, high) to the buffer, in id order, as many as fit.

    Only groups whose largest key is >= low are read. Returns the count and mass of all such tokens, fitting or not.
    """
    ids_buffer = (buffer + BUFFER).to(tl.pointer_type(tl.int32), bitcast=True)
    found = tl.zeros([], tl.int32)
    for start in range(0, n_groups, SHORT):
        at = start + tl.arange(0, SHORT)
        top = tl.load(groups + at, mask=at < n_groups, other=-float("inf"))
        wanted = tl.where(key_of(top) >= low.to(tl.int32), 1, 0)
        tl.store(listed + found + tl.cumsum(wanted, axis=0) - 1, at, mask=wanted != 0)
        found += tl.sum(wanted, axis=0)
    # The program's threads read below what others of them wrote.
    tl.debug_barrier()
    count = tl.zeros([], tl.int32)
    mass = tl.zeros([], tl.float64)
    for start in range(0, found, BLOCK // GROUP):
        at = start + tl.arange(0, BLOCK // GROUP)
        group = tl.load(listed + at, mask=at < found, other=n_groups)
        ids = tl.reshape(group[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [BLOCK])
        _, score = scores(context, ids, N, HAS_BIAS, HAS_PLAUSIBLE)
        key = key_of(score)
        wanted = tl.where((key >= low.to(tl.int32)) & (key < high.to(tl.int32)), 1, 0)
        place = count + tl.cumsum(wanted, axis=0) - 1
        fits = (wanted != 0) & (place < BUFFER)
        tl.store(buffer + place, score, mask=fits)
        tl.store(ids_buffer + place, ids, mask=fits)
        count += tl.sum(wanted, axis=0)
        mass += tl.sum(tl.where(wanted != 0, tl.exp2((score - best) * scale), 0.0), axis=0).to(tl.float64)
    tl.debug_barrier()
    return count, mass


@triton.jit
def pivots_between(low, high):
    """Keys that cut [low, high) into PIVOTS + 1 parts; at least one lies strictly inside where there is room."""
    return low + (high - low) * (tl.arange(0, PIVOTS).to(tl.int64) + 1) // (PIVOTS + 1)


@triton.jit
def kth_group(groups, n_groups, k, low, high):
    """A key that at least k groups reach with their largest score, the greatest such one or close below it."""
    n_low = n_groups + tl.zeros([], tl.int32)
    while (high - low > 1) & (n_low - k > k // 8):
        pivots = pivots_between(low, high)
        counts = count_groups(groups, n_groups, pivots)
        enough = counts >= k
        low = tl.maximum(low, tl.max(tl.where(enough, pivots, low), axis=0))
        high = tl.minimum(high, tl.min(tl.where(enough, high, pivots), axis=0))
        n_low = tl.minimum(n_low, tl.min(tl.where(enough, counts, n_low), axis=0))
    return low


@triton.jit
def lowest_key(best, scale, exponent):
    """The smallest key whose score passes (score - best) * scale >= exponent, compared in float32 like the tokens'."""
    low = key_of(tl.zeros([], tl.float32) - float("inf")).to(tl.int64)
    high = key_of(best).to(tl.int64)
    while high - low > 1:
        middle = low + (high - low) // 2
        passes = (score_of(middle.to(tl.int32)) - best) * scale >= exponent
        low = tl.where(passes, low, middle)
        high = tl.where(passes, middle, high)
    return high


@triton.jit
def kept_prefix(
    context, vocab, groups, n_groups, listed, buffer, best, scale, total, k, p, m, order,
    BLOCK: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PLAUSIBLE: tl.constexpr,
):  # fmt: skip
    """What the filters keep: keys above `key`, and of those equal to it the `ties` lowest ids.

    `total` is the mass of the whole row relative to `best`; k = 0, p = 1 and m = 0 switch a filter off.
    Returns key (int64), ties (int32), and the number of buffered candidates, or -1 where the buffer does not hold all.
    """
    nothing = key_of(tl.zeros([], tl.float32) - float("inf")).to(tl.int64) + 1
    end = key_of(best).to(tl.int64) + 1
    with_k = tl.where(k > 0, 1, 0)
    with_p = tl.where(p < 1.0, 1, 0)
    with_m = tl.where(m > 0.0, 1, 0)
    share = p.to(tl.float64)

    key_m = nothing
    if m > 0.0:
        key_m = tl.maximum(lowest_key(best, scale, tl.log2(m.to(tl.float64)).to(tl.float32)), nothing)
    # Whether top-p judges the whole row, so that its goal is known before anything else is.
    whole = tl.where(order == JOINT, 1, tl.where(order == MIN_K_P, (1 - with_k) * (1 - with_m), 1 - with_k))
    # Where top-p judges what top-k leaves, tokens that min-p drops still count.
    key = tl.where((order == K_P_MIN) & (with_k * with_p != 0), nothing, key_m)
    if (k > 0) & (k <= n_groups):
        key = tl.maximum(key, kth_group(groups, n_groups, k, nothing, end))
    if (with_p * whole) != 0:
        # Tokens below this score weigh less than (1 - p) / 2 of the total even if the whole vocabulary lay there.
        rest = tl.log2(((1.0 - share) * 0.5 * total / (vocab + tl.zeros([], tl.float64))).to(tl.float32))
        key = tl.maximum(key, key_of(tl.maximum(best + rest / scale, score_of(nothing.to(tl.int32)))).to(tl.int64))
    key = tl.minimum(key, end - 1)

    n_low = tl.zeros([], tl.int32)  # count and mass of keys >= key
    m_low = tl.zeros([], tl.float64)
    m_cut = tl.zeros([], tl.float64)  # mass of what is kept so far
    n_equal = tl.zeros([], tl.int32)
    ties = tl.zeros([], tl.int32) + FAR
    # The buffer holds keys of [key_buffer, end_buffer): none yet.
    key_buffer = end
    end_buffer = end
    n_buffer = tl.zeros([], tl.int32)
    n_above = tl.zeros([], tl.int32)  # count and mass of keys >= end_buffer
    m_above = tl.zeros([], tl.float64)
    for stage in range(3):  # candidates, top-k, top-p
        unknown = tl.where(stage == 0, 1, 0)
        goal = k.to(tl.float64)
        stop = k
        active = tl.where((stage == 1) & (n_low > k), with_k, 0)
        if stage == 2:
            goal = share * tl.where(whole != 0, total, m_cut)
            stop = tl.zeros([], tl.int32)
            active = tl.where(m_cut > goal, with_p, 0)
        low = key
        high = end
        n_high = tl.zeros([], tl.int32)
        m_high = tl.zeros([], tl.float64)
        while (unknown != 0) | ((active != 0) & (high - low > 1) & (n_low - n_high > 1) & (n_low > stop)):
            outside = (low < key_buffer) | (high > end_buffer)
            if (unknown != 0) | (outside & (n_low - n_high <= BUFFER)):
                n_buffer, mass = gather(
                    context, groups, n_groups, listed, buffer, low, high, best, scale,
                    BLOCK, N, HAS_BIAS, HAS_PLAUSIBLE,
                )  # fmt: skip
                fits = n_buffer <= BUFFER
                key_buffer = tl.where(fits, low, end)
                end_buffer = tl.where(fits, high, end)
                n_above = n_high
                m_above = m_high
                if unknown != 0:
                    n_low = n_buffer
                    m_low = mass
                    m_cut = mass
            unknown = tl.zeros([], tl.int32)
            if active != 0:
                pivots = pivots_between(low, high)
                if (low >= key_buffer) & (high <= end_buffer):
                    counts, masses = weigh_buffer(buffer, n_buffer, pivots, best, scale)
                    counts += n_above
                    masses += m_above
                else:
                    counts, masses = weigh_row(context, vocab, pivots, best, scale, BLOCK, N, HAS_BIAS, HAS_PLAUSIBLE)
                enough = tl.where(stage == 1, counts.to(tl.float64), masses) >= goal
                low = tl.maximum(low, tl.max(tl.where(enough, pivots, low), axis=0))
                high = tl.minimum(high, tl.min(tl.where(enough, high, pivots), axis=0))
                n_low = tl.minimum(n_low, tl.min(tl.where(enough, counts, n_low), axis=0))
                m_low = tl.minimum(m_low, tl.min(tl.where(enough, masses, m_low), axis=0))
                n_high = tl.maximum(n_high, tl.max(tl.where(enough, n_high, counts), axis=0))
                m_high = tl.maximum(m_high, tl.max(tl.where(enough, m_high, masses), axis=0))
        if active != 0:
            # Equal keys weigh the same: of those at `low`, as many as the goal needs, from the lowest id.
            n_equal = n_low - n_high
            need = k - n_high
            if stage == 2:
                ratio = (goal - m_high) / tl.maximum(m_low - m_high, 1e-300) * n_equal.to(tl.float64)
                need = tl.minimum(tl.maximum(tl.ceil(ratio.to(tl.float32)).to(tl.int32), 1), n_equal)
            ties = tl.where(low == key, tl.minimum(ties, need), need)
            m_cut = m_high + (m_low - m_high) * (need.to(tl.float64) / n_equal.to(tl.float64))
            key = low
    if key_m > key:
        key = key_m
        ties = tl.zeros([], tl.int32) + FAR
    holds = (key >= key_buffer) & (end_buffer == end)
    return key, tl.where(ties < n_equal, ties, FAR), tl.where(holds, n_buffer, -1)
