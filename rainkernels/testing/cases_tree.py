"""Named tree searches driven by a deterministic fake model, shared by tests and benchmarks.

What the model answers depends on the path from the first root and on the visit count only, so any two correct searches of the
same seed see the same values, embeddings and priors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rainkernels._forest import TreeConfig

Path = tuple[int, ...]  # child index at each level, from the first root


@dataclass(frozen=True)
class TreeCase:
    """One kind of search; `config.embedding_dim` is the model's."""

    id: str
    config: TreeConfig
    num_simulations: int = 48
    reroot_every: int = 12
    branching: tuple[int, int] = (3, 6)
    noise: float = 0.1  # of an embedding around its cluster's centre, per dim, relative to a unit vector
    num_centres: int = 3
    value_shift: int = 0  # values are -1, 0 or 1 plus this, clipped: -1 makes a mostly harmful model

    def __str__(self) -> str:
        return self.id


def _config(**changes: object) -> TreeConfig:
    sizes: dict[str, object] = {"max_rows": 64, "max_embeddings": 64, "embedding_dim": 16, "max_depth": 24}
    return TreeConfig(**(sizes | changes))  # type: ignore[arg-type]


CASES: tuple[TreeCase, ...] = (
    TreeCase("ordinary", _config()),
    TreeCase("harmful", _config(max_children=8), value_shift=-1, branching=(2, 4)),
    TreeCase("alike", _config(), noise=0.03, num_centres=1),
    TreeCase("single-child", _config(max_children=1), branching=(1, 1)),
    TreeCase("wide", _config(max_children=32, max_depth=12), branching=(20, 32), reroot_every=30),
    TreeCase("odd-dim", _config(embedding_dim=150), value_shift=-1, branching=(2, 5)),
    TreeCase("rain-dim", _config(embedding_dim=384), branching=(10, 10), num_simulations=30),
    TreeCase("no-similarity", _config(similarity=False, root_prior_mix=0.0)),
)


@dataclass
class FakeModel:
    """Answers for one tree: prior, value and embeddings as functions of (seed, path, visit)."""

    case: TreeCase
    seed: int

    def __post_init__(self) -> None:
        self._noise, self._centres, self._priors = _pools(
            self.case.config.embedding_dim, self.case.num_centres, self.case.config.max_children
        )

    def branching(self, path: Path) -> int:
        """Children of the node at its expansion."""
        low, high = self.case.branching
        return low + self._draw("size", path) % (high - low + 1)

    def priors(self, path: Path) -> Tensor:
        """`[branching]` float64, sums to 1."""
        weights = self._priors[self._draw("prior", path) % len(self._priors)][: self.branching(path)]
        return weights / weights.sum()

    def set_length(self, path: Path) -> int:
        """Tokens per child: 1, 2, 4, 10, 10, ..."""
        return (1, 2, 4, 10)[min(len(path), 3)]

    def value(self, path: Path, visit: int) -> float:
        """-1, 0 or 1."""
        drawn = self._draw("value", path, visit) % 3 - 1 + self.case.value_shift
        return float(max(-1, min(1, drawn)))

    def embedding(self, path: Path, leaf: Path, visit: int) -> Tensor:
        """`[dim]` float32, of the text from node `path` to the end of the visit of `leaf`."""
        centre = self._centres[self._draw("centre", path) % len(self._centres)]
        noise = self._noise[self._draw("noise", (*path, -1, *leaf), visit) % len(self._noise)]
        return centre + self.case.noise * noise

    def extra_prior(self, path: Path, count: int) -> float | None:
        """Prior of a dynamic child, or None where the model has no new token set."""
        drawn = self._draw("extra", path, count) % 8
        return None if drawn == 0 else drawn / 16

    def _draw(self, purpose: str, path: Path, visit: int = 0) -> int:
        # Python hashes tuples of ints the same way in every process, which it does not do for strings.
        return hash((self.seed, _PURPOSES[purpose], visit, *path)) % 2**40 // 7


_PURPOSES = {"size": 1, "prior": 2, "value": 3, "centre": 4, "noise": 5, "extra": 6}


@lru_cache(maxsize=16)
def _pools(dim: int, num_centres: int, max_children: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(dim)
    noise = torch.randn(509, dim, generator=rng) / dim**0.5
    centres = torch.nn.functional.normalize(torch.randn(num_centres, dim, generator=rng), dim=-1)
    priors = torch.rand(127, max_children, generator=rng, dtype=torch.float64) + 0.05
    return noise, centres, priors
