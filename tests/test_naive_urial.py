"""The baselines of URIAL: raindecode's own answers, alone and in batches, and what of the prompt each runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "decoder")]

from dera_engines import sharing  # noqa: E402
from models import EVERY_BYTE, byte_tokenizer, tiny_model  # noqa: E402
from naive.urial import Published, Reusing, padded  # noqa: E402
from rain_engines import load_model  # noqa: E402
from transformers import AutoTokenizer, PreTrainedModel  # noqa: E402

from raindecode import URIAL, Decoder, Policy, Sampling, testbed  # noqa: E402
from raindecode.evaluation import town_requests  # noqa: E402
from raindecode.policy.prompt import ChatFormat  # noqa: E402

CPU = torch.device("cpu")
KINDS = (Published, Reusing)
QUERIES = [request.text for requests in town_requests(3, 3, 5) for request in requests]


@pytest.fixture(scope="module")
def town() -> tuple[PreTrainedModel, Any]:
    return load_model("testbed", CPU, torch.float32), AutoTokenizer.from_pretrained(testbed.WEIGHTS)


@pytest.fixture(scope="module")
def answers() -> list[Any]:
    """Of raindecode."""
    decoder = Decoder.from_pretrained("testbed", device="cpu", dtype="float32")
    policy = Policy(prompt=URIAL.testbed())
    return decoder.generate(QUERIES, search=Sampling.greedy(), policy=policy, max_new_tokens=64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("together", [1, 4])
def test_tokens_and_texts_are_those_of_raindecode(
    kind: type[Published], together: int, town: tuple[PreTrainedModel, Any], answers: list[Any]
) -> None:
    baseline = kind(*town, URIAL.testbed())
    found = [one for at in range(0, 6, together) for one in baseline.answer(QUERIES[at : at + together], 64)]
    assert [one.token_ids for one in found] == [one.token_ids for one in answers]
    assert [one.text for one in found] == [one.text.strip() for one in answers]
    assert len({len(one.token_ids) for one in found}) > 1, "answers of one length do not show where rows end"


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_model_with_the_published_form(kind: type[Published]) -> None:
    model, tokenizer = tiny_model("llama", vocab_size=EVERY_BYTE), byte_tokenizer()
    prompt = URIAL.of("Say little.", [("Hi?", "Ho.")])
    queries = ["One?", "Two and more?", "3"]
    decoder = Decoder(sharing(model), tokenizer, kv_tokens=2000)
    search = Sampling.greedy(ignore_eos=True)
    done = decoder.generate(queries, search=search, policy=Policy(prompt=replace(prompt, stop=())), max_new_tokens=6)
    expected = dict(zip(queries, (one.token_ids for one in done), strict=True))
    assert len({tuple(ids) for ids in expected.values()}) > 1
    baseline = kind(model, tokenizer, prompt)
    for together in (queries[:1], queries, queries[::-1]):
        found = baseline.answer(together, 6, ends=False)
        assert [one.token_ids for one in found] == [expected[query] for query in together]


def test_what_of_the_prompt_is_run(town: tuple[PreTrainedModel, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = town
    prompt = URIAL.testbed()
    lengths = [len(tokenizer(prompt.render(query))["input_ids"]) for query in QUERIES[:2]]
    rows: list[tuple[int, ...]] = []
    forward = model.forward

    def counted(input_ids: Any, **options: Any) -> Any:
        rows.append(tuple(input_ids.shape))
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", counted)
    for query in QUERIES[:2]:
        Published(model, tokenizer, prompt).answer([query], 2, ends=False)
    assert rows == [(1, lengths[0]), (1, 1), (1, lengths[1]), (1, 1)]
    rows.clear()
    reusing = Reusing(model, tokenizer, prompt)
    for query in QUERIES[:2]:
        reusing.answer([query], 2, ends=False)
    kept = len(reusing.prefix)
    assert 180 < kept < min(lengths)
    assert rows == [(1, kept), (1, lengths[0] - kept), (1, 1), (1, lengths[1] - kept), (1, 1)]
    rows.clear()
    reusing.answer(QUERIES[:2], 1, ends=False)
    assert rows == [(2, max(lengths) - kept)]
    reusing.forget()
    rows.clear()
    reusing.answer(QUERIES[:1], 1, ends=False)
    assert rows == [(1, kept), (1, lengths[0] - kept)]


def test_answers_end_at_stop_strings_and_are_cleaned(town: tuple[PreTrainedModel, Any]) -> None:
    model, tokenizer = town
    prompt = URIAL.testbed()
    (whole,) = Published(model, tokenizer, prompt).answer(QUERIES[:1], 64)
    first, second = whole.text.split(". ")[:2]
    cut = ChatFormat(prompt.turn, prefix=prompt.prefix, stop=(second[:8],), removed=(first,))
    for kind in KINDS:
        found = kind(model, tokenizer, cut).answer([QUERIES[0], QUERIES[3]], 64)[0]
        assert found.text == "."
        assert 0 < len(found.token_ids) < len(whole.token_ids)
        assert found.token_ids == whole.token_ids[: len(found.token_ids)]


def test_a_prompt_that_merges_with_queries_is_refused(town: tuple[PreTrainedModel, Any]) -> None:
    reusing = Reusing(*town, ChatFormat("{prompt}", prefix="Hum"))
    reusing.answer(["7 + 1"], 1)
    with pytest.raises(ValueError, match="merges the end"):
        reusing.answer(["an: Hello."], 1)


def test_rows_are_padded_on_the_left() -> None:
    rows, mask = padded([[5], [6, 7, 8]], CPU)
    assert rows.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
