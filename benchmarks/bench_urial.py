"""What a constant prompt (URIAL) costs per request: time to first token and throughput, raindecode beside plain transformers.

Models are `testbed` and random weights in the shapes 25m, 110m, 1b and 7b. The prompt is one of --prefix tokens made of kind exchanges, the
queries are different ones of 15 to 25 tokens, all in the testbed's words.

engines
    hot                  raindecode, the prompt in the prefix store; nothing of earlier queries is left
    again                raindecode with nothing cached: the prompt is computed with the request
    disk                 raindecode with nothing cached: the prompt's K/V are read from a file (load_prefix) with the request
    transformers         `generate` of transformers, the whole prompt run for every request, as the published code does
    transformers_reuse   the same with the prompt's DynamicCache kept: cropped back for one request, copied per row for a batch

First every engine's greedy tokens, alone and in a batch padded on the left, are checked against a forward of transformers in one piece,
and raindecode's counters: the first token of a hot request runs the query's own tokens and no other. Else the exit code is 1 and
nothing is timed. Then rounds of all engines alternate, their order rotating, with a new query each. Time to first token is that of a
whole call that gives one token, tokenizer included; so is computing the prompt's K/V alone against loading them. Throughput is that
of --concurrent requests of --new-tokens tokens each, all together. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import raindecode  # noqa: E402  before torch: asks MKL for reproducible results

# isort: split
import torch  # noqa: E402
from bench_options import (  # noqa: E402
    MODELS,
    add_machine_options,
    check_least,
    check_machine_options,
    in_turns,
    settle,
    write_json,
)
from kernel_bench.machine import facts  # noqa: E402
from kernel_bench.measure import paired_ratio, quartiles, rounded  # noqa: E402
from rain_engines import check_room, load_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import AutoTokenizer, PreTrainedModel  # noqa: E402
from urial_engines import ENGINES, OWN, PREFIX, Engines, bytes_needed, constant_prompt  # noqa: E402

from raindecode import testbed  # noqa: E402
from raindecode.errors import ConfigError, RainDecodeError  # noqa: E402

Row = dict[str, Any]
Samples = dict[str, list[float]]
LEAST_REUSE, LEAST_LOAD = 10.0, 5.0
LEAST_PREFIX = 900  # tokens of a prompt that the goals are for
_THROUGHPUT = tuple(name for name in ENGINES if name != "disk")
_RATIOS = (
    ("again", "hot"), ("disk", "hot"), ("transformers", "hot"), ("transformers_reuse", "hot"),
    ("transformers", "again"), ("transformers", "transformers_reuse"), ("compute_prefix", "load_prefix"),
)  # fmt: skip
_QUICK = {"prefix": 120, "rounds": 2, "batch_rounds": 1, "concurrent": "1,3", "new_tokens": 4}
_CHECKED, _CHECKED_TOKENS = 3, 8
_VERDICT = {True: "met", False: "NOT MET", None: "not judged"}
EXAMPLES = """examples
  {prog}                                     the testbed
  {prog} --shape 110m --threads 2            random weights of a real shape
  {prog} --shape 25m --concurrent 1,8        less to wait for
  {prog} --quick                             only to see that it works
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """The options; the command line of raindecode passes them on as they are."""
    made = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog=EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--shape", default="testbed", help=f"{', '.join(MODELS)} (default: testbed)")
    most = "tokens of the constant prompt, at most (default: 1000, or what the context leaves)"
    made.add_argument("--prefix", type=int, help=most)
    made.add_argument("--rounds", type=int, default=9, help="of every engine's first token (default: 9)")
    made.add_argument("--batch-rounds", type=int, default=3, help="of every engine's throughput (default: 3)")
    made.add_argument("--concurrent", default="1,8,32", help="requests together, comma between (default: 1,8,32)")
    made.add_argument("--new-tokens", type=int, default=32, help="of every answer (default: 32)")
    made.add_argument("--quick", action="store_true", help="so small that it is over at once; the numbers mean nothing")
    add_machine_options(made)
    return made


def main(argv: list[str] | None = None, *, prog: str = "python benchmarks/bench_urial.py") -> int:
    """Run the benchmark.

    Args:
        argv: the options; None takes those of the process.
        prog: what the help calls the program.

    Returns:
        0, or 1 where engines disagree or a counter is not what it should be.

    Raises:
        ConfigError: an option is not allowed, or the model does not fit.
    """
    options = parser(prog).parse_args(argv)
    if options.quick:
        vars(options).update(_QUICK)
    device, concurrent = checked(options)
    dtype = settle(options)
    needed = bytes_needed(options.shape, dtype, options.prefix or 1000, max(concurrent), options.new_tokens)
    check_room(options.shape, device, dtype, needed)
    model = load_model(options.shape, device, dtype)
    tokenizer = AutoTokenizer.from_pretrained(testbed.WEIGHTS)
    format = constant_prompt(tokenizer, prefix_room(options, model))
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prefix.safetensors"
        rows = max(*concurrent, _CHECKED)
        engines = Engines(
            model, tokenizer, format, file, rows=rows, new_tokens=max(options.new_tokens, _CHECKED_TOKENS)
        )
        queries = engines.queries(max(options.rounds, *concurrent, _CHECKED))
        record: Row = {
            "op": "urial", "schema": 1, "shape": options.shape, "parameters": sum(p.numel() for p in model.parameters()),
            "prefix_tokens": len(engines.prefix), "file_bytes": file.stat().st_size, "concurrent": concurrent,
            **{name: getattr(options, name) for name in ("new_tokens", "rounds", "batch_rounds", "dtype", "quick")},
            "raindecode": raindecode.__version__, **facts(device), **agreement(engines, queries[:_CHECKED]),
        }  # fmt: skip
        if record["same"]:
            record |= summary(first_tokens(engines, queries, options.rounds))
            record["throughput"] = throughput(engines, queries, concurrent, options)
    record["load"] = [*load, os.getloadavg()[0]]
    record["goals"] = goals(record)
    return report(rounded(record, 5), options)


def checked(options: argparse.Namespace) -> tuple[torch.device, list[int]]:
    """Device and numbers of requests, before anything is loaded.

    Raises:
        ConfigError: an option is not allowed.
    """
    device = check_machine_options(options)
    check_least(options, {"prefix": 64, "rounds": 1, "batch_rounds": 1, "new_tokens": 1})
    try:
        concurrent = [int(word) for word in options.concurrent.split(",")]
    except ValueError:
        concurrent = [0]
    if not all(1 <= count <= 256 for count in concurrent) or len(set(concurrent)) < len(concurrent):
        raise ConfigError(
            f"--concurrent is {options.concurrent!r}; allowed: different numbers from 1 to 256, comma between"
        )
    return device, concurrent


def prefix_room(options: argparse.Namespace, model: PreTrainedModel) -> int:
    """Tokens of the constant prompt, at most.

    Raises:
        ConfigError: the context does not hold it with a query and its answer.
    """
    room = int(model.config.max_position_embeddings) - OWN[-1] - max(options.new_tokens, _CHECKED_TOKENS) - 1
    if (options.prefix or 64) > room:
        raise ConfigError(f"--prefix is {options.prefix}; allowed with --new-tokens {options.new_tokens}: 64 to {room}")
    return min(1000, room) if options.prefix is None else int(options.prefix)


def agreement(engines: Engines, queries: list[str]) -> Row:
    """What every engine decodes, and raindecode's counters; warms the engines up."""
    found = {name: engines.check(name, queries, _CHECKED_TOKENS) for name in ENGINES}
    tokens = {name: one.pop("tokens") for name, one in found.items()}
    for name, one in found.items():
        one["same_tokens"] = tokens[name] == tokens["transformers"]
    counters = engines.counters(queries)
    return {"checked": found, "counters": counters, "same": counters["ok"] and all(one["ok"] for one in found.values())}


def first_tokens(engines: Engines, queries: list[str], rounds: int) -> Samples:
    """Seconds to the first token by engine, and to the prompt's K/V alone, a round after the other."""
    samples: Samples = {name: [] for name in (*ENGINES, *PREFIX)}
    for turn, name in in_turns(list(samples), rounds, "first token, round"):
        engines.prepare(name)
        if name in PREFIX:
            samples[name].append(seconds(engines.run, name))
        else:
            samples[name].append(seconds(engines.answer, name, [queries[turn]], 1))
    return samples


def throughput(
    engines: Engines, queries: list[str], concurrent: list[int], options: argparse.Namespace
) -> dict[str, Row]:
    """New tokens per second, by number of requests and engine, and ratios of the times round by round."""
    found: dict[str, Row] = {}
    for count in concurrent:
        samples: Samples = {name: [] for name in _THROUGHPUT}
        for _, name in in_turns(_THROUGHPUT, options.batch_rounds, f"{count} together, round"):
            engines.prepare(name)
            samples[name].append(seconds(engines.answer, name, queries[:count], options.new_tokens))
        tokens = count * options.new_tokens
        found[str(count)] = {
            "tokens_per_s": {name: tokens / quartiles(taken)[1] for name, taken in samples.items()},
            "ratios": ratios(samples),
        }
    return found


def seconds(run: Callable[..., object], *given: Any) -> float:
    """Of one call; a GPU has finished."""
    begin = time.perf_counter()
    run(*given)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def summary(samples: Samples) -> Row:
    """Medians over the rounds, and ratios round by round."""
    spread = {name: quartiles([1e3 * each for each in taken]) for name, taken in samples.items()}
    return {
        "ttft_ms": {name: spread[name][1] for name in ENGINES},
        "prefix_ms": {name: spread[name][1] for name in PREFIX},
        "quartiles_ms": {name: [low, high] for name, (low, _, high) in spread.items()},
        "ratios": ratios(samples),
    }


def ratios(samples: Samples) -> Row:
    """How many times as long one takes as another, round by round."""
    return {
        f"{over} / {under}": paired_ratio(samples[over], samples[under])
        for over, under in _RATIOS
        if over in samples and under in samples
    }


def goals(record: Row) -> list[Row]:
    """What the prefix store is meant to reach, and whether it did; null where it is not the shape that the goals are for."""
    if "ratios" not in record:
        return []
    wanted = {"shape": "110m", "device_type": "cpu", "dtype": "float32", "quick": False}
    judged = all(record[name] == value for name, value in wanted.items()) and record["prefix_tokens"] >= LEAST_PREFIX
    values = [
        ("first token: prompt computed over prompt cached", LEAST_REUSE, record["ratios"]["again / hot"]["median"]),
        (
            "prompt's K/V: computing over loading",
            LEAST_LOAD,
            record["ratios"]["compute_prefix / load_prefix"]["median"],
        ),
    ]
    return [
        {"name": name, "bound": bound, "value": value, "met": value >= bound if judged else None}
        for name, bound, value in values
    ]


def report(record: Row, options: argparse.Namespace) -> int:
    """Table, file, JSON line; the exit code."""
    console = Console(width=140)
    where = f"{record['dtype']}, {record['device']}, {record['threads']} threads"
    title = f"{record['shape']}, prompt of {record['prefix_tokens']} tokens, {where}"
    table = Table(title=f"time to first token, then tokens per second\n{title}")
    for heading in (
        "engine",
        "ms",
        "quartiles",
        "over hot",
        *(f"{n} together" for n in record["concurrent"]),
        "checked",
    ):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for name in (*ENGINES, *PREFIX):
        cells = ["-"] * (3 + len(record["concurrent"]))
        if "ratios" in record:
            low, high = record["quartiles_ms"][name]
            cells[:2] = [f"{(record['ttft_ms'] | record['prefix_ms'])[name]:.2f}", f"{low:.2f} - {high:.2f}"]
            if f"{name} / hot" in record["ratios"]:
                cells[2] = f"{record['ratios'][f'{name} / hot']['median']:.2f}x"
            if name in _THROUGHPUT:
                cells[3:] = [f"{one['tokens_per_s'][name]:,.0f}" for one in record["throughput"].values()]
        ok = record["checked"].get(name, {"ok": None})["ok"]
        table.add_row(name, *cells, {True: "ok", False: "WRONG", None: "-"}[ok])
    console.print(table)
    counters = record["counters"]
    console.print(
        f"rows run for the first token, hot: {counters['charged']['hot']}, the queries' own tokens: {counters['own']} "
        f"({'ok' if counters['ok'] else 'WRONG'})"
    )
    for goal in record["goals"]:
        console.print(f"{_VERDICT[goal['met']]}: {goal['name']}: {goal['value']:.1f}x, at least {goal['bound']:.0f}x")
    write_json(record, options.json)
    return int(not record["same"])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RainDecodeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
