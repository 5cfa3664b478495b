"""Clients of every kind at once, and an account of every request (benchmarks/soak_server.py)."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "soak_server.py"


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak_server", FILE)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.mark.parametrize("requests", [240, pytest.param(2000, marks=pytest.mark.slow)])
def test_every_request_is_accounted_for(soak, tmp_path, capsys, requests):
    assert soak.main(["--requests", str(requests), "--clients", "64", "--json", str(tmp_path / "soak.json")]) == 0
    account = json.loads((tmp_path / "soak.json").read_text())
    assert account["requests"] == requests
    assert account["wrong"] == []
    assert account["open_requests"] == account["open_cursors"] == account["lost_slots"] == 0
    assert {"plain whole", "plain streamed", "rain whole", "rain streamed", "left", "malformed"} <= set(
        account["kinds"]
    )
    assert account["scheduling_delay_seconds"]["p99"] > 0
    assert len(account["memory_mib"]) == 8
    if requests >= 2000:  # fewer are not enough to tell what is filled once from what grows
        assert account["memory_mib"][-1] < 1.05 * account["memory_mib"][3]
