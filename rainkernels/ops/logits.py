"""The last step of a decoding step: mix models' logits, filter, draw, and measure; ranks of given tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rainkernels._checks import FLOATS, check_tensor
from rainkernels._lanes import choose_lane
from rainkernels.errors import DtypeError, RangeError, ShapeError, StrideError
from rainkernels.reference import logits as reference

__all__ = [
    "MAX_MODELS", "MixSample", "MixStats", "Order", "Rank", "mix_sample", "mix_sample_workspace", "rank", "rank_workspace",
]  # fmt: skip

MAX_MODELS = 8
Order = Literal["k_p_min", "min_k_p", "joint"]
# Positions shared with csrc/include/rainkernels/logits.h (enum FilterOrder).
_ORDERS = ("k_p_min", "min_k_p", "joint")
# Per-row parameters, in the order of their checks. A rule's number is its place, shared with enum MixRule.
_PARAMETERS = {
    "weights": "every weight must be finite",
    "temperature": "it must be finite and >= 0; 0 takes the most likely token",
    "top_k": "it must be >= 0; 0 switches it off",
    "top_p": "it must be in (0, 1]; 1 switches it off",
    "min_p": "it must be in [0, 1]; 0 switches it off",
    "plausibility": "it must be in [0, 1]; 0 switches it off",
}

# Signatures of calls that passed every check: a decoding loop repeats a few of them.
_CHECKED: set[object] = set()


class MixSample(NamedTuple):
    """What was drawn, one entry per row."""

    token: Tensor  # [B] int32, -1 where the row is invalid
    prob: Tensor  # [B] float32, probability in the filtered distribution; 1 for greedy, NaN where invalid
    logprob: Tensor  # [B] float32, under the mixture: full vocabulary, before bias, temperature and filters


class MixStats(NamedTuple):
    """The mixture and its models over the full vocabulary, before bias, temperature and filters; nats, float32.

    NaN for invalid rows, and for a model that is no distribution (weight 0 and NaN, +inf or -inf everywhere).
    """

    logprob_models: Tensor  # [B, N] of the drawn token under each model
    lse_mix: Tensor  # [B] log-sum-exp of the mixed logits
    lse_models: Tensor  # [B, N]
    log_z: Tensor  # [B] lse_mix - sum_i w_i lse_i, models of weight 0 skipped
    entropy: Tensor  # [B] of the mixture
    kl_mix: Tensor  # [B, N] KL(mixture || model i)
    kl_ref: Tensor  # [B, N] KL(model i || model 0); column 0 is 0


class Rank(NamedTuple):
    """Where a token stands in the base model's order, and both models' view of it; one entry per row."""

    rank: Tensor  # [B] int32, from 1; ties count by lower id; 0 where the row is invalid
    kl: Tensor  # [B] float32, KL(aligned || base), nats; NaN where invalid, as the next two
    logprob_base: Tensor  # [B] float32
    logprob_aligned: Tensor  # [B] float32


def mix_sample_workspace(batch: int, num_models: int, vocab_size: int, device: torch.device | str) -> int:
    """Number of float32 elements `mix_sample` wants as workspace for these sizes; 0 on the cpu."""
    return _workspace(batch, num_models, vocab_size, torch.device(device))


def rank_workspace(batch: int, vocab_size: int, device: torch.device | str) -> int:
    """Number of float32 elements `rank` wants as workspace for these sizes; 0 on the cpu."""
    return _workspace(batch, 2, vocab_size, torch.device(device))


def _workspace(batch: int, num_models: int, vocab_size: int, device: torch.device) -> int:
    if choose_lane("logits", device) != "triton":
        return 0
    from rainkernels.triton import logits as kernels

    return int(kernels.workspace_floats(batch, num_models, vocab_size))


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
                      stride, 0 too (`expand`); a model of weight 0 is not read, unless `stats` asks
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
        out, out_stats: results to write into, contiguous;  workspace: [>= mix_sample_workspace(...)] float32
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
        signature = (
            tuple((h.shape, h.stride(), h.dtype, h.device, h.is_neg()) for h in logits),
            tuple(
                None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.is_neg())
                for t in (weights, temperature, seed, position, workspace, *optional, *(out or ()), *(out_stats or ()))
            ),
            out is None, out_stats is None, plausibility_model, order, vocab_size, stats,
        )  # fmt: skip
        known = signature in _CHECKED
    except (AttributeError, TypeError):  # not a tensor: the checks say which
        signature, known = None, False
    if not known:
        _check_mix(
            logits, weights, temperature, top_k, top_p, min_p, seed, position, bias, plausibility, plausibility_model,
            order, vocab_size, stats, out, out_stats, workspace,
        )  # fmt: skip
        if len(_CHECKED) >= 1024:
            _CHECKED.clear()
        if signature is not None:
            _CHECKED.add(signature)
    rows, models = weights.shape
    width = min(h.shape[1] for h in logits) if vocab_size is None else vocab_size
    device = weights.device
    lane = choose_lane("logits", device)
    if lane != "cpu" and device.type == "cpu":
        given = {"weights": weights, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        _check_values({**given, "plausibility": plausibility})
    if lane == "reference":
        drawn, measured = reference.mix_sample(
            logits, weights, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
            position=position, bias=bias, plausibility=plausibility, plausibility_model=plausibility_model,
            order=order, vocab_size=width, stats=stats,
        )  # fmt: skip
        sample = MixSample(*drawn) if out is None else MixSample(*(o.copy_(t) for o, t in zip(out, drawn, strict=True)))
        if measured is None:
            return sample, None
        if out_stats is None:
            return sample, MixStats(*measured)
        return sample, MixStats(*(o.copy_(t) for o, t in zip(out_stats, measured, strict=True)))
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
    raise NotImplementedError


def _empty_stats(rows: int, models: int, device: torch.device) -> MixStats:
    each, both = ((rows,), (rows, models))
    shapes = (both, each, both, each, each, both, both)
    return MixStats(*(torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes))


def _check_mix(
    logits: Sequence[Tensor], weights: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None,
    min_p: Tensor | None, seed: Tensor, position: Tensor, bias: Tensor | None, plausibility: Tensor | None,
    plausibility_model: int, order: str, vocab_size: int | None, stats: bool, out: MixSample | None,
    out_stats: MixStats | None, workspace: Tensor | None,
) -> None:  # fmt: skip
    if isinstance(logits, Tensor) or not isinstance(logits, Sequence):
        raise DtypeError(f"logits must be a list of tensors, one per model, got {type(logits).__name__}: use [logits]")
    models = len(logits)
    if not 1 <= models <= MAX_MODELS:
        raise ShapeError(f"logits has {models} models, allowed are 1..{MAX_MODELS}")
    check_tensor("logits[0]", logits[0], dtype=FLOATS, shape=(None, None), contiguous=False)
    device, dtype, rows = logits[0].device, logits[0].dtype, logits[0].shape[0]
    for i, h in enumerate(logits):
        check_tensor(f"logits[{i}]", h, dtype=dtype, shape=(rows, None), device=device, contiguous=False)
        _check_rows(f"logits[{i}]", h)
    width = _check_vocab_size(vocab_size, [h.shape[1] for h in logits])
    check_tensor("weights", weights, dtype=torch.float32, shape=(rows, models), device=device)
    each: dict[str, tuple[Tensor | None, torch.dtype]] = {
        "temperature": (temperature, torch.float32), "top_k": (top_k, torch.int32), "top_p": (top_p, torch.float32),
        "min_p": (min_p, torch.float32), "seed": (seed, torch.int64), "plausibility": (plausibility, torch.float32),
    }  # fmt: skip
    for name, (t, wanted) in each.items():
        if t is not None or name in ("temperature", "seed"):
            check_tensor(name, t, dtype=wanted, shape=(rows,), device=device)  # type: ignore[arg-type]
    check_tensor("position", position, dtype=torch.int64, device=device)
    if tuple(position.shape) not in ((rows,), (rows, 2)):
        raise ShapeError(f"position has shape {list(position.shape)}, expected [{rows}] or [{rows}, 2]")
    if bias is not None:
        check_tensor("bias", bias, dtype=torch.float32, shape=(rows, width), device=device, contiguous=False)
        _check_rows("bias", bias)
    if isinstance(plausibility_model, bool) or not isinstance(plausibility_model, int):
        raise DtypeError(f"plausibility_model must be an int, got {type(plausibility_model).__name__}")
    if not 0 <= plausibility_model < models:
        raise RangeError(f"plausibility_model is {plausibility_model}, allowed are 0..{models - 1}")
    if order not in _ORDERS:
        raise RangeError(f"order is {order!r}, allowed are {', '.join(map(repr, _ORDERS))}")
    results: list[tuple[str, Sequence[Tensor] | None, type[Any]]] = [
        ("out", out, MixSample), ("out_stats", out_stats, MixStats),
    ]  # fmt: skip
    for name, result, kind in results:
        if result is not None and not isinstance(result, kind):
            raise DtypeError(f"{name} must be a {kind.__name__}, got {type(result).__name__}")
    if out is not None:
        for field, t in out._asdict().items():
            wanted = torch.int32 if field == "token" else torch.float32
            check_tensor(f"out.{field}", t, dtype=wanted, shape=(rows,), device=device)
    if out_stats is not None:
        for field, t in out_stats._asdict().items():
            shape = (rows,) if field in ("lse_mix", "log_z", "entropy") else (rows, models)
            check_tensor(f"out_stats.{field}", t, dtype=torch.float32, shape=shape, device=device)
    _check_workspace(workspace, rows, models, width, device)


def _check_rows(name: str, t: Tensor) -> None:
    if t.shape[1] > 1 and t.stride(1) != 1:
        raise StrideError(f"{name} has strides {list(t.stride())}, the last must be 1: call .contiguous()")


def _check_vocab_size(vocab_size: int | None, widths: list[int]) -> int:
    least = min(widths)
    if vocab_size is None:
        vocab_size = least
    elif isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise DtypeError(f"vocab_size must be an int or None, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= least:
        raise RangeError(f"vocab_size is {vocab_size}, allowed are 1..{least}: the logits have widths {widths}")
    if vocab_size >= 1 << 31:
        raise RangeError(f"vocab_size is {vocab_size}, token ids are int32: allowed are 1..{(1 << 31) - 1}")
    return vocab_size


def _check_workspace(workspace: Tensor | None, rows: int, models: int, width: int, device: torch.device) -> None:
    if workspace is None:
        return
    check_tensor("workspace", workspace, dtype=torch.float32, shape=(None,), device=device)
    wanted = _workspace(rows, models, width, device)
    if workspace.shape[0] < wanted:
        raise ShapeError(
            f"workspace has {workspace.shape[0]} elements, {wanted} are needed: see mix_sample_workspace()"
        )


def _check_values(given: dict[str, Tensor | None]) -> None:
    """RangeError for the first row with a bad parameter: by parameter, then by row, as the cpu lane finds it."""
    for name, t in given.items():
        if t is None:
            continue
        wrong = ~torch.isfinite(t) if name == "weights" else t < 0
        if name in ("top_p", "min_p", "plausibility"):
            wrong = ~((t >= 0) & (t <= 1) & ((t > 0) | (name != "top_p")))
        elif name == "temperature":
            wrong = ~((t >= 0) & (t < float("inf")))
        if bool(wrong.any()):
            row = int(wrong.reshape(wrong.shape[0], -1).any(dim=1).nonzero()[0])
            raise _value_error(name, t, row)


def _value_error(name: str, t: Tensor, row: int) -> RangeError:
    return RangeError(f"{name}[{row}] is {t[row].tolist()}, {_PARAMETERS[name]}")


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
    check_tensor("base", base, dtype=FLOATS, shape=(None, None), contiguous=False)
    device, rows = base.device, base.shape[0]
    check_tensor("aligned", aligned, dtype=base.dtype, shape=(rows, None), device=device, contiguous=False)
    check_tensor("token", token, dtype=(torch.int32, torch.int64), shape=(rows,), device=device)
    for name, h in (("base", base), ("aligned", aligned)):
        _check_rows(name, h)
    width = _check_vocab_size(vocab_size, [base.shape[1], aligned.shape[1]])
    if out is not None:
        if not isinstance(out, Rank):
            raise DtypeError(f"out must be a Rank, got {type(out).__name__}")
        for field, t in out._asdict().items():
            wanted = torch.int32 if field == "rank" else torch.float32
            check_tensor(f"out.{field}", t, dtype=wanted, shape=(rows,), device=device)
    _check_workspace(workspace, rows, 2, width, device)
    if device.type == "cpu" and rows:
        wrong = (token < 0) | (token >= width)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise RangeError(f"token[{row}] is {int(token[row])}, allowed are 0..{width - 1}")
    lane = choose_lane("logits", device)
    if lane == "reference":
        found = reference.rank(base, aligned, token, vocab_size=width)
        return Rank(*found) if out is None else Rank(*(o.copy_(t) for o, t in zip(out, found, strict=True)))
    if out is None:
        values = torch.empty((3, rows), dtype=torch.float32, device=device)
        out = Rank(torch.empty(rows, dtype=torch.int32, device=device), *values.unbind(0))
    if rows == 0:
        return out
    if lane == "triton":
        from rainkernels.triton import logits as kernels

        if workspace is None:
            workspace = torch.empty(kernels.workspace_floats(rows, 2, width), dtype=torch.float32, device=device)
        # Ids too large for int32 become -1, which is as invalid.
        small = token if token.dtype == torch.int32 else token.where(token < width, -1).to(torch.int32)
        kernels.rank(base, aligned, small, width, out, workspace)
        return out
    raise NotImplementedError
