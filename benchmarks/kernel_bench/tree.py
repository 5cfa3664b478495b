"""select and backup of many trees, and whole searches next to plain Python nodes (bench_tree.py has the details)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import bench_tree
import torch
from torch import Tensor

from kernel_bench.bench import OURS, Bench, Settings, Verdict, forced_lane
from kernel_bench.measure import Run, Runs, paired_ratio, rounded, spread
from rainkernels._lanes import choose_lane
from rainkernels.ops import tree

_DIM = 384
_HOST = "cpu lane, same machine"
_NAMES = {"published": "nodes as published (torch)", "python": "nodes in plain Python", "numpy": "numpy nodes"}


def makers(settings: Settings) -> list[tuple[str, Callable[[], Bench | dict[str, Any]]]]:
    """Names of the cases, and what makes each."""
    trees, simulations = (8, 6) if settings.quick else (256, 64)
    made: list[tuple[str, Callable[[], Bench | dict[str, Any]]]] = [
        (f"{op}, {trees} trees", partial(make, op, trees, simulations, settings)) for op in ("select", "backup")
    ]
    if settings.device.type == "cpu":
        kinds = list(bench_tree.NOISE)[: 1 if settings.quick else None]
        made += [(f"search, {kind} embeddings", partial(search, kind, trees, simulations, settings)) for kind in kinds]
    return made


def make(op: str, trees: int, simulations: int, settings: Settings) -> Bench:
    """One op on trees that a search has grown. `backup` adds to their statistics each time; its cost stays the same."""
    forest = _grown(trees, simulations)
    # Label -> device and lane.
    places: dict[str, tuple[torch.device, str | None]] = {OURS: (settings.device, None)}
    if settings.device.type == "cuda":
        places[_HOST] = (torch.device("cpu"), None)
    else:
        places["plain PyTorch (reference)"] = (settings.device, "reference")
    builders = {label: partial(_runs, op, forest, *place) for label, place in places.items()}
    verify = _select_like(forest) if op == "select" else _backup_like(forest, places)
    step = Step(forest.clone())
    depth = float(step.chosen.depth.float().mean())
    path_bytes = trees * depth * _DIM * 4
    num_bytes = trees * depth * 64 if op == "select" else 3 * path_bytes
    notes = {"mean_depth": depth}
    return Bench(
        op,
        f"{trees} trees",
        torch.float32,
        builders,
        verify,
        num_bytes,
        0.0,
        choose_lane("tree", settings.device),
        notes,
        frozenset({_HOST}),
    )


class Step:
    """Inputs of one round of ops on a forest."""

    def __init__(self, forest: tree.Forest) -> None:
        device, trees = forest.device, forest.num_trees
        self.forest = forest
        self.ids = torch.arange(trees, dtype=torch.int32, device=device)
        skip = self.ids.new_full((trees,), -1)
        self.chosen = tree.select(forest, self.ids)
        waiting = self.chosen.status == tree.NEED_CHILD
        self.skip = torch.where(waiting, self.chosen.node, skip)
        self.chosen = tree.select(forest, self.ids, self.skip)
        rng = torch.Generator().manual_seed(7)
        rows = forest.config.max_depth
        self.embedding = torch.randn(trees, rows, _DIM, generator=rng).to(device)
        self.values = torch.rand(trees, generator=rng).to(device)

    def call(self, op: str) -> Run:
        if op == "select":
            return lambda: tree.select(self.forest, self.ids, self.skip)
        path, depth = self.chosen.path, self.chosen.depth
        return lambda: tree.backup(self.forest, self.ids, path, depth, self.values, self.embedding)


def search(kind: str, trees: int, simulations: int, settings: Settings) -> dict[str, Any]:
    """Select + backup inside whole searches, microseconds of one core per iteration, next to the same on plain nodes."""
    arguments = argparse.Namespace(trees=trees, simulations=simulations, children=10)
    runs = bench_tree.check_correctness()
    forest = tree.Forest.create(trees, tree.TreeConfig(max_depth=24))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    samples: dict[str, list[float]] = {label: [] for label in (OURS, *_NAMES.values())}
    try:
        bench_tree.time_forest(arguments, forest, kind, 0)
        for repeat in range(1 if settings.quick else 3):
            samples[OURS].append(bench_tree.time_forest(arguments, forest, kind, 1 + repeat).microseconds)
            for name, label in _NAMES.items():
                samples[label].append(bench_tree.time_plain(arguments, kind, 1 + repeat, name))
    finally:
        torch.set_num_threads(threads)
    return dict(rounded({
        "op": "tree search", "case": f"{trees} trees, {simulations} simulations, {kind} embeddings, 1 thread",
        "lane": choose_lane("tree", settings.device), "dtype": "float32", "status": "ok", "failed": {},
        "checked": {OURS: {"error": 0.0, "allowed": 0.0, "ok": True, "measure": f"choices differing from plain nodes in {runs} runs"}},
        "times": {label: spread(taken) | {"timer": "thread_time", "rounds": len(taken)} for label, taken in samples.items()},
        "ratio": {label: paired_ratio(taken, samples[OURS]) for label, taken in samples.items() if label != OURS},
        "notes": {"unit": "one iteration of one tree"},
    }))  # fmt: skip


def _grown(trees: int, simulations: int) -> tree.Forest:
    forest = tree.Forest.create(trees, tree.TreeConfig(max_depth=24))
    arguments = argparse.Namespace(trees=trees, simulations=simulations, children=10)
    bench_tree.time_forest(arguments, forest, "distinct", 0)
    return forest


def _copied(forest: tree.Forest, device: torch.device) -> tree.Forest:
    return tree.Forest(forest.config, [t.clone().to(device) for t in forest.tensors])


def _runs(op: str, forest: tree.Forest, device: torch.device, lane: str | None) -> Runs:
    run = Step(_copied(forest, device)).call(op)

    def call() -> object:
        with forced_lane(lane):
            return run()

    return [run if lane is None else call]


def _select_like(forest: tree.Forest) -> Callable[[str, Run], Verdict]:
    """Choices must be those of the definition."""
    with forced_lane("reference"):
        wanted = Step(forest.clone()).chosen

    def verify(label: str, run: Run) -> Verdict:
        got = run()
        assert isinstance(got, tree.Selection)
        live = torch.arange(wanted.path.shape[1]) <= wanted.depth[:, None]
        wrong = int((got.node.cpu() != wanted.node).sum() + ((got.path.cpu() != wanted.path) & live).sum())
        return Verdict(float(wrong), 0.0, "choices that differ")

    return verify


def _backup_like(
    forest: tree.Forest, places: dict[str, tuple[torch.device, str | None]]
) -> Callable[[str, Run], Verdict]:
    """Values after one backup of a copy: the timed forest is left alone."""

    def after(device: torch.device, lane: str | None) -> tree.Forest:
        copy = _copied(forest, device)
        with forced_lane(lane):
            Step(copy).call("backup")()
        return copy

    wanted = after(torch.device("cpu"), "reference")

    def verify(label: str, run: Run) -> Verdict:
        got = after(*places[label])
        pairs = zip(got.tensors, wanted.tensors, strict=True)
        return Verdict(max(_difference(a, b) for a, b in pairs if a.dtype.is_floating_point), 1e-4)

    return verify


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.cpu(), b.cpu()
    same = (a == b) | (a.isnan() & b.isnan())
    return float((a - b).abs().masked_fill(same, 0.0).max()) if a.numel() else 0.0
