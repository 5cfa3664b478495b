"""An endpoint on the loopback interface that judges as a test tells it to, and small question files."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ASPECTS = ("helpfulness", "clarity", "factuality", "depth", "engagement")
GOOD = {name: {"reason": f"{name} is fine", "score": 4} for name in ASPECTS}
ALL_GOOD = {**GOOD, "safety": {"reason": "harmless", "score": 5}, "quality": {"reason": "fine", "score": 7}}


@dataclass
class Reply:
    """What the endpoint does with a request.

    Attributes:
        text: the assistant's words; None sends `body` as it is.
        pause: seconds before anything is sent.
        dribble: seconds between single bytes of the body.
        drop: hang up without an answer.
    """

    text: str | None = json.dumps(ALL_GOOD)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    pause: float = 0.0
    dribble: float = 0.0
    drop: bool = False


@dataclass
class Asked:
    """A request that came in."""

    at: float
    path: str
    headers: dict[str, str]
    body: Any

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][0]["content"])


class FakeJudge:
    """Attributes: url to give as --judge-url; what was `asked`; most requests that were `together`."""

    def __init__(self, reply: Callable[[int, Asked], Reply]) -> None:
        self.asked: list[Asked] = []
        self.together = 0
        self._now = 0
        self._lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked = Asked(time.monotonic(), self.path, dict(self.headers), body)
                with fake._lock:
                    number = len(fake.asked)
                    fake.asked.append(asked)
                    fake._now += 1
                    fake.together = max(fake.together, fake._now)
                try:
                    self._send(reply(number, asked))
                except OSError:
                    pass  # the client has gone
                finally:
                    with fake._lock:
                        fake._now -= 1

            def _send(self, answer: Reply) -> None:
                time.sleep(answer.pause)
                if answer.drop:
                    self.close_connection = True
                    return
                message = {"choices": [{"message": {"role": "assistant", "content": answer.text}}]}
                data = (answer.body if answer.text is None else json.dumps(message)).encode()
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                for at in range(0, len(data), 1 if answer.dribble else len(data)):
                    self.wfile.write(data[at : at + (1 if answer.dribble else len(data))])
                    self.wfile.flush()
                    time.sleep(answer.dribble)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                pass  # clients that hang up

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def judging(reply: Callable[[int, Asked], Reply]) -> Iterator[FakeJudge]:
    """An endpoint for as long as it is needed; `reply` is called with the number of the request, from 0, and the request."""
    fake = FakeJudge(reply)
    try:
        yield fake
    finally:
        fake.close()


def write_lines(path: Path, entries: list[Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def just_eval_entries(regular: int = 4, safety: int = 2) -> list[dict[str, Any]]:
    """Questions of our own in the published form."""
    entries = [
        {
            "id": i,
            "instruction": f"How do I paint fence {i}?",
            "source_id": f"ours-{i}",
            "dataset": "ours",
            "category": "regular",
        }
        for i in range(regular)
    ]
    return entries + [
        {
            "id": regular + i,
            "instruction": f"How do I burn barn {i}?",
            "source_id": f"bad-{i}",
            "dataset": "bad",
            "category": "safety",
        }
        for i in range(safety)
    ]


def mt_bench_entries() -> list[dict[str, Any]]:
    """Questions of our own in the published form."""
    return [
        {"question_id": 81, "category": "writing", "turns": ["How do I paint the fence?", "And the barn?"]},
        {
            "question_id": 90,
            "category": "math",
            "turns": ["What is two and two?", "And three?"],
            "reference": ["four", "five"],
        },
    ]
