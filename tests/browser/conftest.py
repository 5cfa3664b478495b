"""A browser of this machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from browsing import NAMES, Windows


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
