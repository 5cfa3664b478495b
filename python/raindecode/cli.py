"""The command line: ``raindecode COMMAND``. Each command is a module of raindecode.commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

import raindecode
from raindecode.commands.bake_edit import EXAMPLES as BAKE_EXAMPLES
from raindecode.commands.bake_edit import bake_edit
from raindecode.commands.bench import PASSED_ON, alignez, dera, rain, serving, urial
from raindecode.commands.common import guarded, quiet_libraries
from raindecode.commands.demo import demo
from raindecode.commands.doctor import doctor
from raindecode.commands.eval import EXAMPLES as EVAL_EXAMPLES
from raindecode.commands.eval import evaluate
from raindecode.commands.fit_edit import EXAMPLES as FIT_EXAMPLES
from raindecode.commands.fit_edit import fit_edit
from raindecode.commands.generate import EXAMPLES as GENERATE_EXAMPLES
from raindecode.commands.generate import generate
from raindecode.commands.serve import EXAMPLES as SERVE_EXAMPLES
from raindecode.commands.serve import serve
from raindecode.commands.shift import EXAMPLES as SHIFT_EXAMPLES
from raindecode.commands.shift import shift
from raindecode.commands.sweep import EXAMPLES as SWEEP_EXAMPLES
from raindecode.commands.sweep import sweep

app = typer.Typer(
    name="raindecode",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 `doctor` found something missing or engines of `bench` disagree, 2 bad input (one sentence on "
    "stderr says what), 130 Ctrl-C.",
)
app.command("generate", epilog=GENERATE_EXAMPLES)(guarded(generate))
app.command("eval", epilog=EVAL_EXAMPLES)(guarded(evaluate))
app.command("sweep", epilog=SWEEP_EXAMPLES)(guarded(sweep))
app.command("shift", epilog=SHIFT_EXAMPLES)(guarded(shift))
app.command("serve", epilog=SERVE_EXAMPLES)(guarded(serve))
app.command("fit-edit", epilog=FIT_EXAMPLES)(guarded(fit_edit))
app.command("bake-edit", epilog=BAKE_EXAMPLES)(guarded(bake_edit))
bench = typer.Typer(
    no_args_is_help=True, help="Benchmarks of the source checkout; `--benchmarks DIR` says where it is."
)
bench.command("rain", context_settings=PASSED_ON, add_help_option=False)(guarded(rain))
bench.command("dera", context_settings=PASSED_ON, add_help_option=False)(guarded(dera))
bench.command("alignez", context_settings=PASSED_ON, add_help_option=False)(guarded(alignez))
bench.command("urial", context_settings=PASSED_ON, add_help_option=False)(guarded(urial))
bench.command("serve", context_settings=PASSED_ON, add_help_option=False)(guarded(serving))
app.add_typer(bench, name="bench")
app.command("doctor")(guarded(doctor))
app.command("demo")(guarded(demo))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"raindecode {raindecode.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Aligns frozen language models while they decode.

    A first try, with the model that comes with the package: `raindecode demo`
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Console entry point. Always ends in SystemExit with the exit code.

    Args:
        arguments: the words behind the program's name; None takes those of the process.
    """
    quiet_libraries()
    app(args=None if arguments is None else list(arguments), prog_name="raindecode")
