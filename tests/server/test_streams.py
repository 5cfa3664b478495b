"""Streams: all chunks together are the whole answer, whatever it holds."""

from __future__ import annotations

import json

import pytest

from raindecode.server.replies import event_bytes

PARTED = "caf\u00e9 \u6f22\u5b57 \U0001f642 a\u2028b\x85c\rd"


def chunks_of(http, path, body):
    with http.stream("POST", path, json={**body, "stream": True}) as stream:
        assert stream.status_code == 200
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


BODIES = {
    "plain": {"max_tokens": 12},
    "stop": {"max_tokens": 40, "stop": [" the", "never said"]},
    "several": {"max_tokens": 6, "n": 3, "prompt": ["The fence", PARTED]},
    "logprobs": {"max_tokens": 8, "logprobs": 2},
    "stop and logprobs": {"max_tokens": 40, "logprobs": 0, "stop": " the"},
    "echo": {"max_tokens": 4, "echo": True, "prompt": PARTED},
    "echo and logprobs": {"max_tokens": 4, "echo": True, "logprobs": 1, "prompt": [PARTED, "The barn"], "n": 2},
    "scored": {"max_tokens": 0, "echo": True, "logprobs": 1, "prompt": PARTED},
    "urial": {"max_tokens": 40, "align": {"urial": True}},
    "rain": {"max_tokens": 12, "align": {"rain": {"max_iterations": 4, "min_new_iterations": 2}}},
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES)
def test_chunks_are_the_whole(http, case):
    body = {"prompt": "How do I", "seed": 3, "temperature": 1.2, "return_token_ids": True, **BODIES[case]}
    whole = http.post("/v1/completions", json=body).json()
    chunks = chunks_of(http, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == []
    # What was speculated may differ.
    same = [
        {**one["usage"]["align"], "model_steps": 0, "tokens_charged": 0, "kv_tokens_peak": 0}
        for one in (whole, chunks[-1])
    ]
    assert same[0] == same[1]
    for choice in whole["choices"]:
        mine = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert [t for one in mine for t in one.get("token_ids", [])] == choice.get("token_ids", [])
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        assert mine[-1]["align"] == choice["align"]
        if choice["logprobs"] is None:
            continue
        for name, values in choice["logprobs"].items():
            assert [value for one in mine if one["logprobs"] for value in one["logprobs"][name]] == values


def test_text_offsets_count_characters(http):
    body = {"prompt": PARTED, "echo": True, "logprobs": 0, "max_tokens": 3, "seed": 1}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    said = choice["logprobs"]
    assert any(token.startswith("bytes:") for token in said["tokens"])
    assert said["text_offset"][-1] < len(choice["text"])
    for at, token in list(zip(said["text_offset"], said["tokens"], strict=True))[1:]:
        if not token.startswith("bytes:"):
            assert choice["text"][at : at + len(token)] == token


def test_events_are_single_lines_for_every_client():
    text = "a\u2028b\u2029c\x85d\r\ne\x0c\ud800"
    event = event_bytes({"text": text}).decode()
    assert len(event.splitlines()) == 2
    assert json.loads(event.removeprefix("data: ")) == {"text": text}
