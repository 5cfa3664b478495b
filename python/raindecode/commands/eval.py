"""``raindecode eval``: a task's rates for several searches, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from raindecode.commands.common import load_decoder, one_of, say
from raindecode.commands.output import open_for_writing
from raindecode.decoder import Decoder
from raindecode.errors import ConfigError
from raindecode.evaluation import MAX_NEW_TOKENS, SEARCHES, Rate, TownResult, evaluate_town, town_requests

EXAMPLES = """Examples:

    raindecode eval

    raindecode eval --num-harmful 50 --num-benign 50 --search rain --json | tail -n 1
"""


def evaluate(
    task: Annotated[
        str, typer.Option(help="`town`: held-out requests of the embedded town and its exact judge.")
    ] = "town",
    model: Annotated[
        str, typer.Option("--model", "-m", help="`testbed` (comes with the package), a local folder, or a hub id.")
    ] = "testbed",
    search: Annotated[
        str, typer.Option(help=f"Searches to compare, comma between: {', '.join(SEARCHES)}.")
    ] = "vanilla,rain",
    num_harmful: Annotated[int, typer.Option(help="Harmful requests, 1 to 20000.")] = 400,
    num_benign: Annotated[int, typer.Option(help="Harmless requests, 1 to 20000.")] = 400,
    seed: Annotated[int, typer.Option(help="Chooses the requests; request i is answered with seed + i.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = MAX_NEW_TOKENS,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: the GPU when there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default by device.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="Capacity of the KV pool in tokens.")] = None,
    max_concurrent: Annotated[int, typer.Option(help="Requests advanced together.")] = 32,
    output: Annotated[
        str | None, typer.Option(help="Write every answer with its verdict to this JSON-lines file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on the last line.")] = False,
) -> None:
    """Measure how often a model complies with harmful requests and helps with harmless ones, search by search."""
    one_of("--task", task, ("town",))
    names = _searches(search)
    harmful, benign = town_requests(num_harmful, num_benign, seed)
    results = []
    with nullcontext() if output is None else open_for_writing(output) as file:
        decoder = load_decoder(model, device=device, dtype=dtype, kv_tokens=kv_tokens, max_concurrent=max_concurrent)
        for name in names:
            say(f"{name}: {len(harmful)} harmful and {len(benign)} harmless requests")
            result, answers = evaluate_town(decoder, name, harmful, benign, seed=seed, max_new_tokens=max_new_tokens)
            results.append(result)
            if file is not None:
                file.writelines(json.dumps(answer.to_json()) + "\n" for answer in answers)
                file.flush()
    console = Console(highlight=False)
    console.print(results_table(decoder, results))
    if as_json:
        console.out(json.dumps({result.search: result.to_json() for result in results}), highlight=False)


def results_table(decoder: Decoder, results: Sequence[TownResult]) -> Table:
    """The results side by side: rates with their intervals, cost, time."""
    table = Table(
        title=f"town, held-out requests, {decoder.name} (exact mode: {decoder.exact})",
        caption="harmful answers to harmful requests, helpful answers to harmless ones; 95 % intervals",
    )
    table.add_column("")
    for result in results:
        table.add_column(result.search, justify="right")
    for label, cell in _ROWS.items():
        table.add_row(label, *(cell(result) for result in results))
    return table


def _rate(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.rate:.1%}  [{low:.1%}, {high:.1%}]"


_ROWS: dict[str, Any] = {
    "harmful answers": lambda r: _rate(r.harmful),
    "helpful answers": lambda r: _rate(r.helpful),
    "requests": lambda r: f"{r.harmful.n} + {r.helpful.n}",
    "forwards": lambda r: f"{r.model_steps:,}",
    "tokens processed per answer": lambda r: f"{r.tokens_processed / r.n:,.0f}",
    "iterations per answer": lambda r: f"{r.iterations / r.n:,.1f}",
    "evaluations per answer": lambda r: f"{r.evaluations / r.n:,.1f}",
    "seconds": lambda r: f"{r.seconds:,.1f}",
}


def _searches(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"--search is {text!r}; allowed: one or more of {', '.join(SEARCHES)}, each once, comma between"
        )
    return [one_of("--search", name, tuple(SEARCHES)) for name in names]
