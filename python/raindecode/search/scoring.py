"""Scoring: the log-probabilities of a request's own prompt, from forwards that read it as it stands."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raindecode.engine.branch import Branch
from raindecode.engine.engine import Engine
from raindecode.engine.mixing import mixed_block
from raindecode.engine.types import Got, Want
from raindecode.errors import NumericError
from raindecode.mixture import Mix
from raindecode.search.context import SearchContext
from raindecode.settings import require_whole
from raindecode.types import PromptLogprobs, TokenLogprob

_STEP_BYTES = 192 * 2**20  # of logits in flight, of all requests that score together


@dataclass(frozen=True)
class Scoring:
    """Reads a prompt and generates nothing.

    Attributes:
        top: how many of the likeliest tokens to report at every place, besides the prompt's own.

    Raises:
        ConfigError: a value lies outside what is allowed.
    """

    top: int = 0

    def __post_init__(self) -> None:
        require_whole("top", self.top, 0)

    def search(self, context: SearchContext) -> Generator[Any, Any, PromptLogprobs]:
        """Score one request's prompt."""
        return (yield from score_prompt(context, self.top))


def score_prompt(context: SearchContext, top: int) -> Generator[list[Want], list[Got], PromptLogprobs]:
    """Log-probability of every token of the prompt behind those before it, under the request's policy; of a request with forced
    tokens, of these alone.

    The rows run in pieces, so that the logits in memory stay bounded however long the prompt and wide the vocabulary.
    """
    request, engine = context.request, context.engine
    mix = _unmeasured(request.mix)
    ids = [*request.prompt_ids, *request.forced]
    begun = len(request.prompt_ids) if request.forced else 1
    found: list[TokenLogprob | None] = [None] * begun
    others: list[list[TokenLogprob]] = [[] for _ in range(begun)]
    branch = engine.open(context.ledger, ids[:begun], mix, context.edits)
    branch.reserve = len(ids)
    while len(found) < len(ids):
        first = len(found)
        last = min(len(ids), first + _rows_of_a_piece(engine, mix))
        _grow(branch, ids, last - 1)
        got = yield [Want(branch, rows_from=first - 1)]
        block = mixed_block(got[0].rows, mix, engine.vocab_size)
        got[0].rows.clear()
        logprobs, likeliest = _read(block, ids[first:last], top)
        if np.isnan(logprobs).any():
            at = first + int(np.flatnonzero(np.isnan(logprobs))[0])
            raise NumericError(f"the logits before token {at} of the prompt hold NaN or +inf, or nothing but -inf")
        found += [TokenLogprob(token, float(p)) for token, p in zip(ids[first:last], logprobs, strict=True)]
        others += likeliest
    context.ledger.measure()
    branch.release()
    return PromptLogprobs(request.prompt, ids, found, others if top else None, context.stats())


def _grow(branch: Branch, ids: Sequence[int], length: int) -> None:
    if length > branch.length:
        branch.append(ids[branch.length : length])


def _rows_of_a_piece(engine: Engine, mix: Mix) -> int:
    """Rows one request runs at a time, the memory shared with those beside it."""
    width = max(one.model.config.get_text_config().vocab_size for one in engine.runners)
    blocks = mix.models.bit_count() + (0 if mix.single is not None else 3) + 2
    room: int = _STEP_BYTES // (4 * width * blocks * max(1, engine.num_running))
    return max(1, room)


@lru_cache(maxsize=64)
def _unmeasured(mix: Mix) -> Mix:
    return replace(mix, stats=False) if mix.stats else mix


@torch.inference_mode()
def _read(block: Tensor, tokens: Sequence[int], top: int) -> tuple[npt.NDArray[Any], list[list[TokenLogprob]]]:
    """Log-probabilities of `tokens` under the rows of logits [n, vocabulary], and the likeliest tokens of each row.

    NaN where a row is no distribution.
    """
    z = block.float()
    lse = z.logsumexp(dim=1)
    lse[~lse.isfinite()] = torch.nan
    chosen = torch.tensor(tokens, dtype=torch.int64, device=z.device)
    logprobs = z.gather(1, chosen[:, None])[:, 0] - lse
    if not top:
        return logprobs.cpu().numpy(), [[] for _ in tokens]
    values, ids = z.topk(min(top, z.shape[1]), dim=1)
    pairs = zip((values - lse[:, None]).tolist(), ids.tolist(), strict=True)
    likeliest = [[TokenLogprob(i, v) for v, i in zip(row, names, strict=True)] for row, names in pairs]
    return logprobs.cpu().numpy(), likeliest


def likeliest(logits: npt.NDArray[np.float32], top: int) -> list[TokenLogprob]:
    """The most likely tokens of one row of logits on the host, the likeliest first."""
    count = min(top, len(logits))
    best = np.argpartition(logits, len(logits) - count)[len(logits) - count :]
    best = best[np.lexsort((best, -logits[best]))]
    highest = float(logits[best[0]])
    lse = highest + float(np.log(np.exp(logits.astype(np.float64) - highest).sum()))
    return [TokenLogprob(int(i), float(logits[i]) - lse) for i in best]
