"""The search tree of one RAIN request: statistics in a rainkernels Forest, tokens and branches beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from raindecode.engine.branch import Branch
from raindecode.search.context import SearchContext
from raindecode.search.rain_sets import Candidate
from rainkernels.ops import tree as ops

if TYPE_CHECKING:
    from raindecode.search.rain import RAIN

_TREE = torch.zeros(1, dtype=torch.int32)


class SearchNode:
    """What a search node is besides its statistics.

    Attributes:
        step: sets between the start of the answer and this node; not reset when the root moves.
        visits: times this node was evaluated as a leaf; names its rollout draws.
        dynamic: times the dynamic rule fired here.
    """

    UNDECIDED: Final[Any] = object()
    __slots__ = ("branch", "candidates", "dynamic", "end_reason", "parent", "slot", "step", "tokens", "visits")

    def __init__(self, slot: int, parent: SearchNode | None, tokens: tuple[int, ...], step: int) -> None:
        self.slot = slot
        self.parent = parent
        self.tokens = tokens
        self.step = step
        self.branch: Branch | None = None
        self.candidates: list[Candidate] = []
        self.visits = 0
        self.dynamic = 0
        self.end_reason: Any = SearchNode.UNDECIDED


class Best(NamedTuple):
    """The most visited child of the root."""

    node: SearchNode
    direct_visits: int
    value: float


class RainTree:
    """Nodes by slot; every structural change goes through the tree ops."""

    def __init__(self, rain: RAIN, context: SearchContext) -> None:
        dimension = rain.embedder.dimension(context) if rain.embedder is not None else 1
        self._context = context
        # float64 as the official code: a mean value of exactly 0.8 must not pass "more than 0.8" by rounding.
        self.forest = ops.Forest.create(1, rain.tree_config(dimension), dtype=torch.float64)
        slot = int(self.forest.roots()[0])
        self.root = SearchNode(slot, None, (), 0)
        self.root.branch = context.engine.open(context.ledger, context.request.prompt_ids)
        self._nodes: dict[int, SearchNode] = {slot: self.root}
        self._children: dict[int, list[SearchNode]] = {}
        self._committed: tuple[int, ...] = ()  # tokens up to and including the root

    # ---- statistics -----------------------------------------------------------------------------------------------
    def root_visits(self) -> int:
        """Direct visits of the root."""
        return int(ops.node_stats(self.forest, 0, [self.root.slot]).direct_visits[0])

    def best_child(self) -> Best | None:
        """The root's most visited child; None while the root is a leaf."""
        best = ops.best_child(self.forest, _TREE)
        slot = int(best.slot[0])
        return None if slot < 0 else Best(self._nodes[slot], int(best.direct_visits[0]), float(best.value[0]))

    def select(self, skip: SearchNode | None) -> tuple[list[SearchNode], bool]:
        """Nodes from the root to where the descent stopped, and whether it stopped because a child is wanted there."""
        skip_node = None if skip is None else _one(skip.slot)
        selection = ops.select(self.forest, _TREE, skip_node)
        slots = selection.path[0, : int(selection.depth[0]) + 1].tolist()
        return [self._nodes[s] for s in slots], int(selection.status[0]) == ops.NEED_CHILD

    def backup(self, path: list[SearchNode], value: float, embedding: Tensor | None) -> None:
        """Add an evaluated leaf to the statistics of its path. Room for embeddings is made first."""
        if embedding is not None and int(self.forest.free_embeddings()[0]) < len(path):
            self.forest = self.forest.grown(max_embeddings=2 * self.forest.config.max_embeddings + len(path))
        slots = torch.full((1, self.forest.config.max_depth), -1, dtype=torch.int32)
        slots[0, : len(path)] = torch.tensor([node.slot for node in path], dtype=torch.int32)
        ops.backup(
            self.forest, _TREE, slots, _one(len(path) - 1), torch.tensor([value], dtype=self.forest.dtype),
            None if embedding is None else embedding.float().contiguous()[None],
        )  # fmt: skip

    # ---- structure ------------------------------------------------------------------------------------------------
    def num_children(self, node: SearchNode) -> int:
        return len(self._children.get(node.slot, ()))

    def has_child(self, node: SearchNode, tokens: tuple[int, ...]) -> bool:
        return any(child.tokens == tokens for child in self._children.get(node.slot, ()))

    def expand(self, leaf: SearchNode, candidates: list[Candidate]) -> None:
        """Give a leaf its children, priors normalised over the candidates."""
        if int(self.forest.free_rows()[0]) == 0:
            self.forest = self.forest.grown(max_rows=2 * self.forest.config.max_rows)
        total = sum(c.prob for c in candidates)
        priors = torch.tensor([[c.prob / total for c in candidates]], dtype=self.forest.dtype)
        lengths = _one(len(candidates[0].tokens))
        first = ops.expand(self.forest, _TREE, _one(leaf.slot), priors, _one(len(candidates)), lengths)
        slot = int(first[0])
        if slot == ops.OVERFLOW:
            self.forest = self.forest.grown(max_depth=2 * self.forest.config.max_depth)
            slot = int(ops.expand(self.forest, _TREE, _one(leaf.slot), priors, _one(len(candidates)), lengths)[0])
        leaf.candidates = list(candidates)
        for k, candidate in enumerate(candidates):
            self._adopt(leaf, slot + k, candidate.tokens)

    def add_child(self, node: SearchNode, tokens: tuple[int, ...], prior: float) -> None:
        """One more child; at the root its prior is mixed like the others'."""
        value = torch.tensor([prior], dtype=self.forest.dtype)
        slot = int(ops.add_child(self.forest, _TREE, _one(node.slot), value, mix=node is self.root)[0])
        if slot != ops.OVERFLOW:
            self._adopt(node, slot, tokens)

    def reroot(self, node: SearchNode) -> None:
        """Make a child of the root the new root and drop everything beside it."""
        self._committed += node.tokens
        freed = ops.reroot(self.forest, _TREE, _one(node.slot))[0]
        self.branch(node)  # before its parent's branch goes
        for slot in torch.nonzero(freed).flatten().tolist():
            gone = self._nodes.pop(slot, None)
            self._children.pop(slot, None)
            if gone is not None and gone.branch is not None:
                gone.branch.release()
        node.parent = None
        self.root = node

    def branch(self, node: SearchNode) -> Branch:
        """The node's token path in the KV tree, made at its first visit."""
        if node.branch is None:
            assert node.parent is not None
            node.branch = self.branch(node.parent).fork()
            node.branch.append(node.tokens)
        return node.branch

    def path_tokens(self, node: SearchNode) -> list[int]:
        """Generated tokens up to and including `node`."""
        parts: list[tuple[int, ...]] = []
        while node.parent is not None:
            parts.append(node.tokens)
            node = node.parent
        return [*self._committed, *(t for part in reversed(parts) for t in part)]

    def export(self, chosen: SearchNode, text: Callable[[list[int]], str]) -> dict[str, Any]:
        """The tree of one move as plain data: statistics, tokens and texts, children in insertion order."""
        return {"chosen": chosen.slot, "committed": list(self._committed), "root": self._export(self.root, 1.0, text)}

    def _export(self, node: SearchNode, prior: float, text: Callable[[list[int]], str]) -> dict[str, Any]:
        stats = ops.node_stats(self.forest, 0, [node.slot])
        children = self._children.get(node.slot, [])
        priors = ops.children(self.forest, 0, node.slot).priors.tolist() if children else []
        return {
            "slot": node.slot,
            "tokens": list(node.tokens),
            "text": text(self.path_tokens(node)),
            "prior": prior,
            "visits": float(stats.visits[0]),
            "direct_visits": int(stats.direct_visits[0]),
            "value": float(stats.values[0]),
            "children": [self._export(child, p, text) for child, p in zip(children, priors, strict=True)],
        }

    def _adopt(self, parent: SearchNode, slot: int, tokens: tuple[int, ...]) -> None:
        node = SearchNode(slot, parent, tokens, parent.step + 1)
        self._nodes[slot] = node
        self._children.setdefault(parent.slot, []).append(node)


def _one(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int32)
