"""Baselines of URIAL on plain transformers: the constant prompt run again for every request, and a user's own reuse of it.

Both answer through `generate`, greedily, with the stop strings and the clean-up of the paper's code. Batches are padded on the left.
Nothing of raindecode's engine is behind them; how a query is written comes from a ChatFormat.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from raindecode.policy.prompt import ChatFormat

_LOOKBACK = 16  # tokens that a stop string may span


@dataclass(frozen=True)
class Answer:
    """Generated tokens up to where the answer ended, and its text after clean-up."""

    token_ids: list[int]
    text: str


class Published:
    """As the paper's code does it: every request runs the whole prompt, then `generate` keeps its K/V.

    Args:
        model: as transformers made it.
        format: writes queries; its stop strings end an answer, and what it says to remove is taken out of the text.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, format: ChatFormat) -> None:
        self.model, self.tokenizer, self.format = model, tokenizer, format
        end = model.generation_config.eos_token_id
        self._ends = [] if end is None else [end] if isinstance(end, int) else list(end)

    @torch.inference_mode()
    def answer(self, queries: Sequence[str], max_new_tokens: int, *, ends: bool = True) -> list[Answer]:
        """Answer queries in one batch.

        Args:
            ends: False goes on to the last token whatever is generated: comparisons of length.
        """
        ids = [self._encode(self.format.render(query)) for query in queries]
        out = self._generate(ids, max_new_tokens, ends)
        return [self._answer(row.tolist(), ends) for row in out]

    def _generate(self, ids: list[list[int]], max_new_tokens: int, ends: bool) -> Tensor:
        """New tokens, [B, up to max_new_tokens]."""
        rows, mask = padded(ids, self.model.device)
        return self._run(rows, mask, max_new_tokens, ends, past_key_values=DynamicCache(config=self.model.config))

    def _run(self, rows: Tensor, mask: Tensor, max_new_tokens: int, ends: bool, **options: Any) -> Tensor:
        make: Any = GenerationConfig  # untyped in transformers
        settings = make(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=(self._ends or None) if ends else -1, pad_token_id=0
        )  # fmt: skip
        stops = self.format.stop if ends else ()
        criteria = StoppingCriteriaList([_Stops(self.tokenizer, stops, rows.shape[1])] if stops else [])
        run: Any = self.model.generate
        out: Tensor = run(
            input_ids=rows, attention_mask=mask, generation_config=settings, stopping_criteria=criteria, **options
        )
        return out[:, rows.shape[1] :]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def _answer(self, tokens: list[int], ends: bool) -> Answer:
        if ends:  # rows that ended before the others are padded
            tokens = tokens[: next((i for i in range(len(tokens)) if self._is_over(tokens[: i + 1])), len(tokens)) + 1]
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        if ends:
            text = text[: min((at for at in map(text.find, self.format.stop) if at >= 0), default=len(text))]
        for one in self.format.removed:
            text = text.replace(one, "")
        return Answer(tokens, text.strip())

    def _is_over(self, tokens: list[int]) -> bool:
        if tokens[-1] in self._ends:
            return True
        text = self.tokenizer.decode(tokens[-_LOOKBACK:], skip_special_tokens=True)
        return any(stop in text for stop in self.format.stop)


class Reusing(Published):
    """As a competent user does it: K/V of the constant prompt are computed once, and every request goes on from there.

    One request takes the cache itself, which is cropped back afterwards; a batch takes a copy per row. Queries of a batch are padded
    between the prompt and themselves, where a mask hides what is padded, so that positions stay those of each request alone.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, format: ChatFormat) -> None:
        super().__init__(model, tokenizer, format)
        self._prefix: list[int] = []
        self._cache = DynamicCache(config=model.config)

    def forget(self) -> None:
        """The next request computes the prompt again."""
        self._prefix = []

    @property
    def prefix(self) -> list[int]:
        """Token ids that all queries begin with, whose K/V are kept; [] before the first request."""
        return list(self._prefix)

    def _generate(self, ids: list[list[int]], max_new_tokens: int, ends: bool) -> Tensor:
        if not self._prefix:
            self._fill()
        kept = len(self._prefix)
        if any(row[:kept] != self._prefix for row in ids):
            raise ValueError(
                "the tokenizer merges the end of the constant prompt with a query: end the prompt elsewhere"
            )
        rows, mask = padded([row[kept:] for row in ids], self.model.device)
        head = torch.tensor([self._prefix], device=self.model.device).expand(len(ids), -1)
        rows, mask = torch.cat([head, rows], 1), torch.cat([torch.ones_like(head), mask], 1)
        cache = self._cache if len(ids) == 1 else self._copies(len(ids))
        try:
            return self._run(rows, mask, max_new_tokens, ends, past_key_values=cache)
        finally:
            grown = self._cache.get_seq_length() - kept
            if grown:
                self._cache.crop(-grown)

    def _fill(self) -> None:
        """Run what any two queries have in common, from the tokenizer's own view of them."""
        first, second = (self._encode(self.format.render(said)) for said in ("Hello.", "7 + 1"))
        same = next(i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
        self._cache = DynamicCache(config=self.model.config)
        run: Any = self.model
        run(torch.tensor([first[:same]], device=self.model.device), past_key_values=self._cache, logits_to_keep=1)
        self._prefix = first[:same]

    def _copies(self, rows: int) -> DynamicCache:
        """The prompt's K/V once per row."""
        cache = deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return cache


class _Stops(StoppingCriteria):
    """Ends a row when the text of its last tokens holds a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], prompt: int) -> None:
        self._tokenizer, self._stops, self._prompt = tokenizer, tuple(stops), prompt

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        recent = input_ids[:, max(self._prompt, input_ids.shape[1] - _LOOKBACK) :]
        texts = self._tokenizer.batch_decode(recent, skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self._stops) for text in texts], device=input_ids.device)


def padded(ids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of equal length, padded on the left, and the mask of what is real: [B, longest] int64 each."""
    longest = max(map(len, ids))
    rows = torch.tensor([[0] * (longest - len(row)) + list(row) for row in ids], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
    return rows, mask


__all__ = ["Answer", "Published", "Reusing", "padded"]
