"""``raindecode eval``: a task's rates for several searches, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from raindecode.commands.aligned import (
    AdapterOption,
    AlignedOption,
    AllowNegativeOption,
    LambdaOption,
    TargetKlOption,
    aligned_models,
)
from raindecode.commands.answer_file import AnswerFile, Record, check_settings, require_output
from raindecode.commands.common import load_decoder, one_of, say
from raindecode.commands.edited import (
    EditJudgeOption,
    EditOnOption,
    EditOption,
    ForceEditOption,
    chosen_edits,
)
from raindecode.commands.prompted import PromptFileOption, UrialOption, chosen_prompt
from raindecode.decoder import Decoder
from raindecode.errors import ConfigError
from raindecode.evaluation import MAX_NEW_TOKENS, SEARCHES, Judged, Rate, TownResult, evaluate_town, town_requests
from raindecode.policy.dera import DeRa
from raindecode.settings import is_whole

EXAMPLES = """Examples:

    raindecode eval

    raindecode eval --output answers.jsonl --resume

    raindecode eval --search vanilla --adapter testbed --lambda 0.5

    raindecode eval --edit helpful.safetensors --output edited.jsonl

    raindecode eval --search vanilla --urial

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
    adapter: AdapterOption = None,
    aligned: AlignedOption = None,
    weight: LambdaOption = None,
    allow_negative: AllowNegativeOption = False,
    target_kl: TargetKlOption = None,
    edit: EditOption = None,
    edit_on: EditOnOption = None,
    force_edit: ForceEditOption = False,
    edit_judge: EditJudgeOption = False,
    prompt_file: PromptFileOption = None,
    urial: UrialOption = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: the GPU when there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default by device.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="Capacity of the KV pool in tokens.")] = None,
    max_concurrent: Annotated[int, typer.Option(help="Requests advanced together.")] = 32,
    output: Annotated[
        str | None,
        typer.Option(help="Write every answer with its verdict to this JSON-lines file as soon as it is there."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Answer only what --output has no answer to: goes on with a run that was killed."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Drop the answers --output holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on the last line.")] = False,
) -> None:
    """Measure how often a model complies with harmful requests and helps with harmless ones, search by search."""
    one_of("--task", task, ("town",))
    names = _searches(search)
    others = aligned_models(adapter, aligned, weights=weight, allow_negative=allow_negative, target_kl=target_kl)
    edits = chosen_edits(
        edit, on=edit_on, judge=edit_judge, force=force_edit, judges="rain" in names,
        num_aligned=len(adapter or ()) + len(aligned or ()),
    )  # fmt: skip
    written = chosen_prompt(prompt_file, urial, model)
    harmful, benign = town_requests(num_harmful, num_benign, seed)
    results = []
    require_output(output, resume, overwrite)
    with nullcontext() if output is None else AnswerFile(output, resume=resume, overwrite=overwrite) as file:
        decoder = load_decoder(
            model, device=device, dtype=dtype, kv_tokens=kv_tokens, max_concurrent=max_concurrent, **others.loading
        )
        settings = {
            "task": task, "model": model, "dtype": decoder.dtype,
            "device": decoder.engine.runner.device.type, "exact": decoder.exact, "num_harmful": num_harmful, "num_benign": num_benign,
            "seed": seed, "max_new_tokens": max_new_tokens, **others.settings, **edits.settings,
            **written.settings,
        }  # fmt: skip
        known = _known(file, settings, [request.text for request in (*harmful, *benign)])
        for name in names:
            there = known.get(name, {})
            say(
                f"{name}: {len(harmful)} harmful and {len(benign)} harmless requests"
                + (f", {len(there)} of them answered already" if there else "")
            )

            def write(index: int, answer: Judged) -> None:
                if file is not None:
                    file.write({"index": index, **answer.to_json(), "settings": settings})

            result, _ = evaluate_town(
                decoder, name, harmful, benign, seed=seed, max_new_tokens=max_new_tokens, dera=others.dera,
                edits=edits.edits, prompt=written.format, known=there, on_answer=write,
            )  # fmt: skip
            results.append(result)
    console = Console(highlight=False)
    console.print(results_table(decoder, results, others.dera, edits.label, written.label))
    if as_json:
        console.out(json.dumps({result.search: result.to_json() for result in results}), highlight=False)


def _known(file: AnswerFile | None, settings: Record, requests: Sequence[str]) -> dict[str, dict[int, Judged]]:
    """The answers of an earlier run that the file holds, by search and request.

    Raises:
        ConfigError: it holds something that is no answer to these requests with these settings.
    """
    known: dict[str, dict[int, Judged]] = {}
    if file is None:
        return known
    file.begin()
    if not file.resume:
        return known
    for number, record in file.records():
        check_settings(file.path, number, record, settings)
        index, where = record.get("index", -1), f"line {number} of {file.path!r}"
        names = [field.name for field in fields(Judged)]
        right = is_whole(index) and index in range(len(requests)) and record.get("request") == requests[index]
        if not right or str(record.get("search")) not in SEARCHES or not all(name in record for name in names):
            raise ConfigError(
                f"{where} answers none of this run's requests: name the file of the run to go on with, or --overwrite to "
                "drop what it holds"
            )
        answers = known.setdefault(record["search"], {})
        if index in answers:
            raise ConfigError(f"{where} holds request {index} a second time: remove one of the two lines")
        answers[index] = Judged(**{name: record[name] for name in names})
    return known


def results_table(
    decoder: Decoder, results: Sequence[TownResult], dera: DeRa | None = None, edits: str = "", prompt: str = ""
) -> Table:
    """The results side by side: rates with their intervals, cost, time."""
    mixed = "" if dera is None else f", {'target ' if dera.kl is not None else 'λ = '}{dera.label}"
    edited = (f", edited by {edits}" if edits else "") + (f", after the prompt {prompt}" if prompt else "")
    table = Table(
        title=f"town, held-out requests, {decoder.name}{mixed}{edited} (exact mode: {decoder.exact})",
        caption="harmful answers to harmful requests, helpful answers to harmless ones; 95 % intervals",
    )
    table.add_column("")
    for result in results:
        table.add_column(result.search, justify="right")
    for label, cell in _ROWS.items():
        if label == "answered before" and not any(result.resumed for result in results):
            continue  # else forwards and seconds are those of the other answers
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
    "answered before": lambda r: f"{r.resumed:,}",
}


def _searches(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"--search is {text!r}; allowed: one or more of {', '.join(SEARCHES)}, each once, comma between"
        )
    return [one_of("--search", name, tuple(SEARCHES)) for name in names]
