"""Numbers, table and plot of bench_rain.py."""

from __future__ import annotations

import importlib
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from raindecode.errors import ConfigError

Row = dict[str, Any]
_RATIOS = ("published", "strong", "vanilla")
_SHOWN = {"model_steps": "model steps", "tokens_processed": "tokens run", "seconds": "seconds"}
_COLOURS = {"published": "#b2182b", "strong": "#ef8a62", "vanilla": "#999999"}


def summary(rows: Sequence[Row], names: Sequence[str]) -> Row:
    """One regime, per answer: means of the exact counters, medians of seconds, and the others' numbers over ours.

    tokens_processed: rows run through forwards; for raindecode "ours" are the distinct prefixes it needed, "ours_charged" and
    "ours_width1_charged" the rows it ran. "shared_kv_minimum" is the same need, counted in the published baseline's forwards.
    """
    counters: dict[str, Row] = defaultdict(dict)
    for name in names:
        counters["model_steps"][name] = _mean(row[name]["model_steps"] for row in rows)
        tokens = f"{name}_charged" if name.startswith("ours") else name
        counters["tokens_processed"][tokens] = _mean(row[name]["tokens"] for row in rows)
        for key in ("seconds", "model_seconds"):
            counters[key][name] = _median(row[name][key] for row in rows)
        phases = rows[0][name]["phases"]
        counters["phases"][name] = {
            phase: _median(row[name]["phases"].get(phase, 0.0) for row in rows) for phase in phases
        }
    counters["tokens_processed"]["ours"] = _mean(row["ours"]["needed"] for row in rows)
    counters["tokens_processed"]["shared_kv_minimum"] = _mean(row["shared_kv_minimum"] for row in rows)
    if "published" in names:
        embed = _mean(row["published"]["embed_steps"] for row in rows)
        counters["model_steps"]["published_without_embeddings"] = counters["model_steps"]["published"] - embed
    ratios = {name: _over(counters, name) for name in _RATIOS if name in names}
    return {
        "requests": len(rows), "new_tokens": _mean(len(row["ours"]["token_ids"]) for row in rows),
        "iterations": _mean(row["ours"]["iterations"] for row in rows), **counters, "ratios": ratios,
    }  # fmt: skip


def show(record: Row) -> None:
    """The tables: costs, and seconds by phase."""
    names = next(iter(record["regimes"].values()))["seconds"]
    title = f"one answer, {record['model']}; brackets: times raindecode's (width auto)"
    table = Table(title=title, title_justify="left")
    for heading in ("regime", "engine", "model steps", "tokens run", "seconds", "in the model", "seconds by phase"):
        table.add_column(heading, justify="right" if heading.startswith(("model", "tok", "sec", "in")) else "left")
    table.columns[-1].justify = "left"
    for regime, numbers in record["regimes"].items():
        for name in names:
            phases = ", ".join(f"{phase} {spent:.2f}" for phase, spent in numbers["phases"][name].items())
            first = f"{regime}, {numbers['requests']}" if name == "ours" else ""
            table.add_row(first, name, *_cells(numbers, name), phases)
        needed = numbers["tokens_processed"]["shared_kv_minimum"]
        table.add_row("", "shared-KV minimum", "", f"{needed:,.0f}", "", "", "")
        table.add_section()
    Console(width=170).print(table)
    if "together" in record:
        crowd = record["together"]
        rate = f"{crowd['answers_per_second']:.2f} answers a second"
        print(f"{crowd['requests']} together: {crowd['seconds']:.1f} s, {rate}")
    if not record["same"]:
        print("NOT THE SAME: an engine did not go through the search the others went through")


def require_matplotlib() -> Any:
    """matplotlib's pyplot without a display.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ConfigError(
            f"--plot needs matplotlib ({error}): install it with `pip install 'rainkernels[bench]'`, or leave --plot out"
        ) from error


def plot(record: Row, path: Path) -> None:
    """Draw what others take over what raindecode takes, a panel for each cost.

    Raises:
        ConfigError: matplotlib is missing, or does not know the file's kind.
    """
    pyplot = require_matplotlib()
    regimes = record["regimes"]
    names = [name for name in _RATIOS if all(name in numbers["ratios"] for numbers in regimes.values())]
    figure, axes = pyplot.subplots(1, len(_SHOWN), figsize=(11, 3.8), layout="constrained")
    width = 0.8 / max(len(names), 1)
    for axis, (key, label) in zip(axes, _SHOWN.items(), strict=True):
        for at, name in enumerate(names):
            heights = [numbers["ratios"][name][key] for numbers in regimes.values()]
            places = [i + (at - (len(names) - 1) / 2) * width for i in range(len(regimes))]
            bars = axis.bar(places, heights, width, label=name, color=_COLOURS[name])
            axis.bar_label(bars, fmt="%.2g", fontsize=7)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_xticks(range(len(regimes)), list(regimes))
        axis.set_title(f"{label}, times raindecode's")
    axes[0].legend(fontsize=8)
    where = f"{record['device']}, {record['dtype']}, {record['threads']} threads"
    figure.suptitle(f"one RAIN answer, {record['model']} ({where})")
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ConfigError(f"--plot is {str(path)!r}; allowed: a file that ends in .png ({error})") from error
    finally:
        pyplot.close(figure)


def _cells(numbers: Row, name: str) -> list[str]:
    cells = []
    for key in ("model_steps", "tokens_processed", "seconds", "model_seconds"):
        charged = key == "tokens_processed"
        value = numbers[key][f"{name}_charged" if charged and name.startswith("ours") else name]
        base = numbers[key]["ours_charged" if charged else "ours"]
        cell = f"{value:,.3f}" if "seconds" in key else f"{value:,.0f}"
        cells.append(cell + (f" ({value / base:.1f})" if name != "ours" and base else ""))
    return cells


def _over(counters: dict[str, Row], name: str) -> dict[str, float]:
    """What an engine takes over what raindecode takes; tokens over the rows raindecode ran."""
    ours = {key: counters[key]["ours_charged" if key == "tokens_processed" else "ours"] for key in _SHOWN}
    return {key: round(counters[key][name] / ours[key], 3) for key in _SHOWN}


def _mean(values: Any) -> float:
    return round(statistics.fmean(values), 1)


def _median(values: Any) -> float:
    return round(statistics.median(values), 5)
