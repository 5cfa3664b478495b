"""A crew of jobs that advance in lock-step; jobs join and leave while the others go on."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from raindecode.engine.types import HostCall, Search, Want


class Crew:
    """What all jobs want goes into one forward, their host calls into one call per function.

    A job catches its own failures and puts its result where its owner finds it.
    """

    def __init__(self) -> None:
        self._inbox: dict[Search, Any] = {}
        self._wanted: dict[Search, Sequence[Want]] = {}
        self._calls: dict[Search, HostCall] = {}

    def start(self, job: Search) -> None:
        """Add a job; it begins with the next round."""
        self._inbox[job] = None

    def cancel(self, job: Search) -> None:
        """Drop a job, ended or not."""
        for waiting in (self._inbox, self._wanted, self._calls):
            waiting.pop(job, None)
        job.close()

    def close(self) -> None:
        """Drop all jobs."""
        for job in [*self._inbox, *self._wanted, *self._calls]:
            self.cancel(job)

    def advance(self) -> Generator[Any, Any, None]:
        """One round: until a job ends, or else through one forward."""
        if (yield from self._settle()) or not self._wanted:
            return
        wanted, self._wanted = self._wanted, {}
        answers = yield [want for wants in wanted.values() for want in wants]
        at = 0
        for job, wants in wanted.items():
            self._inbox[job] = answers[at : at + len(wants)]
            at += len(wants)
        yield from self._settle()

    def _settle(self) -> Generator[Any, Any, bool]:
        """Bring every job to where it wants the model. Whether any ended."""
        ended = False
        while self._inbox or self._calls:
            while self._inbox:
                job = next(iter(self._inbox))
                ended |= self._send(job, self._inbox.pop(job))
            groups: dict[Any, list[Search]] = {}
            for job, call in self._calls.items():
                groups.setdefault(call.function, []).append(job)
            for function, jobs in groups.items():
                yield from self._call(function, jobs)
        return ended

    def _send(self, job: Search, value: Any) -> bool:
        """Go on with one job. Whether it ended."""
        try:
            wanted = job.throw(value) if isinstance(value, Exception) else job.send(value)
        except StopIteration:
            return True
        if isinstance(wanted, HostCall):
            self._calls[job] = wanted
        else:
            self._wanted[job] = wanted
        return False

    def _call(self, function: Any, jobs: list[Search]) -> Generator[Any, Any, None]:
        """One host call for several jobs; where it fails, one each, so that only the job at fault sees the failure."""
        items = [item for job in jobs for item in self._calls[job].items]
        results: Sequence[Any] = ()
        failed: Exception | None = None
        try:
            results = yield HostCall(function, items)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    yield from self._call(function, [job])
                return
            failed = error
        at = 0
        for job in jobs:
            size = len(self._calls.pop(job).items)
            self._inbox[job] = failed or results[at : at + size]
            at += size
