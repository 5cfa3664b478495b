"""The table for people."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kernel_bench.bench import OURS


def print_row(row: dict[str, Any]) -> None:
    """One line on stderr as a case ends."""
    if row["status"] == "ok":
        state = microseconds(row["times"][OURS]["median_us"]) + plain_calls(row)
    else:
        state = f"{row['status']}: {row['failed'].get(OURS, '')}"
    print(f"{row['op']}: {row['case']}: {state}", file=sys.stderr, flush=True)


def print_table(record: dict[str, Any]) -> None:
    """All rows, the machine above them, and below what could not be timed."""
    console = Console(width=160)
    ceilings = record["ceilings"]
    rates = ", ".join(f"{name} products {rate / 1e12:.2f} TFLOP/s" for name, rate in ceilings["flops"].items())
    console.print(
        f"{record['device']}, {record['threads']} threads, torch {record['torch']}, commit {record['commit']}"
    )
    console.print(f"in this run: {ceilings['bytes_per_s'] / 1e9:,.1f} GB/s, {rates}")
    table = Table(title="median of each case; ratios are how many times as long the others took")
    for name in ("op", "case", "lane", "median", "GB/s", "of floor", "others"):
        table.add_column(name, justify="right" if name in ("median", "GB/s", "of floor") else "left")
    for row in record["rows"]:
        if row["status"] != "ok":
            table.add_row(
                row["op"], row["case"], row["lane"], row["status"], "", "", escape(row["failed"].get(OURS, ""))
            )
            continue
        share, rate = row.get("share_of_floor"), row.get("gb_per_s")
        table.add_row(
            row["op"],
            row["case"],
            row["lane"],
            microseconds(row["times"][OURS]["median_us"]) + plain_calls(row),
            f"{rate:,.1f}" if rate else "",
            f"{share:.2f}" if share else "",
            ", ".join(escape(f"{ratio(each)} {label}") for label, each in row["ratio"].items()),
        )
    console.print(table)
    for row in record["rows"]:
        for label, reason in row["failed"].items():
            timed = label in row.get("times", {})
            console.print(
                f"{'' if timed else 'not timed: '}{row['op']}, {row['case']}, {label}: {reason}", markup=False
            )


def plain_calls(row: dict[str, Any]) -> str:
    """What to say behind a time of ours that is not that of a graph, though it should be."""
    return " (plain calls)" if row["times"][OURS].get("timer") == "events" else ""


def ratio(found: dict[str, float]) -> str:
    """A ratio with as many digits as it deserves."""
    middle = found["median"]
    return f"{middle:.0f}x" if middle >= 20 else f"{middle:.1f}x" if middle >= 3 else f"{middle:.2f}x"


def microseconds(value: float) -> str:
    return f"{value / 1e3:,.2f} ms" if value >= 1e4 else f"{value:,.0f} us" if value >= 100 else f"{value:,.1f} us"
