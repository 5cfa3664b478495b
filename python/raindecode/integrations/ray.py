"""Several engines on Ray: a batch job over JSON lines (Ray Data), and the server in several processes (Ray Serve).

    python -m raindecode.integrations.ray batch prompts.jsonl answers.jsonl --replicas 4
    serve run raindecode.integrations.ray:app model=testbed replicas=2

docs/integrations/ray.md
"""

from __future__ import annotations

import importlib
import logging
from typing import Annotated, Any

import typer

try:
    from raindecode.integrations.ray_batch import BatchReport, generate_jsonl
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"raindecode.integrations.ray needs Ray 2.47 or newer ({error}): pip install 'rainkernels[ray]'",
        name=error.name,
    ) from error

from raindecode.commands.aligned import (
    AdapterOption,
    AlignedOption,
    AllowNegativeOption,
    LambdaOption,
    TargetKlOption,
    aligned_models,
)
from raindecode.commands.common import complain, guarded, one_of, quiet_libraries, say
from raindecode.commands.edited import EditJudgeOption, EditOnOption, EditOption, ForceEditOption, chosen_edits
from raindecode.commands.generate import make_search, policy_of, preset_of
from raindecode.commands.prompted import PromptFileOption, UrialOption, chosen_prompt
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling

__all__ = ["BatchReport", "generate_jsonl", "main"]  # and app, build_app: see __getattr__

_SAMPLING, _RUN = "Sampling (only with --search sampling)", "Running"


def __getattr__(name: str) -> Any:
    """`app` and `build_app`, which need the extra `server` as well; a batch job does not."""
    if name not in ("app", "build_app"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("raindecode.integrations.ray_serve"), name)


cli = typer.Typer(
    name="python -m raindecode.integrations.ray", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


@cli.callback()
def _root() -> None:
    """Several engines on Ray."""


def batch(
    input: Annotated[
        str, typer.Argument(help='JSON lines: {"prompt": ...} or {"messages": [...]} each, UTF-8.', show_default=False)
    ],
    output: Annotated[
        str, typer.Argument(help="JSON lines, as `raindecode generate --output` writes them.", show_default=False)
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="`testbed`, a folder, or a hub id.")] = "testbed",
    search: Annotated[str, typer.Option(help="How tokens are chosen: `sampling` or `rain`.")] = "sampling",
    preset: Annotated[
        str | None,
        typer.Option(help="RAIN set-up and prompt format, as in `raindecode generate`: hh, adv, truth, sentiment or town."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Feed prompts as they are, without a chat format.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer, 1 or more.")] = 256,
    seed: Annotated[int, typer.Option(help="Row i, counted from 0, has the seed SEED + i.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer. May be repeated.")] = None,
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
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop what is less than min-p times as likely as the best.", rich_help_panel=_SAMPLING),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 discourages tokens seen before.", rich_help_panel=_SAMPLING)
    ] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Log-probability of every token.", rich_help_panel=_SAMPLING)
    ] = False,
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
    replicas: Annotated[int, typer.Option(help="Processes with an engine each.", rich_help_panel=_RUN)] = 2,
    batch_size: Annotated[
        int, typer.Option(help="Rows a process takes at a time, and loses when it dies.", rich_help_panel=_RUN)
    ] = 64,
    num_cpus: Annotated[float, typer.Option(help="Cores and threads of each process.", rich_help_panel=_RUN)] = 1,
    num_gpus: Annotated[float, typer.Option(help="GPUs of each process.", rich_help_panel=_RUN)] = 0,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster, such as `auto`; default: the one RAY_ADDRESS names, else one is started here.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; default: float32 on a CPU, bfloat16 on a GPU.", rich_help_panel=_RUN
        ),
    ] = None,
    kv_tokens: Annotated[
        int | None, typer.Option(help="Capacity of each KV pool in tokens; default: sized from memory.", rich_help_panel=_RUN)
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option("--exact/--no-exact", help="Insist on exact mode, or leave it off.", rich_help_panel=_RUN),
    ] = None,
    max_concurrent: Annotated[int, typer.Option(help="Rows a process advances together.", rich_help_panel=_RUN)] = 32,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.", rich_help_panel=_RUN)
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Answer only what OUTPUT has no record of.", rich_help_panel=_RUN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Drop what OUTPUT holds.", rich_help_panel=_RUN)
    ] = False,
) -> None:  # fmt: skip
    """Answer the rows of a JSON-lines file with several engines at once."""
    chosen = make_search(
        one_of("--search", search, ("sampling", "rain")), preset_of(preset, model), greedy=greedy, tree=None,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        logprobs=logprobs or None,
    )  # fmt: skip
    others = aligned_models(adapter, aligned, weights=weight, allow_negative=allow_negative, target_kl=target_kl)
    edits = chosen_edits(
        edit, on=edit_on, judge=edit_judge, force=force_edit, judges=isinstance(chosen, RAIN),
        num_aligned=len(others.adapters) + len(others.models),
    )  # fmt: skip
    by_preset = ["--preset"] if preset is not None and isinstance(chosen, Sampling) else []
    written = chosen_prompt(prompt_file, urial, model, others=(*(["--raw"] if raw else []), *by_preset))
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    number_type: Any = None if dtype is None else one_of("--dtype", dtype, ("float32", "bfloat16", "float16"))
    report = generate_jsonl(
        input, output, model=model, adapter=others.adapters, aligned=others.models, search=chosen,
        policy=policy_of(raw, preset, chosen, others.dera, edits.edits, written.format), max_new_tokens=max_new_tokens, seed=seed,
        stop=stop or (), replicas=replicas, batch_size=batch_size, num_cpus=num_cpus, num_gpus=num_gpus, dtype=number_type,
        kv_tokens=kv_tokens, exact=exact, max_concurrent=max_concurrent, trust_remote_code=trust_remote_code, resume=resume,
        overwrite=overwrite, address=address,
    )  # fmt: skip
    was_there = f", {report.already} were there" if report.already else ""
    say(f"{report.answered} of {report.rows} rows answered{was_there}, {report.seconds:.1f} s")
    if report.failed:
        complain(
            f'{report.failed} of {report.rows} rows got an error instead of an answer: look for "error" in {output}'
        )
        raise typer.Exit(1)


cli.command("batch")(guarded(batch))


def main() -> None:
    """The command. Exit codes: 0 done, 1 some rows got errors, 2 bad input, 130 Ctrl-C."""
    quiet_libraries()
    cli()


if __name__ == "__main__":
    main()
