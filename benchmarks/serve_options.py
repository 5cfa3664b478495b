"""Options of bench_serve.py, their checks, and the requests they describe."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_options import DTYPES, check_json, check_least, check_one_of
from rain_engines import MODELS
from serve_load import Planned, Shares, arrivals, plan

from raindecode import testbed
from raindecode.errors import ConfigError

_SHARES = ("rain", "cancel", "slow", "malformed")
QUICK = {"num_prompts": 8, "max_new_tokens": 8, "warmup": 1}
_LEAST = {
    "num_prompts": 1, "max_new_tokens": 1, "seed": 0, "max_concurrency": 1, "warmup": 0, "max_running": 1, "threads": 1
}  # fmt: skip
EXAMPLES = """examples
  {prog}                                                  the testbed, 200 requests at once
  {prog} --request-rate 10 --rain-share 0.25              Poisson arrivals, a quarter answered by RAIN
  {prog} --model 110m --threads 2 --num-prompts 64        random weights of a real shape
  {prog} --adapter testbed --align '{{"dera": 0.5}}'        a mixture
  {prog} --base-url http://127.0.0.1:8000                 a server that runs already
  {prog} --num-prompts 2000 --max-concurrency 64 --rain-share 0.25 --cancel-share 0.1 --slow-share 0.05 --malformed-share 0.05
  {prog} --quick                                          only to see that it works
"""


def parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """The options; the command line of raindecode passes them on as they are.

    Args:
        description: of the program.
    """
    made = argparse.ArgumentParser(
        prog=prog, description=description, epilog=EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = made.add_argument
    add("--base-url", help="of a running server, without /v1 (default: one of its own)")
    add("--api-key-env", metavar="NAME", help="environment variable with the key of that server")
    add(
        "--model",
        help=f"for its own server: {', '.join(MODELS)}, a folder or a hub id (default: testbed); else a served name",
    )
    add(
        "--adapter",
        action="append",
        help="its own server's: aligned model, as `raindecode serve` takes it; may be repeated",
    )
    add("--max-running", type=int, default=32, help="its own server's: answers advanced together (default: 32)")
    add("--dtype", default="float32", help="its own server's: float32, bfloat16 or float16 (default: float32)")
    add("--device", default="cpu", help="its own server's: cpu, cuda or cuda:N (default: cpu)")
    add("--threads", type=int, help="of torch, here and in its own server (default: as torch chooses)")
    add("--endpoint", default="chat", help="chat or completions (default: chat)")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one per line, used in turn (default: questions of the testbed's town)",
    )
    add("--num-prompts", type=int, default=200, help="requests (default: 200)")
    add("--request-rate", type=float, default=float("inf"), help="per second; inf sends all at once (default)")
    add("--burstiness", type=float, default=1.0, help="1 is Poisson (default), less comes in bursts, more is more even")
    add("--max-concurrency", type=int, help="most requests open at a time (default: no limit)")
    add("--max-new-tokens", type=int, default=64, help="of every answer (default: 64)")
    add("--temperature", type=float, default=1.0, help="of plain sampling (default: 1)")
    add("--seed", type=int, default=0, help="of arrivals, mixture and answers (default: 0)")
    add("--align", default="{}", metavar="JSON", help="the field `align` of every request (default: none)")
    add(
        "--rain",
        default="{}",
        metavar="JSON",
        help="settings of RAIN for its share of the requests (default: the server's)",
    )
    for name, what in (
        ("rain", "answered by RAIN"), ("cancel", "hung up on after up to 5 pieces"), ("slow", "read slowly"),
        ("malformed", "that are no requests"),
    ):  # fmt: skip
        add(f"--{name}-share", type=float, default=0.0, help=f"of requests {what}, 0 to 1 (default: 0)")
    add(
        "--goodput",
        action="append",
        metavar="METRIC:MS",
        help="count answers within limits, such as ttft:200; may be repeated",
    )
    add("--warmup", type=int, default=4, help="requests sent one by one before (default: 4)")
    add("--unchecked", action="store_true", help="load no decoder here: answers of its own server are not compared")
    add("--timeout", type=float, default=600.0, help="seconds of silence after which a request failed (default: 600)")
    add("--label", default="", help="a word for the record")
    add("--quick", action="store_true", help="so small that it is over at once; the numbers mean nothing")
    add("--json", type=Path, metavar="FILE", help="write the JSON line to this file, too")
    return made


def check(options: argparse.Namespace) -> None:
    """Refuse options that are not allowed, and read those that are more than a word.

    Raises:
        ConfigError: one is not.
    """
    check_one_of(options, {"endpoint": ("chat", "completions"), "dtype": tuple(DTYPES)})
    check_least(options, _LEAST)
    check_json(options.json)
    for name in ("request_rate", "burstiness", "timeout"):
        if not getattr(options, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}; allowed: more than 0")
    if not 0 <= options.temperature <= 100:
        raise ConfigError(f"--temperature is {options.temperature}; allowed: 0 to 100")
    for name in _SHARES:
        share = getattr(options, f"{name}_share")
        if not 0 <= share <= 1:
            raise ConfigError(f"--{name}-share is {share}; allowed: 0 to 1")
    options.align, options.rain = (mapping(f"--{name}", getattr(options, name)) for name in ("align", "rain"))
    options.goodput = limits(options.goodput or [])
    if options.api_key_env and not os.environ.get(options.api_key_env):
        raise ConfigError(f"--api-key-env names {options.api_key_env}, which is not set: put the key there")
    if options.base_url and options.adapter:
        raise ConfigError(
            "--adapter is about a server of its own, and --base-url names one that runs: give one of them"
        )


def mapping(option: str, text: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: it is something else.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f'{option} is {text!r:.80}; give a JSON object, such as {{"dera": 0.5}}')
    return found


def limits(given: Sequence[str]) -> dict[str, float]:
    """Milliseconds by metric, of texts METRIC:MS.

    Raises:
        ConfigError: one is something else.
    """
    found = {}
    for one in given:
        name, _, number = one.partition(":")
        try:
            found[name] = float(number)
        except ValueError:
            name = ""
        if name not in ("ttft", "tpot", "e2el") or not found[name] > 0:
            raise ConfigError(f"--goodput is {one!r}; allowed: ttft, tpot or e2el, a colon and milliseconds")
    return found


def shares(options: argparse.Namespace) -> Shares:
    return Shares(**{name: getattr(options, f"{name}_share") for name in _SHARES})


def planned(options: argparse.Namespace, model: str | None) -> list[Planned]:
    """The requests of a run."""
    if options.prompts is None:
        prompts = [one.text for one in testbed.sample_requests(options.num_prompts, seed=options.seed)]
    else:
        try:
            lines = [line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--prompts {str(options.prompts)!r} cannot be read ({error}): give a text file"
            ) from error
        prompts = [line for line in lines if line]
        if not prompts:
            raise ConfigError(f"--prompts {str(options.prompts)!r} holds no prompt: write one per line")
    times = arrivals(options.num_prompts, options.request_rate, options.burstiness, options.seed)
    return plan(
        [prompts[i % len(prompts)] for i in range(options.num_prompts)], times, model=model, chat=options.endpoint == "chat",
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, align=options.align, rain=options.rain,
        shares=shares(options), seed=options.seed,
    )  # fmt: skip
