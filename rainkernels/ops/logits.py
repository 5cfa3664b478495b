"""The last step of a decoding step: mix models' logits, filter, draw, and measure; ranks of given tokens."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor

from rainkernels._checks import DTYPE_CODE
from rainkernels._lanes import choose_lane, native
from rainkernels._logits_checks import (
    MAX_MODELS,
    ORDERS,
    MixSample,
    MixStats,
    Rank,
    check_mix,
    check_rank,
    check_values,
    check_workspace_sizes,
    value_error,
    workspace_floats,
)
from rainkernels.errors import ShapeError
from rainkernels.reference import logits as reference

__all__ = [
    "MAX_MODELS", "MixSample", "MixStats", "Order", "Rank", "mix_sample", "mix_sample_workspace", "philox_uniforms", "rank",
    "rank_workspace",
]  # fmt: skip

Order = Literal["k_p_min", "min_k_p", "joint"]

_CPU = torch.device("cpu")
_MASK64 = (1 << 64) - 1
# Signatures of calls that passed every check: a decoding loop repeats a few of them.
_CHECKED: set[object] = set()


def mix_sample_workspace(batch: int, num_models: int, vocab_size: int, device: torch.device | str) -> int:
    """Number of float32 elements `mix_sample` wants as workspace for these sizes; 0 on the cpu.

    Raises:
        DtypeError, RangeError: naming the argument.
    """
    check_workspace_sizes(batch, num_models, vocab_size)
    return workspace_floats(batch, num_models, vocab_size, torch.device(device))


def rank_workspace(batch: int, vocab_size: int, device: torch.device | str) -> int:
    """Number of float32 elements `rank` wants as workspace for these sizes; 0 on the cpu. Errors as `mix_sample_workspace`."""
    check_workspace_sizes(batch, 2, vocab_size)
    return workspace_floats(batch, 2, vocab_size, torch.device(device))


def philox_uniforms(keys: Sequence[int], counters: Sequence[int]) -> list[float]:
    """One number in the open interval (0, 1) per draw: 52 bits of Philox4x32-10, those `mix_sample` draws with.

    Args:
        keys: of which the low 64 bits count.
        counters: of which the low 128 bits count, one per key.
    Raises:
        ShapeError: there are not as many keys as counters. TypeError: one of them is no int.
    Source: Salmon et al., SC 2011.  Reference: rainkernels.reference.logits.uniforms
    """
    if len(keys) != len(counters):
        raise ShapeError(f"{len(keys)} keys were given for {len(counters)} counters: give one each")
    whole = zip(map(index, keys), map(index, counters), strict=True)  # numpy's integers would overflow at the mask
    words = [w & _MASK64 for key, counter in whole for w in (key, counter, counter >> 64)]
    if choose_lane("logits", _CPU) != "cpu":
        table = torch.tensor([w - (w >> 63 << 64) for w in words], dtype=torch.int64).view(-1, 3)
        return list(map(float, reference.uniforms(table[:, 0], table[:, 1:])))
    numbers: list[float] = native().philox_uniforms(struct.pack(f"={len(words)}Q", *words))
    return numbers


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
    order: Order = "k_p_min",
    vocab_size: int | None = None,
    stats: bool = False,
    out: MixSample | None = None,
    out_stats: MixStats | None = None,
    workspace: Tensor | None = None,
) -> tuple[MixSample, MixStats | None]:
    """Mix the logits of N models row by row, filter, and draw one token per row.

    z = sum_i w_i h_i, or h_b + sum_i w_i (h_i - h_b) with b the first model of weight != 0 when the weights sum to 1 in
    float32 (so one model alone keeps its bits). Then: + bias, plausibility, / temperature, top-k, top-p, min-p, draw.

    Shapes:
        logits:       N in 1..8 tensors [B, V_i]  float32 | bfloat16 | float16 (all alike), last dim contiguous; any row
                      stride, 0 too (`expand`); a model of weight 0 is not read, unless by `stats` or as `plausibility_model`
        weights:      [B, N] float32; negative and > 1 allowed
        temperature:  [B] float32 >= 0; 0 takes the most likely token, the lowest id of equals
        top_k:        [B] int32, 0 off: exactly k tokens, of equals the lower ids
        top_p:        [B] float32 in (0, 1], 1 off: the fewest most likely tokens with at least this mass, one or more
        min_p:        [B] float32 in [0, 1], 0 off: tokens of at least this share of the largest probability
        seed:         [B] int64, its 64 bits are the Philox key
        position:     [B] or [B, 2] int64, the low (and high) 64 bits of the Philox counter
        bias:         [B, vocab_size] float32, added before temperature, -inf bans; any row stride
        plausibility: [B] float32 in [0, 1], 0 off: tokens whose probability under model `plausibility_model` is at
                      least this share of that model's largest
        order:        "k_p_min", or "min_k_p": each filter sees the renormalised survivors of the one before;
                      "joint": each judges the whole distribution, and what passes all is kept
        vocab_size:   tokens that exist, at most every V_i; ids from it on never come out and enter no sum. None: min V_i
        out, out_stats: results to write into, contiguous, the second with `stats` only;  workspace: [>= mix_sample_workspace(...)] float32
    Returns:
        (MixSample, MixStats or None without `stats`)
    Edge cases:
        -inf in any model of weight != 0 bans the token, whatever the weight's sign. NaN or +inf there or in the bias,
        nothing left to draw, or no weight != 0 make the row invalid: token -1, everything else NaN; other rows do not
        notice. On cuda, where looking would stop the stream, bad parameters make their row invalid as well.
        A row's token depends on its own logits, parameters, seed and position only: not on the batch or the threads.
    Raises:
        DeviceError, DtypeError, ShapeError, StrideError, RangeError: naming the argument.
    Devices: cpu, cuda (Triton; graph-safe when out and workspace are given and position is [B, 2]).
    Source: docs/methods.  Reference: rainkernels.reference.logits.mix_sample
    """
    optional = (top_k, top_p, min_p, bias, plausibility)
    try:
        lane = choose_lane("logits", weights.device)
        signature = (
            lane, type(logits), tuple((h.shape, h.stride(), h.dtype, h.device, h.is_neg()) for h in logits),
            tuple(
                None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.is_neg())
                for t in (weights, temperature, seed, position, workspace, *optional)
            ),
            tuple(
                (t.shape, t.stride(), t.dtype, t.device, t.is_neg(), t.requires_grad)
                for t in (*(out or ()), *(out_stats or ()))
            ),
            (out is not None or out_stats is not None) and torch.is_grad_enabled(), out_stats is not None and not stats,
            type(out), type(out_stats), type(plausibility_model), plausibility_model, order, type(vocab_size), vocab_size,
        )  # fmt: skip
        known = signature in _CHECKED
    except (AttributeError, TypeError, RuntimeError):  # not a dense tensor: the checks say which
        signature, known = None, False
    if not known:
        check_mix(
            logits, weights, temperature, top_k, top_p, min_p, seed, position, bias, plausibility, plausibility_model,
            order, vocab_size, stats, out, out_stats, workspace,
        )  # fmt: skip
        if len(_CHECKED) >= 1024:
            _CHECKED.clear()
        _CHECKED.add(signature)
    rows, models = weights.shape
    width = min(h.shape[1] for h in logits) if vocab_size is None else vocab_size
    device = weights.device
    if lane != "cpu" and device.type == "cpu":
        check_values((weights, temperature, top_k, top_p, min_p, plausibility))
    if lane == "reference":
        with torch.no_grad():
            drawn, measured = reference.mix_sample(
                logits, weights, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
                position=position, bias=bias, plausibility=plausibility, plausibility_model=plausibility_model,
                order=order, vocab_size=width, stats=stats,
            )  # fmt: skip
            return MixSample(*_into(out, drawn)), None if measured is None else MixStats(*_into(out_stats, measured))
    if out is None:
        values = torch.empty((2, rows), dtype=torch.float32, device=device)
        out = MixSample(torch.empty(rows, dtype=torch.int32, device=device), values[0], values[1])
    if stats and out_stats is None:
        out_stats = _empty_stats(rows, models, device)
    measured_into = out_stats if stats else None
    if rows == 0:
        return out, measured_into
    if lane == "triton":
        from rainkernels.triton import logits as kernels

        if workspace is None:
            workspace = torch.empty(kernels.workspace_floats(rows, models, width), dtype=torch.float32, device=device)
        if position.dim() == 1:
            position = torch.stack((position, torch.zeros_like(position)), dim=1)
        kernels.mix_sample(
            list(logits), weights, temperature, top_k, top_p, min_p, seed, position, bias, plausibility,
            plausibility_model, order, width, stats, out, measured_into, workspace,
        )  # fmt: skip
        return out, measured_into
    rule, row = native().mix_sample_cpu(
        tuple(x for h in logits for x in (h.data_ptr(), h.stride(0))), DTYPE_CODE[logits[0].dtype], rows, width,
        weights.data_ptr(), temperature.data_ptr(), _address(top_k), _address(top_p), _address(min_p),
        _address(plausibility), plausibility_model, ORDERS.index(order), seed.data_ptr(), position.data_ptr(),
        position.dim(), _address(bias), 0 if bias is None else bias.stride(0), out.token.data_ptr(),
        out.prob.data_ptr(), out.logprob.data_ptr(),
        () if measured_into is None else tuple(t.data_ptr() for t in measured_into), torch.get_num_threads(),
    )  # fmt: skip
    if rule:
        raise value_error(rule, (weights, temperature, top_k, top_p, min_p, plausibility)[rule - 1], row)
    return out, measured_into


def _into(out: Sequence[Tensor] | None, results: Sequence[Tensor]) -> Sequence[Tensor]:
    return results if out is None else [o.copy_(t) for o, t in zip(out, results, strict=True)]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _empty_stats(rows: int, models: int, device: torch.device) -> MixStats:
    each, both = ((rows,), (rows, models))
    shapes = (both, each, both, each, each, both, both)
    return MixStats(*(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes))


def rank(
    base: Tensor,
    aligned: Tensor,
    token: Tensor,
    *,
    vocab_size: int | None = None,
    out: Rank | None = None,
    workspace: Tensor | None = None,
) -> Rank:
    """Rank of a token in the base model's order of each row, with KL(aligned || base) and both log-probabilities.

    rank = 1 + #{v : base_v > base_token} + #{v < token : base_v == base_token}

    Shapes:
        base, aligned: [B, V], [B, V']  float32 | bfloat16 | float16 (both alike), last dim contiguous, any row stride
        token:         [B] int32 or int64, 0 <= token < vocab_size
        vocab_size:    tokens that exist; ids from it on enter no count and no sum. None: the smaller width
        out:           results to write into, contiguous;  workspace: [>= rank_workspace(...)] float32
    Edge cases:
        NaN, +inf or nothing but -inf in a row of either model make the row invalid: rank 0, the rest NaN. So does, on
        cuda, a token outside the vocabulary, which raises on the cpu.
    Raises:
        DeviceError, DtypeError, ShapeError, StrideError, RangeError: naming the argument.
    Devices: cpu, cuda (Triton; graph-safe when out and workspace are given and token is int32).
    Source: docs/methods.  Reference: rainkernels.reference.logits.rank
    """
    width = check_rank(base, aligned, token, vocab_size, out, workspace)
    device, rows = base.device, base.shape[0]
    lane = choose_lane("logits", device)
    if lane == "reference":
        with torch.no_grad():
            return Rank(*_into(out, reference.rank(base, aligned, token, vocab_size=width)))
    if out is None:
        values = torch.empty((3, rows), dtype=torch.float32, device=device)
        out = Rank(torch.empty(rows, dtype=torch.int32, device=device), *values.unbind(0))
    if rows == 0:
        return out
    if lane == "triton":
        from rainkernels.triton import logits as kernels

        if workspace is None:
            workspace = torch.empty(kernels.workspace_floats(rows, 2, width), dtype=torch.float32, device=device)
        kernels.rank(base, aligned, _as_int32(token, width), width, out, workspace)
        return out
    native().rank_cpu(
        base.data_ptr(), base.stride(0), aligned.data_ptr(), aligned.stride(0), DTYPE_CODE[base.dtype], rows, width,
        token.data_ptr(), token.element_size(), *(t.data_ptr() for t in out), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _as_int32(token: Tensor, width: int) -> Tensor:
    """Ids as the Triton lane takes them; those outside the vocabulary, which int32 might wrap into it, become -1."""
    if token.dtype == torch.int32:
        return token
    return token.where((token >= 0) & (token < width), -1).to(torch.int32)


_MIX_PARAMETERS = (
    "Tensor[] logits, Tensor weights, Tensor temperature, Tensor seed, Tensor position, Tensor? top_k=None, "
    "Tensor? top_p=None, Tensor? min_p=None, Tensor? bias=None, Tensor? plausibility=None, int plausibility_model=0, "
    "str order='k_p_min', int? vocab_size=None, bool stats=False"
)
_LIBRARY: Any = torch.library.Library("rainkernels", "FRAGMENT")
# token, prob, logprob, then the seven statistics, without elements unless stats.
_LIBRARY.define(f"mix_sample({_MIX_PARAMETERS}) -> ({', '.join(['Tensor'] * 10)})")
_LIBRARY.define(
    "logits_rank(Tensor base, Tensor aligned, Tensor token, int? vocab_size=None) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _mix_sample_op(
    logits: list[Tensor], weights: Tensor, temperature: Tensor, seed: Tensor, position: Tensor,
    top_k: Tensor | None = None, top_p: Tensor | None = None, min_p: Tensor | None = None, bias: Tensor | None = None,
    plausibility: Tensor | None = None, plausibility_model: int = 0, order: Order = "k_p_min",
    vocab_size: int | None = None, stats: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The dispatcher's form. Its results may not share memory, so they are allocated one by one."""
    out = MixSample(*_mix_sample_fake(logits, weights)[:3])
    _, measured = mix_sample(
        logits, weights, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, position=position,
        bias=bias, plausibility=plausibility, plausibility_model=plausibility_model, order=order,
        vocab_size=vocab_size, stats=stats, out=out,
    )  # fmt: skip
    return *out, *(measured if measured is not None else (weights.new_empty(0) for _ in range(7)))


def _mix_sample_fake(
    logits: list[Tensor], weights: Tensor, *others: object, stats: bool = False, **options: object
) -> tuple[Tensor, ...]:
    rows, models = weights.shape
    given = bool(others[11]) if len(others) > 11 else stats
    each, both = weights.new_empty, (rows, models)
    shapes = (both, rows, both, rows, rows, both, both) if given else (0,) * 7
    sample = each(rows, dtype=torch.int32), each(rows), each(rows)
    return *sample, *(each(shape) for shape in shapes)


def _rank_op(base: Tensor, aligned: Tensor, token: Tensor, vocab_size: int | None = None) -> tuple[Tensor, ...]:
    out = Rank(*_rank_fake(base, aligned, token))
    return tuple(rank(base, aligned, token, vocab_size=vocab_size, out=out))


def _rank_fake(base: Tensor, aligned: Tensor, token: Tensor, vocab_size: int | None = None) -> tuple[Tensor, ...]:
    rows = base.shape[0]
    values = (base.new_empty(rows, dtype=torch.float32) for _ in range(3))
    return base.new_empty(rows, dtype=torch.int32), *values


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("mix_sample", _mix_sample_op, _key)
    _LIBRARY.impl("logits_rank", _rank_op, _key)
torch.library.register_fake("rainkernels::mix_sample", _mix_sample_fake, lib=_LIBRARY)
torch.library.register_fake("rainkernels::logits_rank", _rank_fake, lib=_LIBRARY)
