"""One server for most tests: the testbed with its adapter and one edit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="the server needs the extra rainkernels[server]")
pytest.importorskip("sse_starlette", reason="the server needs the extra rainkernels[server]")
pytest.importorskip("prometheus_client", reason="the server needs the extra rainkernels[server]")
httpx = pytest.importorskip("httpx", reason="these tests talk to the server by httpx")
sys.path.insert(0, str(Path(__file__).parent))

from serving import Served, serving  # noqa: E402

from raindecode import AlignEZ, Decoder  # noqa: E402


@pytest.fixture(scope="session")
def edit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edit that changes answers a little."""
    decoder = Decoder.from_pretrained("testbed")
    direction = torch.randn(decoder.identities[0].hidden_size, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("edits") / "nudge.safetensors"
    AlignEZ.from_directions({1: direction}, op="add", alpha=4.0, model=decoder.identities[0]).save(path)
    return path


@pytest.fixture(scope="session")
def reference() -> Decoder:
    """A decoder like the server's, for what it should answer."""
    return Decoder.from_pretrained("testbed", adapter="testbed")


@pytest.fixture(scope="session")
def _server(edit_file: Path) -> Iterator[Served]:
    decoder = Decoder.from_pretrained("testbed", adapter="testbed", kv_tokens=16384)
    with serving(decoder, edits={"nudge": str(edit_file)}, max_queue=4096, max_body_bytes=200_000) as served:
        yield served


@pytest.fixture
def server(_server: Served) -> Iterator[Served]:
    yield _server
    _server.settle()


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
