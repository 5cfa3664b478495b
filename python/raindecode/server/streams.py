"""EventStream: an answer as server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

from raindecode.server.faults import Fault
from raindecode.server.jobs import Job
from raindecode.server.replies import DONE, Replies, event_bytes
from raindecode.server.service import Service

_LOG = logging.getLogger("raindecode.server")
logging.getLogger("sse_starlette").setLevel(
    logging.INFO
)  # at DEBUG it writes every chunk, which is what the model answered
_SEND_SECONDS = 300.0  # a client that takes nothing for so long is gone
_SLACK = 5.0  # behind the end of a shutdown's wait, for its last words


class EventStream(EventSourceResponse):
    """A job's events as they come; comments in between keep the connection open. Whatever ends it, the job is given up."""

    def __init__(self, service: Service, job: Job, replies: Replies, headers: Mapping[str, str]) -> None:
        self._service = service
        self._job = job
        super().__init__(
            _written(service, job, replies), headers=dict(headers), sep="\n", ping=service.settings.keep_alive_seconds,
            ping_message_factory=lambda: ServerSentEvent(comment="ping"), send_timeout=_SEND_SECONDS,
            shutdown_event=None, shutdown_grace_period=service.settings.drain_seconds + _SLACK,
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            _LOG.info("a client took nothing for %g seconds: its stream is closed", _SEND_SECONDS)
        finally:
            self._service.release(self._job)


async def _written(service: Service, job: Job, replies: Replies) -> AsyncIterator[bytes]:
    try:
        async for events in service.events(job):
            text = b"".join(event_bytes(chunk) for chunk in replies.chunks(events))
            if text:
                yield text
        last: dict[str, Any] | None = replies.last_chunk(job.results)
        yield (event_bytes(last) if last is not None else b"") + DONE
    except asyncio.CancelledError:
        raise
    except Exception as error:
        fault = Fault.of(error)
        if not isinstance(error, Fault):
            _LOG.exception("a stream failed")
        yield event_bytes(fault.body) + DONE
