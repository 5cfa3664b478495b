"""The search tree of one RAIN request: nodes with their tokens and branches; their statistics are a SingleTree of rainkernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from raindecode.engine.branch import Branch, Tab
from raindecode.search.context import SearchContext
from raindecode.search.rain_sets import Candidate
from rainkernels.ops.tree_single import SingleTree

if TYPE_CHECKING:
    from raindecode.search.leaf_work import LeafWork
    from raindecode.search.rain import RAIN


class SearchNode:
    """What a search node is besides its statistics.

    Attributes:
        slot: of its statistics; -1 for a child that work ahead of the search has found before the tree has it.
        step: sets between the start of the answer and this node; not reset when the root moves.
        visits: times this node was evaluated as a leaf; names its rollout draws.
        dynamic: times the dynamic rule fired here.
        score: what its last evaluation as a leaf said.
        work: its evaluation as a leaf, under way or done and not yet used.
        result: the one evaluation of a leaf that ends the answer.
        ahead: children found ahead of the search, by tokens.
        hashes: path hashes after each of its tokens, once it has a branch.
        counted: whether these are counted as the request's.
    """

    UNDECIDED: Final[Any] = object()
    __slots__ = (
        "ahead", "branch", "candidates", "counted", "dynamic", "end_reason", "hashes", "parent", "result", "score", "slot",
        "step", "tokens", "visits", "work",
    )  # fmt: skip

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
        self.score: float | None = None
        self.work: LeafWork | None = None
        self.result: LeafWork | None = None
        self.ahead: dict[tuple[int, ...], SearchNode] = {}
        self.hashes: list[int] = []
        self.counted = False

    def child_ahead(self, tokens: tuple[int, ...]) -> SearchNode:
        """The child with these tokens that the tree does not have yet."""
        if tokens not in self.ahead:
            self.ahead[tokens] = SearchNode(-1, self, tokens, self.step + 1)
        return self.ahead[tokens]

    def path(self) -> list[SearchNode]:
        """Nodes from the root to this one."""
        nodes = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]


class RainTree:
    """Nodes by slot."""

    def __init__(self, rain: RAIN, context: SearchContext) -> None:
        dimension = rain.embedder.dimension(context) if rain.embedder is not None else 1
        self._ledger = context.ledger
        # Work on a node may never be used: `book` counts what it ran, and not its branch.
        self._tab = Tab(context.ledger)
        # float64 as the official code: a mean value of exactly 0.8 must not pass "more than 0.8" by rounding.
        self.statistics = SingleTree(rain.tree_config(dimension))
        self.root = SearchNode(self.statistics.root, None, (), 0)
        self.root.branch = context.engine.open(self._tab, (), context.request.mix, context.edits)
        self.root.hashes = self.root.branch.append(context.request.prompt_ids)
        self._nodes: dict[int, SearchNode] = {self.root.slot: self.root}
        self._children: dict[int, list[SearchNode]] = {}
        self._committed: list[int] = []  # tokens up to and including the root
        self._left: list[int] = []  # path hashes of roots left behind before they were counted

    def nodes(self) -> dict[int, SearchNode]:
        """Nodes by slot; the caller's own copy."""
        return dict(self._nodes)

    def backup(self, path: list[SearchNode], value: float, embedding: Tensor | None) -> None:
        """Add an evaluated leaf to the statistics of its path."""
        self.statistics.backup([node.slot for node in path], value, embedding)

    def select(self, skip: SearchNode | None) -> tuple[list[SearchNode], bool]:
        """Nodes from the root to where the descent stopped, and whether it stopped because a child is wanted there."""
        slots, needs_child = self.statistics.select(None if skip is None else skip.slot)
        return [self._nodes[s] for s in slots], needs_child

    # ---- structure ------------------------------------------------------------------------------------------------
    def node(self, slot: int) -> SearchNode:
        return self._nodes[slot]

    def num_children(self, node: SearchNode) -> int:
        return len(self._children.get(node.slot, ()))

    def has_child(self, node: SearchNode, tokens: tuple[int, ...]) -> bool:
        return any(child.tokens == tokens for child in self._children.get(node.slot, ()))

    def expand(self, leaf: SearchNode, candidates: list[Candidate]) -> None:
        """Give a leaf its children, priors normalised over the candidates."""
        first = self.statistics.expand(leaf.slot, normalised(candidates), len(candidates[0].tokens))
        leaf.candidates = list(candidates)
        for k, candidate in enumerate(candidates):
            self._adopt(leaf, first + k, candidate.tokens)

    def add_child(self, node: SearchNode, tokens: tuple[int, ...], prior: float) -> None:
        """One more child."""
        slot = self.statistics.add_child(node.slot, prior)
        if slot is not None:
            self._adopt(node, slot, tokens)

    def reroot(self, node: SearchNode) -> Iterator[LeafWork]:
        """Make a child of the root the new root and drop everything beside it; the work this makes useless."""
        self._committed += node.tokens
        self.branch(node)  # before its parent's branch goes
        if not self.root.counted:
            self._left += self.root.hashes
        for slot in self.statistics.reroot(node.slot):
            self._children.pop(slot, None)
            if slot in self._nodes:
                yield from self._drop(self._nodes.pop(slot))
        node.parent = None
        self.root = node

    def close(self) -> None:
        """Let go of nodes and statistics. Nothing may be asked of the tree after this."""
        for node in self._nodes.values():
            _untie(node)
        self._nodes.clear()
        self._children.clear()
        del self.root, self.statistics

    def _drop(self, node: SearchNode) -> Iterator[LeafWork]:
        if node.branch is not None:
            node.branch.release()
        if node.work is not None:
            yield node.work
        for child in node.ahead.values():
            yield from self._drop(child)
        _untie(node)

    def branch(self, node: SearchNode) -> Branch:
        """The node's token path in the KV tree, made at its first visit."""
        if node.branch is None:
            assert node.parent is not None
            node.branch = self.branch(node.parent).fork()
            node.hashes = node.branch.append(node.tokens)
        return node.branch

    def book(self, node: SearchNode) -> None:
        """Count the path to `node` as run for the request."""
        at: SearchNode | None = node
        while at is not None and not at.counted:
            for path_hash in at.hashes:
                self._ledger.count(path_hash)
            at.counted = True
            at = at.parent
        for path_hash in self._left:
            self._ledger.count(path_hash)
        self._left.clear()

    def path_tokens(self, node: SearchNode) -> list[int]:
        """Generated tokens up to and including `node`."""
        return [*self._committed, *(t for above in node.path()[1:] for t in above.tokens)]

    def export(self, chosen: SearchNode, text: Callable[[list[int]], str]) -> dict[str, Any]:
        """The tree of one move as plain data: statistics, tokens and texts, children in insertion order."""
        return {"chosen": chosen.slot, "committed": list(self._committed), "root": self._export(self.root, 1.0, text)}

    def _export(self, node: SearchNode, prior: float, text: Callable[[list[int]], str]) -> dict[str, Any]:
        stats = self.statistics.node(node.slot)
        children = self._children.get(node.slot, [])
        priors = self.statistics.priors(node.slot) if children else []
        return {
            "slot": node.slot,
            "tokens": list(node.tokens),
            "text": text(self.path_tokens(node)),
            "prior": prior,
            "visits": stats.visits,
            "direct_visits": stats.direct_visits,
            "value": stats.value,
            "children": [self._export(child, p, text) for child, p in zip(children, priors, strict=True)],
        }

    def _adopt(self, parent: SearchNode, slot: int, tokens: tuple[int, ...]) -> None:
        node = parent.ahead.pop(tokens, None) or SearchNode(slot, parent, tokens, parent.step + 1)
        node.slot = slot
        self._nodes[slot] = node
        self._children.setdefault(parent.slot, []).append(node)


def normalised(candidates: list[Candidate]) -> list[float]:
    """Priors of candidates."""
    total = sum(c.prob for c in candidates)
    return [c.prob / total for c in candidates]


def _untie(node: SearchNode) -> None:
    """Nodes, their works and the tree refer to one another: what is not untied waits for the garbage collector."""
    node.work = node.result = None
    for child in node.ahead.values():
        _untie(child)
    node.ahead.clear()
