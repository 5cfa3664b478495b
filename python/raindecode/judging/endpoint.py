"""One address that takes JSON by POST: retries, waiting as asked, time limits, and errors that say what is wrong."""

from __future__ import annotations

import email.utils
import json
import math
import random
import threading
import time
from typing import Any, Final
from urllib.parse import urlsplit

from raindecode.errors import ConfigError, JudgeError, JudgeUnavailableError
from raindecode.judging.secret import Secret

try:
    import httpx2
except ImportError:  # comes with the extra `judge`
    httpx2 = None  # type: ignore[assignment]

_AGAIN: Final = frozenset({408, 409, 425, 429})  # and everything from 500
_ITEM: Final = frozenset({400, 413, 422})  # about what was sent, which may be one item's fault
_CONNECTS: Final = 3  # tries to reach somebody, all within a few seconds
_LONGEST_BACKOFF: Final = 30.0  # seconds
_LARGEST: Final = 4_000_000  # bytes of an answer
_SHOWN: Final = 300  # characters of an answer that a message shows


class Stopped(Exception):
    """The run is being stopped; what was asked is not needed any more."""


class Endpoint:
    """POSTs to one address. Any number of threads may use it.

    Args:
        url: http or https, without user, password, query or fragment.
        timeout: seconds from sending a request to the end of its answer.
        retries: how often a request is sent again after 429, 5xx, a time-out or a lost connection.
        backoff: seconds before the first of these, twice as many before each further one, at most 30; less by up to a quarter so that
            threads do not come back together. Retry-After is kept to where it asks for more.
        patience: seconds that Retry-After may ask for; beyond them the request fails.
        connections: most of them at a time.

    Raises:
        ConfigError: the library is missing, or a setting is not allowed.
    """

    def __init__(
        self, url: str, key: Secret, *, timeout: float = 60.0, retries: int = 5, backoff: float = 1.0,
        patience: float = 120.0, connections: int = 8,
    ) -> None:  # fmt: skip
        if httpx2 is None:
            raise ConfigError("asking an endpoint needs the package httpx2: pip install 'rainkernels[judge]'")
        self._address = checked_url(url)
        self.url = key.hide(self._address)  # for people
        self._key = key
        self._timeout, self._retries, self._backoff, self._patience = timeout, retries, backoff, patience
        self._client = httpx2.Client(
            headers={"Content-Type": "application/json", **key.header()},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0)),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            follow_redirects=False,  # another host would be given the key
        )
        key.guard_logs()
        self._lock = threading.Lock()
        self._not_before = 0.0  # nobody asks earlier: one 429 is for all threads

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def post(self, body: dict[str, Any], stop: threading.Event) -> Any:
        """Send JSON; the JSON that comes back.

        Args:
            stop: ends waiting when set.

        Raises:
            JudgeError: this request cannot be answered: refused as it is, no answer after all tries, or an answer that is no JSON.
            JudgeUnavailableError: no request can: nobody listens, the key is refused, the address is wrong.
            Stopped: `stop` was set.
        """
        sent = json.dumps(body).encode("ascii")
        jitter = random.Random(sent)
        tries = connects = 0
        while True:
            self._wait_for_turn(stop)
            outcome = self._once(sent)
            if not isinstance(outcome, _Failed):
                return outcome
            tries += 1
            connects += outcome.unreached
            asked = outcome.retry_after
            if asked is not None and asked > self._patience:
                raise JudgeError(
                    f"{outcome.why}, and asks to wait {asked:,.0f} s, longer than the {self._patience:g} s that are waited: "
                    "go on later with --resume"
                )
            if outcome.unreached and connects >= _CONNECTS:
                raise JudgeUnavailableError(f"{outcome.why}: start it, or correct --judge-url")
            if not outcome.unreached and tries > self._retries:
                raise JudgeError(f"{outcome.why} ({tries} tries)")
            delay = min(_LONGEST_BACKOFF, self._backoff * 2 ** (tries - 1)) * (1 - jitter.random() / 4)
            if outcome.unreached:
                delay = min(delay, 0.3)
            if asked is not None:
                delay = max(delay, asked)
                with self._lock:
                    self._not_before = max(self._not_before, time.monotonic() + asked)
            if stop.wait(delay):
                raise Stopped

    def _wait_for_turn(self, stop: threading.Event) -> None:
        while True:
            with self._lock:
                left = self._not_before - time.monotonic()
            if stop.is_set() or (left > 0 and stop.wait(left)):
                raise Stopped
            if left <= 0:
                return

    def _once(self, sent: bytes) -> Any:
        """The JSON that came back, or what went wrong if it may be tried again. Raises what may not."""
        problem = None
        try:
            status, headers, data = self._exchange(sent)
        except httpx2.TimeoutException as error:
            # Being late to connect counts as not being there; being late to answer as being busy.
            unreached = isinstance(error, httpx2.ConnectTimeout)
            return _Failed(f"the judge at {self.url} did not answer within {self._timeout:g} s", None, unreached)
        except (httpx2.ConnectError, httpx2.ProxyError) as error:
            problem = f"the judge at {self.url} cannot be reached ({self._said(str(error))})"
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            return _Failed(f"the judge at {self.url} broke off its answer ({self._said(str(error))})", None)
        if problem is not None:
            return _Failed(problem, None, True)
        answer, text = self._read(data)
        if status in _AGAIN or status >= 500:
            why = f"the judge at {self.url} answers with status {status}: {self._said(text)}"
            return _Failed(why, retry_after(headers.get("retry-after"), time.time()))
        if status in _ITEM:
            raise JudgeError(f"the judge at {self.url} refuses the question with status {status}: {self._said(text)}")
        if status in (401, 403):  # services put a part of the key into this answer
            raise JudgeUnavailableError(
                f"the judge at {self.url} refuses the key, or its absence (status {status}): see --judge-key-env"
            )
        if not 200 <= status < 300:
            raise JudgeUnavailableError(
                f"the judge at {self.url} answers with status {status}: {self._said(text)}; --judge-url is the address in front "
                "of /chat/completions, --judge-model a model it has"
            )
        if answer is None:
            raise JudgeError(f"the judge at {self.url} answers with something that is no JSON: {self._said(text)}")
        return answer

    def _read(self, data: bytes) -> tuple[Any, str]:
        """The JSON in an answer, None if there is none, and the answer as text for messages; neither holds the key."""
        text = data.decode("utf-8", "replace")
        try:
            answer = _hidden(json.loads(text), self._key)  # parsed first: escapes may spell the key
        except (ValueError, RecursionError):
            return None, self._key.hide(text)
        return answer, json.dumps(answer, ensure_ascii=False)

    def _exchange(self, sent: bytes) -> tuple[int, Any, bytes]:
        """Status, headers and body. The library's limit is for every read; this one is for all of them together."""
        ends = time.monotonic() + self._timeout
        data = bytearray()
        with self._client.stream("POST", self._address, content=sent) as response:
            for chunk in response.iter_bytes():
                data += chunk
                if time.monotonic() > ends:
                    raise httpx2.ReadTimeout("the answer goes on and on")
                if len(data) > _LARGEST:
                    raise httpx2.ReadError(f"it has more than {_LARGEST:,} bytes")
            return response.status_code, response.headers, bytes(data)

    def _said(self, text: str) -> str:
        words = "".join(c if c.isprintable() else "\ufffd" for c in self._key.hide(" ".join(text.split())))
        return (words if len(words) <= _SHOWN else words[:_SHOWN] + "...") or "nothing"


class _Failed:
    """A try that came to nothing, and may be repeated.

    Attributes:
        retry_after: seconds the answer asks to wait.
        unreached: nobody was there.
    """

    def __init__(self, why: str, retry_after: float | None, unreached: bool = False) -> None:
        self.why, self.retry_after, self.unreached = why, retry_after, unreached


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks to wait, 0 or more; None when it says nothing.

    Args:
        value: a number of seconds, or a date.
        now: seconds since the epoch.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def checked_url(url: str) -> str:
    """The address without a slash at its end.

    Raises:
        ConfigError: it is no plain http or https address. One with a password is not shown.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  (raises on a bad one)
    except ValueError:
        parts = None
    if parts is not None and ("@" in parts.netloc or parts.query or parts.fragment):
        raise ConfigError(
            "--judge-url holds a user, a query or a fragment: give the bare address, and the key by --judge-key-env"
        )
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or any(c.isspace() for c in url):
        raise ConfigError(f"--judge-url is {url!r}; allowed: an address such as http://localhost:8000/v1")
    return url.rstrip("/")


def _hidden(value: Any, key: Secret) -> Any:
    """JSON data with the key hidden in its texts."""
    if isinstance(value, str):
        return key.hide(value)
    if isinstance(value, list):
        return [_hidden(one, key) for one in value]
    if isinstance(value, dict):
        return {_hidden(name, key): _hidden(one, key) for name, one in value.items()}
    return value
