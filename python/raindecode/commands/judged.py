"""Options that say who judges answers."""

from __future__ import annotations

import json
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from raindecode.errors import ConfigError
from raindecode.judging.endpoint import checked_url
from raindecode.judging.judges import CallableJudge, Judge, OpenAIJudge
from raindecode.judging.secret import Secret

_PANEL = "Judge (just-eval, mt-bench)"
_URL, _KEY = "https://api.openai.com/v1", "OPENAI_API_KEY"

JudgeOption = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help="`openai`: a model behind an OpenAI-compatible endpoint; MODULE:FUNCTION: a Python function; `none` (default): write "
        "answers only.",
        rich_help_panel=_PANEL,
    ),
]
JudgeModelOption = Annotated[
    str | None, typer.Option("--judge-model", help="The endpoint's name of the model.", rich_help_panel=_PANEL)
]
JudgeUrlOption = Annotated[
    str | None,
    typer.Option(
        "--judge-url", help=f"The address in front of /chat/completions; default {_URL}.", rich_help_panel=_PANEL
    ),
]
JudgeKeyOption = Annotated[
    str | None,
    typer.Option(
        "--judge-key-env", metavar="VARIABLE", help=f"Environment variable that holds the key; default {_KEY}.", rich_help_panel=_PANEL
    ),
]  # fmt: skip
JudgeConcurrencyOption = Annotated[
    int | None,
    typer.Option("--judge-concurrency", help="Questions under way together; default 8.", rich_help_panel=_PANEL),
]
JudgeTimeoutOption = Annotated[
    float | None,
    typer.Option("--judge-timeout", help="Seconds one reply may take; default 60.", rich_help_panel=_PANEL),
]
JudgeRetriesOption = Annotated[
    int | None,
    typer.Option(
        "--judge-retries",
        help="How often a question is sent again after 429, 5xx, a time-out or a lost connection; default 5.",
        rich_help_panel=_PANEL,
    ),
]
JudgeAttemptsOption = Annotated[
    int | None,
    typer.Option(
        "--judge-attempts",
        help="How often the judge is asked about an answer in all when it replies with no verdict; default 3.",
        rich_help_panel=_PANEL,
    ),
]
JudgeBodyOption = Annotated[
    str | None,
    typer.Option(
        "--judge-body",
        metavar="JSON",
        help="More fields of the request, such as '{\"max_tokens\": 800}'; null takes one out. Without, the temperature is 0.",
        rich_help_panel=_PANEL,
    ),
]
JudgeBatchOption = Annotated[
    int | None,
    typer.Option("--judge-batch", help="Most answers of one call of FUNCTION; default 16.", rich_help_panel=_PANEL),
]


def chosen_judge(
    judge: str | None, *, model: str | None, url: str | None, key_env: str | None, concurrency: int | None,
    timeout: float | None, retries: int | None, attempts: int | None, body: str | None, batch: int | None,
) -> Judge | None:  # fmt: skip
    """What the options above describe; None for no judge.

    Raises:
        ConfigError: a value is not allowed, an option belongs to another judge, or the key is missing.
    """
    of_openai = {
        "--judge-model": model, "--judge-url": url, "--judge-key-env": key_env, "--judge-concurrency": concurrency,
        "--judge-timeout": timeout, "--judge-retries": retries, "--judge-attempts": attempts, "--judge-body": body,
    }  # fmt: skip
    of_function = {"--judge-batch": batch}
    if judge is None or judge == "none":
        _refuse({**of_openai, **of_function}, "no judge was chosen: name one with --judge")
        return None
    if judge != "openai":
        _refuse(of_openai, f"--judge {judge} is a Python function; drop it, or use --judge openai")
        return CallableJudge.named(judge, **_given(batch=batch))
    _refuse(of_function, "--judge openai asks one answer at a time; drop it, and see --judge-concurrency")
    if model is None:
        raise ConfigError("--judge openai needs the model's name at the endpoint: give --judge-model")
    return OpenAIJudge(
        model, _URL if url is None else url, _key(_URL if url is None else url, key_env), body=_body(body),
        **_given(concurrency=concurrency, timeout=timeout, retries=retries, attempts=attempts),
    )  # fmt: skip


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(options: dict[str, Any], why: str) -> None:
    named = [name for name, value in options.items() if value is not None]
    if named:
        raise ConfigError(f"{', '.join(named)} was given, and {why}")


def _key(url: str, variable: str | None) -> Secret:
    name = _KEY if variable is None else variable
    secret = Secret.from_environment(name)
    at_openai = urlsplit(checked_url(url)).hostname == urlsplit(_URL).hostname
    if not secret and variable is not None:  # what was given may be the key itself: it is not repeated
        raise ConfigError("--judge-key-env names no environment variable that holds a key: give its name, and set it")
    if not secret and at_openai:
        raise ConfigError(f"the environment variable {name} holds no key: set it, or name another with --judge-key-env")
    return secret


def _body(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise ConfigError(f"--judge-body is {text!r:.80}; allowed: a JSON object, such as '{{\"max_tokens\": 800}}'")
    return body
