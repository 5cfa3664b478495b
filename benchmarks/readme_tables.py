"""Tables of the README, from records of bench_rain.py, bench_kernels.py and gpu_acceptance.py. Used by update_readme.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NONE = "not yet measured"
_OURS, _ALONE = "ours", "add + RMSNorm alone, same lane"
_FAMILIES = ("attention", "logits", "edits", "kv", "tree")
Row = dict[str, Any]
# Engines of bench_dera.py as the README calls them beside ours.
_DERA_OTHERS = {"two_models": "two models", "two_models_transformers": "two cached models, transformers"}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def rain_records(folder: Path) -> list[Row]:
    """Records of bench_rain.py, one per model, small models first."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("rain-*.json")]
    return sorted(records, key=lambda record: int(record["parameters"]))


def full_records(folder: Path, op: str) -> list[Row]:
    """Full records of one benchmark whose engines agreed, one per shape, small models first."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{op}-*.json"))]
    full = [record for record in records if record.get("op") == op and record["same"] and not record["quick"]]
    return sorted(full, key=lambda record: int(record["parameters"]))


def missing(records: list[Row], shapes: Sequence[str], columns: int) -> list[list[str]]:
    """Rows of a table for shapes that are not measured yet."""
    there = {record["shape"] for record in records}
    return [[shape, *[NONE] * (columns - 1)] for shape in shapes if shape not in there]


def rain(records: list[Row]) -> str:
    """The table of what one RAIN answer costs."""
    cells = []
    for record in records:
        where = f"{record['model']}, {record['device']}, {record['dtype']}, {record['threads']} threads"
        for regime, numbers in record["regimes"].items():
            cells.append(
                [where, regime, *(_cost(numbers, key) for key in ("model_steps", "tokens_processed", "seconds"))]
            )
    note = (
        "**One RAIN answer**, in searches recorded on the testbed (`raindecode bench rain`, [docs/benchmarks.md](docs/benchmarks.md)).\n"
        "In brackets, how many times that is run by RAIN as its published code caches, by RAIN as a competent user of transformers\n"
        "writes it, and by plain sampling of as many tokens:\n\n"
    )
    return note + table(
        ["model", "search", "model steps", "tokens run", "seconds"], cells or [["testbed", "", *[NONE] * 3]]
    )


def _cost(numbers: Row, key: str) -> str:
    ours = numbers[key]["ours_charged" if key == "tokens_processed" else "ours"]
    others = [
        f"{numbers['ratios'][name][key]:.2g}" if name in numbers["ratios"] else "-"
        for name in ("published", "strong", "vanilla")
    ]
    return f"{ours:,.{2 if key == 'seconds' else 0}f} ({', '.join(others)})"


def cpu_rows(folder: Path) -> list[Row]:
    """Rows of the newest full record of each family in cpu.jsonl, with the machine of their record."""
    path = folder / "cpu.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found: dict[str, list[Row]] = {}
    for record in map(json.loads, filter(None, lines)):
        if record.get("op") != "kernels" or record.get("quick"):
            continue
        machine = {name: record[name] for name in ("device", "threads", "torch", "isa")}
        for family in {row["family"] for row in record["rows"]}:
            rows = [row | {"machine": machine} for row in record["rows"] if row["family"] == family]
            found[family] = [row for row in rows if row["status"] == "ok"]
    return [row for family in _FAMILIES for row in found.get(family, [])]


def kernels(rows: list[Row]) -> str:
    """The CPU table."""
    if not rows:
        return "**Kernels on a CPU**:\n\n" + table(["kernel", "case", "measured"], [[", ".join(_FAMILIES), "", NONE]])
    machines = {(row["machine"]["device"], row["machine"]["threads"], row["machine"]["isa"]) for row in rows}
    where = "; ".join(f"{device}, {threads} threads, {isa}" for device, threads, isa in sorted(machines))
    cells = []
    for row in rows:
        against = ", ".join(_against(label, each) for label, each in row["ratio"].items())
        cells.append([row["op"], row["case"], _measured(row), against or "-"])
    cells += [[name, "", NONE, ""] for name in _FAMILIES if not any(row["family"] == name for row in rows)]
    note = (
        f"Medians, contenders in turns in one run ({where}; `make bench`). A ratio is the others' time over ours:\n\n"
    )
    return "**Kernels on a CPU**. " + note + table(["kernel", "case", "measured", "the others' time over ours"], cells)


def _measured(row: Row) -> str:
    """Median, and the rate that says most about the op."""
    median = row["times"][_OURS]["median_us"]
    shown = microseconds(median)
    if row["times"][_OURS].get("timer") == "events":  # on a GPU where the call could not be captured
        shown += " in plain calls"
    if row["op"] == "tree search":
        return f"{shown}, {1e6 / median:,.0f} iterations/s"
    if row.get("flops"):
        return f"{shown}, {row['gflop_per_s']:,.0f} GFLOP/s"
    return f"{shown}, {row['gb_per_s']:,.1f} GB/s" if "gb_per_s" in row else shown


def _against(label: str, ratio: dict[str, float]) -> str:
    if label == _ALONE:  # ours does more than this one: the goal is how much longer it takes
        return f"{ratio['median']:.2f}x {label} (ours takes {1 / ratio['median']:.2f}x as long)"
    return f"{_times(ratio['median'])} {label}"


def _times(value: float) -> str:
    return f"{value:.0f}x" if value >= 20 else f"{value:.1f}x" if value >= 2 else f"{value:.2f}x"


def microseconds(value: float) -> str:
    """A time in the unit it reads best in."""
    return f"{value / 1e3:,.2f} ms" if value >= 1e4 else f"{value:,.0f} us" if value >= 100 else f"{value:,.1f} us"


def newest_gpu(folder: Path) -> Row | None:
    """The newest real acceptance record."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("h200-*.json"))]
    real = [record for record in records if record.get("kind") == "gpu_acceptance" and not record["dry_run"]]
    return max(real, key=lambda record: str(record["utc"]), default=None)


def gpu(record: Row | None) -> str:
    """The GPU table: the same lines whether or not they have been measured."""
    parts = {} if record is None else record["parts"]
    rows = [row for row in _part_rows(parts, "kernels") if row["status"] == "ok"]
    cells: list[list[str]] = []
    for branches in (40, 160):
        case = f"{branches} x 32 over 4096, 32/8 heads, D 128, bfloat16"
        cells.append(["attention", case, *_gpu_cells(_find(rows, "attention", case))])
    case = "mix 2 models, top-k 50, top-p 0.95, 64 x 128,256"
    cells.append(["mix_sample", case + ", bfloat16", *_gpu_cells(_find(rows, "mix_sample", case))])
    for fused in (True, False):
        case = f"{'fused' if fused else 'in place'}, 40 x 4096, k = 4, own slot each, bfloat16 directions"
        cells.append(["edits", case, *_gpu_cells(_find(rows, "edits", case))])
    cells.append(
        ["kv_write", "160 rows, 8 heads, D 128", *_gpu_cells(_find(rows, "kv_write", "160 rows, 8 heads, D 128"))]
    )
    for op in ("select", "backup"):
        cells.append([f"tree: {op}", "256 trees", *_gpu_cells(_find(rows, op, "256 trees"))])
    steps = _part_rows(parts, "decode_step")
    for model in ("1b", "7b"):
        found = [row for row in steps if (row["model"], row.get("branches"), row.get("prefix")) == (model, 40, 4096)]
        cells.append([f"one step, {model.upper()}-shaped", "40 branches over 4,096", *_step_cells(found)])
    pair = parts.get("dera_step", {}).get("result") or {}
    cells.append(["DeRa step, LoRA pair", "7B-shaped, batch 1 after 2,048", *_dera_cells(pair)])
    return _gpu_note(record, parts) + table(
        ["what", "case", "measured", "of the floor", "others' time over ours"], cells
    )


def _dera_cells(record: Row) -> list[str]:
    if record.get("shape") != "7b" or not record.get("same"):
        return [NONE, "", ""]
    ratios = record["ratios"]
    over = f"{_times(ratios['lora_pair / single']['median'])} one model's step"
    against = ", ".join(
        f"{_times(ratios[f'{name} / lora_pair']['median'])} {label}"
        for name, label in _DERA_OTHERS.items()
        if f"{name} / lora_pair" in ratios
    )
    return [f"{record['step_ms']['lora_pair']:.2f} ms, {over}", "-", against]


def _gpu_note(record: Row | None, parts: Row) -> str:
    if record is None:
        return "**On a GPU**: every kernel compiles; none has run yet (`python benchmarks/gpu_acceptance.py` will tell).\n\n"
    facts = (parts.get("kernels", {}).get("result") or parts.get("environment", {}).get("result") or {}) | {}
    where = (
        f"{facts.get('device')}, torch {facts.get('torch')}, triton {facts.get('triton')}, commit {facts.get('commit')}"
    )
    failed = f" Parts that failed: {', '.join(record['failed'])}." if record["failed"] else ""
    skipped = f" Parts that were skipped: {', '.join(record['skipped'])}." if record.get("skipped") else ""
    return f"**On a GPU** ({where}, {record['utc'][:10]}, `python benchmarks/gpu_acceptance.py`).{failed}{skipped}\n\n"


def _part_rows(parts: Row, name: str) -> list[Row]:
    return list((parts.get(name, {}).get("result") or {}).get("rows", []))


def _find(rows: list[Row], op: str, case: str) -> Row | None:
    return next((row for row in rows if row["op"] == op and row["case"] == case), None)


def _gpu_cells(row: Row | None) -> list[str]:
    if row is None:
        return [NONE, "", ""]
    against = ", ".join(_against(label, each) for label, each in row["ratio"].items())
    share = row.get("share_of_h200_floor", row.get("share_of_floor"))
    return [_measured(row), "-" if share is None else f"{share:.2f}", against or "-"]


def _step_cells(found: list[Row]) -> list[str]:
    if not found or not found[0].get("times"):
        return [NONE, "", ""]
    row = found[0]
    label = "engine, CUDA graph" if "engine, CUDA graph" in row["times"] else "engine"
    ours = row["times"][label]
    against = ", ".join(
        f"{_times(each['median'])} {_step_name(row, name.removesuffix(f' / {label}'))}"
        for name, each in row["ratio"].items()
        if name.endswith(f" / {label}")
    )
    plain = "" if label == "engine, CUDA graph" else " in plain calls"
    return [f"{ours['median_us'] / 1e3:.2f} ms{plain}", f"{ours['share_of_floor']:.2f}", against or "-"]


def _step_name(row: Row, label: str) -> str:
    """A contender that launches its kernels one by one is called so."""
    return f"{label} in plain calls" if row["times"].get(label, {}).get("timer") == "eager" else label
