"""Tables of docs/benchmarks.md, from records of check_widths.py and profile_step.py. Used by update_readme.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from readme_tables import NONE, table

Row = dict[str, Any]
_DTYPES = ("float32", "bfloat16")


def load(path: Path) -> Row | None:
    """A record, None where there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def widths(records: list[Row | None]) -> str:
    """Agreement with width 1 alone; records of float32 and bfloat16 in this order."""
    known = [record for record in records if record is not None]
    header = ["dtype", "run", "all the same", "tokens", "common prefix", "iterations", "trees"]
    keys = ("same", "token_ids", "common_prefix", "iterations", "tree")
    rows = [
        [record["dtype"], name, *(f"{run[key]:.1%}" for key in keys)]
        for record in known
        for name, run in record["runs"].items()
    ]
    missing = [name for name in _DTYPES if not any(record["dtype"] == name for record in known)]
    rows += [[name, "", NONE, *[""] * 4] for name in missing]
    notes = [
        f"{record['dtype']}: {record['requests']} requests, at most {record['max_new_tokens']} tokens each, "
        f"torch {record['torch']}, {record['different']:,} differences.\n"
        for record in known
    ]
    return "".join(notes) + "\n" * bool(notes) + table(header, rows)


def steps(record: Row | None) -> str:
    """Shares of a step's time."""
    if record is None:
        return table(["model", "steps", "rows", "ms", "overhead"], [["testbed, 25m, 110m", "", "", NONE, ""]])
    cases = [(model, *case) for model, found in record["models"].items() for case in found["cases"].items()]
    header = ["model", "steps", "rows", "ms", *cases[0][2]["shares"], "host", "overhead"]
    rows = []
    for model, name, case in cases:
        shares = [f"{share:.1%}" for share in (*case["shares"].values(), case["host"], case["overhead"])]
        rows.append([model, name, f"{case['rows']:.0f}", f"{case['step_ms']:.2f}", *shares])
    where = f"{record['device']}, {record['threads']} threads, torch {record['torch']}, commit {record['commit']}"
    return f"Shares of the time of a step ({where}):\n\n" + table(header, rows)
