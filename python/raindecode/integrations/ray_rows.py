"""Rows of a batch job: what the input file holds, what the output file has of it already, and what its records say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from raindecode.commands.answer_file import AnswerFile, Record, check_settings
from raindecode.commands.prompts import Messages, prompt_of_line
from raindecode.errors import ConfigError, PromptError
from raindecode.policy.policy import Policy
from raindecode.policy.prompt import Conversation
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling

FOUND_OUT = ("dtype", "device", "exact")
"""Settings of a record that only the process which loaded the model knows."""
_NO_MATTER = ("width", "record_tree")  # of RAIN: they do not change an answer


@dataclass(frozen=True)
class Row:
    """One line of the input file that is not blank.

    Attributes:
        index: its number among these lines, from 0, as in `raindecode generate`.
        given: a prompt, or a conversation; None when the line holds neither.
        error: why it does not.
    """

    index: int
    given: str | Messages | None = None
    error: PromptError | None = None

    @property
    def head(self) -> Record:
        """What its record begins with."""
        return {"index": self.index, "sample": 0}

    @property
    def marks(self) -> Record:
        """What its record tells it by, besides the seed: the prompt, of a conversation the user's last words and a hash of all."""
        if self.given is None or isinstance(self.given, str):
            return {"prompt": self.given}
        return {"prompt": Conversation.of(self.given).prompt, "messages_sha256": digest(self.given)}


def read_rows(path: str) -> list[Row]:
    """The rows of a JSON-lines file, bad ones included.

    Args:
        path: {"prompt": ...} or {"messages": [...]} per line, UTF-8; blank lines are skipped.

    Raises:
        PromptError: the file cannot be read, or every line is blank.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise PromptError(
            f"the prompt file {path!r} cannot be read ({error.strerror}): give a JSON-lines file"
        ) from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise PromptError(f'{path} holds no row: write {{"prompt": "..."}} on every line')
    return [_row(index, line, f"line {number} of {path}") for index, (number, line) in enumerate(numbered)]


def _row(index: int, line: bytes, where: str) -> Row:
    try:
        return Row(index, prompt_of_line(line.decode("utf-8"), where))
    except UnicodeDecodeError as error:
        wrong = PromptError(
            f"{where} is not UTF-8 text: byte {line[error.start]:#04x} at offset {error.start} of the line begins no valid "
            "character; convert it to UTF-8"
        )
        return Row(index, error=wrong)
    except PromptError as error:
        return Row(index, error=error)


def answered(file: AnswerFile, rows: Sequence[Row], seed: int, settings: Record) -> set[int]:
    """Indices of the rows that a file has records of, errors included.

    Raises:
        ConfigError: it holds something that is no record of one of these rows with these settings.
    """
    done: set[int] = set()
    for number, record in file.records():
        found = record.get("settings")
        known = {k: v for k, v in found.items() if k not in FOUND_OUT} if isinstance(found, dict) else found
        check_settings(file.path, number, {"settings": known}, settings)
        index = record.get("index")
        where = f"line {number} of {file.path!r}"
        if not isinstance(index, int) or not 0 <= index < len(rows) or record.get("sample") != 0:
            raise ConfigError(
                f"{where} holds row {index}, sample {record.get('sample')}; this job has {len(rows)} rows, one sample each: give "
                "the same input to go on, or name another file"
            )
        if index in done:
            raise ConfigError(f"{where} holds row {index} a second time: remove one of the two lines")
        for name, mine in {**rows[index].marks, "seed": seed + index}.items():
            if record.get(name) != mine:
                raise ConfigError(
                    f"{where} has as {name} of row {index}: {record.get(name)!r:.60}; this job has {mine!r:.60}: give the same "
                    "input and seed to go on, or name another file"
                )
        done.add(index)
    return done


def settings_of(search: Sampling | RAIN, policy: Policy) -> Record:
    """What decides how tokens are chosen, as plain data for records. Defaults are left out; what is long is named by its hash."""
    rain = isinstance(search, RAIN)
    shape: Record = {"search": "rain" if rain else "sampling"}
    shape |= _changed(search)
    if policy.prompt is not None:
        shape["prompt_sha256"] = digest(policy.prompt)
    if policy.dera is not None:
        weights = {} if policy.dera.kl is not None else {"lambda": plain(policy.dera.weights)}
        shape |= {**weights, **{k: v for k, v in _changed(policy.dera).items() if k != "weights"}}
    assert isinstance(policy.edits, tuple)
    if policy.edits:
        shape["edit"] = [
            {"name": edit.name, "strength": edit.strength, "on": edit.on, "judge": edit.judge} for edit in policy.edits
        ]
    return shape


def _changed(settings: Any) -> Record:
    changed: Record = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name in _NO_MATTER or plain(value) == plain(default):
            continue
        short = isinstance(value, (int, float)) or (
            isinstance(value, tuple) and all(isinstance(v, (int, float, str)) for v in value)
        )
        changed |= {field.name: plain(value)} if short else {f"{field.name}_sha256": digest(value)}
    return changed


def digest(value: Any) -> str:
    """A name for data that is the same in every process."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()[:32]


def plain(value: Any) -> Any:
    """`value` as data for json.dumps. A function, or an object of a class of one's own, goes by its name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (Sequence, set, frozenset)):
        return [plain(v) for v in (value if isinstance(value, Sequence) else sorted(value))]
    if isinstance(value, Tensor):
        return [list(value.shape), value.detach().cpu().tolist()]
    named = value if hasattr(value, "__qualname__") else type(value)
    name = f"{named.__module__}.{named.__qualname__}"
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": name, **{f.name: plain(getattr(value, f.name)) for f in fields(value)}}
    return name
