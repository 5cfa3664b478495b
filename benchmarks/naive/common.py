"""What the baselines share: exact counters, names of draws, the codec and requests. No engine of raindecode is behind them.

From raindecode they take settings and prompt texts (RAIN, ChatFormat, Codec, Request) and the named random numbers with
the sampler (engine.rng, engine.sampler), so that every baseline draws what raindecode draws.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raindecode.engine.rng import mix, name_draw
from raindecode.policy.prompt import ChatFormat
from raindecode.text import Codec
from raindecode.types import Request

Path = tuple[int, ...]
Row = npt.NDArray[np.float32]
PHASES = ("generate", "evaluate", "embed", "select")


class Meter:
    """Counts of one request.

    Attributes:
        steps: forward calls by phase.
        tokens: tokens run through them by phase, all rows of a batch and its padding counted.
        seconds: wall time by phase, host work included. "select" is the search's own book-keeping in plain Python.
        model_seconds: the part of `seconds` inside forward calls.
    """

    def __init__(self) -> None:
        self.steps: dict[str, int] = dict.fromkeys(PHASES, 0)
        self.tokens: dict[str, int] = dict.fromkeys(PHASES, 0)
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.model_seconds: dict[str, float] = defaultdict(float)
        self._phase = "select"
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside, inner phases excepted, is time of `name`."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def forward(self, model: Any, input_ids: Tensor, **options: Any) -> Any:
        """One counted call of the model. On a GPU it waits for the result, as reading logits does anyway."""
        began = time.perf_counter()
        out = model(input_ids=input_ids, **options)
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.steps[self._phase] += 1
        self.tokens[self._phase] += input_ids.numel()
        self.model_seconds[self._phase] += time.perf_counter() - began
        return out

    def stop(self) -> None:
        """Book the time until now."""
        self._switch(self._phase)

    def _switch(self, name: str) -> str:
        now = time.perf_counter()
        before, self._phase = self._phase, name
        self.seconds[before] += now - self._since
        self._since = now
        return before


@dataclass(frozen=True)
class Result:
    """An answer with its exact counters."""

    text: str
    token_ids: list[int]
    finish_reason: str
    meter: Meter
    value: float | None = None
    iterations: int = 0
    evaluations: int = 0

    @property
    def model_steps(self) -> int:
        return sum(self.meter.steps.values())

    @property
    def tokens_processed(self) -> int:
        return sum(self.meter.tokens.values())

    @property
    def seconds(self) -> float:
        return sum(self.meter.seconds.values())


def path_hash(tokens: Sequence[int], state: int | None = None) -> int:
    """The hash that names the draws after a token path; `state` continues the hash of its beginning."""
    if state is None:
        state = 0
        for byte in repr(None).encode():
            state = mix(state, byte)
    return name_draw(state, *tokens)


def common_prefix(*paths: Sequence[int]) -> int:
    """Tokens all paths begin with."""
    shortest = min(map(len, paths))
    for at in range(shortest):
        if any(path[at] != paths[0][at] for path in paths[1:]):
            return at
    return shortest


def to_row(logits: Tensor) -> Row:
    """[V] float32 on the host."""
    row: Row = logits.float().cpu().numpy()
    return row


def make_codec(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Codec:
    """The codec, with every end-of-text id that the model or its tokenizer names."""
    found: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        found |= set(value) if isinstance(value, (list, tuple)) else set() if value is None else {int(value)}
    return Codec(tokenizer, found)


def make_request(
    prompt: str, codec: Codec, format: ChatFormat | None, *, max_new_tokens: int = 256, seed: int = 0
) -> Request:
    """A prompt as raindecode's Decoder makes it; the room in the model's context is the caller's care."""
    text = prompt if format is None else format.render(prompt)
    stops = () if format is None else format.stop
    return Request(prompt, text, codec.encode(text), max_new_tokens, seed, stops)
