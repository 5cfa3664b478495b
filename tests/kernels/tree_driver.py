"""Runs a named search on a forest, and the same search on plain nodes, and records every choice both make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from plain_nodes import Margins, Node, PlainSearch
from torch import Tensor

from rainkernels.ops import tree
from rainkernels.testing.cases_tree import FakeModel, Path, TreeCase


@dataclass
class Trace:
    """Choices of one run, as paths from the first root, and the statistics it ended with."""

    leaves: list[Path] = field(default_factory=list)
    added: list[Path] = field(default_factory=list)
    moves: list[Path] = field(default_factory=list)
    stats: list[tuple[float, int, float, float]] = field(default_factory=list)  # n, fn, q, p of the root's children
    margins: Margins = field(default_factory=Margins)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class ForestDriver:
    """Drives `len(seeds)` trees of one forest together."""

    def __init__(self, case: TreeCase, seeds: list[int], dtype: torch.dtype, *, order: list[int] | None = None) -> None:
        self.case, self.dtype = case, dtype
        self.forest = tree.Forest.create(len(seeds), case.config, dtype=dtype)
        self.models = [FakeModel(case, seed) for seed in seeds]
        self.order = order or list(range(len(seeds)))
        self.names: list[dict[int, Path]] = [{0: ()} for _ in seeds]
        self.visits: list[dict[Path, int]] = [{} for _ in seeds]
        self.traces = [Trace() for _ in seeds]

    def run(self) -> list[Trace]:
        for step in range(1, self.case.num_simulations + 1):
            self.simulate()
            if step % self.case.reroot_every == 0:
                self.reroot()
        for b, trace in enumerate(self.traces):
            s = tree.children(self.forest, b, int(self.forest.roots()[b]))
            columns = (s.visits, s.direct_visits, s.values, s.priors)
            trace.stats = list(zip(*(c.tolist() for c in columns), strict=True))
        return self.traces

    def select(self) -> tree.Selection:
        ids = ints(self.order)
        chosen = tree.select(self.forest, ids)
        while (waiting := (chosen.status == tree.NEED_CHILD).nonzero().flatten()).numel():
            skip = torch.full_like(ids, -1)
            skip[waiting] = chosen.node[waiting]
            for i in waiting.tolist():
                self._grow_node(int(ids[i]), int(chosen.node[i]))
            again = tree.select(self.forest, ids[waiting], skip[waiting])
            for now, new in zip(chosen, again, strict=True):
                now[waiting] = new
        return chosen

    def simulate(self) -> None:
        chosen, ids = self.select(), ints(self.order)
        config, n = self.case.config, len(self.order)
        values = torch.zeros(n, dtype=self.dtype)
        rows = int(chosen.depth.max()) + 1
        embedding = torch.full((n, rows, config.embedding_dim), torch.nan)
        grow: list[int] = []
        for i, b in enumerate(self.order):
            depth, names, model = int(chosen.depth[i]), self.names[b], self.models[b]
            path = [names[s] for s in chosen.path[i, : depth + 1].tolist()]
            leaf = path[-1]
            visit = self.visits[b][leaf] = self.visits[b].get(leaf, 0) + 1
            self.traces[b].leaves.append(leaf)
            values[i] = model.value(leaf, visit)
            for j in range(1, depth + 1):
                embedding[i, j] = model.embedding(path[j], leaf, visit)
            if depth + 1 < config.max_depth:
                grow.append(i)
        self._expand(chosen, grow)
        tree.backup(self.forest, ids, chosen.path, chosen.depth, values, embedding)

    def reroot(self) -> None:
        ids = ints(self.order)
        best = tree.best_child(self.forest, ids)
        freed = tree.reroot(self.forest, ids, best.slot)
        for i, b in enumerate(self.order):
            self.traces[b].moves.append(self.names[b][int(best.slot[i])])
            for slot in freed[i].nonzero().flatten().tolist():
                del self.names[b][slot]

    def _expand(self, chosen: tree.Selection, grow: list[int]) -> None:
        if not grow:
            return
        ids = [self.order[i] for i in grow]
        leaves = [self.names[b][int(chosen.node[i])] for i, b in zip(grow, ids, strict=True)]
        models = [self.models[b] for b in ids]
        priors = torch.zeros(len(grow), self.case.config.max_children, dtype=self.dtype)
        for k, (model, leaf) in enumerate(zip(models, leaves, strict=True)):
            p = model.priors(leaf)
            priors[k, : len(p)] = p.to(self.dtype)
        sizes = [m.branching(leaf) for m, leaf in zip(models, leaves, strict=True)]
        lengths = [m.set_length(leaf) for m, leaf in zip(models, leaves, strict=True)]
        first = tree.expand(self.forest, ints(ids), chosen.node[grow], priors, ints(sizes), ints(lengths))
        for b, leaf, slot, size in zip(ids, leaves, first.tolist(), sizes, strict=True):
            self.names[b].update({slot + k: (*leaf, k) for k in range(size)} if slot >= 0 else {})

    def _grow_node(self, b: int, node: int) -> None:
        name = self.names[b][node]
        count = len(tree.children(self.forest, b, node).slots)
        prior = self.models[b].extra_prior(name, count)
        if prior is None:
            return
        slot = tree.add_child(self.forest, ints([b]), ints([node]), torch.tensor([prior], dtype=self.dtype))
        self.names[b][int(slot)] = (*name, count)
        self.traces[b].added.append((*name, count))


def run_plain(case: TreeCase, seed: int, dtype: torch.dtype) -> Trace:
    """The same search on plain nodes. Only for cases that never run out of rows or embeddings."""
    config, model, trace = case.config, FakeModel(case, seed), Trace()
    number: Callable[[float], float] = float if dtype == torch.float64 else np.float32  # type: ignore[assignment]
    search = PlainSearch(
        number=number, c_puct=config.c_puct, weight=config.similarity_weight,
        threshold=config.similarity_threshold if config.similarity else 2.0, mix=config.root_prior_mix, variance=config.dynamic_variance,
        max_children=config.max_children,
    )  # fmt: skip
    names: dict[int, Path] = {id(search.root): ()}
    keep: list[Node] = [search.root]  # ids stay unique while the nodes live
    visits: dict[Path, int] = {}

    def name(node: Node) -> Path:
        if id(node) not in names:
            assert node.parent is not None
            names[id(node)] = (*name(node.parent), node.parent.children.index(node))
            keep.append(node)
        return names[id(node)]

    def new_child(node: Node) -> float | None:
        prior = model.extra_prior(name(node), len(node.children))
        if prior is not None:
            trace.added.append((*name(node), len(node.children)))
        return prior

    for step in range(1, case.num_simulations + 1):
        path = search.select(new_child)
        leaf = name(path[-1])
        trace.leaves.append(leaf)
        visit = visits[leaf] = visits.get(leaf, 0) + 1
        texts = [None, *(model.embedding(name(p), leaf, visit).double().numpy() for p in path[1:])]
        if len(path) < config.max_depth:
            search.expand(path[-1], model.priors(leaf).tolist(), model.set_length(leaf))
        search.backup(path, model.value(leaf, visit), texts)
        if step % case.reroot_every == 0:
            move = search.best()
            trace.moves.append(name(move))
            for child in move.children:
                name(child)
            _name_below(move, name)
            search.reroot(move)
    trace.stats = [(float(c.n), c.fn, float(c.q), float(c.prior)) for c in search.root.children]
    trace.margins = search.margins
    return trace


def _name_below(node: Node, name: Callable[[Node], Path]) -> None:
    name(node)
    for child in node.children:
        _name_below(child, name)
