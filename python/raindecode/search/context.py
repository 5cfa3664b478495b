"""What every search is given, and how several of its jobs advance in lock-step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from raindecode.engine.branch import Branch, Ledger
from raindecode.engine.edit_path import EditPath
from raindecode.engine.engine import Engine
from raindecode.engine.types import HostCall, Search, Want
from raindecode.text import Codec
from raindecode.types import Request, Stats, TokenLogprob


@dataclass(frozen=True)
class SearchContext:
    """One request's surroundings.

    Attributes:
        on_text: called with each piece of committed text, when streaming.
        on_token: called with each committed token and the likeliest ones at its place; what RAIN commits has no log-probability (NaN).
        on_progress: called with (tokens committed, iterations) as the search advances.
        edits: of the request's rows, judge_edits: of those of the model that judges its answers; None for none.
    """

    engine: Engine
    codec: Codec
    ledger: Ledger
    request: Request
    on_text: Callable[[str], None] | None = None
    on_token: Callable[[TokenLogprob, list[TokenLogprob]], None] | None = None
    on_progress: Callable[[int, int], None] | None = None
    edits: EditPath | None = None
    judge_edits: EditPath | None = None

    def open(self, tokens: Sequence[int]) -> Branch:
        """A branch of `tokens` under the request's mixture and edits."""
        return self.engine.open(self.ledger, tokens, self.request.mix, self.edits)

    def open_first(self, tokens: Sequence[int]) -> Branch:
        """As `open`, of the first model of the mixture alone: the reference, unless its weight is 0."""
        return self.engine.open(self.ledger, tokens, self.request.mix.only_first, self.edits)

    def open_judge(self, tokens: Sequence[int]) -> Branch:
        """A branch of `tokens` of the model of `open_first`, its rows edited only where an edit asks to be judged by."""
        return self.engine.open(self.ledger, tokens, self.request.mix.only_first, self.judge_edits)

    def keep_for_judge(self, tokens: Sequence[int]) -> None:
        """Have the K/V of these tokens, as `open_judge` makes them, outlast the request."""
        self.engine.pin_at_end(self.ledger, tokens, self.request.mix.only_first, self.judge_edits)

    def keep_prompt(self) -> None:
        """Have the K/V of the constant part of the prompt outlast the request."""
        request = self.request
        self.engine.pin_at_end(self.ledger, request.prompt_ids[: request.constant], request.mix, self.edits)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end the request's answer."""
        return self.codec.eos_token_ids if self.request.eos_token_ids is None else self.request.eos_token_ids

    @property
    def first_model(self) -> PreTrainedModel:
        """The model of `open_first`."""
        return self.engine.models[self.request.mix.first][0].model

    def stats(self, *, iterations: int = 0, evaluations: int = 0) -> Stats:
        """The request's counters so far."""
        self.ledger.measure()
        ledger = self.ledger
        return Stats(
            model_steps=ledger.model_steps,
            tokens_processed=ledger.tokens_processed,
            tokens_charged=ledger.tokens_charged,
            kv_tokens_peak=ledger.kv_tokens_peak,
            iterations=iterations,
            evaluations=evaluations,
            seconds=dict(ledger.seconds),
        )


def together(*jobs: Search) -> Generator[Any, Any, list[Any]]:
    """Advance jobs in lock-step: what they want goes into the same forwards. Their results, in order.

    A host call of one job is made before the others' next forward.
    """
    results: list[Any] = [None] * len(jobs)
    wanted: dict[int, Sequence[Want]] = {}
    inbox: dict[int, Any] = dict.fromkeys(range(len(jobs)))
    try:
        while inbox:
            for index in sorted(inbox):
                value = inbox[index]
                try:
                    yielded = jobs[index].send(value)
                    while isinstance(yielded, HostCall):
                        try:
                            answer = yield yielded
                        except Exception as error:
                            yielded = jobs[index].throw(error)
                        else:
                            yielded = jobs[index].send(answer)
                except StopIteration as stop:
                    results[index] = stop.value
                else:
                    wanted[index] = yielded
            inbox = {}
            if wanted:
                order = sorted(wanted)
                answers = yield [want for index in order for want in wanted[index]]
                at = 0
                for index in order:
                    inbox[index] = answers[at : at + len(wanted[index])]
                    at += len(wanted[index])
                wanted = {}
    finally:
        for job in jobs:
            job.close()
    return results
