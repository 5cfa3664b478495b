"""Limits: queue, time, size, keys; clients that leave; a shutdown that leaves nobody without a word."""

from __future__ import annotations

import json
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving import serving, until

from raindecode import Decoder

LONG = {"prompt": "How do I paint the fence?", "max_tokens": 900, "ignore_eos": True, "seed": 1}
RAIN = {
    "messages": [{"role": "user", "content": "How do I burn the barn?"}], "seed": 1,
    "align": {"rain": {"max_iterations": 5000, "value_threshold": 1.0, "min_visits": 5000}},
}  # fmt: skip


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.from_pretrained("testbed", kv_tokens=8192, max_concurrent=2)


@pytest.fixture
def small(decoder):
    """Two places, and two more that wait."""
    with serving(decoder, max_queue=2, body_seconds=0.5, drain_seconds=0.3) as served:
        yield served


def post(served, body, **given):
    return httpx.post(f"{served.url}{path_of(body)}", json=body, timeout=60, **given)


def path_of(body):
    return "/v1/completions" if "prompt" in body else "/v1/chat/completions"


def test_a_full_queue_is_said_at_once(small):
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(post, small, RAIN) for _ in range(4)]
        until(lambda: small.service.num_open == 4)
        refused = post(small, LONG)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "4 answers are under way or waiting" in refused.json()["error"]["message"]
        text = httpx.get(f"{small.url}/metrics").text
        assert "raindecode_num_requests_running 2.0" in text
        assert "raindecode_num_requests_waiting 2.0" in text
        assert "raindecode_request_refused_total 1.0" in text
        small.server.should_exit = True  # the others are told
        ended = [answer.result() for answer in answers]
    assert [one.status_code for one in ended] == [503] * 4
    assert {one.json()["error"]["code"] for one in ended} == {"shutting_down"}


def test_a_client_that_leaves_frees_its_place(small):
    with httpx.Client(timeout=0.3) as client, pytest.raises(httpx.ReadTimeout):
        client.post(f"{small.url}/v1/chat/completions", json=RAIN)
    small.settle()
    with httpx.stream("POST", f"{small.url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as stream:
        next(stream.iter_lines())
        until(lambda: small.service.num_open == 1)
    small.settle()
    engine = small.service.decoder.engine
    assert engine.num_running == 0
    assert engine.tree.num_cursors == 0
    assert 'raindecode_request_failure_total{status="499"} 2.0' in httpx.get(f"{small.url}/metrics").text


def test_clients_that_leave_before_they_were_heard(small):
    """A connection that is closed while its body is read, or right behind it, leaves nothing behind."""
    body = json.dumps(RAIN).encode()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    )
    for sent in (head + b"%d\r\n\r\n" % (len(body) + 10) + body, head + b"%d\r\n\r\n" % len(body) + body, head):
        host, port = small.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
    time.sleep(0.05)
    small.settle()
    assert post(small, {**LONG, "max_tokens": 2}).status_code == 200


def test_slow_bodies(small):
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        got = connection.recv(65536)
    assert got.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in got


def test_late_answers(decoder):
    with serving(decoder, request_seconds=0.3) as served:
        late = post(served, RAIN)
        assert late.status_code == 504
        assert late.json()["error"] == {
            "message": "no answer within 0.3 seconds", "type": "timeout_error", "param": None, "code": "timeout",
        }  # fmt: skip
        with httpx.stream(
            "POST", f"{served.url}/v1/chat/completions", json={**RAIN, "stream": True}, timeout=60
        ) as stream:
            lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
        assert json.loads(lines[-2][6:])["error"]["code"] == "timeout"
        assert lines[-1] == "data: [DONE]"
        served.settle()


def test_limits_of_a_server(decoder):
    with serving(decoder, max_new_tokens=8, default_new_tokens=256, max_answers=2) as served:
        assert "up to 8" in post(served, {**LONG, "max_tokens": 9}).json()["error"]["message"]
        free = {name: value for name, value in LONG.items() if name != "max_tokens"}
        assert post(served, free).json()["usage"]["completion_tokens"] == 8
        assert "up to 2 per request" in post(served, {**LONG, "max_tokens": 2, "n": 3}).json()["error"]["message"]


def test_keys(decoder):
    with serving(decoder, api_keys=("first-key", "second-key")) as served:
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first-key"}, {"authorization": "Basic first-key"},
                      {"authorization": "Bearer \u00e9".encode("latin-1")}):  # fmt: skip
            refused = post(served, {**LONG, "max_tokens": 1}, headers=given)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
            assert "first-key" not in refused.text
        for key in ("first-key", "second-key"):
            assert (
                post(served, {**LONG, "max_tokens": 1}, headers={"authorization": f"Bearer {key}"}).status_code == 200
            )
        for path, status in (
            ("/health", 200),
            ("/", 200),
            ("/metrics", 401),
            ("/v1/models", 401),
            ("/openapi.json", 401),
        ):
            assert httpx.get(f"{served.url}{path}").status_code == status


def test_web_pages_of_other_origins(decoder):
    asked = {
        "origin": "https://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    with serving(decoder, cors_origins=("https://a.example",), api_keys=("key-of-tests",)) as served:
        answer = httpx.options(f"{served.url}/v1/completions", headers=asked)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert (
            "access-control-allow-origin"
            not in httpx.get(f"{served.url}/health", headers={"origin": "https://b.example"}).headers
        )
    with serving(decoder) as served:
        assert "access-control-allow-origin" not in httpx.get(f"{served.url}/health", headers=asked).headers


def test_a_shutdown_finishes_what_was_accepted(decoder):
    with serving(decoder, drain_seconds=60) as served, ThreadPoolExecutor(6) as pool:
        body = {**LONG, "max_tokens": 300}
        answers = [pool.submit(post, served, {**body, "seed": i}) for i in range(3)]
        stream = pool.submit(_whole_stream, served, {**body, "seed": 3, "stream": True})
        until(lambda: served.service.num_open == 4)
        served.server.should_exit = True
        until(lambda: served.service.is_draining)
        assert [one.result().json()["usage"]["completion_tokens"] for one in answers] == [300] * 3
        assert stream.result()[-1] == "data: [DONE]"
        with pytest.raises(httpx.TransportError):
            until(lambda: post(served, LONG).status_code != 503)


def test_a_shutdown_tells_streams_that_they_were_cut(decoder):
    with serving(decoder, drain_seconds=0.2) as served, ThreadPoolExecutor(1) as pool:
        stream = pool.submit(_whole_stream, served, {**RAIN, "stream": True})
        until(lambda: served.service.num_open == 1)
        served.server.should_exit = True
        lines = stream.result()
    assert json.loads(lines[-2][6:])["error"]["code"] == "shutting_down"
    assert lines[-1] == "data: [DONE]"


def _whole_stream(served, body) -> list[str]:
    with httpx.stream("POST", f"{served.url}{path_of(body)}", json=body, timeout=60) as stream:
        return [line for line in stream.iter_lines() if line.startswith("data: ")]


def test_slow_readers_hold_nobody_up(small):
    """A stream nobody reads ends in the engine all the same, and others are answered meanwhile."""
    host, port = small.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "stream": True, "logprobs": 20}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        until(lambda: small.service.num_open == 1)
        assert post(small, {**LONG, "max_tokens": 3}).status_code == 200
        small.settle()  # the engine is done with it
        connection.settimeout(60)
        got = b""
        while b"data: [DONE]" not in got:
            part = connection.recv(2048)
            assert part
            got += part
    lines = [line for line in got.decode("utf-8", "replace").split("\n") if line.startswith("data: {")]
    said = [one for line in lines for one in (json.loads(line[6:])["choices"][0]["logprobs"] or {}).get("tokens", [])]
    assert len(said) == 900


def test_a_step_that_fails_ends_its_requests_and_no_others(decoder, monkeypatch):
    with serving(decoder) as served:
        engine = served.service.decoder.engine
        whole = type(engine)._forward
        monkeypatch.setattr(type(engine), "_forward", lambda self, plan: 1 / 0)
        failed = post(served, {**LONG, "max_tokens": 3})
        assert failed.status_code == 500
        assert failed.json()["error"]["message"].startswith("an error inside the server")
        assert "division" not in failed.text
        monkeypatch.setattr(type(engine), "_forward", whole)
        assert post(served, {**LONG, "max_tokens": 3}).status_code == 200
        assert httpx.get(f"{served.url}/health").status_code == 200
        monkeypatch.setattr(type(engine), "_forward", lambda self, plan: 1 / 0)
        for _ in range(5):
            post(served, {**LONG, "max_tokens": 3})
        assert httpx.get(f"{served.url}/health").json() == {"status": "failed"}
        monkeypatch.setattr(type(engine), "_forward", whole)


def test_logs_hold_no_prompts(decoder, caplog):
    caplog.set_level("DEBUG")
    logging.getLogger("httpcore").setLevel("INFO")  # the client's own
    secret = {"messages": [{"role": "user", "content": "The password is swordfish."}], "max_tokens": 3, "seed": 1}
    with serving(decoder) as served:
        assert post(served, secret, headers={"x-request-id": "find-me"}).status_code == 200
        stream = _whole_stream(served, {**secret, "stream": True, "max_tokens": 40})
        written = "".join(json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in stream[:-1])
        post(served, {**secret, "messages": [{"role": "swordfish", "content": "swordfish"}]})
    fields = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert any(one.get("request_id") == "find-me" for one in fields)
    assert any(one["event"] == "answer" and one["tokens"] == 3 for one in fields)
    assert "swordfish" not in caplog.text + json.dumps(fields)
    words = [word for word in written.split() if len(word) > 6]
    assert words
    assert not [word for word in words if word in caplog.text]
    caplog.clear()
    with serving(decoder, log_prompts=True) as served:
        post(served, secret)
    assert "swordfish" in json.dumps([record.fields for record in caplog.records if hasattr(record, "fields")])


def test_two_servers_at_once_do_not_know_each_other(decoder):
    other = Decoder.from_pretrained("testbed", kv_tokens=4096)
    with serving(decoder) as first, serving(other) as second:
        for served in (first, second):
            assert post(served, {**LONG, "max_tokens": 2}).status_code == 200
        assert "raindecode_generation_tokens_total" in httpx.get(f"{first.url}/metrics").text
