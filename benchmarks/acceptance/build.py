"""Compile the extension in place with its CUDA lane, and ask the module what it holds.

python benchmarks/acceptance/build.py [--check-only] --json FILE

No package is installed: the build's own needs (setuptools, pybind11, cmake, ninja) must be there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_ASK = (
    "import json; from rainkernels._lanes import native; m = native(); "
    "print(json.dumps({'has_cuda': bool(m.has_cuda), 'isa': m.isa(), 'file': m.__file__.rsplit('/', 1)[-1]}))"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check-only", action="store_true", help="compile nothing; the module may be without CUDA")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"compiled": not arguments.check_only}
    if not arguments.check_only:
        begin = time.perf_counter()
        environment = {**os.environ, "RAINKERNELS_CUDA": "1"}
        environment.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        print(done.stdout, flush=True)
        found |= {
            "rc": done.returncode,
            "compile_seconds": round(time.perf_counter() - begin, 1),
            **spills(done.stdout),
        }
    asked = subprocess.run([sys.executable, "-c", _ASK], cwd=ROOT, capture_output=True, text=True, check=False)
    if asked.returncode:
        found["import_error"] = asked.stderr.strip().splitlines()[-1:]
    else:
        found["module"] = json.loads(asked.stdout)
    arguments.json.write_text(json.dumps(found), encoding="utf-8")
    print(json.dumps(found))
    built = found.get("rc", 0) == 0 and "module" in found
    return 0 if built and (arguments.check_only or found["module"]["has_cuda"]) else 1


def spills(output: str) -> dict[str, Any]:
    """What ptxas said about registers and spills of the kernels it compiled."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", output)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", output)]
    return {
        "ptxas_kernels": len(registers),
        "ptxas_max_registers": max(registers, default=None),
        "ptxas_spill_bytes": sum(spilled),
    }


if __name__ == "__main__":
    raise SystemExit(main())
