"""Draws from mixtures of several models' logits (DeRa): one fused pass mixes, filters, draws and measures.

Source: Liu et al., Decoding-time Realignment, 2024 (arXiv 2402.02992), proposition 1 and appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raindecode.engine.logit_rows import HostRow, LogitRow, stacked
from raindecode.engine.sampler import Drawn, Filter
from raindecode.errors import ConfigError, NumericError
from raindecode.mixture import Measured, Mix
from rainkernels.ops.logits import MixSample, MixStats, mix_sample

Rows: TypeAlias = "Sequence[LogitRow | None]"  # one per model; None where the model does not run
_GREEDY = Filter(temperature=0.0)
_MASK64 = (1 << 64) - 1


class MixDraw(NamedTuple):
    """A draw from the mixture `mix` of `rows`. `name` is key and 128-bit counter; shape without repetition penalty."""

    rows: Rows
    mix: Mix
    shape: Filter
    name: tuple[int, int]


def draw_mixed(draws: Sequence[MixDraw], vocab_size: int) -> list[Drawn | Exception]:
    """A Drawn per draw, or why there is none. Ids from `vocab_size` on, which exist in no tokenizer, never come out."""
    results: list[Drawn | Exception] = [NumericError("no draw was made")] * len(draws)
    groups: dict[tuple[bool, int], list[int]] = {}
    for i, one in enumerate(draws):
        groups.setdefault((one.mix.stats, one.mix.plausibility_model), []).append(i)
    for (stats, plausible), members in groups.items():
        chosen = [draws[i] for i in members]
        sample, measured = _run(chosen, vocab_size, stats, plausible)
        for i, drawn in zip(members, _drawn(chosen, sample, measured), strict=True):
            results[i] = drawn
    return results


def measure(drawn: Sequence[tuple[Rows, Mix, int]], vocab_size: int) -> list[Measured]:
    """The statistics of mixtures where tokens were drawn by other means. Rows of all models are needed."""
    if not drawn:
        return []
    greedy = [MixDraw(rows, replace(mix, plausibility=0.0), _GREEDY, (0, 0)) for rows, mix, _ in drawn]
    stats = _run(greedy, vocab_size, True, 0)[1]
    assert stats is not None
    columns, lse_models = [column.tolist() for column in stats], stats.lse_models.tolist()
    found: list[Measured] = []
    for i, (rows, mix, token) in enumerate(drawn):
        values = [float(row.host[token]) for row in rows if row is not None]
        each = tuple(value - lse for value, lse in zip(values, lse_models[i], strict=True))
        found.append(replace(_measured(mix, [column[i] for column in columns]), logprob_models=each))
    return found


def mixed_row(rows: Rows, mix: Mix, vocab_size: int) -> HostRow:
    """[vocabulary] float32 mixed logits on the host, computed in double; for what needs a whole row.

    z = h_b + sum_i w_i (h_i - h_b) with b the first model of weight != 0; -inf where a model of weight != 0 has it, and from
    `vocab_size` on.
    """
    used = [
        (w, row.host[:vocab_size].astype(np.float64)) for w, row in zip(mix.weights, rows, strict=True) if w and row
    ]
    base = used[0][1]
    z = base.copy()
    banned = np.isneginf(base)
    with np.errstate(invalid="ignore"):
        for weight, logits in used[1:]:
            z += weight * (logits - base)
            banned |= np.isneginf(logits)
    z[banned] = -np.inf
    width = max(len(row.host) for row in rows if row is not None)
    whole = np.full(width, -np.inf, dtype=np.float32)
    whole[:vocab_size] = z
    return whole


def mixed_block(blocks: Sequence[Tensor | None], mix: Mix, vocab_size: int) -> Tensor:
    """[n, vocab_size] logits of a mixture, where the models' blocks [n, vocabulary] of `Got.rows` lie.

    As `mixed_row`, in float32; one model alone keeps its dtype and is not copied. Weights that a divergence asks for are solved
    row by row, on the host.

    Raises:
        ConfigError: the mixture has a plausibility filter, which leaves no distribution over all tokens.
    """
    if mix.plausibility:
        raise ConfigError(
            "a mixture with a plausibility filter gives most tokens no probability, so neither ranks nor divergences of it say "
            "anything: leave plausibility out"
        )
    used = [(i, block[:, :vocab_size]) for i, block in enumerate(blocks) if block is not None and i in mix.speakers]
    if len(used) == 1:
        return used[0][1]
    base = used[0][1].float()
    z, banned = base.clone(), torch.isneginf(base)
    for i, block in used[1:]:
        logits = block.float()
        weight = _solved(mix, base, logits) if mix.target_kl is not None else mix.weights[i]
        z += (logits - base).mul_(weight)
        banned |= torch.isneginf(logits)
    return z.masked_fill_(banned, -torch.inf)


def _solved(mix: Mix, reference: Tensor, aligned: Tensor) -> Tensor:
    """[n, 1] weights of the second model that `mix.target_kl` leads to."""
    assert mix.target_kl is not None
    pairs = zip(reference.cpu().numpy(), aligned.cpu().numpy(), strict=True)
    weights = [weight_for_kl(*pair, mix.target_kl, mix.max_weight).weight for pair in pairs]
    return torch.tensor(weights, dtype=torch.float32, device=reference.device)[:, None]


def plausible_row(mixed: HostRow, rows: Rows, mix: Mix, vocab_size: int) -> HostRow:
    """A mixed row without the tokens the judging model finds implausible.

    Raises:
        NumericError: that model's row holds NaN or +inf, or nothing but -inf.
    """
    if not mix.plausibility:
        return mixed
    row = rows[mix.plausibility_model]
    assert row is not None
    judge = row.host[:vocab_size]
    top = judge.max()
    if not np.isfinite(top):
        raise NumericError(f"a row of logits has maximum {top}: the model produced NaN, +inf or nothing but -inf")
    kept = np.full_like(mixed, -np.inf)
    plausible = judge >= top + np.log(mix.plausibility)
    kept[:vocab_size][plausible] = mixed[:vocab_size][plausible]
    return kept


@dataclass(frozen=True)
class Solved:
    """The weight a divergence asked for leads to, and the divergence it gives."""

    weight: float
    kl: float


def weight_for_kl(reference: HostRow, aligned: HostRow, target: float, most: float) -> Solved:
    """The weight w in [0, most] for which KL(softmax(h_r + w (h_a - h_r)) || softmax(h_r)) is `target`, or `most`.

    The divergence grows with w at the rate w Var_w(h_a - h_r), so Newton's steps, kept inside a bracket, need few rounds.
    Where no weight gives so much, the most that is allowed is taken. Computed in double, row by row.
    """
    proper = np.isfinite(reference) & np.isfinite(aligned)
    h = reference[proper].astype(np.float64)
    delta = aligned[proper].astype(np.float64) - h
    if not len(h):
        return Solved(0.0, 0.0)
    top = h.max()
    # Of the reference with the tokens the aligned model rules out: at any weight above 0 the mixture has lost them.
    lse = np.log(np.exp(reference[np.isfinite(reference)].astype(np.float64) - top).sum())
    delta -= delta.mean()  # a constant changes nothing, and a large one would cancel badly
    h -= top

    def at(weight: float) -> tuple[float, float]:
        z = h + weight * delta
        top = z.max()
        p = np.exp(z - top)
        mass = p.sum()
        mean = float(p @ delta / mass)
        variance = float(p @ (delta - mean) ** 2 / mass)
        return weight * mean - float(top + np.log(mass) - lse), weight * variance

    kl, _ = at(most)
    if kl <= target:
        return Solved(most, kl)
    low, high, weight = 0.0, most, min(most, _first_guess(h, delta, target))
    for _ in range(_ROUNDS):
        kl, slope = at(weight)
        if abs(kl - target) <= _KL_TOLERANCE * target:
            break
        low, high = (weight, high) if kl < target else (low, weight)
        step = weight - (kl - target) / slope if slope > 0 else low
        weight = step if low < step < high else (low + high) / 2
    return Solved(weight, kl)


_ROUNDS, _KL_TOLERANCE = 60, 1e-6


def _first_guess(h: npt.NDArray[np.float64], delta: npt.NDArray[np.float64], target: float) -> float:
    """Near 0 the divergence is w^2 Var_0(delta) / 2."""
    p = np.exp(h - h.max())
    p /= p.sum()
    variance = float(p @ (delta - p @ delta) ** 2)
    return float(np.sqrt(2 * target / variance)) if variance > 0 else np.inf


def _run(draws: Sequence[MixDraw], vocab_size: int, stats: bool, plausible: int) -> tuple[MixSample, MixStats | None]:
    first = next(row for row in draws[0].rows if row is not None)
    device = first.source.there.device
    models = len(draws[0].mix.weights)
    logits = []
    for model in range(models):
        # A model of weight 0 is not read, so where it has no row any other stands in for it.
        mine = [one.rows[model] or next(row for row in one.rows if row is not None) for one in draws]
        logits.append(stacked(mine, device, vocab_size))
    if len({part.dtype for part in logits}) > 1:
        logits = [part.float() for part in logits]
    numbers = torch.tensor(
        [(*d.mix.weights, d.shape.temperature, d.shape.top_p, d.shape.min_p, d.mix.plausibility) for d in draws],
        dtype=torch.float32,
    ).to(device)  # fmt: skip
    weights, (temperature, top_p, min_p, share) = numbers[:, :models].contiguous(), numbers[:, models:].t().contiguous()
    words = [(d.name[0], d.name[1], d.name[1] >> 64, min(d.shape.top_k, vocab_size)) for d in draws]
    whole = torch.tensor([[_signed(word) for word in row] for row in words], dtype=torch.int64).to(device)
    return mix_sample(
        logits, weights, temperature=temperature, top_k=whole[:, 3].int(), top_p=top_p, min_p=min_p,
        seed=whole[:, 0].contiguous(), position=whole[:, 1:3].contiguous(),
        plausibility=share if any(d.mix.plausibility for d in draws) else None, plausibility_model=plausible,
        vocab_size=vocab_size, stats=stats,
    )  # fmt: skip


def _signed(word: int) -> int:
    """The low 64 bits as an int64."""
    word &= _MASK64
    return word - (word >> 63 << 64)


def _drawn(draws: Sequence[MixDraw], sample: MixSample, stats: MixStats | None) -> list[Drawn | Exception]:
    tokens, probs, logprobs = (column.tolist() for column in sample)
    columns = None if stats is None else [column.tolist() for column in stats]
    found: list[Drawn | Exception] = []
    for i, one in enumerate(draws):
        if tokens[i] < 0:
            found.append(
                NumericError("a row of mixed logits holds NaN or +inf, or nothing but -inf: a model produced no number")
            )
            continue
        measured = None if columns is None else _measured(one.mix, [column[i] for column in columns])
        found.append(Drawn(tokens[i], probs[i], logprobs[i], measured))
    return found


def _measured(mix: Mix, values: Sequence[object]) -> Measured:
    """Statistics of one row in the order of MixStats."""
    stats = MixStats(*values)  # type: ignore[arg-type]
    return Measured(
        weights=mix.weights,
        logprob_models=tuple(stats.logprob_models),
        log_z=float(stats.log_z),
        entropy=float(stats.entropy),
        kl_models=tuple(stats.kl_mix),
    )
