"""The HTTP side: uvicorn with limits on headers and time, and a shutdown that leaves no accepted request without a word."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import Callable, Generator

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from raindecode.errors import ConfigError
from raindecode.server.faults import Fault
from raindecode.server.service import Service
from raindecode.server.settings import ServerSettings

_HEADER_BYTES = 32 * 1024
_HEADER_SECONDS = 15.0  # in these a request's headers have to arrive
_LAST_WORDS = 10.0  # behind drain_seconds, for responses to be written


class _Protocol(H11Protocol):
    """HTTP/1.1 whose own errors have OpenAI's form, and that does not wait forever for headers."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(_HEADER_SECONDS, self._give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        idle = self.conn.their_state is h11.IDLE
        if not idle and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif idle and self._timer is None and self.conn.trailing_data[0]:
            self._timer = self.loop.call_later(_HEADER_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn sends for what is no HTTP; too many headers get the status that says so."""
        too_many = len(self.conn.trailing_data[0]) >= _HEADER_BYTES
        status = 431 if too_many else 400
        if too_many:
            msg = f"the request's headers are larger than {_HEADER_BYTES} bytes; send fewer"
        body = json.dumps(Fault(status, msg, code="invalid_http").body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        events = (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server around one application.

    Args:
        app: of create_app.
        on_ready: called with the address once requests are taken.
    """

    def __init__(self, app: FastAPI, settings: ServerSettings, on_ready: Callable[[str], None] | None = None) -> None:
        self._app = app
        self._settings = settings
        self._on_ready = on_ready
        self._drain: asyncio.Task[None] | None = None
        self.was_interrupted = False
        config = uvicorn.Config(
            app, host=settings.host, port=settings.port, http=_Protocol, ws="none", lifespan="on", log_config=None, access_log=False,
            server_header=False, timeout_keep_alive=max(5, int(settings.keep_alive_seconds)), backlog=2048,
            h11_max_incomplete_event_size=_HEADER_BYTES, timeout_graceful_shutdown=int(settings.drain_seconds + _LAST_WORDS),
        )  # fmt: skip
        super().__init__(config)

    @property
    def service(self) -> Service:
        """There once the application has started."""
        service: Service = self._app.state.service
        return service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the model and listen."""
        await super().startup(sockets)
        if self.started and self._on_ready is not None:
            port = self.servers[0].sockets[0].getsockname()[1]
            host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
            self._on_ready(f"http://{host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what was accepted, or say that it was not."""
        self._drain = asyncio.create_task(self.service.drain())
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """As uvicorn's, but a server that ended in order does not end by the signal."""
        with super().capture_signals():
            yield
            self.was_interrupted = signal.SIGINT in self._captured_signals
            self._captured_signals.clear()


def check_port(settings: ServerSettings) -> None:
    """Raise ConfigError where nothing can listen, before a model is loaded for it."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port} ({reason}): give another --port (0 takes a free one) or --host"
        ) from error
