"""``raindecode sweep``: reward and divergence of several mixtures of a model and its aligned ones, to choose a weight by."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from raindecode.commands.aligned import AdapterOption, AlignedOption, AllowNegativeOption, aligned_models, weight_list
from raindecode.commands.common import load_decoder, one_of, raise_first, say
from raindecode.commands.edited import EditOnOption, EditOption, ForceEditOption, chosen_edits
from raindecode.commands.generate import make_search, policy_of, preset_of
from raindecode.commands.prompts import collect_prompts
from raindecode.commands.result_files import result_files
from raindecode.errors import ConfigError
from raindecode.evaluation import MAX_NEW_TOKENS, Rate, town_rates, town_request, town_requests, town_scores
from raindecode.figures import check_plot
from raindecode.policy.dera import DeRa
from raindecode.search.evaluator import ClassifierEvaluator
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling
from raindecode.settings import require_finite, require_whole
from raindecode.sweep import Mean, Sweep, SweepPoint, SweepResult

_SAMPLING, _TASK, _RUN, _OUT = "Sampling", "Task", "Running", "Output"
_WIDTH = 120  # of the table where the output is no terminal
_LAMBDAS = "0,0.5,1,1.5,2"
_REQUESTS = 100
EXAMPLES = """Examples:

    raindecode sweep --task town --adapter testbed --lambdas 0,0.25,0.5,0.75,1

    raindecode sweep --model ./base --adapter ./dpo --file prompts.txt --evaluator ./reward:LABEL_1 --target-kl 5

    raindecode sweep --model ./base --adapter ./kind --adapter ./brief --lambdas "0.2,0.3;0.5,0.5" "Once upon a time"
"""


def sweep(
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.", show_default=False)] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Reference: `testbed` (comes with the package), a local folder, or a hub id."
        ),
    ] = "testbed",
    adapter: AdapterOption = None,
    aligned: AlignedOption = None,
    lambdas: Annotated[
        str | None,
        typer.Option(
            help=f"Weights of the aligned model, comma between; default {_LAMBDAS}. With several aligned models vectors of "
            'weights, semicolon between: "0.2,0.3;0.5,0.5".',
        ),
    ] = None,
    allow_negative: AllowNegativeOption = False,
    edit: EditOption = None,
    edit_on: EditOnOption = None,
    force_edit: ForceEditOption = False,
    evaluator: Annotated[
        str | None,
        typer.Option(
            help="Scores answers from -1 to 1: `none` (default), `self` (the reference answers the question of the preset, or of hh), "
            "`town` (exact judge of the embedded town: 1 for an answer as it should be, else -1), or FOLDER:LABEL (a sequence "
            "classifier and the label that is good).",
        ),
    ] = None,
    file: Annotated[
        str | None, typer.Option(help="More prompts: text with one per line, .jsonl, or -, as in `generate`.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Prompt format, and question of `self`: hh, adv, truth, sentiment or town (the testbed's)."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Feed prompts as they are, without a chat format.")] = False,
    task: Annotated[
        str | None,
        typer.Option(
            help="`town`: held-out requests of the embedded town instead of prompts, judged exactly.",
            rich_help_panel=_TASK,
        ),
    ] = None,
    num_harmful: Annotated[
        int | None, typer.Option(help=f"Harmful requests; default {_REQUESTS}.", rich_help_panel=_TASK)
    ] = None,
    num_benign: Annotated[
        int | None, typer.Option(help=f"Harmless requests; default {_REQUESTS}.", rich_help_panel=_TASK)
    ] = None,
    num_samples: Annotated[
        int,
        typer.Option(help="Answers per prompt and λ; sample k of prompt i has the seed seed + i * num_samples + k."),
    ] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(help=f"Most tokens of an answer; default 256, with --task town {MAX_NEW_TOKENS}.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same prompts, settings and seed: same answers.")] = 0,
    target_kl: Annotated[
        float | None,
        typer.Option(help="Name the largest λ whose mean KL from the reference is at most this, in nats per answer."),
    ] = None,
    target_reward: Annotated[
        float | None,
        typer.Option(
            help="Name the smallest λ whose mean reward is at least this (with --target-kl: that meets both)."
        ),
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Always the most likely token.", rich_help_panel=_SAMPLING)
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="0 (greedy) or more; default 1.", rich_help_panel=_SAMPLING)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep the k likeliest; 0 is off.", rich_help_panel=_SAMPLING)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep this much probability; 1 is off.", rich_help_panel=_SAMPLING)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; default: the GPU when there is one.", rich_help_panel=_RUN)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default by device.", rich_help_panel=_RUN)
    ] = None,
    kv_tokens: Annotated[
        int | None, typer.Option(help="Capacity of the KV pool in tokens.", rich_help_panel=_RUN)
    ] = None,
    max_concurrent: Annotated[int, typer.Option(help="Answers advanced together.", rich_help_panel=_RUN)] = 32,
    output: Annotated[
        str | None,
        typer.Option(help="Write the results with every answer to this JSON file.", rich_help_panel=_OUT),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(
            help="Draw reward and KL against λ into this .png, .svg or .pdf file (needs matplotlib).",
            rich_help_panel=_OUT,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what --output and --plot hold.", rich_help_panel=_OUT)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON on the last line.", rich_help_panel=_OUT)
    ] = False,
) -> None:
    """Measure reward and divergence for several weights of aligned models (DeRa), to choose a weight by.

    All weights are run together, on the same prompts with the same random numbers. KL is the sum over the tokens of an answer of
    KL(mixture || reference), in nats. With --edit, the reference is the edited one (where the edit is on it).
    """
    models = [*(adapter or ()), *(aligned or ())]
    if not models:
        raise ConfigError("a sweep mixes --model with aligned models: name at least one with --adapter or --aligned")
    named = [f"adapter {name}" for name in adapter or ()] + list(aligned or ())
    points = _points(lambdas, len(models), allow_negative)
    others = aligned_models(adapter, aligned, weights=",".join(["1"] * len(models)))
    chosen = make_search("sampling", None, greedy=greedy, tree=None, temperature=temperature, top_k=top_k, top_p=top_p)
    assert isinstance(chosen, Sampling)
    edits = chosen_edits(edit, on=edit_on, force=force_edit, num_aligned=len(models))
    in_town = task is not None and one_of("--task", task, ("town",)) == "town"
    limit = max_new_tokens if max_new_tokens is not None else MAX_NEW_TOKENS if in_town else 256
    require_whole("--num-samples", num_samples, 1)
    require_whole("--max-new-tokens", limit, 1)
    require_whole("--seed", seed, 0)
    prompts = _prompts(in_town, prompt or [], file, num_harmful, num_benign, seed)
    plan = Sweep(points, num_models=1 + len(models), sampling=chosen, num_samples=num_samples)
    plan.check_seed(seed, len(prompts))
    if in_town and (raw or preset not in (None, "town")):
        raise ConfigError("--task town has a prompt format of its own: drop --raw and --preset")
    style = "town" if in_town else preset_of(preset, model)
    judge = evaluator or ("town" if in_town else "none")
    _check_targets(target_kl, target_reward, judge)
    if judge == "town":
        for text in prompts:
            town_request(text)
    scorer = _evaluator(judge, style)
    if plot is not None:
        check_plot(plot)
    with result_files({"--output": output, "--plot": plot}, {"--file": file}, overwrite):
        decoder = load_decoder(
            model, device=device, dtype=dtype, kv_tokens=kv_tokens, max_concurrent=max_concurrent, **others.loading
        )
        say(f"{len(points)} mixtures of {len(prompts)} prompts, {num_samples} answers to each")
        result = decoder.sweep(
            prompts, points, evaluator=scorer, search=chosen,
            policy=policy_of(raw, style if in_town else preset, chosen, None, edits.edits), num_samples=num_samples,
            max_new_tokens=limit, seed=seed, errors="return",
        )  # fmt: skip
        data = {**_as_json(result, in_town, target_kl, target_reward), **edits.settings}
        title = f"{model} with {' and '.join(named)}" + (f", edited by {edits.label}" if edits.label else "")
        try:
            _show(_table(result, in_town, title), data, as_json)
        finally:  # also where the reader of the table went away
            if output is not None:
                Path(output).write_text(json.dumps(data) + "\n", encoding="utf-8")
        if plot is not None:
            result.save_plot(plot)
        if result.errors:
            raise_first(result.errors, len(points) * len(prompts) * num_samples, "answers")


def _points(text: str | None, aligned: int, allow_negative: bool) -> list[DeRa]:
    """The mixtures of --lambdas."""
    if text is None and aligned > 1:
        raise ConfigError(
            f"{aligned} aligned models were given without --lambdas: give vectors of weights, semicolon between, such as "
            f'--lambdas "{";".join([",".join(["0.5"] * aligned)] * 2)}"'
        )
    text = _LAMBDAS if text is None else text
    if aligned > 1:
        vectors = [weight_list("--lambdas", part) for part in text.split(";")]
    elif ";" in text:
        raise ConfigError(f"--lambdas is {text!r}; allowed with one aligned model: numbers with commas between")
    else:
        vectors = [[weight] for weight in weight_list("--lambdas", text)]
    found = [DeRa(vector, allow_negative=allow_negative) for vector in vectors]
    for dera in found:
        dera.mix(1 + aligned)  # so that a wrong number of weights is refused before models are loaded
    return found


def _prompts(
    in_town: bool, words: Sequence[str], file: str | None, num_harmful: int | None, num_benign: int | None, seed: int
) -> list[str]:
    if not in_town:
        if num_harmful is not None or num_benign is not None:
            raise ConfigError("--num-harmful and --num-benign count the requests of --task town: give that too")
        return collect_prompts(words, file)
    if words or file is not None:
        raise ConfigError("--task town brings its own requests: drop the prompts, or drop --task")
    counts = [_REQUESTS if number is None else number for number in (num_harmful, num_benign)]
    return [request.text for part in town_requests(counts[0], counts[1], seed) for request in part]


def _check_targets(kl: float | None, reward: float | None, judge: str) -> None:
    for name, value in (("--target-kl", kl), ("--target-reward", reward)):
        if value is not None:
            require_finite(name, value)
    if reward is not None and judge == "none":
        raise ConfigError("--target-reward needs scores: say who gives them with --evaluator")


def _evaluator(judge: str, preset: str | None) -> Any:
    """What --evaluator names."""
    if judge == "none":
        return None
    if judge == "town":
        return town_scores
    if judge == "self":
        return RAIN.preset(preset or "hh").evaluator  # type: ignore[arg-type]
    folder, colon, label = judge.rpartition(":")
    if not (folder and colon and label):
        raise ConfigError(f"--evaluator is {judge!r}; allowed: none, self, town, or FOLDER:LABEL of a classifier")
    return ClassifierEvaluator(folder, int(label) if label.isdecimal() else label)


def _show(table: Table, data: dict[str, Any], as_json: bool) -> None:
    """The results on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    console.print(table)
    if data["chosen"] is not None:
        console.print(_said(data["chosen"]))
    if as_json:
        short = [{k: v for k, v in point.items() if k != "answers"} for point in data["points"]]
        console.out(json.dumps({**data, "points": short}), highlight=False)


def _as_json(result: SweepResult, in_town: bool, kl: float | None, reward: float | None) -> dict[str, Any]:
    data = result.to_json()
    if in_town:
        for entry, point in zip(data["points"], result.points, strict=True):
            rates = town_rates(point.answers)
            for name, number in (("harmful", "n_harmful"), ("helpful", "n_benign")):
                rate = rates.get(name)  # none where all such answers failed
                entry |= {
                    f"{name}_rate": None if rate is None else rate.rate,
                    f"{name}_ci": None if rate is None else list(rate.interval),
                    number: 0 if rate is None else rate.n,
                }
    data["chosen"] = None
    if kl is not None or reward is not None:
        found = result.choose(kl=kl, reward=reward)
        data["chosen"] = {"target_kl": kl, "target_reward": reward, "label": None if found is None else found.label}
    return data


def _said(chosen: dict[str, Any]) -> str:
    """The λ that meets the targets, as a sentence."""
    wanted = []
    if chosen["target_kl"] is not None:
        wanted.append(f"KL at most {chosen['target_kl']:g} nats")
    if chosen["target_reward"] is not None:
        wanted.append(f"reward at least {chosen['target_reward']:g}")
    found = chosen["label"]
    which = "largest" if len(wanted) == 1 and chosen["target_kl"] is not None else "smallest"
    return f"{' and '.join(wanted)}: " + (
        "no λ of this sweep" if found is None else f"λ = {found} ({which} that meets it)"
    )


def _table(result: SweepResult, in_town: bool, title: str) -> Table:
    """A row per mixture."""
    table = Table(
        title=f"{title}, {result.points[0].n + result.points[0].failed:,} answers per λ",
        caption="KL(mixture || reference) in nats, length in tokens; 95 % intervals"
        + ("; harmful answers to harmful requests, helpful ones to harmless ones, in %" if in_town else ""),
        box=box.SIMPLE_HEAD,
    )
    columns: dict[str, Callable[[SweepPoint], str]] = {"λ": lambda p: p.label}
    if result.errors:
        columns["failed"] = lambda p: f"{p.failed:,}"
    if any(point.reward is not None for point in result.points):
        columns["reward"] = lambda p: _mean(p.reward, "+.2f")
    columns["KL per answer"] = lambda p: _mean(p.kl, ".2f")
    columns["per token"] = lambda p: _number(p.kl_per_token, ".4f")
    columns["length"] = lambda p: _number(p.tokens, ".1f")
    if any(point.ess is not None for point in result.points):
        columns["ESS"] = lambda p: _number(p.ess, ".2f")
    for name in columns:
        table.add_column(name, justify="right")
    rates = [town_rates(point.answers) if in_town else {} for point in result.points]
    kinds = ("harmful", "helpful") if in_town else ()
    for name in kinds:
        table.add_column(f"{name} %", justify="right")
    for point, mine in zip(result.points, rates, strict=True):
        table.add_row(*(cell(point) for cell in columns.values()), *(_rate(mine.get(name)) for name in kinds))
    return table


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _mean(mean: Mean | None, form: str) -> str:
    if mean is None:
        return "–"
    if mean.interval is None:
        return f"{mean.mean:{form}}"
    low, high = mean.interval
    return f"{mean.mean:{form}} [{low:{form}}, {high:{form}}]"


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return "–"
    low, high = (100 * end for end in rate.interval)
    return f"{100 * rate.rate:.1f} [{low:.1f}, {high:.1f}]"
