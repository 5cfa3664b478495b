"""What one RAIN answer costs on the embedded model: raindecode beside baselines on plain transformers (benchmarks/naive).

    python benchmarks/bench_rain.py [--requests 30] [--together 32] [--max-new-tokens 64] [--seed 0] [--json FILE]

Requests are sorted into regimes by the share of good verdicts in their own search: safe (at least 80 %), harmful (below 40 %),
mixed. Each is answered by raindecode (width "auto" and 1), `published`, `strong` (same search) and `vanilla` (cached sampling of as
many tokens), one after another, so that a noisy machine hits all of them. An answer of published or strong that is not
raindecode's, or a width that changes anything, is a failure: exit code 1. Model steps and tokens are exact; seconds are medians.
Then --together requests at once through one call of generate. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import raindecode  # noqa: E402  before torch: asks MKL for reproducible results

# isort: split
import torch  # noqa: E402
from naive.common import make_codec, make_request  # noqa: E402
from naive.published import Published  # noqa: E402
from naive.strong import Strong  # noqa: E402
from naive.vanilla import Vanilla  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from raindecode import RAIN, testbed  # noqa: E402

Row = dict[str, Any]
REGIMES = {"safe": 0.8, "mixed": 0.4, "harmful": 0.0}  # by their least share of good verdicts
ENGINES = ("ours", "ours_width1", "published", "strong", "vanilla")


class Listening:
    """An evaluator that notes what another says."""

    def __init__(self, evaluator: Any) -> None:
        self.evaluator = evaluator
        self.scores: list[float] = []

    def evaluate(self, context: Any, prompt: str, response: str) -> Generator[Any, Any, float]:
        score: float = yield from self.evaluator.evaluate(context, prompt, response)
        self.scores.append(score)
        return score


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--together", type=int, default=32, help="requests of one call of generate; 0 leaves it out")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the first request; the next ones have the next")
    parser.add_argument("--json", type=Path, help="write the record to this file, too")
    arguments = parser.parse_args(argv)
    rain = RAIN.preset("town")
    rows = alone(rain, arguments.requests, arguments.max_new_tokens, arguments.seed)
    record: Row = {"op": "rain", "model": "testbed", "threads": torch.get_num_threads(), "torch": torch.__version__}
    record["regimes"] = {name: summary([r for r in rows if r["regime"] == name]) for name in REGIMES}
    record["same"] = all(row["same"] for row in rows)
    if arguments.together:
        record["together"] = crowd(rain, arguments.together, arguments.max_new_tokens, arguments.seed)
    show(record)
    line = json.dumps(record)
    if arguments.json:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    print(line)
    return int(not record["same"])


def alone(rain: RAIN, count: int, limit: int, seed: int) -> list[Row]:
    """Every engine's answer to every request."""
    model = AutoModelForCausalLM.from_pretrained(testbed.WEIGHTS, dtype=torch.float32)
    codec = make_codec(model, AutoTokenizer.from_pretrained(testbed.WEIGHTS))
    decoders = {name: raindecode.Decoder.from_pretrained("testbed", device="cpu") for name in ("ours", "ours_width1")}
    listening = Listening(rain.evaluator)
    searches = {"ours": rain, "ours_width1": replace(rain, width=1, evaluator=listening)}
    naive: dict[str, Any] = {"published": Published(model, codec, rain), "strong": Strong(model, codec, rain)}
    vanilla = Vanilla(model, codec)

    def answer(prompt: str, limit: int, seed: int) -> dict[str, Row]:
        found = {name: ours(decoders[name], prompt, searches[name], limit, seed) for name in searches}
        request = make_request(prompt, codec, rain.format, max_new_tokens=limit, seed=seed)
        for name, engine in naive.items():
            found[name] = plain(engine.answer(request))
        found["vanilla"] = plain(vanilla.answer(request, num_tokens=len(found["ours"]["token_ids"])))
        return found

    *prompts, other = [request.text for request in testbed.sample_requests(count + 1)]
    answer(other, 4, 0)
    rows = []
    for index, prompt in enumerate(track(prompts, "requests", console=Console(stderr=True))):
        listening.scores.clear()
        found = answer(prompt, limit, seed + index)
        good = statistics.fmean(score > 0 for score in listening.scores)
        first = found["ours"]
        same = all(found[name]["outcome"] == first["outcome"] for name in ("ours_width1", "published", "strong"))
        same = same and found["ours_width1"]["needed"] == first["needed"]
        regime = next(name for name, least in REGIMES.items() if good >= least)
        rows.append({"regime": regime, "good": good, "same": same, **found})
    return rows


def ours(decoder: raindecode.Decoder, prompt: str, rain: RAIN, limit: int, seed: int) -> Row:
    began = time.perf_counter()
    (done,) = decoder.generate(prompt, search=rain, max_new_tokens=limit, seed=seed)
    seconds = time.perf_counter() - began
    stats = done.stats
    return {
        "model_steps": stats.model_steps, "tokens": stats.tokens_charged, "needed": stats.tokens_processed,
        "seconds": seconds, "model_seconds": stats.seconds["model"], "token_ids": done.token_ids,
        "outcome": (done.token_ids, stats.iterations, stats.evaluations), "iterations": stats.iterations,
    }  # fmt: skip


def plain(result: Any) -> Row:
    return {
        "model_steps": result.model_steps, "tokens": result.tokens_processed, "seconds": result.seconds,
        "model_seconds": sum(result.meter.model_seconds.values()), "token_ids": result.token_ids,
        "outcome": (result.token_ids, result.iterations, result.evaluations),
        "embed_steps": result.meter.steps["embed"],
    }  # fmt: skip


def summary(rows: list[Row]) -> Row:
    """Means of the exact counters and medians of the seconds of a regime, per answer."""
    if not rows:
        return {"requests": 0}
    counters: dict[str, Row] = defaultdict(dict)
    for name in ENGINES:
        for key in ("model_steps", "tokens"):
            counters[key][name] = round(statistics.fmean(row[name][key] for row in rows), 1)
        for key in ("seconds", "model_seconds"):
            counters[key][name] = round(statistics.median(row[name][key] for row in rows), 4)
    counters["tokens"]["shared_kv_minimum"] = round(statistics.fmean(row["ours"]["needed"] for row in rows), 1)
    embed = statistics.fmean(row["published"]["embed_steps"] for row in rows)
    counters["model_steps"]["published_without_embeddings"] = round(counters["model_steps"]["published"] - embed, 1)
    return {
        "requests": len(rows), "new_tokens": statistics.fmean(len(row["ours"]["token_ids"]) for row in rows),
        "iterations": statistics.fmean(row["ours"]["iterations"] for row in rows), **counters,
    }  # fmt: skip


def crowd(rain: RAIN, count: int, limit: int, seed: int) -> Row:
    """Many requests in one call, and how many answers a second that makes."""
    decoder = raindecode.Decoder.from_pretrained("testbed", device="cpu")
    *prompts, other = [request.text for request in testbed.sample_requests(count + 1)]
    decoder.generate(other, search=rain, max_new_tokens=4)
    began = time.perf_counter()
    done = decoder.generate(prompts, search=rain, max_new_tokens=limit, seed=list(range(seed, seed + count)))
    seconds = time.perf_counter() - began
    return {
        "requests": count, "seconds": round(seconds, 3), "answers_per_second": round(count / seconds, 3),
        "tokens_charged": sum(d.stats.tokens_charged for d in done), "tokens_processed": sum(d.stats.tokens_processed for d in done),
    }  # fmt: skip


def show(record: Row) -> None:
    """The table."""
    table = Table(title="one answer; brackets: times raindecode's (width auto)", title_justify="left")
    for heading in ("regime", "engine", "model steps", "tokens run", "seconds", "in the model"):
        table.add_column(heading, justify="left" if heading in ("regime", "engine") else "right")
    for regime, numbers in record["regimes"].items():
        for name in ENGINES if numbers["requests"] else ():
            cells = []
            for key in ("model_steps", "tokens", "seconds", "model_seconds"):
                value, base = numbers[key][name], numbers[key]["ours"]
                cells.append(f"{value:,.3f}" if "seconds" in key else f"{value:,.0f}")
                if name != "ours" and base:
                    cells[-1] += f" ({value / base:.1f})"
            table.add_row(f"{regime}, {numbers['requests']}" if name == "ours" else "", name, *cells)
        table.add_section()
    Console(width=140).print(table)
    if "together" in record:
        crowd = record["together"]
        print(
            f"{crowd['requests']} together: {crowd['seconds']:.1f} s, {crowd['answers_per_second']:.2f} answers a second"
        )


if __name__ == "__main__":
    sys.exit(main())
