"""One search tree driven by Python numbers: the ops of `rainkernels.ops.tree` without tensors to make at every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from rainkernels._checks import check_int, check_tensor
from rainkernels._forest import HEADER_FREE_EMBEDDINGS, HEADER_FREE_ROWS, HEADER_ROOT
from rainkernels._lanes import choose_lane, native
from rainkernels._tree_errors import NO_ERROR
from rainkernels.errors import ShapeError
from rainkernels.ops import tree as ops

__all__ = ["RootChild", "SingleNode", "SingleTree"]

_CPU = torch.device("cpu")


class RootChild(NamedTuple):
    """A child of the root, by slot."""

    slot: int
    direct_visits: int
    value: float


class SingleNode(NamedTuple):
    """Visits with similarity credit, direct visits, mean value."""

    visits: float
    direct_visits: int
    value: float


class _Buffers:
    """Arguments and results of one call. Trees of one shape share them: a call leaves nothing there."""

    def __init__(self, config: ops.TreeConfig, dtype: torch.dtype) -> None:
        self.tree, self.a, self.b, self.c, self.d = torch.zeros(5, 1, dtype=torch.int32)
        self.x, self.y = torch.zeros(2, 1, dtype=dtype)
        self.path = torch.full((1, config.max_depth), -1, dtype=torch.int32)
        self.priors = torch.zeros(1, config.max_children, dtype=dtype)
        names = ("tree", "a", "b", "c", "d", "x", "y", "path", "priors")
        self.at = {name: getattr(self, name).data_ptr() for name in names}
        self.view = {name: getattr(self, name).numpy().reshape(-1) for name in names}


class SingleTree:
    """A forest of one tree, on the cpu, that grows when it is full. Slots name nodes and stay valid while it grows.

    The rules, edge cases and errors of a method are those of the op of its name; numbers are Python's. One thread at a time
    may use a tree and its clones.

    Args:
        config: sizes to begin with, and the constants.
        dtype: float32 | float64, of visits and values.
    """

    def __init__(self, config: ops.TreeConfig, *, dtype: torch.dtype = torch.float64) -> None:
        self._adopt(ops.Forest.create(1, config, dtype=dtype))

    def clone(self) -> SingleTree:
        """A copy that goes its own way."""
        other = object.__new__(SingleTree)
        other._adopt(self.forest.clone(), self._buffers)
        return other

    def __deepcopy__(self, _memo: object) -> SingleTree:
        return self.clone()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SingleTree holds addresses of this process and cannot be pickled: use clone() for a copy")

    @property
    def root(self) -> int:
        """Slot of the root."""
        return int(self._header[HEADER_ROOT])

    def select(self, skip: int | None = None) -> tuple[list[int], bool]:
        """Slots from the root to where the descent stopped, and whether it stopped because a child is wanted there."""
        buffers = self._buffers
        at, view = buffers.at, buffers.view
        view["a"][0] = -1 if skip is None else _slot("skip", skip)
        if not self._native("select", at["a"], at["b"], at["c"], at["path"], at["d"]):
            out = ops.Selection(buffers.b, buffers.c, buffers.path, buffers.d)
            ops.select(self.forest, buffers.tree, buffers.a, out=out)
        slots: list[int] = view["path"][: int(view["d"][0]) + 1].tolist()
        return slots, bool(view["b"][0] == ops.NEED_CHILD)

    def backup(self, path: Sequence[int], value: float, embedding: Tensor | None = None) -> None:
        """Add an evaluated leaf.

        Args:
            path: slots from the root to it.
            embedding: [len(path), embedding_dim] float32, contiguous; row 0 is not read.
        """
        config = self.forest.config
        if embedding is not None:
            check_tensor("embedding", embedding, device=_CPU, dtype=torch.float32, shape=(None, config.embedding_dim))
            if int(self._header[HEADER_FREE_EMBEDDINGS]) < len(path):
                self._adopt(self.forest.grown(max_embeddings=2 * config.max_embeddings + len(path)))
        if not 1 <= len(path) <= config.max_depth:
            raise ShapeError(f"path has {len(path)} slots, allowed: 1 to {config.max_depth}")
        buffers = self._buffers
        at, view = buffers.at, buffers.view
        slots = view["path"]
        slots[: len(path)] = [_slot("path", at) for at in path]
        slots[len(path) :] = -1
        view["a"][0], view["x"][0] = len(path) - 1, value
        rows = (0, 0) if embedding is None or not len(embedding) else (embedding.data_ptr(), len(embedding))
        if not self._native("backup", at["path"], at["a"], at["x"], *rows, at["b"]):
            given = None if embedding is None else embedding[None]
            ops.backup(self.forest, buffers.tree, buffers.path, buffers.a, buffers.x, given, out=buffers.b)

    def expand(self, slot: int, priors: Sequence[float], set_length: int) -> int:
        """Give a leaf a child per prior; the first child's slot, the others follow."""
        width = self.forest.config.max_children
        if not 1 <= len(priors) <= width:
            raise ShapeError(f"priors has {len(priors)} numbers, allowed: 1 to {width}")
        if int(self._header[HEADER_FREE_ROWS]) == 0:
            self._adopt(self.forest.grown(max_rows=2 * self.forest.config.max_rows))
        first = self._expand(slot, priors, set_length)
        if first == ops.OVERFLOW:
            self._adopt(self.forest.grown(max_depth=2 * self.forest.config.max_depth))
            first = self._expand(slot, priors, set_length)
        return first

    def _expand(self, slot: int, priors: Sequence[float], set_length: int) -> int:
        buffers = self._buffers
        at, view = buffers.at, buffers.view
        view["priors"][: len(priors)] = priors
        view["a"][0], view["b"][0], view["c"][0] = _slot("slot", slot), len(priors), _slot("set_length", set_length)
        width = self.forest.config.max_children
        if not self._native("expand", at["a"], at["priors"], width, at["b"], at["c"], at["d"]):
            ops.expand(self.forest, buffers.tree, buffers.a, buffers.priors, buffers.b, buffers.c, out=buffers.d)
        return int(view["d"][0])

    def add_child(self, slot: int, prior: float) -> int | None:
        """One more child; at the root its prior is mixed like the others'. None when there is no room for it."""
        buffers, mix = self._buffers, slot == self.root
        at, view = buffers.at, buffers.view
        view["a"][0], view["x"][0] = _slot("slot", slot), prior
        if not self._native("add_child", at["a"], at["x"], mix, at["b"]):
            ops.add_child(self.forest, buffers.tree, buffers.a, buffers.x, mix=mix, out=buffers.b)
        child = int(view["b"][0])
        return None if child == ops.OVERFLOW else child

    def reroot(self, slot: int) -> list[int]:
        """Make a node the new root; the slots that are no nodes any more."""
        self._buffers.view["a"][0] = _slot("slot", slot)
        freed = ops.reroot(self.forest, self._buffers.tree, self._buffers.a)[0]
        gone: list[int] = torch.nonzero(freed).flatten().tolist()
        return gone

    def best_child(self) -> RootChild | None:
        """The root's most visited child; None while the root is a leaf."""
        buffers = self._buffers
        at, view = buffers.at, buffers.view
        if not self._native("best_child", at["a"], at["x"], at["b"], at["y"]):
            ops.best_child(self.forest, buffers.tree, out=ops.BestChild(buffers.a, buffers.x, buffers.b, buffers.y))
        slot = int(view["a"][0])
        return None if slot < 0 else RootChild(slot, int(view["b"][0]), float(view["y"][0]))

    def node(self, slot: int) -> SingleNode:
        """One node's statistics."""
        stats = ops.node_stats(self.forest, 0, [slot])
        return SingleNode(float(stats.visits[0]), int(stats.direct_visits[0]), float(stats.values[0]))

    def priors(self, slot: int) -> list[float]:
        """Priors of a node's children in insertion order."""
        priors: list[float] = ops.children(self.forest, 0, slot).priors.tolist()
        return priors

    def _adopt(self, forest: ops.Forest, buffers: _Buffers | None = None) -> None:
        self.forest = forest
        self._buffers = buffers or _Buffers(forest.config, forest.dtype)
        self._header = forest.field("header")[0].numpy()

    def _native(self, op: str, *arguments: int) -> bool:
        """Run an op on the cpu lane. False where that is not the lane or it refused: the op itself then does it or says why."""
        if choose_lane("tree", _CPU) != "cpu":
            return False
        run = getattr(native(), f"tree_{op}")
        return bool(run(self.forest.native_view(), self._buffers.at["tree"], 1, *arguments, 1) == NO_ERROR)


def _slot(name: str, value: int) -> int:
    """An int32; what is none would be cut to one without a word."""
    if type(value) is not int or not -(1 << 31) <= value < 1 << 31:
        check_int(name, value, 0)
    return value
