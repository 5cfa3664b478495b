"""Pairs of a wanted and an unwanted answer to one question, and the files that hold them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from raindecode.errors import ConfigError

HEADER: Final = "raindecode_pairs"
"""Key of a file's first line, where `generate_pairs` says how the pairs were made."""

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_WANTED: Final = (
    'give one JSON object per line: {"prompt": ..., "chosen": ..., "rejected": ...}; the three are texts or lists of '
    '{"role": ..., "content": ...}; without "prompt", chosen and rejected are whole dialogues ("\\n\\nHuman: ... '
    '\\n\\nAssistant: ...", or such lists) that begin alike'
)


@dataclass(frozen=True)
class Pair:
    """Two answers to one question.

    Attributes:
        prompt: the question, without any chat format around it.
        chosen, rejected: the wanted answer and the unwanted one, as they follow a formatted prompt: a space in front stays.
        chosen_trait, rejected_trait: what the model was asked to be, in self-generated pairs.
        chosen_prompt, rejected_prompt: what each answer was really generated from, in self-generated pairs. Its last hidden
            state holds the contrast before a word of the answer is said.
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_trait: str | None = None
    rejected_trait: str | None = None
    chosen_prompt: str | None = None
    rejected_prompt: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen", "rejected"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ConfigError(f"the pair's {name} is {value!r:.60}; give a text that is not blank")
        for entry in fields(self)[3:]:
            value = getattr(self, entry.name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"the pair's {entry.name} is {value!r:.60}; give a text, or leave it out")
        if self.chosen.strip() == self.rejected.strip():
            raise ConfigError(f"chosen and rejected are the same text, {self.chosen!r:.60}: a pair needs two answers")

    def to_json(self) -> dict[str, str]:
        """Plain data for json.dumps, without what is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class PairSet(Sequence[Pair]):
    """Pairs, and what became of those that were dropped.

    Attributes:
        pairs: in the order of the questions.
        dropped: how many were left out, by reason.
        stats: counters of the run that made them: "questions", "asked" and "reused" pairs, "tokens" generated.
    """

    pairs: tuple[Pair, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    stats: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        return self.pairs[index]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @property
    def fingerprint(self) -> str:
        """A hash of all pairs in their order, to recognise the data an edit was fitted on."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            digest.update(json.dumps(pair.to_json(), sort_keys=True).encode() + b"\n")
        return digest.hexdigest()[:32]


def write_pairs(path: str | os.PathLike[str], pairs: Iterable[Pair]) -> None:
    """Write one JSON object per line, as `read_pairs` reads them.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        with Path(path).open("w", encoding="ascii") as file:
            file.writelines(json.dumps(pair.to_json()) + "\n" for pair in pairs)
    except OSError as error:
        raise ConfigError(
            f"{os.fspath(path)!r} cannot be written ({error.strerror}): name a file in a folder that exists"
        ) from error


def read_pairs(path: str | os.PathLike[str]) -> PairSet:
    """Read pairs from JSON lines.

    Each line has "chosen" and "rejected", and mostly "prompt". All three are texts, or lists of messages with role and
    content: a prompt may end in several turns, an answer is one assistant message. Without "prompt", chosen and rejected are
    whole dialogues; what they share is the prompt and the last assistant turn is the answer. A single human turn is read as the
    question alone, a longer dialogue as its transcript up to the last "Assistant:". Files of `generate_pairs` are read too: pairs
    dropped there are dropped here. Blank lines are skipped.

    Raises:
        ConfigError: the file cannot be read, holds no pair, or a line is wrong; the message names the line and what belongs there.
    """
    where = os.fspath(path)
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"{where!r} cannot be read ({error.strerror}): name a file of pairs") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where!r} is not UTF-8 text (byte {error.start}): {_WANTED}") from error
    pairs: list[Pair] = []
    dropped: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _record(line, f"line {number} of {where!r}")
        if HEADER in record:
            continue
        reason = record.get("dropped")
        if isinstance(reason, str):
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        try:
            pairs.append(pair_of(record))
        except ConfigError as error:
            raise ConfigError(f"line {number} of {where!r}: {error}") from error
    if not pairs:
        raise ConfigError(f"{where!r} holds no pair: {_WANTED}")
    return PairSet(tuple(pairs), dropped)


def pair_of(record: Mapping[str, Any]) -> Pair:
    """A pair from one record in any of the forms of `read_pairs`; unknown keys are left alone.

    Raises:
        ConfigError: something is missing or of another form.
    """
    missing = [name for name in ("chosen", "rejected") if name not in record]
    if missing:
        raise ConfigError(f"there is no {' and no '.join(map(repr, missing))}: {_WANTED}")
    known = {entry.name: record.get(entry.name) for entry in fields(Pair)[3:]}
    if record.get("prompt") is None:
        stem, chosen, rejected = _split(_dialogue("chosen", record), _dialogue("rejected", record))
        return Pair(stem, chosen, rejected, **known)
    return Pair(_prompt(record["prompt"]), _answer("chosen", record), _answer("rejected", record), **known)


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON ({line[:40]!r}): {_WANTED}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where} is a JSON {type(record).__name__}, not an object: {_WANTED}")
    return record


def _messages(name: str, value: list[Any]) -> list[tuple[str, str]]:
    found = []
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ConfigError(f"{name} holds the message {message!r:.80}; each has a text 'role' and a text 'content'")
        found.append((role, content))
    if not found:
        raise ConfigError(f"{name} is an empty list of messages; give at least one")
    return found


def _transcript(messages: Sequence[tuple[str, str]]) -> str:
    speakers = {"user": _HUMAN, "human": _HUMAN, "assistant": _ASSISTANT}
    return "".join(
        f"{speakers[role]} {content}" if role in speakers else f"\n\n{content}" for role, content in messages
    )


def _prompt(value: object) -> str:
    if isinstance(value, list):
        messages = _messages("prompt", value)
        return messages[0][1] if len(messages) == 1 else _transcript(messages) + _ASSISTANT
    if not isinstance(value, str):
        raise ConfigError(f"prompt is {value!r:.60}; allowed: a text or a list of messages")
    return value


def _answer(name: str, record: Mapping[str, Any]) -> str:
    value = record[name]
    if not isinstance(value, list):
        return _text(name, value)
    messages = _messages(name, value)
    if len(messages) > 1 and isinstance(record["prompt"], list):  # some files repeat the prompt in front of the answer
        prompt = _messages("prompt", record["prompt"])
        messages = messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages
    elif len(messages) == 2 and messages[0][1] == record["prompt"]:
        messages = messages[1:]
    if len(messages) != 1 or messages[0][0] != "assistant":
        roles = ", ".join(role for role, _ in messages)
        raise ConfigError(
            f"{name} has messages of {roles or 'nobody'} behind the prompt; allowed: one of the assistant"
        )
    return messages[0][1]


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {value!r:.60}; allowed: a text or a list of messages")
    return value


def _dialogue(name: str, record: Mapping[str, Any]) -> str:
    value = record[name]
    text = _transcript(_messages(name, value)) if isinstance(value, list) else _text(name, value)
    if _ASSISTANT not in text:
        raise ConfigError(f'{name} is {text!r:.60} without "\\n\\nAssistant:", and there is no prompt: {_WANTED}')
    return text


def _split(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt two dialogues share, and the answer of each: what follows the last "Assistant:" in both."""
    ends = [text.rindex(_ASSISTANT) + len(_ASSISTANT) for text in (chosen, rejected)]
    stem = chosen[: ends[0]]
    if stem != rejected[: ends[1]]:
        both = list(zip(chosen, rejected, strict=False))
        at = next((i for i, (a, b) in enumerate(both) if a != b), len(both))
        raise ConfigError(
            f"chosen and rejected part at character {at}, before the last turn of the assistant: they must share all but "
            "their last answer"
        )
    single = stem.startswith(_HUMAN) and stem.count(_HUMAN) == 1 and stem.count(_ASSISTANT) == 1
    question = stem[len(_HUMAN) : -len(_ASSISTANT)].strip() if single else stem
    return question, chosen[ends[0] :], rejected[ends[1] :]
