"""The small protocols between the engine and what runs on it. The engine knows nothing of policies or searches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from raindecode.engine.branch import Branch
from raindecode.engine.sampler import Drawn, Filter
from raindecode.hidden_edits import Site


@dataclass(frozen=True, slots=True)
class Draw:
    """A draw wanted from the distribution after a branch.

    Attributes:
        shape: filters before the draw.
        key: the request's seed.
        counter: 128-bit name of the draw (engine.rng).
        greedy: take the most likely token of the filtered distribution instead of drawing.
        context: token ids the repetition penalty applies to.
        logprob: report the token's log-probability, which costs a pass over the row of logits.
    """

    shape: Filter
    key: int = 0
    counter: int = 0
    greedy: bool = False
    context: Sequence[int] | None = None
    logprob: bool = False


@dataclass(slots=True)
class Want:
    """What a search asks of one step, after all tokens of `branch` have run.

    Attributes:
        draws: tokens to draw from the next-token distribution.
        top: the k most likely next tokens with probabilities over these k; 0 for none.
        gather: ids whose logits are wanted.
        logits: the whole row, on the host.
        keep: hold the row for later wants at the same place, so that the last token is not run again.
        pool_from: path positions; the mean final hidden state from each to the branch's end is returned.
        taps: places whose hidden states are wanted, of the first model that takes part, before the edits of that place.
        taps_from: path position; the mean of each place's states from there to the branch's end is returned. These tokens run
            whether their K/V are cached or not.
        rows_from: path position; the rows of logits after every token from there to the branch's end are returned where the models
            left them, of every model that takes part. These tokens run whether their K/V are cached or not.
    """

    branch: Branch
    draws: Sequence[Draw] = ()
    top: int = 0
    gather: Sequence[int] = ()
    logits: bool = False
    keep: bool = False
    pool_from: Sequence[int] = ()
    taps: Sequence[Site] = ()
    taps_from: int = 0
    rows_from: int | None = None

    @property
    def needs_logits(self) -> bool:
        return bool(self.draws or self.top or self.gather or self.logits or self.keep)


@dataclass(slots=True)
class Got:
    """The answer to a Want; fields that were not asked for are empty."""

    drawn: list[Drawn] = field(default_factory=list)
    top_ids: list[int] = field(default_factory=list)
    top_probs: list[float] = field(default_factory=list)
    gathered: list[float] = field(default_factory=list)
    logits: npt.NDArray[np.float32] | None = None
    pooled: Tensor | None = None  # [len(pool_from), hidden_size] float32
    tapped: Tensor | None = None  # [len(taps), hidden_size] float32
    rows: list[Tensor | None] = field(default_factory=list)  # per model [n, vocabulary]; None of one that does not run


@dataclass(frozen=True, slots=True)
class HostCall:
    """Work outside the model (an evaluator, an embedder): calls of all tasks with the same function are one batch.

    `function` takes a list of items and returns a list of as many results.
    """

    function: Callable[[list[Any]], Sequence[Any]]
    items: Sequence[Any]


# A search is a generator: it yields what it wants and is sent the answers; what it returns is the result.
Yielded: TypeAlias = "Sequence[Want] | HostCall"
Search: TypeAlias = Generator[Yielded, Any, Any]
