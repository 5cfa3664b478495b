"""Plain PyTorch definition of the logits family: mix models' logits, filter, draw, and what the mixture did.

Every filter keeps a prefix of one order (score descending, then id ascending), so a row's kept set is one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["distribution", "mix_sample", "mixed_logits", "rank", "statistics", "uniforms"]

_LOG2E = 1.0 / math.log(2.0)
_MASK32 = 0xFFFFFFFF
_INF = float("inf")


def uniforms(seed: Tensor, position: Tensor) -> Tensor:
    """One float64 in (0, 1) per row: Philox4x32-10, key `seed` [B] int64, counter `position` [B] or [B, 2] int64.

    The bits are those of `raindecode.engine.sampler.uniforms`.
    """
    low, high = (position, torch.zeros_like(position)) if position.dim() == 1 else position.unbind(1)
    x0, x1, x2, x3 = (w & _MASK32 for w in (low, low >> 32, high, high >> 32))
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        # Products wrap around int64; their 64 bits are right.
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = (
            ((p1 >> 32) & _MASK32) ^ x1 ^ k0, p1 & _MASK32, ((p0 >> 32) & _MASK32) ^ x3 ^ k1, p0 & _MASK32,
        )  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    bits = ((x0 << 20) ^ (x1 >> 12)) & ((1 << 52) - 1)
    return (bits.double() + 0.5) * 2.0**-52


def mixed_logits(logits: Sequence[Tensor], weights: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Weighted sum of the models' logits; weights summing to one in float32 mix differences to the first model.

    Returns:
        z [B, vocab_size] float32 (float64 for float64 logits), -inf where a model with weight bans the token;
        valid [B] bool: a weight is not 0, all are finite, and no model with weight holds NaN or +inf
    """
    work = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    rows = logits[0].shape[0]
    total = torch.zeros(rows, dtype=torch.float32, device=weights.device)
    for i in range(len(logits)):
        total = torch.where(weights[:, i] != 0, total + weights[:, i].float(), total)
    differences = (total == 1.0)[:, None]
    z = torch.zeros((rows, vocab_size), dtype=work, device=weights.device)
    first = z
    banned = torch.zeros_like(z, dtype=torch.bool)
    started = torch.zeros_like(differences)
    valid = torch.isfinite(weights).all(dim=1)
    for i, source in enumerate(logits):
        h, w = source[:, :vocab_size].to(work), weights[:, i : i + 1].to(work)
        active = w != 0
        begins = active & ~started
        joined = _fma(w, torch.where(differences, h - first, h), z)
        z = torch.where(begins, torch.where(differences, h, w * h), torch.where(active, joined, z))
        first = torch.where(begins, h, first)
        banned |= active & (h == -_INF)
        valid &= ~(active & ~(h < _INF)).any(dim=1)
        started |= active
    z = z.masked_fill(banned, -_INF)
    return z, valid & started[:, 0] & (z < _INF).all(dim=1)


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c rounded once for float32: exact product in double, sum rounded to odd, then to float32."""
    if c.dtype == torch.float64:
        return a * b + c
    product, q = a.double() * b.double(), c.double()
    s = product + q
    back = s - product
    error = (product - (s - back)) + (q - back)
    bits = s.view(torch.int64)
    step = (error != 0) & ((bits & 1) == 0) & torch.isfinite(error) & torch.isfinite(s)
    towards = torch.where((error.view(torch.int64) ^ bits) < 0, -1, 1)
    return (bits + torch.where(step, towards, 0)).view(torch.float64).float()


def distribution(
    z: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    bias: Tensor | None = None,
    plausible: Tensor | None = None,
    plausibility: Tensor | None = None,
    order: str = "k_p_min",
) -> tuple[Tensor, Tensor]:
    """Unnormalised probability of every token after bias, plausibility, temperature and filters.

    Shapes:
        z [B, V]; plausible [B, V]: logits of the plausibility model; the others as in `rainkernels.ops.logits`
    Returns:
        mass [B, V], largest 1, 0 for tokens that cannot be drawn;  valid [B] bool
    """
    work, width = z.dtype, z.shape[1]
    t = temperature.to(work)[:, None]
    valid = (t[:, 0] >= 0) & (t[:, 0] < _INF)
    score = z if bias is None else z + bias.to(work)
    valid &= (score < _INF).all(dim=1)
    if plausibility is not None and plausible is not None:
        alpha = plausibility.to(work)[:, None]
        top = plausible.to(work).amax(dim=1, keepdim=True)  # NaN when the row holds one
        # The float32 logarithm on every lane, so that all agree where a token lies right at the limit.
        limit = torch.log(alpha.double()).float().to(work)
        on = alpha > 0
        score = torch.where(on & ~(plausible.to(work) - top >= limit), -_INF, score)
        valid &= (alpha[:, 0] >= 0) & (alpha[:, 0] <= 1) & (~on | torch.isfinite(top))[:, 0]
    best = score.amax(dim=1, keepdim=True)
    valid &= best[:, 0] > -_INF
    score = torch.where(valid[:, None], score, 0.0)
    best = torch.where(valid[:, None], best, 0.0)

    # Differences first: a tiny temperature may make them -inf, never NaN.
    scale = (_LOG2E / t.clamp(min=1e-45).double()).clamp(max=3e38).to(work)
    lowered = (score - best) * scale
    ordered, ids = torch.sort(score, dim=1, descending=True, stable=True)
    sorted_lowered = lowered.gather(1, ids)
    prefix = torch.exp2(sorted_lowered).double().cumsum(dim=1)
    present = (ordered > -_INF).sum(dim=1)

    k_count = present
    if top_k is not None:
        k = top_k.long()
        valid &= k >= 0
        k_count = torch.where(k > 0, torch.minimum(k, present), present)
    min_count = present
    if min_p is not None:
        valid &= (min_p >= 0) & (min_p <= 1)
        limit = torch.log2(min_p.double()).float().to(work)[:, None]
        min_count = ((sorted_lowered >= limit) & (ordered > -_INF)).sum(dim=1)
    before_p = {"k_p_min": k_count, "min_k_p": torch.minimum(k_count, min_count), "joint": present}[order]
    kept = before_p
    if top_p is not None:
        valid &= (top_p > 0) & (top_p <= 1)
        total = prefix.gather(1, (before_p - 1).clamp(min=0)[:, None])
        kept = torch.where(top_p < 1, (prefix < top_p.double()[:, None] * total).sum(dim=1) + 1, before_p)
        kept = torch.minimum(kept, before_p)
    kept = torch.minimum(torch.minimum(kept, k_count), min_count)
    kept = torch.where(t[:, 0] == 0, 1, kept).clamp(min=1)
    position = torch.empty_like(ids).scatter_(1, ids, torch.arange(width, device=z.device).expand_as(ids).contiguous())
    mass = torch.where((position < kept[:, None]) & valid[:, None], torch.exp2(lowered), 0.0)
    return mass, valid


def statistics(
    logits: Sequence[Tensor], weights: Tensor, z: Tensor, valid: Tensor, token: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprob_models, lse_mix, lse_models, log_z, entropy, kl_mix, kl_ref of `rainkernels.ops.logits.MixStats`."""
    work, nan = z.dtype, float("nan")
    at = token.long().clamp(min=0)[:, None]
    rows = [source[:, : z.shape[1]].to(work) for source in logits]
    logs: list[Tensor] = []
    lses: list[Tensor] = []
    for h in rows:
        # A model of weight 0 may hold anything; what is no distribution has no statistics.
        proper = (h < _INF).all(dim=1) & (h > -_INF).any(dim=1)
        h = torch.where(proper[:, None], h, nan)
        logs.append(torch.log_softmax(h, dim=1))
        lses.append(_log_sum_exp(h))
    mix = torch.log_softmax(z, dim=1)
    lse_mix = _log_sum_exp(z)
    log_z = lse_mix
    for i, lse in enumerate(lses):
        w = weights[:, i].double()
        log_z = torch.where(w != 0, log_z - w * lse, log_z)
    p = torch.exp(mix)
    result = (
        torch.stack([lp.gather(1, at)[:, 0] for lp in logs], dim=1),
        lse_mix.to(work),
        torch.stack(lses, dim=1).to(work),
        log_z.to(work),
        -torch.where(p > 0, p * mix, 0.0).sum(dim=1),
        torch.stack([_divergence(mix, lp) for lp in logs], dim=1),
        torch.stack([torch.zeros_like(z[:, 0]), *(_divergence(lp, logs[0]) for lp in logs[1:])], dim=1),
    )
    kept = [torch.where(valid if x.dim() == 1 else valid[:, None], x, nan) for x in result]
    return kept[0], kept[1], kept[2], kept[3], kept[4], kept[5], kept[6]


def _log_sum_exp(h: Tensor) -> Tensor:
    """In double: constants added to a row stay exact until they cancel."""
    top = h.amax(dim=1, keepdim=True)
    return top[:, 0].double() + torch.exp(h - top).sum(dim=1).double().log()


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row, from log-probabilities; terms of p = 0 are 0, NaN stays."""
    p = torch.exp(log_p)
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=1)


def mix_sample(
    logits: Sequence[Tensor],
    weights: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seed: Tensor,
    position: Tensor,
    bias: Tensor | None = None,
    plausibility: Tensor | None = None,
    plausibility_model: int = 0,
    order: str = "k_p_min",
    vocab_size: int | None = None,
    stats: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...] | None]:
    """Arguments and meaning as `rainkernels.ops.logits.mix_sample`; invalid parameters make their row invalid.

    Returns:
        (token int32, prob, logprob) each [B]; with `stats` the tensors of `statistics`, else None
    """
    width = min(source.shape[1] for source in logits) if vocab_size is None else vocab_size
    z, valid = mixed_logits(logits, weights, width)
    mass, usable = distribution(
        z, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, bias=bias, plausibility=plausibility,
        plausible=None if plausibility is None else logits[plausibility_model][:, :width], order=order,
    )  # fmt: skip
    valid = valid & usable
    running = mass.double().cumsum(dim=1)
    total = running[:, -1:]
    target = uniforms(seed, position)[:, None] * total
    # The first id whose prefix exceeds the target; rounding never leads past the last id of positive mass.
    last = (running < total).sum(dim=1)
    token = torch.minimum((running <= target).sum(dim=1), last).clamp(max=width - 1)
    at = token[:, None]
    nan = torch.full_like(z[:, 0], float("nan"))
    logprob = torch.log_softmax(torch.where(valid[:, None], z, 0.0), dim=1).gather(1, at)[:, 0]
    prob = (mass.gather(1, at).double() / total)[:, 0].to(z.dtype)
    token = torch.where(valid, token, -1).to(torch.int32)
    sample = (token, torch.where(valid, prob, nan), torch.where(valid, logprob, nan))
    return sample, statistics(logits, weights, z, valid, token) if stats else None


def rank(
    base: Tensor, aligned: Tensor, token: Tensor, *, vocab_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and meaning as `rainkernels.ops.logits.rank`; a token outside the vocabulary makes its row invalid.

    Returns:
        rank int32, kl, logprob_base, logprob_aligned, each [B]
    """
    width = min(base.shape[1], aligned.shape[1]) if vocab_size is None else vocab_size
    work = torch.float64 if base.dtype == torch.float64 else torch.float32
    b, a = base[:, :width].to(work), aligned[:, :width].to(work)
    wanted = token.long()[:, None]
    valid = (wanted >= 0)[:, 0] & (wanted < width)[:, 0]
    for h in (b, a):
        valid &= (h < _INF).all(dim=1) & (h > -_INF).any(dim=1)
    at = wanted.clamp(0, width - 1)
    own = b.gather(1, at)
    lower = torch.arange(width, device=base.device)[None, :] < at
    above = (b > own) | ((b == own) & lower)
    log_b, log_a = torch.log_softmax(b, dim=1), torch.log_softmax(a, dim=1)
    nan = torch.full_like(own[:, 0], float("nan"))
    values = (_divergence(log_a, log_b), log_b.gather(1, at)[:, 0], log_a.gather(1, at)[:, 0])
    kl, logprob_base, logprob_aligned = (torch.where(valid, x, nan) for x in values)
    return torch.where(valid, above.sum(dim=1) + 1, 0).to(torch.int32), kl, logprob_base, logprob_aligned
