"""Teacher forcing: answers run through two models of an engine, and every token's rank, divergence and candidates noted."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raindecode.engine.branch import Branch, Ledger
from raindecode.engine.engine import Engine, Task
from raindecode.engine.mixing import mixed_block
from raindecode.engine.types import Want
from raindecode.errors import NumericError
from raindecode.mixture import Mix
from raindecode.progress import ProgressDisplay
from raindecode.search.context import SearchContext, together
from raindecode.search.edited import with_edits
from raindecode.text import Codec
from raindecode.token_shift import ShiftedAnswer
from raindecode.types import Request
from rainkernels.ops.logits import rank

_STEP_BYTES = 192 * 2**20  # of logits in flight; what is made of one answer's comes on top
_STEP_ROWS = 2048  # more in one step make nothing faster
_FEW = 16  # largest logits up to which passes over the rows cost less than topk


@dataclass(frozen=True)
class Forced:
    """An answer and the two requests it stands behind.

    Attributes:
        token_ids: at least one.
        is_top: every token is the aligned side's most likely one.
    """

    index: int
    base: Request
    aligned: Request
    token_ids: Sequence[int]
    text: str
    finish_reason: str
    is_top: bool


# Columns of ShiftedAnswer that come of logits, from `ranks` on, for some of an answer's tokens.
_Columns: TypeAlias = "tuple[npt.NDArray[Any], ...]"


def force(
    engine: Engine, codec: Codec, answers: Sequence[Forced], *, top: int, progress: bool | None
) -> Iterator[tuple[int, ShiftedAnswer | BaseException]]:
    """Compare the models along answers; (index, what was found or why it failed) as each ends.

    Answers go through the models in waves, so that the logits in flight stay below 256 MB whatever the vocabulary and
    `max_concurrent`; of an answer longer than that in pieces.

    Args:
        top: candidates of the base side per token.
    """
    with ProgressDisplay.choose(progress, len(answers), searching=False) as display:
        for wave, rows in _waves(engine, answers):
            tasks = (_task(engine, codec, one, rows, top, display) for one in wave)
            with closing(engine.run(tasks)) as ended:
                for task in ended:
                    display.finished(task.tag)
                    yield task.tag, task.result if task.error is None else task.error


def rows_in_flight(engine: Engine, mixes: Sequence[Mix]) -> int:
    """How many positions may have their logits in memory at once, for sides mixed like this."""
    width = max(one.model.config.get_text_config().vocab_size for one in engine.runners)
    # Of an answer that fills a step by itself: a mixture takes three times its rows, and rows that are ranked again are copied.
    blocks = sum(mix.models.bit_count() + (0 if mix.single is not None else 3) for mix in mixes) + 2
    room: int = _STEP_BYTES // (4 * width * blocks)
    return max(1, min(_STEP_ROWS, room))


def _waves(engine: Engine, answers: Sequence[Forced]) -> Iterator[tuple[list[Forced], int]]:
    """Answers that run together, and how many positions of each at a time."""
    if not answers:
        return
    most = rows_in_flight(engine, [answers[0].base.mix, answers[0].aligned.mix])
    wave: list[Forced] = []
    rows = 0
    for one in answers:
        if wave and rows + len(one.token_ids) > most:
            yield wave, most
            wave, rows = [], 0
        wave.append(one)
        rows += len(one.token_ids)
    yield wave, most


def _task(engine: Engine, codec: Codec, one: Forced, rows: int, top: int, display: ProgressDisplay) -> Task:
    ledger = Ledger()
    sides = [
        SearchContext(engine, codec, ledger, replace(side, mix=_unmeasured(side.mix)))
        for side in (one.base, one.aligned)
    ]
    return Task(_forced(one, sides, rows, top, display.reporter(one.index)), ledger, tag=one.index)


@lru_cache(maxsize=64)
def _unmeasured(mix: Mix) -> Mix:
    """The same distribution; one object for all requests, so that what a Mix works out it works out once."""
    return replace(mix, stats=False)


@lru_cache(maxsize=64)
def _of_both(one: Mix, other: Mix) -> Mix | None:
    """A mixture for which just the models run that run for either of two, whatever it weighs; None where there is none."""
    union = one.models | other.models
    return next((mix for mix in (one, other, replace(one, stats=True)) if mix.models == union), None)


def _forced(
    one: Forced, sides: Sequence[SearchContext], rows: int, top: int, report: Any
) -> Generator[Any, Any, ShiftedAnswer]:
    """A request of the engine: both sides' rows behind the same tokens, in the same forwards."""
    engine = sides[0].engine
    ready = yield from together(*(with_edits(side) for side in sides))
    branches = _open(ready)
    starts = [branch.length - 1 for branch in branches]  # the row behind the prompt speaks of the first token
    tokens = torch.tensor(one.token_ids, dtype=torch.int32)
    parts: list[_Columns] = []
    for first in range(0, len(tokens), rows):
        last = min(first + rows, len(tokens))
        for branch in branches:
            branch.reserve = branch.length + len(tokens)
            branch.append(one.token_ids[max(first - 1, 0) : last - 1])
        got = yield [Want(branch, rows_from=start + first) for branch, start in zip(branches, starts, strict=True)]
        base, aligned = (
            mixed_block(answer.rows, side.request.mix, engine.vocab_size)
            for answer, side in zip((got[0], got[-1]), ready, strict=True)
        )
        del got
        parts.append(_measure(base, aligned, tokens[first:last], first, top, one.is_top))
        if report is not None:
            report(last, 0)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return ShiftedAnswer(one.index, one.base.prompt, one.text, one.finish_reason, tokens.numpy(), *columns)


def _open(sides: Sequence[SearchContext]) -> list[Branch]:
    """A branch behind each side's prompt; one for both where they read the same, so that its rows are planned once."""
    base, aligned = sides
    if list(base.request.prompt_ids) == list(aligned.request.prompt_ids) and base.edits == aligned.edits:
        mix = _of_both(base.request.mix, aligned.request.mix)
        if mix is not None:
            return [base.engine.open(base.ledger, base.request.prompt_ids, mix, base.edits)]
    return [side.open(side.request.prompt_ids) for side in sides]


@torch.inference_mode()
def _measure(base: Tensor, aligned: Tensor, tokens: Tensor, first: int, top: int, is_top: bool) -> _Columns:
    """What `rank` and the largest logits say of rows [n, vocabulary]. The first row is that of token `first`.

    Raises:
        NumericError: a row is no distribution.
    """
    if base.dtype != aligned.dtype:
        base, aligned = base.float(), aligned.float()
    tokens = tokens.to(base.device)
    found = rank(base, aligned, tokens)
    if not bool(found.rank.all()):
        at = first + int((found.rank == 0).nonzero()[0])
        raise NumericError(
            f"the logits at token {at} of the answer hold NaN, +inf or nothing but -inf: one of the two models produced no number"
        )
    top_ranks = found.rank
    if not is_top:
        best = _largest(aligned, 1)[1][:, 0]
        others = (best != tokens).nonzero()[:, 0]
        if len(others):
            top_ranks = top_ranks.clone()
            top_ranks[others] = rank(base[others], aligned[others], best[others]).rank
    values, ids = _largest(base, min(top, base.shape[1]))
    # The rank op has summed the row up already: log sum exp z = z_token - log p(token), unless the token is ruled out.
    lse = base.gather(1, tokens[:, None].long())[:, 0].float() - found.logprob_base
    ruled_out = torch.isnan(lse)
    if bool(ruled_out.any()):
        lse[ruled_out] = base[ruled_out].float().logsumexp(dim=1)
    columns = (
        found.rank,
        found.logprob_base,
        found.logprob_aligned,
        found.kl,
        top_ranks,
        ids,
        values.float() - lse[:, None],
    )
    *kept, logprobs = (column.cpu().numpy() for column in columns)
    return *kept, np.exp(logprobs)  # of so few numbers, torch takes a hundred times as long


def _largest(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest logits of every row [n, count] and their ids int32, largest first; of equals the lower id first."""
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and count <= _FEW:
        found = _largest_few(rows.numpy(), count)
        if found is not None:
            return found
    values, ids = rows.topk(count, dim=1)
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order).int()


def _largest_few(rows: npt.NDArray[np.float32], count: int) -> tuple[Tensor, Tensor] | None:
    """The same by so many passes of numpy, which take a fraction of topk's time; None where a row has fewer finite logits."""
    left = rows.copy() if count > 1 else rows
    each = np.arange(len(rows))
    values, ids = np.empty((len(rows), count), np.float32), np.empty((len(rows), count), np.int32)
    for i in range(count):
        best = left.argmax(axis=1)
        ids[:, i], values[:, i] = best, left[each, best]
        if count > 1:
            left[each, best] = -np.inf
    return None if np.isneginf(values).any() else (torch.from_numpy(values), torch.from_numpy(ids))
