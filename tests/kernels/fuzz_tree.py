"""Right calls of the tree ops for the fuzz tests, on forests in the middle of a search."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import torch
from fuzz import Call, FuzzOp, copied, ints, randn
from torch import Tensor
from tree_driver import ForestDriver

from rainkernels._forest import FIELDS
from rainkernels.errors import RainKernelsError
from rainkernels.ops import tree
from rainkernels.testing.cases_tree import TreeCase

DIMS = (1, 16, 70)


@cache
def _grown(shape: int, dtype: torch.dtype) -> ForestDriver:
    """A search over three trees: small pools, so that they run out now and then."""
    config = tree.TreeConfig(
        max_rows=(5, 12, 30)[shape], max_children=(3, 1, 6)[shape], max_embeddings=(4, 20, 9)[shape],
        embedding_dim=DIMS[shape], max_depth=(4, 9, 12)[shape], dynamic_value=0.5,
    )  # fmt: skip
    case = TreeCase("fuzz", config, branching=(1, config.max_children), value_shift=-(shape % 2))
    driver = ForestDriver(case, [3, 4, 5 + shape], dtype)
    for step in range((9, 6, 14)[shape]):
        driver.simulate()
        if step == 5 and shape != 1:
            driver.reroot()
    return driver


def _forest(rng: Random) -> tree.Forest:
    return _grown(rng.randrange(3), rng.choice([torch.float32, torch.float64])).forest.clone()


def _ids(rng: Random, n: int | None = None) -> Tensor:
    return ints([rng.randrange(3) for _ in range(rng.choice([0, 1, 2, 4]) if n is None else n)])


def select_call(rng: Random) -> Call:
    call: Call = {"forest": _forest(rng), "tree_ids": _ids(rng)}
    if rng.random() < 0.5:
        found = tree.select(call["forest"], call["tree_ids"])
        asks = found.status == tree.NEED_CHILD
        call["skip_node"] = torch.where(asks, found.node, torch.full_like(found.node, -1))
    return call


def expand_call(rng: Random) -> Call:
    forest, ids = _forest(rng), ints(rng.sample(range(3), rng.choice([0, 1, 3])))
    nodes = tree.select(forest, ids, _skipped(forest, ids)).node
    width = rng.randint(1, forest.config.max_children + 1)
    count = [rng.randint(1, min(width, forest.config.max_children)) for _ in range(len(ids))]
    return {
        "forest": forest, "tree_ids": ids, "nodes": nodes, "priors": randn(rng, len(ids), width, dtype=forest.dtype).abs(),
        "num_children": ints(count), "set_length": ints([rng.randint(1, 12) for _ in count]),
    }  # fmt: skip


def _skipped(forest: tree.Forest, ids: Tensor) -> Tensor:
    """What to skip so that every descent ends at a leaf."""
    skip = torch.full_like(ids, -1)
    while len(ids):
        found = tree.select(forest, ids, skip)
        asks = found.status == tree.NEED_CHILD
        if not bool(asks.any()):
            break
        skip = torch.where(asks, found.node, skip)
    return skip


def add_child_call(rng: Random) -> Call:
    forest, ids = _forest(rng), _ids(rng)
    prior = randn(rng, len(ids), dtype=forest.dtype).abs()
    nodes = forest.roots()[ids.long()]
    return {"forest": forest, "tree_ids": ids, "nodes": nodes, "prior": prior, "mix": rng.random() < 0.5}


def path_call(rng: Random) -> Call:
    forest, ids = _forest(rng), _ids(rng)
    found = tree.select(forest, ids, _skipped(forest, ids))
    return {"forest": forest, "tree_ids": ids, "path": found.path, "depth": found.depth}


def backup_call(rng: Random) -> Call:
    call = path_call(rng)
    forest, n = call["forest"], len(call["tree_ids"])
    rows = int(call["depth"].max()) + 1 + rng.choice([0, 0, 2]) if n else 2
    embedding = 1 + 0.1 * randn(rng, n, rows, forest.config.embedding_dim)
    value = randn(rng, n, dtype=forest.dtype).clamp(-1, 1)
    return call | {"value": value, "embedding": rng.choice([None, embedding])}


def unmark_call(rng: Random) -> Call:
    call = path_call(rng)
    tree.mark_in_flight(**call)
    return call


def reroot_call(rng: Random) -> Call:
    forest, ids = _forest(rng), ints(rng.sample(range(3), rng.choice([0, 1, 3])))
    return {"forest": forest, "tree_ids": ids, "slots": tree.best_child(forest, ids).slot}


def best_child_call(rng: Random) -> Call:
    return {"forest": _forest(rng), "tree_ids": _ids(rng)}


def with_out(make: Callable[[Random], Call], op: Callable[..., Any]) -> Callable[[Random], Call]:
    """The same calls, some of them with the tensors that an earlier one returned."""

    def call(rng: Random) -> Call:
        made = make(rng)
        return made | {"out": op(**copied(made)) if rng.random() < 0.4 else None}

    return call


def children_call(rng: Random) -> Call:
    forest, b = _forest(rng), rng.randrange(3)
    return {"forest": forest, "tree_id": b, "node": int(forest.roots()[b])}


def stats_call(rng: Random) -> Call:
    call = children_call(rng)
    below = tree.children(**call).slots.tolist()
    call["nodes"] = [call.pop("node"), *below]
    return call


def forest_call(rng: Random) -> Call:
    """A forest's own tensors, handed over as the registered ops do."""
    forest = _forest(rng)
    return {"config": forest.config, "tensors": list(forest.tensors), "seed": rng.getrandbits(30)}


def adopt_and_search(*, config: tree.TreeConfig, tensors: list[Tensor], seed: int) -> list[Any]:
    """Every op on a forest of foreign tensors: once accepted, whatever they hold must not lead out of them."""
    forest, ids = tree.Forest(config, tensors), ints([0, 1, 2])
    found = tree.select(forest, ids)
    best = tree.best_child(forest, ids)
    rng, n = Random(seed), config.max_children
    x = randn(rng, 3, config.max_depth, config.embedding_dim)
    results: list[Any] = [found, best]
    steps = (
        lambda: tree.mark_in_flight(forest, ids, found.path, found.depth),
        lambda: tree.unmark_in_flight(forest, ids, found.path, found.depth),
        lambda: tree.expand(
            forest, ids, found.node, torch.ones(3, n, dtype=forest.dtype), ints([n] * 3), ints([1] * 3)
        ),
        lambda: tree.add_child(forest, ids, forest.roots(), torch.ones(3, dtype=forest.dtype)),
        lambda: tree.backup(forest, ids, found.path, found.depth, torch.ones(3, dtype=forest.dtype), x),
        lambda: tree.children(forest, 0, int(found.path[0, 0])),
        lambda: tree.reroot(forest, ids, best.slot),
        lambda: tree.select(forest, ids),
    )
    for step in steps:
        try:
            results.append(step())
        except RainKernelsError as refused:
            results.append(str(refused))
    return results


_NAMED = ("forest", "fields", *(name for name, _ in FIELDS))
OPS = {
    "select": FuzzOp(with_out(select_call, tree.select), tree.select),
    "expand": FuzzOp(with_out(expand_call, tree.expand), tree.expand),
    "add_child": FuzzOp(with_out(add_child_call, tree.add_child), tree.add_child),
    "backup": FuzzOp(with_out(backup_call, tree.backup), tree.backup),
    "best_child": FuzzOp(with_out(best_child_call, tree.best_child), tree.best_child),
    "reroot": FuzzOp(with_out(reroot_call, tree.reroot), tree.reroot),
    "mark_in_flight": FuzzOp(path_call, tree.mark_in_flight),
    "unmark_in_flight": FuzzOp(unmark_call, tree.unmark_in_flight),
    "children": FuzzOp(children_call, tree.children),
    "node_stats": FuzzOp(stats_call, tree.node_stats, also_named=("node",)),
    "forest": FuzzOp(forest_call, adopt_and_search, _NAMED,
                     compares=False, steady=("config", "seed")),
}  # fmt: skip
