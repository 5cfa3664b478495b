"""What the server costs: the same requests through HTTP and straight through Decoder.generate, in turns on one decoder.

    python benchmarks/serve_cost.py [--shape testbed] [--requests 64] [--max-new-tokens 32] [--rain-share 0] [--rounds 5] [--stream]

The clients are a process of their own, which takes its share of the cores, as clients on the same machine do. Every round first drops
all cached K/V, runs one way, drops them again, and runs the other; the order changes from round to round. Every answer of the server is
compared with that of generate. Prints a table, then one JSON line; exit code 1 where answers differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import raindecode  # noqa: E402, F401  before torch: asks MKL for reproducible results

# isort: split
import httpx  # noqa: E402
from bench_options import add_machine_options, check_machine_options, settle, write_json  # noqa: E402
from kernel_bench.machine import facts  # noqa: E402
from kernel_bench.measure import quartiles, rounded  # noqa: E402
from rain_engines import load_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from raindecode import RAIN, ChatFormat, Decoder, Policy, Sampling, testbed  # noqa: E402
from raindecode.commands.common import quiet_libraries  # noqa: E402
from raindecode.server.app import create_app  # noqa: E402
from raindecode.server.http import Server  # noqa: E402
from raindecode.server.settings import ServerSettings  # noqa: E402


def clients(connection: Any, url: str) -> None:
    """The clients' process: takes lists of bodies, asks for all at once, gives back what came."""
    while (bodies := connection.recv()) is not None:
        connection.send(asyncio.run(_ask_all(url, bodies)))


async def _ask_all(url: str, bodies: list[dict[str, Any]]) -> list[list[list[int]] | str]:
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http:
        return await asyncio.gather(*(_ask(http, body) for body in bodies))


async def _ask(http: httpx.AsyncClient, body: dict[str, Any]) -> Any:
    if not body.get("stream"):
        answer = await http.post("/v1/completions", json=body)
        return answer.json()["choices"][0]["token_ids"] if answer.status_code == 200 else answer.text
    tokens: list[int] = []
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                tokens += choice.get("token_ids", []) if choice["finish_reason"] is None else []
    return tokens


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", default="testbed", help="testbed, 25m, 110m, 1b or 7b (random weights but for the first)"
    )
    parser.add_argument("--requests", type=int, default=64, help="asked for at once")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rain-share", type=float, default=0.0, help="of the requests, from 0 to 1, that RAIN answers")
    parser.add_argument("--max-concurrent", type=int, default=32)
    parser.add_argument("--stream", action="store_true", help="the answers as streams")
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    device = check_machine_options(options)
    dtype = settle(options)
    quiet_libraries()
    tokenizer = AutoTokenizer.from_pretrained(testbed.WEIGHTS)
    decoder = Decoder(
        load_model(options.shape, device, dtype), tokenizer, name="testbed", max_concurrent=options.max_concurrent, kv_tokens=32768,
        format=RAIN.preset("town").format,
    )  # fmt: skip
    prompts = [
        tokenizer(testbed.format_prompt(one.text))["input_ids"] for one in testbed.sample_requests(options.requests)
    ]
    rain = RAIN.preset("town", max_iterations=6, min_new_iterations=3)
    searched = round(options.rain_share * len(prompts))
    groups = [(rain, range(searched)), (Sampling(ignore_eos=True), range(searched, len(prompts)))]
    bodies = [
        {
            "prompt": ids, "seed": i, "max_tokens": options.max_new_tokens, "return_token_ids": True, "stream": options.stream,
            **({"align": {"rain": {"max_iterations": 6, "min_new_iterations": 3}}} if i < searched else {"ignore_eos": True}),
        }
        for i, ids in enumerate(prompts)
    ]  # fmt: skip

    def direct() -> list[list[int]]:
        """The same work without a server; where searches are mixed, as the server does it: together."""
        tasks = []
        for search, members in groups:
            made = decoder.requests(
                [prompts[i] for i in members], search=search, seed=list(members), max_new_tokens=options.max_new_tokens,
                policy=Policy(prompt=ChatFormat()),
            )  # fmt: skip
            tasks += [decoder.task(one, search, tag=i) for i, one in zip(members, made, strict=True)]
        found = {task.tag: task.result.token_ids for task in decoder.engine.run(tasks)}
        return [found[i] for i in range(len(prompts))]

    expected = direct()
    settings = ServerSettings(model="testbed", port=0, max_queue=len(prompts), log_level="error")
    ready, address = threading.Event(), []
    server = Server(create_app(settings, decoder), settings, lambda url: (address.append(url), ready.set()))
    thread = threading.Thread(target=server.run)
    thread.start()
    ready.wait()
    ours, theirs = mp.get_context("spawn").Pipe()
    child = mp.get_context("spawn").Process(target=clients, args=(theirs, address[0]), daemon=True)
    child.start()

    def served() -> Any:
        ours.send(bodies)
        return ours.recv()

    seconds: dict[str, list[float]] = {"generate": [], "server": []}
    cpu: dict[str, list[float]] = {"generate": [], "server": []}
    equal = True
    try:
        ours.send(bodies[:1])
        ours.recv()  # the clients' process is there
        for turn in range(options.rounds + 1):  # one that does not count
            for name, run in (("generate", direct), ("server", served))[:: 1 if turn % 2 else -1]:
                while server.service.num_open:
                    time.sleep(0.001)
                decoder.engine.forget()
                began, spent = time.perf_counter(), time.process_time()
                found = run()
                if turn:
                    seconds[name].append(time.perf_counter() - began)
                    cpu[name].append(time.process_time() - spent)
                equal = equal and found == expected
    finally:
        ours.send(None)
        child.join(10)
        server.should_exit = True
        thread.join()
    return report(options, seconds, cpu, equal, expected, device)


def report(
    options: Any, seconds: dict[str, list[float]], cpu: dict[str, list[float]], equal: bool, expected: Any, device: Any
) -> int:
    """Table and JSON; the exit code."""
    tokens = sum(map(len, expected))
    ratios = [a / b for a, b in zip(seconds["generate"], seconds["server"], strict=True)]
    table = Table(
        title=f"{options.shape}, {options.requests} requests at once, {tokens} tokens; answers {'equal' if equal else 'DIFFER'}"
    )
    for name in ("way", "seconds", "CPU seconds of the process", "tokens/s"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for name, values in seconds.items():
        middle = statistics.median(values)
        table.add_row(name, f"{middle:.3f}", f"{statistics.median(cpu[name]):.3f}", f"{tokens / middle:.0f}")
    console = Console(stderr=True)
    console.print(table)
    console.print(
        f"throughput of the server over generate: {statistics.median(ratios):.3f} (quartiles {quartiles(ratios)})"
    )
    record = {
            "op": "serve_cost", "shape": options.shape, "requests": options.requests, "max_new_tokens": options.max_new_tokens,
            "rain_share": options.rain_share, "stream": options.stream, "max_concurrent": options.max_concurrent, "tokens": tokens,
            "equal": equal, "seconds": rounded(seconds), "cpu_seconds": rounded(cpu), "ratio": rounded(statistics.median(ratios)),
            "ratios": rounded(ratios), "cores": os.cpu_count(), "machine": facts(device),
    }  # fmt: skip
    write_json(record, options.json)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
