"""Fill the tables of README.md and docs/benchmarks.md from benchmarks/results, so that no number stands there without a record.

    python benchmarks/bench_kernels.py | tail -n 1 >> benchmarks/results/cpu.jsonl
    python benchmarks/gpu_acceptance.py --out benchmarks/results/h200-<date>.json        # on a machine with a GPU
    raindecode eval --task town --search vanilla,rain --json | tail -n 1 > benchmarks/results/town.json
    raindecode bench rain --json benchmarks/results/rain-testbed.json                    # and --model 110m, rain-110m.json
    raindecode bench dera --shape 110m --rounds 9 --json benchmarks/results/dera-110m.json     # and 25m; testbed --context 128
    raindecode bench alignez --shape 110m --threads 2 --json benchmarks/results/alignez-110m.json
    raindecode bench alignez --threads 2 --json benchmarks/results/alignez-testbed-cost.json
    raindecode sweep --task town --adapter testbed --lambdas 0,0.25,0.5,0.75,1,1.5,2,3 --num-harmful 400 --num-benign 400 \\
        --plot docs/methods/dera-sweep.svg --overwrite --json | tail -n 1 > benchmarks/results/town-sweep.json
    python benchmarks/check_widths.py --json benchmarks/results/widths-float32.json      # and --dtype bfloat16
    python benchmarks/profile_step.py --json benchmarks/results/step.json
    python benchmarks/alignez_presets.py --json benchmarks/results/alignez-testbed.json
    raindecode bench urial --shape 110m --threads 2 --json benchmarks/results/urial-110m.json  # and 25m
    raindecode bench urial --threads 2 --json benchmarks/results/urial-testbed-cost.json
    python benchmarks/urial_combinations.py --json benchmarks/results/urial-testbed.json
    python benchmarks/serve_cost.py --shape 110m --requests 32 --threads 2 --json benchmarks/results/serve-cost-110m.json   # and testbed
    python benchmarks/soak_server.py --json benchmarks/results/serve-soak.json
    python benchmarks/update_readme.py

The newest record of each kernel family counts, and of the GPU files the newest. What no record holds is "not yet measured".
--check only says whether both are up to date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from alignez_tables import edit_steps, fit_times
from dera_tables import dera_records, dera_steps, dera_sweep, sweep_rows
from doc_tables import load, steps, widths
from preset_tables import preset_rows
from readme_tables import NONE, cpu_rows, full_records, gpu, kernels, newest_gpu, rain, rain_records, table
from serve_tables import costs, serve_records, soak
from urial_tables import combinations, first_tokens, together

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
DOCS = ROOT / "docs" / "benchmarks.md"
DERA = ROOT / "docs" / "methods" / "dera.md"
ALIGNEZ = ROOT / "docs" / "methods" / "alignez.md"
URIAL = ROOT / "docs" / "methods" / "urial.md"


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


def filled(text: str, name: str, content: str) -> str:
    """A page with other content between the marks of `name`."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->\n"
    head, rest = text.split(begin)
    return head + begin + content + end + rest.split(end)[1]


def main() -> None:
    edits, prompts = full_records(RESULTS, "alignez"), full_records(RESULTS, "urial")
    parts = (
        town(), dera_sweep(load(RESULTS / "town-sweep.json")), rain(rain_records(RESULTS)), dera_steps(dera_records(RESULTS)),
        edit_steps(edits), fit_times(edits), first_tokens(prompts), together(prompts), costs(serve_records(RESULTS)),
        soak(load(RESULTS / "serve-soak.json")), kernels(cpu_rows(RESULTS)), gpu(newest_gpu(RESULTS)),
    )  # fmt: skip
    agreement = widths([load(RESULTS / f"widths-{dtype}.json") for dtype in ("float32", "bfloat16")])
    for path, contents in (
        (README, {"results": "\n".join(parts)}),
        (DERA, {"sweep": sweep_rows(load(RESULTS / "town-sweep.json"))}),
        (ALIGNEZ, {"presets": preset_rows(load(RESULTS / "alignez-testbed.json"))}),
        (URIAL, {"combinations": combinations(load(RESULTS / "urial-testbed.json"))}),
        (DOCS, {"widths": agreement, "step": steps(load(RESULTS / "step.json"))}),
    ):
        text = updated = path.read_text(encoding="utf-8")
        for name, content in contents.items():
            updated = filled(updated, name, content)
        if "--check" not in sys.argv[1:]:
            path.write_text(updated, encoding="utf-8")
        elif updated != text:
            raise SystemExit(
                f"{path.relative_to(ROOT)} is not what benchmarks/results says: run benchmarks/update_readme.py"
            )


if __name__ == "__main__":
    main()
