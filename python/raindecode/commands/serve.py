"""``raindecode serve``: an OpenAI-compatible HTTP server."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from raindecode.commands.aligned import AdapterOption, AlignedOption, AllowNegativeOption, LambdaOption, aligned_models
from raindecode.commands.common import EXIT_INTERRUPTED, load_decoder, one_of, say
from raindecode.errors import ConfigError
from raindecode.search.rain import Preset

_ALIGN, _RUN, _LIMITS, _ACCESS = "How requests are aligned", "Running", "Limits", "Access"
KEY_VARIABLE = "RAINDECODE_API_KEY"
EXAMPLES = f"""Examples:

    raindecode serve

    raindecode serve --adapter testbed --lambda 0.5 --edit helpful.safetensors

    raindecode serve --model ./my-llama --adapter ./dpo-lora --port 8080 --max-concurrent 64

    {KEY_VARIABLE}=secret raindecode serve --host 0.0.0.0 --allowed-host llm.example.org

Ask it with any client of OpenAI's API (base URL http://127.0.0.1:8000/v1), or open the address in a browser.
docs/serving.md has the fields of requests.
"""


def serve(
    model: Annotated[
        str, typer.Option("--model", "-m", help="`testbed` (comes with the package), a local folder, or a hub id.")
    ] = "testbed",
    name: Annotated[
        str | None, typer.Option(help="What clients call it; default: the last part of --model.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes one that is free.")] = 8000,
    adapter: AdapterOption = None,
    aligned: AlignedOption = None,
    weight: LambdaOption = None,
    allow_negative: AllowNegativeOption = False,
    edit: Annotated[
        list[str] | None,
        typer.Option(
            "--edit",
            metavar="[NAME=]FILE",
            help="Edits (AlignEZ) that requests may name; default name: the file's, without its "
            "ending. May be repeated.",
            rich_help_panel=_ALIGN,
        ),
    ] = None,
    force_edit: Annotated[
        bool,
        typer.Option(
            "--force-edit", help="Take edits fitted on another model of the same form.", rich_help_panel=_ALIGN
        ),
    ] = False,
    prompt_file: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt-file",
            metavar="[NAME=]FILE",
            help="Constant prompts (URIAL) that requests may name. May be repeated.",
            rich_help_panel=_ALIGN,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="RAIN set-up, and how chats are written for a model without a chat template: hh, adv, truth, sentiment or town.",
            rich_help_panel=_ALIGN,
        ),
    ] = None,
    align: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='What requests are aligned by that say nothing: the object `align`, such as {"search": "rain"}.',
            rich_help_panel=_ALIGN,
        ),
    ] = None,
    api_key_file: Annotated[
        str | None,
        typer.Option(
            help=f"Only who knows a key gets in: a file with one per line. Or one in {KEY_VARIABLE}.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name clients may call it by; default: loopback's there, any elsewhere.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web pages of this origin may call it. May be repeated.", rich_help_panel=_ACCESS),
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts and answers into the log.", rich_help_panel=_ACCESS)
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.", rich_help_panel=_ACCESS)] = "info",
    max_concurrent: Annotated[int, typer.Option(help="Answers advanced together.", rich_help_panel=_LIMITS)] = 32,
    max_queue: Annotated[
        int, typer.Option(help="Answers that may wait; others are refused (429).", rich_help_panel=_LIMITS)
    ] = 256,
    max_new_tokens: Annotated[
        int, typer.Option(help="Most tokens of an answer; 0: what the context leaves.", rich_help_panel=_LIMITS)
    ] = 0,
    max_answers: Annotated[
        int, typer.Option(help="Most answers of a request, prompts times n.", rich_help_panel=_LIMITS)
    ] = 64,
    max_body_bytes: Annotated[int, typer.Option(help="Of a request (413).", rich_help_panel=_LIMITS)] = 4 * 2**20,
    request_seconds: Annotated[
        float, typer.Option(help="After these a request is given up (504); 0: never.", rich_help_panel=_LIMITS)
    ] = 600.0,
    drain_seconds: Annotated[
        float, typer.Option(help="How long a shutdown waits for what is under way.", rich_help_panel=_LIMITS)
    ] = 30.0,
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
        typer.Option("--exact/--no-exact", help="Insist on exact mode, or leave it off.", rich_help_panel=_RUN),
    ] = None,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs", help="Insist on CUDA graphs, or leave them off.", rich_help_panel=_RUN
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Serve a model over OpenAI's API, with RAIN, DeRa, AlignEZ and URIAL per request."""
    try:
        from raindecode.server import http, logs
        from raindecode.server.app import create_app
        from raindecode.server.service import Service
        from raindecode.server.settings import ServerSettings
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'rainkernels[server]'") from error
    others = aligned_models(adapter, aligned, weights=weight, allow_negative=allow_negative)
    default = _default_align(align)
    if others.dera is not None and "dera" not in default:
        default["dera"] = {"lambda": list(others.dera.weights), "allow_negative": allow_negative}  # type: ignore[arg-type]
    keys = _keys(api_key_file)
    loading = {
        "device": device, "dtype": dtype, "kv_tokens": kv_tokens, "exact": exact, "max_concurrent": max_concurrent,
        "trust_remote_code": trust_remote_code, "cuda_graphs": cuda_graphs, **others.loading,
    }  # fmt: skip
    settings = ServerSettings(
        model=model, loading=loading, name=name or "", edits=_named("--edit", edit), force_edits=force_edit,
        prompts=_named("--prompt-file", prompt_file),
        preset="" if preset is None else one_of("--preset", preset, get_args(Preset)), align=default, host=host, port=port,
        api_keys=keys, allowed_hosts=tuple(allowed_host or ()), cors_origins=tuple(cors_origin or ()), max_queue=max_queue,
        max_new_tokens=max_new_tokens, max_answers=max_answers, max_body_bytes=max_body_bytes, request_seconds=request_seconds,
        drain_seconds=drain_seconds, log_prompts=log_prompts, log_level=log_level,
    )  # fmt: skip
    http.check_port(settings)
    decoder = load_decoder(model, **loading)
    if not settings.is_loopback and not keys:
        say(
            f"warning: {host} can be reached from other machines, and no API key is set (--api-key-file or {KEY_VARIABLE})"
        )
    service = Service(decoder, settings)
    logs.set_up_logs(log_level)
    server = http.Server(
        create_app(settings, service=service),
        settings,
        lambda address: say(f"serving {settings.served_name} at {address} (Ctrl-C ends)"),
    )
    server.run()
    if not server.started:
        raise typer.Exit(1)
    if server.was_interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


def _default_align(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        made = json.loads(text)
    except ValueError as error:
        raise ConfigError(f'--align is not JSON ({error}); give an object such as {{"search": "rain"}}') from error
    if not isinstance(made, dict):
        raise ConfigError(f'--align is {text!r:.80}; give an object such as {{"search": "rain"}}')
    return made


def _named(option: str, given: Sequence[str] | None) -> dict[str, str]:
    """Files by name, of [NAME=]FILE."""
    made: dict[str, str] = {}
    for one in given or ():
        name, equals, path = one.partition("=")
        if not equals:
            name, path = Path(one).stem, one
        if not path:
            raise ConfigError(f"{option} {one!r:.120} names no file; give FILE or NAME=FILE")
        if name in made:
            raise ConfigError(f"{option} {one!r:.120}: the name {name!r} is taken; give NAME=FILE")
        made[name] = path
    return made


def _keys(file: str | None) -> tuple[str, ...]:
    """API keys of a file and of the environment."""
    keys = [os.environ[KEY_VARIABLE].strip()] if os.environ.get(KEY_VARIABLE, "").strip() else []
    if file is None:
        return tuple(keys)
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--api-key-file {file!r} cannot be read ({error}): give a text file with one key per line"
        ) from error
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise ConfigError(f"--api-key-file {file!r} holds no key: write one per line")
    return (*keys, *found)
