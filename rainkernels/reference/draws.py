"""Plain NumPy definition of draws in double precision: temperature, top-k, and a number in (0, 1)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["draw"]


def draw(
    row: npt.NDArray[np.float32], temperature: float, top_k: int, uniform: float, logprob: bool
) -> tuple[int, float, float]:
    """Token, probability and log-probability of one draw. As `rainkernels.ops.draws.draw_rows`."""
    raw = row.astype(np.float64)
    top = float(raw.max(initial=-math.inf))
    if not math.isfinite(top):
        return -1, math.nan, math.nan
    measured = top + float(np.log(np.exp(raw - top).sum()))
    if temperature == 0:
        token = int(raw.argmax())
        return token, 1.0, float(raw[token]) - measured if logprob else math.nan
    # Differences first: with a tiny temperature every other score may become -inf, but the largest stays 0.
    with np.errstate(over="ignore"):
        scores = raw if temperature == 1 else (raw - top) / temperature
    ids = np.arange(len(raw))
    if 0 < top_k < len(raw):
        ids = np.argsort(-scores, kind="stable")[:top_k]
    probs = np.exp(scores[ids] - scores.max())
    cdf = np.cumsum(probs)
    if math.isnan(uniform):
        at = int(probs.argmax())
    else:
        at = min(int(np.searchsorted(cdf, uniform * cdf[-1], side="right")), len(cdf) - 1)
    token = int(ids[at])
    return token, float(probs[at] / cdf[-1]), float(raw[token]) - measured if logprob else math.nan
