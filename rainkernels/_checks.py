"""Argument checks shared by the ops, each naming the argument. Of a tensor: device, dtype, rank, shape, stride, in this order.

Numbers are Python's: an int where something is counted, else an int or a float (numpy.float64 is one), never a bool. Any other
type, numpy scalars and 0-d tensors included, is a DtypeError; a value out of range is a RangeError.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rainkernels.errors import DeviceError, DtypeError, RangeError, ShapeError, StrideError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Order shared with csrc/include/rainkernels/dtypes.h.
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DEVICE_TYPES = ("cpu", "cuda")
_FLOAT32_MAX = torch.finfo(torch.float32).max
# The largest number that float32 rounds to 0: half its smallest subnormal.
_FLOAT32_ZERO = 2.0**-150


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


def check_int(name: str, value: object, low: int, high: int = (1 << 31) - 1, hint: str = "") -> None:
    """Raise a typed error unless `value` is an int in low..high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise DtypeError(f"{name} must be a Python int, got {_type_name(value)}")
    if not low <= value <= high:
        raise RangeError(f"{name} is {_shown(value)}, allowed: {low}..{high}{hint and f'; {hint}'}")


def check_real(name: str, value: object, allowed: str, *, positive: bool = False, signed: bool = False) -> None:
    """Raise a typed error unless `value` is a number, finite in float32, and > 0, >= 0 or (`signed`) anything.

    The kernels take it as float32, where a positive number must not become 0 unless 0 and less are allowed as well.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DtypeError(f"{name} must be a Python number, got {_type_name(value)}")
    if not (abs(value) <= _FLOAT32_MAX and (signed or value > 0 or (value == 0 and not positive))):
        raise RangeError(f"{name} is {_shown(value)}, {allowed}")
    if not signed and 0 < value <= _FLOAT32_ZERO:
        raise RangeError(f"{name} is {value}, which is 0 in float32: {allowed}")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise RangeError unless `value` is one of these names."""
    if not isinstance(value, str) or value not in allowed:
        raise RangeError(f"{name} is {value!r}, allowed: {', '.join(map(repr, allowed))}")


def check_no_grad(name: str, t: Tensor) -> None:
    """Raise DtypeError where autograd would have to follow a write into `t`: the kernels write behind its back."""
    if t.requires_grad and torch.is_grad_enabled():
        raise DtypeError(
            f"{name} requires grad and is written in place, which autograd would not see: call .detach(), or run under "
            "torch.no_grad() or torch.inference_mode()"
        )


def check_outputs(name: str, out: Sequence[Tensor], fields: Sequence[str]) -> None:
    """Raise unless `out` is one thing per field, in their order: the tensors are for check_tensor to judge."""
    if not isinstance(out, (tuple, list)) or len(out) != len(fields):
        given = f"{len(out)} of them" if isinstance(out, (tuple, list)) else type(out).__name__
        raise DtypeError(f"{name} must be a tuple of {len(fields)} tensors ({', '.join(fields)}), got {given}")


def _type_name(value: object) -> str:
    kind = Tensor if isinstance(value, Tensor) else type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _shown(value: float) -> str:
    """The number; Python refuses to write out very large ints."""
    return f"an int of {value.bit_length()} bits" if isinstance(value, int) and value.bit_length() > 64 else str(value)


def _show(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
