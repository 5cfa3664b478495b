"""``raindecode eval --task town``: the embedded town's rates for several searches, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from raindecode.commands.aligned import AlignedModels
from raindecode.commands.answer_file import AnswerFile, Record, check_settings, require_output
from raindecode.commands.common import load_decoder, one_of, say
from raindecode.commands.edited import ChosenEdits
from raindecode.commands.prompted import ChosenPrompt
from raindecode.decoder import Decoder
from raindecode.errors import ConfigError
from raindecode.evaluation import SEARCHES, Judged, Rate, TownResult, evaluate_town, town_requests
from raindecode.policy.dera import DeRa
from raindecode.settings import is_whole


@dataclass(frozen=True)
class TownRun:
    """One run of the town task; the attributes are the command's options."""

    model: str
    searches: Sequence[str]
    num_harmful: int
    num_benign: int
    seed: int
    max_new_tokens: int
    others: AlignedModels
    edits: ChosenEdits
    written: ChosenPrompt
    loading: dict[str, Any]
    output: str | None
    resume: bool
    overwrite: bool
    as_json: bool

    def run(self) -> None:
        """Answer, judge, and show the rates.

        Raises:
            RainDecodeError: a setting is not allowed, or a request failed.
        """
        harmful, benign = town_requests(self.num_harmful, self.num_benign, self.seed)
        results = []
        require_output(self.output, self.resume, self.overwrite)
        with (
            nullcontext()
            if self.output is None
            else AnswerFile(self.output, resume=self.resume, overwrite=self.overwrite)
        ) as file:
            decoder = load_decoder(self.model, **self.loading, **self.others.loading)
            settings = {
                "task": "town", "model": self.model, "dtype": decoder.dtype,
                "device": decoder.engine.runner.device.type, "exact": decoder.exact, "num_harmful": self.num_harmful,
                "num_benign": self.num_benign, "seed": self.seed, "max_new_tokens": self.max_new_tokens,
                **self.others.settings, **self.edits.settings, **self.written.settings,
            }  # fmt: skip
            known = _known(file, settings, [request.text for request in (*harmful, *benign)])
            for name in self.searches:
                there = known.get(name, {})
                say(
                    f"{name}: {len(harmful)} harmful and {len(benign)} harmless requests"
                    + (f", {len(there)} of them answered already" if there else "")
                )

                def write(index: int, answer: Judged) -> None:
                    if file is not None:
                        file.write({"index": index, **answer.to_json(), "settings": settings})

                result, _ = evaluate_town(
                    decoder, name, harmful, benign, seed=self.seed, max_new_tokens=self.max_new_tokens,
                    dera=self.others.dera, edits=self.edits.edits, prompt=self.written.format, known=there, on_answer=write,
                )  # fmt: skip
                results.append(result)
        console = Console(highlight=False)
        console.print(results_table(decoder, results, self.others.dera, self.edits.label, self.written.label))
        if self.as_json:
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


def searches_of(text: str) -> list[str]:
    """The searches of a list with commas between.

    Raises:
        ConfigError: one is unknown or named twice, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"--search is {text!r}; allowed: one or more of {', '.join(SEARCHES)}, each once, comma between"
        )
    return [one_of("--search", name, tuple(SEARCHES)) for name in names]
