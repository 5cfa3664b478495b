"""Baselines of decoding-time realignment on plain transformers: the published notebook's way, and two cached models in turn.

All decode token by token after one prompt, batch 1, and call `stamp` when a token has reached the host. Nothing of raindecode's
engine is behind them. A prompt is run once and stays in the caches: a decode begins with its last token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

Stamp = Callable[[], None]


def mixed(weight: float, aligned: Tensor, reference: Tensor) -> Tensor:
    """lambda h_aligned + (1 - lambda) h_reference, in the order of operations of the published code."""
    return weight * (aligned - reference) + reference


class Cached:
    """One model with its KV cache, as a competent user runs it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._prompt: list[int] = []
        self._cache = DynamicCache()

    def rewind(self, prompt: Sequence[int]) -> None:
        """The cache holds all of the prompt but its last token."""
        if self._prompt != list(prompt):
            self._prompt, self._cache = list(prompt), DynamicCache()
            if len(prompt) > 1:
                self.step(prompt[:-1])
        grown = self._cache.get_seq_length() - (len(prompt) - 1)
        if grown:
            self._cache.crop(-grown)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits [vocabulary] float32 after these tokens."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        run: Any = self.model
        logits: Tensor = run(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        return logits.float()


class Single:
    """Cached decoding of one model: what there is to pay without realignment."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.cached = Cached(model)

    def logits(self, token: int) -> Tensor:
        return self.cached.step([token])

    def rewind(self, prompt: Sequence[int]) -> None:
        self.cached.rewind(prompt)

    @torch.inference_mode()
    def decode(
        self, prompt: Sequence[int], num_tokens: int, stamp: Stamp, *, temperature: float = 0.0, seed: int = 0
    ) -> list[int]:
        """So many tokens, whatever they are; greedy at temperature 0."""
        self.rewind(prompt)
        tokens = [prompt[-1]]
        noise: torch.Generator | None = None
        for _ in range(num_tokens):
            logits = self.logits(tokens[-1])
            if temperature > 0:
                noise = noise or torch.Generator(logits.device).manual_seed(seed)
                drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=noise)
            else:
                drawn = logits.argmax()
            tokens.append(int(drawn))
            stamp()
        return tokens[1:]


class TwoModels(Single):
    """Two cached models, one after the other for every token; their logits mixed in float32."""

    def __init__(self, reference: PreTrainedModel, aligned: PreTrainedModel, weight: float) -> None:
        self.reference, self.aligned, self.weight = Cached(reference), Cached(aligned), weight

    def rewind(self, prompt: Sequence[int]) -> None:
        self.reference.rewind(prompt)
        self.aligned.rewind(prompt)

    def logits(self, token: int) -> Tensor:
        return mixed(self.weight, self.aligned.step([token]), self.reference.step([token]))


class _Mixing(LogitsProcessor):
    """Runs the reference model inside `generate` of the aligned one.

    As published the reference keeps a cache of its own (the processor's default, `use_cache=True`). Its other setting, which the
    notebook does not use, runs the whole prefix again for every token.
    """

    def __init__(self, reference: PreTrainedModel, weight: float, *, use_cache: bool) -> None:
        self.reference, self.weight, self.use_cache = reference, weight, use_cache
        self._cache: Any = None
        self._mask: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        fresh = input_ids if self._cache is None else input_ids[:, -1:]
        if self._mask is None:
            self._mask = torch.ones_like(input_ids)
        else:
            self._mask = torch.cat([self._mask, torch.ones_like(input_ids[:, -1:])], dim=1)
        run: Any = self.reference
        # All rows of logits are made at the first token (at every token without a cache), as published.
        out = run(fresh, attention_mask=self._mask, use_cache=self.use_cache, past_key_values=self._cache)
        self._cache = out.get("past_key_values") if self.use_cache else None
        return mixed(self.weight, scores, out.logits[:, -1])


class _Stamps(BaseStreamer):
    """Stamps every token that `generate` hands out; the first thing it hands out is the prompt."""

    def __init__(self, stamp: Stamp) -> None:
        self._stamp, self._begun = stamp, False

    def put(self, value: Tensor) -> None:
        if self._begun:
            self._stamp()
        self._begun = True

    def end(self) -> None:
        pass


class Notebook:
    """The notebook published with DeRa: `generate` of the aligned model with a processor that runs the reference.

    Its models are 4-bit and it samples (temperature 0.7, top-k 50, top-p 0.95). Here the models are those of the others and
    the most likely token is taken, which costs less.
    """

    def __init__(
        self, reference: PreTrainedModel, aligned: PreTrainedModel, weight: float, *, use_cache: bool = True
    ) -> None:
        self.reference, self.aligned, self.weight, self.use_cache = reference, aligned, weight, use_cache

    @torch.inference_mode()
    def decode(self, prompt: Sequence[int], num_tokens: int, stamp: Stamp) -> list[int]:
        """So many tokens, whatever they are. The prompt runs anew each time, before the first stamp."""
        processor = _Mixing(self.reference, self.weight, use_cache=self.use_cache)
        make: Any = GenerationConfig  # untyped in transformers
        settings = make(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        ids = torch.tensor([list(prompt)], device=self.aligned.device)
        run: Any = self.aligned.generate
        out = run(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings,
            logits_processor=LogitsProcessorList([processor]), streamer=_Stamps(stamp),
        )  # fmt: skip
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens
