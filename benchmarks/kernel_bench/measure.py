"""Timing of contenders in turns: medians, quartiles and paired ratios. CUDA graphs and events on a GPU, perf_counter on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Run = Callable[[], object]
Runs = Sequence[Run]  # the same work on one or more sets of inputs, gone through in turn


@dataclass
class Prepared:
    """A contender ready to be sampled: `sample()` gives microseconds of one call."""

    sample: Callable[[], float]
    timer: str  # "perf_counter", "graph" or "events"
    eager: Callable[[], float] | None = None  # where `sample` replays a graph: microseconds of one plain call
    capture_error: str | None = None  # why `sample` makes plain calls where others may replay graphs


def comparable(a: Prepared, b: Prepared) -> bool:
    """Whether a ratio of the two says something of the work: plain GPU calls against replays mostly measure launches."""
    return {a.timer, b.timer} != {"graph", "events"}


class Timer(Protocol):
    """Makes contenders ready for sampling."""

    def prepare(self, runs: Runs) -> Prepared: ...


class CpuTimer:
    """Host clock; short calls are repeated inside a sample."""

    def __init__(self, sample_s: float = 2e-3) -> None:
        self.sample_s = sample_s

    def prepare(self, runs: Runs) -> Prepared:
        for run in runs:
            run()
        begin = time.perf_counter()
        runs[0]()
        inner = max(1, min(200, int(self.sample_s / max(time.perf_counter() - begin, 1e-7))))
        rounds = -(-inner // len(runs))

        def sample() -> float:
            begin = time.perf_counter()
            for _ in range(rounds):
                for run in runs:
                    run()
            return (time.perf_counter() - begin) / (rounds * len(runs)) * 1e6

        return Prepared(sample, "perf_counter")


class CudaTimer:
    """Device events around replays of a captured graph, or around plain calls where capture fails."""

    def __init__(self, device: torch.device, sample_s: float = 3e-3) -> None:
        self.device = device
        self.sample_s = sample_s

    def prepare(self, runs: Runs) -> Prepared:
        def plain() -> None:
            for run in runs:
                run()

        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                plain()
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        eager = self._sampler(plain, len(runs))
        graph = torch.cuda.CUDAGraph()
        try:
            # On the stream of the warm-up: what a call keeps for each stream (tables, workspaces) is there already.
            with torch.cuda.graph(graph, stream=side):
                plain()
        except Exception as error:  # any refusal to be captured: then plain calls are what can be timed
            torch.cuda.synchronize(self.device)
            return Prepared(eager, "events", capture_error=first_line(error))
        return Prepared(self._sampler(graph.replay, len(runs)), "graph", eager=eager)

    def _sampler(self, once: Callable[[], object], calls: int) -> Callable[[], float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def measure(repeats: int) -> float:
            torch.cuda.synchronize(self.device)
            start.record()
            for _ in range(repeats):
                once()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / (repeats * calls) * 1e3

        measure(1)
        repeats = max(1, min(200, int(self.sample_s * 1e6 / max(measure(1) * calls, 1e-2))))
        return lambda: measure(repeats)


def alternate(prepared: dict[str, Prepared], repeats: int, budget_s: float) -> dict[str, list[float]]:
    """Samples of every contender, taken in turns so that a noisy machine hits all of them.

    Ends early, after three rounds at least, when `budget_s` is spent.
    """
    samples: dict[str, list[float]] = {label: [] for label in prepared}
    begin = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - begin > budget_s:
            break
        for label, contender in prepared.items():
            samples[label].append(contender.sample())
    return samples


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and least of some samples, microseconds."""
    low, middle, high = quartiles(samples)
    return {"median_us": middle, "q1_us": low, "q3_us": high, "min_us": min(samples)}


def paired_ratio(others: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times as long the others took, round by round."""
    low, middle, high = quartiles([a / b for a, b in zip(others, ours, strict=True)])
    return {"median": middle, "q1": low, "q3": high}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def make_timer(device: torch.device) -> Timer:
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def first_line(error: BaseException) -> str:
    """An exception in one line, for a record."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}".rstrip(": ")


def rounded(value: Any, digits: int = 4) -> Any:
    """The same data with floats of `digits` significant digits: records stay readable."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: rounded(each, digits) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each, digits) for each in value]
    return value
