"""The tree family: choices equal to plain nodes, lanes equal bit for bit, invariants, growth, errors, registered ops."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

sys.path.insert(0, str(Path(__file__).parent))

from tree_driver import ForestDriver, Trace, ints, run_plain

from rainkernels import DtypeError, LaneError, RangeError, ShapeError, StrideError, has_native
from rainkernels._forest import FIELDS, HEADER_IN_FLIGHT, NONE, PINNED_ROW
from rainkernels.ops import tree
from rainkernels.testing.cases_tree import CASES, TreeCase

pytestmark = pytest.mark.skipif(not has_native(), reason="rainkernels._C is not built")
BY_ID = {case.id: case for case in CASES}
STACKS = ("free_rows", "free_embeddings")  # above the top they hold what earlier pushes and re-rooting left
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small trees do not need more, and idle OpenMP threads spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def contents(forest: tree.Forest) -> list[Tensor]:
    """All that defines the state of a forest, comparable with torch.equal."""
    tops = {"free_rows": forest.free_rows(), "free_embeddings": forest.free_embeddings()}
    out = []
    for name, _ in FIELDS:
        t = forest.field(name).clone()
        if name in STACKS:
            t[torch.arange(t.shape[1]) >= tops[name][:, None]] = 0
        out.append(t)
    return out


def assert_same(a: tree.Forest, b: tree.Forest) -> None:
    for (name, _), x, y in zip(FIELDS, contents(a), contents(b), strict=True):
        assert torch.equal(x, y), name


def choices(trace: Trace) -> tuple[object, ...]:
    return trace.leaves, trace.added, trace.moves


# Choices of the official procedure


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_choices_equal_plain_nodes(case: TreeCase, dtype: torch.dtype) -> None:
    """500 runs per dtype over the cases, with re-rooting and dynamic children: same leaves, children and moves."""
    seeds = list(range(30 if case.id in ("single-child", "wide") else 74))
    compared = credited = 0
    for seed, mine in zip(seeds, ForestDriver(case, seeds, dtype).run(), strict=True):
        plain = run_plain(case, seed, dtype)
        if min(plain.margins.cosine, plain.margins.variance) < 1e-5:
            continue
        compared += 1
        assert choices(mine) == choices(plain), seed
        credited += sum(n != int(n) for n, *_ in mine.stats)
        for got, want in zip(mine.stats, plain.stats, strict=True):
            assert got == pytest.approx(want, abs=2e-5), seed
    assert compared >= 0.9 * len(seeds)
    assert (credited > 0) == (case.id not in ("single-child", "no-similarity"))


def test_dynamic_children_are_added_and_declined() -> None:
    traces = ForestDriver(BY_ID["harmful"], list(range(20)), torch.float32).run()
    assert sum(len(t.added) for t in traces) >= 20


# Lanes, instruction sets, threads


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_lane_is_bitwise_equal(case: TreeCase, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    native = ForestDriver(case, [3, 4], dtype)
    native.run()
    monkeypatch.setenv("RAINKERNELS_LANE", "reference")
    reference = ForestDriver(case, [3, 4], dtype)
    reference.run()
    assert_same(native.forest, reference.forest)
    assert [choices(t) for t in native.traces] == [choices(t) for t in reference.traces]


def test_unknown_lane_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAINKERNELS_LANE", "triton")
    with pytest.raises(LaneError, match="triton"):
        tree.select(small_forest(), ints([0]))


ISA_PROGRAM = """
import sys, hashlib, torch
sys.path.insert(0, {here!r})
torch.set_num_threads(1)
from tree_driver import ForestDriver
from rainkernels.testing.cases_tree import CASES
digest = hashlib.sha256()
for case in CASES:
    driver = ForestDriver(case, [1, 2, 3], torch.float32)
    driver.run()
    for t in driver.forest.tensors:
        digest.update(t.numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_are_bitwise_equal() -> None:
    """RAINKERNELS_ISA is read once per process, so each set gets its own."""
    program = ISA_PROGRAM.format(here=str(Path(__file__).parent))
    root = str(Path(__file__).resolve().parents[2])
    digests = set()
    for isa in ("baseline", "avx2", "avx512"):
        env = os.environ | {"RAINKERNELS_ISA": isa, "PYTHONPATH": root}
        digests.add(subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True).stdout)
    assert len(digests) == 1


def test_threads_do_not_matter() -> None:
    forests = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        driver = ForestDriver(BY_ID["ordinary"], list(range(40)), torch.float32)
        driver.run()
        forests.append(driver.forest)
    assert_same(forests[0], forests[1])
    assert_same(forests[0], forests[2])


# Batch invariance and growth


def test_batch_equals_singles_in_any_order() -> None:
    case, seeds = BY_ID["harmful"], [5, 6, 7, 8]
    batch = ForestDriver(case, seeds, torch.float32)
    batch.run()
    shuffled = ForestDriver(case, seeds, torch.float32, order=[2, 0, 3, 1])
    shuffled.run()
    assert_same(batch.forest, shuffled.forest)
    for b, seed in enumerate(seeds):
        single = ForestDriver(case, [seed], torch.float32)
        single.run()
        for x, y in zip(contents(single.forest), contents(batch.forest), strict=True):
            assert torch.equal(x[0], y[b])


def test_growing_midway_equals_starting_big() -> None:
    case = BY_ID["ordinary"]
    big = ForestDriver(case, [1, 2], torch.float32)
    small = ForestDriver(case, [1, 2], torch.float32)
    small.forest = tree.Forest.create(
        2, tree.TreeConfig(max_rows=20, max_embeddings=20, embedding_dim=16, max_depth=24)
    )
    for step in range(40):
        if step == 15:
            config = case.config
            small.forest = small.forest.grown(max_rows=config.max_rows, max_embeddings=config.max_embeddings)
        for driver in (big, small):
            driver.simulate()
            if step % 10 == 9:
                driver.reroot()
    assert_same(big.forest, small.forest)


def test_grown_adds_empty_trees_and_refuses_to_shrink() -> None:
    driver = ForestDriver(BY_ID["ordinary"], [1], torch.float32)
    driver.run()
    more = driver.forest.grown(num_trees=3)
    assert tree.select(more, ints([1, 2])).node.tolist() == [0, 0]
    assert torch.equal(tree.select(more, ints([0])).path, tree.select(driver.forest, ints([0])).path)
    with pytest.raises(RangeError, match="max_rows"):
        more.grown(max_rows=2)


def test_reset_makes_a_tree_new() -> None:
    driver = ForestDriver(BY_ID["ordinary"], [1, 2], torch.float32)
    driver.run()
    driver.forest.reset(ints([1]))
    fresh = tree.Forest.create(1, driver.case.config)
    for (name, _), x, y in zip(FIELDS, contents(driver.forest), contents(fresh), strict=True):
        if name not in ("means", "tails"):
            assert torch.equal(x[1], y[0]), name
    with pytest.raises(RangeError, match="tree_ids"):
        driver.forest.reset(ints([2]))


def test_several_leaves_of_one_tree_are_backed_up_in_order() -> None:
    """One call with a tree named three times equals three calls."""
    one, three = (ForestDriver(BY_ID["alike"], [1, 2], torch.float32) for _ in range(2))
    for driver in (one, three):
        for _ in range(8):
            driver.simulate()
    chosen = tree.select(one.forest, ints([0, 1, 0, 0]))
    values, dim = torch.tensor([1.0, 0.0, -1.0, 1.0]), one.case.config.embedding_dim
    x = 1 + 0.1 * torch.randn(4, int(chosen.depth.max()) + 1, dim, generator=torch.Generator().manual_seed(0))
    tree.backup(one.forest, ints([0, 1, 0, 0]), chosen.path, chosen.depth, values, x)
    for i, b in enumerate([0, 1, 0, 0]):
        at = slice(i, i + 1)
        tree.backup(three.forest, ints([b]), chosen.path[at], chosen.depth[at], values[at], x[at])
    assert_same(one.forest, three.forest)


# Rules of single ops


def small_forest(**changes: object) -> tree.Forest:
    sizes: dict[str, object] = {
        "max_rows": 4,
        "max_children": 4,
        "max_embeddings": 6,
        "embedding_dim": 8,
        "max_depth": 4,
    }
    return tree.Forest.create(2, tree.TreeConfig(**(sizes | changes)))  # type: ignore[arg-type]


def expand_one(forest: tree.Forest, node: int, priors: list[float], length: int = 1) -> int:
    p = torch.tensor([priors], dtype=forest.dtype)
    return int(tree.expand(forest, ints([0]), ints([node]), p, ints([len(priors)]), ints([length]))[0])


def backup_one(forest: tree.Forest, slots: list[int], value: float, embedding: Tensor | None = None) -> int:
    path = torch.full((1, forest.config.max_depth), -1, dtype=torch.int32)
    path[0, : len(slots)] = ints(slots)
    x = None if embedding is None else embedding.expand(1, len(slots), -1).contiguous()
    v = torch.tensor([value], dtype=forest.dtype)
    return int(tree.backup(forest, ints([0]), path, ints([len(slots) - 1]), v, x)[0])


def test_root_priors_are_mixed_at_expansion_and_again_at_reroot() -> None:
    forest = small_forest()
    first = expand_one(forest, 0, [0.6, 0.4])
    assert tree.children(forest, 0, 0).priors.tolist() == pytest.approx([0.575, 0.425])
    below = expand_one(forest, first, [0.9, 0.1])
    assert tree.children(forest, 0, first).priors.tolist() == pytest.approx([0.9, 0.1])
    added = tree.add_child(forest, ints([0]), ints([first]), torch.tensor([0.5]), mix=True)
    assert added.tolist() == [below + 2]
    tree.reroot(forest, ints([0]), ints([first]))
    mixed = [0.75 * p + 0.25 / 3 for p in (0.9, 0.1, 0.5)]
    assert tree.children(forest, 0, first).priors.tolist() == pytest.approx([p / sum(mixed) for p in mixed])
    tree.add_child(forest, ints([0]), ints([first]), torch.tensor([0.4]), mix=True)
    assert float(tree.children(forest, 0, first).priors[3]) == pytest.approx(0.75 * 0.4 + 0.25 / 4)


def test_similarity_credit_by_hand() -> None:
    forest = small_forest(dynamic_children=False)
    a = expand_one(forest, 0, [0.5, 0.3, 0.2])
    x = torch.zeros(8)
    x[0] = 1.0
    backup_one(forest, [0, a], -1.0, x)
    y = x.clone()
    y[1] = 0.2
    backup_one(forest, [0, a + 1], 1.0, y)
    weight = 0.2 / (1 + 0.04) ** 0.5
    stats = tree.children(forest, 0, 0)
    assert stats.visits.tolist() == pytest.approx([1 + weight, 1.0, 0.0])
    assert stats.direct_visits.tolist() == [1, 1, 0]
    assert stats.values.tolist() == pytest.approx([(-1 + weight) / (1 + weight), 1.0, 0.0])
    root = tree.node_stats(forest, 0, [0])
    assert (root.visits.tolist(), root.values.tolist()) == ([2.0], [0.0])


def test_best_child_ties_go_to_value_then_to_the_first() -> None:
    forest = small_forest()
    assert tree.best_child(forest, ints([0])).slot.tolist() == [-1]
    a = expand_one(forest, 0, [0.25] * 4)
    assert tree.best_child(forest, ints([0])).slot.tolist() == [a]
    for k, value in ((0, -1.0), (1, 0.5), (2, 0.5)):
        backup_one(forest, [0, a + k], value)
    best = tree.best_child(forest, ints([0]))
    assert (int(best.slot), float(best.visits), int(best.direct_visits), float(best.value)) == (a + 1, 1.0, 1, 0.5)


def test_need_child_is_asked_once_per_descent() -> None:
    forest = small_forest(max_embeddings=12)
    a = expand_one(forest, 0, [0.5, 0.5])
    b = expand_one(forest, a, [0.5, 0.5])
    x = torch.ones(8)
    for slots in ([0, a, b], [0, a, b + 1], [0, a + 1]):
        backup_one(forest, slots, -1.0, x)
    first = tree.select(forest, ints([0]))
    assert (int(first.status), int(first.node), int(first.depth)) == (tree.NEED_CHILD, 0, 0)
    second = tree.select(forest, ints([0]), ints([0]))
    assert int(second.depth) == 1
    if int(second.node) == a:
        assert int(second.status) == tree.NEED_CHILD
        third = tree.select(forest, ints([0]), second.node)
        assert (int(third.status), int(third.depth)) == (tree.LEAF, 2)
    with pytest.raises(RangeError, match="skip_node"):
        tree.select(forest, ints([0]), ints([b]))


def test_overflow_leaves_the_tree_as_it_was() -> None:
    forest = small_forest(max_rows=1, max_embeddings=1)
    a = expand_one(forest, 0, [0.5, 0.5])
    before = contents(forest)
    assert expand_one(forest, a, [1.0]) == tree.OVERFLOW
    assert all(torch.equal(x, y) for x, y in zip(before, contents(forest), strict=True))
    assert backup_one(forest, [0, a], 1.0, torch.ones(8)) == 0
    assert backup_one(forest, [0, a + 1], 1.0, torch.ones(8)) == 1
    assert tree.children(forest, 0, 0).visits.tolist() == [1.0, 1.0]
    bigger = forest.grown(max_rows=2, max_embeddings=2)
    assert expand_one(bigger, a, [1.0]) > a
    assert backup_one(bigger, [0, a + 1], 1.0, torch.ones(8)) == 0


def test_depth_overflow_and_full_node() -> None:
    forest = small_forest(max_depth=2, max_children=2)
    a = expand_one(forest, 0, [0.5, 0.5])
    assert expand_one(forest, a, [1.0]) == tree.OVERFLOW
    assert tree.add_child(forest, ints([0]), ints([0]), torch.tensor([0.1])).tolist() == [tree.OVERFLOW]
    tree.reroot(forest, ints([0]), ints([a]))
    assert expand_one(forest, a, [1.0]) > 0


def test_in_flight_counts_steer_select_and_vanish() -> None:
    forest = small_forest()
    a = expand_one(forest, 0, [0.4, 0.3, 0.2, 0.1])
    backup_one(forest, [0], 0.0)
    before = contents(forest)
    seen, marked = [], []
    for _ in range(4):
        chosen = tree.select(forest, ints([0]))
        seen.append(int(chosen.node) - a)
        tree.mark_in_flight(forest, ints([0]), chosen.path, chosen.depth)
        marked.append(chosen)
    assert seen[:2] == [0, 1]
    assert len(set(seen)) >= 3
    with pytest.raises(RangeError, match="in flight"):
        tree.reroot(forest, ints([0]), ints([a]))
    for chosen in marked:
        tree.unmark_in_flight(forest, ints([0]), chosen.path, chosen.depth)
    assert all(torch.equal(x, y) for x, y in zip(before, contents(forest), strict=True))
    with pytest.raises(RangeError, match="not marked"):
        tree.unmark_in_flight(forest, ints([0]), marked[0].path, marked[0].depth)


def test_works_under_inference_mode() -> None:
    with torch.inference_mode():
        driver = ForestDriver(BY_ID["ordinary"], [1], torch.float32)
        driver.run()
    assert choices(driver.traces[0]) == choices(run_plain(BY_ID["ordinary"], 1, torch.float32))


# Invariants


def check_invariants(forest: tree.Forest) -> None:
    c = forest.config
    for b in range(forest.num_trees):
        f = {name: forest.field(name)[b] for name, _ in FIELDS}
        root = int(forest.roots()[b])
        live, rows, queue = {root}, set(), [root]
        for slot in queue:
            row = int(f["child_row"][slot])
            if row < 0:
                continue
            assert int(f["owner"][row]) == slot
            rows.add(row)
            below = [row * c.max_children + k for k in range(int(f["count"][row]))]
            direct = int(f["direct_visits"][below].sum())
            assert direct + (0 if slot == root else 1) <= max(int(f["direct_visits"][slot]), direct)
            live.update(below)
            queue += below
        at = sorted(live)
        pinned = {r for r in range(1, c.num_rows) if int(f["owner"][r]) == PINNED_ROW}
        free = f["free_rows"][: int(forest.free_rows()[b])].tolist()
        assert sorted([*free, *rows, *pinned]) == list(range(1, c.num_rows))
        assert pinned == ({root // c.max_children} - {0})
        assert all(int(f["owner"][r]) == NONE for r in free)
        used = [e for e in f["embedding_of"][at].tolist() if e >= 0]
        pool = f["free_embeddings"][: int(forest.free_embeddings()[b])].tolist()
        assert sorted([*used, *pool]) == list(range(c.max_embeddings))
        assert (f["visits"][at] >= f["direct_visits"][at] - 1e-4).all()
        assert (f["values"][at].abs() <= 1 + 1e-5).all()
        assert f["bounds"].tolist() == [-1.0, 1.0]
        assert not f["in_flight"].any()
        assert int(f["header"][HEADER_IN_FLIGHT]) == 0


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_invariants_hold_in_any_search(data: st.DataObject) -> None:
    config = tree.TreeConfig(
        max_rows=data.draw(st.integers(1, 12)), max_children=data.draw(st.integers(1, 6)), max_depth=24,
        max_embeddings=data.draw(st.integers(0, 12)), embedding_dim=data.draw(st.sampled_from([1, 16, 70])),
    )  # fmt: skip
    high = data.draw(st.integers(1, config.max_children))
    case = TreeCase("any", config, branching=(1, high), noise=0.1, value_shift=data.draw(st.integers(-1, 1)))
    driver = ForestDriver(case, [data.draw(st.integers(0, 2**20)), 7], torch.float32)
    for move in data.draw(st.lists(st.booleans(), max_size=20)):
        expanded = all(len(tree.children(driver.forest, b, int(driver.forest.roots()[b])).slots) for b in range(2))
        if move and expanded:
            driver.reroot()
        else:
            driver.simulate()
        check_invariants(driver.forest)


# Errors


def bad_calls() -> dict[str, tuple[type[Exception], str, object]]:
    ok, half, nan = ints([0]), torch.tensor([[0.5, 0.5]]), float("nan")
    path = ints([0, 4, -1, -1])[None]
    one, x = torch.tensor([1.0]), torch.ones(1, 2, 8)

    def expand(f: tree.Forest, ids: Tensor = ok, node: int = 4, p: Tensor = half, k: int = 2, length: int = 1) -> None:
        tree.expand(f, ids, ints([node] * len(ids)), p, ints([k] * len(ids)), ints([length] * len(ids)))

    def backup(f: tree.Forest, p: Tensor = path, depth: int = 1, v: Tensor = one, e: Tensor | None = x) -> None:
        tree.backup(f, ok, p, ints([depth]), v, e)

    return {
        "tree-high": (RangeError, "tree_ids", lambda f: tree.select(f, ints([2]))),
        "tree-negative": (RangeError, "tree_ids", lambda f: tree.best_child(f, ints([-1]))),
        "ids-int64": (DtypeError, "tree_ids", lambda f: tree.select(f, torch.tensor([0]))),
        "ids-rank": (ShapeError, "tree_ids", lambda f: tree.select(f, ints([0])[None])),
        "ids-strided": (StrideError, "tree_ids", lambda f: tree.select(f, ints([0, 0, 1, 1])[::2])),
        "skip-length": (ShapeError, "skip_node", lambda f: tree.select(f, ok, ints([0, 0]))),
        "skip-elsewhere": (RangeError, "skip_node", lambda f: tree.select(f, ok, ints([5]))),
        "expand-twice": (RangeError, "has children already", lambda f: expand(f, node=0)),
        "expand-same-node": (RangeError, "named twice", lambda f: expand(f, ints([0, 0]), p=half.repeat(2, 1))),
        "expand-nowhere": (RangeError, "no node", lambda f: expand(f, node=99)),
        "expand-negative": (RangeError, "no node", lambda f: expand(f, node=-1)),
        "expand-spare-slot": (RangeError, "no node", lambda f: expand(f, node=7)),
        "expand-no-count": (
            DtypeError,
            "num_children",
            lambda f: tree.expand(f, ok, ints([4]), half, None, ints([1])),  # type: ignore[arg-type]
        ),
        "add-mix": (DtypeError, "mix", lambda f: tree.add_child(f, ok, ints([0]), one, mix=1)),  # type: ignore[arg-type]
        "stats-bool": (DtypeError, "tree_id", lambda f: tree.children(f, True, 0)),
        "stats-no-list": (DtypeError, "nodes", lambda f: tree.node_stats(f, 0, 4)),  # type: ignore[arg-type]
        "expand-none": (ShapeError, "num_children", lambda f: expand(f, k=0)),
        "expand-too-many": (ShapeError, "num_children", lambda f: expand(f, k=3)),
        "expand-wide": (ShapeError, "num_children", lambda f: expand(f, p=torch.full((1, 9), 0.1), k=9)),
        "prior-nan": (RangeError, "prior", lambda f: expand(f, p=torch.tensor([[0.5, nan]]))),
        "prior-negative": (RangeError, "prior", lambda f: expand(f, p=torch.tensor([[0.5, -0.1]]))),
        "prior-f64": (DtypeError, "priors", lambda f: expand(f, p=half.double())),
        "length-zero": (RangeError, "set_length", lambda f: expand(f, length=0)),
        "add-to-leaf": (RangeError, "expand first", lambda f: tree.add_child(f, ok, ints([4]), one)),
        "add-infinite": (RangeError, "prior", lambda f: tree.add_child(f, ok, ints([0]), one / 0)),
        "value-nan": (RangeError, "value", lambda f: backup(f, v=one * nan)),
        "value-shape": (ShapeError, "value", lambda f: backup(f, v=torch.ones(2))),
        "depth-high": (RangeError, "depth", lambda f: backup(f, depth=4)),
        "depth-negative": (RangeError, "depth", lambda f: backup(f, depth=-1)),
        "path-broken": (RangeError, "path", lambda f: backup(f, p=ints([0, 99, -1, -1])[None])),
        "path-no-root": (RangeError, "path", lambda f: backup(f, p=ints([4, 0, -1, -1])[None])),
        "path-short": (ShapeError, "path", lambda f: backup(f, p=ints([0, 4])[None])),
        "embedding-nan": (RangeError, "embedding", lambda f: backup(f, e=x * nan)),
        "embedding-rows": (ShapeError, "embedding", lambda f: backup(f, e=x[:, :1].contiguous())),
        "embedding-dim": (ShapeError, "embedding", lambda f: backup(f, e=x[..., :4].contiguous())),
        "embedding-f64": (DtypeError, "embedding", lambda f: backup(f, e=x.double())),
        "reroot-root": (RangeError, "root already", lambda f: tree.reroot(f, ok, ints([0]))),
        "reroot-nowhere": (RangeError, "no node", lambda f: tree.reroot(f, ok, ints([50]))),
        "reroot-twice": (RangeError, "named twice", lambda f: tree.reroot(f, ints([0, 0]), ints([4, 5]))),
        "unmark-unmarked": (RangeError, "not marked", lambda f: tree.unmark_in_flight(f, ok, path, ints([1]))),
        "stats-freed": (RangeError, "slot 6", lambda f: tree.node_stats(f, 0, [6])),
        "children-tree": (RangeError, "tree_id", lambda f: tree.children(f, 9, 0)),
    }


@pytest.mark.parametrize("lane", ["cpu", "reference"])
@pytest.mark.parametrize("name", list(bad_calls()))
def test_bad_calls_raise_and_change_nothing(name: str, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAINKERNELS_LANE", lane)
    kind, message, call = bad_calls()[name]
    forest = small_forest()
    expand_one(forest, 0, [0.5, 0.5])
    before = contents(forest)
    with pytest.raises(kind, match=message):
        call(forest)  # type: ignore[operator]
    assert all(torch.equal(x, y) for x, y in zip(before, contents(forest), strict=True))


def test_one_bad_item_stops_the_whole_call() -> None:
    forest = small_forest()
    p = torch.tensor([[0.5, 0.5], [0.5, -1.0]])
    with pytest.raises(RangeError, match="item 1"):
        tree.expand(forest, ints([0, 1]), ints([0, 0]), p, ints([2, 2]), ints([1, 1]))
    assert forest.free_rows().tolist() == [4, 4]


@pytest.mark.parametrize(
    "change",
    [
        {"max_rows": "4"}, {"max_rows": 4.5}, {"max_depth": True}, {"embedding_dim": None}, {"c_puct": None}, {"c_puct": True},
        {"dynamic_value": np.float32(1)}, {"root_prior_mix": torch.tensor(0.5)}, {"dynamic_children": 1}, {"similarity": None},
    ],
    ids=str,
)  # fmt: skip
def test_config_names_the_field_of_a_wrong_type(change: dict[str, object]) -> None:
    with pytest.raises(DtypeError, match=next(iter(change))):
        tree.TreeConfig(**change)  # type: ignore[arg-type]


def test_config_of_numbers_that_are_none_is_refused() -> None:
    good = tree.TreeConfig().as_floats()
    assert tree.TreeConfig.from_floats(good) == tree.TreeConfig()
    with pytest.raises(ShapeError, match="config has 12 numbers"):
        tree.TreeConfig.from_floats(good[:-1])
    for at, value, name in (
        (0, 4.5, "max_rows"),
        (0, float("nan"), "max_rows"),
        (5, "a", "c_puct"),
        (12, 2.0, "similarity"),
    ):
        with pytest.raises(DtypeError, match=name):
            tree.TreeConfig.from_floats([*good[:at], value, *good[at + 1 :]])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"max_rows": "7"}, DtypeError), ({"max_rows": 7.5}, DtypeError), ({"num_trees": True}, DtypeError),
        ({"max_embeddings": 1e9}, DtypeError), ({"max_rows": 0}, RangeError), ({"num_trees": 0}, RangeError),
        ({"max_depth": 2**17}, RangeError),
    ],
    ids=str,
)  # fmt: skip
def test_bad_growth_is_named(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(change))):
        small_forest().grown(**change)


def test_bad_new_forest_is_named() -> None:
    config = small_forest().config
    for num_trees in (True, 1.0, "2", None, np.int64(2)):
        with pytest.raises(DtypeError, match="num_trees"):
            tree.Forest.create(num_trees, config)  # type: ignore[arg-type]
    with pytest.raises(RangeError, match="num_trees"):
        tree.Forest.create(0, config)
    with pytest.raises(DtypeError, match="config"):
        tree.Forest.create(1, {"max_rows": 4})  # type: ignore[arg-type]
    with pytest.raises(RangeError, match="name is 'visit'"):
        small_forest().field("visit")


@pytest.mark.parametrize(
    "change",
    [{"max_children": 33}, {"max_rows": 0}, {"c_puct": float("nan")}, {"similarity_threshold": 1.5}, {"max_depth": 0}],
    ids=lambda c: next(iter(c)),
)
def test_config_names_the_bad_field(change: dict[str, float]) -> None:
    with pytest.raises(RangeError, match=next(iter(change))):
        tree.TreeConfig(**change)  # type: ignore[arg-type]


def test_forest_refuses_foreign_tensors() -> None:
    forest = small_forest()
    with pytest.raises(DtypeError, match="float32 or float64"):
        tree.Forest.create(1, forest.config, dtype=torch.float16)
    with pytest.raises(ShapeError, match="means"):
        tree.Forest(forest.config, [*forest.tensors[:-2], forest.tensors[-1], forest.tensors[-1]])
    assert tree.TreeConfig.from_floats(forest.config.as_floats()) == forest.config


# Registered ops


def op_calls() -> dict[str, tuple[object, ...]]:
    driver = ForestDriver(BY_ID["ordinary"], [1, 2], torch.float32)
    for _ in range(5):
        driver.simulate()
    forest, ids = driver.forest, ints([0, 1])
    chosen = tree.select(forest, ids)
    priors, values = torch.full((2, 3), 0.3), torch.tensor([1.0, -1.0])
    x = torch.ones(2, int(chosen.depth.max()) + 1, forest.config.embedding_dim)
    marked = forest.clone()
    tree.mark_in_flight(marked, ids, chosen.path, chosen.depth)
    path = (chosen.path, chosen.depth)
    calls: dict[str, tuple[tree.Forest, tuple[object, ...]]] = {
        "tree_select": (forest, (ids, ints([-1, -1]))),
        "tree_expand": (forest, (ids, chosen.node, priors, ints([3, 2]), ints([1, 2]))),
        "tree_add_child": (forest, (ids, ints([0, 0]), values.abs())),
        "tree_backup": (forest, (ids, *path, values, x)),
        "tree_best_child": (forest, (ids,)),
        "tree_reroot": (forest, (ids, tree.best_child(forest, ids).slot)),
        "tree_mark_in_flight": (forest, (ids, *path)),
        "tree_unmark_in_flight": (marked, (ids, *path)),
    }
    return {n: ([t.clone() for t in f.tensors], f.config.as_floats(), *args) for n, (f, args) in calls.items()}


@pytest.mark.parametrize(
    "name",
    ["select", "expand", "add_child", "backup", "best_child", "reroot", "mark_in_flight", "unmark_in_flight"],
)
def test_opcheck(name: str) -> None:
    args = op_calls()[f"tree_{name}"]
    results = opcheck(getattr(torch.ops.rainkernels, f"tree_{name}").default, args)
    assert set(results.values()) == {"SUCCESS"}


def test_registered_op_writes_the_tensors_it_is_given() -> None:
    fields, config, ids, *rest = op_calls()["tree_backup"]
    forest = tree.Forest(tree.TreeConfig.from_floats(config), [t.clone() for t in fields])  # type: ignore[arg-type, attr-defined]
    tree.backup(forest, ids, *rest)  # type: ignore[arg-type]
    torch.ops.rainkernels.tree_backup(fields, config, ids, *rest)
    assert all(torch.equal(x, y) for x, y in zip(fields, forest.tensors, strict=True))  # type: ignore[call-overload]
