"""Errors the ops raise, all before a kernel runs. Each is also the built-in error a caller would expect."""

from __future__ import annotations

__all__ = ["DeviceError", "DtypeError", "LaneError", "RainKernelsError", "RangeError", "ShapeError", "StrideError"]


class RainKernelsError(Exception):
    """Base of every error of this package."""


class DeviceError(RainKernelsError, ValueError):
    """A tensor lies on a device the op, or the other tensors, cannot be used with."""


class DtypeError(RainKernelsError, TypeError):
    """A tensor has a dtype the op does not take, or an argument is not a tensor at all."""


class ShapeError(RainKernelsError, ValueError):
    """A tensor's rank or a size does not fit the others."""


class StrideError(RainKernelsError, ValueError):
    """A tensor's memory layout is not one the op reads."""


class RangeError(RainKernelsError, IndexError, ValueError):
    """A value (slot, position, count, probability) lies outside what is allowed."""


class LaneError(RainKernelsError, RuntimeError):
    """The lane asked for is not built, not known, or not usable for this device."""
