"""Text and tokens: one codec per tokenizer, and a stream that turns tokens into text as they come."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from raindecode.errors import ModelError

# Where transformers' own tokenizer methods live; a class that overrides one is asked itself.
_PLAIN_MODULES = {
    "transformers.tokenization_utils_base", "transformers.tokenization_utils_fast", "transformers.tokenization_utils_tokenizers",
}  # fmt: skip
# Beginnings that merge with what stands before them in different ways.
_PROBES = ("Hello.", "a", "7 + 1", "(no)", "\n\nWell", " - ", "\u4f60", "\u00e9t\u00e9", "`")
_REPLACEMENT = "\ufffd"  # what decoders emit for an unfinished UTF-8 sequence


class Codec:
    """Encodes and decodes without surprises: special tokens are added in front only, and never appear in text.

    Args:
        tokenizer: any transformers tokenizer.
        eos_token_ids: every id that ends an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Iterable[int]) -> None:
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self._backend = _plain_backend(tokenizer)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a whole prompt, with the tokenizer's beginning-of-text token where it has one.

        Args:
            special: False for a text that spells this token itself, as chat templates do.
        """
        if not special:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self._backend is not None and _is_unset(self._backend) and not self.tokenizer.split_special_tokens:
            ids: list[int] = self._backend.encode(text, add_special_tokens=True).ids
        else:
            ids = list(self.tokenizer(text, add_special_tokens=True)["input_ids"])
        if ids and ids[-1] in self.eos_token_ids:  # some tokenizers close every text; a prompt goes on
            ids.pop()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=True))
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def continuation(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """Text that `ids` add after `context`: a leading space survives where the tokenizer drops it at the start of a text."""
        anchor = list(context[-4:])
        head = self.decode(anchor)
        whole = self.decode(anchor + list(ids))
        return whole[len(head) :] if whole.startswith(head) else self.decode(ids)

    def common_prefix(
        self, write: Callable[[str], str], encode: Callable[[str], list[int]] | None = None
    ) -> tuple[int, ...]:
        """Token ids that `write` of any text begins with, as far as a few texts of different kinds tell."""
        first, *others = ((encode or self.encode)(write(said)) for said in _PROBES)
        return tuple(first[: min(common_length(first, ids) for ids in others)])

    def options(self, context: str, letters: Sequence[str]) -> tuple[int, list[int]]:
        """The tokens that answer a multiple-choice prompt, read in context and never assumed.

        Args:
            context: a prompt that ends right before the answer, such as "... The answer is: (".
            letters: the answers, one token each in this context.
        Returns:
            How many tokens at the end of encode(context) merge into the answer's token (usually 0), and the ids.

        Raises:
            ModelError: an answer is not one token here, or two answers share one.
        """
        plain = self.encode(context)
        spelled = [self.encode(context + letter) for letter in letters]
        stem = spelled[0][:-1]
        if any(ids[:-1] != stem for ids in spelled) or plain[: len(stem)] != stem:
            raise ModelError(
                f"the options {list(letters)} do not become one token each after {context[-20:]!r} with this tokenizer: "
                "change the letters or the text before them in the evaluation template"
            )
        ids = [one[-1] for one in spelled]
        if len(set(ids)) != len(ids):
            raise ModelError(
                f"the options {list(letters)} share a token with this tokenizer: use others in the evaluation template"
            )
        return len(plain) - len(stem), ids


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The `tokenizers` object behind a tokenizer that adds nothing to it, else None: most of a short call is spent around it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(tokenizer)
    names = ("__call__", "decode", "_decode", "_encode_plus", "_switch_to_input_mode")  # not every release has all
    methods = [getattr(kind, name) for name in names if hasattr(kind, name)]
    plain = all(getattr(method, "__module__", None) in _PLAIN_MODULES for method in methods)
    if backend is None or not plain or any(name in vars(tokenizer) for name in names):
        return None
    return backend


def _is_unset(backend: Any) -> bool:
    """Whether no call of the tokenizer left a setting behind; transformers undoes them at its next call only."""
    return backend.truncation is None and backend.padding is None and not backend.encode_special_tokens


class TextStream:
    """Text of a growing answer, one token at a time, without decoding everything again.

    Args:
        context: the prompt's token ids, so that the first piece keeps its leading space.
    """

    def __init__(self, codec: Codec, context: Sequence[int]) -> None:
        self._codec = codec
        self._ids = list(context[-4:])
        self._prefix = 0  # decoding starts here, so that pieces keep their spaces
        self._read = len(self._ids)  # tokens already turned into text
        self.text = ""

    def push(self, token: int) -> str:
        """Add a token; the text it completes, "" while a character is unfinished."""
        self._ids.append(token)
        before = self._codec.decode(self._ids[self._prefix : self._read])
        after = self._codec.decode(self._ids[self._prefix :])
        if len(after) <= len(before) or after.endswith(_REPLACEMENT):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        piece = after[len(before) :]
        self.text += piece
        return piece

    def finish(self) -> str:
        """The text of an unfinished character at the end of the answer, if any."""
        before = self._codec.decode(self._ids[self._prefix : self._read])
        after = self._codec.decode(self._ids[self._prefix :])
        piece = after[len(before) :]
        self._read = len(self._ids)
        self._prefix = self._read
        self.text += piece
        return piece


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)


def find_stop(text: str, stops: Sequence[str], start: int = 0) -> int:
    """Index of the earliest stop string at or after `start`, -1 when there is none."""
    found = [at for at in (text.find(stop, start) for stop in stops) if at >= 0]
    return min(found, default=-1)


@dataclass(frozen=True)
class TextFilter:
    """Takes strings out of an answer, then white space off its ends; with no strings to take out, it leaves the answer as it is.

    Attributes:
        removed: non-empty strings, looked for from left to right, those that come first here first.
    """

    removed: tuple[str, ...] = ()

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.removed)))

    def clean(self, text: str) -> str:
        """A whole answer."""
        return self._pattern.sub("", text).strip() if self.removed else text

    def settled(self, text: str) -> str:
        """Of an answer that goes on, the part of its cleaned text that no further character can change."""
        if not self.removed:
            return text
        # Behind this a string may have begun, also one that would come before those found there.
        end = len(text) - max(_overlap(text, one) for one in self.removed)
        pieces, at = [], 0
        for match in self._pattern.finditer(text):
            if match.start() >= end:
                break
            pieces.append(text[at : match.start()])
            at = match.end()
        return ("".join(pieces) + text[at : max(at, end)]).strip()


def _overlap(text: str, string: str) -> int:
    """The longest end of `text` that `string` begins with, without being all of it."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
