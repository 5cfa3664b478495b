"""One decode step of a whole model over branches that share a prefix: this engine's forward against stock transformers.

    python benchmarks/decode_step.py [--models 1b,7b] [--rows 1,10,40,160] [--prefixes 1024,4096] [--device cuda|cpu] [--json FILE]

Models have the shapes of Llama's and random weights made on the device; nothing is downloaded. Every branch has a shared
prefix and `--own` tokens of its own. Contenders, in turns, wall time of a step with the device idle before and after:

    engine                 a new plan on the host, then ModelRunner.forward with tree attention, as an engine step does
    engine, CUDA graph     the same forward replayed from a graph, its plan fixed
    stock                  transformers with sdpa and a DynamicCache that holds the prefix once per branch
    stock, CUDA graph      the same with a StaticCache, replayed from a graph

Both see the same keys and values, and logits are compared first. The floor of a step is the larger of (weights + every
distinct K/V once) over the bandwidth and the operations over the rate, measured in the same run. Prints a table, then one
JSON line; exit code 1 when our forward failed or its logits differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from decode_models import SHAPES, ForestStep, StockStep, build_model, floor_work  # noqa: E402
from kernel_bench.bench import free  # noqa: E402
from kernel_bench.machine import Ceilings, facts, measure_ceilings  # noqa: E402
from kernel_bench.measure import Prepared, alternate, first_line, paired_ratio, rounded, spread  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

OURS, OURS_GRAPH = "engine", "engine, CUDA graph"
STOCK, STOCK_GRAPH = "stock", "stock, CUDA graph"
_MEMORY_SHARE = 0.9  # of free memory that a cache per branch may take


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1b,7b", help=f"shapes, with commas between them: {', '.join(SHAPES)}")
    parser.add_argument("--rows", default="1,10,40,160", help="branches decoded together")
    parser.add_argument("--prefixes", default="1024,4096", help="tokens all branches share")
    parser.add_argument("--own", type=int, default=32, help="tokens of each branch's own, the new one included")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds a case may be timed for after three rounds")
    parser.add_argument("--json", type=Path, help="also write the record to this file, after every case")
    arguments = parser.parse_args(argv)
    models = arguments.models.split(",")
    if unknown := sorted(set(models) - set(SHAPES)):
        parser.error(f"--models: no shape {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    device = torch.device(arguments.device)
    ceilings = measure_ceilings(device, quick=device.type == "cpu")
    record: dict[str, Any] = {
        "op": "decode_step", "schema": 1, **facts(device), "ceilings": rounded(ceilings.to_json()),
        "own": arguments.own, "rows": [],
    }  # fmt: skip
    for name in models:
        for row in model_rows(name, arguments, device, ceilings):
            record["rows"].append(row)
            print(_line(row), file=sys.stderr, flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(record) + "\n", encoding="utf-8")
        free(device)
    _print_table(record)
    print(json.dumps(record), flush=True)
    return 1 if any(row["status"] != "ok" for row in record["rows"]) else 0


def model_rows(
    name: str, arguments: argparse.Namespace, device: torch.device, ceilings: Ceilings
) -> Iterator[dict[str, Any]]:
    """Every batch of one model, each when it is done."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    begin = time.perf_counter()
    try:
        model = build_model(name, device, dtype)
    except Exception as error:  # then the other model is still measured
        yield {"model": name, "status": "failed", "failed": {OURS: first_line(error)}}
        return
    built = time.perf_counter() - begin
    for prefix in map(int, arguments.prefixes.split(",")):
        for rows in map(int, arguments.rows.split(",")):
            begin = time.perf_counter()
            row: dict[str, Any] = {"model": name, "prefix": prefix, "branches": rows, "dtype": str(dtype)[6:]}
            try:
                ours = ForestStep(model, prefix, rows, arguments.own)
                row |= compare(ours, arguments, device, ceilings)
            except Exception as error:
                row |= {"status": "failed", "failed": {OURS: first_line(error)}}
            free(device)
            yield dict(rounded(row)) | {
                "seconds": round(time.perf_counter() - begin, 2),
                "build_seconds": round(built, 2),
            }


def compare(
    ours: ForestStep, arguments: argparse.Namespace, device: torch.device, ceilings: Ceilings
) -> dict[str, Any]:
    """Check and time the contenders of one batch."""
    wall = Wall(device)
    found: dict[str, Any] = {"status": "ok", "checked": {}, "failed": {}}
    prepared: dict[str, Prepared] = {}
    with torch.inference_mode():
        ours.select()
        logits = ours.forward(ours.new_batch()).float()  # a failure of ours is the case's
        prepared[OURS] = wall.prepared(lambda: ours.forward(ours.new_batch()), "eager", before=ours.select)
        batch = ours.new_batch()
        _try(found, prepared, OURS_GRAPH, lambda: wall.graph(ours.fixed(batch), before=ours.select))
        stocks: dict[str, Callable[[], Prepared]] = {
            STOCK: lambda: _stock(ours, wall, found, logits, static=False),
            STOCK_GRAPH: lambda: _stock(ours, wall, found, logits, static=True),
        }
        for label, build in stocks.items():
            _try(found, prepared, label, build)
        samples = alternate(prepared, arguments.repeats, arguments.budget)
    if any(not check["ok"] for check in found["checked"].values()):
        found["status"] = "wrong"
    num_bytes, num_flops = floor_work(ours)
    floor, by = ceilings.floor_us(num_bytes, num_flops, str(ours.dtype)[6:])
    found["times"] = {
        label: spread(taken) | {"share_of_floor": floor / spread(taken)["median_us"], "timer": prepared[label].timer}
        for label, taken in samples.items()
    }
    found["ratio"], apart = ratios(samples)
    if device.type == "cuda" and OURS_GRAPH not in samples:
        found["notes"] = {"plain_calls": [OURS], "not_compared": apart}
    return found | {"floor_us": floor, "floor_by": by, "bytes": num_bytes, "flops": num_flops}


def ratios(samples: dict[str, list[float]]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Times over ours by "theirs / ours", the graph's where there is one; and who was left out.

    Without ours, their graph is compared with nothing: against plain calls it would mostly measure launches.
    """
    best = OURS_GRAPH if OURS_GRAPH in samples else OURS
    apart = [label for label in samples if best == OURS and label == STOCK_GRAPH]
    pairs = [(label, best) for label in samples if label != best and label not in apart]
    if best != OURS and STOCK in samples:
        pairs.append((STOCK, OURS))
    return {f"{a} / {b}": paired_ratio(samples[a], samples[b]) for a, b in pairs}, apart


def _stock(ours: ForestStep, wall: Wall, found: dict[str, Any], logits: torch.Tensor, *, static: bool) -> Prepared:
    """transformers over caches filled with our keys and values; its logits must be ours."""
    free(wall.device)
    room, need = wall.room() * _MEMORY_SHARE, StockStep.bytes_needed(ours)
    if need > room:
        raise MemoryError(f"a cache per branch takes {need / 1e9:.1f} GB, free are {room / 1e9:.1f} GB")
    stock = StockStep(ours, static=static)
    stock.before()
    theirs = stock.forward().float()
    error = float((theirs - logits).abs().max() / logits.abs().max())
    found["checked"][STOCK_GRAPH if static else STOCK] = {
        "error": error, "allowed": (allowed := 1e-3 if ours.dtype == torch.float32 else 0.1), "ok": error <= allowed,
        "measure": "largest difference of logits over the largest logit",
    }  # fmt: skip
    if static:
        return wall.graph(stock.forward, before=stock.before)
    return wall.prepared(stock.forward, "eager", before=stock.before)


def _try(found: dict[str, Any], prepared: dict[str, Prepared], label: str, build: Callable[[], Prepared]) -> None:
    try:
        prepared[label] = build()
    except Exception as error:  # the others are still timed
        found["failed"][label] = first_line(error)


class Wall:
    """Wall time of single calls, the device idle before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def room(self) -> float:
        """Bytes that can still be allocated."""
        return float(torch.cuda.mem_get_info(self.device)[0]) if self.device.type == "cuda" else 4e9

    def prepared(
        self, run: Callable[[], object], timer: str, before: Callable[[], object] = lambda: None, warm_up: int = 3
    ) -> Prepared:
        for _ in range(warm_up):
            before()
            run()

        def sample() -> float:
            before()
            self.finish()
            begin = time.perf_counter()
            run()
            self.finish()
            return (time.perf_counter() - begin) * 1e6

        return Prepared(sample, timer)

    def graph(self, run: Callable[[], object], before: Callable[[], object]) -> Prepared:
        """`run` captured once; `before` runs outside the graph."""
        if self.device.type != "cuda":
            raise RuntimeError("CUDA graphs need a CUDA device")
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                before()
                run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        before()
        self.finish()
        graph = torch.cuda.CUDAGraph()
        # On the stream of the warm-up: what a call keeps for each stream is there already.
        with torch.cuda.graph(graph, stream=side):
            run()
        return self.prepared(graph.replay, "graph", before)


def _line(row: dict[str, Any]) -> str:
    where = f"{row['model']}, {row.get('branches')} branches over {row.get('prefix')}"
    if row["status"] == "failed":
        return f"{where}: failed: {row['failed'][OURS]}"
    times = ", ".join(f"{label} {each['median_us'] / 1e3:.2f} ms" for label, each in row["times"].items())
    return f"{where}: {row['status']}: {times}"


def _print_table(record: dict[str, Any]) -> None:
    console = Console(width=160)
    console.print(f"{record['device']}, torch {record['torch']}, commit {record['commit']}")
    table = Table(title="one decode step, ms (share of its floor)")
    labels = (OURS, OURS_GRAPH, STOCK, STOCK_GRAPH)
    for name in ("model", "branches", "prefix", "floor", *labels):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in record["rows"]:
        if row["status"] == "failed":
            table.add_row(row["model"], str(row.get("branches", "")), str(row.get("prefix", "")), "", "failed")
            continue
        times = row["times"]
        cells = [
            f"{times[label]['median_us'] / 1e3:.2f} ({times[label]['share_of_floor']:.2f})" if label in times else "-"
            for label in labels
        ]
        floor = f"{row['floor_us'] / 1e3:.2f}"
        table.add_row(row["model"], str(row["branches"]), str(row["prefix"]), floor, *cells)
    console.print(table)
    for row in record["rows"]:
        for label, reason in row["failed"].items():
            console.print(
                f"{row['model']}, {row.get('branches')} over {row.get('prefix')}, {label}: {reason}", markup=False
            )


if __name__ == "__main__":
    raise SystemExit(main())
