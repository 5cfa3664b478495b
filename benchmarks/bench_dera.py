"""What one token of decoding-time realignment (DeRa) costs: raindecode beside baselines on plain transformers, batch 1.

Models are `testbed` and random weights in the shapes 25m, 110m, 1b and 7b. The aligned model is the reference plus a random LoRA
adapter on every linear layer of its blocks, once as an adapter and once merged into a second set of weights.

engines
    single                    raindecode, the reference alone: what there is to pay without realignment
    lora_pair                 raindecode, reference and adapter over one set of weights
    two_models                raindecode, two whole models
    single_transformers       a cached step of one model
    two_models_transformers   two cached models, one after the other
    notebook                  the published notebook: `generate` with a processor that runs the reference, which has its own cache
    notebook_recompute        with --recompute: the processor's other setting, the whole prefix again for every token (few steps)

All decode greedily after the same prompt of --context random tokens, and hand every token to the host. First each engine's tokens
are checked against plain transformers, which runs prompt and answer in one piece: each must be the most likely one, within a
tolerance for ties, and have the log-probability that raindecode reports; else the exit code is 1. Then rounds of all engines
alternate in this process, their order rotating. A step is the time from one token to the next; the prompt is no part of it.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import raindecode  # noqa: E402  before torch: asks MKL for reproducible results

# isort: split
import numpy as np  # noqa: E402
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
from dera_engines import (  # noqa: E402
    BASELINES,
    OURS,
    RECOMPUTE,
    Engines,
    bytes_needed,
    load_shape,
    save_random_adapter,
)
from kernel_bench.machine import facts  # noqa: E402
from kernel_bench.measure import paired_ratio, quartiles  # noqa: E402
from rain_engines import check_room  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from raindecode.errors import ConfigError, RainDecodeError  # noqa: E402

Row = dict[str, Any]
ENGINES = (*OURS, *BASELINES)
_RECOMPUTE_STEPS = 3  # timed a round: each runs the whole prefix
_RATIOS = (
    ("lora_pair", "single"), ("two_models", "lora_pair"), ("two_models_transformers", "lora_pair"), ("notebook", "lora_pair"),
    ("notebook_recompute", "lora_pair"), ("two_models", "single"), ("two_models_transformers", "two_models"),
    ("single_transformers", "single"),
)  # fmt: skip
EXAMPLES = """examples
  {prog}                                              the testbed
  {prog} --shape 110m --context 2048                  random weights of a real shape, a longer prompt
  {prog} --shape 1b --rounds 3 --without notebook     less to wait for
  {prog} --shape 7b --device cuda --dtype bfloat16    needs a GPU
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """The options; the command line of raindecode passes them on as they are."""
    made = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog=EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--shape", default="testbed", help=f"{', '.join(MODELS)} (default: testbed)")
    made.add_argument("--context", type=int, default=512, help="tokens of the prompt (default: 512)")
    made.add_argument("--rounds", type=int, default=7, help="of every engine (default: 7)")
    made.add_argument("--steps", type=int, default=16, help="timed in a round (default: 16)")
    made.add_argument("--weight", type=float, default=0.7, help="DeRa's lambda (default: 0.7)")
    made.add_argument("--rank", type=int, default=16, help="of the adapter (default: 16)")
    without = f"leave an engine out: {', '.join(ENGINES)}"
    made.add_argument("--without", action="append", default=[], metavar="ENGINE", help=without)
    made.add_argument("--recompute", action="store_true", help=f"also time {RECOMPUTE}")
    add_machine_options(made)
    return made


def main(argv: list[str] | None = None, *, prog: str = "python benchmarks/bench_dera.py") -> int:
    """Run the benchmark.

    Args:
        argv: the options; None takes those of the process.
        prog: what the help calls the program.

    Returns:
        0, or 1 where an engine's tokens are not the mixture's.

    Raises:
        ConfigError: an option is not allowed, or the model does not fit.
    """
    options = parser(prog).parse_args(argv)
    device, names = checked(options)
    dtype = settle(options)
    check_room(options.shape, device, dtype, bytes_needed(options.shape, dtype))
    model, tokenizer = load_shape(options.shape, device, dtype)
    longest = model.config.max_position_embeddings - options.steps - 1
    if options.context > longest:
        raise ConfigError(f"--context is {options.context}; allowed with --steps {options.steps}: 2 to {longest}")
    prompt = np.random.default_rng(0).integers(3, len(tokenizer), options.context).tolist()
    with tempfile.TemporaryDirectory() as folder:
        save_random_adapter(model, Path(folder), options.rank)
        engines = Engines(
            model, tokenizer, Path(folder), weight=options.weight, names=names, prompt=prompt, longest=options.steps + 1
        )
    checks = check(engines, names, options.steps)
    same = all(one["ok"] for one in checks.values())
    samples = measure(engines, names, options) if same else {}
    record: Row = {
        "op": "dera", "schema": 1, "shape": options.shape, "parameters": sum(p.numel() for p in model.parameters()),
        "context": options.context, "rank": options.rank, "weight": options.weight, "dtype": options.dtype,
        "rounds": options.rounds, "steps": options.steps, "raindecode": raindecode.__version__, **facts(device),
        "checked": checks, "same": same, **summary(samples),
    }  # fmt: skip
    return report(record, options)


def checked(options: argparse.Namespace) -> tuple[torch.device, list[str]]:
    """Device and engines of the options, before anything is loaded.

    Raises:
        ConfigError: an option is not allowed.
    """
    device = check_machine_options(options)
    for name in options.without:
        if name not in ENGINES:
            raise ConfigError(f"--without is {name!r}; allowed: {', '.join(ENGINES)}")
    check_least(options, {"context": 2, "rounds": 1, "steps": 1, "rank": 1})
    if not 0 < options.weight <= 100 or options.weight == 1:
        raise ConfigError(
            f"--weight is {options.weight:g}; allowed: above 0, up to 100, but not 1, which needs one model only"
        )
    if options.shape == "7b" and device.type == "cpu":
        raise ConfigError(
            f"--shape 7b with --device {options.device}: it takes a GPU; use --device cuda, or a smaller shape"
        )
    names = [name for name in ENGINES if name not in options.without]
    if not names:
        raise ConfigError("--without leaves no engine; keep one at least")
    return device, names + [RECOMPUTE] * options.recompute


def check(engines: Engines, names: list[str], steps: int) -> Row:
    """What every engine decodes against plain transformers; warms the engines up."""
    found: Row = {}
    tokens: dict[str, list[int]] = {}
    for name in names:
        count = min(steps, _RECOMPUTE_STEPS) if name == RECOMPUTE else steps
        tokens[name], logprobs = engines.decode(name, count, lambda: None)
        found[name] = engines.check(name, tokens[name], logprobs)
    for name in names:
        if "two_models" in tokens and not name.startswith("single"):
            found[name]["tokens_of_two_models"] = tokens[name] == tokens["two_models"][: len(tokens[name])]
    return found


def measure(engines: Engines, names: list[str], options: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Seconds of every step, by engine and round. Prompts are in the caches, where an engine keeps them."""
    samples: dict[str, list[list[float]]] = {name: [] for name in names}
    for _, name in in_turns(names, options.rounds):
        steps = min(options.steps, _RECOMPUTE_STEPS) if name == RECOMPUTE else options.steps
        samples[name].append(timed(engines, name, steps))
    return samples


def timed(engines: Engines, name: str, steps: int) -> list[float]:
    """Seconds from token to token of one decode; the first token, which the prompt may precede, begins the first step."""
    stamps: list[float] = []
    engines.decode(name, steps + 1, lambda: stamps.append(time.perf_counter()))
    return [after - before for before, after in pairwise(stamps)]


def summary(samples: dict[str, list[list[float]]]) -> Row:
    """Medians over all steps, and ratios of the medians of each round."""
    step_ms, spread_ms = {}, {}
    for name, rounds in samples.items():
        low, middle, high = quartiles([seconds * 1e3 for one in rounds for seconds in one])
        step_ms[name], spread_ms[name] = round(middle, 4), [round(low, 4), round(high, 4)]
    medians = {name: [statistics.median(one) for one in rounds] for name, rounds in samples.items()}
    ratios = {
        f"{over} / {under}": {
            key: round(value, 3) for key, value in paired_ratio(medians[over], medians[under]).items()
        }
        for over, under in _RATIOS
        if over in medians and under in medians
    }
    return {"step_ms": step_ms, "quartiles_ms": spread_ms, "ratios": ratios}


def report(record: Row, options: argparse.Namespace) -> int:
    """Table, file, JSON line; the exit code."""
    console = Console(width=120)
    title = f"{record['shape']}, {record['context']} tokens before, {record['dtype']}, {record['device']}, {record['threads']} threads"
    table = Table(title=f"one decoding step\n{title}")
    for heading in ("engine", "ms", "quartiles", "over lora_pair", "margin", "logprob error", "checked"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for name, found in record["checked"].items():
        cells = ["-", "-", "-"]
        if name in record["step_ms"]:
            low, high = record["quartiles_ms"][name]
            cells = [f"{record['step_ms'][name]:.3f}", f"{low:.3f} - {high:.3f}", "-"]
            if "lora_pair" in record["step_ms"]:
                cells[2] = f"{record['step_ms'][name] / record['step_ms']['lora_pair']:.2f}x"
        error = found["logprob_error"]
        cells += [f"{found['margin']:.1e}", "-" if error is None else f"{error:.1e}", "ok" if found["ok"] else "WRONG"]
        table.add_row(name, *cells)
    console.print(table)
    for pair, ratio in record["ratios"].items():
        console.print(f"{pair}: {ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f} round by round)")
    write_json(record, options.json)
    return int(not record["same"])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RainDecodeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
