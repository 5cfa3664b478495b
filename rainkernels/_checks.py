"""Argument checks shared by the ops: device, dtype, rank, shape, stride, in this order, each naming the argument."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from rainkernels.errors import DeviceError, DtypeError, ShapeError, StrideError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Order shared with csrc/include/rainkernels/dtypes.h.
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DEVICE_TYPES = ("cpu", "cuda")


def check_tensor(
    name: str,
    t: Tensor,
    *,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    shape: Sequence[int | None] | None = None,
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """Raise a typed error unless `t` is what the op takes. `None` in `shape` matches any size."""
    if not isinstance(t, Tensor):
        raise DtypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.device.type not in DEVICE_TYPES:
        raise DeviceError(f"{name} is on {t.device}, allowed: {', '.join(DEVICE_TYPES)}: move it with .to('cpu')")
    if device is not None and t.device != device:
        raise DeviceError(
            f"{name} is on {t.device}, expected {device} like the other tensors: move it with .to({str(device)!r})"
        )
    if dtype is not None:
        allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        if t.dtype not in allowed:
            raise DtypeError(f"{name} has dtype {t.dtype}, allowed: {', '.join(map(str, allowed))}")
    if shape is not None:
        if t.dim() != len(shape):
            raise ShapeError(f"{name} has rank {t.dim()} (shape {list(t.shape)}), expected shape {_show(shape)}")
        if any(want is not None and want != got for want, got in zip(shape, t.shape, strict=True)):
            raise ShapeError(f"{name} has shape {list(t.shape)}, expected {_show(shape)}")
    if t.layout != torch.strided:
        raise StrideError(f"{name} has layout {t.layout}, expected plain memory: call .to_dense()")
    # The kernels read memory as it lies; a lazy view holds the values before the sign change.
    if t.is_neg() or t.is_conj():
        raise StrideError(
            f"{name} is a lazy negative/conjugate view: call .resolve_neg()/.resolve_conj() to write its values out"
        )
    if contiguous and not t.is_contiguous():
        raise StrideError(f"{name} has strides {list(t.stride())}, expected contiguous memory: call .contiguous()")


def is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a Python number that a double holds."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def check_outputs(name: str, out: Sequence[Tensor], fields: Sequence[str]) -> None:
    """Raise unless `out` is one thing per field, in their order: the tensors are for check_tensor to judge."""
    if not isinstance(out, (tuple, list)) or len(out) != len(fields):
        given = f"{len(out)} of them" if isinstance(out, (tuple, list)) else type(out).__name__
        raise DtypeError(f"{name} must be a tuple of {len(fields)} tensors ({', '.join(fields)}), got {given}")


def _show(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
