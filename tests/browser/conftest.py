"""A browser of this machine, and a server whose playground it opens."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent / "server")]
from browsing import DESKTOP, NAMES, Windows
from playing import KEY

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def windows() -> Iterator[Windows]:
    """Windows of a headless browser; none is downloaded. Of one module: its event loop must not meet other tests'."""
    driver_of: Any = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install 'rainkernels[dev]'"
    ).sync_playwright
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        pytest.skip(f"no browser is installed; looked for {', '.join(NAMES)}")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with driver_of() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"] if root else [])
        yield Windows(browser)
        browser.close()


@pytest.fixture(scope="session")
def reference() -> Any:
    """A decoder like the server's, for what it should answer."""
    from raindecode import Decoder

    return Decoder.from_pretrained("testbed", adapter="testbed")


@pytest.fixture(scope="session")
def edit_file(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edit that changes answers a little."""
    import torch

    from raindecode import AlignEZ

    model = reference.identities[0]
    direction = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("edits") / "nudge.safetensors"
    AlignEZ.from_directions({1: direction}, op="add", alpha=4.0, model=model).save(path)
    return path


@pytest.fixture(scope="session")
def serve() -> Any:
    """Makes servers."""
    for name in ("fastapi", "uvicorn", "sse_starlette", "prometheus_client"):
        pytest.importorskip(name, reason="the server needs the extra rainkernels[server]")
    import serving

    return serving.serving


@pytest.fixture(scope="session")
def server(serve: Any, edit_file: Path) -> Iterator[Any]:
    """Two models and an edit."""
    from raindecode import Decoder

    with serve(Decoder.from_pretrained("testbed", adapter="testbed"), edits={"nudge": str(edit_file)}) as served:
        yield served


@pytest.fixture(scope="module")
def locked(serve: Any) -> Iterator[Any]:
    """One model without edits, and the key KEY."""
    from raindecode import Decoder

    with serve(Decoder.from_pretrained("testbed"), api_keys=(KEY,)) as served:
        yield served


@pytest.fixture(scope="module")
def opened(windows: Windows, server: Any) -> Open:
    """Open the playground; at the end it has asked nobody but its server, and complained of nothing but `refusals`."""

    @contextmanager
    def open_(url: str = server.url, refusals: int = 0, **settings: Any) -> Iterator[Any]:
        told: list[str] = []
        asked: list[str] = []
        with windows.watched(told, asked, **(settings or DESKTOP)) as page:
            page.goto(url)
            page.locator("#server").filter(has_not_text="Asking").wait_for(state="attached")
            yield page
            assert page.title() == "raindecode playground"
        assert len(told) == refusals, told
        assert all("the server responded with a status of 4" in line for line in told)
        assert asked
        assert [one for one in asked if not one.startswith(f"{url}/")] == []

    return open_


@pytest.fixture
def scripted(opened: Open) -> Open:
    """The playground with a server whose answers are given."""

    @contextmanager
    def open_(lines: list[Any], **settings: Any) -> Iterator[Any]:
        body = "".join(f"data: {line if isinstance(line, str) else json.dumps(line)}\n\n" for line in lines)
        with opened(**settings) as page:
            page.route(
                "**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body)
            )
            yield page
            page.unroute("**/v1/chat/completions")

    return open_
