"""Which implementation of an op runs. The tensors' device decides; RAINKERNELS_LANE forces one for debugging."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Literal

import torch

from rainkernels.errors import LaneError

Lane = Literal["reference", "cpu", "cuda", "triton"]
LANES: tuple[Lane, ...] = ("reference", "cpu", "cuda", "triton")

# Lanes each family has, besides "reference". The first that fits the device wins. Triton on cpu tensors is its interpreter.
FAMILY_LANES: dict[str, dict[str, tuple[Lane, ...]]] = {
    "tree": {"cpu": ("cpu",), "cuda": ("cuda",)},
    "kv": {"cpu": ("cpu",), "cuda": ("cuda",)},
    "attention": {"cpu": ("cpu", "triton"), "cuda": ("triton",)},
    "logits": {"cpu": ("cpu", "triton"), "cuda": ("triton",)},
    "edits": {"cpu": ("cpu", "triton"), "cuda": ("triton",)},
    "decoder": {"cpu": ("cpu",)},
}

_KEY = os.environ.encodekey("RAINKERNELS_LANE")


def requested_lane() -> object:
    """What RAINKERNELS_LANE holds, None if unset; for comparing.

    Asked at every call: os.environ.get takes 1 us where a variable is unset, its dictionary 0.03 us.
    """
    try:
        return os.environ._data.get(_KEY)  # type: ignore[attr-defined]
    except AttributeError:  # a Python whose environment is built otherwise
        return os.environ.get("RAINKERNELS_LANE")


def native() -> ModuleType:
    """The compiled module rainkernels._C.

    Raises:
        LaneError: it is not built; the message says how to build it.
    """
    known = sys.modules.get("rainkernels._C")
    if known is not None:
        return known
    try:
        return importlib.import_module("rainkernels._C")
    except ImportError as error:
        raise LaneError(
            f"the compiled module rainkernels._C cannot be imported ({error}): build it with `pip install .` or `make build`, "
            "or set RAINKERNELS_LANE=reference to run the plain PyTorch definitions"
        ) from error


def has_native() -> bool:
    """True when rainkernels._C imports."""
    try:
        native()
    except LaneError:
        return False
    return True


@functools.cache
def has_triton() -> bool:
    """True when the package triton is installed. Looked up once, not imported."""
    return importlib.util.find_spec("triton") is not None


def choose_lane(family: str, device: torch.device) -> Lane:
    """The lane an op of `family` takes for tensors on `device`.

    Raises:
        LaneError: RAINKERNELS_LANE names no lane, or one this family or build does not have for the device.
    """
    forced = requested_lane() and os.environ.get("RAINKERNELS_LANE")
    usable = FAMILY_LANES[family].get(device.type, ())
    if forced:
        if forced not in LANES:
            raise LaneError(f"RAINKERNELS_LANE={forced!r}: allowed are {', '.join(LANES)}")
        if forced == "reference":
            return "reference"
        if forced == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise LaneError(
                "RAINKERNELS_LANE=triton: cpu tensors reach Triton through its interpreter only: start the process with "
                "TRITON_INTERPRET=1, or use cuda tensors"
            )
        if forced == "triton" and not has_triton():
            raise LaneError("RAINKERNELS_LANE=triton: the package triton is not installed: pip install triton")
        for lane in usable:
            if lane == forced:
                return lane
        raise LaneError(
            f"RAINKERNELS_LANE={forced}: the {family} family has no such lane for {device.type} tensors; "
            f"there are: reference{''.join(', ' + lane for lane in usable)}"
        )
    for lane in usable:
        if lane == "cuda" and not native().has_cuda:
            continue
        if lane == "triton" and not has_triton():
            continue
        return lane
    return "reference"
