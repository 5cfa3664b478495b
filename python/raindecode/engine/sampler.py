"""Draws tokens from rows of logits, on the host, in double precision.

Every row is treated by itself and randomness is an input, so a token depends on its logits, its filter and its uniform
only. Order of filters, as Hugging Face has it: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import numpy.typing as npt
from torch import Tensor

from raindecode.errors import ConfigError, NumericError

FloatRow = npt.NDArray[np.float64]
IntRow = npt.NDArray[np.int64]
LogitsRow = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Filter:
    """How a distribution is shaped before a draw.

    Attributes:
        temperature: logits are divided by it; 0 takes the largest logit, lowest id on ties.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose mass reaches top_p; 1 keeps all.
        min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens already in the context; 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _require(
            _finite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more"
        )
        whole = isinstance(self.top_k, (int, np.integer)) and self.top_k >= 0
        _require(whole, "top_k", self.top_k, "a whole number, 0 (off) or more")
        _require(_finite(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1 (off)")
        _require(_finite(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (off) to 1")
        _require(
            _finite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            self.repetition_penalty,
            "more than 0; 1 is off",
        )


@dataclass(frozen=True, slots=True)
class Drawn:
    """One draw: the token, its probability after filtering, its log-probability under the raw logits (NaN if not asked for)."""

    token: int
    prob: float
    logprob: float


def rows_to_host(logits: Tensor) -> npt.NDArray[np.float32]:
    """[n, V] float32 on the host: the one read-back of a step."""
    host: npt.NDArray[np.float32] = logits.detach().float().cpu().numpy()
    return host


class Shaped:
    """One row of logits under one filter, ready for any number of draws.

    Attributes:
        ids: [n] tokens that passed the filter, None for all of them; probs, cdf: [n] float64, not normalised.
    """

    __slots__ = ("_lse", "_row", "best", "cdf", "ids", "probs")

    def __init__(self, row: LogitsRow, ids: IntRow | None, probs: FloatRow, cdf: FloatRow, best: int) -> None:
        self.ids, self.probs, self.cdf = ids, probs, cdf
        self.best = best
        self._row = row
        self._lse: float | None = None

    def draw(self, uniform: float | None, *, logprob: bool = True) -> Drawn:
        """The token at `uniform` of the distribution; None takes the most likely one, the first of equals.

        Args:
            logprob: False leaves the log-probability under the raw logits out (NaN), which costs a pass over the row.
        """
        total = self.cdf[-1]
        if uniform is None:
            at = self.best
        else:
            at = min(int(self.cdf.searchsorted(uniform * total, side="right")), len(self.cdf) - 1)
        token = int(at if self.ids is None else self.ids[at])
        return Drawn(token, float(self.probs[at] / total), self._logprob(token) if logprob else math.nan)

    def _logprob(self, token: int) -> float:
        if self._lse is None:
            raw = self._row.astype(np.float64)
            top = raw.max()
            self._lse = float(top + np.log(np.exp(raw - top).sum()))
        return float(self._row[token]) - self._lse


def draw(logits: LogitsRow, shape: Filter, uniform: float | None, context: Sequence[int] | None = None) -> Drawn:
    """Draw one token from one row.

    Args:
        logits: [V]. -inf never comes out; NaN raises.
        uniform: in (0, 1), not used when the temperature is 0; None takes the most likely token of the filtered
            distribution and still reports its probability there (RAIN's greedy set).
        context: token ids the repetition penalty applies to.

    Raises:
        NumericError: the row holds NaN, or nothing but -inf.
    """
    return shape_row(logits, shape, context).draw(uniform)


def shape_row(logits: LogitsRow, shape: Filter, context: Sequence[int] | None = None) -> Shaped:
    """One row under one filter. Arguments and errors as `draw`."""
    raw = logits.astype(np.float64)
    _top(raw)
    scores = _penalised(raw, shape.repetition_penalty, context)
    if shape.temperature == 0:
        token = int(scores.argmax())
        one = np.ones(1)
        return Shaped(logits, np.array([token]), one, one, 0)
    if shape.temperature != 1.0:
        # Differences first: with a tiny temperature every other score may become -inf, but the largest stays 0.
        with np.errstate(over="ignore"):
            scores = (scores - scores.max()) / shape.temperature
    ids, probs = filtered(scores, shape)
    return Shaped(logits, ids, probs, np.cumsum(probs), int(probs.argmax()))


def shape_rows(rows: Sequence[LogitsRow], shape: Filter) -> list[Shaped | NumericError]:
    """Many rows [V] under one filter without repetition penalty, each as `shape_row` gives it, bit for bit.

    Returns: a Shaped per row, or the error `shape_row` would raise.
    """
    raw = np.array(rows, dtype=np.float64)
    tops = raw.max(axis=1, keepdims=True)
    plain = shape.top_p == 1.0 and shape.min_p == 0.0 and shape.temperature > 0
    if not (plain and np.isfinite(tops).all()):
        return [_shaped_or_error(row, shape) for row in rows]
    if shape.temperature != 1.0:
        with np.errstate(over="ignore"):
            raw = (raw - tops) / shape.temperature
            tops = np.zeros_like(tops)
    if not 0 < shape.top_k < raw.shape[1]:
        probs = np.exp(raw - tops)
        return [
            Shaped(row, None, p, c, int(b))
            for row, p, c, b in zip(rows, probs, probs.cumsum(axis=1), probs.argmax(axis=1), strict=True)
        ]
    k = shape.top_k
    ids = np.argpartition(raw, -k, axis=1)[:, -k:]
    scores = np.take_along_axis(raw, ids, axis=1)
    tied = np.count_nonzero(raw >= scores.min(axis=1, keepdims=True), axis=1) > k
    order = np.lexsort((ids, -scores), axis=1)  # largest first, lower id first on ties
    ids, scores = np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
    probs = np.exp(scores - scores[:, :1])
    cdf = probs.cumsum(axis=1)
    return [
        _shaped_or_error(row, shape) if tied[i] else Shaped(row, ids[i], probs[i], cdf[i], 0)
        for i, row in enumerate(rows)
    ]


def _shaped_or_error(row: LogitsRow, shape: Filter) -> Shaped | NumericError:
    try:
        return shape_row(row, shape)
    except NumericError as error:
        return error


def filtered(scores: FloatRow, shape: Filter) -> tuple[IntRow | None, FloatRow]:
    """Tokens that pass top-k, top-p and min-p (None: all of them) and their unnormalised probabilities."""
    ids: IntRow | None = None
    if 0 < shape.top_k < len(scores):
        ids = top_ids(scores, shape.top_k)
        scores = scores[ids]
    probs = np.exp(scores - scores.max())
    if shape.top_p < 1.0:
        order = np.argsort(-probs, kind="stable")
        mass = np.cumsum(probs[order])
        count = int(np.searchsorted(mass, shape.top_p * mass[-1], side="left")) + 1
        keep = np.sort(order[:count])
        ids = keep if ids is None else ids[keep]
        probs = probs[keep]
    if shape.min_p > 0.0:
        keep = np.flatnonzero(probs >= shape.min_p * probs.max())
        ids = keep if ids is None else ids[keep]
        probs = probs[keep]
    return ids, probs


def top_ids(scores: npt.NDArray[np.floating], k: int) -> IntRow:
    """Ids of the k largest scores, largest first, lower id first on ties."""
    k = min(k, len(scores))
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero(scores >= threshold)
    result: IntRow = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
    return result


def top_probs(logits: npt.NDArray[np.float32], k: int) -> tuple[list[int], list[float]]:
    """The k most likely tokens and their probabilities renormalised over these k (RAIN's expansion at depth 0).

    Raises:
        NumericError: as `draw`.
    """
    raw = logits.astype(np.float64)
    _top(raw)
    ids = top_ids(raw, k)
    weights = np.exp(raw[ids] - raw[ids[0]])
    weights /= weights.sum()
    return ids.tolist(), weights.tolist()


def log_softmax_at(logits: npt.NDArray[np.float32], ids: Sequence[int]) -> list[float]:
    """Log-probabilities of `ids` under the raw logits of one row."""
    raw = logits.astype(np.float64)
    top = float(raw.max())
    return [_logprob(raw, top, i) for i in ids]


def _top(raw: FloatRow) -> float:
    top = float(raw.max())
    if not np.isfinite(top):
        raise NumericError(f"a row of logits has maximum {top}: the model produced NaN, +inf or nothing but -inf")
    return top


def _logprob(raw: FloatRow, top: float, token: int) -> float:
    return float(raw[token] - top - np.log(np.exp(raw - top).sum()))


def _penalised(raw: FloatRow, penalty: float, context: Sequence[int] | None) -> FloatRow:
    if penalty == 1.0 or not context:
        return raw
    seen = np.unique(np.asarray(context, dtype=np.int64))
    scores = raw.copy()
    scores[seen] = np.where(raw[seen] > 0, raw[seen] / penalty, raw[seen] * penalty)
    return scores


def _finite(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _require(ok: bool, name: str, given: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {given}; allowed: {allowed}")
