"""Tokens of an answer as they become final, for transformers' streamers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from raindecode.search.context import SearchContext
from raindecode.search.rain import RAIN
from raindecode.search.rain_search import RainSearch
from raindecode.search.sampling import Sampling


class Tokens:
    """Puts a growing list of tokens into a streamer, each once."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer = streamer
        self._shown = 0

    def upto(self, tokens: Sequence[int]) -> None:
        for token in tokens[self._shown :]:
            self._streamer.put(torch.tensor([token]))
        self._shown = len(tokens)


class Streamed:
    """A search whose tokens are shown as they become final: sampled ones at once, those of RAIN when a set is chosen."""

    def __init__(self, search: Sampling | RAIN, tokens: Tokens) -> None:
        self._search = search
        self._tokens = tokens

    def search(self, context: SearchContext) -> Generator[Any, Any, Any]:
        """Decode one request."""
        if isinstance(self._search, RAIN):
            state = RainSearch(self._search, context)
            return self._watched(state.run(), lambda _: state.committed)
        drawn: list[int] = []

        def grown(answers: Any) -> list[int]:
            drawn.extend(answer.drawn[0].token for answer in answers or ())
            return drawn

        return self._watched(self._search.search(context), grown)

    def _watched(
        self, steps: Generator[Any, Any, Any], final: Callable[[Any], Sequence[int]]
    ) -> Generator[Any, Any, Any]:
        """Drive a search and look at it after every step; what is thrown in reaches it."""
        answer: Any = None
        error: Exception | None = None
        try:
            while True:
                try:
                    wanted = steps.send(answer) if error is None else steps.throw(error)
                except StopIteration as ended:
                    self._tokens.upto(ended.value.token_ids)
                    return ended.value
                self._tokens.upto(final(answer))
                answer = error = None
                try:
                    answer = yield wanted
                except Exception as raised:
                    error = raised
        finally:
            steps.close()
