"""Open-loop load on an OpenAI-compatible server, with the field's metrics: time to first token, per token, end to end, throughput.

Without --base-url it starts `raindecode serve` in a process of its own and takes the same answers from a decoder in this process first:
--warmup requests sent one by one must come back with the same text and as many tokens, else nothing is timed and the exit code is 1;
every answer of the run is then compared, too. (Where exact mode is off, answers may depend on what runs beside them, and
differences are counted only.) What the decoder took for the same work is reported beside the server.

Requests are chats, one question of the testbed's town each, request i with the seed --seed + i. They are sent at the times of a Poisson
process of --request-rate per second, or all at once, at most --max-concurrency open at a time. Shares of them can be answered by RAIN,
hung up on after some pieces, read slowly, or malformed (which a server must refuse with a 4xx).

Times are those of the client. ITL is between pieces of text: RAIN sends committed sets of several tokens. Latencies leave out slow
readers and what did not end. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import raindecode  # noqa: E402  before torch: asks MKL for reproducible results

# isort: split
import torch  # noqa: E402
from bench_options import DTYPES, stopwatch, write_json  # noqa: E402
from kernel_bench.machine import facts  # noqa: E402
from kernel_bench.measure import rounded  # noqa: E402
from rain_engines import MODELS, load_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from serve_load import Load, Planned, Record  # noqa: E402
from serve_metrics import latencies, spread, summary, table  # noqa: E402
from serve_options import QUICK, check, parser, planned, shares  # noqa: E402
from serve_target import Expected, OwnServer, Remote  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from raindecode import testbed  # noqa: E402
from raindecode.commands.common import quiet_libraries  # noqa: E402
from raindecode.decoder import Decoder  # noqa: E402
from raindecode.errors import RainDecodeError  # noqa: E402

Row = dict[str, Any]
RECORDED = (
    "num_prompts",
    "burstiness",
    "max_concurrency",
    "max_new_tokens",
    "temperature",
    "seed",
    "endpoint",
    "align",
    "rain",
    "quick",
)


def main(argv: list[str] | None = None, *, prog: str = "python benchmarks/bench_serve.py") -> int:
    """Run the benchmark.

    Args:
        argv: the options; None takes those of the process.
        prog: what the help calls the program.

    Returns:
        0, or 1 where an answer is wrong or a request failed.

    Raises:
        ConfigError: an option is not allowed. RainDecodeError: the server does not start.
    """
    options = parser(prog, __doc__).parse_args(argv)
    if options.quick:
        vars(options).update(QUICK)
    check(options)
    quiet_libraries()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # what its own server inherits
    load = [os.getloadavg()[0]]
    record = against_running(options) if options.base_url else against_own(options)
    record = {
        "op": "serve", "schema": 1, "backend": "raindecode" if record["server"] else "openai", "label": options.label,
        **{name: getattr(options, name) for name in RECORDED},
        "request_rate": "inf" if options.request_rate == float("inf") else options.request_rate,
        "shares": vars(shares(options)),
        "raindecode": raindecode.__version__, **facts(torch.device(options.device)), **record, "load": [*load, os.getloadavg()[0]],
    }  # fmt: skip
    return report(rounded(record, 5), options)


def against_running(options: argparse.Namespace) -> Row:
    """Load on a server that runs already; its answers are not compared."""
    base = options.base_url.rstrip("/").removesuffix("/v1")
    key = os.environ[options.api_key_env] if options.api_key_env else None
    remote = Remote(base, key)
    model = options.model or remote.models()[0]
    wanted = planned(options, model)
    warm(options, base, key, wanted, None)
    records, seconds = send(options, base, key, wanted)
    return {
        "model_id": model, "base_url": base, "server": remote.align(), "checked": None, **measured(records, seconds, options),
        "server_metrics": remote.settle(),
    }  # fmt: skip


def against_own(options: argparse.Namespace) -> Row:
    """Load on a server of its own, beside a decoder that does the same work."""
    name, say = options.model or "testbed", stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        model = saved_shape(name, Path(folder), options.dtype) if name in MODELS[1:] else name
        preset = {"preset": "town"} if model != name else {}
        with OwnServer(own_words(options, model, preset)) as server:
            say(f"serving {name} at {server.url}")
            remote, wanted = Remote(server.url, None), planned(options, None)
            about = remote.align()
            expected = None
            if not options.unchecked:
                expected = by_decoder(options, wanted, {"model": model, "align": about["default"], **preset})
                say(f"the decoder alone took {expected.seconds:.2f} s")
            wrong = warm(options, server.url, None, wanted, expected)
            record: Row = {"model_id": name, "base_url": None, "server": about, "checked": None}
            if expected is not None:
                warmed = min(options.warmup, len(expected.answers))
                record["checked"] = {"with": "Decoder in this process, same seeds", "warmup": warmed, "wrong": wrong}
            if wrong and about["exact"] != "off":
                return record
            before = server.usage()
            records, seconds = send(options, server.url, None, wanted)
            record["server_usage"] = {"before": before, "after": server.usage()}
            record |= measured(records, seconds, options) | {"server_metrics": remote.settle()}
    record["server_exit_code"] = server.exit_code
    if expected is not None:
        found = [one for one in records if one.status == "ok"]
        record["checked"] |= {"answers": len(found), "wrong": wrong + sum(differs(one, expected) for one in found)}
        record["direct"] = direct(expected, record)
    return record


def own_words(options: argparse.Namespace, model: str, preset: Mapping[str, str]) -> list[str]:
    """Options of `raindecode serve`."""
    words = ["--model", model, "--dtype", options.dtype, "--device", options.device]
    words += ["--max-concurrent", str(options.max_running), "--max-queue", str(10 * options.num_prompts)]
    words += [word for adapter in options.adapter or () for word in ("--adapter", adapter)]
    return words + [word for key, value in preset.items() for word in (f"--{key}", value)]


def by_decoder(options: argparse.Namespace, wanted: Sequence[Planned], settings: Row) -> Expected:
    """Answers of a decoder in this process, which is given up again."""
    decoder = Decoder.from_pretrained(
        settings["model"], adapter=options.adapter or (), dtype=options.dtype, device=options.device,
        max_concurrent=options.max_running,
    )  # fmt: skip
    return Expected.of(decoder, wanted, settings)


def saved_shape(name: str, folder: Path, dtype: str) -> str:
    """Random weights in a folder, with the testbed's tokenizer; ids it has not are words of their own, so that every token is text."""
    model = load_model(name, torch.device("cpu"), DTYPES[dtype])
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(testbed.WEIGHTS).save_pretrained(folder)
    file = folder / "tokenizer.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    words = written["model"]["vocab"]
    words |= {f"Ġw{i}": i for i in range(len(words), model.config.vocab_size)}
    file.write_text(json.dumps(written), encoding="utf-8")
    return str(folder)


def direct(expected: Expected, record: Row) -> Row:
    """What the decoder alone took for the same work, and how much of its throughput the server reached."""
    tokens = sum(one.tokens for one in expected.answers.values())
    rate = tokens / expected.seconds
    whole = record["request_rate_is_inf"] and record["completed"] == len(expected.answers)
    return {
        "seconds": expected.seconds, "cpu_s": expected.cpu_seconds, "output_tokens": tokens, "output_throughput": rate,
        # Else the server did less work, or waited for requests.
        "server_over_direct": record["output_throughput"] / rate if whole else None,
    }  # fmt: skip


def warm(
    options: argparse.Namespace, base: str, key: str | None, wanted: Sequence[Planned], expected: Expected | None
) -> int:
    """Send a few requests one by one; how many came back otherwise than expected.

    Raises:
        RainDecodeError: one failed.
    """
    chosen = [one for one in wanted if one.body is not None][: options.warmup]
    plain = [Planned(one.index, one.kind, 0.0, one.body) for one in chosen]
    records, _ = asyncio.run(
        Load(endpoint(options, base), max_concurrency=1, timeout=options.timeout, key=key).run(plain)
    )
    failed = [one for one in records if one.status != "ok"]
    if failed:
        raise RainDecodeError(f"the server does not answer as it should: request {failed[0].index}: {failed[0].error}")
    return 0 if expected is None else sum(differs(one, expected) for one in records)


def send(
    options: argparse.Namespace, base: str, key: str | None, wanted: Sequence[Planned]
) -> tuple[list[Record], float]:
    """The run itself, a bar on stderr."""
    load = Load(endpoint(options, base), max_concurrency=options.max_concurrency, timeout=options.timeout, key=key)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("requests", total=len(wanted))
        return asyncio.run(load.run(wanted, lambda _: progress.advance(bar)))


def endpoint(options: argparse.Namespace, base: str) -> str:
    return f"{base}/v1/{'chat/completions' if options.endpoint == 'chat' else 'completions'}"


def differs(one: Record, expected: Expected) -> bool:
    return (one.text, one.completion_tokens) != expected.answers[one.index]


def measured(records: Sequence[Record], seconds: float, options: argparse.Namespace) -> Row:
    """The numbers of a run, and those of each kind of request where there are several."""
    made = summary(records, seconds, options.goodput)
    made |= {"goodput": options.goodput, "request_rate_is_inf": options.request_rate == float("inf")}
    kinds = sorted({one.kind for one in records if one.status == "ok"})
    if len(kinds) > 1:
        made["kinds"] = {kind: of_kind([one for one in records if one.kind == kind]) for kind in kinds}
    return made


def of_kind(records: Sequence[Record]) -> Row:
    made: Row = {"completed": sum(one.status == "ok" for one in records)}
    for name, found in latencies(records).items():
        made |= spread(name, found)
    return made


def report(record: Mapping[str, Any], options: argparse.Namespace) -> int:
    """Table, file, JSON line; the exit code."""
    checked = record["checked"]
    if "duration" in record:
        print(table(record))
        for kind, found in record.get("kinds", {}).items():
            print(
                f"{kind}: {found['completed']} answers, median TTFT {found['median_ttft_ms'] or 0:.1f} ms, median E2EL "
                f"{found['median_e2el_ms'] or 0:.1f} ms, P99 E2EL {found['p99_e2el_ms'] or 0:.1f} ms"
            )
        print(f"requests were sent {record['p99_send_delay_ms']:.1f} ms after their time at most (P99)")
        if record.get("direct", {}).get("server_over_direct") is not None:
            share = record["direct"]["server_over_direct"]
            print(
                f"the decoder alone took {record['direct']['seconds']:.2f} s: the server reached {share:.2f} of its throughput"
            )
        for error, count in record["errors"].items():
            print(f"{count} failed: {error}")
    if checked is None:
        print("answers were not compared")
    else:
        print(
            f"{checked['wrong']} of {checked['warmup'] + checked.get('answers', 0)} answers differ from the decoder's"
        )
    write_json(record, options.json)
    exact = checked is None or record["server"]["exact"] != "off"
    return int(bool((exact and checked and checked["wrong"]) or record.get("failed")))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RainDecodeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
