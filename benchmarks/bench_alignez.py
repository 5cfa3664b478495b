"""What edits of hidden states (AlignEZ) cost: raindecode beside hooks on plain transformers, many branches in one batch.

Models are `testbed` and random weights in the shapes 25m, 110m, 1b and 7b. Every layer's output of --tap is edited along
--directions random directions, the share along the first taken away and that along the next doubled, and so on.

engines
    none         raindecode, no edit
    edits        raindecode, one edit shared by all requests
    edits_256    raindecode, an edit of its own for every request
    stock        transformers' own cached step, no edit
    hooks        the same with one edit for all rows, by forward hooks (benchmarks/naive/alignez.py)
    hooks_256    the same with an edit of its own for every row

All decode greedily: --rows requests whose prompts share all but the last of --context random tokens, each edited from that last
token on, one token for every request per step. First some rows of every engine are checked against a forward of transformers in
one piece with hooks, and that rows with an edit of their own get what the same request gets alone; else the exit code is 1.
Then every engine has a decode under way, and single steps of all alternate, each as often behind every other: a cycle is one step of each.
Two decodes differ by where their caches lie, too; so what an edit adds is taken from one decode that has it on and off in turns,
the median of the differences. The parts it is made of are also timed alone. Then fits of every preset, and what of their
time is forwards. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import raindecode  # noqa: E402  before torch: asks MKL for reproducible results

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402
from alignez_engines import BASES, OURS, THEIRS, Engines, bytes_needed  # noqa: E402
from alignez_parts import draw_pairs, fits, parts_ms, toggled_ms  # noqa: E402
from bench_options import (  # noqa: E402
    MODELS,
    add_machine_options,
    check_least,
    check_machine_options,
    check_one_of,
    settle,
    write_json,
)
from dera_engines import load_shape, sharing  # noqa: E402
from kernel_bench.machine import facts  # noqa: E402
from kernel_bench.measure import paired_ratio, quartiles, rounded  # noqa: E402
from rain_engines import check_room  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

from raindecode import Decoder  # noqa: E402
from raindecode.errors import ConfigError, RainDecodeError  # noqa: E402
from raindecode.hidden_edits import TAPS  # noqa: E402
from raindecode.policy.alignez.presets import PRESETS  # noqa: E402

Row = dict[str, Any]
Samples = dict[str, list[list[float]]]
ENGINES = (*OURS, *THEIRS)
MOST_ADDED, MOST_OF_HOOKS, MOST_OF_ONE, MOST_OF_FORWARDS = 0.02, 1 / 3, 1.2, 1.2
_JUDGED = {
    "shape": "110m",
    "rows": 256,
    "directions": 2,
    "tap": "mlp_out",
    "dtype": "float32",
    "device_type": "cpu",
    "threads": 2,
}
_RATIOS = (
    ("edits", "none"), ("edits_256", "none"), ("edits_256", "edits"), ("hooks", "stock"), ("hooks_256", "stock"),
    ("stock", "none"), ("hooks", "edits"), ("hooks_256", "edits_256"),
)  # fmt: skip
_QUICK = {"rows": 8, "context": 16, "rounds": 1, "steps": 4, "pairs": 8, "fit_rounds": 1, "repeats": 5}
_VERDICT = {True: "met", False: "NOT MET", None: "not judged"}
EXAMPLES = """examples
  {prog}                                        the testbed
  {prog} --shape 110m --rounds 5                random weights of a real shape, more to compare
  {prog} --shape 1b --rounds 1 --no-fit         less to wait for
  {prog} --quick                                only to see that it works
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """The options; the command line of raindecode passes them on as they are."""
    made = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog=EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--shape", default="testbed", help=f"{', '.join(MODELS)} (default: testbed)")
    made.add_argument("--rows", type=int, default=256, help="requests decoded together (default: 256)")
    made.add_argument("--context", type=int, default=64, help="tokens of each prompt (default: 64)")
    made.add_argument("--directions", type=int, default=2, help="of every layer (default: 2)")
    made.add_argument("--tap", default="mlp_out", help=f"{', '.join(TAPS)} (default: mlp_out)")
    made.add_argument("--rounds", type=int, default=3, help="decodes of every engine (default: 3)")
    made.add_argument(
        "--steps", type=int, default=18, help="timed in a round; multiples of 6 balance the order (default: 18)"
    )
    made.add_argument("--repeats", type=int, default=101, help="of the parts alone (default: 101)")
    made.add_argument("--pairs", type=int, default=128, help="that are fitted on (default: 128)")
    made.add_argument("--fit-rounds", type=int, default=3, help="of every preset's fit (default: 3)")
    made.add_argument(
        "--presets",
        default=",".join(PRESETS),
        help=f"that are fitted, with commas between (default: {','.join(PRESETS)})",
    )
    made.add_argument("--no-fit", action="store_true", help="leave the fits out")
    made.add_argument("--quick", action="store_true", help="so small that it is over at once; the numbers mean nothing")
    add_machine_options(made)
    return made


def main(argv: list[str] | None = None, *, prog: str = "python benchmarks/bench_alignez.py") -> int:
    """Run the benchmark.

    Args:
        argv: the options; None takes those of the process.
        prog: what the help calls the program.

    Returns:
        0, or 1 where an engine does not do what the edits say.

    Raises:
        ConfigError: an option is not allowed, or the model does not fit.
    """
    options = parser(prog).parse_args(argv)
    if options.quick:
        vars(options).update(_QUICK)
    device = checked(options)
    dtype = settle(options)
    needed = bytes_needed(options.shape, dtype, options.rows, options.context, options.steps)
    check_room(options.shape, device, dtype, needed)
    model, tokenizer = load_shape(options.shape, device, dtype)
    prompts = draw_prompts(options, len(tokenizer), model.config.max_position_embeddings)
    load = [os.getloadavg()[0]]
    engines = Engines(model, tokenizer, prompts, directions=options.directions, tap=options.tap, steps=options.steps)
    checks = {name: engines.check(name, rows_checked(options.rows), min(options.steps, 4)) for name in ENGINES}
    same = all(one["ok"] for one in checks.values())
    record: Row = {
        "op": "alignez", "schema": 1, "shape": options.shape, "parameters": sum(p.numel() for p in model.parameters()),
        **{name: getattr(options, name) for name in ("rows", "context", "directions", "tap", "dtype", "rounds", "steps", "quick")},
        "ops": engines.ops, "raindecode": raindecode.__version__, **facts(device), "checked": checks, "same": same,
    }  # fmt: skip
    if same:
        record |= summary(*measure(engines, options))
        record["toggled"] = toggled(engines, options)
        record["added_ms_by_parts"] = parts_ms(engines, options.repeats)
        if not options.no_fit:
            del engines  # their caches make room
            record |= fitted(Decoder(sharing(model), tokenizer), tokenizer, options)
    record["load"] = [*load, os.getloadavg()[0]]
    record["goals"] = goals(record)
    return report(rounded(record, 5), options)


def checked(options: argparse.Namespace) -> torch.device:
    """The device, once every option is allowed; nothing is loaded before.

    Raises:
        ConfigError: an option is not allowed.
    """
    device = check_machine_options(options)
    check_one_of(options, {"tap": TAPS})
    least = {
        "rows": 2,
        "context": 2,
        "directions": 1,
        "rounds": 1,
        "steps": 2,
        "repeats": 2,
        "pairs": 4,
        "fit_rounds": 1,
    }
    check_least(options, least)
    for name in options.presets.split(","):
        if name not in PRESETS:
            raise ConfigError(f"--presets names {name!r}; allowed: {', '.join(PRESETS)}")
    if options.directions > 16:
        raise ConfigError(f"--directions is {options.directions}; allowed: 1 to 16")
    return device


def draw_prompts(options: argparse.Namespace, vocabulary: int, positions: int) -> list[list[int]]:
    """One prompt per row, alike but for the last token.

    Raises:
        ConfigError: there are too few tokens or positions for that.
    """
    for name, most in (("rows", vocabulary - 3), ("context", positions - options.steps - 1)):
        if getattr(options, name) > most:
            raise ConfigError(f"--{name} is {getattr(options, name)}; allowed with this model: up to {most}")
    rng = np.random.default_rng(0)
    common = rng.integers(3, vocabulary, options.context - 1).tolist()
    last = rng.permutation(np.arange(3, vocabulary))[: options.rows].tolist()
    return [[*common, token] for token in last]


def rows_checked(rows: int) -> list[int]:
    """The first row, the last and one between."""
    return sorted({0, rows // 2, rows - 1})


def measure(engines: Engines, options: argparse.Namespace) -> tuple[Samples, Samples]:
    """Seconds of steps by engine and round, and of the processors; step i of every engine belongs to the same cycle."""
    wall: Samples = {name: [] for name in ENGINES}
    cpu: Samples = {name: [] for name in ENGINES}
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=options.rounds * options.steps)
        for turn in range(options.rounds):
            progress.update(bar, description=f"round {turn + 1}")
            decodes = {name: engines.begin(name, options.steps) for name in ENGINES}
            for taken in (*wall.values(), *cpu.values()):
                taken.append([])
            for cycle in range(options.steps):
                for name in order(turn * options.steps + cycle):
                    seconds, worked = timed(decodes[name].step)
                    wall[name][-1].append(seconds)
                    cpu[name][-1].append(worked)
                progress.advance(bar)
            for decode in decodes.values():
                decode.end()
    return wall, cpu


def toggled(engines: Engines, options: argparse.Namespace) -> Row:
    """What edits add to the steps of a decode that takes them on and off: medians of the differences, 95 % intervals, shares."""
    pairs = options.steps // 2  # of one decode: the caches are made for so many steps
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(BASES) * options.rounds * pairs)

        def tick(what: str) -> None:
            progress.update(bar, description=what)
            progress.advance(bar)

        found = toggled_ms(engines, options.rounds, pairs, tick)
    added = {name: [on - off for on, off in taken] for name, taken in found.items()}
    bare = {name: quartiles([off for _, off in taken])[1] for name, taken in found.items()}
    return {
        "pairs": options.rounds * pairs,
        "added_ms": {name: quartiles(each)[1] for name, each in added.items()},
        "added_interval_ms": {name: median_interval(each) for name, each in added.items()},
        "added_share": {name: quartiles(each)[1] / bare[name] for name, each in added.items()},
    }


def order(cycle: int) -> list[str]:
    """The engines of a cycle. Over as many cycles as engines each runs once at every place and once behind every other.

    What ran before leaves caches and memory in another state: where `none` always came behind the hooks of transformers and
    `edits_256` behind `edits`, edits seemed to save time. (A Williams square, for an even number of engines.)
    """
    n = len(ENGINES)
    zigzag = [(i + 1) // 2 if i % 2 else -i // 2 for i in range(n)]  # 0, 1, -1, 2, -2, ...
    return [ENGINES[(cycle + at) % n] for at in zigzag]


def timed(step: Callable[[], None]) -> tuple[float, float]:
    """Seconds of one step, and of all threads in it; all its tokens are on the host at the end."""
    begin, worked = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - begin, time.process_time() - worked


def summary(wall: Samples, cpu: Samples) -> Row:
    """Medians over all cycles; differences and ratios within cycles."""
    flat, busy = (
        {name: [seconds * 1e3 for one in rounds for seconds in one] for name, rounds in samples.items()}
        for samples in (wall, cpu)
    )
    spread = {name: quartiles(taken) for name, taken in flat.items()}
    step_ms = {name: middle for name, (_, middle, _) in spread.items()}
    differences, worked = (
        {name: [edited - bare for edited, bare in zip(of[name], of[base], strict=True)] for name, base in BASES.items()}
        for of in (flat, busy)
    )
    added = {name: quartiles(each)[1] for name, each in differences.items()}
    return {
        "step_ms": step_ms,
        "quartiles_ms": {name: [low, high] for name, (low, _, high) in spread.items()},
        "added_ms": added,
        "added_interval_ms": {name: median_interval(each) for name, each in differences.items()},
        "added_share": {name: added[name] / step_ms[base] for name, base in BASES.items()},
        "cpu_ms": {name: quartiles(taken)[1] for name, taken in busy.items()},
        "added_cpu_ms": {name: quartiles(each)[1] for name, each in worked.items()},
        "ratios": {f"{over} / {under}": paired_ratio(flat[over], flat[under]) for over, under in _RATIOS},
    }


def median_interval(values: Sequence[float]) -> list[float]:
    """Two of the values between which the median of what they are drawn from lies, at 95 %."""
    ordered, n = sorted(values), len(values)
    below = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return [ordered[below], ordered[n - 1 - below]]


def fitted(decoder: Decoder, tokenizer: Any, options: argparse.Namespace) -> Row:
    """Fits beside their forwards."""
    presets = options.presets.split(",")
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("fits", total=options.fit_rounds * len(presets))

        def tick(what: str) -> None:
            progress.update(bar, description=f"fits: {what}")
            progress.advance(bar)

        pairs = draw_pairs(tokenizer, options.pairs)
        return {"pairs": options.pairs, "fit_rounds": options.fit_rounds} | fits(
            decoder, pairs, presets, options.fit_rounds, tick
        )


def goals(record: Row) -> list[Row]:
    """What edits are meant to cost at most, and whether they did; null where it is not the shape that the goals are for.

    `value` is of one decode that takes its edits on and off, `by_parts` of the parts of a step alone.
    """
    if "step_ms" not in record:
        return []
    judged = all(record[name] == wanted for name, wanted in _JUDGED.items()) and not record["quick"]
    added, parts, step = record["toggled"]["added_ms"], record["added_ms_by_parts"]["added_ms"], record["step_ms"]
    of_hooks = added["edits"] / added["hooks"] if added["hooks"] > 0 else None  # no share of what was lost in noise
    values: list[tuple[str, float, float | None, float | None]] = [
        ("edits: share of a step that one edit adds", MOST_ADDED, added["edits"] / step["none"], parts["edits"] / step["none"]),
        ("edits: added time over that of hooks", MOST_OF_HOOKS, of_hooks, parts["edits"] / parts["hooks"]),
        (
            "edits_256: step over the step of one edit", MOST_OF_ONE,
            (step["none"] + added["edits_256"]) / (step["none"] + added["edits"]),
            (step["none"] + parts["edits_256"]) / (step["none"] + parts["edits"]),
        ),
    ]  # fmt: skip
    for name, ratio in record.get("fit_ratio", {}).items():
        values.append((f"fit, {name}: time over that of its forwards", MOST_OF_FORWARDS, ratio["median"], None))

    def met(value: float | None, bound: float) -> bool | None:
        return value <= bound if judged and value is not None else None

    return [
        {
            "name": name, "bound": bound, "value": value, "met": met(value, bound),
            "by_parts": part, "met_by_parts": met(part, bound),
        }
        for name, bound, value, part in values
    ]  # fmt: skip


def report(record: Row, options: argparse.Namespace) -> int:
    """Table, file, JSON line; the exit code."""
    console = Console(width=140)
    title = f"{record['shape']}, {record['rows']} rows, k = {record['directions']} at {record['tap']} of all layers, {record['dtype']}"
    table = Table(title=f"one decoding step\n{title}, {record['device']}, {record['threads']} threads")
    for heading in ("engine", "ms", "quartiles", "added ms", "on and off", "95 %", "parts", "logprob error", "checked"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for name, found in record["checked"].items():
        cells = ["-"] * 6
        if "step_ms" in record:
            low, high = record["quartiles_ms"][name]
            cells[:2] = [f"{record['step_ms'][name]:.2f}", f"{low:.2f} - {high:.2f}"]
            if name in BASES:
                once = record["toggled"]
                low, high = once["added_interval_ms"][name]
                added = f"{once['added_ms'][name]:.2f} ({once['added_share'][name]:.1%})"
                parts = record["added_ms_by_parts"]["added_ms"][name]
                cells[2:] = [f"{record['added_ms'][name]:.2f}", added, f"{low:.2f} - {high:.2f}", f"{parts:.2f}"]
        error = found["logprob_error"] if found["logprob_error"] is not None else found["margin"]
        table.add_row(name, *cells, f"{error:.1e}", "ok" if found["ok"] else "WRONG")
    console.print(table)
    for name, ratio in record.get("fit_ratio", {}).items():
        times = f"{record['fit_s'][name]:.2f} s, forwards alone {record['forwards_s'][name]:.2f} s"
        console.print(f"fit, {name}: {times}, {ratio['median']:.2f}x ({ratio['q1']:.2f} to {ratio['q3']:.2f})")
    for goal in record["goals"]:
        value, parts = ("no number" if each is None else f"{each:.3f}" for each in (goal["value"], goal["by_parts"]))
        beside = "" if goal["by_parts"] is None else f" (by parts {parts})"
        console.print(f"{_VERDICT[goal['met']]}: {goal['name']}: {value}{beside}, at most {goal['bound']:.3f}")
    write_json(record, options.json)
    return int(not record["same"])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RainDecodeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
