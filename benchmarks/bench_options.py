"""What the benchmarks of methods have in common: options with their checks, turns, and the JSON line."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rain_engines import MODELS
from rich.console import Console
from rich.progress import Progress

from raindecode.commands.common import quiet_libraries
from raindecode.errors import ConfigError

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_machine_options(made: argparse.ArgumentParser) -> None:
    """--device, --dtype, --threads and --json."""
    made.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    made.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    made.add_argument("--threads", type=int, help="of torch (default: as torch chooses)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line to this file, too")


def check_machine_options(options: argparse.Namespace) -> torch.device:
    """The device, once shape, dtype, device, threads and file are allowed.

    Raises:
        ConfigError: one is not.
    """
    check_one_of(options, {"shape": MODELS, "dtype": tuple(DTYPES)})
    check_least(options, {"threads": 1})
    kind = options.device.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        seen = "cpu, cuda or cuda:N" if torch.cuda.is_available() else "cpu (torch sees no GPU here)"
        raise ConfigError(f"--device is {options.device!r}; allowed: {seen}")
    check_json(options.json)
    return torch.device(options.device)


def settle(options: argparse.Namespace) -> torch.dtype:
    """Quiet libraries and as many threads as asked for; the number type."""
    quiet_libraries()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return DTYPES[str(options.dtype)]


def stopwatch() -> Callable[[str], None]:
    """Says a line on stderr, with the seconds since this was called."""
    started = time.perf_counter()

    def said(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", file=sys.stderr, flush=True)

    return said


def check_one_of(options: argparse.Namespace, allowed: Mapping[str, Sequence[str]]) -> None:
    """Refuse words that are none of those allowed, by option.

    Raises:
        ConfigError: there is one.
    """
    for name, values in allowed.items():
        if getattr(options, name) not in values:
            raise ConfigError(f"--{name} is {getattr(options, name)!r}; allowed: {', '.join(values)}")


def check_least(options: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Refuse numbers below the least ones, by option; None passes.

    Raises:
        ConfigError: there is one.
    """
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; allowed: a whole number from {smallest}")


def check_json(path: Path | None) -> None:
    """Refuse a file that cannot be written.

    Raises:
        ConfigError: it cannot.
    """
    if path is not None and (
        path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK)
    ):
        raise ConfigError(f"{path} cannot be written: give a file in a folder that exists and is yours")


def in_turns(names: Sequence[str], rounds: int, what: str = "round") -> Iterator[tuple[int, str]]:
    """Round and name of everyone's turn, a bar on stderr. Each round begins with another."""
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=rounds * len(names))
        for turn in range(rounds):
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                progress.update(bar, description=f"{what} {turn + 1}, {name}")
                yield turn, name
                progress.advance(bar)


def write_json(record: Mapping[str, Any], path: Path | None) -> None:
    """Print a record as one line, and write it where a file was named."""
    line = json.dumps(record)
    print(line)
    if path is not None:
        path.write_text(line + "\n", encoding="utf-8")


__all__ = [
    "DTYPES",
    "MODELS",
    "add_machine_options",
    "check_json",
    "check_least",
    "check_machine_options",
    "check_one_of",
    "in_turns",
    "settle",
    "stopwatch",
    "write_json",
]
