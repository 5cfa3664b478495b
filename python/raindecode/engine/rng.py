"""Counter-based randomness: a draw depends on its key and counter alone, never on what else runs.

Philox4x32-10 (Salmon et al., SC 2011). The key is the request's seed; the counter names the draw: a hash of the token
path with purpose, sample and visit, or a plain position. So a request draws the same numbers alone or in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MASK64 = (1 << 64) - 1
MASK128 = (1 << 128) - 1
_MULTIPLIER = 0xDA942042E4DD58B5_9E3779B97F4A7C15 | 1  # odd, so that multiplying is a bijection of 128-bit numbers
_PHILOX_M = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_PHILOX_W = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)


def mix(state: int, value: int) -> int:
    """Fold `value` into a 128-bit hash. The hash of a token path is mix() over its tokens."""
    state = ((state ^ (value & MASK64)) * _MULTIPLIER) & MASK128
    return state ^ (state >> 61)


def name_draw(state: int, *parts: int) -> int:
    """The 128-bit counter of a draw: a path hash with purpose, sample and visit folded in."""
    for part in parts:
        state = mix(state, part + 1)
    return state


def uniforms(keys: Sequence[int], counters: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in the open interval (0, 1) per draw.

    Args:
        keys: 64-bit seeds. Only the low 64 bits count.
        counters: 128-bit draw names, one per key.
    """
    words = np.array(
        [[(c >> shift) & 0xFFFFFFFF for shift in (0, 32, 64, 96)] for c in counters], dtype=np.uint64
    ).reshape(-1, 4)
    key = np.array([[k & 0xFFFFFFFF, (k >> 32) & 0xFFFFFFFF] for k in keys], dtype=np.uint64).reshape(-1, 2)
    x0, x1, x2, x3 = words.T
    k0, k1 = key.T
    for _ in range(10):
        p0, p1 = _PHILOX_M[0] * x0, _PHILOX_M[1] * x2
        x0, x1, x2, x3 = (
            (p1 >> _SHIFT32) ^ x1 ^ k0,
            p1 & _LOW32,
            (p0 >> _SHIFT32) ^ x3 ^ k1,
            p0 & _LOW32,
        )
        k0, k1 = (k0 + _PHILOX_W[0]) & _LOW32, (k1 + _PHILOX_W[1]) & _LOW32
    # 52 bits and a half: every value is exact in double precision and neither 0 nor 1 can come out.
    bits = (x0 << np.uint64(20)) ^ (x1 >> np.uint64(12))
    result: npt.NDArray[np.float64] = ((bits & np.uint64((1 << 52) - 1)).astype(np.float64) + 0.5) * 2.0**-52
    return result
