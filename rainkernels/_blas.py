"""The single-precision matrix product of the BLAS that torch is linked with, for native code that calls it itself."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch


@functools.cache
def sgemm_address() -> int:
    """Address of Fortran's `sgemm_`, 0 where torch does not export one. Same library as torch.mm: same threads, same modes."""
    if not torch.backends.mkl.is_available():
        return 0  # what else is linked may count threads or take integers in other ways
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            symbol = getattr(ctypes.CDLL(str(path)), "sgemm_", None)
            if symbol is not None:
                return ctypes.cast(symbol, ctypes.c_void_p).value or 0
    return 0
