"""Counter-based randomness: a draw depends on its key and counter alone, never on what else runs.

Philox4x32-10 (Salmon et al., SC 2011). The key is the request's seed; the counter names the draw: a hash of the token
path with purpose, sample and visit, or a plain position. So a request draws the same numbers alone or in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raindecode.engine.names import MASK64, MASK128, mix, name_draw
from rainkernels.ops.logits import philox_uniforms

__all__ = ["MASK64", "MASK128", "mix", "name_draw", "uniforms"]


def uniforms(keys: Sequence[int], counters: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in the open interval (0, 1) per draw.

    Args:
        keys: 64-bit seeds. Only the low 64 bits count.
        counters: 128-bit draw names, one per key.
    """
    return np.array(philox_uniforms(keys, counters))
