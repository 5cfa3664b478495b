"""Plain decoding: random numbers, filters, draws, and answers, each against a direct definition or transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EOS, EVERY_BYTE, READABLE, byte_tokenizer, stock_copy, tiny_decoder, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, RepetitionPenaltyLogitsProcessor

from raindecode.decoder import Decoder
from raindecode.engine.rng import MASK128, mix, name_draw, uniforms
from raindecode.engine.sampler import Filter, draw, filtered, log_softmax_at, top_ids, top_probs
from raindecode.errors import ConfigError
from raindecode.search.sampling import Sampling
from raindecode.types import Completion

STORIES = Path(__file__).resolve().parents[3] / "shared" / "weights" / "stories260k"


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """A random Llama that writes ASCII."""
    return tiny_decoder()


# ---- random numbers ---------------------------------------------------------------------------------------------------
def packed(words: Sequence[int]) -> float:
    """The uniform that stands for a Philox block: its first 52 bits, in the middle of their interval."""
    return (((words[0] << 20) | (words[1] >> 12)) + 0.5) * 2.0**-52


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers of Random123 for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_uniforms_are_philox(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    name = sum(word << (32 * i) for i, word in enumerate(counter))
    seed = sum(word << (32 * i) for i, word in enumerate(key))
    (got,) = uniforms([seed], [name])
    assert got == packed(words)


def test_a_draw_does_not_depend_on_the_draws_beside_it() -> None:
    keys, counters = [3, 3, 4, 2**64 - 1], [7, 8, 7, MASK128]
    together = uniforms(keys, counters)
    assert [uniforms([k], [c])[0] for k, c in zip(keys, counters, strict=True)] == list(together)
    assert len(set(together)) == 4


def test_uniforms_stay_inside_the_open_interval() -> None:
    numbers = uniforms([5] * 20000, range(20000))
    assert 0 < numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    assert packed((0, 0)) > 0
    assert packed((0xFFFFFFFF, 0xFFFFFFFF)) < 1


@given(st.lists(st.integers(0, 2**20), max_size=6), st.lists(st.integers(0, 2**20), max_size=6))
def test_different_paths_have_different_names(a: list[int], b: list[int]) -> None:
    assert (name_draw(0, *a) == name_draw(0, *b)) == (a == b)


def test_mixing_loses_no_state() -> None:
    states = {mix(state, 5) for state in range(5000)} | {mix(0, value) for value in range(5000)}
    assert len(states) >= 9999
    assert all(0 <= state <= MASK128 for state in states)


# ---- filters against their definition ---------------------------------------------------------------------------------
def defined(logits: npt.NDArray[np.float64], shape: Filter) -> dict[int, float]:
    """Probabilities after temperature, top-k, top-p and min-p, in that order, token by token."""
    kept = {i: math.exp((x - max(logits)) / shape.temperature) for i, x in enumerate(logits)}
    if shape.top_k:
        kept = {i: kept[i] for i in sorted(kept, key=lambda i: (-logits[i], i))[: shape.top_k]}
    if shape.top_p < 1:
        total, mass, best = sum(kept.values()), 0.0, []
        for i in sorted(kept, key=lambda i: (-kept[i], i)):
            best.append(i)
            mass += kept[i]
            if mass >= shape.top_p * total:
                break
        kept = {i: kept[i] for i in best}
    floor = shape.min_p * max(kept.values())
    kept = {i: weight for i, weight in kept.items() if weight >= floor}
    total = sum(kept.values())
    return {i: weight / total for i, weight in kept.items()}


SHAPES = st.builds(
    Filter,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 10, 500]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.7, 1.0]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), shape=SHAPES, size=st.sampled_from([1, 2, 20]))
def test_filters_are_what_they_are_defined_to_be(seed: int, shape: Filter, size: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, size).astype(np.float32)
    expected = defined(logits.astype(np.float64), shape)
    ids, weights = filtered(logits.astype(np.float64) / shape.temperature, shape)
    tokens = range(size) if ids is None else ids.tolist()
    got = {i: w / weights.sum() for i, w in zip(tokens, weights, strict=True) if w > 0}
    assert got == pytest.approx(expected)
    for uniform in (1e-9, 0.3, 0.77, 1 - 1e-9):
        drawn = draw(logits, shape, uniform)
        assert drawn.prob == pytest.approx(expected[drawn.token])
    likeliest = draw(logits, shape, None)
    assert likeliest.prob == pytest.approx(max(expected.values()))


@pytest.mark.parametrize(
    ("k", "expected"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 0]), (4, [1, 3, 0, 2]), (9, [1, 3, 0, 2, 4])]
)
def test_ties_go_to_the_lower_id(k: int, expected: list[int]) -> None:
    scores = np.array([1.0, 2.0, 1.0, 2.0, 0.0], dtype=np.float32)
    assert top_ids(scores, k).tolist() == expected
    ids, probs = top_probs(scores, k)
    assert ids == expected
    weights = np.exp(scores[expected].astype(np.float64))
    assert probs == pytest.approx((weights / weights.sum()).tolist())


def test_greedy_takes_the_lowest_of_equals() -> None:
    drawn = draw(np.array([1.0, 3.0, 3.0], dtype=np.float32), Filter(temperature=0), 0.99)
    assert (drawn.token, drawn.prob) == (1, 1.0)


@pytest.mark.parametrize("temperature", [1e-310, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = np.array([-50.0, 3.0, 2.5, 60.0], dtype=np.float32)
    assert draw(logits, Filter(temperature=temperature), 0.999).token == 3


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf], dtype=np.float32)
    drawn = [draw(logits, Filter(), float(u)).token for u in uniforms([1] * 200, range(200))]
    assert set(drawn) == {1, 3}
    assert draw(logits, Filter(), 2.0**-53).token == 1
    assert draw(logits, Filter(), 1 - 2.0**-53).token == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [Filter(), Filter(temperature=0), Filter(top_k=2)])
def test_rows_that_are_no_distribution_are_refused(bad: float, shape: Filter) -> None:
    logits = np.array([0.0, bad, 1.0], dtype=np.float32)
    with pytest.raises(FloatingPointError, match="row of logits"):
        draw(logits, shape, 0.5)
    with pytest.raises(FloatingPointError, match="row of logits"):
        top_probs(logits, 2)
    with pytest.raises(FloatingPointError, match="row of logits"):
        draw(np.full(3, -np.inf, dtype=np.float32), shape, 0.5)


@pytest.mark.parametrize("shape", [Filter(), Filter(temperature=1.7, top_k=6), Filter(top_p=0.8)])
def test_draws_follow_the_distribution(shape: Filter) -> None:
    """Chi-square of 20,000 draws at the 1e-4 level (Wilson-Hilferty)."""
    logits = np.array([1.0, 0.5, 0.0, -0.5, 2.0, 1.5, -1.0, 0.25], dtype=np.float32)
    count = 20000
    drawn = [draw(logits, shape, float(u)).token for u in uniforms([11] * count, range(count))]
    expected = defined(logits.astype(np.float64), shape)
    assert set(drawn) <= set(expected)
    statistic = sum((drawn.count(i) - p * count) ** 2 / (p * count) for i, p in expected.items())
    freedom = len(expected) - 1
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


def test_neighbouring_draws_are_independent() -> None:
    """Chi-square over pairs: the same position under two seeds, and two positions under one."""
    count, bins = 20000, 8
    one = uniforms([1] * count, [name_draw(0, i, 0) for i in range(count)])
    two = uniforms([2] * count, [name_draw(0, i, 0) for i in range(count)])
    for a, b in ((one, two), (one[:-1], one[1:])):
        table, _, _ = np.histogram2d(a, b, bins=bins, range=[[0, 1], [0, 1]])
        even = len(a) / bins**2
        assert ((table - even) ** 2 / even).sum() < 63 * (1 - 2 / 567 + 3.72 * math.sqrt(2 / 567)) ** 3


@pytest.mark.parametrize("penalty", [1.3, 0.7, 5.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = np.random.default_rng(2).normal(0, 3, 40).astype(np.float32)
    context = [3, 3, 17, 39, 0]
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    scores = processor(torch.tensor([context]), torch.from_numpy(logits)[None].double())[0].numpy()
    expected = defined(scores, Filter())
    for uniform in uniforms([1] * 40, range(40)):
        drawn = draw(logits, Filter(repetition_penalty=penalty), float(uniform), context)
        assert drawn.prob == pytest.approx(expected[drawn.token])
        assert drawn.logprob == pytest.approx(float(torch.from_numpy(logits).double().log_softmax(0)[drawn.token]))
    greedy = draw(logits, Filter(temperature=0, repetition_penalty=penalty), None, context)
    assert greedy.token == scores.argmax()


def test_log_probabilities_are_log_softmax() -> None:
    logits = np.random.default_rng(3).normal(0, 4, 50).astype(np.float32)
    expected = torch.from_numpy(logits).double().log_softmax(0)
    assert log_softmax_at(logits, range(50)) == pytest.approx(expected.tolist())


# ---- answers ----------------------------------------------------------------------------------------------------------
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


# ---- settings outside what is allowed ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": 3.0},
        {"top_p": 0.0},
        {"top_p": 1.2},
        {"top_p": -0.5},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": math.inf},
        {"stop": "one string"},
        {"stop": ("",)},
        {"stop": (3,)},
    ],
    ids=str,
)
def test_settings_outside_what_is_allowed(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        Sampling(**options)
