"""Jobs: what a request has under way, handed from the thread that steps the engine to the one that talks HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

from raindecode.engine.task import Task
from raindecode.search.edited import Searches
from raindecode.server.faults import Fault
from raindecode.types import Completion, PromptLogprobs, Request, TokenLogprob


class Choice(NamedTuple):
    """One answer to make."""

    request: Request
    search: Searches


class Piece(NamedTuple):
    """What an answer grew by: text that is final, and the tokens committed since the piece before."""

    choice: int
    text: str
    tokens: list[TokenLogprob]
    likeliest: list[list[TokenLogprob]]


class Ended(NamedTuple):
    """An answer that is whole."""

    choice: int
    result: Completion | PromptLogprobs


Event = Piece | Ended


class Job:
    """The answers of one request.

    The engine's thread calls `begin`, `end`, `drop` and `take`; the event loop everything else.

    Args:
        choices: what to answer.
        streams: whether pieces are wanted, or whole answers only.

    Attributes:
        submitted, started, first_token, ended: time.perf_counter(), None until then.
        fault: why it has no answers, where that is so.
        at_end: called in the event loop when it is over.
    """

    def __init__(self, choices: Sequence[Choice], *, streams: bool) -> None:
        self.choices = choices
        self.streams = streams
        self.tasks: list[Task] = []
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.first_token: float | None = None
        self.ended: float | None = None
        self.results: list[Any] = [None] * len(choices)
        self.tokens = 0  # committed so far
        self.fault: Fault | None = None
        self.at_end: Callable[[], None] = _nothing
        self._open = set(range(len(choices)))
        self._unsent: list[tuple[list[TokenLogprob], list[list[TokenLogprob]]]] = [([], []) for _ in choices]
        self._fresh: list[Event] = []  # of the engine's thread
        self._events: list[Event] = []  # of the event loop
        self._wake = asyncio.Event()
        self._over = False

    # ---- the engine's thread --------------------------------------------------------------------------------------
    def begin(self, decoder: Any) -> list[Task]:
        """The tasks to submit."""
        self.tasks = [self._task(decoder, i, choice) for i, choice in enumerate(self.choices)]
        if self.fault is not None:  # it was cancelled while it waited here
            for task in self.tasks:
                task.cancel()
        return self.tasks

    def _task(self, decoder: Any, index: int, choice: Choice) -> Task:
        def wrote(text: str) -> None:
            tokens, likeliest = self._unsent[index]
            self._fresh.append(Piece(index, text, tokens, likeliest))
            self._unsent[index] = ([], [])

        def took(token: TokenLogprob, likeliest: list[TokenLogprob]) -> None:
            if self.first_token is None:
                self.first_token = time.perf_counter()
            self.tokens += 1
            if self.streams:
                tokens, others = self._unsent[index]
                tokens.append(token)
                others.append(likeliest)

        made: Task = decoder.task(
            choice.request, choice.search, tag=(self, index), on_text=wrote if self.streams else None, on_token=took
        )
        made.search = _noting(made.search, self._starts)
        return made

    def _starts(self) -> None:
        if self.started is None:
            self.started = time.perf_counter()

    def end(self, task: Task, index: int) -> None:
        """One answer ended. Told twice, it counts once."""
        if index not in self._open:
            return
        self._open.remove(index)
        if task.error is not None:
            self.fail(Fault.of(task.error))
        else:
            tokens, likeliest = self._unsent[index]
            if tokens:
                self._fresh.append(Piece(index, "", tokens, likeliest))
            self.results[index] = task.result
            self._fresh.append(Ended(index, task.result))
        if not self._open:
            self.ended = time.perf_counter()

    def fail(self, fault: Fault) -> None:
        """End it at the next step. The first fault of a job counts."""
        self.fault = self.fault or fault
        for task in self.tasks:
            task.cancel()

    def drop(self, fault: Fault) -> None:
        """End it now: no step will."""
        self.fail(fault)
        self._open.clear()
        self.ended = time.perf_counter()

    def take(self) -> tuple[list[Event], bool]:
        """What happened since the last call, and whether all answers ended."""
        fresh, self._fresh = self._fresh, []
        if not self._open:
            self.tasks = []  # they know the job, too: nothing is to wait for the garbage collector
        return fresh, not self._open

    @property
    def has_news(self) -> bool:
        """Whether `take` would give anything."""
        return bool(self._fresh) or not self._open

    # ---- the event loop -------------------------------------------------------------------------------------------
    def deliver(self, events: list[Event], over: bool) -> None:
        """Hand over what `take` gave."""
        self._events += events
        self._over = self._over or over
        if over or events:
            self._wake.set()

    @property
    def is_over(self) -> bool:
        """Whether all answers ended, and this is known here."""
        return self._over

    @property
    def is_drained(self) -> bool:
        """Whether there is nothing more to come from `next_events`."""
        return self._over and not self._events

    async def wait(self) -> None:
        """Until all answers ended."""
        while not self._over:
            await self._wake.wait()
            self._wake.clear()

    async def next_events(self) -> list[Event]:
        """What happened since the last call; empty when all is over. Pieces a slow reader left lying come together."""
        while not self._events and not self._over:
            await self._wake.wait()
            self._wake.clear()
        events, self._events = self._events, []
        return events


def _nothing() -> None:
    pass


def _noting(search: Generator[Any, Any, Any], note: Callable[[], None]) -> Generator[Any, Any, Any]:
    """A search that says when it is begun."""
    note()
    return (yield from search)
