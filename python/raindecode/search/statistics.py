"""Statistics of one search tree: a rainkernels Forest of one tree that grows when it is full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rainkernels.ops import tree as ops

_TREE = torch.zeros(1, dtype=torch.int32)


class BestChild(NamedTuple):
    """The most visited child of the root, by slot."""

    slot: int
    direct_visits: int
    value: float


class NodeStatistics(NamedTuple):
    """Visits with similarity credit, direct visits, mean value."""

    visits: float
    direct_visits: int
    value: float


class Statistics:
    """Every structural change goes through the tree ops. Slots name nodes and stay valid while the tree grows."""

    def __init__(self, config: ops.TreeConfig) -> None:
        # float64 as the official code: a mean value of exactly 0.8 must not pass "more than 0.8" by rounding.
        self._forest = ops.Forest.create(1, config, dtype=torch.float64)
        self.root = int(self._forest.roots()[0])

    def clone(self) -> Statistics:
        """A copy that goes its own way."""
        other = object.__new__(Statistics)
        other._forest, other.root = self._forest.clone(), self.root
        return other

    def select(self, skip: int | None) -> tuple[list[int], bool]:
        """Slots from the root to where the descent stopped, and whether it stopped because a child is wanted there."""
        selection = ops.select(self._forest, _TREE, None if skip is None else _one(skip))
        slots = selection.path[0, : int(selection.depth[0]) + 1].tolist()
        return slots, int(selection.status[0]) == ops.NEED_CHILD

    def backup(self, path: Sequence[int], value: float, embedding: Tensor | None) -> None:
        """Add an evaluated leaf to the statistics of its path. Room for embeddings is made first."""
        if embedding is not None and int(self._forest.free_embeddings()[0]) < len(path):
            self._forest = self._forest.grown(max_embeddings=2 * self._forest.config.max_embeddings + len(path))
        slots = torch.full((1, self._forest.config.max_depth), -1, dtype=torch.int32)
        slots[0, : len(path)] = torch.tensor(path, dtype=torch.int32)
        ops.backup(
            self._forest, _TREE, slots, _one(len(path) - 1), torch.tensor([value], dtype=self._forest.dtype),
            None if embedding is None else embedding.float().contiguous()[None],
        )  # fmt: skip

    def expand(self, slot: int, probs: Sequence[float], length: int) -> int:
        """Give a leaf children of `length` tokens, priors normalised; the first child's slot, the others follow."""
        if int(self._forest.free_rows()[0]) == 0:
            self._forest = self._forest.grown(max_rows=2 * self._forest.config.max_rows)
        total = sum(probs)
        arguments = (
            _one(slot), torch.tensor([[p / total for p in probs]], dtype=self._forest.dtype), _one(len(probs)), _one(length),
        )  # fmt: skip
        first = int(ops.expand(self._forest, _TREE, *arguments)[0])
        if first == ops.OVERFLOW:
            self._forest = self._forest.grown(max_depth=2 * self._forest.config.max_depth)
            first = int(ops.expand(self._forest, _TREE, *arguments)[0])
        return first

    def add_child(self, slot: int, prior: float) -> int | None:
        """One more child; at the root its prior is mixed like the others'. None when there is no room for it."""
        value = torch.tensor([prior], dtype=self._forest.dtype)
        child = int(ops.add_child(self._forest, _TREE, _one(slot), value, mix=slot == self.root)[0])
        return None if child == ops.OVERFLOW else child

    def reroot(self, slot: int) -> list[int]:
        """Make a child of the root the new root; the slots that are no nodes any more."""
        freed = ops.reroot(self._forest, _TREE, _one(slot))[0]
        self.root = slot
        gone: list[int] = torch.nonzero(freed).flatten().tolist()
        return gone

    def root_visits(self) -> int:
        """Direct visits of the root."""
        return self.node(self.root).direct_visits

    def best_child(self) -> BestChild | None:
        """The root's most visited child; None while the root is a leaf."""
        best = ops.best_child(self._forest, _TREE)
        slot = int(best.slot[0])
        return None if slot < 0 else BestChild(slot, int(best.direct_visits[0]), float(best.value[0]))

    def node(self, slot: int) -> NodeStatistics:
        """One node's statistics."""
        stats = ops.node_stats(self._forest, 0, [slot])
        return NodeStatistics(float(stats.visits[0]), int(stats.direct_visits[0]), float(stats.values[0]))

    def priors(self, slot: int) -> list[float]:
        """Priors of a node's children in insertion order."""
        priors: list[float] = ops.children(self._forest, 0, slot).priors.tolist()
        return priors


def _one(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int32)
