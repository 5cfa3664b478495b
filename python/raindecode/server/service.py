"""Service: takes requests in, has them answered by the engine's thread, and gives up on those nobody waits for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from raindecode.decoder import Decoder
from raindecode.errors import PromptError
from raindecode.prompt_ids import require_text
from raindecode.server.catalog import Catalog
from raindecode.server.faults import Fault
from raindecode.server.jobs import Event, Job
from raindecode.server.loop import EngineLoop
from raindecode.server.metrics import Metrics
from raindecode.server.plans import Plan, Planner
from raindecode.server.settings import ServerSettings
from raindecode.server.token_text import TokenTexts

_LOG = logging.getLogger("raindecode.server")
_RETRY = 1  # seconds after which a refused client may ask again
_T = TypeVar("_T")


class Service:
    """One decoder behind a queue. Everything here belongs to the event loop.

    Args:
        decoder: from now on the service's own.
    """

    def __init__(self, decoder: Decoder, settings: ServerSettings) -> None:
        self.settings = settings
        self.decoder = decoder
        self.catalog = Catalog(decoder, settings)
        self.planner = Planner(self.catalog, settings, decoder.request_maker())
        self.texts = TokenTexts(decoder.codec)
        self._room = decoder.engine.max_tasks
        self._jobs: dict[Job, Plan] = {}
        self._answers = 0  # asked for and not ended
        self._draining = False
        self._loop = EngineLoop(decoder, self._ended)
        self._prepare = ThreadPoolExecutor(1, "raindecode-prepare")
        self.metrics = Metrics(decoder.engine, lambda: self.num_waiting, lambda: min(self._answers, self._room))
        self.started = time.time()

    # ---- state ----------------------------------------------------------------------------------------------------
    @property
    def num_waiting(self) -> int:
        """Answers that have no place yet."""
        return max(0, self._answers - self._room)

    @property
    def num_open(self) -> int:
        """Answers asked for that have not ended."""
        return self._answers

    @property
    def is_draining(self) -> bool:
        """Whether it takes no more requests in."""
        return self._draining

    @property
    def is_healthy(self) -> bool:
        """Whether requests can be answered."""
        return self._loop.is_healthy and not self._draining

    def start(self) -> None:
        """Start the engine's thread; to be called in the event loop."""
        self._loop.start()

    async def close(self) -> None:
        """End everything; what is still under way is reported as cancelled."""
        self._draining = True
        await asyncio.to_thread(self._loop.stop)
        self._prepare.shutdown(wait=False, cancel_futures=True)

    async def drain(self) -> None:
        """Take nothing more in, wait for what is under way, and after `drain_seconds` end it as shut down."""
        self._draining = True
        deadline = time.monotonic() + self.settings.drain_seconds
        while self._jobs and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for job in list(self._jobs):
            self._loop.cancel(job, Fault(503, "the server is shutting down", code="shutting_down"))

    # ---- requests -------------------------------------------------------------------------------------------------
    async def prepare(self, make: Callable[[Any], _T], given: Any) -> _T:
        """Run one of the planner's functions in the thread it belongs to. Raises what it raises."""
        self._admit(1)
        return await asyncio.get_running_loop().run_in_executor(self._prepare, make, given)

    def encode(self, body: Any) -> list[int]:
        """Token ids of a TokenizeBody; for `prepare`."""
        try:
            require_text(body.prompt, "prompt")
        except PromptError as error:
            raise Fault(400, str(error), param="prompt") from error
        return self.planner.codec.encode(body.prompt, special=body.add_special_tokens)

    def decode(self, body: Any) -> str:
        """Text of a DetokenizeBody; for `prepare`."""
        beyond = [token for token in body.tokens if token >= self.decoder.engine.vocab_size]
        if beyond:
            raise Fault(
                400, f"tokens holds {beyond[0]}; allowed: 0 to {self.decoder.engine.vocab_size - 1}", param="tokens"
            )
        return self.planner.codec.decode(body.tokens)

    def submit(self, plan: Plan) -> Job:
        """Have a plan answered.

        Raises:
            Fault: the queue is full (429), or the server shuts down (503).
        """
        self._admit(len(plan.choices))
        job = Job(plan.choices, streams=plan.streams and not plan.holds_back)
        self._jobs[job] = plan
        self._answers += len(plan.choices)
        self._loop.submit(job)
        if self.settings.request_seconds:
            late = Fault(504, f"no answer within {self.settings.request_seconds:g} seconds", code="timeout")
            timer = asyncio.get_running_loop().call_later(
                self.settings.request_seconds, partial(self._loop.cancel, job, late)
            )
            job.at_end = timer.cancel
        return job

    def _admit(self, count: int) -> None:
        if self._draining:
            raise Fault(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        if not self._loop.is_healthy:
            raise Fault(503, "the engine has failed; the server's log says why", code="engine_failed")
        most = self._room + self.settings.max_queue
        if self._answers + count > most:
            self.metrics.refused.inc()
            raise Fault(
                429, f"{self._answers} answers are under way or waiting, {count} more do not fit; allowed: {most} together "
                "(--max-concurrent and --max-queue); ask again later", code="queue_full", headers={"Retry-After": str(_RETRY)},
            )  # fmt: skip

    def release(self, job: Job) -> None:
        """Nobody waits for a job any more."""
        if not job.is_over:
            self._loop.cancel(job, Fault(499, "the client went away", code="client_disconnected"))

    async def answer(self, job: Job, request: Request) -> list[Any]:
        """Wait for all answers of a job.

        Raises:
            Fault: it failed, or the client went away.
        """
        waiting = asyncio.ensure_future(job.wait())
        leaving = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            leaving.cancel()
            self.release(job)
        if job.fault is not None:
            raise job.fault
        return job.results

    async def events(self, job: Job) -> AsyncIterator[list[Event]]:
        """What happens to a job, until all its answers ended.

        Raises:
            Fault: it failed.
        """
        while not job.is_drained:
            events = await job.next_events()
            if events:
                yield events
        if job.fault is not None:
            raise job.fault

    def _ended(self, job: Job) -> None:
        plan = self._jobs.pop(job)
        self._answers -= len(plan.choices)
        job.at_end()
        self.metrics.ended(plan, job)
        self._log(plan, job)

    def _log(self, plan: Plan, job: Job) -> None:
        end = job.ended or job.submitted
        fields: dict[str, Any] = {
            "event": "answer", "id": plan.id, "model": plan.model, "method": plan.label, "answers": len(plan.choices),
            "prompt_tokens": sum(len(r.prompt_ids) for r in plan.prompts), "tokens": job.tokens,
            "queue_seconds": None if job.started is None else round(job.started - job.submitted, 6),
            "first_token_seconds": None if job.first_token is None else round(job.first_token - plan.started, 6),
            "seconds": round(end - plan.started, 6),
        }  # fmt: skip
        if job.fault is not None:
            fields |= {"status": job.fault.status, "error": job.fault.code or job.fault.kind}
        if self.settings.log_prompts:
            fields["prompts"] = [request.prompt_text for request in plan.prompts]
            fields["texts"] = [getattr(outcome, "text", None) for outcome in job.results]
        _LOG.info("answer", extra={"fields": fields})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
