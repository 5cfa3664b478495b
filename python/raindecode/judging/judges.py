"""Judges: a language model behind an OpenAI-compatible endpoint, or a Python function."""

from __future__ import annotations

import importlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol

from raindecode.errors import ConfigError, JudgeError, JudgeUnavailableError
from raindecode.judging.endpoint import Endpoint, Stopped
from raindecode.judging.rubric import Item
from raindecode.judging.secret import Secret
from raindecode.judging.verdicts import Verdict, as_verdict, parse_verdict
from raindecode.settings import require_finite, require_whole

_GRACE = 10.0  # seconds that questions under way are given when the run has to end

Outcome = tuple[int, "Verdict | JudgeError"]
"""A position in the items given, and the verdict on that item or why there is none."""
JudgeFunction = Callable[[list[dict[str, Any]]], Sequence[Any]]
"""Given items as `Item.to_json` writes them. Returns as many: what `as_verdict` reads, text with such JSON in it, or an exception."""


class Judge(Protocol):
    """Scores answers."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a verdict, as plain data without secrets; verdicts of judges that differ here are not mixed."""
        ...

    def judge(self, items: Sequence[Item]) -> Generator[Outcome, None, None]:
        """Judge items, in whatever order. An item that fails is an outcome; JudgeUnavailableError ends all."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class OpenAIJudge:
    """A chat model behind any endpoint that takes POST .../chat/completions.

    Args:
        model: its name there.
        url: the address in front of /chat/completions.
        key: sent as bearer token when there is one; it shows up nowhere else.
        concurrency: questions under way together.
        attempts: how often an item is asked in all when the reply is no verdict; what was said, and what is wrong with it, stands in
            the next question.
        body: more fields of the request, such as {"max_tokens": 800}; None takes a field out. The temperature is 0 without.
        timeout, retries, backoff, patience: see Endpoint.

    Raises:
        ConfigError: a setting is not allowed.
    """

    def __init__(
        self, model: str, url: str, key: Secret | None = None, *, concurrency: int = 8, attempts: int = 3,
        body: Mapping[str, Any] | None = None, timeout: float = 60.0, retries: int = 5, backoff: float = 1.0,
        patience: float = 120.0,
    ) -> None:  # fmt: skip
        if not model.strip():
            raise ConfigError("the judge's model has no name: give the endpoint's name for it with --judge-model")
        require_whole("judge-concurrency", concurrency, 1)
        require_whole("judge-attempts", attempts, 1)
        require_whole("judge-retries", retries, 0)
        require_finite("judge-timeout", timeout)
        if timeout <= 0:
            raise ConfigError(f"judge-timeout is {timeout:g}; allowed: seconds, more than 0")
        reserved = sorted({"model", "messages", "stream", "n"} & set(body or {}))
        if reserved:
            raise ConfigError(
                f"the judge's request body sets {', '.join(reserved)}, which raindecode sets itself: leave it out"
            )
        self._body = {"temperature": 0, **(body or {})}
        self._model, self._attempts, self._concurrency = model, attempts, concurrency
        self._secret = key or Secret()
        self._endpoint = Endpoint(
            checked_completions(url), self._secret, timeout=timeout, retries=retries, backoff=backoff, patience=patience,
            connections=concurrency,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"OpenAIJudge({self._model!r}, {self._endpoint.url!r})"

    @property
    def settings(self) -> dict[str, Any]:
        # Not the address: the same model may come back at another port.
        return {"judge": "openai", "judge_model": self._model, "judge_body": self._body}

    def close(self) -> None:
        self._endpoint.close()

    def judge(self, items: Sequence[Item]) -> Generator[Outcome, None, None]:
        """As Judge.judge. What has been answered when Ctrl-C comes is still yielded before KeyboardInterrupt goes on."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for at in range(len(items)):
            waiting.put(at)
        ended: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                try:
                    at = waiting.get_nowait()
                except queue.Empty:
                    return
                outcome: Any
                try:
                    outcome = self._verdict(items[at], stop)
                except Stopped:
                    return
                except Exception as error:  # what is no JudgeError is raised in the thread that listens
                    outcome = error
                    if isinstance(error, JudgeUnavailableError) or not isinstance(error, JudgeError):
                        stop.set()
                ended.put((at, outcome))

        # Daemons: a thread that waits for an answer must not hold up the end of the process.
        threads = [
            threading.Thread(target=work, daemon=True, name="raindecode-judge")
            for _ in range(min(self._concurrency, len(items)))
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in range(len(items)):
                at, outcome = ended.get()
                if isinstance(outcome, JudgeUnavailableError) or not isinstance(outcome, (Verdict, JudgeError)):
                    until = time.monotonic() + _GRACE
                    for thread in threads:  # what they have asked may be answered yet
                        thread.join(max(0.0, until - time.monotonic()))
                    yield from _verdicts_in(ended)
                    raise outcome
                yield at, outcome
        except KeyboardInterrupt:
            stop.set()
            yield from _verdicts_in(ended)
            raise
        finally:
            stop.set()

    def _verdict(self, item: Item, stop: threading.Event) -> Verdict:
        messages = [{"role": "user", "content": item.prompt()}]
        for attempt in range(1, self._attempts + 1):
            body = {"model": self._model, "messages": messages, **self._body}
            answer = self._endpoint.post({k: v for k, v in body.items() if v is not None}, stop)
            reply = ""
            try:
                reply = _reply(answer)
                return parse_verdict(reply, item.rubric)
            except JudgeError as error:
                if attempt == self._attempts:
                    raise JudgeError(f"{error} (asked {attempt} times)" if attempt > 1 else str(error)) from None
                problem = str(error)
            if reply:
                again = f"That cannot be used: {problem}. Reply with the JSON object alone, in the form asked for."
                messages = [
                    *messages,
                    {"role": "assistant", "content": reply[:4000]},
                    {"role": "user", "content": again},
                ]
        raise AssertionError("unreachable: attempts is at least 1")


def checked_completions(url: str) -> str:
    """The address that takes chats."""
    bare = url.rstrip("/")
    return bare if bare.endswith("/chat/completions") else f"{bare}/chat/completions"


def _verdicts_in(ended: queue.SimpleQueue[tuple[int, Any]]) -> Generator[Outcome, None, None]:
    """What is there already."""
    while True:
        try:
            at, outcome = ended.get_nowait()
        except queue.Empty:
            return
        if isinstance(outcome, Verdict):
            yield at, outcome


def _reply(answer: Any) -> str:
    """What the model said, from the answer of the endpoint.

    Raises:
        JudgeError: nothing.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    message = (
        choices[0].get("message") if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    )
    if not isinstance(message, dict):
        raise JudgeError(f"the judge's endpoint answers without a message: {str(answer)[:200]!r}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if isinstance(content, str) and content.strip():
        return content
    said = message.get("refusal")
    raise JudgeError(f"the judge said nothing{f', and refused: {said!r:.200}' if said else ''}")


class CallableJudge:
    """A Python function as judge.

    Args:
        function: see JudgeFunction. What it raises counts for every item of the call.
        name: what verdicts are marked with.
        batch: most items of a call; the verdicts of a call are there when it returns.

    Raises:
        ConfigError: a setting is not allowed.
    """

    def __init__(self, function: JudgeFunction, name: str | None = None, *, batch: int = 16) -> None:
        if not callable(function):
            raise ConfigError(f"the judge is a {type(function).__name__}; give a function of a list of items")
        require_whole("judge-batch", batch, 1)
        self._function, self._batch = function, batch
        self._name = (
            name
            or f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', type(function).__name__)}"
        )

    @classmethod
    def named(cls, text: str, *, batch: int = 16) -> CallableJudge:
        """The function called `text`, MODULE:FUNCTION; modules of the working directory are found too.

        Raises:
            ConfigError: there is none.
        """
        module, _, function = text.partition(":")
        if not module or not function:
            raise ConfigError(f"the judge is {text!r}; allowed: openai, none, or MODULE:FUNCTION")
        here = os.getcwd()
        sys.path.insert(0, here)
        try:
            found: Any = importlib.import_module(module)
            for part in function.split("."):
                found = getattr(found, part)
        except Exception as error:  # the module is the user's: it may raise anything
            raise ConfigError(f"the judge {text!r} cannot be loaded ({type(error).__name__}: {error})") from error
        finally:
            sys.path.remove(here)
        return cls(found, text, batch=batch)

    def __repr__(self) -> str:
        return f"CallableJudge({self._name!r})"

    @property
    def settings(self) -> dict[str, Any]:
        return {"judge": self._name}

    def close(self) -> None:
        """Nothing is held."""

    def judge(self, items: Sequence[Item]) -> Generator[Outcome, None, None]:
        """As Judge.judge; a function that returns no list of as many replies ends all."""
        for start in range(0, len(items), self._batch):
            some = items[start : start + self._batch]
            try:
                replies = self._function([item.to_json() for item in some])
            except Exception as error:  # the function is the user's: it may raise anything
                replies = [error] * len(some)
            if isinstance(replies, (str, bytes, Mapping)) or not isinstance(replies, Sequence):
                raise JudgeUnavailableError(
                    f"the judge {self._name} returned a {type(replies).__name__}; it has to return a list, one reply per item"
                )
            if len(replies) != len(some):
                raise JudgeUnavailableError(
                    f"the judge {self._name} returned {len(replies)} replies for {len(some)} items"
                )
            for at, (item, reply) in enumerate(zip(some, replies, strict=True), start=start):
                yield at, self._verdict(item, reply)

    def _verdict(self, item: Item, reply: Any) -> Verdict | JudgeError:
        try:
            if isinstance(reply, str):
                return parse_verdict(reply, item.rubric)
            if isinstance(reply, Mapping):
                return as_verdict(reply, item.rubric)
        except JudgeError as error:
            return error
        if isinstance(reply, JudgeError):
            return reply
        if isinstance(reply, Exception):
            return JudgeError(f"the judge {self._name} raised {type(reply).__name__}: {reply}")
        return JudgeError(
            f"the judge {self._name} returned a {type(reply).__name__} for an item; allowed: a mapping of aspects to scores, "
            "text with such JSON in it, or an exception"
        )
