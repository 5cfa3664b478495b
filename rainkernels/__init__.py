"""Kernels for decoding-time alignment: batched PUCT trees, tree KV slots and tree attention.

The public ops are in `rainkernels.ops`; each is documented with shapes, dtypes and errors, and defined by the plain
PyTorch function of the same name in `rainkernels.reference`.
"""

from __future__ import annotations

from rainkernels._lanes import Lane, choose_lane, has_native
from rainkernels.errors import (
    DeviceError,
    DtypeError,
    LaneError,
    RainKernelsError,
    RangeError,
    ShapeError,
    StrideError,
)

__version__ = "0.1.0"

__all__ = [
    "DeviceError",
    "DtypeError",
    "Lane",
    "LaneError",
    "RainKernelsError",
    "RangeError",
    "ShapeError",
    "StrideError",
    "__version__",
    "choose_lane",
    "has_native",
]
