"""Draws from rows of logits on the host, in double precision: any number of draws per row, each with its own number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from rainkernels._lanes import choose_lane, native
from rainkernels.errors import DtypeError, RangeError, ShapeError
from rainkernels.reference import draws as reference

__all__ = ["Row", "draw_rows"]

Row = npt.NDArray[np.float32]
_CPU = torch.device("cpu")


def draw_rows(
    rows: Sequence[Row],
    temperature: Sequence[float],
    top_k: Sequence[int],
    uniform: Sequence[float],
    logprob: Sequence[bool],
) -> list[tuple[int, float, float]]:
    """Draw a token per request.

    Scores are logits / temperature; the top_k best (0: all) are kept, of equals the lower ids; the token is the one where the
    running sum of their probabilities, best first (in the order of ids where all are kept), passes `uniform`.

    Args, one each per request:
        rows: [V] float32, contiguous; requests for one row that follow each other share the work.
        temperature: 0 or more; 0 takes the largest logit, of equals the lowest id.
        top_k: 0 or more.
        uniform: in (0, 1); NaN takes the most likely token and still gives its probability.
        logprob: whether its log-probability is wanted, which costs a pass over the row.
    Returns:
        (token, probability after filtering, log-probability under the raw logits or NaN); token -1 and NaN where the row
        holds NaN, +inf, or nothing but -inf.
    Raises:
        ShapeError, DtypeError, RangeError: naming the argument.
    Source: raindecode.engine.sampler.  Reference: rainkernels.reference.draws.draw
    """
    for name, given in (("temperature", temperature), ("top_k", top_k), ("uniform", uniform), ("logprob", logprob)):
        if len(given) != len(rows):
            raise ShapeError(f"{name} has {len(given)} entries, there are {len(rows)} rows: give one each")
    for i, row in enumerate(rows):
        if not isinstance(row, np.ndarray) or row.dtype != np.float32:
            raise DtypeError(f"rows[{i}] is {getattr(row, 'dtype', type(row).__name__)}, allowed: a float32 array")
        if row.ndim != 1 or not row.flags.c_contiguous:
            raise ShapeError(f"rows[{i}] has shape {row.shape}, allowed: one contiguous row of logits")
    for i, (t, k, u) in enumerate(zip(temperature, top_k, uniform, strict=True)):
        if not 0 <= t < math.inf or k < 0 or not (0 < u < 1 or u != u):
            raise RangeError(
                f"request {i} has temperature {t}, top_k {k}, uniform {u}; allowed: 0 or more, 0 or more, in (0, 1) or NaN"
            )
    if choose_lane("logits", _CPU) == "cpu":
        drawn: list[tuple[int, float, float]] = native().draw_rows(
            rows, temperature, top_k, uniform, logprob, torch.get_num_threads()
        )
        return drawn
    return [reference.draw(*request) for request in zip(rows, temperature, top_k, uniform, logprob, strict=True)]
