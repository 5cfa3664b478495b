"""Rates, intervals and the town task, counted against answers that are known."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raindecode import Decoder, testbed
from raindecode.errors import ConfigError, NumericError
from raindecode.evaluation import SEARCHES, Judged, Rate, evaluate_town, town_requests
from raindecode.testbed import world
from raindecode.types import Completion, Stats

_Z = 1.959963984540054
SEED = 40  # of the first request


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),
        (5, 10, 0.236593, 0.763407),
        (10, 10, 0.722467, 1.0),
        (1, 1, 0.206549, 1.0),
        (20, 400, 0.032597, 0.075964),
    ],
)
def test_interval_of_known_cases(hits: int, n: int, low: float, high: float) -> None:
    assert Rate(hits, n).interval == pytest.approx((low, high), abs=1e-6)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_ends_are_where_the_score_test_turns(case: tuple[int, int]) -> None:
    rate = Rate(*case)
    low, high = rate.interval
    assert 0.0 <= low <= rate.rate <= high <= 1.0
    for end in (low, high):
        if 0.0 < end < 1.0 and end != rate.rate:
            assert abs(rate.rate - end) / math.sqrt(end * (1 - end) / rate.n) == pytest.approx(_Z, rel=1e-6)


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_rates_without_cases_are_refused(hits: int, n: int) -> None:
    with pytest.raises(ConfigError, match="at least one case"):
        Rate(hits, n)


def test_requests_are_held_out_and_reproducible() -> None:
    harmful, benign = town_requests(40, 30, seed=5)
    assert (len(harmful), len(benign)) == (40, 30)
    assert all(request.harmful for request in harmful)
    assert not any(request.harmful for request in benign)
    assert all(world.split_of(r.verb, r.object, r.owner) == "test" for r in [*harmful, *benign])
    assert town_requests(40, 30, seed=5) == (harmful, benign)
    assert town_requests(40, 30, seed=6) != (harmful, benign)


@pytest.mark.parametrize(("harmful", "benign", "seed"), [(0, 5, 0), (5, -1, 0), (20_001, 5, 0), (5, 5, -1)])
def test_request_counts_are_checked(harmful: int, benign: int, seed: int) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        town_requests(harmful, benign, seed)


class ScriptedDecoder:
    """Answers every request with a reply drawn from the grammar, and remembers how it was called."""

    def __init__(self, requests: list[testbed.Request], complies: list[bool]) -> None:
        rng = random.Random(1)
        pairs = zip(requests, complies, strict=True)
        self.replies = [world.draw_reply(rng, request, comply=comply) for request, comply in pairs]
        self.engine = SimpleNamespace(model_steps=100, forget=lambda: None)
        self.options: dict[str, Any] = {}
        self.failure: Exception | None = None

    def requests(self, prompts: list[str], **options: Any) -> list[tuple[str, int]]:
        self.options = options
        return list(zip(prompts, options["seed"], strict=True))

    def stream(self, requests: list[tuple[str, int]], **options: Any) -> Iterator[tuple[int, Any]]:
        self.engine.model_steps += 7
        stats = Stats(tokens_processed=10, tokens_charged=8, iterations=3, evaluations=2)
        for at, (prompt, seed) in reversed(list(enumerate(requests))):  # they end in any order
            reply = self.replies[seed - SEED]
            yield at, self.failure or Completion(prompt, " " + reply, [1, 2, 3], "eos", seed, stats)


def evaluate_script(
    complies: list[bool], num_harmful: int, failure: Exception | None = None, **options: Any
) -> tuple[ScriptedDecoder, Any, list[Judged]]:
    harmful, benign = town_requests(num_harmful, len(complies) - num_harmful, seed=2)
    decoder = ScriptedDecoder([*harmful, *benign], complies)
    decoder.failure = failure
    result, judged = evaluate_town(
        cast(Decoder, decoder), "rain", harmful, benign, seed=SEED, max_new_tokens=50, **options
    )
    return decoder, result, judged


def test_harm_is_counted_on_harmful_and_help_on_harmless_requests() -> None:
    complies = [True] * 3 + [False] * 5 + [True] * 4 + [False] * 2
    decoder, result, judged = evaluate_script(complies, num_harmful=8)
    assert (result.harmful, result.helpful) == (Rate(3, 8), Rate(4, 6))
    assert result.known == Rate(14, 14)
    assert [one.harmful for one in judged[:8]] == complies[:8]
    assert [one.helpful for one in judged[8:]] == complies[8:]
    assert [one.request_harmful for one in judged] == [True] * 8 + [False] * 6
    assert decoder.options["seed"] == [SEED + i for i in range(14)]
    assert decoder.options["max_new_tokens"] == 50
    assert decoder.options["policy"].prompt.render("Hello.") == testbed.format_prompt("Hello.")


def test_counters_are_sums_and_forwards_are_counted_once() -> None:
    _, result, judged = evaluate_script([True] * 3 + [False] * 2, num_harmful=2)
    assert result.model_steps == 7
    assert (result.tokens_processed, result.tokens_charged, result.tokens_generated) == (50, 40, 15)
    assert (result.iterations, result.evaluations) == (15, 10)
    assert judged[3].to_json()["seed"] == 43
    assert judged[3].reply == judged[3].reply.strip()


def test_what_is_known_is_not_run_again() -> None:
    complies = [True] * 3 + [False] * 2
    _, whole, judged = evaluate_script(complies, num_harmful=2)
    seen: dict[int, Judged] = {}
    known = {1: judged[1], 4: judged[4]}
    decoder, result, again = evaluate_script(complies, num_harmful=2, known=known, on_answer=seen.__setitem__)
    assert decoder.options["seed"] == [SEED, SEED + 2, SEED + 3]
    assert again == judged
    assert seen == {i: judged[i] for i in (0, 2, 3)}
    assert replace(result, seconds=0.0, resumed=0) == replace(whole, seconds=0.0)
    assert (result.resumed, whole.resumed) == (2, 0)
    assert result.to_json()["resumed"] == 2
    assert "resumed" not in whole.to_json()


def test_a_failure_is_raised() -> None:
    with pytest.raises(NumericError, match="no number"):
        evaluate_script([True, False], num_harmful=1, failure=NumericError("no number"))


def test_json_has_the_published_shape() -> None:
    _, result, _ = evaluate_script([True, False, True, True], num_harmful=2)
    data = result.to_json()
    assert data["harmful_rate"] == 0.5
    assert data["helpful_rate"] == 1.0
    assert data["harmful_ci"] == list(Rate(1, 2).interval)
    assert data["helpful_ci"] == list(Rate(2, 2).interval)
    assert (data["n"], data["n_harmful"], data["n_benign"]) == (4, 2, 2)
    assert {"tokens_processed", "model_steps", "iterations"} <= data.keys()


def test_unknown_search_is_refused() -> None:
    harmful, benign = town_requests(1, 1, seed=0)
    with pytest.raises(ConfigError, match="vanilla, rain"):
        evaluate_town(cast(Decoder, None), "beam", harmful, benign)


def test_rain_makes_the_embedded_model_less_harmful() -> None:
    decoder = Decoder.from_pretrained("testbed", device="cpu", kv_tokens=16_384)
    harmful, benign = town_requests(12, 3, seed=1)
    rates = {name: evaluate_town(decoder, name, harmful, benign)[0] for name in SEARCHES}
    assert rates["vanilla"].harmful.hits >= 3
    assert rates["rain"].harmful.hits <= 2
    assert rates["vanilla"].iterations == 0
    assert rates["rain"].iterations > rates["rain"].n
