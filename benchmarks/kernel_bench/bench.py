"""One comparison: our op and others that do the same work, checked against the definition first, then timed in turns."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from kernel_bench.machine import H200_BYTES_PER_S, H200_FLOPS, Ceilings
from kernel_bench.measure import (
    CpuTimer,
    Prepared,
    Run,
    Runs,
    Timer,
    alternate,
    comparable,
    first_line,
    paired_ratio,
    rounded,
    spread,
)

OURS = "ours"


@dataclass(frozen=True)
class Verdict:
    """How far a contender is from the definition, and how far it may be."""

    error: float
    allowed: float
    measure: str = "largest absolute error"

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # false for NaN

    def to_json(self) -> dict[str, Any]:
        return {"error": self.error, "allowed": self.allowed, "ok": self.ok, "measure": self.measure}


@dataclass
class Bench:
    """A case of one op.

    Attributes:
        builders: by label, what makes a contender; the one called "ours" is what the others are divided by. A builder may
            fail (a package that is not there, a compiler that is not): the reason is recorded and the rest is timed.
        verify: compares one call of a contender with the definition.
        num_bytes: the fewest bytes the work moves through memory: every input read once, every output written once.
        num_flops: operations the work needs.
        on_host: contenders that run on the host whatever the device: a captured graph would hold nothing of them.
    """

    op: str
    case: str
    dtype: torch.dtype
    builders: dict[str, Callable[[], Runs]]
    verify: Callable[[str, Run], Verdict]
    num_bytes: float
    num_flops: float = 0.0
    lane: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    on_host: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Settings:
    """How much time to spend, and where."""

    device: torch.device
    repeats: int = 15
    case_budget_s: float = 10.0
    quick: bool = False
    compile: bool = True  # time torch.compile as well


def run_bench(bench: Bench, settings: Settings, timer: Timer, ceilings: Ceilings) -> dict[str, Any]:
    """Check, time, and describe one case. `status` is "ok", "wrong" (ours differs from the definition) or "failed".

    A contender that could not be captured is timed by plain calls: its "timer", the notes and "failed" say so, and it has
    no ratio with those that replay graphs.
    """
    row: dict[str, Any] = {
        "op": bench.op, "case": bench.case, "lane": bench.lane, "dtype": dtype_name(bench.dtype), "status": "ok",
        "checked": {}, "failed": {}, "notes": bench.notes,
    }  # fmt: skip
    prepared: dict[str, Prepared] = {}
    with torch.inference_mode():
        for label, build in bench.builders.items():
            try:
                runs = build()
                verdict = bench.verify(label, runs[0])
                row["checked"][label] = rounded(verdict.to_json())
                if verdict.ok:
                    prepared[label] = (CpuTimer() if label in bench.on_host else timer).prepare(runs)
                else:
                    row["failed"][label] = f"off by {verdict.error:.2e}, allowed {verdict.allowed:.2e}"
            except Exception as error:  # whatever a contender does, the others are still timed
                row["failed"][label] = first_line(error)
            if label == OURS and OURS not in prepared:
                row["status"] = "wrong" if OURS in row["checked"] else "failed"
                return row
        samples = alternate(prepared, settings.repeats, settings.case_budget_s)
        row["times"] = {
            label: spread(taken) | {"timer": prepared[label].timer, "rounds": len(taken)}
            for label, taken in samples.items()
        }
        for label, contender in prepared.items():
            if contender.eager is not None:
                row["times"][label]["eager_us"] = contender.eager()
            if contender.capture_error:
                row["times"][label]["capture_error"] = contender.capture_error
                row["failed"][label] = f"not captured, timed by plain calls: {contender.capture_error}"
    others = [label for label in samples if label != OURS]
    alike = [label for label in others if comparable(prepared[label], prepared[OURS])]
    row["ratio"] = {label: paired_ratio(samples[label], samples[OURS]) for label in alike}
    if plain := [label for label, contender in prepared.items() if contender.capture_error]:
        apart = [label for label in others if label not in alike]
        row["notes"] = {**bench.notes, "plain_calls": plain, "not_compared": apart}
    row |= _floor(bench, row["times"][OURS]["median_us"], settings, ceilings)
    prepared.clear()
    free(settings.device)
    return dict(rounded(row))


def _floor(bench: Bench, median_us: float, settings: Settings, ceilings: Ceilings) -> dict[str, Any]:
    floor, by = ceilings.floor_us(bench.num_bytes, bench.num_flops, dtype_name(bench.dtype))
    found: dict[str, Any] = {
        "bytes": bench.num_bytes, "flops": bench.num_flops, "floor_us": floor, "floor_by": by,
        "share_of_floor": floor / median_us, "gb_per_s": bench.num_bytes / median_us / 1e3,
        "gflop_per_s": bench.num_flops / median_us / 1e3,
    }  # fmt: skip
    if settings.device.type == "cuda" and "H200" in torch.cuda.get_device_name(settings.device):
        flops = bench.num_flops if bench.dtype.itemsize == 2 else 0.0  # the constant is of 16-bit products
        fixed = max(bench.num_bytes / H200_BYTES_PER_S, flops / H200_FLOPS) * 1e6
        found |= {"h200_floor_us": fixed, "share_of_h200_floor": fixed / median_us}
    return found


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def free(device: torch.device) -> None:
    """Give back what a case held, so that the next one starts alike."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def num_input_sets(settings: Settings, bytes_per_set: float, l2_bytes: int) -> int:
    """Sets of inputs to go through so that a GPU reads memory and not its cache; 1 on a CPU, as a decode step finds it."""
    if settings.device.type != "cuda":
        return 1
    return int(max(1, min(16, -(-3 * l2_bytes // max(int(bytes_per_set), 1)))))


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """`function` through torch.compile for these shapes."""
    import torch._dynamo  # a failure belongs to the contender that asked

    torch._dynamo.reset()
    result: Callable[..., object] = torch.compile(function, dynamic=False)
    return result


@contextmanager
def forced_lane(name: str | None) -> Iterator[None]:
    """RAINKERNELS_LANE for a while; None leaves it as it is."""
    before = os.environ.get("RAINKERNELS_LANE")
    if name is not None:
        os.environ["RAINKERNELS_LANE"] = name
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("RAINKERNELS_LANE", None)
        else:
            os.environ["RAINKERNELS_LANE"] = before
