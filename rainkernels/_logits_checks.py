"""Results and argument checks of the logits family: what `rainkernels.ops.logits` promises before a kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rainkernels._checks import FLOATS, check_choice, check_int, check_no_grad, check_tensor
from rainkernels._lanes import choose_lane
from rainkernels.errors import DtypeError, RangeError, ShapeError, StrideError

__all__ = [
    "MAX_MODELS", "ORDERS", "PARAMETERS", "MixSample", "MixStats", "Rank", "check_mix", "check_rank", "check_values",
    "check_workspace_sizes", "value_error", "workspace_floats",
]  # fmt: skip

MAX_MODELS = 8
# Positions shared with csrc/include/rainkernels/logits.h (enum FilterOrder).
ORDERS = ("k_p_min", "min_k_p", "joint")
# Per-row parameters, in the order of their checks: rule i of enum MixRule is the i-th, from 1.
PARAMETERS = {
    "weights": "every weight must be finite",
    "temperature": "it must be finite and >= 0; 0 takes the most likely token",
    "top_k": "it must be >= 0; 0 switches it off",
    "top_p": "it must be in (0, 1]; 1 switches it off",
    "min_p": "it must be in [0, 1]; 0 switches it off",
    "plausibility": "it must be in [0, 1]; 0 switches it off",
}


class MixSample(NamedTuple):
    """What was drawn, one entry per row."""

    token: Tensor  # [B] int32, -1 where the row is invalid
    prob: Tensor  # [B] float32, probability in the filtered distribution; 1 for greedy, NaN where invalid
    logprob: Tensor  # [B] float32, under the mixture: full vocabulary, before bias, temperature and filters


class MixStats(NamedTuple):
    """The mixture and its models over the full vocabulary, before bias, temperature and filters; nats, float32.

    Probabilities below 1e-38 are 0 in float32 and add nothing to the entropy or a KL.
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


def check_workspace_sizes(batch: int, num_models: int, vocab_size: int) -> None:
    """Raise a typed error unless a call may have these sizes."""
    check_int("batch", batch, 0)
    check_int("num_models", num_models, 1, MAX_MODELS)
    check_int("vocab_size", vocab_size, 1)


def workspace_floats(batch: int, num_models: int, vocab_size: int, device: torch.device) -> int:
    """Float32 elements of workspace the lane of `device` wants."""
    if choose_lane("logits", device) != "triton":
        return 0
    from rainkernels.triton import logits as kernels

    return int(kernels.workspace_floats(batch, num_models, vocab_size))


def check_mix(
    logits: Sequence[Tensor], weights: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None,
    min_p: Tensor | None, seed: Tensor, position: Tensor, bias: Tensor | None, plausibility: Tensor | None,
    plausibility_model: int, order: str, vocab_size: int | None, stats: bool,
    out: MixSample | None, out_stats: MixStats | None, workspace: Tensor | None,
) -> None:  # fmt: skip
    """Raise a typed error unless `mix_sample` takes these; values of parameters are looked at later."""
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
    check_int("plausibility_model", plausibility_model, 0, models - 1)
    check_choice("order", order, ORDERS)
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
            check_no_grad(f"out.{field}", t)
    if out_stats is not None and not stats:
        raise DtypeError("out_stats is given but stats is not True, so nothing would be written to it")
    if out_stats is not None:
        for field, t in out_stats._asdict().items():
            shape = (rows,) if field in ("lse_mix", "log_z", "entropy") else (rows, models)
            check_tensor(f"out_stats.{field}", t, dtype=torch.float32, shape=shape, device=device)
            check_no_grad(f"out_stats.{field}", t)
    _check_workspace(workspace, rows, models, width, device)


def _check_rows(name: str, t: Tensor) -> None:
    if t.shape[1] > 1 and t.stride(1) != 1:
        raise StrideError(f"{name} has strides {list(t.stride())}, the last must be 1: call .contiguous()")


def _check_vocab_size(vocab_size: int | None, widths: list[int]) -> int:
    least = min(widths)
    size = least if vocab_size is None else vocab_size
    # Token ids are int32.
    check_int("vocab_size", size, 1, min(least, (1 << 31) - 1), f"the logits have widths {widths}")
    return size


def _check_workspace(workspace: Tensor | None, rows: int, models: int, width: int, device: torch.device) -> None:
    if workspace is None:
        return
    check_tensor("workspace", workspace, dtype=torch.float32, shape=(None,), device=device)
    wanted = workspace_floats(rows, models, width, device)
    if workspace.shape[0] < wanted:
        raise ShapeError(
            f"workspace has {workspace.shape[0]} elements, {wanted} are needed: see mix_sample_workspace()"
        )


def check_values(given: Sequence[Tensor | None]) -> None:
    """RangeError for the first bad value of the parameters, in PARAMETERS' order: the fault the cpu lane finds."""
    for rule, (name, t) in enumerate(zip(PARAMETERS, given, strict=True), start=1):
        if t is None:
            continue
        if name == "weights":
            wrong = ~torch.isfinite(t).all(dim=1)
        elif name == "top_k":
            wrong = t < 0
        elif name == "temperature":
            wrong = ~((t >= 0) & (t < float("inf")))
        else:
            wrong = ~((t >= 0) & (t <= 1)) | (t == 0 if name == "top_p" else torch.zeros_like(t, dtype=torch.bool))
        if bool(wrong.any()):
            raise value_error(rule, t, int(wrong.nonzero()[0]))


def value_error(rule: int, t: Tensor | None, row: int) -> RangeError:
    """The error for parameter `rule` (enum MixRule), whose tensor is `t`, in one row."""
    name, allowed = tuple(PARAMETERS.items())[rule - 1]
    return RangeError(f"{name}[{row}] is {None if t is None else t[row].tolist()}, {allowed}")


def check_rank(
    base: Tensor, aligned: Tensor, token: Tensor, vocab_size: int | None, out: Rank | None, workspace: Tensor | None
) -> int:
    """Raise a typed error unless `rank` takes these; the vocabulary size they mean."""
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
            check_no_grad(f"out.{field}", t)
    _check_workspace(workspace, rows, 2, width, device)
    if device.type == "cpu" and rows:
        wrong = (token < 0) | (token >= width)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise RangeError(f"token[{row}] is {int(token[row])}, allowed are 0..{width - 1}")
    return width
