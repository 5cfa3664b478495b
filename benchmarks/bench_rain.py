"""What one RAIN answer costs: raindecode beside baselines on plain transformers, in three regimes.

Models are `testbed` and random weights in the shapes 25m, 110m, 1b and 7b. All are driven by recorded searches of the testbed
(benchmarks/workloads): every forward, draw, verdict and embedding runs at full cost, what it leads to is what was recorded. So each
engine goes through the same search whatever the weights are, and cost is real where weights are not.

regimes, by the share of good verdicts in a search
    safe      at least 80 %
    mixed     40 to 80 %
    harmful   below 40 %
engines
    ours, ours_width1   raindecode, width "auto" and 1
    published           RAIN with the published code's caching habits, batch 1
    strong              RAIN as a competent user of transformers writes it
    vanilla             cached sampling of as many tokens as the answer has

Each request is answered by every engine, the order rotating. Answers, iterations and verdicts of the searches must be the recorded
ones, else the exit code is 1. Model steps and tokens are exact means per answer; seconds are medians. Prints a table, then one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import raindecode  # noqa: E402  before torch: asks MKL for reproducible results

# isort: split
import torch  # noqa: E402
from rain_engines import ENGINES, MODELS, Engines, bytes_needed, check_room, load_model, recorded_outcome  # noqa: E402
from rain_report import plot, require_matplotlib, show, summary  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from workload import FOLDER, REGIMES, RecordedRequest, load_workload  # noqa: E402

from raindecode.commands.common import quiet_libraries  # noqa: E402
from raindecode.errors import ConfigError, RainDecodeError  # noqa: E402

Row = dict[str, Any]
EXAMPLES = """examples
  {prog}                                                  the testbed, all three regimes
  {prog} --regime harmful --requests 1                    one answer that is hard to find
  {prog} --model 110m --requests 2 --plot rain.png        random weights of a real shape, with a plot
  {prog} --model 1b --without published --together 8      what the slow baseline would take is left out
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """The options; the command line of raindecode passes them on as they are."""
    made = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog=EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--model", default="testbed", help=f"{', '.join(MODELS)} (default: testbed)")
    made.add_argument("--regime", default="all", help=f"{', '.join(REGIMES)} or all (default: all)")
    made.add_argument("--requests", type=int, help="of each regime (default: all that the workloads hold)")
    made.add_argument("--together", type=int, default=0, metavar="N", help="also answer N requests in one call")
    without = f"leave an engine out: {', '.join(ENGINES[1:])}"
    made.add_argument("--without", action="append", default=[], metavar="ENGINE", help=without)
    made.add_argument("--live", action="store_true", help="the model's own numbers count (testbed only)")
    made.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    made.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    made.add_argument("--threads", type=int, help="of torch (default: as torch chooses)")
    made.add_argument("--workloads", type=Path, default=FOLDER, metavar="DIR", help="folder of the recorded searches")
    made.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the comparison (needs matplotlib)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line to this file, too")
    return made


def main(argv: list[str] | None = None, *, prog: str = "python benchmarks/bench_rain.py") -> int:
    """Run the benchmark.

    Args:
        argv: the options; None takes those of the process.
        prog: what the help calls the program.

    Returns:
        0, or 1 where an engine did not go through the recorded search.

    Raises:
        ConfigError: an option is not allowed, a workload cannot be used, the model does not fit.
    """
    options = parser(prog).parse_args(argv)
    device, dtype, names, regimes = checked(options)
    quiet_libraries()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded = [load_workload(options.workloads / f"{regime}.json") for regime in regimes]
    held = min(len(work.requests) for work in loaded)
    if options.requests is not None and options.requests > held:
        raise ConfigError(
            f"--requests is {options.requests}; allowed: 1 to {held}, as many as the workloads hold of each regime"
        )
    chosen = {work.regime: work.requests[: options.requests] for work in loaded}
    every = [request for requests in chosen.values() for request in requests]
    if any((work.preset, work.settings) != (loaded[0].preset, loaded[0].settings) for work in loaded):
        raise ConfigError("the workloads were recorded with different settings: record all of them anew, with the same")
    if options.together > len(every):
        raise ConfigError(
            f"--together is {options.together}; allowed: 0 to {len(every)}, the requests that --regime and --requests choose"
        )
    check_room(options.model, device, dtype, bytes_needed(options.model, dtype, every, names))
    model = load_model(options.model, device, dtype)
    engines = Engines(model, loaded[0].rain(), None if options.live else every, names)
    rows = measure(engines, chosen)
    record: Row = {
        "op": "rain", "model": options.model, "parameters": sum(p.numel() for p in model.parameters()),
        "driven_by": "the model" if options.live else "workloads", "device": str(device), "dtype": options.dtype,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "raindecode": raindecode.__version__,
        "regimes": {regime: summary([r for r in rows if r["regime"] == regime], names) for regime in chosen},
        "same": all(row["same"] for row in rows),
    }  # fmt: skip
    if options.together:
        record["together"] = crowd(engines, every, options)
        record["same"] = record["same"] and record["together"]["same"]
    if engines.script is not None:
        record["unrecorded"] = engines.script.unrecorded
    return report(record, options)


def checked(options: argparse.Namespace) -> tuple[torch.device, torch.dtype, list[str], list[str]]:
    """Device, dtype, engines and regimes of the options, before anything is loaded.

    Raises:
        ConfigError: an option is not allowed.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    allowed = {"model": MODELS, "regime": (*REGIMES, "all"), "dtype": tuple(dtypes)}
    for name, values in allowed.items():
        if getattr(options, name) not in values:
            raise ConfigError(f"--{name} is {getattr(options, name)!r}; allowed: {', '.join(values)}")
    for name in options.without:
        if name not in ENGINES[1:]:
            raise ConfigError(f"--without is {name!r}; allowed: {', '.join(ENGINES[1:])}")
    for name, least in (("requests", 1), ("threads", 1), ("together", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} is {value}; allowed: a whole number from {least}")
    if options.live and options.model != "testbed":
        raise ConfigError(f"--live with --model {options.model}: random weights lead nowhere; use testbed")
    kind = options.device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        seen = "cpu, cuda or cuda:N" if torch.cuda.is_available() else "cpu (torch sees no GPU here)"
        raise ConfigError(f"--device is {options.device!r}; allowed: {seen}")
    for path in (options.plot, options.json):
        if path is not None and not os.access(path.absolute().parent, os.W_OK):
            raise ConfigError(f"{path} cannot be written: give a file in a folder that exists and is yours")
    if options.plot is not None:
        require_matplotlib()
    regimes = list(REGIMES) if options.regime == "all" else [options.regime]
    names = [name for name in ENGINES if name not in options.without]
    return torch.device(options.device), dtypes[options.dtype], names, regimes


def measure(engines: Engines, chosen: dict[str, list[RecordedRequest]]) -> list[Row]:
    """Every engine's answer to every request."""
    engines.warm_up()
    rows: list[Row] = []
    total = sum(map(len, chosen.values())) * len(engines.names)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("answers", total=total)
        for regime, requests in chosen.items():
            for request in requests:
                turn = len(rows) % len(engines.names)
                found: Row = {}
                for name in engines.names[turn:] + engines.names[:turn]:
                    progress.update(bar, description=f"{regime}, {name}")
                    found[name] = engines.answer(name, request)
                    progress.advance(bar)
                ordered = {name: found[name] for name in engines.names}
                rows.append({"regime": regime, "same": same(engines, request, ordered), **ordered})
                rows[-1]["shared_kv_minimum"] = (
                    found["ours"]["needed"] if engines.script is None else request.answer.shared_kv_minimum
                )
    return rows


def same(engines: Engines, request: RecordedRequest, found: Row) -> bool:
    """Whether all searches came to the same, and to what was recorded where a recording drove them."""
    outcomes = [row["outcome"] for name, row in found.items() if name != "vanilla"]
    needed = {row["needed"] for row in found.values() if "needed" in row}
    if engines.script is None:
        return all(outcome == outcomes[0] for outcome in outcomes) and len(needed) == 1
    expected = recorded_outcome(request)
    return all(outcome == expected for outcome in outcomes) and needed == {request.answer.tokens_processed}


def crowd(engines: Engines, every: list[RecordedRequest], options: argparse.Namespace) -> Row:
    """Requests of all regimes in turn in one call of the decoder."""
    step = len(every) / options.together
    requests = [every[int(i * step)] for i in range(options.together)]
    found = engines.together(requests)
    outcomes = found.pop("outcomes")
    agree = options.live or outcomes == [recorded_outcome(request) for request in requests]
    return found | {"same": agree}


def report(record: Row, options: argparse.Namespace) -> int:
    """Table, files, JSON line; the exit code."""
    show(record)
    line = json.dumps(record)
    if options.plot is not None:
        plot(record, options.plot)
    if options.json is not None:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)
    return int(not record["same"])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RainDecodeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
