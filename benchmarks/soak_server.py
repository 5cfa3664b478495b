"""A soak of the server: many clients of every kind at once, and an account of every request.

    python benchmarks/soak_server.py --requests 2000 --clients 64 --json benchmarks/results/server-soak.json

Clients ask for plain and RAIN answers, whole and streamed; some leave in the middle, some read slowly, some send nonsense. At the end
every well-formed request that was not left has one answer, equal to Decoder.generate's; no slot and no request is left over; memory
has not grown with the number of requests. Exit code 1 where any of this does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import httpx  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from kernel_bench.machine import facts  # noqa: E402

import raindecode  # noqa: E402, F401  before torch: asks MKL for reproducible results
from raindecode import RAIN, Decoder, Sampling  # noqa: E402
from raindecode.server.app import create_app  # noqa: E402
from raindecode.server.http import Server  # noqa: E402
from raindecode.server.settings import ServerSettings  # noqa: E402

PROMPTS = [f"How do I {deed} the {thing} of the {who}?" for deed in ("paint", "burn", "mend", "rob")
           for thing in ("fence", "barn") for who in ("baker", "tailor")]  # fmt: skip
_SAID = b'{"messages": [{"role": "user", "content": "a"}]'
NONSENSE = [b"", b"{", b"\xff", b'{"messages": 5}', b'{"messages": []}', _SAID + b', "align": {"x": 1}}', _SAID + b', "max_tokens": -1}',
            b"[" * 5000]  # fmt: skip
RAIN_SHAPE = {"max_iterations": 6, "min_new_iterations": 3}
TOKENS = 16


def expected_answers() -> dict[tuple[str, str, int], list[int]]:
    """What every kind of request is answered with."""
    decoder = Decoder.from_pretrained("testbed")
    found = {}
    for kind, search in (("plain", Sampling()), ("rain", RAIN.preset("town", **RAIN_SHAPE))):
        cases = [(prompt, seed) for prompt in PROMPTS for seed in range(4)]
        answers = decoder.generate(
            [p for p, _ in cases], search=search, seed=[s for _, s in cases], max_new_tokens=TOKENS
        )
        found.update({(kind, *case): answer.token_ids for case, answer in zip(cases, answers, strict=True)})
    return found


class Soak:
    """The clients, and what became of their requests."""

    def __init__(self, url: str, expected: dict[tuple[str, str, int], list[int]], seed: int) -> None:
        self.url = url
        self.expected = expected
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self, requests: int, clients: int) -> None:
        queue = iter(range(requests))
        limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
        async with httpx.AsyncClient(base_url=self.url, timeout=600, limits=limits) as http:
            await asyncio.gather(*(self._client(http, queue) for _ in range(clients)))

    async def _client(self, http: httpx.AsyncClient, queue: Any) -> None:
        for _ in queue:
            await self._one(http)

    async def _one(self, http: httpx.AsyncClient) -> None:
        draw = self.random.random()
        if draw < 0.1:
            answer = await http.post(
                "/v1/chat/completions",
                content=self.random.choice(NONSENSE),
                headers={"content-type": "application/json"},
            )
            self._count("malformed", answer.status_code == 400 and "error" in answer.json(), answer.text)
            return
        kind = "rain" if self.random.random() < 0.3 else "plain"
        prompt, seed = self.random.choice(PROMPTS), self.random.randrange(4)
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": prompt}], "seed": seed, "max_tokens": TOKENS, "return_token_ids": True,
            "align": {"rain": RAIN_SHAPE} if kind == "rain" else {},
        }  # fmt: skip
        if draw < 0.25:
            await self._leave(http, body)
        elif draw < 0.55:
            tokens = await self._stream(http, body, slow=draw < 0.3)
            self._count(
                f"{kind} streamed", tokens == self.expected[kind, prompt, seed], f"{kind} {prompt} {seed}: {tokens}"
            )
        else:
            answer = await http.post("/v1/chat/completions", json=body)
            tokens = answer.json()["choices"][0]["token_ids"] if answer.status_code == 200 else answer.text
            self._count(
                f"{kind} whole", tokens == self.expected[kind, prompt, seed], f"{kind} {prompt} {seed}: {tokens}"
            )

    async def _leave(self, http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        """Ask, and go away in the middle."""
        streams = self.random.random() < 0.5
        try:
            await asyncio.wait_for(self._ask(http, body, streams), self.random.uniform(0.0, 0.5))
            self._count("answered before it left", True, "")
        except (asyncio.TimeoutError, httpx.TransportError):
            self._count("left", True, "")

    async def _ask(self, http: httpx.AsyncClient, body: dict[str, Any], streams: bool) -> None:
        if streams:
            async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
                async for _ in answer.aiter_lines():
                    pass
        else:
            await http.post("/v1/chat/completions", json=body)

    async def _stream(self, http: httpx.AsyncClient, body: dict[str, Any], *, slow: bool) -> list[int] | str:
        tokens: list[int] = []
        ended = 0
        async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
            async for line in answer.aiter_lines():
                if slow:
                    await asyncio.sleep(0.02)
                if not line.startswith("data: {"):
                    ended += line == "data: [DONE]"
                    continue
                choice = json.loads(line[6:])["choices"][0]
                if choice["finish_reason"] is None:
                    tokens += choice.get("token_ids", [])
        return tokens if ended == 1 else f"{ended} ends"

    def _count(self, what: str, right: bool, said: str) -> None:
        self.counts[what] += 1
        if not right:
            self.wrong.append(f"{what}: {said[:300]}")


def main(arguments: list[str] | None = None) -> int:
    """Run the soak; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the account to this file")
    given = parser.parse_args(arguments)
    expected = expected_answers()
    decoder = Decoder.from_pretrained("testbed")
    settings = ServerSettings(port=0, max_queue=given.clients, log_level="error")
    ready = threading.Event()
    address: list[str] = []
    server = Server(create_app(settings, decoder), settings, lambda url: (address.append(url), ready.set()))
    thread = threading.Thread(target=server.run)
    thread.start()
    ready.wait()
    process = psutil.Process()
    memory: list[float] = []
    result: dict[str, Any] = {}
    try:
        soak = Soak(address[0], expected, given.seed)
        began = time.perf_counter()
        parts = 8
        for _ in range(parts):
            asyncio.run(soak.run(given.requests // parts, given.clients))
            memory.append(process.memory_info().rss / 2**20)
        seconds = time.perf_counter() - began
        while server.service.num_open:
            time.sleep(0.01)
        engine = decoder.engine
        engine.forget()
        result = {
            "requests": sum(soak.counts.values()), "clients": given.clients, "seconds": seconds, "kinds": dict(soak.counts),
            "wrong": soak.wrong, "open_requests": server.service.num_open, "open_cursors": engine.tree.num_cursors,
            "lost_slots": engine.tree.num_slots - engine.tree.num_free, "memory_mib": memory,
            "scheduling_delay_seconds": {f"p{100 * share:g}": server.service.metrics.delay(share) for share in (0.5, 0.99)},
            "machine": facts(torch.device("cpu")),
        }  # fmt: skip
    finally:
        server.should_exit = True
        thread.join()
    print(json.dumps({name: value for name, value in result.items() if name != "machine"}, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    held = not (result["wrong"] or result["open_requests"] or result["open_cursors"] or result["lost_slots"])
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
