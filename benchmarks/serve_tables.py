"""Tables of the server, from records of serve_cost.py and soak_server.py. Used by update_readme.py."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from readme_tables import NONE, table

Row = dict[str, Any]
_EXPECTED = ("testbed", "110m")


def serve_records(folder: Path) -> list[Row]:
    """Records of serve_cost.py whose answers were equal, small models first."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("serve-cost-*.json"))]
    order = ("testbed", "25m", "110m", "1b", "7b")
    return sorted(
        (r for r in records if r["equal"]), key=lambda r: (order.index(r["shape"]), r["stream"], r["rain_share"])
    )


def costs(records: list[Row]) -> str:
    """The table of throughput through HTTP beside that of Decoder.generate."""
    header = ["model", "requests at once", "Decoder.generate, tokens/s", "server, tokens/s", "server / generate"]
    rows = []
    for record in records:
        rates = [
            f"{record['tokens'] / statistics.median(record['seconds'][way]):,.0f}" for way in ("generate", "server")
        ]
        low, middle, high = statistics.quantiles(record["ratios"], n=4, method="inclusive")
        kinds = [f"{record['requests']} of {record['max_new_tokens']} tokens"]
        kinds += ["streams"] if record["stream"] else []
        kinds += [f"{record['rain_share']:.0%} RAIN"] if record["rain_share"] else []
        where = f"{record['shape']}, {record['machine']['device']}, {record['machine']['threads']} threads"
        rows.append([where, ", ".join(kinds), *rates, f"{middle:.2f} ({low:.2f} to {high:.2f})"])
    there = {record["shape"] for record in records}
    rows += [[shape, *[NONE] * 4] for shape in _EXPECTED if shape not in there]
    note = (
        "**Through HTTP**: the same requests straight through `Decoder.generate` and through `raindecode serve`, in turns on one decoder;\n"
        "the clients run on the same cores, and every answer was equal (`python benchmarks/serve_cost.py`). Medians;\n"
        "in brackets quartiles of the ratio round by round:\n\n"
    )
    return note + table(header, rows)


def soak(record: Row | None) -> str:
    """One paragraph on a soak."""
    if record is None:
        return "**Soak of the server**: not yet measured (`python benchmarks/soak_server.py`).\n"
    kinds = record["kinds"]
    answered = sum(count for kind, count in kinds.items() if kind.split()[0] in ("plain", "rain"))
    memory = ", ".join(f"{one:.0f}" for one in record["memory_mib"])
    delay = record["scheduling_delay_seconds"]
    lines = (
        f"**Soak of the server**: {record['requests']:,} requests of {record['clients']} clients in {record['seconds']:.0f} s",
        f"({record['machine']['device']}, {record['machine']['threads']} threads, clients beside it; `python benchmarks/soak_server.py`).",
        f"{answered:,} plain and RAIN answers, {len(record['wrong'])} other than `Decoder.generate`'s; {kinds.get('left', 0)} clients",
        f"left in the middle, {kinds.get('malformed', 0)} requests were malformed; {record['lost_slots']} slots lost and",
        f"{record['open_requests']} requests left over. Memory after each eighth: {memory} MiB. Scheduling delay p50 {delay['p50']:.2f} s,",
        f"p99 {delay['p99']:.2f} s.",
    )
    return "\n".join(lines) + "\n"
