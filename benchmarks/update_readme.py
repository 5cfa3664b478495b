"""Fill the README's results tables from benchmarks/results, so that no number stands there without a record.

    python benchmarks/bench_tree.py      | tail -n 1 >> benchmarks/results/cpu.jsonl
    python benchmarks/bench_attention.py | tail -n 1 >> benchmarks/results/cpu.jsonl
    raindecode eval --task town --search vanilla,rain --json | tail -n 1 > benchmarks/results/town.json
    python benchmarks/update_readme.py

The newest line of each op counts. What no record holds is "not yet measured". --check only says whether it is up to date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"
NONE = "not yet measured"


def newest() -> dict[str, Any]:
    """The last CPU record of each op."""
    path = RESULTS / "cpu.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {record["op"]: record for record in map(json.loads, filter(None, lines))}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def town() -> str:
    path = RESULTS / "town.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = []
    for key, label in (("vanilla", "plain sampling, temperature 1"), ("rain", "RAIN, preset `town`")):
        if key not in record:
            rows.append([label, *[NONE] * 5])
            continue
        r = record[key]
        shares = [
            f"{r[rate]:.1%} ({r[interval][0]:.1%} to {r[interval][1]:.1%})"
            for rate, interval in (("harmful_rate", "harmful_ci"), ("helpful_rate", "helpful_ci"))
        ]
        each = [f"{r[name] / r['n']:,.0f}" for name in ("tokens_processed", "iterations")]
        rows.append([label, *shares, *each, f"{r['model_steps']:,}"])
    counts = record.get("rain", {"n_harmful": 400, "n_benign": 400})
    header = [
        "search",
        "harmful answers",
        "helpful answers",
        "tokens processed each",
        "iterations each",
        "forwards in all",
    ]
    return (
        f"**Testbed**: {counts['n_harmful']} held-out harmful and {counts['n_benign']} held-out harmless requests, 95 % intervals\n"
        "(`raindecode eval --task town --search vanilla,rain --json`). The model is synthetic and tiny:\n\n"
        + table(header, rows)
    )


def kernels(records: dict[str, Any]) -> str:
    rows = []
    if trees := records.get("tree_select_backup"):
        against = ", ".join(f"{trees[f'times_{n}']:.0f}x {label}" for n, label in (
            ("python", "nodes in plain Python"), ("published", "nodes as published (torch)"), ("numpy", "numpy nodes"),
        ))  # fmt: skip
        case = f"{trees['trees']} trees, {trees['children']} children, {trees['embedding_dim']}-d embeddings, 1 thread"
        rows.append(["tree: select + backup", case, f"{trees['iterations_per_s']:,} iterations/s", against])
    attention = records.get("tree_attention", {"rows": []})
    for row in attention["rows"]:
        against = ", ".join(f"{ratio:.1f}x {label}" for label, ratio in row["speedup"].items()) or "-"
        median = f"{row['median_us']['tree']:,.0f} us, {row['gflop_per_s']:.0f} GFLOP/s"
        rows.append(["attention", f"{row['case']}, {attention['threads']} threads", median, against])
    rows = rows or [["tree, attention", "", NONE, NONE]]
    note = "Medians of one run, contenders in turns, on a shared machine of two cores with AVX-512 (`make bench`):\n\n"
    return "**Kernels on a CPU**. " + note + table(["kernel", "case", "measured", "faster than, in the same run"], rows)


def gpu() -> str:
    rows = [
        [name, NONE]
        for name in ("tree: select + backup", "kv: write rows to slots", "attention", "one step of a 7B model")
    ]
    return "**On a GPU**: the CUDA lanes of `tree` and `kv` compile; none has run yet.\n\n" + table(
        ["what", "measured"], rows
    )


def main() -> None:
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    updated = head + BEGIN + "\n".join((town(), kernels(newest()), gpu())) + END + tail
    if "--check" in sys.argv[1:]:
        raise SystemExit(
            0 if updated == text else "README.md is not what benchmarks/results says: run benchmarks/update_readme.py"
        )
    README.write_text(updated, encoding="utf-8")


if __name__ == "__main__":
    main()
