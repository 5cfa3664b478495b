"""Launchers of the edits family's Triton lane. Reached through rainkernels.ops.edits, which checks every argument.

A launch allocates nothing and looks at no value: slots and tables are read on the device, so a captured graph follows
them. Rows up to MAX_REGISTER_ROW elements stay in registers; wider ones are walked in blocks. A shared basis runs as
tiles of sixteen rows. Bits of a row depend on the row and its slot alone.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rainkernels.triton.aot import AotKernel
from rainkernels.triton.edits_basis import ROWS, edit_basis_kernel
from rainkernels.triton.edits_rows import edit_row_kernel, edit_wide_row_kernel

if TYPE_CHECKING:
    from rainkernels.ops.edits import BasisTable, EditTable

__all__ = ["MAX_REGISTER_ROW", "add_edit_rmsnorm", "aot_kernels", "edit_"]

MAX_REGISTER_ROW = 8192


def edit_(x: Tensor, table: EditTable | BasisTable, slots: Tensor) -> None:
    """Arguments of `rainkernels.ops.edits.edit_`, checked; x has elements."""
    _launch(x, table, slots, x, x, x, 0.0, 0.0, {"FUSED": False, "BLOCK_OUT": False, "GEMMA": False})


def add_edit_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor, table: EditTable | BasisTable | None, slots: Tensor | None, out: Tensor,
    eps: float, tap: str, weight_offset: float, cast: str,
) -> None:  # fmt: skip
    """Arguments of `rainkernels.ops.edits.add_edit_rmsnorm`, checked; x has elements. Writes residual and out."""
    flags = {"FUSED": True, "BLOCK_OUT": tap == "block_out", "GEMMA": cast == "gemma"}
    _launch(x, table, slots, residual, weight, out, eps, weight_offset, flags)


def _launch(
    x: Tensor, table: Any, slots: Tensor | None, residual: Tensor, weight: Tensor, out: Tensor, eps: float, offset: float,
    flags: dict[str, bool],
) -> None:  # fmt: skip
    place = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    rows, hidden = x.shape
    strides = (x.stride(0), residual.stride(0), out.stride(0))
    add = True
    with place:
        if hasattr(table, "basis"):
            tensors = (slots, table.basis, table.scale, table.op, table.alpha, table.target, table.norm)
            tile_rows = int(ROWS.value)
            edit_basis_kernel[(-(-rows // tile_rows),)](
                x, residual, *tensors, *strides[:2], rows, table.num_slots, table.max_directions, hidden,
                FUSED=flags["FUSED"], BLOCK_OUT=flags["BLOCK_OUT"],
                **_basis_constants(table.max_directions, x.dtype, table.basis.dtype),
            )  # fmt: skip
            if not flags["FUSED"]:
                return
            table, add, flags = None, False, flags | {"BLOCK_OUT": False}
        # Without a table the pointers stand for nothing and are not followed.
        tensors, sizes = (x,) * 9, (1, 1)
        if table is not None:
            tensors = (
                slots, table.directions, table.scale, table.gram, table.op, table.alpha, table.target, table.count,
                table.norm,
            )  # fmt: skip
            sizes = (table.num_slots, table.max_directions)
        kernel = edit_row_kernel if hidden <= MAX_REGISTER_ROW else edit_wide_row_kernel
        kernel[(rows,)](
            x, residual, out, weight, *tensors, *strides, *sizes, hidden, eps, offset,
            **flags, ADD=add, EDITS=table is not None, **_row_constants(hidden, sizes[1]),
        )  # fmt: skip


def _row_constants(hidden: int, num_directions: int) -> dict[str, int]:
    """In registers: eight elements per thread, so that four directions fit beside the row.

    In the widest 32, whose 255 registers hold them; 16 elements in 128 registers spill under Triton 3.6.
    """
    if hidden > MAX_REGISTER_ROW:
        return {"BLOCK": 4096, "ROOM": _room(num_directions), "num_warps": 8, "num_stages": 2}
    block = max(128, 1 << (hidden - 1).bit_length())
    return {"BLOCK": block, "num_warps": 8 if block > 4096 else max(1, block // 256), "num_stages": 1}


# Room for directions -> elements of a block, warps: for a bfloat16 basis, and for one multiplied as float32. Found by
# compiling for sm_80 and sm_90 under Triton 3.6 and 3.9, most larger ones spill.
_NARROW_BASIS = {16: (32, 4), 64: (128, 8), 256: (32, 8)}
_BASIS = {16: (64, 4), 64: (64, 8), 256: (16, 8)}


def _basis_constants(num_directions: int, rows: torch.dtype, basis: torch.dtype) -> dict[str, int | bool]:
    room = _room(num_directions)
    narrow = rows == basis == torch.bfloat16
    block, warps = (_NARROW_BASIS if narrow else _BASIS)[room]
    return {"NARROW": narrow, "BLOCK": block, "ROOM": room, "num_warps": warps, "num_stages": 2}


def _room(num_directions: int) -> int:
    """Few sizes: each is a compilation."""
    return next(room for room in (16, 64, 256) if num_directions <= room)


_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_FORMS: dict[str, dict[str, bool]] = {
    "edit": {"FUSED": False, "BLOCK_OUT": False, "GEMMA": False},
    "mlp_out-llama": {"FUSED": True, "BLOCK_OUT": False, "GEMMA": False},
    "block_out-gemma": {"FUSED": True, "BLOCK_OUT": True, "GEMMA": True},
}
_FLOAT_TABLE, _INT_TABLE = ("scale", "gram", "alpha", "target"), ("slots", "op", "count", "norm")


def aot_kernels() -> list[AotKernel]:
    """A sample of what the launchers can choose: every form, the widest rows and the most directions of each kind.

    All forms in bfloat16 and float32; float16, and rows with a wider table, come in one form. Other sizes are not compiled.
    """
    found = []
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    work = [(bf16, bf16, form) for form in _FORMS] + [(fp32, fp32, form) for form in _FORMS]
    for rows, stored, form in [*work, (fp16, fp16, "block_out-gemma"), (bf16, fp32, "mlp_out-llama")]:
        tag = f"{form}-{_TYPES[rows][1:]}-{_TYPES[stored][1:]}"
        flags = _FORMS[form]
        for hidden in (100, 4096, 8192) if rows == stored == bf16 else (4096, 8192):
            constants = flags | {"ADD": True, "EDITS": True} | _row_constants(hidden, 4)
            found.append(_aot(f"edits_row-{tag}-d{hidden}", edit_row_kernel, rows, stored, constants))
        constants = flags | {"ADD": True, "EDITS": True} | _row_constants(16384, 256)
        found.append(_aot(f"edits_wide-{tag}-k256", edit_wide_row_kernel, rows, stored, constants))
        for room in (16, 64, 256):
            constants = {n: flags[n] for n in ("FUSED", "BLOCK_OUT")} | _basis_constants(room, rows, stored)
            found.append(_aot(f"edits_basis-{tag}-r{room}", edit_basis_kernel, rows, stored, constants))
    sizes = ((edit_row_kernel, 8192), (edit_wide_row_kernel, 16384))
    for rows, (kernel, hidden), add in itertools.product((bf16, fp32), sizes, (True, False)):
        constants = _FORMS["mlp_out-llama"] | {"ADD": add, "EDITS": False} | _row_constants(hidden, 1)
        name = f"edits_{'plain' if add else 'norm'}-{_TYPES[rows][1:]}-d{hidden}"
        found.append(_aot(name, kernel, rows, rows, constants))
    return found


def _aot(name: str, fn: Any, rows: torch.dtype, stored: torch.dtype, constants: dict[str, Any]) -> AotKernel:
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    names = [n for n in fn.arg_names if n not in constants]
    edits = constants.get("EDITS", True)
    types = dict.fromkeys(names, "i32")
    for n in names:
        if n in ("eps", "offset"):
            types[n] = "fp32"
        elif n in ("x", "residual", "out", "weight") or (not edits and n in (*_FLOAT_TABLE, *_INT_TABLE)):
            types[n] = _TYPES[rows]
        elif n in ("directions", "basis"):
            types[n] = _TYPES[stored]
        elif n in _FLOAT_TABLE:
            types[n] = "*fp32"
        elif n in _INT_TABLE:
            types[n] = "*i32"
    # Row sizes and strides that are multiples of 16, as all common models have them.
    loose = ("eps", "offset", "num_rows", "num_slots", "num_directions", *(("hidden",) if "-d100" in name else ()))
    aligned = tuple(n for n in names if n not in loose)
    return AotKernel(name, fn, types, constants, warps, stages, aligned)
