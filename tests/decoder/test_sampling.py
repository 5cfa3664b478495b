"""Random numbers, filters and draws, each against a direct definition or transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from raindecode.engine.rng import MASK128, mix, name_draw
from raindecode.engine.sampler import Filter, draw, filtered, log_softmax_at, top_ids, top_probs, uniforms
from raindecode.errors import ConfigError
from raindecode.search.sampling import Sampling


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


def test_mixing_loses_nothing() -> None:
    for mixed in ({mix(state, 5) for state in range(5000)}, {mix(2**100 + 1, value) for value in range(5000)}):
        assert len(mixed) == 5000
        assert all(0 <= state <= MASK128 for state in mixed)


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
        {"temperature": "hot"},
        {"top_p": "most"},
        {"min_p": None},
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
