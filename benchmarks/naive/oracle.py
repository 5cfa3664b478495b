"""Oracle: what the model's numbers lead to. Recorded, a search can be replayed on any weights at its full cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import raindecode.engine.sampler as sampler
from naive.common import Path, Row
from raindecode.engine.sampler import Drawn, Filter


class Oracle:
    """What the model's numbers lead to. Override it to replay a recorded workload: every forward still runs.

    Names are the 128-bit draw names of raindecode.engine.rng, the same in every implementation.
    """

    def draw(
        self, names: Sequence[int], rows: Sequence[Row], shape: Filter, seed: int, greedy: Sequence[bool]
    ) -> list[Drawn]:
        """One token per row of logits."""
        numbers = sampler.uniforms([seed] * len(names), names)
        return [
            sampler.draw(row, shape, None if is_greedy else float(u))
            for row, u, is_greedy in zip(rows, numbers, greedy, strict=True)
        ]

    def top(self, name: int, row: Row, count: int) -> tuple[list[int], list[float]]:
        """The likeliest tokens after the path whose hash is `name`, probabilities over these."""
        return sampler.top_probs(row, count)

    def verdict(self, prompt: str, text: str, score: float) -> float:
        """The value of an answer so far, which was scored `score`."""
        return score

    def vectors(self, name: int, suffixes: Sequence[Path], rows: Tensor) -> Tensor:
        """Unit vectors of the suffixes of a path with rollout, whose hash is `name`, computed as `rows`."""
        return rows


class Recording(Oracle):
    """Keeps what came out, by name, and gives it out again where it is asked the same: the forwards run, their numbers do not
    count. A recording made by one baseline replays in the other and on any model with as many tokens.

    Args:
        record: False replays only, and raises KeyError where the search asks what was not recorded.
    """

    def __init__(self, *, record: bool = True) -> None:
        self.record = record
        self.drawn: dict[tuple[int, int], Drawn] = {}  # by seed and name
        self.tops: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
        self.verdicts: dict[tuple[str, str], float] = {}  # by prompt and text
        self.embedded: dict[tuple[int, Path], Tensor] = {}

    def draw(
        self, names: Sequence[int], rows: Sequence[Row], shape: Filter, seed: int, greedy: Sequence[bool]
    ) -> list[Drawn]:
        keys = [(seed, name) for name in names]
        if self.record and any(key not in self.drawn for key in keys):
            self.drawn.update(zip(keys, super().draw(names, rows, shape, seed, greedy), strict=True))
        return [self.drawn[key] for key in keys]

    def top(self, name: int, row: Row, count: int) -> tuple[list[int], list[float]]:
        if self.record and (name, count) not in self.tops:
            self.tops[name, count] = super().top(name, row, count)
        return self.tops[name, count]

    def verdict(self, prompt: str, text: str, score: float) -> float:
        if self.record:
            self.verdicts.setdefault((prompt, text), score)
        return self.verdicts[prompt, text]

    def vectors(self, name: int, suffixes: Sequence[Path], rows: Tensor) -> Tensor:
        keys = [(name, suffix) for suffix in suffixes]
        if self.record:
            for key, row in zip(keys, rows, strict=True):
                self.embedded.setdefault(key, row)
        return torch.stack([self.embedded[key] for key in keys])
