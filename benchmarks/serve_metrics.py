"""The field's numbers of a serving run: from what came of each request to percentiles, a table, and keys of the usual names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from serve_load import Record

PERCENTILES: Final = (90, 99)
NAMES: Final = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
_WIDTH = 50


def latencies(records: Sequence[Record]) -> dict[str, list[float]]:
    """Samples in milliseconds of requests answered to the end; those of slow readers say nothing about a server and are left out.

    ttft: to the first text. tpot: from there to the end, per further token. itl: between pieces of text, however many tokens each
    holds. e2el: to the end. An answer without text has an e2el only.
    """
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for one in records:
        if one.status != "ok" or one.slow:
            continue
        for name, value in of_one(one).items():
            found[name].append(value)
        found["itl"] += [1e3 * float(gap) for gap in np.diff(one.pieces)]
    return found


def of_one(one: Record) -> dict[str, float]:
    """ttft, tpot and e2el of one answered request in milliseconds, as far as it has them."""
    made = {"e2el": 1e3 * (one.ended - one.sent)}
    if one.first is not None:
        made["ttft"] = 1e3 * one.first
        if one.tokens > 1:
            made["tpot"] = (made["e2el"] - made["ttft"]) / (one.tokens - 1)
    return made


def spread(name: str, samples: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, std and percentiles under the field's names; None without samples."""
    values = np.asarray(samples, dtype=np.float64)
    made: dict[str, float | None] = {
        f"mean_{name}_ms": float(values.mean()) if len(values) else None,
        f"median_{name}_ms": float(np.median(values)) if len(values) else None,
        f"std_{name}_ms": float(values.std()) if len(values) else None,
    }
    for p in PERCENTILES:
        made[f"p{p}_{name}_ms"] = float(np.percentile(values, p)) if len(values) else None
    return made


def summary(records: Sequence[Record], duration: float, goodput: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The numbers of a run.

    Args:
        duration: seconds from the first request to the last answer.
        goodput: most milliseconds of "ttft", "tpot" or "e2el" of a request that counts as good.
    """
    states = Counter(one.status for one in records)
    answered = [one for one in records if one.status == "ok"]
    inputs, outputs = sum(one.prompt_tokens for one in answered), sum(one.tokens for one in answered)
    made: dict[str, Any] = {
        "duration": duration, "completed": states["ok"], "failed": states["failed"], "cancelled": states["cancelled"],
        "refused": states["refused"], "errors": dict(Counter(one.error for one in records if one.status == "failed").most_common(5)),
        "total_input_tokens": inputs, "total_output_tokens": outputs,
        "request_throughput": len(answered) / duration, "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration, "max_concurrent_requests": most_open(records),
    }  # fmt: skip
    if goodput:
        good = [one for one in answered if all(of_one(one).get(name, 0.0) <= most for name, most in goodput.items())]
        made["request_goodput"] = len(good) / duration
    for name, samples in latencies(records).items():
        made |= spread(name, samples)
    made |= spread("send_delay", [1e3 * (one.sent - one.due) for one in records])
    counters: Counter[str] = Counter()
    for one in answered:
        counters.update(one.counters)
    return made | {"counters": dict(counters)}


def most_open(records: Sequence[Record]) -> int:
    """Most requests open at a moment."""
    events = sorted([(one.sent, 1) for one in records] + [(one.ended, -1) for one in records])
    now = most = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


def table(record: Mapping[str, Any]) -> str:
    """A run as the field prints it."""
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]

    def row(label: str, value: Any) -> None:
        text = "-" if value is None else f"{value:<10.2f}" if isinstance(value, float) else f"{value:<10}"
        lines.append(f"{label + ':':<40} {text}".rstrip())

    row("Successful requests", record["completed"])
    row("Failed requests", record["failed"])
    for label, key in (("Cancelled requests", "cancelled"), ("Malformed requests refused", "refused")):
        if record[key]:
            row(label, record[key])
    if record.get("max_concurrency") is not None:
        row("Maximum request concurrency", record["max_concurrency"])
    if record["request_rate"] != "inf":
        row("Request rate configured (RPS)", float(record["request_rate"]))
    row("Benchmark duration (s)", record["duration"])
    row("Total input tokens", record["total_input_tokens"])
    row("Total generated tokens", record["total_output_tokens"])
    row("Request throughput (req/s)", record["request_throughput"])
    if "request_goodput" in record:
        row("Request goodput (req/s)", record["request_goodput"])
    row("Output token throughput (tok/s)", record["output_throughput"])
    row("Total Token throughput (tok/s)", record["total_token_throughput"])
    row("Peak concurrent requests", record["max_concurrent_requests"])
    for name, title in NAMES.items():
        lines.append(f"{title:-^{_WIDTH}}")
        for key, label in (("mean", "Mean"), ("median", "Median"), *((f"p{p}", f"P{p}") for p in PERCENTILES)):
            row(f"{label} {name.upper()} (ms)", record[f"{key}_{name}_ms"])
    if record["counters"]:
        lines.append(f"{'Counters of the decoder (usage.align)':-^{_WIDTH}}")
        for name, value in record["counters"].items():
            row(name, int(value))
    return "\n".join([*lines, "=" * _WIDTH])
