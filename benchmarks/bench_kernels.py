"""Every kernel family next to plain PyTorch, torch.compile and, on a GPU, the best peer that imports.

    python benchmarks/bench_kernels.py [--ops attention,logits,edits,kv,tree] [--device cpu|cuda] [--quick] [--json FILE]

A case is first compared with its definition (rainkernels/reference, float64), then its contenders take turns, so that a noisy
machine hits all of them: medians, quartiles and paired ratios. The floor is the larger of the fewest bytes over the
bandwidth, and the operations over the rate, both measured in the same run; on a CPU data that stays in a cache can beat it.
On a GPU calls are replayed from a CUDA graph over enough sets of inputs to overflow the cache, and plain calls are timed as
well. Prints a table, then one JSON line; --json writes the same after every case, so that an interrupted run keeps what it
had. Exit code 1 when one of our kernels failed or gave something else than its definition.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from kernel_bench.bench import OURS, Settings, free, run_bench  # noqa: E402
from kernel_bench.machine import Ceilings, facts, measure_ceilings  # noqa: E402
from kernel_bench.measure import first_line, make_timer, rounded  # noqa: E402
from kernel_bench.report import print_row, print_table  # noqa: E402

FAMILIES = ("attention", "logits", "edits", "kv", "tree")
SCHEMA = 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(FAMILIES), help="families, with commas between them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of every case")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds a case may be timed for after three rounds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it compiles for a while)")
    parser.add_argument("--quick", action="store_true", help="one small case of each op, few rounds, no torch.compile")
    parser.add_argument("--json", type=Path, help="also write the record to this file, after every case")
    arguments = parser.parse_args(argv)
    families = [name.strip() for name in arguments.ops.split(",") if name.strip()]
    if unknown := sorted(set(families) - set(FAMILIES)):
        parser.error(f"--ops: no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    settings = Settings(
        device,
        repeats=3 if arguments.quick else arguments.repeats,
        case_budget_s=1.0 if arguments.quick else arguments.budget,
        quick=arguments.quick,
        compile=not (arguments.no_compile or arguments.quick),
    )
    ceilings = measure_ceilings(device, quick=arguments.quick)
    record: dict[str, Any] = {
        "op": "kernels", "schema": SCHEMA, "quick": arguments.quick, **facts(device),
        "ceilings": rounded(ceilings.to_json()), "rows": [],
    }  # fmt: skip
    for family in families:
        for row in family_rows(family, settings, ceilings):
            print_row(row)
            record["rows"].append(row)
            if arguments.json:
                _write(arguments.json, record)
    wrong = [f"{row['op']}: {row['case']}" for row in record["rows"] if row["status"] != "ok"]
    record["not_ok"] = wrong
    if arguments.json:
        _write(arguments.json, record)
    print_table(record)
    print(json.dumps(record), flush=True)
    return 1 if wrong else 0


def family_rows(family: str, settings: Settings, ceilings: Ceilings) -> Any:
    """Rows of one family, each when it is done. What breaks becomes a row that says so."""
    timer = make_timer(settings.device)
    try:
        makers = importlib.import_module(f"kernel_bench.{family}").makers(settings)
    except Exception as error:  # a family that does not import must not keep the others from being measured
        yield _failed(family, "import", error)
        return
    for name, make in makers:
        begin = time.perf_counter()
        try:
            made = make()
            row = made if isinstance(made, dict) else run_bench(made, settings, timer, ceilings)
            del made
        except Exception as error:
            row = _failed(family, name, error)
        free(settings.device)
        yield {"family": family, **row, "seconds": round(time.perf_counter() - begin, 2)}


def _failed(family: str, case: str, error: Exception) -> dict[str, Any]:
    return {
        "family": family, "op": family, "case": case, "lane": None, "dtype": None, "status": "failed",
        "checked": {}, "failed": {OURS: first_line(error)}, "notes": {},
    }  # fmt: skip


def _write(path: Path, record: dict[str, Any]) -> None:
    """Replace the file at once: whoever is interrupted leaves the last whole record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record) + "\n", encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    raise SystemExit(main())
