"""Where the time of a step goes, on the CPU in float32.

    python benchmarks/profile_step.py [--model testbed,25m,110m] [--rows 1,11,32,64] [--regime safe|mixed|harmful|all]
                                      [--requests 1] [--steps 20] [--width auto] [--threads N] [--json FILE]

Two kinds of steps of the engine that users run:

rows    plain sampling of so many prompts together, the steps that run exactly one row for each; medians
rain    RAIN, driven by recorded searches (benchmarks/workloads), all its steps; sums

Parts of a step:

products    matrix products: the linear layers and the language-model head
attention   over the KV tree
kernels     what else the forward does: norms, rotary turns, K/V writes, gates, copies, and calling it
batch       rows become tensors and an attention plan; logits come back
plan        wanted tokens are inserted into the KV tree
sample      draws and probabilities
search      the rest: the search itself, tokenizer, accounts

A forward of the engine is one native call. So behind every forward its products are run once more by themselves (the same function,
on the engine's own weights, with as many rows), then its attention (the same plan, keys and values); the time
this takes is taken off the step. overhead = 1 - products / step; host is what of it lies outside the
forward. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import raindecode  # noqa: E402  before torch: asks MKL for reproducible results

# isort: split
import torch  # noqa: E402
from kernel_bench.machine import commit, cpu_name  # noqa: E402
from profile_parts import PARTS, medians, sums, watched  # noqa: E402
from rain_engines import MODELS, Engines, bytes_needed, check_room, load_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from workload import FOLDER, REGIMES, RecordedRequest, load_workload  # noqa: E402

from raindecode import Decoder, Sampling, testbed  # noqa: E402
from raindecode.commands.common import quiet_libraries  # noqa: E402
from raindecode.errors import ConfigError, RainDecodeError  # noqa: E402

Row = dict[str, Any]
_CPU = torch.device("cpu")


# ---- what is run ------------------------------------------------------------------------------------------------------
def sampled(decoder: Decoder, rows: int, steps: int) -> Row:
    """Steps of plain sampling that run `rows` rows, one for each prompt."""
    prompts = [request.text for request in testbed.sample_requests(rows)]
    decoder.engine.max_tasks = max(rows, decoder.engine.max_tasks)
    options: Row = {"search": Sampling(ignore_eos=True), "seed": list(range(rows)), "progress": False}
    decoder.generate(prompts, max_new_tokens=2, **options)  # what is made once is there
    with watched(decoder) as taken:
        decoder.generate(prompts, max_new_tokens=steps + 1, **options)
    alike = [step for step in taken if step.rows == step.wanted == rows]
    if not alike:
        raise ConfigError(f"no step had {rows} rows; allowed: --rows and --steps that fit the KV pool and the model")
    return medians(alike)


def searched(engines: Engines, requests: Sequence[RecordedRequest], width: Any) -> Row:
    """All steps of RAIN over some requests, one after another."""
    decoder, taken = engines.decoders["ours"], []
    for request in requests:
        with watched(decoder) as steps:
            for _, done in decoder.stream(
                [engines.request(request)], search=engines.driven(width=width), progress=False
            ):
                if isinstance(done, BaseException):
                    raise done
        taken += steps
    return sums(taken)


def profile(model: str, works: dict[str, list[RecordedRequest]], options: argparse.Namespace) -> Row:
    """All cases of one model."""
    every = [request for requests in works.values() for request in requests]
    check_room(model, _CPU, torch.float32, bytes_needed(model, torch.float32, every, ["ours"]))
    loaded = load_model(model, _CPU, torch.float32)
    rain = load_workload(FOLDER / f"{next(iter(REGIMES))}.json").rain()
    engines = Engines(loaded, rain, every, ["ours"])
    engines.warm_up()
    todo: list[tuple[str, Callable[[], Row]]] = [
        (f"{rows} rows", lambda rows=rows: sampled(engines.decoders["ours"], rows, options.steps))  # type: ignore[misc]
        for rows in options.rows
    ]
    todo += [
        (f"rain, {regime}", lambda requests=requests: searched(engines, requests, options.width))  # type: ignore[misc]
        for regime, requests in works.items()
    ]
    cases = {name: run() for name, run in track(todo, model, console=Console(stderr=True))}
    return {"parameters": sum(p.numel() for p in loaded.parameters()), "cases": cases}


# ---- command line -----------------------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    regimes = list(REGIMES) if options.regime == "all" else [options.regime]
    if options.requests < 1 or options.steps < 1:
        parser().error("--requests and --steps take whole numbers from 1")
    quiet_libraries()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    works = {regime: load_workload(FOLDER / f"{regime}.json").requests[: options.requests] for regime in regimes}
    record: Row = {
        "op": "profile_step", "dtype": "float32", "device": cpu_name(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "raindecode": raindecode.__version__, "commit": commit(), "width": options.width,
        "requests": options.requests, "models": {model: profile(model, works, options) for model in options.model},
    }  # fmt: skip
    show(record)
    line = json.dumps(record)
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=_models, default=["testbed", "25m", "110m"], help=f"of {', '.join(MODELS)}")
    made.add_argument(
        "--rows", type=_counts, default=[1, 11, 32, 64], help="of steps of plain sampling; default: 1,11,32,64"
    )
    made.add_argument(
        "--regime", choices=(*REGIMES, "all"), default="all", help="of the recorded searches; default: all"
    )
    made.add_argument("--requests", type=int, default=1, help="recorded searches of each regime; default: 1")
    made.add_argument("--steps", type=int, default=20, help="of each number of rows; default: 20")
    made.add_argument(
        "--width", type=_width, default="auto", help="of the search, a whole number or auto; default: auto"
    )
    made.add_argument("--threads", type=int, help="of torch (default: as torch chooses)")
    made.add_argument("--json", type=Path, help="write the record to this file, too")
    return made


def _models(text: str) -> list[str]:
    for name in text.split(","):
        if name not in MODELS:
            raise argparse.ArgumentTypeError(f"{name!r} is among the models; allowed: {', '.join(MODELS)}")
    return text.split(",")


def _counts(text: str) -> list[int]:
    if not all(part.isascii() and part.isdigit() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is given; allowed: whole numbers from 1, with commas between them")
    return [int(part) for part in text.split(",")]


def _width(text: str) -> Any:
    return text if text == "auto" else _counts(text)[0]


def show(record: Row) -> None:
    """A line per case: the step, and the shares of its parts."""
    where = f"{record['device']}, {record['threads']} threads, torch {record['torch']}"
    table = Table(title=f"one step; shares of its time ({where})", title_justify="left")
    for heading in ("model", "steps", "rows", "ms", *PARTS, "host", "overhead"):
        table.add_column(heading, justify="left" if heading in ("model", "steps") else "right")
    for model, found in record["models"].items():
        for name, case in found["cases"].items():
            shares = [f"{share:.1%}" for share in (*case["shares"].values(), case["host"], case["overhead"])]
            table.add_row(model, name, f"{case['rows']:.0f}", f"{case['step_ms']:.2f}", *shares)
        table.add_section()
    Console(width=150).print(table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RainDecodeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
