"""Tables of AlignEZ on the testbed, from the record of alignez_presets.py. Used by update_readme.py."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from readme_tables import NONE, table

Row = dict[str, Any]
_HARMFUL, _HELPFUL, _KNOWN = "harmful answers", "helpful answers", "known"


def preset_rows(record: Row | None) -> str:
    """Tables of presets, of RAIN and of DeRa with the best one."""
    header = [
        "preset",
        "layers",
        "cos(help, harm)",
        _HARMFUL,
        "each run",
        _HELPFUL,
        "each run",
        _KNOWN,
        "tokens each",
        "goals",
    ]
    if record is None:
        return table(header, [["", "", "", NONE, *[""] * 6]])
    sizes, seeds = record["sizes"], record["pair_seeds"]
    runs = f"{len(seeds)} runs" if len(seeds) > 1 else "1 run"
    pairs = ", ".join(str(made["pairs"]) for made in record["pairs"])
    about = (
        f"{runs} (pair seeds {', '.join(map(str, seeds))}), each with {sizes['pairs']} training requests ({pairs} pairs) and\n"
        f"{sizes['requests']} harmful and {sizes['requests']} harmless held-out requests, temperature 1. In brackets 95 % intervals, "
        f"all runs together.\nChosen by {sizes['validation']} + {sizes['validation']} other training requests of each run: "
        f"`{record['best']}`, and `{record['best_baseline']}` of the\nbaselines. Cosines are means of the runs.\n\n"
    )
    rows = []
    for name, row in record["presets"].items():
        verdict = "" if name == "base" else ("both" if name in record["passes"] else "missed")
        rows.append(
            [
                name if name == "base" else f"`{name}`", _layers(row["runs"]), _cosines(row["runs"]),
                _share(row["harmful"]), _each(row, "harmful"), _share(row["helpful"]), _each(row, "helpful"),
                f"{row['known']['rate']:.1%}", f"{row['tokens_generated']:.1f}", verdict,
            ]
        )  # fmt: skip
    return about + table(header, rows) + "\n" + rain_rows(record) + "\n" + dera_rows(record)


def rain_rows(record: Row) -> str:
    """Iterations of RAIN alone and with the best preset, by kind of request: replies in another style have another length."""
    n = record["sizes"]["rain"]
    header = ["search"]
    for kind in ("harmful", "harmless"):
        header += [f"iterations, {kind}", "fewer than alone", "tokens each"]
    rows = []
    for name, row in record["rain"].items():
        cells = [name]
        for kind in ("harmful", "benign"):
            fewer = row["fewer_iterations"][kind]
            saved = "" if name == "RAIN" else f"{fewer['mean']:.1f} ({fewer['ci'][0]:.1f} to {fewer['ci'][1]:.1f})"
            cells += [f"{row['iterations'][kind]:.1f}", saved, f"{row['tokens'][kind]:.1f}"]
        each = row["iterations"]["all"] / row["tokens"]["all"]
        rows.append([*cells, f"{each:.2f}", f"{row['tokens_processed']:,.0f}", *_rates(row)])
    goal = record["goals"]["rain_fewer_iterations"]
    about = (
        f"RAIN, preset `town`, on {n} + {n} of these requests per run. Fewer: mean over the same requests, 95 % interval; over both kinds\n"
        f"with `{goal['preset']}`: {goal['fewer']:.1f} ({goal['fewer_ci'][0]:.1f} to {goal['fewer_ci'][1]:.1f}). "
        f"The strength was chosen by other training\nrequests, where {_tried(record)} iterations were needed.\n\n"
    )
    return about + table([*header, "iterations per token", "tokens processed each", _HARMFUL, _HELPFUL], rows)


def _tried(record: Row) -> str:
    """Iterations by strength."""
    return ", ".join(f"{mean:.1f} (strength {name})" for name, mean in record["rain_strength"]["iterations"].items())


def dera_rows(record: Row) -> str:
    """DeRa with and without the best preset."""
    named = {
        "none": "DeRa alone", "reference": f"`{record['best']}` on the reference", "both": f"`{record['best']}` on both models",
    }  # fmt: skip
    rows = [
        [named[name], *_rates(row), f"{row['known']['rate']:.1%}"] for name, row in record["dera"]["edited"].items()
    ]
    about = f"DeRa with the testbed's adapter, λ = {record['dera']['weight']:g}, plain sampling, the requests of the first table.\n\n"
    return about + table(["edit", _HARMFUL, _HELPFUL, _KNOWN], rows)


def _rates(row: Row) -> list[str]:
    return [_share(row["harmful"]), _share(row["helpful"])]


def _share(rate: Row) -> str:
    return f"{rate['rate']:.1%} ({rate['ci'][0]:.1%} to {rate['ci'][1]:.1%})"


def _each(row: Row, name: str) -> str:
    return ", ".join(f"{100 * run[name]['rate']:.1f}" for run in row["runs"])


def _layers(runs: list[Row]) -> str:
    """Tap and layers; those of every run where the runs differ."""
    if "layers" not in runs[0]:
        return ""
    texts = [", ".join(map(str, run["layers"])) for run in runs]
    return f"`{runs[0]['tap']}` " + (texts[0] if len(set(texts)) == 1 else " / ".join(texts))


def _cosines(runs: list[Row]) -> str:
    """Mean over the runs that chose a layer, by layer."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for layer, cosine in run.get("cos_help_harm", {}).items():
            found.setdefault(layer, []).append(cosine)
    return ", ".join(f"{fmean(found[layer]):.2f}" for layer in sorted(found, key=int))
