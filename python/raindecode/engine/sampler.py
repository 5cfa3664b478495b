"""Draws tokens from rows of logits, on the host, in double precision.

Every row is treated by itself and randomness is an input, so a token depends on its logits, its filter and its uniform
only. Order of filters, as Hugging Face has it: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from raindecode.errors import ConfigError, NumericError
from raindecode.mixture import Measured
from rainkernels.ops.draws import draw_rows
from rainkernels.ops.logits import philox_uniforms

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

    @property
    def is_plain(self) -> bool:
        """Whether only temperature and top-k are at work."""
        return self.top_p == 1.0 and self.min_p == 0.0 and self.repetition_penalty == 1.0

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


class Drawn(NamedTuple):
    """One draw: the token, its probability after filtering, its log-probability under the raw logits (NaN if not asked for)."""

    token: int
    prob: float
    logprob: float
    measured: Measured | None = None


def rows_to_host(logits: Tensor) -> npt.NDArray[np.float32]:
    """[n, V] float32 on the host: the one read-back of a step."""
    host: npt.NDArray[np.float32] = logits.detach().float().cpu().numpy()
    return host


def uniforms(keys: Sequence[int], counters: Sequence[int]) -> FloatRow:
    """One number in the open interval (0, 1) per draw, by Philox4x32-10 (Salmon et al., SC 2011).

    Args:
        keys: 64-bit seeds. Only the low 64 bits count.
        counters: 128-bit draw names (rng.name_draw), one per key.
    """
    return np.array(philox_uniforms(keys, counters))


class DrawRequest(NamedTuple):
    """A draw from one row. Fields as the arguments of `draw`; see `draw_all` for logprob."""

    row: LogitsRow
    shape: Filter
    uniform: float | None
    context: Sequence[int] | None = None
    logprob: bool = True


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
    (drawn,) = draw_all([DrawRequest(logits, shape, uniform, context)])
    if isinstance(drawn, NumericError):
        raise drawn
    return drawn


def draw_all(requests: Sequence[DrawRequest]) -> list[Drawn | NumericError]:
    """A draw per request, or the error `draw` would raise. Requests for one row that follow each other share the work."""
    plain = [r for r in requests if r.shape.is_plain]
    results = iter(
        draw_rows(
            [r.row for r in plain],
            [r.shape.temperature for r in plain],
            [min(r.shape.top_k, len(r.row)) for r in plain],
            [math.nan if r.uniform is None else r.uniform for r in plain],
            [r.logprob for r in plain],
        )
    )
    drawn: list[Drawn | NumericError] = []
    for r in requests:
        try:
            if not r.shape.is_plain:
                drawn.append(_draw_filtered(r))
                continue
            result = next(results)
            if result[0] < 0:
                _top(r.row.astype(np.float64))  # says what is wrong with it
            drawn.append(Drawn(*result))
        except NumericError as error:
            drawn.append(error)
    return drawn


def _draw_filtered(request: DrawRequest) -> Drawn:
    """A draw with any filter."""
    logits, shape, uniform, context, _ = request
    raw = logits.astype(np.float64)
    top = _top(raw)
    scores = _penalised(raw, shape.repetition_penalty, context)
    if shape.temperature == 0:
        token = int(scores.argmax())
        return Drawn(token, 1.0, _logprob(raw, top, token))
    if shape.temperature != 1.0:
        # Differences first: with a tiny temperature every other score may become -inf, but the largest stays 0.
        with np.errstate(over="ignore"):
            scores = (scores - scores.max()) / shape.temperature
    ids, probs = filtered(scores, shape)
    cdf = np.cumsum(probs)
    if uniform is None:
        at = int(probs.argmax())
    else:
        at = min(int(np.searchsorted(cdf, uniform * cdf[-1], side="right")), len(cdf) - 1)
    token = int(at if ids is None else ids[at])
    return Drawn(token, float(probs[at] / cdf[-1]), _logprob(raw, top, token))


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
