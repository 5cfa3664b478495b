"""``raindecode bench``: runs the benchmarks of the source checkout, which are no part of the installed package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

import raindecode
from raindecode.errors import ConfigError

PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
"""Settings of commands whose options, --help included, are those of the script they run."""


def rain(
    context: typer.Context,
    benchmarks: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """What one RAIN answer costs, beside baselines on plain transformers.

    Options are those of benchmarks/bench_rain.py: `raindecode bench rain --help`.
    """
    _run("rain", context.args, benchmarks)


def dera(
    context: typer.Context,
    benchmarks: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """What one token of DeRa costs, beside baselines on plain transformers.

    Options are those of benchmarks/bench_dera.py: `raindecode bench dera --help`.
    """
    _run("dera", context.args, benchmarks)


def alignez(
    context: typer.Context,
    benchmarks: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """What edits of hidden states cost, beside hooks on plain transformers.

    Options are those of benchmarks/bench_alignez.py: `raindecode bench alignez --help`.
    """
    _run("alignez", context.args, benchmarks)


def urial(
    context: typer.Context,
    benchmarks: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """What a constant prompt costs a request, beside transformers with and without its own reuse of it.

    Options are those of benchmarks/bench_urial.py: `raindecode bench urial --help`.
    """
    _run("urial", context.args, benchmarks)


def serving(
    context: typer.Context,
    benchmarks: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """How fast a server answers under load: time to first token, per token, end to end, throughput.

    Options are those of benchmarks/bench_serve.py: `raindecode bench serve --help`.
    """
    _run("serve", context.args, benchmarks)


def _run(name: str, given: Sequence[str], benchmarks: str | None) -> None:
    arguments = list(given)
    if {"-h", "--help"} & set(arguments):
        arguments = ["--help"]
    script = benchmark_script(f"bench_{name}.py", benchmarks)
    failed = load_script(script).main(arguments, prog=f"raindecode bench {name}")
    if failed:
        raise typer.Exit(failed)


def benchmark_script(name: str, folder: str | None) -> Path:
    """A script of the benchmarks folder: the one given, or that of the checkout this package runs from.

    Raises:
        ConfigError: it is not there.
    """
    place = Path(folder).expanduser() if folder is not None else Path(raindecode.__file__).parents[2] / "benchmarks"
    if not (place / name).is_file():
        given = (
            f"--benchmarks is {folder!r}"
            if folder is not None
            else "this raindecode was installed without its benchmarks"
        )
        raise ConfigError(
            f"{given}: there is no {place / name}; clone the source and run it there, or give its folder: "
            f"raindecode bench {name.removeprefix('bench_').removesuffix('.py')} --benchmarks CHECKOUT/benchmarks"
        )
    return place / name


def load_script(path: Path) -> ModuleType:
    """A script as a module; its neighbours are found beside it."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
