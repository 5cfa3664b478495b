"""``raindecode shift``: which tokens of a model's answers another model would not have written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from raindecode.commands.aligned import (
    AdapterOption,
    AlignedModels,
    AllowNegativeOption,
    LambdaOption,
    TargetKlOption,
    aligned_models,
)
from raindecode.commands.common import load_decoder, one_of, printable, raise_first, say
from raindecode.commands.edited import ChosenEdits, EditOnOption, EditOption, ForceEditOption, chosen_edits
from raindecode.commands.generate import policy_of, preset_of
from raindecode.commands.given_answers import GivenAnswer, read_answers
from raindecode.commands.prompted import ChosenPrompt, PromptFileOption, UrialOption, chosen_prompt
from raindecode.commands.prompts import collect_prompts
from raindecode.commands.result_files import result_files
from raindecode.errors import ConfigError
from raindecode.evaluation import MAX_NEW_TOKENS, town_requests
from raindecode.figures import SUFFIXES, check_plot
from raindecode.policy.policy import Policy
from raindecode.search.sampling import Sampling
from raindecode.settings import require_whole
from raindecode.token_shift import CLASSES, TokenShift, summary_rows

_TASK, _RUN, _OUT = "Task", "Running", "Output"
_REQUESTS = 100
_FIRST, _MOST = 8, 10  # positions of the curve and shifted tokens that are shown
EXAMPLES = """Examples:

    raindecode shift --task town --adapter testbed --output shift.html

    raindecode shift --task town --adapter testbed --lambda 0.5

    raindecode shift --base ./base --aligned ./chat --file prompts.txt --output shift.json --output shift.png

    raindecode shift --urial "How do I paint the fence of the baker?"

    raindecode shift --adapter testbed --answers answers.jsonl --json
"""


def shift(
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.", show_default=False)] = None,
    base: Annotated[
        str,
        typer.Option(
            "--base", "-m", help="Base model: `testbed` (comes with the package), a local folder, or a hub id."
        ),
    ] = "testbed",
    aligned: Annotated[
        list[str] | None,
        typer.Option(
            "--aligned",
            help="Aligned model with the base's tokenizer: a whole model, or the folder of an adapter. May be repeated.",
            rich_help_panel="Aligned models (DeRa)",
        ),
    ] = None,
    adapter: AdapterOption = None,
    weight: LambdaOption = None,
    allow_negative: AllowNegativeOption = False,
    target_kl: TargetKlOption = None,
    edit: EditOption = None,
    edit_on: EditOnOption = None,
    force_edit: ForceEditOption = False,
    prompt_file: PromptFileOption = None,
    urial: UrialOption = False,
    file: Annotated[
        str | None, typer.Option(help="More prompts: text with one per line, .jsonl, or -, as in `generate`.")
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option(
            help="Read these answers instead of writing some: a .jsonl file of `generate --output`, prompts included."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Prompt format of the base, and of the aligned side unless it has a prompt of its own."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Feed prompts as they are, without a chat format.")] = False,
    task: Annotated[
        str | None,
        typer.Option(help="`town`: held-out requests of the embedded town instead of prompts.", rich_help_panel=_TASK),
    ] = None,
    num_harmful: Annotated[
        int | None, typer.Option(help=f"Harmful requests; default {_REQUESTS}.", rich_help_panel=_TASK)
    ] = None,
    num_benign: Annotated[
        int | None, typer.Option(help=f"Harmless requests; default {_REQUESTS}.", rich_help_panel=_TASK)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the task's requests.", rich_help_panel=_TASK)] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(help=f"Most tokens of an answer; default 256, with --task town {MAX_NEW_TOKENS}.")
    ] = None,
    top: Annotated[int, typer.Option(help="Candidates of the base to note per token.")] = 5,
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
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the results to this file: .json (everything), .html (a page to look at), .png, .svg or .pdf (the curve; "
            "needs matplotlib). May be repeated.",
            rich_help_panel=_OUT,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what the files of --output hold.", rich_help_panel=_OUT)
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the results without answers as JSON on the last line.", rich_help_panel=_OUT
        ),
    ] = False,
) -> None:
    """Show which tokens alignment changes: the aligned model answers, and the base model says how it ranks every token.

    Aligned is what the options name: a model, an adapter, a mixture (--lambda), an edit, a constant prompt, or several of these together.
    A token is unshifted where it is the base's most likely one, marginal at rank 2 or 3, and shifted beyond.
    """
    side = _aligned_side(
        base, aligned, adapter, edit, edit_on=edit_on, force=force_edit, prompt=chosen_prompt(prompt_file, urial, base),
        weights=weight, allow_negative=allow_negative, target_kl=target_kl,
    )  # fmt: skip
    in_town = task is not None and one_of("--task", task, ("town",)) == "town"
    given = None if answers is None else read_answers(answers)
    if given is not None and (prompt or file is not None or in_town or max_new_tokens is not None):
        raise ConfigError(
            "--answers brings prompts and answers: drop the prompts, --file, --task and --max-new-tokens, or drop --answers"
        )
    limit = max_new_tokens if max_new_tokens is not None else MAX_NEW_TOKENS if in_town else 256
    require_whole("--max-new-tokens", limit, 1)
    require_whole("--top", top, 1)
    require_whole("--seed", seed, 0)
    if in_town and (raw or preset not in (None, "town")):
        raise ConfigError("--task town has a prompt format of its own: drop --raw and --preset")
    if raw and preset is not None:
        raise ConfigError("--raw and --preset exclude each other: each says how prompts are written; give one")
    preset_of(preset, base)
    prompts = _prompts(given, in_town, prompt or [], file, num_harmful, num_benign, seed)
    plain = policy_of(raw, "town" if in_town else preset, Sampling.greedy(), None)
    policy = Policy(side.prompt.format or plain.prompt, side.models.dera, side.edits.edits)
    with _written(output or [], {"--file": file, "--answers": answers}, overwrite):
        decoder = load_decoder(
            base, device=device, dtype=dtype, kv_tokens=kv_tokens, max_concurrent=max_concurrent, **side.models.loading
        )
        say(f"{len(prompts)} answer{'s' * (len(prompts) > 1)} of {side.label}, read by {base}")
        found = decoder.token_shift(
            plain, policy, prompts, answers=None if given is None else [one.as_given(decoder.codec) for one in given],
            max_new_tokens=limit, top=top, errors="return",
        )  # fmt: skip
        found = replace(found, base=base, aligned=side.label)
        try:
            _show(found, as_json)
        finally:  # also where the reader of the table went away
            for path in output or ():
                _write(found, path)
        if found.errors:
            raise_first(found.errors, len(prompts), "answers")


@dataclass(frozen=True)
class _Side:
    """What the options say the aligned side is."""

    models: AlignedModels
    edits: ChosenEdits
    prompt: ChosenPrompt
    label: str


def _aligned_side(
    base: str, aligned: Sequence[str] | None, adapters: Sequence[str] | None, edit: Sequence[str] | None, *,
    edit_on: str | None, force: bool, prompt: ChosenPrompt, **mixing: Any,
) -> _Side:  # fmt: skip
    """The aligned side, checked as far as that goes before models are loaded.

    Raises:
        ConfigError: it is no other than the base, or an option is not allowed.
    """
    folders = [name for name in aligned or () if (Path(name) / "adapter_config.json").is_file()]
    adapters = [*(adapters or ()), *folders]
    models = aligned_models(adapters, [name for name in aligned or () if name not in folders], **mixing)
    edits = chosen_edits(edit, on=edit_on, force=force, judges=False, num_aligned=len(models.adapters + models.models))
    if models.dera is None and not edits.edits and prompt.format is None:
        raise ConfigError(
            "there is nothing to compare the base with: name an aligned model (--aligned, --adapter), an edit (--edit) or a prompt "
            "(--urial, --prompt-file)"
        )
    if models.dera is not None and edits.edits and edits.edits[0].on == "reference":
        mix = models.dera.mix(1 + len(models.adapters + models.models))
        if not mix.models & 1:
            raise ConfigError(
                "the edit is on the base, which has no part in the aligned side (λ is 1): give --edit-on aligned or both, "
                "or another --lambda"
            )
    parts = [f"adapter {name}" for name in models.adapters] + list(models.models)
    if models.dera is None:
        parts.append(base)
    elif models.dera.weights != (1.0,) or models.dera.kl is not None:
        parts.append(models.dera.label if models.dera.kl is not None else f"λ {models.dera.label}")
    if edits.label:
        parts.append(f"edited by {edits.label}")
    if prompt.label:
        parts.append(f"prompt {prompt.label}")
    return _Side(models, edits, prompt, ", ".join(parts))


def _prompts(
    given: Sequence[GivenAnswer] | None, in_town: bool, words: Sequence[str], file: str | None, num_harmful: int | None,
    num_benign: int | None, seed: int,
) -> list[str]:  # fmt: skip
    if not in_town and (num_harmful is not None or num_benign is not None):
        raise ConfigError("--num-harmful and --num-benign count the requests of --task town: give that too")
    if given is not None:
        return [one.prompt for one in given]
    if not in_town:
        return collect_prompts(words, file)
    if words or file is not None:
        raise ConfigError("--task town brings its own requests: drop the prompts, or drop --task")
    counts = [_REQUESTS if number is None else number for number in (num_harmful, num_benign)]
    return [request.text for part in town_requests(counts[0], counts[1], seed) for request in part]


@contextmanager
def _written(paths: Sequence[str], others: Mapping[str, str | None], overwrite: bool) -> Iterator[None]:
    """The files of --output, refused before anything has run where they cannot be written."""
    for path in paths:
        suffix = Path(path).suffix.lower()
        if suffix not in (".json", ".html", *SUFFIXES):
            raise ConfigError(f"--output is {path!r}; allowed: files that end in .json, .html, {', '.join(SUFFIXES)}")
        if suffix in SUFFIXES:
            check_plot(path)
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise ConfigError("--output names a file twice: give each a name of its own")
    named: dict[str, str | None] = {f"--output {path}": path for path in paths} or {"--output": None}
    with result_files(named, others, overwrite):
        yield


def _write(found: TokenShift, path: str) -> None:
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        Path(path).write_text(json.dumps(found.to_json()) + "\n", encoding="utf-8")
    elif suffix == ".html":
        found.write_html(path)
    else:
        found.plot(path)


def _show(found: TokenShift, as_json: bool) -> None:
    """The results on stdout."""
    console = Console(highlight=False)
    title = printable(f"{found.aligned}, read by {found.base}")
    summary = Table(title=title, box=box.SIMPLE_HEAD, show_header=False)
    for row in summary_rows(found.summary):
        summary.add_row(*row)
    console.print(summary)
    if found.curve:
        console.print(_curve(found.curve[:_FIRST]))
    if found.most_shifted:
        console.print(_most(found.most_shifted[:_MOST]))
    if as_json:
        console.out(json.dumps(found.to_json(answers=False)), highlight=False)


def _curve(points: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="first positions", box=box.SIMPLE_HEAD)
    for name in ("position", "answers", *(f"{name} %" for name in CLASSES), "KL, nats"):
        table.add_column(name, justify="right")
    for point in points:
        shares = [f"{100 * point[name]:.1f}" for name in CLASSES]
        kl = "–" if point["kl"] is None else f"{point['kl']:.3f}"
        table.add_row(str(point["position"]), f"{point['n']:,}", *shares, kl)
    return table


def _most(tokens: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="most shifted tokens", box=box.SIMPLE_HEAD)
    for name in ("token", "shifted", "seen", "share %"):
        table.add_column(name, justify="left" if name == "token" else "right")
    for one in tokens:
        # As a literal, so that spaces and line ends show.
        table.add_row(
            json.dumps(printable(one["token"]), ensure_ascii=False).replace("[", r"\["),
            f"{one['shifted']:,}", f"{one['seen']:,}", f"{100 * one['share']:.1f}",
        )  # fmt: skip
    return table
