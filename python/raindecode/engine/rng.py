"""Names of draws: randomness is counter-based, so a draw depends on its key and counter alone, never on what else runs.

The key is the request's seed; the counter names the draw: a hash of the token path with purpose, sample and visit, or a
plain position. So a request draws the same numbers (sampler.uniforms) alone or in any batch.
"""

from __future__ import annotations

MASK64 = (1 << 64) - 1
MASK128 = (1 << 128) - 1
MULTIPLIER = 0xDA942042E4DD58B5_9E3779B97F4A7C15 | 1  # odd, so that multiplying is a bijection of 128-bit numbers


def mix(state: int, value: int) -> int:
    """Fold `value` into a 128-bit hash. The hash of a token path is mix() over its tokens."""
    state = ((state ^ (value & MASK64)) * MULTIPLIER) & MASK128
    return state ^ (state >> 61)


def name_draw(state: int, *parts: int) -> int:
    """The 128-bit counter of a draw: a path hash with purpose, sample and visit folded in."""
    for part in parts:
        state = mix(state, part + 1)
    return state
