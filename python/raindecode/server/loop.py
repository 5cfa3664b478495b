"""EngineLoop: the thread that owns the decoder. It takes requests in and steps the engine while any are under way."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

from raindecode.decoder import Decoder
from raindecode.engine.task import Task
from raindecode.server.faults import Fault
from raindecode.server.jobs import Job

_LOG = logging.getLogger("raindecode.server")
_MOST_FAILURES = 5  # steps that fail one after the other, after which the server calls itself unhealthy


class EngineLoop:
    """Steps a decoder's engine in a thread of its own; everything else reaches the engine through it.

    Args:
        decoder: nothing else may use it while the loop runs.
        on_end: called in the event loop with every job that is over.
    """

    def __init__(self, decoder: Decoder, on_end: Callable[[Job], None]) -> None:
        self._decoder = decoder
        self._engine = decoder.engine
        self._on_end = on_end
        self._changed = threading.Condition()
        self._inbox: list[Job] = []
        self._active: dict[Job, None] = {}
        self._stopping = False
        self._ended = False
        self._failures = 0
        self._events: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="raindecode-engine", daemon=True)

    def start(self) -> None:
        """Begin; to be called in the event loop that jobs are waited for in."""
        self._events = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End what is under way as cancelled, and the thread. Blocks for the length of a step."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_healthy(self) -> bool:
        """Whether the thread lives and steps succeed."""
        return self._thread.is_alive() and self._failures < _MOST_FAILURES

    def submit(self, job: Job) -> None:
        """Take a job in. Its answers arrive by Job.deliver."""
        with self._changed:
            if not self._ended:
                self._inbox.append(job)
                self._changed.notify()
                return
        job.drop(Fault(503, "the engine has failed; the server's log says why", code="engine_failed"))
        assert self._events is not None
        self._events.call_soon(self._deliver, [(job, *job.take())])

    def cancel(self, job: Job, fault: Fault) -> None:
        """End a job at the next step. Nothing happens to one that ended."""
        if job.ended is None:
            job.fault = job.fault or fault
            for task in job.tasks:
                task.cancel()

    def _run(self) -> None:
        try:
            while self._wait():
                self._hand_over(self._step())  # no name for what ended: it would live until the next step
        except BaseException as error:
            _LOG.critical("the engine's thread ended", exc_info=True)
            self._abandon(error)
            raise

    def _step(self) -> list[Task]:
        """One step; the tasks that ended."""
        try:
            ended = self._engine.step()
        except Exception:
            self._failures += 1
            _LOG.exception("a step of the engine failed; the requests in it ended with an error")
            return self._after_failure()
        self._failures = 0
        return ended

    def _after_failure(self) -> list[Task]:
        """The tasks a failed step ended. Where it ended none, the next step would fail as it did: all end."""
        active = [task for job in self._active for task in job.tasks]
        ended = [task for task in active if task.done]
        if not ended:
            if self._failures >= 2 * _MOST_FAILURES:
                raise RuntimeError("the engine cannot end its requests: it goes no further")
            for job in self._active:
                job.fail(Fault(500, "an error inside the server; its log says more", code="internal_error"))
        return ended

    def _abandon(self, error: BaseException) -> None:
        """Nothing steps any more: tell everybody who waits."""
        with self._changed:
            self._ended = True
            inbox, self._inbox = self._inbox, []
        for job in inbox:
            self._active[job] = None
        for job in self._active:
            job.drop(Fault.of(error))
        self._hand_over([])

    def _wait(self) -> bool:
        """Take in what was submitted; with nothing to do, sleep. False when the thread is to end."""
        with self._changed:
            while not (self._inbox or self._active or self._stopping):
                self._changed.wait()
            inbox, self._inbox = self._inbox, []
            stopping = self._stopping
        for job in inbox:
            self._begin(job)
        if stopping:
            for job in self._active:
                self.cancel(job, Fault(503, "the server is shutting down", code="shutting_down"))
        return bool(self._active) or not stopping

    def _begin(self, job: Job) -> None:
        self._active[job] = None
        try:
            tasks = job.begin(self._decoder)
        except Exception as error:
            _LOG.exception("a request could not be begun")
            job.drop(Fault.of(error))
            return
        for task in tasks:
            self._engine.submit(task)

    def _hand_over(self, ended: list[Task]) -> None:
        """Tell the event loop what the step did, all jobs in one call: each wakes it up."""
        for task in ended:
            job, index = task.tag
            job.end(task, index)
        news = [(job, *job.take()) for job in self._active if job.has_news]
        if not news:
            return
        for job, _, over in news:
            if over:
                del self._active[job]
        assert self._events is not None
        try:
            self._events.call_soon_threadsafe(self._deliver, news)
        except RuntimeError:  # the event loop is closed: nobody waits any more
            _LOG.debug("answers came after the event loop had closed")

    def _deliver(self, news: list[tuple[Job, list[Any], bool]]) -> None:
        for job, events, over in news:
            job.deliver(events, over)
            if over:
                self._on_end(job)
