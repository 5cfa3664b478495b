"""Plain decoding: answers against transformers, what ends them, streaming, and requests beside others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import EOS, EVERY_BYTE, READABLE, byte_tokenizer, stock_copy, tiny_decoder, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from raindecode.decoder import Decoder
from raindecode.search.sampling import Sampling
from raindecode.types import Completion

STORIES = Path(__file__).resolve().parents[3] / "shared" / "weights" / "stories260k"


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """A random Llama that writes ASCII."""
    return tiny_decoder()


def test_greedy_equals_generate_of_transformers() -> None:
    model = tiny_model("qwen3", vocab_size=READABLE)
    stock = stock_copy(model)
    decoder = Decoder(model, byte_tokenizer(), kv_tokens=500)
    prompts = ["the inner", "on a", "x"]
    answers = decoder.generate(prompts, search=Sampling.greedy(ignore_eos=True), max_new_tokens=40)
    penalised = decoder.generate(
        prompts, search=Sampling.greedy(ignore_eos=True, repetition_penalty=1.4), max_new_tokens=40
    )
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([decoder.codec.encode(prompt)])
        options: dict[str, Any] = {
            "do_sample": False,
            "max_new_tokens": 40,
            "eos_token_id": None,
            "attention_mask": torch.ones_like(ids),
        }
        for answer, penalty in ((answers[i], 1.0), (penalised[i], 1.4)):
            expected = stock.generate(ids, repetition_penalty=penalty, **options)[0, ids.shape[1] :]
            assert answer.token_ids == expected.tolist()
            assert answer.finish_reason == "length"


@pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/weights/stories260k is not on this machine")
def test_stories260k_continues_as_in_plain_transformers() -> None:
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
    decoder = Decoder.from_pretrained(str(STORIES), device="cpu", kv_tokens=500)
    assert decoder.exact != "off"
    (answer,) = decoder.generate("Once upon a time", search=Sampling.greedy(ignore_eos=True), max_new_tokens=256)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    expected = stock.generate(ids, do_sample=False, max_new_tokens=256, eos_token_id=None, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    assert len(answer.token_ids) == 256
    assert answer.token_ids == expected.tolist()
    assert answer.text.startswith(", there was a little girl named Lily.")


def test_logprobs_are_those_of_the_raw_distribution(decoder: Decoder) -> None:
    search = Sampling(temperature=0.6, top_k=5, repetition_penalty=1.2, logprobs=True, ignore_eos=True)
    (answer,) = decoder.generate("the inner", search=search, max_new_tokens=12)
    assert answer.logprobs is not None
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    ids = decoder.codec.encode("the inner") + answer.token_ids
    with torch.inference_mode():
        logits = stock_copy(tiny_model("llama", vocab_size=READABLE))(input_ids=torch.tensor([ids])).logits[0].double()
    rows = logits[-len(answer.token_ids) - 1 : -1].log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(rows, answer.token_ids, strict=True)]
    assert [entry.logprob for entry in answer.logprobs] == pytest.approx(expected, abs=1e-4)
    (plain,) = decoder.generate("the inner", max_new_tokens=2)
    assert plain.logprobs is None


@pytest.mark.parametrize("limit", [1, 2, 17])
def test_max_new_tokens(decoder: Decoder, limit: int) -> None:
    (answer,) = decoder.generate("the", search=Sampling(ignore_eos=True), max_new_tokens=limit)
    assert len(answer.token_ids) == limit
    assert answer.finish_reason == "length"
    assert answer.text == decoder.codec.decode(answer.token_ids)


def test_an_answer_ends_where_the_context_does(decoder: Decoder) -> None:
    room = 5
    prompt = [7] * (decoder.context_length - room)
    (answer,) = decoder.generate(prompt, search=Sampling(ignore_eos=True), max_new_tokens=100)
    assert len(answer.token_ids) == room
    assert answer.finish_reason == "length"


def long_answer(decoder: Decoder, seed: int, **options: Any) -> Completion:
    (answer,) = decoder.generate("the inner", search=Sampling(ignore_eos=True, **options), max_new_tokens=40, seed=seed)
    return answer


def test_stop_token_ids_end_an_answer_and_leave_their_text(decoder: Decoder) -> None:
    free = long_answer(decoder, 1)
    stop = free.token_ids[11]
    at = free.token_ids.index(stop)
    for by_search in (True, False):
        search = Sampling(ignore_eos=True, stop_token_ids=(stop,) if by_search else ())
        ids = () if by_search else (stop,)
        (answer,) = decoder.generate("the inner", search=search, max_new_tokens=40, seed=1, stop_token_ids=ids)
        assert answer.token_ids == free.token_ids[: at + 1]
        assert answer.finish_reason == "stop"
        assert answer.text == decoder.codec.decode(free.token_ids[:at])


def test_end_of_text_ends_an_answer_unless_ignored(decoder: Decoder) -> None:
    shown: list[str] = []
    for seed in range(400):
        (answer,) = decoder.generate("the", max_new_tokens=20, seed=seed, on_text=lambda _, piece: shown.append(piece))
        if answer.finish_reason == "eos":
            break
        shown.clear()
    assert answer.finish_reason == "eos"
    assert answer.token_ids[-1] == EOS
    assert EOS not in answer.token_ids[:-1]
    assert answer.text == decoder.codec.decode(answer.token_ids[:-1]) == "".join(shown)
    (longer,) = decoder.generate("the", search=Sampling(ignore_eos=True), max_new_tokens=20, seed=seed)
    assert longer.token_ids[: len(answer.token_ids)] == answer.token_ids
    assert len(longer.token_ids) == 20


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("by_search", [True, False])
def test_stop_strings_end_an_answer_wherever_tokens_border(decoder: Decoder, length: int, by_search: bool) -> None:
    free = long_answer(decoder, 5)
    for start in (0, 4, 9, 20):
        stop = free.text[start : start + length]
        pieces: list[str] = []
        (answer,) = decoder.generate(
            "the inner",
            search=Sampling(ignore_eos=True, stop=(stop, "never written") if by_search else ()),
            stop=() if by_search else [stop],
            max_new_tokens=40,
            seed=5,
            on_text=lambda _, piece, pieces=pieces: pieces.append(piece),
        )
        at = free.text.index(stop)
        assert answer.finish_reason == "stop"
        assert answer.text == free.text[:at]
        assert "".join(pieces) == answer.text
        assert answer.token_ids == free.token_ids[: len(answer.token_ids)]
        assert stop in decoder.codec.decode(answer.token_ids)
        assert stop not in decoder.codec.decode(answer.token_ids[:-1])


def test_the_earliest_of_several_stop_strings_counts(decoder: Decoder) -> None:
    free = long_answer(decoder, 5)
    late, early = free.text[15:18], free.text[6:8]
    (answer,) = decoder.generate(
        "the inner", search=Sampling(ignore_eos=True, stop=(late, early)), max_new_tokens=40, seed=5
    )
    assert answer.text == free.text[: min(free.text.index(late), free.text.index(early))]


@pytest.mark.parametrize("vocabulary", [READABLE, EVERY_BYTE])
def test_streamed_pieces_are_the_text(vocabulary: int) -> None:
    """Also where a model writes bytes that are no text, and several requests stream at once."""
    decoder = tiny_decoder(vocabulary=vocabulary)
    pieces: dict[int, list[str]] = {i: [] for i in range(6)}
    answers = decoder.generate(
        ["the inner"] * 6,
        search=Sampling(ignore_eos=True, stop=("zq", "a")),
        max_new_tokens=40,
        seed=range(6),
        on_text=lambda i, piece: pieces[i].append(piece),
    )
    for i, answer in enumerate(answers):
        assert "".join(pieces[i]) == answer.text
        assert all(pieces[i])
        assert "a" not in answer.text
    assert any(len(pieces[i]) > 3 for i in pieces)


# ---- requests together ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "search",
    [
        Sampling(),
        Sampling(temperature=0.8, top_p=0.9, min_p=0.02, logprobs=True),
        Sampling(top_k=20, repetition_penalty=1.3, stop=("e",)),
        Sampling.greedy(),
    ],
    ids=["plain", "filters", "penalty", "greedy"],
)
def test_a_request_alone_is_the_request_among_31_others(decoder: Decoder, search: Sampling) -> None:
    prompts = ["the inner on " + "abcdefgh"[i % 8] * (1 + 5 * (i % 7)) for i in range(32)]
    limit = 24
    together = decoder.generate(prompts, search=search, max_new_tokens=limit, seed=range(32))
    for i in (0, 1, 13, 31):
        decoder.engine.tree.clear()
        (alone,) = decoder.generate(prompts[i], search=search, max_new_tokens=limit, seed=i)
        assert alone.token_ids == together[i].token_ids
        assert alone.text == together[i].text
        assert alone.logprobs == together[i].logprobs
        assert alone.stats.tokens_processed == together[i].stats.tokens_processed


def test_seeds_decide_the_answer(decoder: Decoder) -> None:
    answers = decoder.generate(["the inner"] * 3, seed=[1, 2, 1], max_new_tokens=20, search=Sampling(ignore_eos=True))
    assert answers[0].token_ids == answers[2].token_ids
    assert answers[0].token_ids != answers[1].token_ids
    assert [a.seed for a in answers] == [1, 2, 1]
