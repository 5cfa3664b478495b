"""Faults: everything that can go wrong with a request, as OpenAI's clients read it."""

from __future__ import annotations

from typing import Any

from raindecode.errors import (
    CapacityError,
    EvaluatorError,
    NumericError,
    RainDecodeError,
    RequestCancelled,
)
from rainkernels.errors import RainKernelsError

_LONGEST = 600  # characters of a message


class Fault(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one sentence or two, for people.
        param: the field at fault.
        code: for programs.
        kind: OpenAI's `type`; by the status when None.
        headers: of the response.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.message = printable(message)
        self.param = None if param is None else printable(param)
        self.code = code
        self.kind = kind or _kind(status)
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @classmethod
    def of(cls, error: BaseException) -> Fault:
        """The fault an error is."""
        if isinstance(error, Fault):
            return error
        if isinstance(error, RequestCancelled):
            return cls(503, "the request was cancelled before it ended", code="cancelled")
        if isinstance(error, CapacityError):
            return cls(400, str(error), code="kv_capacity_exceeded")
        if isinstance(error, (EvaluatorError, NumericError)):
            return cls(500, str(error), code="model_failed")
        if isinstance(error, (RainDecodeError, RainKernelsError)) and isinstance(error, ValueError):
            return cls(400, str(error))
        return cls(500, "an error inside the server; its log says more", code="internal_error")


def _kind(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    if status == 504 or status == 408:
        return "timeout_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def printable(text: str) -> str:
    """`text` as every client can take it: no lone surrogates, no control characters, not endless."""
    clean = "".join(c if c.isprintable() else " " for c in text.encode("utf-8", "replace").decode("utf-8"))
    return clean if len(clean) <= _LONGEST else clean[: _LONGEST - 3] + "..."
