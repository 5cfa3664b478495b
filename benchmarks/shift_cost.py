"""What the analysis of a token shift costs beside the forwards it cannot do without.

    python benchmarks/shift_cost.py [--answers 1000] [--tokens 64] [--threads 2] [--repeats 5] [--json FILE] [--profile]

The aligned model of the testbed (its adapter) answers held-out requests greedily, past its end-of-text tokens, so that every answer
has the same length. Measured, by turns: `Decoder.token_shift(None, 1.0, prompts, answers=...)`, from an empty KV cache; and the bare
forwards, which are the very batches that run used, through the runner's `forward_parts` with the same rows wanted, and nothing else.
Seconds of wall time and of CPU time (all threads), medians of the repeats. Prints a table, then one JSON line.
With --profile, one run of the analysis goes under cProfile instead.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import raindecode  # noqa: E402  before torch: asks MKL for reproducible results

# isort: split
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from raindecode import DeRa, Policy, Sampling  # noqa: E402
from raindecode.evaluation import town_requests  # noqa: E402

Row = dict[str, Any]
GOAL = 1.3  # the analysis may take so much of the forwards' time


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the record to this file, too")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args(argv)
    if min(arguments.answers, arguments.tokens, arguments.threads, arguments.repeats) < 1 or arguments.answers < 2:
        parser.error("allowed: at least 2 answers, and 1 or more of everything else")
    torch.set_num_threads(arguments.threads)
    case = Case(arguments.answers, arguments.tokens)
    if arguments.profile:
        profile = cProfile.Profile()
        profile.runcall(case.analyse)
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        return 0
    ours, bare = [], []
    for _ in range(arguments.repeats):
        ours.append(timed(case.analyse))
        bare.append(timed(case.forwards))
    record: Row = {
        "op": "shift_cost", "model": "testbed", "threads": arguments.threads, "torch": torch.__version__,
        "answers": arguments.answers, "tokens": arguments.tokens, "forwards": len(case.calls),
        "rows": sum(part.batch.num_rows for parts, _ in case.calls for part in parts),
        "positions": case.summary["positions"], "shifted": case.summary["shifted"], "repeats": arguments.repeats,
        "token_shift_s": median(wall for wall, _ in ours), "forwards_s": median(wall for wall, _ in bare),
        "token_shift_cpu_s": median(cpu for _, cpu in ours), "forwards_cpu_s": median(cpu for _, cpu in bare),
        "token_shift_best_s": min(wall for wall, _ in ours), "forwards_best_s": min(wall for wall, _ in bare),
        "ratios": [round(one / other, 3) for (one, _), (other, _) in zip(ours, bare, strict=True)],
    }  # fmt: skip
    record["ratio"] = record["token_shift_s"] / record["forwards_s"]
    record["ratio_cpu"] = record["token_shift_cpu_s"] / record["forwards_cpu_s"]
    record["goal"] = GOAL
    show(record)
    line = json.dumps(record)
    if arguments.json:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


class Case:
    """Prompts with answers of one length, and the forwards that reading them takes."""

    def __init__(self, answers: int, tokens: int) -> None:
        self.decoder = raindecode.Decoder.from_pretrained("testbed", adapter="testbed", device="cpu")
        parts = town_requests(answers // 2, answers - answers // 2, 0)
        self.prompts = [request.text for part in parts for request in part]
        search = Sampling.greedy(ignore_eos=True)
        requests = self.decoder.requests(
            self.prompts, search=search, policy=Policy(dera=DeRa(1.0)), max_new_tokens=tokens
        )
        unstopped = [replace(request, stop=()) for request in requests]
        written: Row = dict(self.decoder.stream(unstopped, search=search, progress=False))
        self.answers = [written[i].token_ids for i in range(answers)]
        self.calls: list[Any] = []
        self.summary: Row = {}
        self._record()

    def analyse(self) -> None:
        """The whole analysis, from an empty cache."""
        self.decoder.engine.forget()
        shift = self.decoder.token_shift(None, 1.0, self.prompts, answers=self.answers, progress=False)
        self.summary = shift.summary

    def forwards(self) -> None:
        """The same batches with the same rows wanted, and nothing else."""
        run = self.decoder.engine.runner.forward_parts
        for parts, wanted in self.calls:
            run(parts, wanted)

    def _record(self) -> None:
        """One analysis that notes its forwards; it also makes what is made once."""
        runner: Any = self.decoder.engine.runner
        run = runner.forward_parts

        def noting(parts: Any, wanted: Any, *rest: Any) -> Any:
            self.calls.append((parts, wanted))
            return run(parts, wanted, *rest)

        runner.forward_parts = noting
        try:
            self.analyse()
        finally:
            del runner.forward_parts


def timed(function: Callable[[], None]) -> tuple[float, float]:
    """Seconds of wall time, and of CPU time of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def show(record: Row) -> None:
    """A table for people."""
    table = Table(
        title=f"Token shift, {record['answers']:,} answers of {record['tokens']} tokens, {record['threads']} threads"
    )
    for column in ("", "wall, s", "CPU, s"):
        table.add_column(column, justify="left" if not column else "right")
    for name, label in (("token_shift", "token_shift"), ("forwards", f"its {record['forwards']} forwards alone")):
        table.add_row(label, f"{record[f'{name}_s']:.2f}", f"{record[f'{name}_cpu_s']:.2f}")
    table.add_row("ratio", f"{record['ratio']:.2f}", f"{record['ratio_cpu']:.2f}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
