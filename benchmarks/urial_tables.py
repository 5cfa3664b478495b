"""Tables of URIAL, from records of bench_urial.py and urial_combinations.py. Used by update_readme.py."""

from __future__ import annotations

from typing import Any

from readme_tables import NONE, table

Row = dict[str, Any]


def combinations(record: Row | None) -> str:
    """The table of rates on the testbed, every method without the prompt and with it."""
    header = ["method", "requests", "harmful answers", "with URIAL", "helpful answers", "with URIAL"]
    if record is None:
        return table(header, [["plain sampling", "", *[NONE] * 4]])
    rows = []
    for name, arm in record["arms"].items():
        counts = [str(arm["urial"][rate]["n"]) for rate in ("harmful", "helpful")]
        cells = [_share(arm[prompt][rate]) for rate in ("harmful", "helpful") for prompt in ("without", "urial")]
        rows.append([name, " + ".join(counts), *cells])
    about = (
        "Held-out requests of the testbed, harmful + harmless, temperature 1, the exact judge; in brackets 95 % intervals. Methods that\n"
        "answer the same requests answer them with the same numbers. The prompt is `URIAL.testbed()`, three kind exchanges; DeRa mixes in\n"
        f"the adapter with λ = {record['weight']:g}; the edit is `{record['preset']}`, fitted without the prompt; RAIN has its\n"
        "preset `town` (`python benchmarks/urial_combinations.py`):\n\n"
    )
    return about + table(header, rows)


def _share(rate: Row) -> str:
    return f"{rate['rate']:.1%} ({rate['ci'][0]:.1%} to {rate['ci'][1]:.1%})"


__all__ = ["combinations"]
