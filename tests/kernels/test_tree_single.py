"""SingleTree: the same tree as the ops of a forest make, through growth; clones that go their own way; errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rainkernels import DtypeError, RainKernelsError, RangeError, ShapeError, has_native
from rainkernels.ops import tree
from rainkernels.ops.tree_single import RootChild, SingleTree

pytestmark = pytest.mark.skipif(not has_native(), reason="rainkernels._C is not built")
DIM = 8
SMALL = tree.TreeConfig(
    max_rows=2, max_children=5, max_embeddings=3, embedding_dim=DIM, max_depth=2, dynamic_variance=0.5
)
BIG = replace(SMALL, max_rows=400, max_embeddings=400, max_depth=64)


@pytest.fixture(params=["cpu", "reference"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Pair:
    """A SingleTree that starts small and grows, and a forest large enough from the start, through one random search."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.rng = np.random.default_rng(seed)
        self.single = SingleTree(SMALL, dtype=dtype)
        self.forest = tree.Forest.create(1, BIG, dtype=dtype)
        self.done: dict[str, int] = {"add_child": 0, "declined": 0, "reroot": 0}

    def real(self, value: float) -> Tensor:
        return torch.tensor([value], dtype=self.dtype)

    def simulate(self) -> None:
        path = self.select()
        value = float(self.rng.choice([-1.0, 0.25, 1.0]))
        embedding = torch.from_numpy(self.rng.normal(size=(len(path), DIM)).astype(np.float32))
        given = embedding if self.rng.random() < 0.8 else None
        full = torch.full((1, BIG.max_depth), -1, dtype=torch.int32)
        full[0, : len(path)] = ints(*path)
        batch = None if given is None else given[None]
        dropped = tree.backup(self.forest, ints(0), full, ints(len(path) - 1), self.real(value), batch)
        assert int(dropped) == 0
        self.single.backup(path, value, given)
        if not self.single.priors(path[-1]):
            priors = self.rng.random(int(self.rng.integers(1, SMALL.max_children)))
            padded = torch.zeros(1, BIG.max_children, dtype=self.dtype)
            padded[0, : len(priors)] = torch.from_numpy(priors)
            length = int(self.rng.integers(1, 4))
            first = tree.expand(self.forest, ints(0), ints(path[-1]), padded, ints(len(priors)), ints(length))
            assert self.single.expand(path[-1], priors.tolist(), length) == int(first) > 0
        self.compare(path)

    def select(self) -> list[int]:
        skip: int | None = None
        while True:
            chosen = tree.select(self.forest, ints(0), None if skip is None else ints(skip))
            path, wants_child = self.single.select(skip)
            assert path == chosen.path[0, : int(chosen.depth) + 1].tolist()
            assert wants_child == (int(chosen.status) == tree.NEED_CHILD)
            if not wants_child:
                return path
            skip = path[-1]
            if self.rng.random() < 0.7:
                self.add_child(skip)

    def add_child(self, slot: int) -> None:
        prior = float(self.rng.random())
        mix = slot == int(self.forest.roots())
        made = int(tree.add_child(self.forest, ints(0), ints(slot), self.real(prior), mix=mix))
        assert self.single.add_child(slot, prior) == (None if made == tree.OVERFLOW else made)
        self.done["declined" if made == tree.OVERFLOW else "add_child"] += 1

    def reroot(self) -> None:
        best = tree.best_child(self.forest, ints(0))
        slot = int(best.slot)
        assert self.single.best_child() == RootChild(slot, int(best.direct_visits), float(best.value))
        freed = torch.nonzero(tree.reroot(self.forest, ints(0), ints(slot))[0]).flatten().tolist()
        assert self.single.reroot(slot) == freed
        assert self.single.root == slot
        self.done["reroot"] += 1

    def compare(self, path: list[int]) -> None:
        stats = tree.node_stats(self.forest, 0, path)
        for i, slot in enumerate(path):
            node = self.single.node(slot)
            assert node == (float(stats.visits[i]), int(stats.direct_visits[i]), float(stats.values[i]))
            assert self.single.priors(slot) == tree.children(self.forest, 0, slot).priors.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_random_searches_equal_the_ops(dtype: torch.dtype, lane: str) -> None:
    grown, done = [], {"add_child": 0, "declined": 0, "reroot": 0}
    for seed in range(4 if lane == "cpu" else 2):
        pair = Pair(seed, dtype)
        assert pair.single.best_child() is None
        for step in range(60):
            pair.simulate()
            if step % 20 == 19:
                pair.reroot()
        grown.append(pair.single.forest.config)
        done = {name: count + pair.done[name] for name, count in done.items()}
    assert all(config.max_rows > SMALL.max_rows and config.max_depth > SMALL.max_depth for config in grown)
    assert all(config.max_embeddings > SMALL.max_embeddings for config in grown)
    assert min(done["add_child"], done["reroot"]) > 0


def test_a_full_node_takes_no_more_children(lane: str) -> None:
    single = SingleTree(SMALL)
    first = single.expand(0, [0.5] * 4, 1)
    assert single.add_child(0, 0.5) == first + 4
    assert single.add_child(0, 0.5) is None
    assert len(single.priors(0)) == 5


def contents(single: SingleTree) -> list[Tensor]:
    return [t.clone() for t in single.forest.tensors]


@pytest.mark.parametrize("make", [SingleTree.clone, copy.deepcopy], ids=["clone", "deepcopy"])
def test_clones_go_their_own_way(make: Callable[[SingleTree], SingleTree], lane: str) -> None:
    original = SingleTree(SMALL)
    first = original.expand(0, [0.5, 0.5], 1)
    original.backup([0, first], 1.0)
    twin = make(original)
    before, node = contents(original), original.node(first)
    for _ in range(12):  # beyond what the small tree holds
        path, _ = twin.select()
        twin.backup(path, -1.0, torch.ones(len(path), DIM))
        if not twin.priors(path[-1]):
            twin.expand(path[-1], [0.3, 0.3, 0.4], 2)
    assert twin.forest.config != original.forest.config
    twin.reroot(first)
    assert (original.root, twin.root) == (0, first)
    assert all(map(torch.equal, contents(original), before))
    assert original.node(first) == node
    copied = contents(twin)
    original.backup([0, first], 0.5)
    assert original.node(first).direct_visits == 2
    assert all(map(torch.equal, contents(twin), copied))


def test_a_tree_of_addresses_cannot_be_pickled() -> None:
    with pytest.raises(TypeError, match=r"use clone\(\)"):
        pickle.dumps(SingleTree(SMALL))


NAN = float("nan")
BAD: list[tuple[type[RainKernelsError], str, Callable[[SingleTree], object]]] = [
    (DtypeError, "skip must be a Python int, got float", lambda t: t.select(1.5)),  # type: ignore[arg-type]
    (RangeError, "skip is 1099511627776", lambda t: t.select(1 << 40)),
    (RangeError, "skip_node", lambda t: t.select(7)),
    (ShapeError, "path has 0 slots, allowed: 1 to 2", lambda t: t.backup([], 1.0)),
    (ShapeError, "path has 3 slots", lambda t: t.backup([0, 5, 6], 1.0)),
    (DtypeError, "path must be a Python int, got float", lambda t: t.backup([0, 5.0], 1.0)),  # type: ignore[list-item]
    (RangeError, "each slot a child of the one before", lambda t: t.backup([0, 1], 1.0)),
    (RangeError, "value is not finite", lambda t: t.backup([0], NAN)),
    (
        ShapeError,
        r"embedding has shape \[2, 3\], expected \[any, 8\]",
        lambda t: t.backup([0, 5], 1.0, torch.ones(2, 3)),
    ),
    (DtypeError, "embedding has dtype torch.float64", lambda t: t.backup([0, 5], 1.0, torch.ones(2, DIM).double())),
    (ShapeError, "embedding has no row for every node", lambda t: t.backup([0, 5], 1.0, torch.ones(1, DIM))),
    (RangeError, "embedding of the path is not finite", lambda t: t.backup([0, 5], 1.0, torch.full((2, DIM), NAN))),
    (ShapeError, "priors has 0 numbers, allowed: 1 to 5", lambda t: t.expand(5, [], 1)),
    (ShapeError, "priors has 6 numbers", lambda t: t.expand(5, [0.1] * 6, 1)),
    (RangeError, "prior is negative or not finite", lambda t: t.expand(5, [0.1, NAN], 1)),
    (RangeError, "set_length must be 1 or more", lambda t: t.expand(5, [0.1], 0)),
    (RangeError, "has children already", lambda t: t.expand(0, [0.1], 1)),
    (RangeError, "no node of its tree", lambda t: t.expand(9, [0.1], 1)),
    (RangeError, "no children yet", lambda t: t.add_child(5, 0.1)),
    (RangeError, "prior is negative", lambda t: t.add_child(0, -0.1)),
    (RangeError, "the slot is the root already", lambda t: t.reroot(0)),
    (RangeError, "no node of its tree", lambda t: t.reroot(9)),
    (RangeError, "no node of tree 0", lambda t: t.node(9)),
    (RangeError, "no node of tree 0", lambda t: t.priors(-1)),
]


@pytest.mark.parametrize(("kind", "text", "call"), BAD)
def test_bad_calls_are_refused_and_change_nothing(
    kind: type[RainKernelsError], text: str, call: Callable[[SingleTree], object], lane: str
) -> None:
    single = SingleTree(SMALL)
    assert single.expand(0, [0.5, 0.3], 1) == 5
    before = contents(single)
    with pytest.raises(kind, match=text):
        call(single)
    assert single.forest.config == SMALL
    assert all(map(torch.equal, contents(single), before))
    assert single.expand(5, [0.4], 1) == 10  # nothing of the refused call is left in the arguments


def test_a_forest_holds_floats_of_two_kinds() -> None:
    with pytest.raises(DtypeError, match="float32 or float64"):
        SingleTree(SMALL, dtype=torch.float16)
