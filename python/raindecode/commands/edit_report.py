"""What ``raindecode fit-edit`` says at its end: pairs, layers, directions, time, and the diagnostics table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raindecode.policy.alignez.diagnostics import COLUMNS, Diagnostics
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.alignez.fit import FitSettings
from raindecode.policy.alignez.pairs import PairSet

_WIDTH: Final = 190  # of the table where the output is no terminal
_ALIKE: Final = 0.9  # cosine from which on rejecting one direction and boosting the other nearly cancel


def pair_facts(pairs: PairSet) -> dict[str, Any]:
    """How many there are, and what became of the others."""
    return {"kept": len(pairs), "dropped": dict(pairs.dropped), **pairs.stats}


def edit_facts(edit: AlignEZ, settings: FitSettings) -> dict[str, Any]:
    """What was fitted, as plain data.

    `directions` counts those of each layer, None where each request has its own. `cosines` is cos(θ_help, θ_harm) of each layer
    that rejects one direction and boosts another, None where nothing does.
    """
    layers = sorted({site.layer for site in edit.sites})
    counts = dict.fromkeys(layers, 0)
    ends: dict[int, dict[str, Any]] = {layer: {} for layer in layers}
    for site, stage in edit.stages:
        counts[site.layer] += len(stage.directions)
        ends[site.layer][stage.ops[0]] = stage.directions[0].double()
    cosines = {
        layer: float(found["boost"] @ found["project"])
        for layer, found in ends.items()
        if {"boost", "project"} <= set(found)
    }
    return {
        "settings": {**asdict(settings), "positions": str(settings.positions)},
        "name": edit.name,
        "layers": layers,
        "directions": None if edit.select == "knn" else counts,
        "cosines": cosines or None,
    }


def pair_line(facts: Mapping[str, Any]) -> str:
    """How many pairs there are, as a sentence."""
    dropped = facts["dropped"]
    total = facts["kept"] + sum(dropped.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items(), key=lambda item: -item[1]))
    reused = f"; {facts['reused']} were in the file" if facts.get("reused") else ""
    return f"pairs: {facts['kept']} of {total}" + (f" (dropped: {reasons})" if reasons else "") + reused


def edit_lines(facts: Mapping[str, Any], num_layers: int) -> list[str]:
    """What was fitted, in sentences."""
    settings, counts, cosines = facts["settings"], facts["directions"], facts["cosines"]
    where = ", ".join(map(str, facts["layers"]))
    lines = [
        f"{settings['kind']} at {settings['tap']} of layers {where} (of {num_layers}), rows: {settings['positions']}"
    ]
    if counts is None:
        lines.append(f"directions: of each request its own, from its {settings['neighbours']} nearest questions")
    else:
        lines.append("directions by layer: " + ", ".join(f"{layer}: {count}" for layer, count in counts.items()))
    if cosines is not None:
        lines.append("cos(help, harm): " + ", ".join(f"{layer}: {cosine:.3f}" for layer, cosine in cosines.items()))
        alike = [str(layer) for layer, cosine in cosines.items() if abs(cosine) >= _ALIKE]
        if alike:
            lines.append(
                f"in layers {', '.join(alike)} both directions are nearly the same, so that rejecting one and boosting the other "
                "nearly cancel: read states where they differ (--context elicited --pool prompt), look at --report, or choose --layers"
            )
    return lines


def seconds_line(seconds: Mapping[str, float]) -> str:
    """Where the time went."""
    return "seconds: " + ", ".join(f"{value:.1f} {name.replace('_', ' ')}" for name, value in seconds.items())


def print_lines(*lines: str) -> None:
    """Lines of text on stdout, as they are."""
    console = Console(highlight=False)
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def print_table(found: Diagnostics) -> None:
    """Every layer at every tap."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    table = Table(
        title=f"{found.pairs} pairs, layer by layer",
        caption=f"accuracies on held-out pairs, {found.folds} parts, 50 % is chance; CCS loss of a blind probe: 0.2",
        box=box.SIMPLE_HEAD,
    )
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "tap" else "right")
    for row in found.rows():
        table.add_row(*row)
    console.print(table)
