"""Progress of long work on stderr: answers, iterations, tokens, tokens per second and time left."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Clock = Callable[[], float]
_WINDOW = 15.0  # seconds the speed is taken over
_BAR_SECONDS, _LINE_SECONDS = 0.1, 10.0  # between two looks at a bar, and between two lines of a log


class Meter:
    """What requests report, summed up as it comes: the cost of a report does not depend on how many there are.

    Args:
        what: is counted, in the plural. Only answers have tokens.

    Attributes:
        total, done: answers.
        tokens, iterations: of all requests so far.
    """

    def __init__(self, total: int, clock: Clock = time.monotonic, what: str = "answers") -> None:
        self.total = total
        self._what = what
        self.done = self.tokens = self.iterations = 0
        self._under_way: dict[int, tuple[int, int]] = {}
        self._finished_tokens = 0
        self._clock = clock
        self._began = clock()
        self._samples: deque[tuple[float, int]] = deque([(self._began, 0)])

    def report(self, index: int, tokens: int, iterations: int) -> None:
        """Request `index` has so many tokens and iterations now."""
        before = self._under_way.get(index, (0, 0))
        self._under_way[index] = (tokens, iterations)
        self.tokens += tokens - before[0]
        self.iterations += iterations - before[1]

    def finish(self, index: int) -> None:
        """Request `index` has ended."""
        self._finished_tokens += self._under_way.pop(index, (0, 0))[0]
        self.done += 1

    def tokens_per_second(self) -> float:
        """Speed of the last seconds, between two calls of this; 0 before there is any."""
        now = self._clock()
        self._samples.append((now, self.tokens))
        while len(self._samples) > 2 and self._samples[1][0] <= now - _WINDOW:
            self._samples.popleft()
        then, tokens = self._samples[0]
        return (self.tokens - tokens) / (now - then) if now > then else 0.0

    def seconds_left(self) -> float | None:
        """At the speed so far, if the other answers are as long as those that have finished; None before any has."""
        if self._what != "answers" and self.done:
            return (self.total - self.done) / self.done * (self._clock() - self._began)
        if not self.done or not self._finished_tokens:
            return None
        length = self._finished_tokens / self.done
        under_way = self.tokens - self._finished_tokens
        left = max(0.0, (self.total - self.done) * length - under_way)
        return left / self.tokens * (self._clock() - self._began)

    def summary(self, *, searching: bool) -> str:
        """Answers, tokens, speed, iterations of a search and time left; fits into a line of 80 characters."""
        parts = [f"{self._what} {self.done:,}/{self.total:,}"]
        if self._what == "answers":
            speed = self.tokens_per_second()
            parts.append(f"{self.tokens:,} tokens ({speed:,.{0 if speed >= 10 else 1}f}/s)")
        if searching:
            parts.append(f"{self.iterations:,} iterations")
        left = self.seconds_left()
        if left is not None and self.done < self.total:
            parts.append(f"{_duration(left)} left")
        return ", ".join(parts)


class ProgressDisplay:
    """Shows a meter: a bar on a terminal, a line now and then elsewhere, or nothing.

    Args:
        total: answers.
        searching: whether requests report iterations.
        bar: the bar; None writes lines to stderr.
        silent: show nothing.
        what: is counted, in the plural.
    """

    def __init__(
        self, total: int, *, searching: bool, bar: Progress | None = None, silent: bool = False,
        clock: Clock = time.monotonic, what: str = "answers",
    ) -> None:  # fmt: skip
        self.meter = Meter(total, clock, what)
        self._searching = searching
        self._silent = silent
        self._clock = clock
        self._bar = bar
        self._row = None if bar is None else bar.add_task(f"{what} 0/{total:,}", total=total)
        # Nothing but its end is told of a verdict: were one left out, the bar would be behind until the next.
        self._every = _LINE_SECONDS if bar is None else _BAR_SECONDS if what == "answers" else 0.0
        self._due = clock() + self._every
        self._line = ""  # written last

    @classmethod
    def choose(cls, wanted: bool | None, total: int, *, searching: bool, what: str = "answers") -> ProgressDisplay:
        """A display, or a silent one. None shows a bar on a terminal for more than one request or any search."""
        terminal = sys.stderr is not None and sys.stderr.isatty()
        if wanted is None:
            wanted = terminal and (total > 1 or searching)
        if not wanted or not terminal:
            return cls(total, searching=searching, silent=not wanted or sys.stderr is None, what=what)
        columns = (TextColumn("{task.description}", markup=False), TimeElapsedColumn(), BarColumn(bar_width=20))
        bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty())
        return cls(total, searching=searching, bar=bar, what=what)

    def reporter(self, index: int) -> Callable[[int, int], None] | None:
        """What request `index` calls with (tokens committed, iterations); None when nothing is shown."""
        if self._silent:
            return None

        def report(tokens: int, iterations: int) -> None:
            self.meter.report(index, tokens, iterations)
            if self._clock() >= self._due:
                self._show()

        return report

    def finished(self, index: int) -> None:
        """One more request has ended."""
        self.meter.finish(index)
        if not self._silent and self._clock() >= self._due:
            self._show()

    def _show(self) -> None:
        self._due = self._clock() + self._every
        line = self.meter.summary(searching=self._searching)
        if self._bar is not None and self._row is not None:
            self._bar.update(self._row, completed=self.meter.done, description=line)
            return
        if line != self._line:
            try:
                print(line, file=sys.stderr, flush=True)
            except (OSError, ValueError):  # nobody reads it any more: no reason to end a request
                self._silent = True
            self._line = line

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self._silent:
            self._show()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
