"""``raindecode fit-edit``: finds directions in what a model itself says and writes them as a file of edits (AlignEZ)."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from raindecode.commands.common import load_decoder, say
from raindecode.commands.edit_report import (
    edit_facts,
    edit_lines,
    pair_facts,
    pair_line,
    print_lines,
    print_table,
    seconds_line,
)
from raindecode.commands.fitting import QUESTIONS, Timed, check_output, fit_settings, making, questions_of
from raindecode.commands.result_files import result_files
from raindecode.errors import ConfigError
from raindecode.figures import check_plot
from raindecode.hidden_edits import TAPS
from raindecode.policy.alignez.figure import save_diagnostics
from raindecode.policy.alignez.fit import check_context, diagnose_pairs, fit, given_layers
from raindecode.policy.alignez.pairs import PairSet, read_pairs
from raindecode.policy.alignez.presets import PRESETS

_PAIRS, _FIT, _RUN, _OUT = "Pairs", "Fit (default: as the preset)", "Running", "Output"
EXAMPLES = """Examples:

    raindecode fit-edit --task town --output helpful.safetensors

    raindecode fit-edit --model ./my-llama --file questions.txt --save-pairs pairs.jsonl --output helpful.safetensors

    raindecode fit-edit --model ./my-llama --pairs preferences.jsonl --preset svd-diff --output other.safetensors

    raindecode fit-edit --model ./my-llama --pairs pairs.jsonl --preset mean-diff --layers 12, --positions all -o kind.gguf

    raindecode fit-edit --model ./my-llama --pairs pairs.jsonl --report-only --plot layers.png

Then: `raindecode generate --edit helpful.safetensors "..."`
"""


def fit_edit(
    question: Annotated[
        list[str] | None, typer.Argument(help="Questions, each in quotes, to make pairs of.", show_default=False)
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="`testbed` (comes with the package), a local folder, or a hub id.")
    ] = "testbed",
    file: Annotated[
        str | None,
        typer.Option(
            "--file", "--prompts", help="More questions: text with one per line, .jsonl, or -, as in `generate`."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="`town`: training requests of the embedded town instead of questions of yours.")
    ] = None,
    questions: Annotated[
        int | None, typer.Option(help=f"How many requests of --task town; default {QUESTIONS}.")
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            help="Fit on these pairs instead of making some: a .jsonl file of --save-pairs, or of preference data with `prompt`, "
            "`chosen` and `rejected` per line."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the requests, the answers and the fit.")] = 0,
    elicitation: Annotated[
        str | None,
        typer.Option(
            help="What the model is asked: `published` (the paper's words: a helpful and a misleading assistant) or `testbed` "
            "(forms the embedded model knows). Default: testbed for the testbed, else published.",
            rich_help_panel=_PAIRS,
        ),
    ] = None,
    answers: Annotated[int | None, typer.Option(help="Pairs per question; default 1.", rich_help_panel=_PAIRS)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer; default 128.", rich_help_panel=_PAIRS)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the answers; default 1.", rich_help_panel=_PAIRS)
    ] = None,
    similarity: Annotated[
        float | None,
        typer.Option(
            help="Pairs whose answers are more alike (cosine of mean hidden states of layer 0) are dropped; default 0.98, 1 drops "
            "identical texts only.",
            rich_help_panel=_PAIRS,
        ),
    ] = None,
    save_pairs: Annotated[
        str | None,
        typer.Option(
            help="Keep the pairs in this JSON-lines file as they are made. A run that was killed goes on from it: give the same "
            "command again.",
            rich_help_panel=_PAIRS,
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help=f"Which directions, and what is done along them: {', '.join(PRESETS)}. svd and ccs reject the harmful direction "
            "and boost the helpful one (AlignEZ 2024), svd-knn does so with directions of each request's own, svd-diff bends "
            "all directions of the differences (AlignEZ 2025); mean-diff and logistic add one (baselines).",
            rich_help_panel=_FIT,
        ),
    ] = "svd",
    tap: Annotated[str | None, typer.Option(help=f"Where in a layer: {', '.join(TAPS)}.", rich_help_panel=_FIT)] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            help="State of an answer: that of its `last` token, the `mean` over it, or that before its first (`prompt`, with "
            "--context elicited).",
            rich_help_panel=_FIT,
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="What stands before an answer: the `question`, or the text it was `elicited` by (pairs the model made).",
            rich_help_panel=_FIT,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="`all`; a share (`half`, `0.75`) or how many (`3`), those of the least CCS loss; or which, counted from 0 (`4,7`; one "
            "alone: `4,`).",
            rich_help_panel=_FIT,
        ),
    ] = None,
    normalize: Annotated[
        str | None,
        typer.Option(
            help="What CCS takes out of the states first: the mean of each side (`per_side`), of both (`joint`), or `none`.",
            rich_help_panel=_FIT,
        ),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Strength of every operation.", rich_help_panel=_FIT)] = None,
    rank: Annotated[
        int | None, typer.Option(help="Most directions per layer (svd-diff).", rich_help_panel=_FIT)
    ] = None,
    neighbours: Annotated[
        int | None, typer.Option(help="Nearest questions per request (svd-knn).", rich_help_panel=_FIT)
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Which rows are edited: `all`, `last` or `none` of the prompt and all that are generated, or of these a window "
            "counted from 0 and without its end: `last:0-8`, `none:4-`.",
            rich_help_panel=_FIT,
        ),
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
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.", rich_help_panel=_RUN)
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="The file to write: .safetensors, or .gguf (a control vector) where the edit only adds.",
            rich_help_panel=_OUT,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", "--force", help="Replace what --output and --plot hold.", rich_help_panel=_OUT),
    ] = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Also print what the pairs say layer by layer: at every tap, or only at that of --tap.",
            rich_help_panel=_OUT,
        ),
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Print that and fit nothing.", rich_help_panel=_OUT)
    ] = False,
    plot: Annotated[
        str | None,
        typer.Option(help="Draw that into this .png, .svg or .pdf file (needs matplotlib).", rich_help_panel=_OUT),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was found as JSON on the last line.", rich_help_panel=_OUT)
    ] = False,
) -> None:
    """Find directions of hidden states in a model's own good and bad answers, and write them as a file for --edit (AlignEZ).

    The model is asked what a helpful and a misleading answer to each question would be, and then for an answer of either kind.
    No human labels are needed; pairs of your own can be given with --pairs.
    """
    settings = fit_settings(
        preset, tap=tap, pool=pool, context=context, layers=layers, normalize=normalize, alpha=alpha, rank=rank, neighbours=neighbours,
        positions=positions, seed=seed,
    )  # fmt: skip
    check_output(output, report_only, settings)
    if plot is not None:
        check_plot(plot)
    maker = None
    if pairs is None:
        maker = making(
            questions_of(question or [], file, task, questions, seed), model, elicitation=elicitation, answers=answers,
            max_new_tokens=max_new_tokens, temperature=temperature, similarity=similarity, seed=seed, out=save_pairs,
        )  # fmt: skip
    else:
        _check_alone(
            questions=bool(question) or None, file=file, task=task, save_pairs=save_pairs, elicitation=elicitation, answers=answers,
            max_new_tokens=max_new_tokens, temperature=temperature, similarity=similarity,
        )  # fmt: skip
    with result_files(
        {"--output": output, "--plot": plot}, {"--file": file, "--pairs": pairs, "--save-pairs": save_pairs}, overwrite
    ):
        given = None if pairs is None else read_pairs(pairs)
        if given is not None:
            check_context(given, settings)
        decoder = load_decoder(
            model, device=device, dtype=dtype, kv_tokens=kv_tokens, max_concurrent=max_concurrent,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        num_layers = decoder.identities[0].num_layers
        given_layers(settings, num_layers)  # so that a layer there is none of is refused before pairs are made
        seconds: dict[str, float] = {}
        if maker is not None:
            started = time.perf_counter()
            given = maker.make(decoder)
            seconds["making_pairs"] = time.perf_counter() - started
        assert isinstance(given, PairSet)
        facts: dict[str, Any] = {"model": model, "pairs": pair_facts(given)}
        print_lines(pair_line(facts["pairs"]))
        timed = Timed(decoder)
        if not report_only:
            say(f"fitting {preset} on {len(given)} pairs")
            started = time.perf_counter()
            edit = fit(timed, given, settings)
            seconds["hidden_states"] = timed.seconds
            seconds["fit"] = time.perf_counter() - started - timed.seconds
            assert output is not None
            edit.save(output)
            facts |= {"preset": preset, **edit_facts(edit, settings), "output": output}
            print_lines(*edit_lines(facts, num_layers), f"written: {output}")
        if report or report_only or plot is not None:
            taps = TAPS if tap is None else (settings.tap,)
            say(f"looking at {num_layers} layers at {', '.join(taps)}")
            started = time.perf_counter()
            found = diagnose_pairs(timed, given, settings, taps=taps)
            seconds["report"] = time.perf_counter() - started
            facts["report"] = found.to_json()
            if report or report_only:
                print_table(found)
            if plot is not None:
                save_diagnostics(plot, found)
        print_lines(seconds_line(seconds))
        if as_json:
            print_lines(json.dumps({**facts, "seconds": {name: round(value, 3) for name, value in seconds.items()}}))


def _check_alone(**options: Any) -> None:
    """Refuse options about pairs that are to be made.

    Raises:
        ConfigError: there are some.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(
            f"{', '.join(given)} is about pairs that the model makes, and --pairs brings pairs: drop one of them"
        )
