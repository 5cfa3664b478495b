"""Guard: what every HTTP request has to pass before the application sees it, and what every response gets."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import Sequence
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raindecode.server.faults import Fault
from raindecode.server.settings import ServerSettings

_LOG = logging.getLogger("raindecode.server")
_ID = re.compile(r"[!-~]{1,128}")
_MOST_BODIES = 64  # of the largest size, in memory at once
OPEN_PATHS = ("/", "/health")
"""What needs no key: a page without data, and the word whether the server is well."""
_SAFE = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}


class Guard:
    """ASGI middleware: request ids, host names, keys, content types, sizes and times of bodies, the access log.

    The body is read here, as a whole and within limits, before anything is done for it.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._keys = [_digest(key) for key in settings.api_keys]
        self._hosts = settings.hosts
        self._held = 0  # bytes of bodies of requests that are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        held = [0]

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                changed = MutableHeaders(scope=message)
                changed["X-Request-Id"] = request_id
                for name, value in _SAFE.items():
                    changed.setdefault(name, value)
            await send(message)

        try:
            self._check(scope, headers)
            body = await self._body(headers, receive, held)
            if body is None:
                return
            await self._app(scope, _Replay(body, receive), answered)
        except Fault as fault:
            if not status:
                await _refuse(fault, answered)
        except Exception as error:
            _LOG.exception("request %s failed", request_id)
            if not status:
                await _refuse(Fault.of(error), answered)
        finally:
            self._held -= held[0]
            self._note(scope, request_id, status, time.perf_counter() - began)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = _host_of(headers.get("host", ""))
        if "*" not in self._hosts and host not in self._hosts and scope["path"] != "/health":  # probes come by address
            raise Fault(
                403,
                f"this server is not called {host!r:.80}; allowed: {', '.join(self._hosts)} (--allowed-host)",
                code="host_not_allowed",
            )
        preflight = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if self._keys and scope["path"] not in OPEN_PATHS and not preflight and not self._knows(headers):
            raise Fault(
                401, "this server needs an API key: send it as 'Authorization: Bearer KEY'", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise Fault(415, f"the content type is {kind!r:.80}; send application/json", code="unsupported_media_type")
        packed = headers.get("content-encoding", "identity").strip().lower()
        if packed not in ("", "identity"):
            raise Fault(
                415, f"the content encoding is {packed!r:.80}; send the body as it is, without one", code="unsupported_media_type"
            )  # fmt: skip

    def _knows(self, headers: Headers) -> bool:
        """Whether the request has one of the keys; it takes as long whichever, and whether or not."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = _digest(token.strip() if kind.lower() == "bearer" else "")
        return sum(hmac.compare_digest(given, key) for key in self._keys) > 0

    async def _body(self, headers: Headers, receive: Receive, held: list[int]) -> bytes | None:
        """The whole body, its size added to `held`; None when the client went away."""
        most = self._settings.max_body_bytes
        too_large = Fault(
            413, f"the body is larger than {most} bytes, which is what this server takes (--max-body-bytes)", code="body_too_large",
            headers={"Connection": "close"},
        )  # fmt: skip
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > most):
            raise too_large
        parts: list[bytes] = []
        size = 0
        deadline = time.monotonic() + self._settings.body_seconds
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise Fault(
                    408, f"the body did not arrive within {self._settings.body_seconds:g} seconds", code="body_timeout",
                    headers={"Connection": "close"},
                ) from None  # fmt: skip
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > most:
                raise too_large
            held[0] += len(part)
            self._held += len(part)
            if self._held > _MOST_BODIES * most:
                raise Fault(
                    429, "the server holds too many large requests; ask again later", code="queue_full",
                    headers={"Retry-After": "1", "Connection": "close"},
                )  # fmt: skip
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        service = getattr(getattr(scope.get("app"), "state", None), "service", None)
        if service is not None:
            route = getattr(scope.get("route"), "path", "other")
            service.metrics.responses.labels(route, str(status or 499)).inc()
        fields = {
            "event": "http", "request_id": request_id, "method": scope["method"], "path": scope["path"][:200], "status": status or 499,
            "seconds": round(seconds, 6),
        }  # fmt: skip
        quiet = scope["path"] in ("/health", "/metrics") and status == 200
        _LOG.log(logging.DEBUG if quiet else logging.INFO, "http", extra={"fields": fields})


class _Replay:
    """A body that was read already, then whatever comes behind it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._message: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        message, self._message = self._message, None
        return message if message is not None else await self._receive()


async def _refuse(fault: Fault, send: Send) -> None:
    body = json.dumps(fault.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **fault.headers}
    raw: Sequence[tuple[bytes, bytes]] = [
        (k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()
    ]
    await send({"type": "http.response.start", "status": fault.status, "headers": list(raw)})
    await send({"type": "http.response.body", "body": body})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _host_of(header: str) -> str:
    """The name in a Host header, without the port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()
