"""DeRa in SGLang: rows and requests by stand-ins; the class itself where SGLang is installed."""

from __future__ import annotations

import gc
import json
import random
import weakref
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from town_pair import load, tokenizer

from raindecode import testbed
from raindecode.errors import ConfigError, RainDecodeError
from raindecode.integrations.second_model import SecondModel, SecondSettings
from raindecode.integrations.sglang_dera import DeRaRows, Served

WIDTH = 1088


class Req:
    """A request as SGLang's scheduler holds it."""

    def __init__(self, rid: str, prompt: list[int]) -> None:
        self.rid = rid
        self.origin_input_ids = array("q", prompt)
        self.output_ids = array("q")
        self.ended = False

    def finished(self) -> bool:
        return self.ended

    @property
    def tokens(self) -> list[int]:
        return [*self.origin_input_ids, *self.output_ids]

    def params(self, **given: Any) -> dict[str, Any]:
        return given | {"__req__": weakref.proxy(self)}


@pytest.fixture(scope="module")
def stock() -> Any:
    return load(testbed.WEIGHTS)


@pytest.fixture(scope="module")
def shared() -> SecondModel:
    return SecondModel.load(
        SecondSettings(reference="testbed"), served_tokenizer=tokenizer(), served_width=WIDTH, served_name="served",
        longest=128, most_requests=4, device="cpu",
    )  # fmt: skip


@pytest.fixture
def refused() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def rows(shared: SecondModel, refused: list[tuple[str, str]]) -> Iterator[DeRaRows]:
    def never() -> Served:
        raise AssertionError("the model is there")

    made = DeRaRows(never, lambda request, reason: refused.append((request.rid, reason)), shared)
    yield made
    made.close()


def mixed(stock: Any, request: Req, served: torch.Tensor, weight: float) -> torch.Tensor:
    with torch.inference_mode():
        ref = stock(torch.tensor([request.tokens]), use_cache=False).logits[0, -1]
    return ref + weight * (served - ref)


def test_a_random_course_of_requests(
    rows: DeRaRows, shared: SecondModel, stock: Any, refused: list[tuple[str, str]]
) -> None:
    """They come, end with or without a word, and stand in any order; batches leave some of them out."""
    rng = random.Random(5)
    torch.manual_seed(0)
    requests: list[tuple[Req, dict[str, Any], float | None]] = []
    made = 0
    for _ in range(25):
        for i in reversed(range(len(requests))):
            if rng.random() < 0.15:
                requests[i][0].ended = rng.random() < 0.5  # else it is let go, and the weak reference is dead
                requests.pop(i)
        while len(requests) < 4 and rng.random() < 0.7:
            weight = rng.choice([None, 0.0, 0.5, 1.0, 2.0])
            made += 1
            request = Req(f"r{made}", [rng.randrange(3, 1000) for _ in range(rng.randrange(1, 25))])
            requests.append((request, request.params(**({} if weight is None else {"dera_lambda": weight})), weight))
        batch = rng.sample(requests, rng.randrange(0, len(requests) + 1))
        served = torch.randn(len(batch), WIDTH)
        out = rows.apply(served.clone(), [one[1] for one in batch])
        for row, (request, _, weight) in enumerate(batch):
            if weight in (None, 1.0):
                assert torch.equal(out[row], served[row])
            else:
                torch.testing.assert_close(out[row], mixed(stock, request, served[row], weight), rtol=1e-4, atol=2e-3)
            request.output_ids.append(rng.randrange(3, 1000))
    requests.clear()
    batch, request = [], None
    gc.collect()
    rows.apply(torch.randn(0, WIDTH), [])
    assert shared.engine.tree.num_cursors == 0
    assert refused == []


def test_other_processors_requests_and_half_precision(rows: DeRaRows, stock: Any) -> None:
    request = Req("a", [5, 6, 7])
    served = torch.randn(3, WIDTH).bfloat16()
    out = rows.apply(served.clone(), [None, {"token_ids": [1]}, request.params(dera_lambda=0.5)])
    assert torch.equal(out[:2], served[:2])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out[2].float(), mixed(stock, request, served[2].float(), 0.5), rtol=1e-2, atol=5e-2)
    assert torch.equal(rows.apply(served.clone(), None), served)


def test_a_name_that_is_used_again(rows: DeRaRows, stock: Any) -> None:
    served = torch.randn(1, WIDTH)
    for prompt in ([5, 6, 7, 8], [9, 10]):
        request = Req("same", prompt)
        out = rows.apply(served.clone(), [request.params(dera_lambda=0.5)])
        torch.testing.assert_close(out[0], mixed(stock, request, served[0], 0.5), rtol=1e-4, atol=2e-3)


def test_a_request_whose_text_got_shorter_begins_anew(rows: DeRaRows, stock: Any) -> None:
    request, served = Req("a", [5, 6, 7, 8]), torch.randn(1, WIDTH)
    rows.apply(served.clone(), [request.params(dera_lambda=0.5)])
    request.origin_input_ids = array("q", [9, 10])
    out = rows.apply(served.clone(), [request.params(dera_lambda=0.5)])
    torch.testing.assert_close(out[0], mixed(stock, request, served[0], 0.5), rtol=1e-4, atol=2e-3)


def test_what_cannot_be_mixed_is_refused_and_the_others_go_on(
    rows: DeRaRows, stock: Any, refused: list[tuple[str, str]]
) -> None:
    requests = [Req(name, [5, 6]) for name in "abcd"]
    given = [{"dera_lambda": -1}, {"dera_lambda": 0.5}, {"dera_lamda": 0.5}, {"dera_lambda": "much"}]
    served = torch.randn(4, WIDTH)
    out = rows.apply(served.clone(), [r.params(**one) for r, one in zip(requests, given, strict=True)])
    assert [name for name, _ in refused] == ["a", "c", "d"]
    assert "dera_lambda is -1" in refused[0][1]
    assert torch.equal(out[[0, 2, 3]], served[[0, 2, 3]])
    torch.testing.assert_close(out[1], mixed(stock, requests[1], served[1], 0.5), rtol=1e-4, atol=2e-3)
    with pytest.raises(RainDecodeError, match="does not hand requests"):
        rows.apply(served[:1].clone(), [{"dera_lambda": 0.5}])


def test_draft_tokens_are_refused(rows: DeRaRows, refused: list[tuple[str, str]]) -> None:
    request = Req("b", [5, 6])
    served = torch.randn(2, WIDTH)
    assert torch.equal(rows.apply(served.clone(), [request.params(dera_lambda=0.5)] * 2), served)
    assert [name for name, _ in refused] == ["b", "b"]
    assert "without speculative decoding" in refused[0][1]


def loading(served: Served, refused: list[tuple[str, str]]) -> DeRaRows:
    return DeRaRows(lambda: served, lambda request, reason: refused.append((request.rid, reason)))


def test_the_model_is_loaded_at_the_first_request(
    monkeypatch: pytest.MonkeyPatch, stock: Any, refused: list[tuple[str, str]]
) -> None:
    monkeypatch.setenv("RAINDECODE_SGLANG", '{"reference": "testbed"}')
    path = str(testbed.WEIGHTS)
    made = loading(Served(path, path, most_requests=2), refused)
    request, served = Req("a", [5, 6]), torch.randn(1, WIDTH)
    out = made.apply(served.clone(), [request.params(dera_lambda=2)])
    torch.testing.assert_close(out[0], mixed(stock, request, served[0], 2), rtol=1e-4, atol=5e-3)
    assert refused == []
    made.close()


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (None, {}, "not told which model"),
        ('{"reference": "testbed"}', {"overlap": True}, "--disable-overlap-schedule"),
        ('{"reference": "testbed"}', {"context": 5000}, "reads at most 1024 tokens, requests may have 5000"),
        ('{"refrence": "testbed"}', {}, "hold refrence"),
        ("[]", {}, "RAINDECODE_SGLANG="),
    ],
)
def test_a_server_that_cannot_mix_says_so_to_every_request(
    settings: str | None, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, refused: list[tuple[str, str]]
) -> None:  # fmt: skip
    if settings is None:
        monkeypatch.delenv("RAINDECODE_SGLANG", raising=False)
    else:
        monkeypatch.setenv("RAINDECODE_SGLANG", settings)
    path = str(testbed.WEIGHTS)
    made = loading(Served(path, path, **changes), refused)
    requests = [Req("a", [5]), Req("b", [5])]
    served = torch.randn(2, WIDTH)
    out = made.apply(served.clone(), [request.params(dera_lambda=0.5) for request in requests])
    assert torch.equal(out, served)
    assert [name for name, _ in refused] == ["a", "b"]
    assert all(message in reason for _, reason in refused)


# ---- the real package -------------------------------------------------------------------------------------------------
def test_what_is_sent_with_a_request_is_the_classs_name(
    monkeypatch: pytest.MonkeyPatch, rows: DeRaRows, stock: Any
) -> None:
    processors = pytest.importorskip(
        "sglang.srt.sampling.custom_logit_processor",
        reason="SGLang is not installed here: see docs/integrations/sglang.md",
    )
    from raindecode.integrations import sglang

    body = sglang.extra_body(0.5)
    assert body["custom_params"] == {"dera_lambda": 0.5}
    assert sglang.extra_body(-1, allow_negative=True)["custom_params"] == {
        "dera_lambda": -1,
        "dera_allow_negative": True,
    }
    with pytest.raises(ConfigError, match="dera_lambda is -1"):
        sglang.extra_body(-1)
    payload = bytes.fromhex(json.loads(body["custom_logit_processor"])["callable"])
    assert b"raindecode.integrations.sglang" in payload
    assert len(payload) < 200  # by reference: no code of ours travels
    received = processors.CustomLogitProcessor.from_str(body["custom_logit_processor"])
    assert type(received) is sglang.DeRa
    monkeypatch.setattr(sglang, "_ROWS", rows)
    request, served = Req("a", [5, 6, 7]), torch.randn(1, WIDTH)
    out = received(served.clone(), [request.params(**body["custom_params"])])
    torch.testing.assert_close(out[0], mixed(stock, request, served[0], 0.5), rtol=1e-4, atol=2e-3)


def test_the_servers_arguments_are_those_we_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sglang.srt.sampling.custom_logit_processor", reason="SGLang is not installed here")
    arguments = pytest.importorskip("sglang.srt.server_args", reason="SGLang's server does not import here")
    from raindecode.integrations import sglang

    known = {field for kind in arguments.ServerArgs.__mro__ for field in getattr(kind, "__annotations__", {})}
    assert {
        "model_path", "tokenizer_path", "trust_remote_code", "context_length", "max_running_requests", "disable_overlap_schedule",
    } <= known  # fmt: skip
    with pytest.raises(ValueError, match="not set"):  # outside a server there are none
        sglang._served()
