"""``raindecode generate``: answers prompts with plain sampling or RAIN."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from raindecode.commands.aligned import (
    AdapterOption,
    AlignedOption,
    AllowNegativeOption,
    LambdaOption,
    TargetKlOption,
    aligned_models,
)
from raindecode.commands.answer_file import require_output
from raindecode.commands.common import load_decoder, one_of, printable, raise_first, say
from raindecode.commands.edited import (
    EditJudgeOption,
    EditOnOption,
    EditOption,
    ForceEditOption,
    chosen_edits,
)
from raindecode.commands.output import Output, counters
from raindecode.commands.prompted import (
    PrefixCacheOption,
    PromptFileOption,
    UrialOption,
    chosen_prompt,
    use_prefix_cache,
)
from raindecode.commands.prompts import Messages, collect_talks
from raindecode.decoder import Decoder
from raindecode.errors import ConfigError
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.dera import DeRa
from raindecode.policy.policy import Policy
from raindecode.policy.prompt import ChatFormat
from raindecode.search.rain import RAIN, Preset
from raindecode.search.sampling import Sampling
from raindecode.types import Completion, Request

_PRESETS = get_args(Preset)
_SAMPLING, _RUN, _OUT = "Sampling (only with --search sampling)", "Running", "Output"
EXAMPLES = """Examples:

    raindecode generate "How do I paint the fence of the baker?"

    raindecode generate --search rain --seed 7 "How do I burn the barn of the baker?"

    raindecode generate --model ./my-llama --raw --greedy --stream "Once upon a time"

    raindecode generate --adapter testbed --lambda 0.5 "How do I burn the barn of the baker?"

    raindecode generate --edit helpful.safetensors:0.5 "How do I burn the barn of the baker?"

    raindecode generate --file prompts.txt --num-samples 4 --json > answers.jsonl

    raindecode generate --file prompts.txt --output answers.jsonl --resume
"""


def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.", show_default=False)] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="`testbed` (comes with the package), a local folder, or a hub id.")
    ] = "testbed",
    search: Annotated[str, typer.Option(help="How tokens are chosen: `sampling` or `rain`.")] = "sampling",
    preset: Annotated[
        str | None,
        typer.Option(
            help="RAIN set-up and prompt format: hh, adv, truth, sentiment or town. Default: town for the testbed; for "
            "other models hh with --search rain, and the plain prompt with --search sampling.",
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Feed prompts as they are, without a chat format.")] = False,
    file: Annotated[
        str | None,
        typer.Option(
            help="More prompts: a text file with one per line (blank lines are skipped), a .jsonl file with "
            '{"prompt": ...} per line, or {"messages": [...]} for a conversation, or - for standard input. UTF-8.'
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer, 1 or more.")] = 256,
    seed: Annotated[int, typer.Option(help="Same prompt, settings and seed: same answer.")] = 0,
    num_samples: Annotated[int, typer.Option(help="Answers per prompt, with seeds seed, seed + 1, ...")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer. May be repeated.")] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="A token id that ends the answer. May be repeated.")
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
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop what is less than min-p times as likely as the best.", rich_help_panel=_SAMPLING),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 discourages tokens seen before.", rich_help_panel=_SAMPLING)
    ] = None,
    logprobs: Annotated[
        bool,
        typer.Option(
            "--logprobs",
            help="Log-probability of every token in --json and --output, their mean otherwise.",
            rich_help_panel=_SAMPLING,
        ),
    ] = False,
    adapter: AdapterOption = None,
    aligned: AlignedOption = None,
    weight: LambdaOption = None,
    allow_negative: AllowNegativeOption = False,
    target_kl: TargetKlOption = None,
    mixture_stats: Annotated[
        bool,
        typer.Option(
            "--mixture-stats",
            help="Measure the mixture at every token (all models run): in --json and --output; its KL otherwise.",
            rich_help_panel=_SAMPLING,
        ),
    ] = False,
    edit: EditOption = None,
    edit_on: EditOnOption = None,
    force_edit: ForceEditOption = False,
    edit_judge: EditJudgeOption = False,
    prompt_file: PromptFileOption = None,
    urial: UrialOption = False,
    prefix_cache: PrefixCacheOption = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; default: the GPU when there is one.", rich_help_panel=_RUN)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; default: float32 on a CPU, bfloat16 on a GPU.", rich_help_panel=_RUN
        ),
    ] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(help="Capacity of the KV pool in tokens; default: sized from memory.", rich_help_panel=_RUN),
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="Insist on exact mode (an answer does not depend on what runs beside it), or leave it off; default: on "
            "where it holds.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Insist on CUDA graphs (the layers of a step are one launch), or leave them off; default: on where they apply.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    max_concurrent: Annotated[int, typer.Option(help="Requests advanced together.", rich_help_panel=_RUN)] = 32,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.", rich_help_panel=_RUN)
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the answer as it comes (one prompt).", rich_help_panel=_OUT)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per answer and line on stdout.", rich_help_panel=_OUT)
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(
            help="Also write each answer to this JSON-lines file as soon as it is there, in whatever order they finish; "
            "`index` and `sample` say which is which.",
            rich_help_panel=_OUT,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Answer only what --output has no answer to: goes on with a run that was killed, or starts one.",
            rich_help_panel=_OUT,
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Drop the answers --output holds.", rich_help_panel=_OUT)
    ] = False,
    tree: Annotated[
        str | None, typer.Option(help="Write RAIN's search trees to this JSON file.", rich_help_panel=_OUT)
    ] = None,
) -> None:
    """Answer prompts with plain sampling or RAIN, by one model or a mixture of a model and aligned ones (DeRa)."""
    prompts = collect_talks(prompt or [], file)
    chosen = make_search(
        one_of("--search", search, ("sampling", "rain")), preset_of(preset, model), greedy=greedy, tree=tree,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        logprobs=logprobs or None,
    )  # fmt: skip
    if mixture_stats and isinstance(chosen, RAIN):
        raise ConfigError("--mixture-stats belongs to --search sampling: what RAIN searched through is not measured")
    others = aligned_models(
        adapter, aligned, weights=weight, allow_negative=allow_negative, target_kl=target_kl, stats=mixture_stats
    )
    edits = chosen_edits(
        edit, on=edit_on, judge=edit_judge, force=force_edit, judges=isinstance(chosen, RAIN),
        num_aligned=len(adapter or ()) + len(aligned or ()),
    )  # fmt: skip
    written = chosen_prompt(prompt_file, urial, model, others=_written_by(raw, preset, chosen))
    _check_shape(len(prompts), num_samples, seed, stream, as_json)
    if stop and "" in stop:
        raise ConfigError("--stop is an empty text, which would end every answer at once; give at least one character")
    require_output(output, resume, overwrite)
    if file is not None and output is not None and Path(file).resolve() == Path(output).resolve():
        raise ConfigError(
            f"--file and --output both name {file!r}: the prompts would be overwritten; give another --output"
        )
    if resume and tree is not None:
        raise ConfigError(
            "--tree holds the searches of one whole run, so none can be added with --resume: give one of them"
        )
    with Output(
        samples=num_samples, as_json=as_json, silent=stream, file=output, resume=resume, overwrite=overwrite, tree=tree
    ) as sink:
        decoder = load_decoder(
            model, device=device, dtype=dtype, kv_tokens=kv_tokens, exact=exact, max_concurrent=max_concurrent,
            trust_remote_code=trust_remote_code, cuda_graphs=cuda_graphs, **others.loading,
        )  # fmt: skip
        policy = policy_of(raw, preset, chosen, others.dera, edits.edits, written.format)
        if prefix_cache is not None:
            use_prefix_cache(decoder, prefix_cache, policy, chosen)
        requests = decoder.requests(
            prompts, search=chosen, policy=policy,
            max_new_tokens=max_new_tokens, seed=seed,
            stop=stop or (), stop_token_ids=stop_token_id or (),
        )  # fmt: skip
        settings = {
            "model": model, "dtype": decoder.dtype, "device": decoder.engine.runner.device.type, "exact": decoder.exact,
            **_search_settings(chosen, preset, raw, model, written.format), **others.settings, **edits.settings,
            **written.settings, **_talks_settings(prompts),
            "max_new_tokens": max_new_tokens, **({"stop": stop} if stop else {}),
            **({"stop_token_ids": stop_token_id} if stop_token_id else {}),
        }  # fmt: skip
        Run(decoder, chosen, sink, stream).answer(_samples(requests, num_samples), settings)


def make_search(search: str, preset: str | None, *, greedy: bool, tree: str | None, **sampling: Any) -> Sampling | RAIN:
    """The search the options describe; `sampling` holds Sampling's settings, None where not given.

    Raises:
        ConfigError: a value is outside what is allowed, or an option belongs to the other search.
    """
    given = {name: value for name, value in sampling.items() if value is not None}
    if search == "rain":
        misplaced = [f"--{name.replace('_', '-')}" for name in given] + (["--greedy"] if greedy else [])
        if misplaced:
            raise ConfigError(
                f"{', '.join(misplaced)} belongs to --search sampling; with --search rain choose a --preset"
            )
        return RAIN.preset(preset or "hh", record_tree=tree is not None)  # type: ignore[arg-type]
    if tree is not None:
        raise ConfigError("--tree writes the search trees of RAIN; use it with --search rain")
    if greedy and given.get("temperature"):
        raise ConfigError(f"--greedy and --temperature {given['temperature']} exclude each other; give one of them")
    return Sampling(**{**given, "temperature": 0.0} if greedy else given)


def preset_of(preset: str | None, model: str) -> str | None:
    """The preset of an option, checked, or the one that is meant without it; None for no preset.

    Raises:
        ConfigError: there is no such preset.
    """
    if preset is None:
        return "town" if model == "testbed" else None
    return one_of("--preset", preset, _PRESETS)


def policy_of(
    raw: bool, preset: str | None, search: Sampling | RAIN, dera: DeRa | None, edits: Sequence[AlignEZ] = (),
    format: ChatFormat | None = None,
) -> Policy:  # fmt: skip
    """The mixture, the edits, and the prompt format when an option names one; else that is left to the search and the decoder."""
    if raw:
        format = ChatFormat()
    elif preset is not None and isinstance(search, Sampling):
        format = RAIN.preset(preset).format  # type: ignore[arg-type]
    return Policy(prompt=format, dera=dera, edits=edits)


def _written_by(raw: bool, preset: str | None, search: Sampling | RAIN) -> tuple[str, ...]:
    """Options that were given and say how prompts are written."""
    return (*(["--raw"] if raw else []), *(["--preset"] if preset is not None and isinstance(search, Sampling) else []))


def _search_settings(
    search: Sampling | RAIN, preset: str | None, raw: bool, model: str, format: ChatFormat | None
) -> dict[str, Any]:
    """What decides how tokens are chosen and the prompt is written, as plain data; defaults are left out."""
    shape: dict[str, Any] = {"search": "rain" if isinstance(search, RAIN) else "sampling"}
    chosen = preset_of(preset, model)
    if isinstance(search, RAIN):
        shape["preset"] = chosen or "hh"
    elif chosen is not None and not raw and format is None:
        shape["preset"] = chosen
    if raw:
        shape["raw"] = True
    if isinstance(search, Sampling):
        shape |= {f.name: v for f in fields(search) if (v := getattr(search, f.name)) != f.default}
    return shape


def _talks_settings(prompts: Sequence[str | Messages]) -> dict[str, Any]:
    """Conversations by a hash: what a record says of its prompt are the user's last words."""
    talks = [prompt for prompt in prompts if not isinstance(prompt, str)]
    return {"messages_sha256": hashlib.sha256(json.dumps(talks).encode()).hexdigest()[:32]} if talks else {}


def _check_shape(prompts: int, samples: int, seed: int, stream: bool, as_json: bool) -> None:
    if samples < 1:
        raise ConfigError(f"--num-samples is {samples}; allowed: 1 or more")
    if seed < 0 or seed + samples > 2**64:
        raise ConfigError(f"--seed is {seed} for {samples} samples; allowed: seeds from 0 to 2**64 - 1")
    if stream and (prompts * samples > 1 or as_json):
        raise ConfigError(
            f"--stream prints one answer as plain text; it was given {prompts} prompts, {samples} samples each"
            f"{', and --json' if as_json else ''}: drop --stream"
        )


def _samples(requests: list[Request], samples: int) -> list[Request]:
    return [replace(request, seed=request.seed + k) for request in requests for k in range(samples)]


@dataclass(frozen=True)
class Run:
    """One run of the command: requests in, answers to the output as they finish."""

    decoder: Decoder
    search: Sampling | RAIN
    sink: Output
    stream: bool

    def answer(self, requests: list[Request], settings: dict[str, Any]) -> None:
        """Answer all requests that the output file has no answer to.

        Raises:
            RainDecodeError: requests failed; the others' answers have been written.
            KeyboardInterrupt: the user stopped it; finished answers have been written.
        """
        left = self.sink.begin(requests, settings)
        if len(left) < len(requests):
            say(f"{len(requests) - len(left)} of {len(requests)} answers were there, {len(left)} to go")
        on_text = self._streamer() if self.stream else None
        failed: list[BaseException] = []
        try:
            for index, outcome in self.decoder.stream(
                [requests[i] for i in left],
                search=self.search,
                on_text=on_text,
                progress=False if self.stream else None,
            ):
                if isinstance(outcome, Completion):
                    self.sink.add(left[index], outcome)
                    self._end_of_stream(outcome)
                else:
                    self.sink.add(left[index], None)
                    failed.append(outcome)
        except KeyboardInterrupt:
            self.sink.flush()
            go_on = "; --resume goes on from there" if self.sink.has_file else ""
            say(f"{self.sink.finished} of {len(requests)} answers had finished{go_on}")
            raise
        if failed:
            raise_first(failed, len(left), "requests")

    def _streamer(self) -> Callable[[int, str], None]:
        started = False

        def show(_: int, piece: str) -> None:
            nonlocal started
            self.sink.show(printable(piece if started else piece.lstrip()))
            started = started or bool(piece.strip())

        return show

    def _end_of_stream(self, completion: Completion) -> None:
        if self.stream:
            self.sink.show("\n")
            say(counters(completion))
