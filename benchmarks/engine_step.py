"""One decode step of an engine, its forward launched kernel by kernel and from a CUDA graph.

    python benchmarks/engine_step.py [--models 1b,7b] [--rows 1,16,64] [--prefix 1024] [--device cuda|cpu] [--json FILE]

Models have the shapes of Llama's and random weights made on the device; nothing is downloaded. So many branches share a prefix
and have `--own` tokens each; a step runs the last token of every branch and reads the logits back, as a request does. It is
the same step every time, the two contenders take turns over one engine, and logits are compared first. Times are the
engine's own: planning, and the model with the read of the logits. On a CPU there are no graphs, which the record says.
Prints a table, then one JSON line; exit code 1 when a case failed, logits differ, or a GPU ran without graphs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from decode_models import SHAPES, build_model  # noqa: E402
from kernel_bench.bench import free  # noqa: E402
from kernel_bench.machine import facts  # noqa: E402
from kernel_bench.measure import first_line, paired_ratio, rounded, spread  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from raindecode.engine.branch import Ledger  # noqa: E402
from raindecode.engine.engine import Engine  # noqa: E402
from raindecode.engine.loader import build_engine  # noqa: E402
from raindecode.engine.task import Task  # noqa: E402
from raindecode.engine.types import Search, Want  # noqa: E402

PLAIN, GRAPH = "engine", "engine, CUDA graphs"
_WARM_UP = 3  # steps of each contender that are not counted; the first one captures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1b,7b", help=f"shapes, with commas between them: {', '.join(SHAPES)}")
    parser.add_argument("--rows", default="1,16,64", help="branches decoded together")
    parser.add_argument("--prefix", type=int, default=1024, help="tokens all branches share")
    parser.add_argument("--own", type=int, default=32, help="tokens of each branch's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each contender")
    parser.add_argument("--json", type=Path, help="also write the record to this file, after every case")
    arguments = parser.parse_args(argv)
    models, rows = arguments.models.split(","), [int(count) for count in arguments.rows.split(",")]
    if unknown := sorted(set(models) - set(SHAPES)):
        parser.error(f"--models: no shape {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    if min(*rows, arguments.prefix, arguments.own, arguments.repeats) < 1:
        parser.error("--rows, --prefix, --own and --repeats take whole numbers from 1 on")
    device = torch.device(arguments.device)
    record: dict[str, Any] = {"op": "engine_step", "schema": 1, **facts(device), "own": arguments.own, "rows": []}
    for name in models:
        for row in model_rows(name, rows, arguments, device):
            record["rows"].append(row)
            if arguments.json:
                arguments.json.write_text(json.dumps(record) + "\n", encoding="utf-8")
        free(device)
    _print_table(record)
    print(json.dumps(record), flush=True)
    return 1 if any(row["status"] != "ok" for row in record["rows"]) else 0


def model_rows(
    name: str, counts: list[int], arguments: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Every batch of one model, each when it is done."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    row: dict[str, Any] = {"model": name, "prefix": arguments.prefix, "dtype": str(dtype)[6:]}
    try:
        model = build_model(name, device, dtype)
        slots = arguments.prefix + max(counts) * arguments.own
        engine, _ = build_engine(model, kv_tokens=slots, exact=False, verify=False)
    except Exception as error:  # then the other model is still measured
        yield row | {"status": "failed", "failed": {PLAIN: first_line(error)}}
        return
    for branches in counts:
        try:
            found = compare(engine, branches, arguments)
        except Exception as error:
            found = {"status": "failed", "failed": {PLAIN: first_line(error)}}
        yield dict(rounded(row | {"branches": branches} | found))


def compare(engine: Engine, branches: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Check and time the two contenders over the same branches."""
    runner, graphs = engine.runner, engine.runner.graphs
    contenders = {PLAIN: None} if graphs is None else {PLAIN: None, GRAPH: graphs}
    found: dict[str, Any] = {"status": "ok", "checked": {}, "failed": {}}
    samples: dict[str, dict[str, list[float]]] = {label: {"model": [], "plan": []} for label in contenders}
    logits: dict[str, np.ndarray[Any, Any]] = {}
    ledger, answers = Ledger(), []
    task = Task(_same_step(engine, ledger, branches, arguments, answers), ledger)
    engine.tree.clear()
    engine.submit(task)
    try:
        runner.graphs = None
        engine.step()  # prefill
        for turn in range(_WARM_UP + arguments.repeats):
            for label, chosen in contenders.items():
                runner.graphs = chosen
                before, replays = dict(ledger.seconds), 0 if chosen is None else chosen.replays
                engine.step()
                if task.error is not None:
                    raise task.error
                if chosen is not None and chosen.replays != replays + 1:
                    raise RuntimeError(f"the step did not run from a graph: {chosen.failed or 'it does not fit'}")
                for phase, taken in samples[label].items():
                    if turn >= _WARM_UP:
                        taken.append((ledger.seconds[phase] - before.get(phase, 0.0)) * 1e6)
                logits[label] = answers[-1]
    finally:
        runner.graphs = graphs
        task.cancel()
        engine.step()
    found["times"] = {label: spread(each["model"]) for label, each in samples.items()}
    found["plan"] = {label: spread(each["plan"]) for label, each in samples.items()}
    if graphs is None:
        found["failed"][GRAPH] = runner.graphs_obstacle or "graphs are off"
        found["status"] = "ok" if runner.device.type == "cpu" else "failed"
        return found
    largest = max(float(np.abs(logits[PLAIN]).max()), 1e-30)
    error, allowed = float(np.abs(logits[GRAPH] - logits[PLAIN]).max()) / largest, 0.05
    found["checked"][GRAPH] = {
        "error": error, "allowed": allowed, "ok": error <= allowed,
        "measure": "largest difference of logits over the largest logit",
    }  # fmt: skip
    found["status"] = "ok" if error <= allowed else "wrong"
    found["ratio"] = {f"{PLAIN} / {GRAPH}": paired_ratio(samples[PLAIN]["model"], samples[GRAPH]["model"])}
    return found


def _same_step(
    engine: Engine, ledger: Ledger, branches: int, arguments: argparse.Namespace, answers: list[Any]
) -> Search:
    """Wants the logits after every branch again and again; each time the last tokens run again."""
    vocabulary = engine.runner.model.config.get_text_config().vocab_size
    tokens = np.random.default_rng(0).integers(3, vocabulary, arguments.prefix + branches * arguments.own).tolist()
    stem, rest = tokens[: arguments.prefix], tokens[arguments.prefix :]
    held = [engine.open(ledger, stem + rest[at : at + arguments.own]) for at in range(0, len(rest), arguments.own)]
    while True:
        got = yield [Want(branch, logits=True) for branch in held]
        answers[:] = [np.stack([each.logits for each in got])]


def _print_table(record: dict[str, Any]) -> None:
    console = Console(width=160)
    console.print(f"{record['device']}, torch {record['torch']}, commit {record['commit']}")
    table = Table(title="one decode step, ms: the model with the read of its logits (planning on the host)")
    for name in ("model", "branches", "prefix", PLAIN, GRAPH):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in record["rows"]:
        times, plan = row.get("times", {}), row.get("plan", {})
        cells = [
            f"{times[label]['median_us'] / 1e3:.2f} ({plan[label]['median_us'] / 1e3:.2f})" if label in times else "-"
            for label in (PLAIN, GRAPH)
        ]
        table.add_row(row["model"], str(row.get("branches", "")), str(row["prefix"]), *cells)
    console.print(table)
    for row in record["rows"]:
        for label, reason in row["failed"].items():
            console.print(f"{row['model']}, {row.get('branches', 'all')} branches, {label}: {reason}", markup=False)


if __name__ == "__main__":
    raise SystemExit(main())
