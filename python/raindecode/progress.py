"""Progress of long work on stderr: answers, iterations, tokens and time left. Silent when stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressDisplay:
    """Counts what requests report and shows it, when it shows anything."""

    def __init__(self, progress: Progress | None, total: int, searching: bool) -> None:
        self._progress = progress
        self._searching = searching
        self._tokens: dict[int, int] = {}
        self._iterations: dict[int, int] = {}
        self._bar = None if progress is None else progress.add_task("answers", total=total, note="")

    @classmethod
    def choose(cls, wanted: bool | None, total: int, *, searching: bool) -> ProgressDisplay:
        """A display, or a silent one. None shows it on a terminal for more than one request or any search."""
        if wanted is None:
            wanted = sys.stderr.isatty() and (total > 1 or searching)
        if not wanted:
            return cls(None, total, searching)
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        return cls(
            Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()),
            total,
            searching,
        )

    def reporter(self, index: int) -> Callable[[int, int], None]:
        """What request `index` calls with (tokens committed, iterations)."""

        def report(tokens: int, iterations: int) -> None:
            self._tokens[index], self._iterations[index] = tokens, iterations
            self._show()

        return report

    def finished(self, index: int) -> None:
        """One more request has ended."""
        if self._progress is not None and self._bar is not None:
            self._progress.advance(self._bar)

    def _show(self) -> None:
        if self._progress is None or self._bar is None:
            return
        note = f"{sum(self._tokens.values())} tokens"
        if self._searching:
            note += f", {sum(self._iterations.values())} iterations"
        self._progress.update(self._bar, note=note)

    def __enter__(self) -> ProgressDisplay:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
