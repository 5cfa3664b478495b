"""Answers that were written before: a JSON-lines file such as `raindecode generate --output` makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from raindecode.errors import PromptError
from raindecode.text import Codec

_FORM = '{"prompt": "...", "text": "..."}'


class GivenAnswer(NamedTuple):
    """A line of the file. `token_ids` is what it says its text is made of; None where it does not."""

    prompt: str
    text: str
    token_ids: list[int] | None

    def as_given(self, codec: Codec) -> str | list[int]:
        """The token ids where they spell the text with this tokenizer, or else the text."""
        ids = self.token_ids
        known = len(codec.tokenizer)
        if ids and all(0 <= token < known for token in ids) and self.text.strip() in codec.decode(ids):
            return ids
        return self.text


def read_answers(file: str) -> list[GivenAnswer]:
    """The answers of a file, in its order.

    Raises:
        PromptError: it cannot be read, is empty, or a line is no answer; the message says which.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise PromptError(
            f"the answers {file!r} cannot be read ({error.strerror}): give a file of `raindecode generate --output`"
        ) from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{file} is not UTF-8 text (at byte {error.start}); convert the file to UTF-8") from error
    found = [_answer(line, f"line {i} of {file}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise PromptError(f"{file} holds no answer: write {_FORM} on every line")
    return found


def _answer(line: str, where: str) -> GivenAnswer:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where} is not JSON ({error}); write {_FORM} on every line") from error
    prompt, text = (entry.get(name) if isinstance(entry, dict) else None for name in ("prompt", "text"))
    if not isinstance(prompt, str) or not isinstance(text, str):
        raise PromptError(f"{where} is no answer; write {_FORM} on every line")
    ids = entry.get("token_ids")
    whole = isinstance(ids, list) and all(type(token) is int for token in ids)
    return GivenAnswer(prompt, text, ids if whole else None)
