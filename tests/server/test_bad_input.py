"""Bad input: every error has OpenAI's form and says what was given and what is allowed; the server goes on."""

from __future__ import annotations

import json
import socket

import pytest

from raindecode.server.align import Align
from raindecode.server.protocol import ChatBody

CHAT = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2, "seed": 1}


def refused(answer, status=400):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hello"}, "messages", "list"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "'system', 'developer', 'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages", "white space"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "end with words of the user"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        ({"max_tokens": -3}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 1e30}, "max_tokens", ""),
        ({"max_tokens": "many"}, "max_tokens", "integer"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "-1"),
        ({"min_p": 2}, "min_p", "1"),
        ({"n": 0}, "n", "1"),
        ({"n": 65}, "n", "up to 64"),
        ({"seed": "x"}, "seed", "integer"),
        ({"seed": 2**70}, "seed", ""),
        ({"stop": [""]}, "stop", "not empty"),
        ({"stop": 5}, "stop", "give a text"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "0"),
        ({"stop_token_ids": [99999]}, None, "vocabulary"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"top_logprobs": 2}, None, "logprobs"),
        ({"stream_options": {"include_usage": True}}, None, "stream"),
        ({"presence_penalty": 0.5}, None, "presence_penalty"),
        ({"frequency_penalty": "0.5"}, None, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, None, "logit_bias"),
        ({"tools": [{"type": "function"}]}, None, "tools"),
        ({"response_format": {"type": "json_object"}}, None, "response_format"),
        ({"best_of": 3}, None, "best_of"),
        ({"align": 5}, "align", ""),
        ({"align": {"rian": {}}}, "align.rian", "no such field"),
        ({"align": {"rain": {"max_iteration": 3}}}, "align.rain.max_iteration", "no such field"),
        ({"align": {"rain": {"preset": "hhh"}}}, "align.rain.preset", "'hh'"),
        ({"align": {"rain": {"max_iterations": 0}}}, "align.rain.max_iterations", "1"),
        ({"align": {"rain": {"max_iterations": 10**9}}}, "align.rain.max_iterations", "10000"),
        ({"align": {"rain": {"width": "wide"}}}, "align.rain.width", '"auto"'),
        ({"align": {"rain": {}, "search": "sampling"}}, "align", "RAIN"),
        ({"align": {"rain": False, "search": "rain"}}, "align", "rain false"),
        ({"align": {"search": "beam"}}, "align.search", "'sampling' or 'rain'"),
        ({"align": {"dera": {"lambda": "much"}}}, "align.dera.lambda", "number"),
        ({"align": {"dera": {"lambda": 1e9}}}, "align.dera.lambda", "1000"),
        ({"align": {"dera": {"lambda": [0.5, 0.5]}}}, None, "1 aligned model"),
        ({"align": {"dera": {"lambda": -0.5}}}, "align", "negative"),
        ({"align": {"dera": {"lambda": 1, "target_kl": 1}}}, "align", "give one"),
        ({"align": {"dera": {"target_kl": -1}}}, "align.dera.target_kl", "greater than 0"),
        ({"dera_lambda": 1e9}, "dera_lambda", "1000"),
        ({"dera_lambda": 1, "align": {"dera": 1}}, "dera_lambda", "give one"),
        ({"vllm_xargs": {"dera_lambda": "x"}}, "vllm_xargs", "number"),
        ({"align": {"edits": ["helpful"]}}, "align.edits", "this server has nudge"),
        ({"align": {"edits": ["../../etc/passwd"]}}, "align.edits", "no edit"),
        ({"align": {"edits": ["/etc/passwd:2"]}}, "align.edits", "no edit"),
        ({"align": {"edits": [{"name": "nudge", "strength": 1e9}]}}, "align.edits.0.strength", "1000"),
        ({"align": {"edits": [{"name": "nudge", "on": "aligned"}]}}, None, "aligned model"),
        ({"align": {"edits": ["nudge"] * 17}}, "align.edits", "16"),
        ({"align": {"urial": "../default"}}, "align.urial", "this server has default"),
        ({"align": {"urial": 5}}, "align.urial", "true, false"),
        ({"model": "testbed@rian"}, "model", "allowed: rain"),
        ({"model": "testbed@dera=x"}, "model", "dera=WEIGHT"),
        ({"model": "testbed@dera=1e9"}, "model", "dera"),
        ({"model": "testbed@dera=1,dera=2"}, "model", "twice"),
        ({"model": "x" * 501}, "model", "500"),
    ],
)  # fmt: skip
def test_fields(http, change, param, says):
    body = json.dumps({**CHAT, **change})
    answer = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    error = refused(answer, 404 if param == "model" and says != "500" else 400)
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "empty list"), ("", "is empty"), (["a", ""], "is empty"), ([[]], "at least one"), ([99999], "0 to"), ([-1], "token ids"),
        (5, "give a text"), ({"a": 1}, "give a text"), ([[1, "a"]], "give a text"), ([5] * 1024, "1024"), (None, "give a text"),
        (["a"] * 65, "up to 64"),
    ],
)  # fmt: skip
def test_prompts(http, prompt, says):
    assert says in refused(http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}))["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"prompt": "\xff"}', b"[" * 100_000, b'{"a":' * 20_000, b'{"prompt": 1e999}',
     b'{"prompt":"a","max_tokens":' + b"9" * 5000 + b"}", b'{"prompt": NaN}'],
)  # fmt: skip
def test_bodies_that_are_no_request(http, body):
    answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    refused(answer)
    assert http.get("/health").json() == {"status": "ok"}


def test_types_methods_and_paths(http):
    assert "application/json" in refused(http.post("/v1/completions", content=b"{}"), 415)["message"]
    form = http.post("/v1/completions", data={"prompt": "a"})
    refused(form, 415)
    refused(http.get("/v1/completions"), 405)
    refused(http.get("/nothing"), 404)
    refused(http.get("/v1/models/other"), 404)
    refused(http.get("/v1/models/"), 404)
    assert http.head("/health").status_code == 200
    packed = http.post("/v1/completions", json={"prompt": "a"}, headers={"content-encoding": "gzip"})
    assert "gzip" in refused(packed, 415)["message"]
    refused(http.get("/../../etc/passwd"), 404)
    refused(http.get("/v1/models/..%2F..%2Fetc%2Fpasswd"), 404)
    refused(http.delete("/v1/models/testbed"), 405)


def test_large_bodies(http, server):
    most = server.service.settings.max_body_bytes
    large = json.dumps({"prompt": "a" * most})
    refused(http.post("/v1/completions", content=large, headers={"content-type": "application/json"}), 413)

    def chunks():
        for _ in range(most // 1000 + 2):
            yield b" " * 1000

    refused(http.post("/v1/completions", content=chunks(), headers={"content-type": "application/json"}), 413)
    assert http.get("/health").status_code == 200


def _raw(server, sent: bytes) -> bytes:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the server had seen enough
        got = b""
        try:
            while part := connection.recv(65536):
                got += part
        except OSError:
            pass
    return got


def test_header_floods(server, http):
    flood = b"".join(b"X-H%d: %s\r\n" % (i, b"a" * 100) for i in range(2000))
    got = _raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + flood + b"\r\n")
    assert got.startswith(b"HTTP/1.1 431") or got == b""  # or reset while it was still sending
    got = _raw(server, b"GET /" + b"a" * 40_000)
    assert got.startswith(b"HTTP/1.1 431") or got == b""
    got = _raw(server, b"no http at all\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 400")
    assert json.loads(got.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    got = _raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 400")
    assert http.get("/health").status_code == 200


def test_foreign_host_names(http):
    error = refused(http.get("/v1/models", headers={"host": "evil.example"}), 403)
    assert "evil.example" in error["message"]
    assert http.get("/health", headers={"host": "10.0.0.7"}).status_code == 200  # a probe's
    assert http.get("/v1/models", headers={"host": "localhost:1"}).status_code == 200
    assert http.get("/v1/models", headers={"host": "[::1]:80"}).status_code == 200


def test_request_ids(http):
    assert http.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    odd = http.get("/health", headers={"x-request-id": "a" * 200}).headers["x-request-id"]
    assert len(odd) == 32


def test_what_was_not_taken_as_given_is_said(http):
    clipped = http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 100_000, "stop": ["."]})
    assert "max_tokens 100000 was cut" in clipped.headers["x-align-warning"]
    body = {**CHAT, "temperature": 0.5, "align": {"rain": {"max_iterations": 2, "min_new_iterations": 1}}}
    assert "RAIN takes no temperature" in http.post("/v1/chat/completions", json=body).headers["x-align-warning"]
    assert "x-align-warning" not in http.post("/v1/chat/completions", json=CHAT).headers


def test_tokenize(http, reference):
    ids = http.post("/tokenize", json={"prompt": "How do I"}).json()
    assert ids["tokens"] == reference.codec.encode("How do I")
    assert ids["count"] == len(ids["tokens"])
    assert http.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": "How do I"}
    refused(http.post("/detokenize", json={"tokens": [10**6]}))
    refused(http.post("/tokenize", content='{"prompt": "\\ud800"}', headers={"content-type": "application/json"}))


def test_null_means_left_out(http):
    """Some clients write every field they know."""
    plain = http.post("/v1/chat/completions", json=CHAT).json()["choices"]
    for fields in (
        ChatBody.model_fields.keys() - {"messages", "max_tokens", "seed"},
        ("tools", "logit_bias", "response_format", "user"),
    ):
        answer = http.post("/v1/chat/completions", json={**CHAT, **dict.fromkeys(fields)})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == plain
    stream = http.post("/v1/chat/completions", json={**CHAT, "stream": True, "stream_options": {"include_usage": None}})
    assert stream.status_code == 200
    align = {
        "search": None, "rain": None, "edits": None, "urial": None,
        "dera": dict.fromkeys(("lambda", "target_kl", "max_weight", "allow_negative", "plausibility")),
    }  # fmt: skip
    assert Align.model_validate({**align, "dera": None}).over(Align.model_validate({"search": "rain"})).searches
    dera = http.post(
        "/v1/chat/completions", json={**CHAT, "align": {**align, "dera": {**align["dera"], "lambda": 1.5}}}
    )
    assert (
        dera.json()["choices"] == http.post("/v1/chat/completions", json={**CHAT, "dera_lambda": 1.5}).json()["choices"]
    )
