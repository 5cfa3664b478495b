"""A server of the testbed in this process, for tests: uvicorn in a thread, on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from raindecode import Decoder
from raindecode.server.app import create_app
from raindecode.server.http import Server
from raindecode.server.service import Service
from raindecode.server.settings import ServerSettings


class Served:
    """A server that runs. `url` has no slash at its end."""

    def __init__(self, server: Server, decoder: Decoder) -> None:
        self.server = server
        self.decoder = decoder
        self.url = ""

    @property
    def service(self) -> Service:
        return self.server.service

    def settle(self) -> None:
        """Wait until nothing is under way, so that a test may look at the engine from its own thread."""
        until(lambda: self.service.num_open == 0)


def until(happened: Callable[[], Any], what: str = "it") -> None:
    """Wait for something another thread does."""
    for _ in range(30_000):
        if happened():
            return
        time.sleep(0.002)
    raise AssertionError(f"{what} did not happen within a minute")


@contextmanager
def serving(decoder: Decoder, **settings: Any) -> Iterator[Served]:
    """A server of `decoder`, which is the server's while it runs."""
    made = ServerSettings(**{"port": 0, "align": {}, "drain_seconds": 5.0, **settings})
    ready = threading.Event()
    server = Server(create_app(made, decoder), made, lambda address: (setattr(served, "url", address), ready.set()))
    served = Served(server, decoder)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert ready.wait(60), "the server did not start"
    try:
        yield served
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"
