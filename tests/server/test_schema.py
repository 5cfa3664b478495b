"""Schemathesis over the published OpenAPI document: no body and no path it thinks of makes the server fail."""

from __future__ import annotations

import os

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

schemathesis = pytest.importorskip("schemathesis", reason="Schemathesis is not installed (pip install schemathesis)")

from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402

EXAMPLES = int(os.environ.get("RAINKERNELS_SCHEMA_CASES", "40"))


def test_nothing_makes_the_server_fail(server):
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tried: dict[str, set[int]] = {}
    for found in document.get_all_operations():
        operation = found.ok()
        cases = st.one_of(
            operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        )
        check(operation, cases, server.url, tried.setdefault(operation.label, set()))
    assert {"POST /v1/chat/completions", "POST /v1/completions", "GET /v1/models/{name}", "POST /tokenize"} <= set(
        tried
    )
    for label in ("POST /v1/chat/completions", "POST /v1/completions"):  # both sides of the line were seen
        assert 400 in tried[label]
    assert 200 in tried["POST /v1/completions"]


def check(operation, cases, url, statuses):
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases)
    def run(case):
        if isinstance(case.body, dict) and operation.label.endswith("completions"):
            case.body.pop("ignore_eos", None)  # answers as long as the context are not what is looked for here
            if isinstance(case.body.get("max_tokens", 9), int):
                case.body["max_tokens"] = 2
        answer = case.call(timeout=60)
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=[not_a_server_error])
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    run()
    assert httpx.get(f"{url}/health").status_code == 200
