"""What one answer costs: RAIN of raindecode beside baselines on plain transformers, on the testbed's model.

    python benchmarks/naive/compare.py [--requests 5] [--preset town] [--max-new-tokens 64] [--seed 0] [--without published]...

    published   RAIN, the published code's caching habits, batch 1
    strong      RAIN as a competent user of transformers writes it
    vanilla     cached sampling
    raindecode  RAIN of this package, one request at a time

All see the same prompts, stop rules and named random numbers, in float32, one request after another, once each is warm
(judge's examples cached where they are kept). Tokens are those run through forwards. Prints a table, then one JSON line; exit
code 1 when an answer of published or strong is not raindecode's. Under published, "embed" is the language model standing in
for the sentence encoder of the published code: one forward over the whole path per level. Times are single runs; the
search's book-keeping ("select") is plain Python in the baselines.

Importing raindecode sets MKL's strict mode for the whole process, the baselines included. What plain transformers does
without it shows with MKL_CBWR=AUTO and --without raindecode: on shapes above the testbed's one row is faster so, ten rows
need not be.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import raindecode  # noqa: E402  before torch: asks MKL for reproducible results
from naive.common import PHASES, Result, make_codec, make_request  # noqa: E402
from naive.published import Published  # noqa: E402
from naive.strong import Strong  # noqa: E402
from naive.vanilla import Vanilla  # noqa: E402
from raindecode import testbed  # noqa: E402
from raindecode.search.rain import RAIN, Preset  # noqa: E402

ENGINES = ("published", "strong", "vanilla", "raindecode")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5)
    parser.add_argument("--preset", choices=get_args(Preset), default="town")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the first request; the next ones have the next")
    parser.add_argument("--without", choices=ENGINES, action="append", default=[], help="leave an engine out")
    arguments = parser.parse_args(argv)
    rows = compare(
        RAIN.preset(arguments.preset), arguments.requests, arguments.max_new_tokens, arguments.seed,
        [name for name in ENGINES if name not in arguments.without],
    )  # fmt: skip
    show(rows)
    print(json.dumps({"preset": arguments.preset, "model": "testbed", "answers": rows}))
    return int(any(row["same_answer"] is False for row in rows))


def compare(rain: RAIN, num_requests: int, max_new_tokens: int, seed: int, engines: list[str]) -> list[dict[str, Any]]:
    """Every engine's answer to every request, as plain data."""
    model = AutoModelForCausalLM.from_pretrained(testbed.WEIGHTS, dtype=torch.float32)
    codec = make_codec(model, AutoTokenizer.from_pretrained(testbed.WEIGHTS))
    baselines: dict[str, Any] = {
        "published": Published(model, codec, rain), "strong": Strong(model, codec, rain), "vanilla": Vanilla(model, codec),
    }  # fmt: skip
    decoder = raindecode.Decoder.from_pretrained("testbed", device="cpu") if "raindecode" in engines else None

    def answer(name: str, prompt: str, limit: int, seed: int) -> dict[str, Any]:
        if name == "raindecode":
            assert decoder is not None
            return ours(decoder, prompt, rain, max_new_tokens=limit, seed=seed)
        request = make_request(prompt, codec, rain.format, max_new_tokens=limit, seed=seed)
        return measured(name, baselines[name].answer(request))

    *prompts, other = [request.text for request in testbed.sample_requests(num_requests + 1)]
    for name in engines:
        answer(name, other, 4, 0)
    rows: list[dict[str, Any]] = []
    for index, prompt in enumerate(prompts):
        found = {name: answer(name, prompt, max_new_tokens, seed + index) for name in engines}
        for name, row in found.items():
            comparable = name in ("published", "strong") and "raindecode" in found
            same = row["token_ids"] == found["raindecode"]["token_ids"] if comparable else None
            rows.append({"request": index, **row, "same_answer": same})
    return rows


def measured(name: str, result: Result) -> dict[str, Any]:
    """A baseline's answer as plain data."""
    meter = result.meter
    return {
        "engine": name, "model_steps": result.model_steps, "tokens_processed": result.tokens_processed,
        "seconds": result.seconds, "iterations": result.iterations, "evaluations": result.evaluations,
        "token_ids": result.token_ids, "steps_by_phase": meter.steps, "tokens_by_phase": meter.tokens,
        "seconds_by_phase": meter.seconds, "model_seconds": sum(meter.model_seconds.values()),
    }  # fmt: skip


def ours(decoder: raindecode.Decoder, prompt: str, rain: RAIN, **options: Any) -> dict[str, Any]:
    """raindecode's answer in the same words. Its tokens are the rows it ran (`tokens_charged`)."""
    began = time.perf_counter()
    (done,) = decoder.generate(prompt, search=rain, **options)
    seconds = time.perf_counter() - began
    stats = done.stats
    return {
        "engine": "raindecode", "model_steps": stats.model_steps, "tokens_processed": stats.tokens_charged,
        "distinct_prefixes": stats.tokens_processed, "seconds": seconds, "iterations": stats.iterations,
        "evaluations": stats.evaluations, "token_ids": done.token_ids, "model_seconds": stats.seconds["model"],
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """The table. Phases read generate + evaluate + embed (+ select)."""
    table = Table(title="cost of each answer; phases: generate + evaluate + embed (+ select)", title_justify="left")
    table.add_column("request")
    table.add_column("engine")
    for heading in ("tokens", "iterations", "verdicts", "model steps", "tokens run", "seconds", "in the model", "same"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        parts = {key: row.get(f"{key}_by_phase") for key in ("steps", "tokens", "seconds")}
        table.add_row(
            str(row["request"]), row["engine"], str(len(row["token_ids"])), str(row["iterations"]),
            str(row["evaluations"]), split(row["model_steps"], parts["steps"]),
            split(row["tokens_processed"], parts["tokens"]), split(row["seconds"], parts["seconds"]),
            f"{row['model_seconds']:.2f}", {None: "", True: "yes", False: "NO"}[row["same_answer"]],
        )  # fmt: skip
        if row is rows[-1] or rows[rows.index(row) + 1]["request"] != row["request"]:
            table.add_section()
    Console(width=180).print(table)


def split(total: float, parts: dict[str, float] | None) -> str:
    """A number and, in brackets, its parts by phase."""
    text = "{:.2f}" if isinstance(total, float) else "{}"
    if not parts or not parts["evaluate"]:
        return text.format(total)
    shown = [parts[phase] for phase in PHASES if phase != "select" or isinstance(total, float)]
    return f"{text.format(total)} ({' + '.join(text.format(part) for part in shown)})"


if __name__ == "__main__":
    sys.exit(main())
