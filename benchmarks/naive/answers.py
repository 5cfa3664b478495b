"""When a RAIN answer, a candidate set and a rollout end, and what of an answer is text. The same rules as raindecode's."""

from __future__ import annotations

from naive.common import Path
from raindecode.search.rain import RAIN
from raindecode.text import Codec, find_stop
from raindecode.types import Request

_STOP_LOOKBACK = 12  # tokens a stop string may span


class AnswerRules:
    """The rules of one request. Answers are generated tokens, the prompt left out."""

    def __init__(self, codec: Codec, rain: RAIN, request: Request) -> None:
        self.codec, self.rain, self.request = codec, rain, request
        self.stops = tuple(dict.fromkeys(rain.stop + request.stop))
        self.last_ids = codec.eos_token_ids | request.stop_token_ids

    def text(self, answer: Path) -> str:
        """Text of an answer, cut at a stop string; a token that ends the answer is not text."""
        tokens = answer[:-1] if answer and answer[-1] in self.last_ids else answer
        text = self.codec.continuation(self.request.prompt_ids, tokens)
        at = find_stop(text, self.stops)
        return text if at < 0 else text[:at]

    def judged(self, answer: Path) -> str:
        """What of the text is judged and shown."""
        text = self.text(answer)
        last = max((text.rfind(c) for c in self.rain.keep_after_last), default=-1)
        return text[: last + 1] if last >= 0 else text

    def ended(self, answer: Path) -> str | None:
        """Why an answer is over, None while it goes on."""
        if not answer:
            return None
        if not self.codec.eos_token_ids.isdisjoint(answer):
            return "eos"
        if not self.request.stop_token_ids.isdisjoint(answer):
            return "stop"
        if find_stop(self.codec.continuation(self.request.prompt_ids, answer), self.stops) >= 0:
            return "stop"
        return "length" if len(answer) >= self.request.max_new_tokens else None

    def closes(self, answer: Path, tokens: Path) -> bool:
        """Whether the last of a set's `tokens`, behind `answer`, ends the answer."""
        if len(answer) + len(tokens) >= self.request.max_new_tokens or tokens[-1] in self.last_ids:
            return True
        recent = (*answer[-_STOP_LOOKBACK:], *tokens)[-_STOP_LOOKBACK:]
        return bool(self.stops) and find_stop(self.codec.decode(recent), self.stops) >= 0

    def rollout_ends(self, answer: Path) -> bool:
        """Whether a rollout stops here: the answer is over or its text ends in punctuation."""
        if self.ended(answer) is not None:
            return True
        last = (self.request.prompt_text + self.text(answer))[-1:]
        return bool(self.rain.rollout_stop) and last in self.rain.rollout_stop
