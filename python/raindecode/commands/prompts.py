"""Where prompts come from: the command line, a text file, a JSON-lines file, standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raindecode.errors import PromptError
from raindecode.policy.prompt import Conversation

Messages = list[dict[str, Any]]


def collect_prompts(words: Sequence[str], file: str | None) -> list[str]:
    """Prompts of the command line, then those of `file`; conversations are refused. See `collect_talks`."""
    found = collect_talks(words, file)
    if any(not isinstance(one, str) for one in found):
        raise PromptError(
            f'{file} holds conversations, which this command does not take; give a "prompt" on every line'
        )
    return [one for one in found if isinstance(one, str)]


def collect_talks(words: Sequence[str], file: str | None) -> list[str | Messages]:
    """Prompts of the command line, then prompts and conversations of `file`.

    Args:
        words: prompts given as arguments.
        file: a text file (a prompt per line, blank lines skipped), a .jsonl file (an object with "prompt" per line),
            or with a conversation under "messages"), or "-" for lines of standard input.

    Raises:
        PromptError: there is none, the file cannot be read, or something is not UTF-8 text; the message says where.
    """
    prompts: list[str | Messages] = list(words)
    for number, prompt in enumerate(words, start=1):
        _require_text(prompt, f"prompt {number} of the command line")
    if file is not None:
        prompts += _read(file)
    if not prompts:
        raise PromptError(
            'there is no prompt: give one in quotes, as in raindecode generate "Once upon a time", or a file with --file'
        )
    return prompts


def _read(file: str) -> list[str | Messages]:
    name = "standard input" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise PromptError(
            f"the prompt file {file!r} cannot be read ({error.strerror}): give a file of UTF-8 text"
        ) from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{name} is not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start} "
            f"(line {data.count(10, 0, error.start) + 1}) begins no valid character; convert the file to UTF-8"
        ) from error
    # Not splitlines(): it also breaks at form feeds and Unicode line separators, which may stand inside a prompt.
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise PromptError(f"{name} holds no prompt: write one per line")
    if not file.endswith(".jsonl"):
        return [line for _, line in numbered]
    return [prompt_of_line(line, f"line {number} of {name}") for number, line in numbered]


def prompt_of_line(line: str, where: str) -> str | Messages:
    """The prompt or the conversation of a line of a .jsonl file.

    Args:
        where: what to call the line in messages.

    Raises:
        PromptError: it holds none.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:  # malformed, an absurd number, or nested without end
        raise PromptError(f'{where} is not JSON ({error}); write {{"prompt": "..."}} on every line') from error
    if isinstance(entry, dict) and isinstance(entry.get("messages"), list):
        messages: Messages = entry["messages"]
        Conversation.of(messages, f"the conversation in {where}")
        return messages
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str):
        raise PromptError(
            f'{where} has no text under "prompt"; write {{"prompt": "..."}} on every line, or {{"messages": [...]}} for a conversation'
        )
    _require_text(prompt, where)
    if not prompt.strip():
        raise PromptError(f"{where} has an empty prompt; give at least one character that is not white space")
    return prompt


def _require_text(prompt: str, where: str) -> None:
    """Bytes that are no UTF-8 reach Python's arguments, and JSON's escapes, as lone surrogates."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"{where} is not valid UTF-8 text (at character {error.start}); give it in UTF-8") from error
