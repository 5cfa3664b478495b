"""URIAL on the embedded testbed, alone and with every other method: harmful and helpful answers by the exact judge.

Held-out requests, harmful and harmless ones in equal number, are answered at temperature 1 by plain sampling and by every combination
of AlignEZ, DeRa and RAIN, each without a constant prompt and with URIAL.testbed(), three kind exchanges. All arms answer the same
requests with the same numbers; arms with RAIN answer the first --rain of either kind. The edit is the preset that alignez_presets.py
chose, fitted on pairs the model made itself, without the prompt. Rates follow from the seeds and the weights, not from the machine.
Prints a table, then one JSON line.

    python benchmarks/urial_combinations.py --json benchmarks/results/urial-testbed.json
    python benchmarks/urial_combinations.py --quick
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import raindecode  # noqa: E402  before torch: asks MKL for reproducible results

# isort: split
import torch  # noqa: E402
from bench_options import check_json, check_least, stopwatch, write_json  # noqa: E402
from kernel_bench.measure import rounded  # noqa: E402
from preset_runs import Run, Sizes, counts, fitted, variants  # noqa: E402
from urial_tables import combinations  # noqa: E402

from raindecode.commands.common import quiet_libraries  # noqa: E402
from raindecode.decoder import Decoder  # noqa: E402
from raindecode.errors import ConfigError, RainDecodeError  # noqa: E402
from raindecode.policy.dera import DeRa  # noqa: E402
from raindecode.policy.urial import URIAL  # noqa: E402

Row = dict[str, Any]
PRESET = "svd-knn, end=0"  # of lowest harmful rate in benchmarks/results/alignez-testbed.json
WEIGHT = 0.5  # DeRa's lambda
QUICK = Sizes(pairs=12, requests=6, validation=1, rain=2)


@dataclass(frozen=True)
class Arm:
    """Methods that take part."""

    rain: bool = False
    dera: bool = False
    edit: bool = False


ARMS = {
    "plain sampling": Arm(),
    "AlignEZ": Arm(edit=True),
    "DeRa": Arm(dera=True),
    "DeRa + AlignEZ": Arm(dera=True, edit=True),
    "RAIN": Arm(rain=True),
    "RAIN + AlignEZ": Arm(rain=True, edit=True),
    "RAIN + DeRa": Arm(rain=True, dera=True),
    "RAIN + DeRa + AlignEZ": Arm(rain=True, dera=True, edit=True),
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python benchmarks/urial_combinations.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--seed", type=int, default=0, help="of requests, pairs and answers (default: 0)")
    made.add_argument("--requests", type=int, default=400, help="of either kind (default: 400)")
    made.add_argument("--rain", type=int, default=200, help="of them for arms with RAIN (default: 200)")
    made.add_argument("--pairs", type=int, default=100, help="training requests the edit is fitted on (default: 100)")
    made.add_argument("--quick", action="store_true", help="a few requests, to see that it runs")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line to this file, too")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the report.

    Args:
        argv: the options; None takes those of the process.

    Raises:
        ConfigError: an option is not allowed.
    """
    options = parser().parse_args(argv)
    sizes = checked(options)
    quiet_libraries()
    started, said = time.perf_counter(), stopwatch()
    record: Row = {
        "op": "urial_combinations", "schema": 1, "model": "testbed", "preset": PRESET, "weight": WEIGHT, "seed": options.seed,
        "pairs": sizes.pairs, "temperature": 1.0, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "raindecode": raindecode.__version__, "arms": measure(Run.of(options.seed, sizes), said), "seconds": time.perf_counter() - started,
    }  # fmt: skip
    print(combinations(record))
    write_json(rounded(record, 6), options.json)
    return 0


def checked(options: argparse.Namespace) -> Sizes:
    """How many requests there are, before anything is loaded.

    Raises:
        ConfigError: an option is not allowed.
    """
    check_least(options, {"seed": 0, "requests": 1, "rain": 1, "pairs": 2})
    check_json(options.json)
    if options.rain > options.requests:
        raise ConfigError(f"--rain is {options.rain}; allowed: up to {options.requests}, the number of --requests")
    return QUICK if options.quick else Sizes(options.pairs, options.requests, validation=1, rain=options.rain)


def measure(run: Run, said: Any) -> dict[str, Row]:
    """Rates of every arm, "without" the prompt and "urial"."""
    decoder = Decoder.from_pretrained("testbed", adapter="testbed", device="cpu", dtype="float32")
    pairs, _ = run.make_pairs(decoder)
    edit, _ = fitted(decoder, pairs, variants()[PRESET], run.seed)
    found: dict[str, Row] = {}
    for name, arm in ARMS.items():
        requests = run.rain if arm.rain else run.test
        for prompt, options in {"without": {}, "urial": {"prompt": URIAL.testbed()}}.items():
            answers = run.answer(
                decoder, requests, search="rain" if arm.rain else "vanilla", edit=edit if arm.edit else None,
                dera=DeRa(WEIGHT) if arm.dera else None, **options,
            )  # fmt: skip
            row = counts(requests, answers)
            found.setdefault(name, {})[prompt] = row
            said(f"{name}, {prompt}: " + ", ".join(f"{key} {row[key]['rate']:.1%}" for key in ("harmful", "helpful")))
    return found


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RainDecodeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
