"""Tables of DeRa in the README, from records of bench_dera.py and `raindecode sweep`. Used by update_readme.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from readme_tables import NONE, table

Row = dict[str, Any]
_SHOWN = {
    "two_models": "two models, raindecode",
    "two_models_transformers": "two cached models, transformers",
    "notebook": "published notebook",
}


def dera_records(folder: Path) -> list[Row]:
    """Records of bench_dera.py, one per shape, small models first."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("dera-*.json")]
    return sorted(records, key=lambda record: int(record["parameters"]))


def dera_steps(records: list[Row]) -> str:
    """The table of what one token costs."""
    header = ["model", "one model", "LoRA pair", *_SHOWN.values()]
    rows = []
    for record in records:
        ms, ratios = record["step_ms"], record["ratios"]
        where = f"{record['shape']}, {record['context']} tokens before, {record['device']}, {record['dtype']}, {record['threads']} threads"
        pair = f"{ms['lora_pair']:.2f} ms ({ratios['lora_pair / single']['median']:.2f}x one model)"
        others = [
            f"{ms[name]:.2f} ms ({ratios[f'{name} / lora_pair']['median']:.2f}x the pair)" if name in ms else NONE
            for name in _SHOWN
        ]
        rows.append([where, f"{ms['single']:.2f} ms", pair, *others])
    note = (
        "**One token of DeRa**, reference and LoRA adapter (rank 16, all linear layers), batch 1, the same models in every engine\n"
        "(`raindecode bench dera`, [docs/benchmarks.md](docs/benchmarks.md#what-one-token-of-dera-costs)). Medians, engines in turns;\n"
        "ratios are medians of the ratios round by round:\n\n"
    )
    return note + table(header, rows or [["testbed", *[NONE] * (len(header) - 1)]])


def dera_sweep(record: Row | None) -> str:
    """The table of rates over the weight, with what it is."""
    counts = {"n_harmful": 400, "n_benign": 400} if record is None else record["points"][0]
    return (
        f"**λ sweep on the testbed**: {counts['n_harmful']} held-out harmful and {counts['n_benign']} harmless requests, 95 % intervals\n"
        "(`raindecode sweep --task town --adapter testbed --num-harmful 400 --num-benign 400 --lambdas 0,0.25,0.5,0.75,1,1.5,2,3`,\n"
        "[docs/methods/dera.md](docs/methods/dera.md)):\n\n"
    ) + sweep_rows(record)


def sweep_rows(record: Row | None) -> str:
    """The table of rates over the weight."""
    header = ["λ", "harmful answers", "helpful answers", "KL per answer, nats"]
    if record is None:
        return table(header, [["", NONE, NONE, NONE]])
    rows = []
    for point in record["points"]:
        shares = [
            f"{point[rate]:.1%} ({point[interval][0]:.1%} to {point[interval][1]:.1%})"
            for rate, interval in (("harmful_rate", "harmful_ci"), ("helpful_rate", "helpful_ci"))
        ]
        rows.append([point["label"], *shares, f"{point['kl']['mean']:.2f}"])
    return table(header, rows)
