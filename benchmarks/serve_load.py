"""Open-loop load on an OpenAI-compatible server: when requests are sent, what they hold, and what came of each.

A request is sent at its time, whether earlier ones are answered or not, unless a limit on open ones holds it back. Times are those
of this process: what its event loop saw, when it saw it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from raindecode.errors import ConfigError

try:
    import httpx2 as httpx
except ImportError:
    try:
        import httpx  # type: ignore[no-redef]  # the openai client brings this one
    except ImportError as error:
        raise ConfigError("bench serve needs the package httpx2: pip install 'rainkernels[judge]'") from error

Status = Literal["ok", "cancelled", "refused", "failed"]
SLOW_PAUSE = 0.05  # seconds a slow reader leaves an event lying
# Bodies that no server should take: each a client's mistake, none of them worth more than a 4xx.
MALFORMED: tuple[bytes, ...] = (
    b"{", b"", b"\xff\xfe\x00", b"[]", b'{"messages": 3}', b'{"messages": []}', b'{"messages": [{"role": "user"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": -5}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": "hot"}',
    b'{"messages": [{"role": "user", "content": "a"}], "align": {"rane": true}}',
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A request that will be sent.

    Attributes:
        at: seconds after the start.
        body: of the POST; None for one that is malformed on purpose.
        raw: the body in bytes, for those.
        cancel_after: pieces of the answer after which the client hangs up.
        slow: whether the client takes its time between pieces.
    """

    index: int
    kind: str
    at: float
    body: Mapping[str, Any] | None
    raw: bytes = b""
    cancel_after: int | None = None
    slow: bool = False


@dataclass
class Record:
    """What came of a request. Times in seconds on the clock of the run.

    Attributes:
        status: "ok" answered to the end; "cancelled" by us, as planned; "refused" with a 4xx, as planned; "failed" anything else.
        pieces: when each piece of text arrived.
        counters: the server's usage.align.
    """

    index: int
    kind: str
    due: float
    sent: float = 0.0
    ended: float = 0.0
    status: Status = "failed"
    error: str = ""
    slow: bool = False
    pieces: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def first(self) -> float | None:
        """Seconds to the first text; None where there was none."""
        return self.pieces[0] - self.sent if self.pieces else None

    @property
    def tokens(self) -> int:
        """Tokens of the answer; pieces, where the server did not count."""
        return self.completion_tokens or len(self.pieces)


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Times of `count` requests in seconds, the first at 0.

    Args:
        rate: requests per second; inf for all at once.
        burstiness: shape of the gaps' gamma distribution: 1 is a Poisson process, less comes in bursts, more is more even.
    """
    if rate == float("inf"):
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(burstiness, 1.0 / (rate * burstiness), max(0, count - 1))
    return [0.0, *np.cumsum(gaps).tolist()][:count]


@dataclass(frozen=True)
class Shares:
    """What part of the requests is of a kind, from 0 to 1 each."""

    rain: float = 0.0
    cancel: float = 0.0
    slow: float = 0.0
    malformed: float = 0.0


def plan(
    prompts: Sequence[str], times: Sequence[float], *, model: str | None, chat: bool, max_new_tokens: int, temperature: float,
    align: Mapping[str, Any], rain: Mapping[str, Any], shares: Shares, seed: int,
) -> list[Planned]:  # fmt: skip
    """A request per prompt; which is of what kind is drawn from `seed`. Request i has the seed `seed` + i.

    Args:
        align: `align` of plain requests. rain: settings of RAIN for the others, which have the rest of `align`, too.
    """
    draw = random.Random(seed)
    made = []
    for i, (prompt, at) in enumerate(zip(prompts, times, strict=True)):
        # Every share is drawn for every request, so that one of them changes nothing about the others.
        is_rain, cancels, slow, wrong, after = (draw.random() for _ in range(5))
        if wrong < shares.malformed:
            made.append(Planned(i, "malformed", at, None, MALFORMED[i % len(MALFORMED)]))
            continue
        body: dict[str, Any] = {
            **({"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}),
            "max_tokens": max_new_tokens, "temperature": temperature, "seed": seed + i, "stream": True,
            "stream_options": {"include_usage": True}, **({"model": model} if model else {}),
        }  # fmt: skip
        searched = is_rain < shares.rain
        chosen = {**align, "search": "rain", "rain": {**rain}} if searched else dict(align)
        if chosen:
            body["align"] = chosen
        stop_at = int(after * 6) if cancels < shares.cancel else None
        made.append(
            Planned(i, "rain" if searched else "plain", at, body, cancel_after=stop_at, slow=slow < shares.slow)
        )
    return made


class Load:
    """Sends what was planned.

    Args:
        url: where requests are posted to.
        max_concurrency: most requests open at a time; None for no limit.
        timeout: seconds of silence after which a request has failed.
    """

    def __init__(
        self, url: str, *, max_concurrency: int | None = None, timeout: float = 600.0, key: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self._url = url
        self._timeout = timeout
        self._headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
        self._clock = clock
        self._limit = max_concurrency
        self._gate = asyncio.Semaphore(max_concurrency) if max_concurrency else None
        self._begin = 0.0

    async def run(
        self, planned: Sequence[Planned], done: Callable[[Record], None] = lambda _: None
    ) -> tuple[list[Record], float]:
        """Send everything; the records in the order of `planned`, and the seconds it took."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._limit or 256)
        async with httpx.AsyncClient(timeout=self._timeout, limits=limits, trust_env=False) as client:
            self._begin = self._clock()
            jobs = [asyncio.create_task(self._one(client, one, done)) for one in planned]
            try:
                records = list(await asyncio.gather(*jobs))
            finally:
                for job in jobs:
                    job.cancel()
            return records, self._now()

    def _now(self) -> float:
        return self._clock() - self._begin

    async def _one(self, client: Any, one: Planned, done: Callable[[Record], None]) -> Record:
        await asyncio.sleep(max(0.0, one.at - self._now()))
        record = Record(one.index, one.kind, one.at, slow=one.slow)
        if self._gate is None:
            await self._send(client, one, record)
        else:
            async with self._gate:
                await self._send(client, one, record)
        done(record)
        return record

    async def _send(self, client: Any, one: Planned, record: Record) -> None:
        content = one.raw if one.body is None else json.dumps(one.body).encode()
        record.sent = self._now()
        try:
            async with client.stream("POST", self._url, content=content, headers=self._headers) as response:
                if response.status_code != 200:
                    said = (await response.aread()).decode("utf-8", "replace")
                    planned = one.body is None and 400 <= response.status_code < 500
                    record.status, record.error = (
                        "refused" if planned else "failed",
                        f"{response.status_code} {said[:200]}",
                    )
                elif one.body is None:
                    record.error = "200 for a malformed body"
                else:
                    record.status = await self._read(response, one, record)
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
            record.status, record.error = "failed", f"{type(error).__name__}: {error}"
        record.ended = self._now()

    async def _read(self, response: Any, one: Planned, record: Record) -> Status:
        """The events of a stream."""
        if one.cancel_after == 0:
            return "cancelled"
        finished = False
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                if not finished:
                    record.error = "the stream ended without a finish_reason"
                return "ok" if finished else "failed"
            event = json.loads(data)
            if "error" in event:
                record.error = json.dumps(event["error"])[:200]
                return "failed"
            finished |= self._take(event, record)
            if one.cancel_after is not None and len(record.pieces) >= one.cancel_after:
                return "cancelled"
            if one.slow:
                await asyncio.sleep(SLOW_PAUSE)
        record.error = "the stream ended without [DONE]"
        return "failed"

    def _take(self, event: Mapping[str, Any], record: Record) -> bool:
        """Note one event; whether it ends the answer."""
        finished = False
        for choice in event.get("choices") or ():
            piece = (choice["delta"].get("content") if "delta" in choice else choice.get("text")) or ""
            if piece:
                record.pieces.append(self._now())
                record.text += piece
            finished |= choice.get("finish_reason") is not None
        usage = event.get("usage")
        if usage:
            record.prompt_tokens = usage["prompt_tokens"]
            record.completion_tokens = usage["completion_tokens"]
            record.counters = dict(usage.get("align") or {})
        return finished
