"""What a serving run is aimed at: a server of its own in another process, and what its answers have to be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from serve_load import Planned, httpx

from raindecode.decoder import Decoder
from raindecode.engine.task import Task
from raindecode.errors import ConfigError, RainDecodeError
from raindecode.search.sampling import Sampling

ROOT = Path(__file__).resolve().parents[1]
_ADDRESS = re.compile(r"https?://\S+")
_WARM = 2  # answers before the clock runs


class OwnServer:
    """`raindecode serve` in a process of its own, on a port of its own, until the block ends.

    Args:
        words: options of the command.
        ready_seconds: in which it has to take requests.

    Raises:
        RainDecodeError: it ended, or took too long; the message has its last words.
    """

    def __init__(self, words: Sequence[str], *, ready_seconds: float = 300.0) -> None:
        self._words = [sys.executable, "-m", "raindecode", "serve", "--port", "0", "--log-level", "warning", *words]
        self._seconds = ready_seconds
        self._said: deque[str] = deque(maxlen=20)
        self._ready = threading.Event()
        self.url = ""
        self.exit_code: int | None = None

    def __enter__(self) -> OwnServer:
        paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._process = subprocess.Popen(
            self._words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace",
            env=environment,
        )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()
        if not self._ready.wait(self._seconds) or not self.url:
            self.__exit__()
            raise RainDecodeError(
                f"the server did not start ({'it ended' if self._ready.is_set() else f'{self._seconds:g} s were not enough'}); its last "
                f"words: {' '.join(self._said) or 'none'}"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self.exit_code = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.exit_code = self._process.wait()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line.strip())
            found = _ADDRESS.search(line)
            if not self.url and found and line.startswith("serving "):
                self.url = found[0]
                self._ready.set()
        self._ready.set()  # it ended

    def usage(self) -> dict[str, float]:
        """Memory in MB and processor seconds of the process so far; empty where the system does not say."""
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return {}
        ticks = int(stat[11]) + int(stat[12])
        return {"rss_mb": pages * os.sysconf("SC_PAGE_SIZE") / 2**20, "cpu_s": ticks / os.sysconf("SC_CLK_TCK")}


class Remote:
    """A server over HTTP, for what is asked beside the load."""

    def __init__(self, base: str, key: str | None) -> None:
        self._base = base
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(timeout=30.0, headers=headers, trust_env=False)

    def models(self) -> list[str]:
        """Names it serves.

        Raises:
            ConfigError: nobody listens there, or it speaks no OpenAI API.
        """
        try:
            answer = self._client.get(f"{self._base}/v1/models")
            answer.raise_for_status()
            return [one["id"] for one in answer.json()["data"]]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--base-url is {self._base!r}, and its /v1/models cannot be read ({error}): give a server of OpenAI's API, without /v1"
            ) from error

    def align(self) -> dict[str, Any]:
        """What it has to align by; empty for another software."""
        try:
            answer = self._client.get(f"{self._base}/v1/align")
            return dict(answer.json()) if answer.status_code == 200 else {}
        except (httpx.HTTPError, ValueError, TypeError):
            return {}

    def metrics(self) -> dict[str, float]:
        """Its /metrics without histograms' buckets; empty where it has none, or a page of another kind."""
        try:
            answer = self._client.get(f"{self._base}/metrics")
            return samples(answer.text) if answer.status_code == 200 else {}
        except (httpx.HTTPError, ValueError):
            return {}

    def settle(self, seconds: float = 10.0) -> dict[str, float]:
        """Its /metrics once nothing is under way, or after `seconds`: hanging up takes it a moment to see."""
        until = time.monotonic() + seconds
        while True:
            found = self.metrics()
            open_ = sum(value for name, value in found.items() if re.search(r"num_requests_(running|waiting)$", name))
            if not open_ or time.monotonic() > until:
                return found
            time.sleep(0.05)


def samples(text: str) -> dict[str, float]:
    """Values of Prometheus' text form by name and labels."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name and not line.startswith("#") and "_bucket" not in name and "_created" not in name:
            found[name] = float(value)
    return found


class Answer(NamedTuple):
    """What a request has to be answered with."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Expected:
    """Answers of a decoder in this process.

    Attributes:
        answers: by index of the request.
        seconds: the decoder took for all of them, its own batching included.
        cpu_seconds: of processors for that, which other work on the machine changes less.
    """

    answers: Mapping[int, Answer]
    seconds: float
    cpu_seconds: float

    @classmethod
    def of(cls, decoder: Decoder, planned: Sequence[Planned], settings: Mapping[str, Any]) -> Expected:
        """Have every well-formed request answered.

        Args:
            settings: of the server, as ServerSettings has them.
        """
        wanted = [one for one in planned if one.body is not None]
        for task in decoder.engine.run(_tasks(decoder, wanted[:_WARM], settings)):
            if task.error is not None:
                raise task.error
        begin, cpu = time.perf_counter(), time.process_time()
        found = {}
        with closing(decoder.engine.run(_tasks(decoder, wanted, settings))) as ended:
            for task in ended:
                if task.error is not None:
                    raise task.error
                found[task.tag] = Answer(task.result.text, len(task.result.token_ids))
        return cls(found, time.perf_counter() - begin, time.process_time() - cpu)


def _tasks(decoder: Decoder, planned: Sequence[Planned], settings: Mapping[str, Any]) -> list[Task]:
    """The same work for the decoder alone.

    Raises:
        ConfigError: a request asks for what there is not.
    """
    from pydantic import ValidationError

    from raindecode.server.align import Align
    from raindecode.server.catalog import Catalog
    from raindecode.server.faults import Fault
    from raindecode.server.settings import ServerSettings

    catalog = Catalog(decoder, ServerSettings(**settings))
    tasks = []
    for one in planned:
        body = one.body
        assert body is not None
        sampling, chat = Sampling(temperature=body["temperature"]), "messages" in body
        try:
            align = catalog.align_of(None, Align.model_validate(body.get("align", {})), None)
            search, policy = catalog.choose(align, sampling, chat=chat)
        except (ValidationError, Fault) as error:
            raise ConfigError(
                f"--align or --rain asks for what the server has not: {' '.join(str(error).split())}"
            ) from error
        (request,) = decoder.requests(
            [body["messages"] if chat else body["prompt"]], search=search, policy=policy, max_new_tokens=body["max_tokens"],
            seed=body["seed"],
        )  # fmt: skip
        tasks.append(decoder.task(request, search, tag=one.index))
    return tasks
