"""Fill the README's results tables from benchmarks/results, so that no number stands there without a record.

    python benchmarks/bench_kernels.py | tail -n 1 >> benchmarks/results/cpu.jsonl
    python benchmarks/gpu_acceptance.py --out benchmarks/results/h200-<date>.json        # on a machine with a GPU
    raindecode eval --task town --search vanilla,rain --json | tail -n 1 > benchmarks/results/town.json
    raindecode bench rain --json benchmarks/results/rain-testbed.json                    # and --model 110m, rain-110m.json
    python benchmarks/update_readme.py

The newest record of each kernel family counts, and of the GPU files the newest. What no record holds is "not yet measured".
--check only says whether the README is up to date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from readme_tables import NONE, cpu_rows, gpu, kernels, newest_gpu, rain, rain_records, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"


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


def main() -> None:
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    parts = (town(), rain(rain_records(RESULTS)), kernels(cpu_rows(RESULTS)), gpu(newest_gpu(RESULTS)))
    updated = head + BEGIN + "\n".join(parts) + END + tail
    if "--check" in sys.argv[1:]:
        raise SystemExit(
            0 if updated == text else "README.md is not what benchmarks/results says: run benchmarks/update_readme.py"
        )
    README.write_text(updated, encoding="utf-8")


if __name__ == "__main__":
    main()
