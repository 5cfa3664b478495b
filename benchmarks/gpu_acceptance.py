"""Tell the truth about the kernels on this GPU: one command, under ten minutes, one JSON file.

    python benchmarks/gpu_acceptance.py [--out FILE] [--quick] [--parts build,tests,...] [--budget 570]
    python benchmarks/gpu_acceptance.py --dry-run          # every part on the CPU with tiny shapes: a test of this script

From a plain checkout with the packages CONTRIBUTING.md lists; installs and downloads nothing. Parts run one after the other,
each in a process of its own and within its time; a part that fails, crashes or hangs is recorded with the end of its output,
and the next one runs. The file is written anew after every part. FILE is $OUT/gpu_acceptance.json, or ./gpu_acceptance.json
where OUT is not set. Exit code: 0 no part failed, 1 some did, 2 no GPU. The JSON and the last line say which failed, and which
were skipped because their program is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

from acceptance.runner import Part, run_part  # noqa: E402
from acceptance.summary import goals  # noqa: E402

SCHEMA = 1
_PYTHON = sys.executable
_DRY_LIMIT_S = 3600.0  # a dry run tests the script, not the speed of a loaded machine


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("OUT") or ".") / "gpu_acceptance.json"
    parser.add_argument("--out", type=Path, default=default, help="the JSON file (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, about a third of the time")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny shapes, no compilation")
    parser.add_argument("--parts", help="only these, with commas between them")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything")
    arguments = parser.parse_args(argv)
    parts = make_parts(quick=arguments.quick, dry=arguments.dry_run)
    names = [part.name for part in parts]
    if arguments.parts:
        wanted = arguments.parts.split(",")
        if unknown := sorted(set(wanted) - set(names)):
            parser.error(f"--parts: there is no {', '.join(unknown)}; there are {', '.join(names)}")
        parts = [part for part in parts if part.name in wanted]
    if not arguments.dry_run and (problem := no_gpu()):
        print(problem)
        return 2
    record = run(parts, arguments)
    print(f"{arguments.out}: {outcome(record)}")
    return 1 if record["failed"] else 0


def outcome(record: dict[str, Any]) -> str:
    """The run in one line; a part that was skipped has not gone well."""
    failed = f"failed: {', '.join(record['failed'])}" if record["failed"] else ""
    skipped = "; ".join(f"{name} ({record['parts'][name]['reason']})" for name in record["skipped"])
    if not skipped:
        return failed or "every part went well"
    return f"{failed or 'every part that ran went well'}; skipped: {skipped}"


def no_gpu() -> str | None:
    """One sentence when there is no GPU to work with."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}), so there is no GPU to test: install a CUDA build of torch."
    if torch.cuda.is_available():
        return None
    return (
        "torch sees no CUDA GPU on this machine, so there is nothing to accept: use --dry-run to try the script itself."
    )


def run(parts: list[Part], arguments: argparse.Namespace) -> dict[str, Any]:
    """All parts in turn; the file is complete after each."""
    begin = time.monotonic()
    record: dict[str, Any] = {
        "kind": "gpu_acceptance", "schema": SCHEMA, "dry_run": arguments.dry_run, "quick": arguments.quick,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "planned": [part.name for part in parts], "parts": {},
    }  # fmt: skip
    share = 0.0
    with tempfile.TemporaryDirectory(prefix="rainkernels-acceptance-") as folder:
        for part in parts:
            share += part.budget_s
            elapsed = time.monotonic() - begin
            # Time that earlier parts left over is passed on; nothing runs past the end of the whole.
            limit = _DRY_LIMIT_S if arguments.dry_run else min(share, arguments.budget) - elapsed
            print(f"{part.name} ... ", end="", flush=True)
            found = record["parts"][part.name] = run_part(part, limit, Path(folder))
            reason = f": {found['reason']}" if "reason" in found else ""
            print(f"{found['status']}{reason} ({found.get('seconds', 0.0):.1f} s)", flush=True)
            record |= {
                "seconds": round(time.monotonic() - begin, 1),
                "failed": [name for name, each in record["parts"].items() if each["status"] == "failed"],
                "skipped": [name for name, each in record["parts"].items() if each["status"] == "skipped"],
                "goals": goals(record["parts"]),
            }
            _write(arguments.out, record)
    for goal in record["goals"]:
        state = {None: "not measured", True: "met", False: "MISSED"}[goal["met"]]
        value = f": {goal['note']}" if "note" in goal else ""
        value = value if goal["measured"] is None else f": {goal['measured']:.3g}"
        print(f"  {state:12} {goal['name']} ({goal['goal']}){value}")
    return record


def make_parts(*, quick: bool, dry: bool) -> list[Part]:
    """The parts in order. Dry: the same scripts, CPU, tiny shapes."""
    device = ("--device", "cpu") if dry else ("--device", "cuda")
    small = ("--small",) if dry or quick else ()
    fast = ("--quick",) if dry or quick else ()
    steps = ("--models", "1b,7b", "--repeats", "7", "--budget", "2")
    if quick:
        steps = ("--models", "1b", "--rows", "1,40", "--prefixes", "4096", "--repeats", "5", "--budget", "1")
    if dry:
        steps = ("--models", "tiny", "--rows", "1,3", "--prefixes", "16", "--own", "4", "--repeats", "3")
    engine = ("--models", "1b" if quick else "1b,7b")
    if dry:
        engine = ("--models", "tiny", "--rows", "1,3", "--prefix", "16", "--own", "4", "--repeats", "3")
    dera = ("--dtype", "bfloat16", "--context", "2048", "--rounds", "3", "--without", "notebook")
    dera = ("--shape", "1b" if quick else "7b", *dera)
    if dry:
        dera = ("--shape", "testbed", "--context", "8", "--rounds", "1", "--steps", "3")
    edits = ("--shape", "1b" if quick else "7b", "--rows", "64", "--rounds", "1", "--dtype", "bfloat16", "--no-fit")
    if dry:
        edits = ("--shape", "testbed", "--quick", "--no-fit")
    urial = (
        "--rounds",
        "3",
        "--batch-rounds",
        "1",
        "--concurrent",
        "1,32",
        "--new-tokens",
        "16",
        "--dtype",
        "bfloat16",
    )
    urial = ("--shape", "1b" if quick else "7b", *urial)
    if dry:
        urial = ("--shape", "testbed", "--quick")
    cases = (_PYTHON, "benchmarks/acceptance/cases.py", *device)
    watched = (*cases, "--small", "--json", "{result}")
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "86")
    result = ("--json", "{result}")
    return [
        Part("environment", (_PYTHON, "benchmarks/acceptance/environment.py", *device, *fast, *result), 20),
        Part("build", (_PYTHON, "benchmarks/acceptance/build.py", *(("--check-only",) if dry else ()), *result), 110),
        Part("doctor", (_PYTHON, "-m", "raindecode", "doctor"), 20),
        Part(
            "tests",
            (_PYTHON, "-m", "pytest", "tests/kernels" if dry else "tests", "-m", "gpu", "-q", "--tb=short",
             "--junitxml={result}"),
            85,
        ),
        Part("cases", (*cases, *small, *result), 30),
        Part("kernels", (_PYTHON, "benchmarks/bench_kernels.py", *device, *fast, "--budget", "2", *result), 95),
        Part("decode_step", (_PYTHON, "benchmarks/decode_step.py", *device, *steps, *result), 75),
        Part("engine_step", (_PYTHON, "benchmarks/engine_step.py", *device, *engine, *result), 30),
        Part("dera_step", (_PYTHON, "benchmarks/bench_dera.py", *device, *dera, *result), 45),
        Part("alignez_step", (_PYTHON, "benchmarks/bench_alignez.py", *device, *edits, *result), 30),
        Part("urial", (_PYTHON, "benchmarks/bench_urial.py", *device, *urial, *result), 30),
        # Every allocation its own, so that a read past one tensor is not a read inside another.
        Part(
            "sanitizer", watched if dry else (*sanitizer, *watched), 30, None if dry else sanitizer[0],
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
    ]  # fmt: skip


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    raise SystemExit(main())
