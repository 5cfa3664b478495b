"""``raindecode doctor``: prints the report of raindecode.doctor."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from raindecode.commands.common import EXIT_MISSING, load_decoder
from raindecode.doctor import Check, Report, examine

_MARKS = {"ok": ("✓", "green"), "note": ("·", "yellow"), "missing": ("✗", "bold red")}


def doctor(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Also load this model and say how it would run.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as one JSON object.")] = False,
) -> None:
    """Say what is installed, which hardware is seen, what would be used, and why.

    Ends with exit code 1 when something that is needed is missing.
    """
    report = examine(model, load=load_decoder)
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        _print(report)
    if report.model_error is not None:
        raise report.model_error
    if report.missing:
        raise typer.Exit(EXIT_MISSING)


def _print(report: Report) -> None:
    console = Console(highlight=False)
    for group, checks in report.groups().items():
        console.print(Text(group, style="bold"))
        width = max(len(check.name) for check in checks)
        for check in checks:
            console.print(_line(check, width), soft_wrap=True)
    missing = report.missing
    if missing:
        console.print(Text(f"{len(missing)} missing: {', '.join(check.name for check in missing)}", style="bold red"))
    else:
        console.print(Text("everything that is needed is here", style="bold green"))


def _line(check: Check, width: int) -> Text:
    mark, style = _MARKS[check.status]
    return Text("  ").append(mark, style).append(f" {check.name:<{width}}  ").append(check.text)
