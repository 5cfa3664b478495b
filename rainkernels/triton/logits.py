"""Launchers of the logits family's Triton lane. Reached through rainkernels.ops.logits, which checks every argument.

Two launches per op: tiles of 1,024 tokens, each read once by a program of its own, then one program per row. What a
launch computes depends on the row alone; the batch only sets the number of programs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rainkernels.errors import RangeError
from rainkernels.triton import logits_filter, logits_mix
from rainkernels.triton.aot import ALL_REGISTERS, AotKernel
from rainkernels.triton.logits_rank import rank_rows_kernel, rank_tiles_kernel
from rainkernels.triton.logits_rows import mix_rows_kernel
from rainkernels.triton.logits_tiles import mix_tiles_kernel, plausible_tiles_kernel

if TYPE_CHECKING:
    from rainkernels.ops.logits import MixSample, MixStats, Rank

__all__ = ["aot_kernels", "mix_sample", "rank", "workspace_floats"]

_TILE = int(logits_mix.TILE.value)
# Tokens per step over a row: twice as many spill for some dtypes and numbers of models.
_ROW_BLOCK = 1024
_MAX_VOCAB = 1024 * _TILE  # one program combines the tiles of a row
_ORDERS = {
    "k_p_min": int(logits_filter.K_P_MIN.value),
    "min_k_p": int(logits_filter.MIN_K_P.value),
    "joint": int(logits_filter.JOINT.value),
}
_STAT_NAMES = (
    "logprob_models_out", "lse_mix_out", "lse_models_out", "log_z_out", "entropy_out", "kl_mix_out", "kl_ref_out",
)  # fmt: skip


def _pitch(vocab_size: int) -> int:
    """Floats from one field of the workspace to the next: the number of tiles, rounded up to 16."""
    return -(-vocab_size // (_TILE * 16)) * 16


def _row_floats(num_models: int, vocab_size: int) -> int:
    fields = int(logits_mix.F_MODEL.value) + 4 * num_models
    # The groups' largest scores, a list of groups, and a buffer of candidates (score, id).
    groups = 2 * int(logits_mix.GROUPS.value)
    return (fields + groups) * _pitch(vocab_size) + 2 * int(logits_filter.BUFFER.value)


def workspace_floats(batch: int, num_models: int, vocab_size: int) -> int:
    """Float32 elements of workspace for `mix_sample`, and with num_models = 2 for `rank`."""
    return batch * _row_floats(num_models, vocab_size)


def _tile_block(tiles: int) -> int:
    """A power of four that holds the tiles of a row, 16 at least: few configurations for all vocabularies."""
    block = 16
    while block < tiles:
        block *= 4
    return block


def _check_vocab_size(vocab_size: int) -> None:
    if vocab_size > _MAX_VOCAB:
        raise RangeError(f"vocab_size is {vocab_size}, the triton lane allows at most {_MAX_VOCAB}")


def _place(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """The device of `x` made the current one: Triton launches on that one, wherever the tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _row_warps(filters: bool) -> int:
    return 8 if filters else 4


def mix_sample(
    logits: Sequence[Tensor],
    weights: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    position: Tensor,
    bias: Tensor | None,
    plausibility: Tensor | None,
    plausibility_model: int,
    order: str,
    vocab_size: int,
    stats: bool,
    out: MixSample,
    out_stats: MixStats | None,
    workspace: Tensor,
) -> None:
    """Arguments of `rainkernels.ops.logits.mix_sample`, checked; position [B, 2]. Writes out and out_stats."""
    _check_vocab_size(vocab_size)
    rows, models = weights.shape
    tiles = -(-vocab_size // _TILE)
    # A model that is not there stands for by the first one; the kernels never look at it.
    given = [*logits, *[logits[0]] * (8 - models)]
    judge = logits[plausibility_model]
    common = {f"h{i}": h for i, h in enumerate(given)} | {f"s{i}": h.stride(0) for i, h in enumerate(given)}
    common |= {
        "weights": weights,
        "temperature": temperature,
        "bias": temperature if bias is None else bias,
        "bias_stride": 0 if bias is None else bias.stride(0),
        "plausible": judge,
        "plausible_stride": judge.stride(0),
        "plausibility": temperature if plausibility is None else plausibility,
    }
    places = {
        "workspace": workspace,
        "row_floats": _row_floats(models, vocab_size),
        "pitch": _pitch(vocab_size),
        "vocab": vocab_size,
        "tiles": tiles,
    }
    constants = {
        "N": models,
        "HAS_BIAS": bias is not None,
        "HAS_PLAUSIBLE": plausibility is not None,
        "TILES": _tile_block(tiles),
        "num_stages": 1,
    }
    filters = top_k is not None or top_p is not None or min_p is not None
    if out_stats is None:
        results = dict.fromkeys(_STAT_NAMES, out.prob)
    else:
        results = dict(zip(_STAT_NAMES, out_stats, strict=True))
    with _place(weights):
        if plausibility is not None:
            plausible_tiles_kernel[(rows * tiles,)](judge, judge.stride(0), **places, num_warps=4, num_stages=1)
        mix_tiles_kernel[(rows * tiles,)](
            **common, **places, **constants, STATS=out_stats is not None, FILTERS=filters, num_warps=4
        )
        mix_rows_kernel[(rows,)](
            **common, **places, **constants, BLOCK=_ROW_BLOCK,
            top_k=out.token if top_k is None else top_k,
            top_p=temperature if top_p is None else top_p,
            min_p=temperature if min_p is None else min_p,
            seed=seed, position=position, token_out=out.token, prob_out=out.prob, logprob_out=out.logprob, **results,
            given=sum((t is not None) << bit for bit, t in enumerate((top_k, top_p, min_p))), order=_ORDERS[order],
            STATS=out_stats is not None, FILTERS=filters, num_warps=_row_warps(filters), maxnreg=ALL_REGISTERS,
        )  # fmt: skip


def rank(base: Tensor, aligned: Tensor, token: Tensor, vocab_size: int, out: Rank, workspace: Tensor) -> None:
    """Arguments of `rainkernels.ops.logits.rank`, checked; token int32. Writes out."""
    _check_vocab_size(vocab_size)
    rows = base.shape[0]
    tiles = -(-vocab_size // _TILE)
    arguments = (
        base, aligned, token, base.stride(0), aligned.stride(0), workspace, _row_floats(2, vocab_size),
        _pitch(vocab_size), vocab_size, tiles,
    )  # fmt: skip
    with _place(base):
        rank_tiles_kernel[(rows * tiles,)](*arguments, num_warps=4, num_stages=1)
        rank_rows_kernel[(rows,)](*arguments, *out, TILES=_tile_block(tiles), num_warps=4, num_stages=1)


_TYPES = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}


def _mix_signature(dtype: str) -> dict[str, str]:
    logits = {f"h{i}": _TYPES[dtype] for i in range(8)} | {f"s{i}": "i32" for i in range(8)}
    return logits | {
        "weights": "*fp32", "temperature": "*fp32", "bias": "*fp32", "bias_stride": "i32", "plausible": _TYPES[dtype],
        "plausible_stride": "i32", "plausibility": "*fp32", "workspace": "*fp32", "row_floats": "i32", "pitch": "i32",
        "vocab": "i32", "tiles": "i32",
    }  # fmt: skip


_RESULTS = {"token_out": "*i32", "prob_out": "*fp32", "logprob_out": "*fp32", **dict.fromkeys(_STAT_NAMES, "*fp32")}
_ROW_PARAMETERS = {
    "top_k": "*i32", "top_p": "*fp32", "min_p": "*fp32", "given": "i32", "order": "i32", "seed": "*i64",
    "position": "*i64",
}  # fmt: skip


def aot_kernels() -> list[AotKernel]:
    """What the launchers choose: every dtype, number of tiles and switch, 1, 2, 3 and 8 models, rows aligned or not.

    The largest, 8 models with everything on, takes half a minute to compile and comes in bfloat16 only.

    Not every combination of them: the switches add code to a kernel, and are listed alone and all together.
    """
    kernels: list[AotKernel] = []
    for dtype in _TYPES:
        kernels += _mix_kernels(dtype, 2, stats=False, filters=True)
        kernels += _mix_kernels(dtype, 2, stats=True, filters=False)
    kernels += _mix_kernels("bf16", 8, stats=True, filters=True, bias=True, plausible=True)
    for models in (1, 3):
        kernels += _mix_kernels("bf16", models, stats=False, filters=False)
        kernels += _mix_kernels("bf16", models, stats=True, filters=True)
    kernels += _mix_kernels("bf16", 2, stats=False, filters=False, bias=True)
    kernels += _mix_kernels("bf16", 2, stats=False, filters=True, bias=True, plausible=True)
    for tiles in (16, 64, 1024):
        kernels += _mix_kernels("fp32", 2, stats=True, filters=True, tiles=tiles)
    kernels += _mix_kernels("bf16", 2, stats=True, filters=True, aligned_rows=False)
    for dtype in _TYPES:
        pointers = {"base": _TYPES[dtype], "aligned": _TYPES[dtype], "token": "*i32", "workspace": "*fp32"}
        sizes = dict.fromkeys(("base_stride", "aligned_stride", "row_floats", "pitch", "vocab", "tiles"), "i32")
        outs = {"rank_out": "*i32", **dict.fromkeys(("kl_out", "logprob_base_out", "logprob_aligned_out"), "*fp32")}
        aligned = (*pointers, "base_stride", "aligned_stride", "row_floats", "pitch", "vocab")
        kernels.append(AotKernel(f"rank_tiles-{dtype}", rank_tiles_kernel, pointers | sizes, {}, 4, 1, aligned))
        kernels.append(
            AotKernel(f"rank_rows-{dtype}", rank_rows_kernel, pointers | sizes | outs, {"TILES": 256}, 4, 1, aligned)
        )
        places = {"plausible": _TYPES[dtype], "stride": "i32", "workspace": "*fp32"}
        places |= dict.fromkeys(("row_floats", "pitch", "vocab", "tiles"), "i32")
        aligned = ("plausible", "stride", "workspace", "row_floats", "pitch", "vocab")
        kernels.append(AotKernel(f"plausible_tiles-{dtype}", plausible_tiles_kernel, places, {}, 4, 1, aligned))
    return kernels


def _mix_kernels(
    dtype: str, models: int, *, stats: bool, filters: bool, bias: bool = False, plausible: bool = False,
    tiles: int = 256, aligned_rows: bool = True,
) -> list[AotKernel]:  # fmt: skip
    signature = _mix_signature(dtype)
    constants: dict[str, Any] = {
        "N": models, "STATS": stats, "FILTERS": filters, "HAS_BIAS": bias, "HAS_PLAUSIBLE": plausible, "TILES": tiles,
    }  # fmt: skip
    aligned = [*(f"h{i}" for i in range(8)), "workspace", "row_floats", "pitch", "bias", "plausible"]
    if aligned_rows:
        aligned += [*(f"s{i}" for i in range(8)), "bias_stride", "plausible_stride", "vocab"]
    flags = {"stats": stats, "bias": bias, "plausible": plausible, "filters": filters, "odd": not aligned_rows}
    name = f"{dtype}-n{models}-t{tiles}" + "".join(f"-{flag}" for flag, on in flags.items() if on)
    rows = signature | _ROW_PARAMETERS | _RESULTS
    return [
        AotKernel(f"mix_tiles-{name}", mix_tiles_kernel, signature, constants, 4, 1, tuple(aligned)),
        AotKernel(
            f"mix_rows-{name}",
            mix_rows_kernel,
            rows,
            constants | {"BLOCK": _ROW_BLOCK},
            _row_warps(filters),
            1,
            tuple(aligned),
            ALL_REGISTERS,
        ),
    ]
