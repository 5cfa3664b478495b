"""Where completions go: the terminal, JSON lines on standard output, a JSON-lines file, a file of search trees."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from raindecode.commands.common import printable
from raindecode.errors import ConfigError
from raindecode.types import Completion


class Output:
    """Takes completions as they finish and writes them in the order of the requests. A context manager.

    On the way out it writes what has finished, even behind a request that has not: an interrupted run keeps its answers.

    Args:
        samples: completions per prompt; index and sample of a record follow from it.
        as_json: JSON lines on standard output instead of text for people.
        silent: nothing on standard output, because the answer was streamed there.
        file: JSON-lines file to write as well.
        tree: file for the RAIN search trees, which then leave the JSON lines.

    Raises:
        ConfigError: a file cannot be written; raised before anything has run.
    """

    def __init__(
        self, *, samples: int, as_json: bool, silent: bool = False, file: str | None = None, tree: str | None = None
    ) -> None:
        if sys.stdout is None:
            raise ConfigError("standard output is closed: give it somewhere to go, such as > answers.txt")
        self._samples = samples
        self._as_json = as_json
        self._silent = silent
        self._real = sys.stdout
        self._console = Console(file=self._real, highlight=False)
        self._tree = tree
        self._tree_file = None if tree is None else open_for_writing(tree)
        self._file = None if file is None else open_for_writing(file)
        self._trees: list[dict[str, Any]] = []
        self._waiting: dict[int, Completion | None] = {}
        self._next = 0
        self.written = 0

    def add(self, index: int, completion: Completion | None) -> None:
        """A request has ended; None when it failed."""
        self._waiting[index] = completion
        while self._next in self._waiting:
            self._write(self._next, self._waiting.pop(self._next))
            self._next += 1

    def flush(self) -> None:
        """Write what has finished behind a request that has not."""
        for index in sorted(self._waiting):
            self._write(index, self._waiting[index])
        self._waiting.clear()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
            if self._tree_file is not None:
                with self._tree_file as file:
                    json.dump(self._trees, file)
                    file.write("\n")
        finally:
            if self._file is not None:
                self._file.close()

    def _write(self, index: int, completion: Completion | None) -> None:
        if completion is None:
            return
        self.written += 1
        line = json.dumps(self._record(index, completion)) + "\n"  # ASCII: safe for any encoding and splitlines()
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
        if self._as_json:
            self.show(line)
        elif not self._silent:
            with self._console.capture() as captured:
                self._console.print(for_people(completion), soft_wrap=True)
            self.show(captured.get() + "\n")

    def show(self, text: str) -> None:
        """Write to standard output.

        A progress display puts itself in the place of sys.stdout and sends everything to the terminal it draws on. That
        is right when standard output is that terminal, and loses the text when it is a file or a pipe.
        """
        stream = sys.stdout if self._real.isatty() else self._real
        encoding = self._real.encoding or "utf-8"
        stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()

    def _record(self, index: int, completion: Completion) -> dict[str, Any]:
        where = {"index": index // self._samples, "sample": index % self._samples}
        record = completion.to_json()
        moves = record.pop("tree")
        if self._tree is not None:
            named = {"prompt": completion.prompt, "text": completion.text, "seed": completion.seed}
            self._trees.append({**where, **named, "moves": moves or []})
        return {**where, **record}


def open_for_writing(path: str) -> IO[str]:
    """A text file, emptied.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        return Path(path).open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path!r} cannot be written ({error.strerror}): name a file in a folder that exists"
        ) from error


def for_people(completion: Completion) -> Text:
    """Prompt, answer, and one line of counters."""
    text = Text(printable(completion.prompt.strip()), style="bold")
    text.append("\n" + (printable(completion.text.strip()) or "(no text)") + "\n", style="not bold")
    return text.append(counters(completion), style="not bold dim")


def counters(completion: Completion) -> str:
    """One line that says how the answer ended and what it cost."""
    stats = completion.stats
    parts = [
        f"{len(completion.token_ids)} tokens",
        {"eos": "ended by itself", "stop": "stopped", "length": "token limit"}[completion.finish_reason],
        f"seed {completion.seed}",
        f"{stats.model_steps} forwards",
        f"{stats.tokens_processed} tokens processed",
    ]
    if stats.iterations:
        parts += [f"{stats.iterations} iterations", f"{stats.evaluations} evaluations"]
    if completion.value is not None:
        parts.append(f"value {completion.value:+.2f}")
    if completion.logprobs:
        mean = sum(token.logprob for token in completion.logprobs) / len(completion.logprobs)
        parts.append(f"mean log-probability {mean:.2f}")
    parts.append(f"{stats.seconds.get('total', sum(stats.seconds.values())):.2f} s")
    return " · ".join(parts)
