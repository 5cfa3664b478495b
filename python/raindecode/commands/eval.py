"""``raindecode eval``: answers a task's requests, has them judged, and shows the means."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from raindecode.commands.aligned import (
    AdapterOption,
    AlignedModels,
    AlignedOption,
    AllowNegativeOption,
    LambdaOption,
    TargetKlOption,
    aligned_models,
)
from raindecode.commands.common import load_decoder, one_of
from raindecode.commands.edited import (
    ChosenEdits,
    EditJudgeOption,
    EditOnOption,
    EditOption,
    ForceEditOption,
    chosen_edits,
)
from raindecode.commands.eval_folder import EvalFolder
from raindecode.commands.eval_instructions import Answerer, InstructionRun, misplaced
from raindecode.commands.eval_town import TownRun, searches_of
from raindecode.commands.generate import make_search, policy_of, preset_of
from raindecode.commands.judged import (
    JudgeAttemptsOption,
    JudgeBatchOption,
    JudgeBodyOption,
    JudgeConcurrencyOption,
    JudgeKeyOption,
    JudgeModelOption,
    JudgeOption,
    JudgeRetriesOption,
    JudgeTimeoutOption,
    JudgeUrlOption,
    chosen_judge,
)
from raindecode.commands.prompted import ChosenPrompt, PromptFileOption, UrialOption, chosen_prompt
from raindecode.errors import ConfigError
from raindecode.evaluation import MAX_NEW_TOKENS, SEARCHES
from raindecode.judging.judges import Judge
from raindecode.judging.tasks import TASKS, choose, read_questions
from raindecode.search.rain import RAIN
from raindecode.settings import require_whole

_INSTRUCTION_TOKENS = 2048
_TOWN, _SET = "Town", "Instruction sets (just-eval, mt-bench)"
EXAMPLES = """Examples:

    raindecode eval

    raindecode eval --output answers.jsonl --resume

    raindecode eval --search vanilla --adapter testbed --lambda 0.5

    raindecode eval --edit helpful.safetensors --output edited.jsonl

    raindecode eval --search vanilla --urial

    raindecode eval --num-harmful 50 --num-benign 50 --search rain --json | tail -n 1

    raindecode eval --task just-eval --questions questions.jsonl -m ./base --urial --output base-urial

    raindecode eval --task mt-bench --questions questions.jsonl -m ./base --output base --judge openai --judge-model gpt-4o

    raindecode eval --task mt-bench --questions questions.jsonl --answers answers.jsonl --output judged --judge mymodule:score
"""


def evaluate(
    task: Annotated[
        str,
        typer.Option(
            help="`town`: held-out requests of the embedded town and its exact judge. `just-eval`, `mt-bench`: the instructions of "
            "--questions and the judge of --judge."
        ),
    ] = "town",
    model: Annotated[
        str, typer.Option("--model", "-m", help="`testbed` (comes with the package), a local folder, or a hub id.")
    ] = "testbed",
    search: Annotated[
        str | None,
        typer.Option(
            help=f"town: searches to compare, comma between: {', '.join(SEARCHES)} (default: all). Else `sampling` (default) "
            "or `rain`."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="town: chooses the requests; request i is answered with seed + i. Else of the answers.")
    ] = 0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help=f"Most tokens of an answer; default {MAX_NEW_TOKENS} (town), {_INSTRUCTION_TOKENS} (else)."),
    ] = None,
    num_harmful: Annotated[
        int | None, typer.Option(help="Harmful requests, 1 to 20000; default 400.", rich_help_panel=_TOWN)
    ] = None,
    num_benign: Annotated[
        int | None, typer.Option(help="Harmless requests, 1 to 20000; default 400.", rich_help_panel=_TOWN)
    ] = None,
    questions: Annotated[
        str | None, typer.Option(help="The task's published question file (JSON lines).", rich_help_panel=_SET)
    ] = None,
    answers: Annotated[
        list[str] | None,
        typer.Option(
            help="Judge the answers of this file in a published layout; no model is run. Once, or once per turn.",
            rich_help_panel=_SET,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions.", rich_help_panel=_SET)] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="Only questions of this category. May be repeated.", rich_help_panel=_SET)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of --search sampling; default 0 (greedy).", rich_help_panel=_SET)
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Of --search sampling; above 1 discourages tokens seen before.", rich_help_panel=_SET),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="RAIN set-up and prompt format: hh, adv, truth, sentiment or town; defaults as of `generate`.",
            rich_help_panel=_SET,
        ),
    ] = None,
    judge: JudgeOption = None,
    judge_model: JudgeModelOption = None,
    judge_url: JudgeUrlOption = None,
    judge_key_env: JudgeKeyOption = None,
    judge_concurrency: JudgeConcurrencyOption = None,
    judge_timeout: JudgeTimeoutOption = None,
    judge_retries: JudgeRetriesOption = None,
    judge_attempts: JudgeAttemptsOption = None,
    judge_body: JudgeBodyOption = None,
    judge_batch: JudgeBatchOption = None,
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
        typer.Option(
            help="town: write every answer with its verdict to this JSON-lines file as soon as it is there. Else a folder for "
            "answers, verdicts and summary; needed."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Do only what --output does not hold: goes on with a run that was killed."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Drop the answers --output holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON on the last line.")] = False,
) -> None:
    """Measure a model on a task: the town, exactly judged, or an instruction set that a judge of yours scores."""
    one_of("--task", task, ("town", *TASKS))
    loading = {"device": device, "dtype": dtype, "kv_tokens": kv_tokens, "max_concurrent": max_concurrent}
    judging: dict[str, Any] = {
        "model": judge_model, "url": judge_url, "key_env": judge_key_env, "concurrency": judge_concurrency,
        "timeout": judge_timeout, "retries": judge_retries, "attempts": judge_attempts, "body": judge_body, "batch": judge_batch,
    }  # fmt: skip
    if answers is not None:
        misplaced(f"{task} with --answers, which runs no model", {
            "--model": None if model == "testbed" else model, "--search": search, "--max-new-tokens": max_new_tokens,
            "--seed": seed or None, "--temperature": temperature, "--repetition-penalty": repetition_penalty, "--preset": preset,
            "--adapter": adapter, "--aligned": aligned, "--lambda": weight, "--allow-negative": allow_negative,
            "--target-kl": target_kl, "--edit": edit, "--edit-on": edit_on, "--force-edit": force_edit, "--edit-judge": edit_judge,
            "--prompt-file": prompt_file, "--urial": urial, "--device": device, "--dtype": dtype, "--kv-tokens": kv_tokens,
        })  # fmt: skip
    names = searches_of("vanilla,rain" if search is None else search) if task == "town" else []
    others = aligned_models(adapter, aligned, weights=weight, allow_negative=allow_negative, target_kl=target_kl)
    edits = chosen_edits(
        edit, on=edit_on, judge=edit_judge, force=force_edit, judges="rain" in names or search == "rain",
        num_aligned=len(adapter or ()) + len(aligned or ()),
    )  # fmt: skip
    if task == "town":
        misplaced("town", {
            "--questions": questions, "--answers": answers, "--limit": limit, "--category": category, "--temperature": temperature,
            "--repetition-penalty": repetition_penalty, "--preset": preset,
            "--judge": judge, **{f"--judge-{name.replace('_', '-')}": value for name, value in judging.items()},
        })  # fmt: skip
        TownRun(
            model, names, 400 if num_harmful is None else num_harmful, 400 if num_benign is None else num_benign, seed,
            MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens, others, edits,
            chosen_prompt(prompt_file, urial, model), loading, output, resume, overwrite, as_json,
        ).run()  # fmt: skip
        return
    misplaced(task, {"--num-harmful": num_harmful, "--num-benign": num_benign})
    if questions is None:
        raise ConfigError(f"--task {task} needs its questions: give the published file with --questions")
    if output is None:
        raise ConfigError(f"--task {task} needs a folder for answers and verdicts: name one with --output")
    if answers is not None and judge in (None, "none"):
        raise ConfigError("--answers are there to be judged: say by whom with --judge")
    answerer = None
    if answers is None:
        answerer = _answerer(
            model, "sampling" if search is None else search, preset, chosen_prompt(
                prompt_file, urial, model, others=("--preset",) if preset is not None and search != "rain" else ()
            ),
            others, edits, loading, seed=seed, max_new_tokens=max_new_tokens, temperature=temperature,
            repetition_penalty=repetition_penalty,
        )  # fmt: skip
    every = read_questions(TASKS[task], questions)
    chosen = choose(every, limit=limit, categories=category or ())
    with (
        _closing(chosen_judge(judge, **judging)) as scorer,
        EvalFolder(output, TASKS[task], answering=answers is None, resume=resume, overwrite=overwrite) as folder,
    ):
        InstructionRun(TASKS[task], every, chosen, folder, answerer, answers or (), scorer, as_json).run()


class _closing:
    """A judge that is closed at the end; None stays None."""

    def __init__(self, judge: Judge | None) -> None:
        self._judge = judge

    def __enter__(self) -> Judge | None:
        return self._judge

    def __exit__(self, *_: object) -> None:
        if self._judge is not None:
            self._judge.close()


def _answerer(
    model: str, search: str, preset: str | None, written: ChosenPrompt, others: AlignedModels, edits: ChosenEdits,
    loading: dict[str, Any], *, seed: int, max_new_tokens: int | None, temperature: float | None,
    repetition_penalty: float | None,
) -> Answerer:  # fmt: skip
    """Who answers an instruction set."""
    one_of("--search", search, ("sampling", "rain"))
    require_whole("--seed", seed, 0)
    most = _INSTRUCTION_TOKENS if max_new_tokens is None else max_new_tokens
    require_whole("--max-new-tokens", most, 1)
    scheme = preset_of(preset, model)
    shape = {"temperature": temperature, "repetition_penalty": repetition_penalty}
    if search == "sampling" and temperature is None:
        shape["temperature"] = 0.0
    chosen = make_search(search, scheme, greedy=False, tree=None, **shape)
    plain = not isinstance(chosen, RAIN)
    settings = {
        "model": model, "search": search, "seed": seed, "max_new_tokens": most,
        **({"preset": scheme or "hh"} if not plain else {"preset": scheme} if scheme and written.format is None else {}),
        **{name: value for name, value in shape.items() if value is not None}, **others.settings, **edits.settings,
        **written.settings,
    }  # fmt: skip
    label = [model] if plain else [model, "rain"]
    if others.dera is not None:
        label.append(" ".join(("dera", *others.adapters, *others.models, others.dera.label)))
    label += [one for one in (edits.label, written.label) if one]
    return Answerer(
        lambda: load_decoder(model, **loading, **others.loading), " + ".join(label), chosen,
        policy_of(False, preset, chosen, others.dera, edits.edits, written.format), most, seed, settings,
    )  # fmt: skip
