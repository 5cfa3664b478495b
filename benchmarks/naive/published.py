"""Baseline (a): RAIN with the published code's caching habits, batch 1.

Written from a description of the habits, with today's transformers under it:

- keys and values live only inside one chain (rollout, greedy set, sampled set);
- the logits of every visited state are kept under its token tuple. A hit has no keys and values, so the next miss of that
  chain runs the whole prefix again. Every candidate chain starts with a hit, the leaf, and pays at its second token;
- each order of an evaluation is a full forward of its whole prompt, verdicts are kept by text;
- embeddings are made one level at a time. The published code asks a sentence encoder about the suffix; here the language
  model embeds, so a level is one forward over prompt and path. The meter has it apart, as phase "embed".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from naive.common import Path, Row, to_row
from naive.search import NaiveRain, Walker
from raindecode.engine.rng import name_draw
from raindecode.search.embedder import TextEmbedder


class _Chain(Walker):
    """A chain of one-at-a-time queries: what the published code keeps between two tokens."""

    def __init__(self, search: Published, path: Path) -> None:
        self.search, self.path = search, path
        self.past: Any = None

    def row(self) -> Row:
        known = self.search.rows
        if self.path in known:
            self.past = None
            return known[self.path]
        fresh = self.path if self.past is None else self.path[-1:]
        out = self.search.run(fresh, past_key_values=self.past, use_cache=True)
        self.past = out.past_key_values
        known[self.path] = to_row(out.logits[0, -1])
        return known[self.path]

    def push(self, token: int) -> None:
        self.path = (*self.path, token)


class Published(NaiveRain):
    """See the module's text."""

    def forget(self) -> None:
        self.rows: dict[Path, Row] = {}

    def run(self, tokens: Sequence[int], **options: Any) -> Any:
        """One forward of one sequence, logits of every position."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        return self.meter.forward(self.model, ids, **options)

    def walk(self, path: Path) -> Walker:
        return _Chain(self, path)

    def chains(
        self, path: Path, length: int, tries: Sequence[int], purpose: int, ends: Callable[[Path], bool]
    ) -> list[tuple[Path, float]]:
        made: list[tuple[Path, float]] = []
        for attempt in tries:
            walker, joint = self.walk(path), 1.0
            tokens: Path = ()
            while len(tokens) < length and (not tokens or not ends(tokens)):
                if tokens:
                    walker.push(tokens[-1])
                name = name_draw(self.name(path[len(self.prompt) :] + tokens), purpose, attempt + 1)
                (drawn,) = self.oracle.draw([name], [walker.row()], self.set_filter(), self.request.seed, [attempt < 0])
                tokens = (*tokens, drawn.token)
                joint *= drawn.prob
            made.append((tokens, joint))
        return made

    def last_rows(self, prompts: list[list[int]]) -> list[Row]:
        return [to_row(self.run(ids, use_cache=False).logits[0, -1]) for ids in prompts]

    def mean_states(self, path: Path, starts: Sequence[int], center: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        means = []
        middle = torch.zeros(())
        for start in reversed(starts):  # backed up from the leaf
            ids = torch.tensor([list(path)], device=self.model.device)
            states = self.meter.forward(self.model.base_model, ids, use_cache=False).last_hidden_state[0].float()
            means.append(states[start:].mean(0))
            if center is not None:
                middle = states[slice(*center)].mean(0)
        return torch.stack(means[::-1]), middle

    def embed_texts(self, embedder: TextEmbedder, texts: list[str]) -> Tensor:
        vectors = [np.asarray(embedder.function([text]), dtype=np.float32)[0] for text in reversed(texts)]
        return torch.from_numpy(np.stack(vectors[::-1]))
