"""Where an answer ends, and its text: what the tokens of a request mean to RAIN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raindecode.search.context import SearchContext
from raindecode.text import TextFilter, find_stop
from raindecode.types import FinishReason

if TYPE_CHECKING:
    from raindecode.search.rain import RAIN

_STOP_LOOKBACK = 12  # tokens a stop string may span


class Answer:
    """Text and ends of token sequences that answer one request."""

    def __init__(self, rain: RAIN, context: SearchContext) -> None:
        self._rain = rain
        self._codec = context.codec
        self._request = context.request
        self._filter = TextFilter(context.request.removed)
        self._eos = context.eos_token_ids
        self.stops = tuple(dict.fromkeys(rain.stop + context.request.stop))
        self._last_characters = frozenset(stop[-1] for stop in self.stops)
        self._cannot_stop: dict[int, bool] = {}

    def text(self, tokens: list[int]) -> str:
        """Text of generated tokens, cut at a stop string; tokens that end the answer are not text."""
        if tokens and (tokens[-1] in self._eos or tokens[-1] in self._request.stop_token_ids):
            tokens = tokens[:-1]
        text = self._codec.continuation(self._request.prompt_ids, tokens)
        at = find_stop(text, self.stops)
        return text if at < 0 else text[:at]

    def kept(self, text: str) -> str:
        """What the prompt's format and `keep_after_last` leave of an answer."""
        text = self._filter.clean(text)
        last = max((text.rfind(c) for c in self._rain.keep_after_last), default=-1)
        return text[: last + 1] if last >= 0 else text

    def end_reason(self, tokens: list[int]) -> FinishReason | None:
        """Why the answer ends within `tokens`, None while it goes on."""
        if not tokens:
            return None
        if not self._eos.isdisjoint(tokens):
            return "eos"
        if not self._request.stop_token_ids.isdisjoint(tokens):
            return "stop"
        if find_stop(self._codec.continuation(self._request.prompt_ids, tokens), self.stops) >= 0:
            return "stop"
        return "length" if len(tokens) >= self._request.max_new_tokens else None

    def chain_ends(self, path: list[int], tokens: tuple[int, ...]) -> bool:
        """Whether a candidate chain of `tokens` behind `path` ends the answer with its last token."""
        if len(path) + len(tokens) >= self._request.max_new_tokens:
            return True
        if tokens[-1] in self._eos or tokens[-1] in self._request.stop_token_ids:
            return True
        if not self.stops or self._completes_no_stop(tokens[-1]):
            return False
        tail = [*path[-_STOP_LOOKBACK:], *tokens][-_STOP_LOOKBACK:]
        return find_stop(self._codec.decode(tail), self.stops) >= 0

    def _completes_no_stop(self, token: int) -> bool:
        """Whether no stop string can end within a token: most tokens, and they need no decoding of what comes before.

        Spaces depend on the tokens around, and U+FFFD is a part of a character: where these are in question, it may.
        """
        known = self._cannot_stop.get(token)
        if known is None:
            text = self._codec.decode([token])
            lasts = self._last_characters
            loose = not text or any(last.isspace() and last != "\n" for last in lasts) or "\ufffd" in (*text, *lasts)
            known = self._cannot_stop[token] = not loose and self._last_characters.isdisjoint(text)
        return known

    def rollout_ends(self, tokens: list[int]) -> bool:
        """Whether a rollout goes no further: the answer ended, or its last character is one to stop at."""
        if self.end_reason(tokens) is not None:
            return True
        text = (self._request.prompt_text + self.text(tokens))[-1:]
        return bool(self._rain.rollout_stop) and text in self._rain.rollout_stop

    def visible(self, tokens: list[int], *, final: bool) -> str:
        """The text that can no longer change when more tokens follow `tokens`; all of it when none do."""
        if final:
            return self.kept(self.text(tokens))
        if self._rain.keep_after_last:
            return ""
        text = self.text(tokens)
        hold = max((len(s) for s in self.stops), default=1) - 1
        # A character whose bytes are not all there yet reads U+FFFD and may still change.
        return self._filter.settled(text[: max(0, min(len(text) - hold, len(text.rstrip("\ufffd"))))])
