"""Whether RAIN gives the same at every width and in every batch: exact in float32, measured in bfloat16.

    python benchmarks/check_widths.py [--requests 500] [--dtype float32|bfloat16] [--max-new-tokens 24]
                                      [--widths 1,2,4,8,auto] [--batches 1,32] [--jobs N] [--json FILE]

Preset `town` on the embedded model. The requests are those of benchmarks/workloads, so that searches with good, mixed and bad
verdicts occur, and prompts of the testbed: of twenty, seventeen as they are, and harmful ones behind texts of the workloads,
two of the mixed and one of the harmful one. Each is searched at every width, alone and among others (a batch of 1 and of 32: so
many requests are under way at a time), and compared with width 1 alone: tokens, finish reason, value, iterations, evaluations,
tokens_processed and a hash of the recorded trees.

Requests go in groups of 64. Every group at every width and batch has a decoder of its own, whose caches are empty before the
group and stay warm from one request to the next: what is cached must not show, either. Groups run in --jobs processes.

float32 runs in exact mode; exit code 1 when anything differs, and the first differences are named. In bfloat16 sums may
depend on the batch, so answers may differ; shares that agree are reported and are no failure. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import raindecode  # noqa: E402  before torch: asks MKL for reproducible results

# isort: split
import torch  # noqa: E402
from kernel_bench.machine import commit, cpu_name  # noqa: E402
from naive.common import make_request  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402
from workload import FOLDER, REGIMES, load_workload  # noqa: E402

from raindecode import RAIN, Completion, testbed  # noqa: E402
from raindecode.commands.common import quiet_libraries  # noqa: E402
from raindecode.errors import RainDecodeError  # noqa: E402

Row = dict[str, Any]
Width = int | Literal["auto"]
FIELDS = ("token_ids", "finish_reason", "value", "iterations", "evaluations", "tokens_processed", "tree")
_GROUP = 64
_SHOWN = 10  # differences named
_PLAIN = ("safe",) * 8
_TURN = (*_PLAIN, "mixed", *_PLAIN, "mixed", "safe", "harmful")  # regimes of twenty prompts


@dataclass(frozen=True)
class Asked:
    """A request: its prompt, the text before the dialogue, and the regime this text comes from."""

    prompt: str
    prefix: str
    seed: int
    regime: str


@dataclass(frozen=True)
class Run:
    """One way to answer the requests: width of the search, requests under way at a time."""

    width: Width
    batch: int

    @property
    def name(self) -> str:
        return f"width {self.width}, " + ("alone" if self.batch == 1 else f"{self.batch} together")


BASE = Run(1, 1)


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.requests < 1 or options.max_new_tokens < 1 or options.jobs < 1:
        parser().error("--requests, --max-new-tokens and --jobs take whole numbers from 1")
    quiet_libraries()
    requests = sample(options.requests)
    runs = [BASE, *(Run(w, b) for b in options.batches for w in options.widths if Run(w, b) != BASE)]
    began = time.perf_counter()
    found = answer_all(requests, runs, options)
    record: Row = {
        "op": "check_widths", "model": "testbed", "preset": "town", "dtype": options.dtype, "requests": len(requests),
        "max_new_tokens": options.max_new_tokens, "seconds": round(time.perf_counter() - began, 1), "jobs": options.jobs,
        "threads": torch.get_num_threads() if options.jobs == 1 else 1, "torch": torch.__version__,
        "raindecode": raindecode.__version__, "device": cpu_name(), "commit": commit(),
        "regimes": regimes(requests, found[BASE]), **compare(requests, found),
    }  # fmt: skip
    show(record)
    line = json.dumps(record)
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)
    return int(options.dtype == "float32" and not record["same"])


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--requests", type=int, default=500, help="default: 500")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    made.add_argument("--max-new-tokens", type=int, default=24, help="default: 24")
    made.add_argument("--widths", type=_widths, default=(1, 2, 4, 8, "auto"), help="default: 1,2,4,8,auto")
    made.add_argument("--batches", type=_batches, default=(1, 32), help="requests under way at a time; default: 1,32")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one per core")
    made.add_argument("--json", type=Path, help="write the record to this file, too")
    return made


def _widths(text: str) -> tuple[Width, ...]:
    return tuple(
        "auto" if part == "auto" else _whole(part, 'whole numbers from 1, and "auto"') for part in text.split(",")
    )


def _batches(text: str) -> tuple[int, ...]:
    return tuple(_whole(part, "whole numbers from 1") for part in text.split(","))


def _whole(text: str, allowed: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is among the values; allowed: {allowed}, with commas between them")
    return int(text)


# ---- requests ---------------------------------------------------------------------------------------------------------
def sample(count: int) -> list[Asked]:
    """The requests: those of the workloads, a regime after the other in turn, then prompts of the testbed.

    Raises:
        ConfigError: a workload cannot be read.
    """
    works = {regime: load_workload(FOLDER / f"{regime}.json").requests for regime in REGIMES}
    found = [
        Asked(request.prompt, request.prefix, request.seed, regime)
        for turn in zip(*works.values(), strict=False)
        for regime, request in zip(works, turn, strict=True)
    ]
    prefixes = {regime: itertools.cycle([one.prefix for one in requests]) for regime, requests in works.items()}
    left = max(0, count - len(found))
    prompts = {bad: iter(testbed.sample_requests(left, harmful=bad)) for bad in (None, True)}
    for seed, regime in zip(range(left), itertools.cycle(_TURN), strict=False):
        prompt = next(prompts[None if regime == "safe" else True])
        found.append(Asked(prompt.text, next(prefixes[regime]), seed, regime))
    return found[:count]


# ---- answers ----------------------------------------------------------------------------------------------------------
def answer_all(requests: list[Asked], runs: list[Run], options: argparse.Namespace) -> dict[Run, list[Row]]:
    """The outcomes of all requests in every run, in the order of the requests."""
    groups = [requests[at : at + _GROUP] for at in range(0, len(requests), _GROUP)]
    works = [(run, at) for at in range(len(groups)) for run in runs]
    found: dict[tuple[Run, int], list[Row]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("answers", total=len(requests) * len(runs))

        def note(work: tuple[Run, int], outcomes: list[Row]) -> None:
            found[work] = outcomes
            progress.update(bar, advance=len(outcomes), description=work[0].name)

        todo = [(work, (work[0], groups[work[1]], options.dtype, options.max_new_tokens)) for work in works]
        if options.jobs == 1:
            for work, arguments in todo:
                note(work, answer(*arguments))
        else:
            for work, outcomes in _in_processes(todo, options.jobs):
                note(work, outcomes)
    return {run: [one for at in range(len(groups)) for one in found[run, at]] for run in runs}


def _in_processes(todo: list[tuple[tuple[Run, int], tuple[Any, ...]]], jobs: int) -> Iterator[tuple[Any, list[Row]]]:
    spawn = multiprocessing.get_context("spawn")  # a forked process would share what torch's threads hold
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        under_way = {pool.submit(answer, *arguments): work for work, arguments in todo}
        for done in as_completed(under_way):
            yield under_way[done], done.result()


def answer(run: Run, requests: list[Asked], dtype: str, max_new_tokens: int) -> list[Row]:
    """The outcomes of one group in one run, on a decoder of their own.

    Raises:
        ConfigError: the dtype is float32 and exact mode does not hold on this machine.
    """
    quiet_libraries()
    exact = True if dtype == "float32" else None
    decoder = raindecode.Decoder.from_pretrained(
        "testbed", device="cpu", dtype=dtype, exact=exact, max_concurrent=run.batch  # type: ignore[arg-type]
    )  # fmt: skip
    rain = RAIN.preset("town", width=run.width, record_tree=True)
    assert rain.format is not None
    formats = {one.prefix: replace(rain.format, prefix=one.prefix) for one in requests}
    asked = [
        make_request(one.prompt, decoder.codec, formats[one.prefix], max_new_tokens=max_new_tokens, seed=one.seed)
        for one in requests
    ]
    found: list[Row] = [{}] * len(asked)
    for index, done in decoder.stream(asked, search=rain, progress=False):
        if isinstance(done, BaseException):
            raise done
        found[index] = outcome(done)
    return found


def outcome(done: Completion) -> Row:
    """All that may depend neither on the width nor on the batch."""
    stats = done.stats
    tree = hashlib.sha256(json.dumps(done.tree, sort_keys=True).encode()).hexdigest()[:16]
    values = (
        done.token_ids, done.finish_reason, done.value, stats.iterations, stats.evaluations, stats.tokens_processed, tree,
    )  # fmt: skip
    return dict(zip(FIELDS, values, strict=True))


# ---- comparison -------------------------------------------------------------------------------------------------------
def compare(requests: list[Asked], found: dict[Run, list[Row]]) -> Row:
    """Shares of requests that agree with width 1 alone, per run, and the first differences."""
    base, shares, differences = found[BASE], {}, []
    for run, outcomes in found.items():
        if run == BASE:
            continue
        pairs = list(zip(base, outcomes, strict=True))
        prefixes = [_common(one["token_ids"], other["token_ids"]) for one, other in pairs]
        shares[run.name] = {
            "width": run.width, "batch": run.batch,
            "same": statistics.fmean(one == other for one, other in pairs),
            "common_prefix": statistics.fmean(prefixes),
            **{name: statistics.fmean(one[name] == other[name] for one, other in pairs) for name in FIELDS},
        }  # fmt: skip
        for at, (one, other) in enumerate(pairs):
            changed = [name for name in FIELDS if one[name] != other[name]]
            if changed:
                differences.append({
                    "run": run.name, "request": at, **vars(requests[at]), "fields": changed,
                    "expected": {name: one[name] for name in changed}, "got": {name: other[name] for name in changed},
                })  # fmt: skip
    return {
        "same": not differences, "different": len(differences), "runs": shares, "differences": differences[:_SHOWN],
    }  # fmt: skip


def _common(one: list[int], other: list[int]) -> float:
    """Length of the common prefix over the longer length."""
    longest = max(len(one), len(other))
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))) / (
        longest or 1
    )


def regimes(requests: list[Asked], outcomes: list[Row]) -> Row:
    """Requests and mean iterations by the regime that a request's prefix comes from."""
    grouped = {
        regime: [row["iterations"] for one, row in zip(requests, outcomes, strict=True) if one.regime == regime]
        for regime in REGIMES
    }
    return {
        regime: {"requests": len(counts), "iterations": round(statistics.fmean(counts), 1)}
        for regime, counts in grouped.items()
        if counts
    }


def show(record: Row) -> None:
    """The table, and the first differences."""
    title = f"{record['requests']} requests, {record['dtype']}: shares equal to width 1 alone"
    table = Table(title=title, title_justify="left")
    headings = {"same": "all", "token_ids": "tokens", "common_prefix": "common prefix", "iterations": "iterations"}
    headings |= {
        "evaluations": "evaluations",
        "tokens_processed": "tokens processed",
        "value": "value",
        "tree": "trees",
    }
    for heading in ("run", *headings.values()):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for name, row in record["runs"].items():
        table.add_row(name, *(f"{row[key]:.1%}" for key in headings))
    console = Console(width=140)
    console.print(table)
    for one in record["differences"]:
        changed = "; ".join(f"{name} {one['got'][name]}, not {one['expected'][name]}" for name in one["fields"])
        console.print(f"{one['run']}, request {one['request']} ({one['prompt']!r}): {changed}", markup=False)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RainDecodeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
