"""Teacher forcing: answers run through two models of an engine, and every token's rank, divergence and candidates noted."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raindecode.engine.branch import Branch, Ledger
from raindecode.engine.engine import Engine
from raindecode.engine.mixing import mixed_block
from raindecode.engine.task import Task
from raindecode.engine.types import HostCall, Want
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


class _Block(NamedTuple):
    """Rows of one side, per model of the engine as `Got.rows` has them."""

    rows: Sequence[Tensor | None]
    mix: Mix


class _Piece(NamedTuple):
    """Some of an answer's tokens, the first of them at position `first`, with the rows they stand behind."""

    sides: tuple[_Block, _Block]  # base and aligned
    tokens: Tensor
    first: int


def force(
    engine: Engine, codec: Codec, answers: Sequence[Forced], *, top: int, progress: bool | None
) -> Iterator[tuple[int, ShiftedAnswer | BaseException]]:
    """Compare the models along answers; (index, what was found or why it failed) as each ends.

    Answers go through the models in waves, so that the logits in flight stay below 256 MB whatever the vocabulary and
    `max_concurrent`; of an answer longer than that in pieces.

    Args:
        top: candidates of the base side per token.
    """
    measure = partial(_measure_all, vocab_size=engine.vocab_size, top=top, is_top=all(one.is_top for one in answers))
    with ProgressDisplay.choose(progress, len(answers), searching=False) as display:
        for wave, rows in _waves(engine, answers):
            tasks = (_task(engine, codec, one, rows, measure, display) for one in wave)
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


def _task(
    engine: Engine, codec: Codec, one: Forced, rows: int, measure: Callable[[list[_Piece]], list[Any]], display: ProgressDisplay
) -> Task:  # fmt: skip
    ledger = Ledger()
    sides = [
        SearchContext(engine, codec, ledger, replace(side, mix=_unmeasured(side.mix)) if side.mix.stats else side)
        for side in (one.base, one.aligned)
    ]
    return Task(_forced(one, sides, rows, measure, display.reporter(one.index)), ledger, tag=one.index)


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
    one: Forced, sides: Sequence[SearchContext], rows: int, measure: Callable[[list[_Piece]], list[Any]], report: Any
) -> Generator[Any, Any, ShiftedAnswer]:
    """A request of the engine: both sides' rows behind the same tokens, in the same forwards.

    What `measure` makes of the rows is asked for as a host call, so that all answers of a step are measured together.
    """
    ready = yield from together(*(with_edits(side) for side in sides))
    branches = _open(ready)
    mixes = [side.request.mix for side in ready]
    starts = [branch.length - 1 for branch in branches]  # the row behind the prompt speaks of the first token
    tokens = torch.from_numpy(np.array(one.token_ids, dtype=np.int32))
    parts: list[_Columns] = []
    for first in range(0, len(tokens), rows):
        last = min(first + rows, len(tokens))
        for branch in branches:
            branch.reserve = branch.length + len(tokens)
            branch.append(one.token_ids[max(first - 1, 0) : last - 1])
        got = yield [Want(branch, rows_from=start + first) for branch, start in zip(branches, starts, strict=True)]
        blocks = _Block(got[0].rows, mixes[0]), _Block(got[-1].rows, mixes[1])
        del got
        (part,) = yield HostCall(measure, [_Piece(blocks, tokens[first:last], first)])
        del blocks
        if isinstance(part, Exception):
            raise part
        parts.append(part)
        if report is not None:
            report(last, 0)
    columns = parts[0] if len(parts) == 1 else [np.concatenate(column) for column in zip(*parts, strict=True)]
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
def _measure_all(pieces: list[_Piece], *, vocab_size: int, top: int, is_top: bool) -> list[_Columns | NumericError]:
    """The columns of every piece, or why it has none. Pieces whose rows lie one behind the other are measured as one."""
    order = sorted(
        range(len(pieces)), key=lambda i: _place(pieces[i])
    )  # rows lie as the tree does, pieces come as requests do
    runs: list[list[int]] = []
    for i in order:
        if runs and _follows(pieces[runs[-1][-1]], pieces[i]):
            runs[-1].append(i)
        else:
            runs.append([i])
    found: list[_Columns | NumericError | None] = [None] * len(pieces)
    for members in runs:
        run = [pieces[i] for i in members]
        bounds = [0, *accumulate(len(piece.tokens) for piece in run)]
        base, aligned = (
            mixed_block(_joined([piece.sides[side] for piece in run], bounds[-1]), run[0].sides[side].mix, vocab_size) for side in (0, 1)
        )  # fmt: skip
        columns = _measure(base, aligned, torch.cat([piece.tokens for piece in run]), top, is_top)
        for i, begin, end in zip(members, bounds, bounds[1:], strict=False):
            mine = tuple(column[begin:end] for column in columns)
            found[i] = mine if mine[0].all() else _no_number(pieces[i], mine[0])
    return [one for one in found if one is not None]


def _place(piece: _Piece) -> tuple[int, int]:
    """Where the rows of its base side lie."""
    rows = next(rows for rows in piece.sides[0].rows if rows is not None)
    return rows.untyped_storage().data_ptr(), int(rows.storage_offset())


def _follows(one: _Piece, other: _Piece) -> bool:
    """Whether the rows of `other` lie behind those of `one`, of all models on both sides."""
    return all(
        (before is None and behind is None)
        or (
            before is not None
            and behind is not None
            and before.untyped_storage().data_ptr() == behind.untyped_storage().data_ptr()
            and before.stride() == behind.stride()
            and before.storage_offset() + before.shape[0] * before.stride(0) == behind.storage_offset()
        )
        for mine, theirs in zip(one.sides, other.sides, strict=True)
        for before, behind in zip(mine.rows, theirs.rows, strict=True)
    )


def _joined(blocks: Sequence[_Block], count: int) -> list[Tensor | None]:
    """`count` rows of every model, of blocks that follow one another."""
    return [
        None if first is None else first.as_strided((count, first.shape[1]), first.stride()) for first in blocks[0].rows
    ]


def _no_number(piece: _Piece, ranks: npt.NDArray[Any]) -> NumericError:
    at = piece.first + int(np.flatnonzero(ranks == 0)[0])
    return NumericError(
        f"the logits at token {at} of the answer hold NaN, +inf or nothing but -inf: one of the two models produced no number"
    )


def _measure(base: Tensor, aligned: Tensor, tokens: Tensor, top: int, is_top: bool) -> _Columns:
    """What `rank` and the largest logits say of rows [n, vocabulary]. A row that is no distribution has rank 0."""
    if base.dtype != aligned.dtype:
        base, aligned = base.float(), aligned.float()
    tokens = tokens.to(base.device)
    found = rank(base, aligned, tokens)
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
    return *kept, np.exp(logprobs)  # torch takes a hundred times as long for so few numbers


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
    each = np.arange(len(rows))
    values, ids = np.empty((len(rows), count), np.float32), np.empty((len(rows), count), np.int32)
    for i in range(count):
        best = rows.argmax(axis=1)
        ids[:, i], values[:, i] = best, rows[each, best]
        if i + 1 < count:
            rows[each, best] = -np.inf
    for i in reversed(range(count - 1)):  # as they were: a copy of them all takes longer
        rows[each, ids[:, i]] = values[:, i]
    return None if np.isneginf(values).any() else (torch.from_numpy(values), torch.from_numpy(ids))
