"""What machine this is: GPU, driver, clocks, versions, and the bandwidth and product rates reached now.

python benchmarks/acceptance/environment.py [--device cuda|cpu] [--quick] --json FILE
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from kernel_bench.machine import facts, measure_ceilings, package_version  # noqa: E402
from kernel_bench.measure import rounded  # noqa: E402

from acceptance.runner import find_program  # noqa: E402

_QUERY = (
    "name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.mem", "clocks.max.sm", "pstate",
    "power.draw", "temperature.gpu", "compute_mode", "mig.mode.current",
)  # fmt: skip
_PACKAGES = (
    "transformers", "triton", "numpy", "safetensors", "flashinfer-python", "pytest", "hypothesis", "pybind11", "cmake",
    "ninja", "setuptools",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    found: dict[str, Any] = {
        **facts(device),
        "system": platform.platform(),
        "cpu_count": os.cpu_count(),
        "nvidia_smi": nvidia_smi(),
        "nvcc": last_line(["nvcc", "--version"]),
        "compute_sanitizer": last_line(["compute-sanitizer", "--version"]),
        "compiler": last_line([os.environ.get("CXX", "c++"), "--version"], first=True),
        "packages": {name: package_version(name) for name in _PACKAGES},
    }
    ceilings = measure_ceilings(device, quick=arguments.quick or device.type == "cpu")
    found["ceilings"] = rounded(ceilings.to_json())
    found["nvidia_smi_after"] = nvidia_smi()  # clocks under load rather than idle
    arguments.json.write_text(json.dumps(found), encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 0


def nvidia_smi() -> dict[str, str] | str:
    """The GPU as its driver describes it, or why it cannot be asked."""
    line = last_line(["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"], first=True)
    if line is None:
        return "nvidia-smi is not there or failed"
    values = [value.strip() for value in line.split(",")]
    return dict(zip(_QUERY, values, strict=True)) if len(values) == len(_QUERY) else line


def last_line(command: list[str], *, first: bool = False) -> str | None:
    """One line of what a program prints; None when it is missing or fails."""
    path = find_program(command[0])
    if path is None:
        return None
    try:
        done = subprocess.run([path, *command[1:]], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return None if done.returncode or not lines else lines[0 if first else -1].strip()


if __name__ == "__main__":
    raise SystemExit(main())
