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

A forward of the engine is one native call. So behind every forward its products are run once more by themselves (the same sgemm,
on the engine's own weights, with as many rows), then its attention (the same plan, keys and values); the time
this takes is taken off the step. overhead = 1 - products / step. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import raindecode  # noqa: E402  before torch: asks MKL for reproducible results

# isort: split
import torch  # noqa: E402
from kernel_bench.machine import commit, cpu_name  # noqa: E402
from rain_engines import MODELS, Engines, bytes_needed, check_room, load_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402
from workload import FOLDER, REGIMES, RecordedRequest, load_workload  # noqa: E402

from raindecode import Decoder, Sampling, testbed  # noqa: E402
from raindecode.commands.common import quiet_libraries  # noqa: E402
from raindecode.engine.batch import TokenBatch  # noqa: E402
from raindecode.errors import ConfigError, RainDecodeError  # noqa: E402
from rainkernels._blas import sgemm_address  # noqa: E402
from rainkernels.ops.attention import tree_attention  # noqa: E402
from rainkernels.ops.decoder import LinearWeight, decoder_lane  # noqa: E402

Row = dict[str, Any]
PARTS = ("products", "attention", "kernels", "batch", "plan", "sample", "search")
_CPU = torch.device("cpu")


class Alone:
    """The products and the attention of a forward, run by themselves.

    Raises:
        ConfigError: the model does not run as one native call here, so its products are not known.
    """

    def __init__(self, decoder: Decoder) -> None:
        fused = decoder.engine.runner.fused
        if fused is None or decoder_lane() != "cpu":
            raise ConfigError(
                f"{decoder.name} does not run as one native call here; allowed: a model of Llama's form, the compiled extension "
                "and a torch with MKL"
            )
        self.weights = fused.weights
        self._sgemm = ctypes.PYFUNCTYPE(None, *[ctypes.c_void_p] * 13)(sgemm_address())
        self._from, self._to = torch.empty(0), torch.empty(0)  # memory that stays, as the engine's own does

    def products(self, rows: int, wanted: int) -> float:
        """Seconds of all matrix products of a forward of `rows` rows, `wanted` of them with logits."""
        w, held = self.weights, list[Any]()
        linears = [(part, rows) for b in w.blocks for part in (b.qkv, b.out, b.gate_up, b.down)] + [(w.head, wanted)]
        calls = [self._product(linear, count, held) for linear, count in linears]
        began = time.perf_counter()
        for arguments in calls:
            self._sgemm(*arguments)
        return time.perf_counter() - began

    def attention(self, batch: TokenBatch, pools: dict[int, tuple[Tensor, Tensor]]) -> float:
        """Seconds of attention of all layers, over the keys and values the forward has left."""
        w, rows = self.weights, batch.num_rows
        heads, out_size = w.num_qo_heads + 2 * w.num_kv_heads, w.num_qo_heads * w.head_dim
        self._grow(rows * heads * w.head_dim, rows * out_size)
        q = self._from[: rows * heads * w.head_dim].view(rows, heads, w.head_dim)[:, : w.num_qo_heads]
        out = self._to[: rows * out_size].view(rows, w.num_qo_heads, w.head_dim)
        spent = 0.0
        for index, block in enumerate((w.blocks[0], *w.blocks)):  # the first call checks the plan: not counted
            began = time.perf_counter()
            tree_attention(
                q, *pools[max(0, index - 1)], batch.plan, softmax_scale=block.softmax_scale, softcap=block.softcap,
                sliding_window=block.sliding_window, sinks=block.sinks, out=out,
            )  # fmt: skip
            spent += time.perf_counter() - began if index else 0.0
        return spent

    def _product(self, linear: LinearWeight, rows: int, held: list[Any]) -> tuple[int, ...]:
        """Arguments of sgemm as csrc/cpu/decoder.cpp gives them; `held` keeps alive what they point to."""
        out, of = linear.weight.shape
        self._grow(rows * of, rows * out)
        letters = [ctypes.c_char(letter) for letter in (b"T", b"N")]
        sizes = [ctypes.c_int64(size) for size in (out, rows, of)]
        one, beta = ctypes.c_float(1.0), ctypes.c_float(0.0 if linear.bias is None else 1.0)
        held += [*letters, *sizes, one, beta, self._from, self._to]
        n, m, k = (ctypes.addressof(size) for size in sizes)
        scale, keep = ctypes.addressof(one), ctypes.addressof(beta)
        x, y = self._from.data_ptr(), self._to.data_ptr()
        return (
            *(ctypes.addressof(letter) for letter in letters),
            n,
            m,
            k,
            scale,
            linear.weight.data_ptr(),
            k,
            x,
            k,
            keep,
            y,
            n,
        )

    def _grow(self, of: int, to: int) -> None:
        if len(self._from) < of:
            self._from = torch.randn(of)
        if len(self._to) < to:
            self._to = torch.randn(to)  # touched, or the first product would pay for the pages


@dataclass
class Step:
    """Rows of a step, those with logits, and seconds: of all of it and of its parts."""

    rows: int = 0
    wanted: int = 0
    seconds: float = 0.0
    forward: float = 0.0
    products: float = 0.0
    attention: float = 0.0
    plan: float = 0.0
    model: float = 0.0
    sample: float = 0.0
    aside: float = 0.0  # measuring, part of nothing

    def parts(self) -> dict[str, float]:
        """Seconds by PARTS."""
        return {
            "products": self.products, "attention": self.attention,
            "kernels": self.forward - self.products - self.attention, "batch": self.model - self.forward,
            "plan": self.plan, "sample": self.sample, "search": self.seconds - self.plan - self.model - self.sample,
        }  # fmt: skip


@contextmanager
def watched(decoder: Decoder) -> Iterator[list[Step]]:
    """Measure the steps of a decoder; the list grows by each step that runs a forward.

    Raises:
        ConfigError: as Alone.
    """
    engine: Any = decoder.engine
    runner, alone = engine.runner, Alone(decoder)
    steps: list[Step] = []
    now = Step()
    forward, step, book = runner.forward, engine.step, engine._book

    def watched_forward(batch: TokenBatch, wanted: Sequence[int]) -> Tensor:
        began = time.perf_counter()
        logits: Tensor = forward(batch, wanted)
        done = time.perf_counter()
        now.forward += done - began
        with torch.inference_mode():
            now.products += alone.products(batch.num_rows, max(1, len(wanted)))
            now.attention += alone.attention(batch, runner.pool.layers)
        now.rows += batch.num_rows
        now.wanted += len(wanted)
        now.aside += time.perf_counter() - done
        return logits

    def watched_book(plan: Any, seconds: dict[str, float]) -> None:
        now.plan, now.model, now.sample = seconds["plan"], seconds["model"] - now.aside, seconds["sample"]
        book(plan, seconds)

    def watched_step() -> Any:
        nonlocal now
        now = Step()
        began = time.perf_counter()
        ended = step()
        now.seconds = time.perf_counter() - began - now.aside
        if now.rows:
            steps.append(now)
        return ended

    runner.forward, engine.step, engine._book = watched_forward, watched_step, watched_book
    try:
        yield steps
    finally:
        del runner.forward, engine.step, engine._book  # what is left are the methods


def medians(steps: Sequence[Step]) -> Row:
    """Alike steps as one: medians of the step and of its parts."""
    each = [step.parts() for step in steps]
    parts = {name: statistics.median(one[name] for one in each) for name in PARTS}
    overhead = statistics.median(1 - step.products / step.seconds for step in steps)
    return _case(steps, statistics.median(step.seconds for step in steps), parts, overhead)


def sums(steps: Sequence[Step]) -> Row:
    """A run's steps as one: means of the step and of its parts."""
    each = [step.parts() for step in steps]
    parts = {name: statistics.fmean(one[name] for one in each) for name in PARTS}
    seconds = statistics.fmean(step.seconds for step in steps)
    return _case(steps, seconds, parts, 1 - parts["products"] / seconds)


def _case(steps: Sequence[Step], seconds: float, parts: dict[str, float], overhead: float) -> Row:
    return {
        "steps": len(steps), "rows": round(statistics.fmean(step.rows for step in steps), 1),
        "wanted": round(statistics.fmean(step.wanted for step in steps), 1), "step_ms": round(seconds * 1e3, 4),
        "parts_ms": {name: round(part * 1e3, 4) for name, part in parts.items()}, "overhead": round(overhead, 4),
    }  # fmt: skip


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
    for heading in ("model", "steps", "rows", "ms", *PARTS, "overhead"):
        table.add_column(heading, justify="left" if heading in ("model", "steps") else "right")
    for model, found in record["models"].items():
        for name, case in found["cases"].items():
            shares = [f"{part / case['step_ms']:.1%}" for part in case["parts_ms"].values()]
            table.add_row(
                model, name, f"{case['rows']:.0f}", f"{case['step_ms']:.2f}", *shares, f"{case['overhead']:.1%}"
            )
        table.add_section()
    Console(width=150).print(table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RainDecodeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
