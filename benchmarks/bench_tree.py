"""Batched PUCT trees: select + backup iterations per second on one core, next to plain Python nodes in the same run.

    python benchmarks/bench_tree.py [--trees 256] [--simulations 64] [--children 10] [--repeats 3]

An iteration is one tree's select plus backup of the leaf, with one embedding per path level; expansions happen between
the two and are timed apart. Times are CPU times of the one thread, so that other jobs on the machine count little.
Two kinds of embeddings: `distinct` (siblings differ, most dot products stop early) and `alike` (all siblings within the
similarity threshold, every dot product runs to the end). The same search runs on plain nodes: as RAIN's published code
has them (torch), in plain Python without an array library, and with numpy. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

from plain_nodes import Node, PlainSearch  # noqa: E402
from tree_driver import ForestDriver, run_plain  # noqa: E402

from rainkernels._lanes import native  # noqa: E402
from rainkernels.ops import tree  # noqa: E402
from rainkernels.testing.cases_tree import CASES  # noqa: E402

NOISE = {"distinct": 1.0, "alike": 0.1}
NUM_BUFFERS = 8


@dataclass
class Timing:
    """Seconds spent in the ops over one search of all trees."""

    iterations: int
    depth: float
    select: float = 0.0
    backup: float = 0.0
    expand: float = 0.0

    @property
    def microseconds(self) -> float:
        return (self.select + self.backup) / self.iterations * 1e6


def check_correctness() -> int:
    """Choices of the timed ops against the plain nodes on named cases; returns the number of runs compared."""
    runs = 0
    for case in CASES:
        seeds = list(range(4))
        for trace, seed in zip(ForestDriver(case, seeds, torch.float32).run(), seeds, strict=True):
            plain = run_plain(case, seed, torch.float32)
            if plain.margins.cosine < 1e-5:
                continue
            if (trace.leaves, trace.added, trace.moves) != (plain.leaves, plain.added, plain.moves):
                raise SystemExit(f"{case}: seed {seed} chose differently from the plain nodes; not timed")
            runs += 1
    return runs


def make_embeddings(kind: str, trees: int, rows: int, dim: int, seed: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    centre = torch.nn.functional.normalize(torch.randn(dim, generator=rng), dim=0)
    return [centre + NOISE[kind] * torch.randn(trees, rows, dim, generator=rng) / dim**0.5 for _ in range(NUM_BUFFERS)]


def make_values(trees: int, simulations: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (simulations, trees), generator=rng).float()


def select_leaves(forest: tree.Forest, ids: Tensor) -> tree.Selection:
    """Descend to leaves; where one more child is asked for, go on without, as the plain nodes do here."""
    chosen = tree.select(forest, ids)
    while (waiting := (chosen.status == tree.NEED_CHILD).nonzero().flatten()).numel():
        again = tree.select(forest, ids[waiting], chosen.node[waiting])
        for now, new in zip(chosen, again, strict=True):
            now[waiting] = new
    return chosen


def time_forest(args: argparse.Namespace, forest: tree.Forest, kind: str, seed: int) -> Timing:
    """One search of all trees from bare roots, in a forest that was used before, as in a server."""
    config = forest.config
    ids = torch.arange(args.trees, dtype=torch.int32)
    forest.reset(ids)
    embeddings = make_embeddings(kind, args.trees, config.max_depth, config.embedding_dim, seed)
    values = make_values(args.trees, args.simulations, seed)
    priors = torch.rand(args.trees, args.children, generator=torch.Generator().manual_seed(seed)) + 0.05
    priors /= priors.sum(1, keepdim=True)
    sizes, lengths = torch.full_like(ids, args.children), torch.full_like(ids, 1)
    timing, depths = Timing(args.trees * args.simulations, 0.0), 0
    for step in range(args.simulations):
        start = time.thread_time()
        chosen = select_leaves(forest, ids)
        timing.select += time.thread_time() - start
        depths += int(chosen.depth.sum())
        start = time.thread_time()
        tree.expand(forest, ids, chosen.node, priors, sizes, lengths)
        timing.expand += time.thread_time() - start
        start = time.thread_time()
        tree.backup(forest, ids, chosen.path, chosen.depth, values[step], embeddings[step % NUM_BUFFERS])
        timing.backup += time.thread_time() - start
    timing.depth = depths / timing.iterations
    return timing


class PublishedNodes(PlainSearch):
    """The form of RAIN's published nodes: torch vectors, one cosine call per pair, the variance taken before it is needed."""

    def cosine(self, a: Any, b: Any) -> float:
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0).item())

    def _lacks_variety(self, node: Node) -> bool:
        means: list[Any] = [kid.mean for kid in node.children if kid.mean is not None]
        if not 2 <= len(node.children) < self.max_children or len(means) < len(node.children):
            return False
        spread = float(torch.norm(torch.var(torch.stack(means), dim=0)).item())
        return spread < self.variance * node.set_length and max(kid.q for kid in node.children) < 0


class ListVector(list[float]):
    """A vector in plain Python, no array library."""

    def __sub__(self, other: list[float]) -> ListVector:
        return ListVector(x - y for x, y in zip(self, other, strict=True))

    def __add__(self, other: list[float]) -> ListVector:  # type: ignore[override]
        return ListVector(x + y for x, y in zip(self, other, strict=True))

    def __truediv__(self, count: float) -> ListVector:
        return ListVector(x / count for x in self)

    def __matmul__(self, other: list[float]) -> float:
        return sum(map(operator.mul, self, other))


class PythonNodes(PlainSearch):
    """Nodes and vectors in plain Python."""

    def _lacks_variety(self, node: Node) -> bool:
        means: list[Any] = [kid.mean for kid in node.children if kid.mean is not None]
        if not 2 <= len(node.children) < self.max_children or len(means) < len(node.children):
            return False
        if max(kid.q for kid in node.children) >= 0:
            return False
        spread = math.hypot(*(statistics.variance(column) for column in zip(*means, strict=True)))
        return spread < self.variance * node.set_length


# Plain nodes to compare with, and how each holds an embedding.
PLAIN: dict[str, tuple[type[PlainSearch], Callable[[Tensor], Any]]] = {
    "published": (PublishedNodes, lambda vector: vector),
    "python": (PythonNodes, lambda vector: ListVector(vector.tolist())),
    "numpy": (PlainSearch, lambda vector: vector.double().numpy()),
}


def time_plain(args: argparse.Namespace, kind: str, seed: int, variant: str) -> float:
    """Microseconds per select + backup of plain nodes, same workload, 4 trees."""
    trees, rows, dim = 4, 24, 384
    nodes, convert = PLAIN[variant]
    tensors = make_embeddings(kind, trees, rows, dim, seed)
    buffers = [[[convert(row) for row in one] for one in batch] for batch in tensors]
    values = make_values(trees, args.simulations, seed)
    priors = torch.rand(trees, args.children, generator=torch.Generator().manual_seed(seed)) + 0.05
    priors /= priors.sum(1, keepdim=True)
    spent = 0.0
    for b in range(trees):
        search = nodes()
        for step in range(args.simulations):
            start = time.thread_time()
            path = search.select(lambda node: None)
            spent += time.thread_time() - start
            search.expand(path[-1], priors[b].tolist(), 1)
            texts = [None, *buffers[step % NUM_BUFFERS][b][1 : len(path)]]
            start = time.thread_time()
            search.backup(path, float(values[step, b]), texts)
            spent += time.thread_time() - start
    return spent / (trees * args.simulations) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", type=int, default=256)
    parser.add_argument("--simulations", type=int, default=64)
    parser.add_argument("--children", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = check_correctness()
    print(
        f"tree, {native().isa()}, 1 thread, {args.trees} trees, {args.simulations} simulations, {args.children} children,"
    )
    print(f"384-d embeddings, float32; choices equal to plain nodes in {runs} runs\n")
    header = "".join(f" {name + ' us':>13} {'ratio':>6}" for name in PLAIN)
    print(
        f"{'embeddings':<10} {'depth':>6} {'select us':>10} {'backup us':>10} {'expand us':>10} {'iterations/s':>13}{header}"
    )
    rows = {}
    forest = tree.Forest.create(args.trees, tree.TreeConfig(max_depth=24))
    for kind in NOISE:
        rows[kind] = compare(args, forest, kind)
    record = {
        "op": "tree_select_backup", "lane": "cpu", "isa": native().isa(), "dtype": "float32", "threads": 1,
        "trees": args.trees, "simulations": args.simulations, "children": args.children, "embedding_dim": 384,
        "runs_checked": runs, "iterations_per_s": min(r["iterations_per_s"] for r in rows.values()),
        **{f"times_{name}": min(r[f"times_{name}"] for r in rows.values()) for name in PLAIN},
        "cases": rows, "cpu": platform.processor() or platform.machine(), "torch": torch.__version__,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    print(json.dumps(record))


def compare(args: argparse.Namespace, forest: tree.Forest, kind: str) -> dict[str, float]:
    """One table row: the ops and every kind of plain node on the same workload, in turn."""
    time_forest(args, forest, kind, 0)
    timings: list[Timing] = []
    plain: dict[str, list[float]] = {name: [] for name in PLAIN}
    for repeat in range(args.repeats):
        timings.append(time_forest(args, forest, kind, 1 + repeat))
        for name in PLAIN:
            plain[name].append(time_plain(args, kind, 1 + repeat, name))
    mid = sorted(timings, key=lambda t: t.microseconds)[len(timings) // 2]
    select, backup, expand = (seconds / mid.iterations * 1e6 for seconds in (mid.select, mid.backup, mid.expand))
    rate = 1e6 / mid.microseconds
    times = {name: median(each) for name, each in plain.items()}
    tail = "".join(f" {us:>13.0f} {us / mid.microseconds:>5.0f}x" for us in times.values())
    print(f"{kind:<10} {mid.depth:>6.2f} {select:>10.2f} {backup:>10.2f} {expand:>10.2f} {rate:>13,.0f}{tail}")
    return {
        "iterations_per_s": round(rate), "select_us": round(select, 3), "backup_us": round(backup, 3),
        "expand_us": round(expand, 3), "mean_depth": round(mid.depth, 2),
        **{f"plain_{name}_us": round(us, 1) for name, us in times.items()},
        **{f"times_{name}": round(us / mid.microseconds, 1) for name, us in times.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
