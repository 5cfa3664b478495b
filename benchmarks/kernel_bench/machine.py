"""What the numbers were measured on: names, versions, and the two ceilings every floor is computed from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
# Measured on one H200 over months: the floors that the project's goals are written in.
H200_BYTES_PER_S, H200_FLOPS = 4.3e12, 790e12


@dataclass(frozen=True)
class Ceilings:
    """Bytes and operations per second this machine reaches in the same run."""

    copy_bytes_per_s: float  # bytes read plus bytes written
    read_bytes_per_s: float
    flops: dict[str, float]  # by dtype of the operands

    @property
    def bytes_per_s(self) -> float:
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    def floor_us(self, num_bytes: float, num_flops: float, dtype: str) -> tuple[float, str]:
        """Least microseconds the work can take, and which ceiling says so."""
        by_bytes = num_bytes / self.bytes_per_s * 1e6
        by_flops = num_flops / self.flops.get(dtype, max(self.flops.values())) * 1e6
        return (by_bytes, "bytes") if by_bytes >= by_flops else (by_flops, "flops")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"bytes_per_s": self.bytes_per_s}


def measure_ceilings(device: torch.device, *, quick: bool = False) -> Ceilings:
    """A large copy, a large read and large matrix products of random numbers."""
    gpu = device.type == "cuda"
    floats = (1 << 24 if quick else 1 << 30) if gpu else (1 << 22 if quick else 1 << 26)
    size = (1024 if quick else 8192) if gpu else (256 if quick else 1024)
    source = torch.empty(floats, device=device).uniform_(-1, 1)
    target = torch.empty_like(source)
    moved = source.numel() * source.element_size()
    copied = 2 * moved / _seconds(lambda: target.copy_(source), device)
    read = moved / _seconds(lambda: source.sum(), device)
    source = target = source.new_empty(0)  # given back before the products
    # Plain bfloat16 products are left out on a CPU: some virtual machines announce AMX and die on its first instruction.
    flops = {}
    for dtype in (torch.bfloat16, torch.float32) if gpu else (torch.float32,):
        a = torch.randn(size, size, device=device, dtype=dtype)
        b = torch.randn(size, size, device=device, dtype=dtype)
        flops[str(dtype).removeprefix("torch.")] = 2 * size**3 / _seconds(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
    if gpu:
        flops["float16"] = flops["bfloat16"]
    return Ceilings(copied, read, flops)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        run()
    taken = []
    for _ in range(repeats):
        finish()
        begin = time.perf_counter()
        run()
        finish()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def facts(device: torch.device) -> dict[str, Any]:
    """Names and versions for a record."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "isa": _isa(),
        "commit": commit(),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": l2_bytes(device),
        }
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def l2_bytes(device: torch.device) -> int:
    """Size of the last cache in front of memory; what a benchmark has to overflow."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that was measured, with '+changes' when the working tree differs; None outside git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"],
            cwd=ROOT, capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _isa() -> str | None:
    try:
        from rainkernels._lanes import native

        return os.environ.get("RAINKERNELS_ISA") or str(native().isa())
    except Exception:  # a build that is broken says so elsewhere
        return None
