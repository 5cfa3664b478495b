"""A key that shows up nowhere: not in a repr, a message, a log, or a file, and not when a server sends it back."""

from __future__ import annotations

import logging
import os
from urllib.parse import quote

from raindecode.errors import ConfigError

HIDDEN = "[key]"
"""What stands in the place of a key."""
_SHORTEST = 8  # characters of a key that is looked for in texts: "none" or "EMPTY" is no secret
_LOGGERS = (
    "httpx2", "httpcore2.connection", "httpcore2.http11", "httpcore2.http2", "httpcore2.proxy", "httpcore2.socks",
)  # fmt: skip


class Secret:
    """A key for an endpoint.

    Args:
        value: the key; "" for none.

    Raises:
        ConfigError: it holds white space, control characters or others outside ASCII. The message does not show it.
    """

    def __init__(self, value: str = "") -> None:
        if not all("!" <= character <= "~" for character in value):
            raise ConfigError(
                "the judge's key holds white space or characters that no key has: set its environment variable to the bare key"
            )
        self._value = value

    @classmethod
    def from_environment(cls, name: str) -> Secret:
        """The key that an environment variable holds; none when it is not set."""
        return cls(os.environ.get(name, "").strip())

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "Secret(set)" if self else "Secret(not set)"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a key is not written anywhere")

    def header(self) -> dict[str, str]:
        """The header that carries it; nothing without a key."""
        return {"Authorization": f"Bearer {self._value}"} if self else {}

    def hide(self, text: str) -> str:
        """`text` with HIDDEN for every place where the key stands, plain or as in an address."""
        if len(self._value) < _SHORTEST:
            return text
        return text.replace(self._value, HIDDEN).replace(quote(self._value, safe=""), HIDDEN)

    def guard_logs(self) -> None:
        """Keep the key out of what the HTTP library logs, from now on: at level DEBUG it logs the headers of answers, and an endpoint
        may send the key back in one. Threads may outlive whoever asked, so this is not undone."""
        _HIDING.secrets.append(self)
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_HIDING)  # once, however often it is added


class _Hiding(logging.Filter):
    """Hides keys in log records."""

    def __init__(self) -> None:
        super().__init__()
        self.secrets: list[Secret] = []

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        for secret in self.secrets:
            text = secret.hide(text)
        record.msg, record.args = text, None
        return True


_HIDING = _Hiding()
