"""What goes wrong inside: failing steps, an engine that dies, requests that are too much for the memory."""

from __future__ import annotations

import asyncio
import json
import socket

import httpx
import pytest
from serving import serving, until

from raindecode import ConfigError, Decoder
from raindecode.server import guard, plans
from raindecode.server.settings import ServerSettings

ASKED = {"prompt": "The fence", "max_tokens": 3, "seed": 1}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.from_pretrained("testbed", kv_tokens=4096, max_concurrent=2)


def ask(served, **changed):
    return httpx.post(f"{served.url}/v1/completions", json={**ASKED, **changed}, timeout=60)


def test_a_step_that_fails_behind_its_forward_ends_what_is_under_way(decoder, monkeypatch):
    """It ends no task by itself: without the server's doing the same step would fail again and again."""
    with serving(decoder) as served:
        failed = []

        def fails(self, plan, found):
            failed.append(1)
            raise RuntimeError("made up")

        with monkeypatch.context() as patch:
            patch.setattr(type(decoder.engine), "_answer", fails)
            answer = ask(served, n=2)
        assert answer.status_code == 500
        assert "made up" not in answer.text
        assert len(failed) <= 2
        assert ask(served).status_code == 200
        served.settle()
        assert decoder.engine.tree.num_cursors == 0


def test_a_step_that_fails_behind_answers_that_ended(decoder, monkeypatch):
    """Two of three ended in order before; the step that fails must not end them again."""
    whole = type(decoder.engine)._forward
    with serving(decoder) as served:
        with monkeypatch.context() as patch:
            patch.setattr(
                type(decoder.engine),
                "_forward",
                lambda self, plan: whole(self, plan) if len(self._running) > 1 else 1 / 0,
            )
            assert ask(served, n=3, ignore_eos=True).status_code == 500
        assert ask(served).status_code == 200
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_only_failures_in_a_row_make_it_unhealthy(decoder, monkeypatch):
    with serving(decoder) as served:
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(type(decoder.engine), "_forward", lambda self, plan: 1 / 0)
                assert [ask(served).status_code for _ in range(3)] == [500] * 3
            assert ask(served).status_code == 200
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_step_that_fails_in_the_middle_of_streams(decoder, monkeypatch):
    with serving(decoder) as served:
        body = {**ASKED, "max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as stream:
            lines = (line for line in stream.iter_lines() if line.startswith("data: "))
            next(lines)
            with monkeypatch.context() as patch:
                patch.setattr(type(decoder.engine), "_forward", lambda self, plan: 1 / 0)
                rest = list(lines)
        assert json.loads(rest[-2][6:])["error"]["code"] == "internal_error"
        assert rest[-1] == "data: [DONE]"
        assert ask(served).status_code == 200


def test_a_request_that_cannot_be_begun_fails_alone(decoder, monkeypatch):
    with serving(decoder) as served:
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "task", lambda *_, **__: 1 / 0)
            assert ask(served).status_code == 500
        assert ask(served).status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_died():
    decoder = Decoder.from_pretrained("testbed", kv_tokens=1024)
    with serving(decoder) as served:

        def dies():
            raise SystemExit("made up")

        decoder.engine.step = dies
        assert ask(served).status_code == 500
        assert served.service.num_open == 0
        refused = ask(served)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_failed"
        assert httpx.get(f"{served.url}/health").json() == {"status": "failed"}


def test_large_bodies_together_are_bounded(decoder, monkeypatch):
    monkeypatch.setattr(guard, "_MOST_BODIES", 2)
    with serving(decoder, max_body_bytes=1000) as served:
        host, port = served.url.removeprefix("http://").split(":")
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        open_ones = [socket.create_connection((host, int(port)), timeout=30) for _ in range(3)]
        for one in open_ones:
            one.sendall(head + b" " * 900)
        until(lambda: 'status="429"' in httpx.get(f"{served.url}/metrics").text)
        for one in open_ones:
            one.close()
        until(lambda: ask(served).status_code == 200)


def test_more_log_probabilities_than_fit_are_refused(decoder, monkeypatch):
    monkeypatch.setattr(plans, "_MOST_LOGPROBS", 2 * (3 + 3) * (1 + 4))
    with serving(decoder) as served:
        asked = {"prompt": [[5, 6, 7]] * 2, "echo": True}
        assert ask(served, **asked, logprobs=4).status_code == 200
        refused = ask(served, **asked, logprobs=5)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "logprobs"
        assert "72 numbers; allowed: up to 60" in refused.json()["error"]["message"]
        assert ask(served, prompt=[[5, 6, 7]] * 2, logprobs=9).status_code == 200


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_texts_that_cannot_fit_are_not_tokenised(decoder, monkeypatch, kind):
    with serving(decoder) as served:
        monkeypatch.setattr(served.service.planner, "_maker", _Untouched(served.service.planner._maker.contexts))
        text = "word " * 40_000
        if kind == "chat":
            content = [{"type": "text", "text": text}]
            path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}
        else:
            path, body = "/v1/completions", {"prompt": ["short", text]}
        refused = httpx.post(served.url + path, json=body, timeout=60)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert "200000 characters" in refused.json()["error"]["message"]


class _Untouched:
    def __init__(self, contexts):
        self.contexts = contexts


def test_host_names(decoder):
    with serving(decoder, allowed_hosts=("LLM.Example.org",)) as served:
        for host, status in (
            ("llm.example.org", 200),
            ("LLM.EXAMPLE.ORG:80", 200),
            ("localhost", 200),
            ("evil.example", 403),
        ):
            assert httpx.get(f"{served.url}/version", headers={"host": host}).status_code == status
    assert ServerSettings(host="0.0.0.0", allowed_hosts=("a.example",)).hosts == ("a.example",)
    assert ServerSettings(host="0.0.0.0").hosts == ("*",)
    for wrong in ("https://a.example", "a.example:80", ""):
        with pytest.raises(ConfigError, match="host name"):
            ServerSettings(allowed_hosts=(wrong,))


def test_cancelled_while_it_lies_in_the_inbox(decoder):
    """At that moment it has no tasks to cancel yet."""
    from raindecode.server.faults import Fault
    from raindecode.server.protocol import CompletionBody
    from raindecode.server.service import Service

    async def main() -> None:
        service = Service(decoder, ServerSettings())
        plan = service.planner.completion(CompletionBody.model_validate({**ASKED, "max_tokens": 900, "n": 2}))
        service.start()
        with service._loop._changed:  # the engine's thread takes nothing in meanwhile
            job = service.submit(plan)
            service._loop.cancel(job, Fault(504, "late"))
        await asyncio.wait_for(job.wait(), 60)
        assert job.fault is not None
        assert job.fault.status == 504
        assert job.tokens == 0
        assert service.num_open == 0
        await service.close()

    asyncio.run(main())
    assert decoder.engine.tree.num_cursors == 0
