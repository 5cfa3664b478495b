"""Where completions go: the terminal, JSON lines on standard output, a JSON-lines file, a file of search trees."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.text import Text

from raindecode.commands.answer_file import AnswerFile, Record, check_settings
from raindecode.commands.common import printable
from raindecode.errors import ConfigError
from raindecode.types import Completion, Request


class Output:
    """Takes completions as they finish. A context manager.

    The JSON-lines file gets each at once, so that a killed run loses nothing that has finished; standard output and the
    search trees come in the order of the requests. On the way out these get what has finished behind a request that has not.

    Args:
        samples: completions per prompt; index and sample of a record follow from it.
        as_json: JSON lines on standard output instead of text for people.
        silent: nothing on standard output, because the answer was streamed there.
        file: JSON-lines file to write as well.
        resume, overwrite: what to do with answers it holds; see AnswerFile.
        tree: file for the RAIN search trees, which then leave the JSON lines.

    Raises:
        ConfigError: a file cannot be written or holds answers; raised before anything has run.
    """

    def __init__(
        self, *, samples: int, as_json: bool, silent: bool = False, file: str | None = None, resume: bool = False,
        overwrite: bool = False, tree: str | None = None,
    ) -> None:  # fmt: skip
        if sys.stdout is None:
            raise ConfigError("standard output is closed: give it somewhere to go, such as > answers.txt")
        self._samples = samples
        self._as_json = as_json
        self._silent = silent
        self._real = sys.stdout
        self._console = Console(file=self._real, highlight=False)
        if file is not None and tree is not None and Path(file).resolve() == Path(tree).resolve():
            raise ConfigError(f"--output and --tree both name {file!r}: give each a file of its own")
        self._file = None if file is None else AnswerFile(file, resume=resume, overwrite=overwrite)
        self._tree_file = None if tree is None else open_for_writing(tree)
        self._begun = False
        self._trees = 0  # written so far
        self._settings: Record = {}
        self._waiting: dict[int, Completion | None] = {}
        self._next = 0
        self.finished = 0

    @property
    def has_file(self) -> bool:
        """Whether answers go to a file as well."""
        return self._file is not None

    def begin(self, requests: Sequence[Request], settings: Record) -> list[int]:
        """Which of `requests` to answer: those the file has no answer to.

        Args:
            settings: what decides an answer besides prompt and seed; every record carries them.

        Raises:
            ConfigError: the file holds something that is no answer to one of these requests with these settings.
        """
        self._settings = settings
        self._begun = True
        if self._file is not None:
            self._file.begin()
        if self._tree_file is not None and Path(self._tree_file.name).is_file():  # a device holds nothing
            self._tree_file.truncate(0)
        done: set[int] = set()
        if self._file is not None and self._file.resume:
            for number, record in self._file.records():
                check_settings(self._file.path, number, record, settings)
                done.add(self._answered(number, record, requests, done))
        for index in done:
            self._pass_on(index, None)
        self.finished = len(done)
        return [index for index in range(len(requests)) if index not in done]

    def add(self, index: int, completion: Completion | None) -> None:
        """A request has ended; None when it failed."""
        if completion is not None:
            if self._file is not None:
                self._file.write(self._record(index, completion))
            self.finished += 1
        self._pass_on(index, completion)

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
                    if self._begun:
                        file.write("]\n" if self._trees else "[]\n")
        finally:
            if self._file is not None:
                self._file.close()

    def _answered(self, number: int, record: Record, requests: Sequence[Request], done: set[int]) -> int:
        """The request a record answers."""
        assert self._file is not None
        index, sample = record.get("index"), record.get("sample")
        where = f"line {number} of {self._file.path!r}"
        if not (isinstance(index, int) and isinstance(sample, int) and index >= 0 <= sample < self._samples):
            at = len(requests)
        else:
            at = index * self._samples + sample
        if at >= len(requests):
            raise ConfigError(
                f"{where} holds prompt {index}, sample {sample}; this run has {len(requests) // self._samples} prompts, "
                f"{self._samples} samples each: give the same prompts to go on, or name another file"
            )
        for name, mine in (("prompt", requests[at].prompt), ("seed", requests[at].seed)):
            if record.get(name) != mine:
                raise ConfigError(
                    f"{where} has as {name} of prompt {index}, sample {sample}: {record.get(name)!r:.60}; this run has "
                    f"{mine!r:.60}: give the same prompts and seed to go on, or name another file"
                )
        if at in done:
            raise ConfigError(
                f"{where} holds prompt {index}, sample {sample} a second time: remove one of the two lines"
            )
        return at

    def _pass_on(self, index: int, completion: Completion | None) -> None:
        self._waiting[index] = completion
        while self._next in self._waiting:
            self._write(self._next, self._waiting.pop(self._next))
            self._next += 1

    def _write(self, index: int, completion: Completion | None) -> None:
        """To standard output and the file of trees, in the order of the requests."""
        if completion is None:
            return
        if self._tree_file is not None:
            named = {"prompt": completion.prompt, "text": completion.text, "seed": completion.seed}
            entry = {**self._where(index), **named, "moves": completion.tree or []}
            self._tree_file.write((", " if self._trees else "[") + json.dumps(entry))
            self._trees += 1
        if self._as_json:
            self.show(json.dumps(self._record(index, completion)) + "\n")
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

    def _record(self, index: int, completion: Completion) -> Record:
        record = replace(completion, tree=None).to_json()
        del record["tree"]
        return {**self._where(index), **record, "settings": self._settings}

    def _where(self, index: int) -> Record:
        return {"index": index // self._samples, "sample": index % self._samples}


def open_for_writing(path: str) -> IO[str]:
    """A text file; what it holds stays until it is truncated.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        return Path(path).open("a", encoding="utf-8")
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
    if completion.mixture is not None:
        parts.append(f"KL {completion.mixture.kl_reference:.2f} nats")
    parts.append(f"{stats.seconds.get('total', sum(stats.seconds.values())):.2f} s")
    return " · ".join(parts)
