"""Work ahead of the search changes nothing but its cost: any width, alone or in company, gives what width 1 gives."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from fake_lm import TEMPLATE, HashLM, fake_decoder, hashed_scores, random_rain

from raindecode import RAIN
from raindecode.errors import ConfigError, EvaluatorError
from raindecode.search import rain_search
from raindecode.types import Completion

PROMPT = "H:abc, de\nA:"
WIDTHS = (2, 4, 8, "auto")
QUICK = RAIN(evaluator=TEMPLATE, max_iterations=12, min_new_iterations=4, min_visits=2, record_tree=True)
Pairs = list[tuple[str, str]]


def outcome(done: Completion) -> tuple[Any, ...]:
    """All that may not depend on the width."""
    stats = done.stats
    counts = (stats.tokens_processed, stats.iterations, stats.evaluations)
    return done.token_ids, done.text, done.finish_reason, done.value, done.tree, counts


@pytest.mark.parametrize("seed", range(40))
def test_every_width_gives_the_same(seed: int) -> None:
    rain, lm, options = random_rain(seed)
    results = []
    for width in (1, *WIDTHS):
        (done,) = fake_decoder(lm)[0].generate(PROMPT, search=replace(rain, width=width), **options)
        results.append(outcome(done))
    assert all(result == results[0] for result in results)


def test_work_ahead_saves_forwards() -> None:
    steps, charged = {}, {}
    for width in (1, "auto"):
        rain = RAIN(evaluator=TEMPLATE, width=width)
        decoder, recorder = fake_decoder(HashLM(3, eos=-1.0))
        (done,) = decoder.generate(PROMPT, search=rain, max_new_tokens=60)
        steps[width], charged[width] = done.stats.model_steps, done.stats.tokens_charged
        assert done.stats.model_steps == recorder.forwards
        assert done.stats.tokens_charged == len(recorder.rows)
    assert steps["auto"] < 0.8 * steps[1]
    assert charged[1] <= charged["auto"] <= 1.6 * charged[1]


def test_work_beyond_unknown_leaves_saves_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    rain = RAIN(evaluator=TEMPLATE, record_tree=True)
    found = {}
    for waste in (rain_search._WASTE_BEYOND, -1.0):  # no row is spared for it
        monkeypatch.setattr(rain_search, "_WASTE_BEYOND", waste)
        (found[waste],) = fake_decoder(HashLM(3, eos=-1.0))[0].generate(PROMPT, search=rain, max_new_tokens=60)
    beyond, without = found.values()
    assert outcome(beyond) == outcome(without)
    assert beyond.stats.model_steps < without.stats.model_steps
    assert beyond.stats.tokens_charged <= 1.6 * beyond.stats.tokens_processed


@pytest.mark.parametrize("width", WIDTHS)
def test_in_company(width: int | str) -> None:
    prompts = ["H:abc, de\nA:", "H:b\nA:", "H:ab.\nA:", "H:cd? e\nA:"]
    lm = HashLM(21, eos=0.5)
    alone = [
        fake_decoder(lm)[0].generate([p], search=replace(QUICK, width=1), max_new_tokens=12, seed=s)[0]
        for s, p in enumerate(prompts)
    ]
    decoder, _ = fake_decoder(lm)
    together = decoder.generate(
        prompts, search=replace(QUICK, width=width), max_new_tokens=12, seed=list(range(len(prompts)))
    )
    assert [outcome(done) for done in together] == [outcome(done) for done in alone]


def test_a_full_batch_leaves_no_room_for_work_ahead() -> None:
    prompts = [f"H:{'abcdefgh'[i]}\nA:" for i in range(8)] * 2
    charged = {}
    for width in (1, "auto"):
        decoder, _ = fake_decoder(HashLM(4))
        done = decoder.generate(
            prompts, search=replace(QUICK, width=width), max_new_tokens=8, seed=list(range(len(prompts)))
        )
        charged[width] = sum(d.stats.tokens_charged for d in done)
    assert charged["auto"] <= 1.1 * charged[1]


@pytest.mark.parametrize("width", [0, -1, 1.5, "wide", None, True])
def test_bad_widths_are_refused(width: Any) -> None:
    with pytest.raises(ConfigError, match="width"):
        RAIN(evaluator=TEMPLATE, width=width)


# Failures


def used_texts(rain: RAIN, lm: HashLM) -> set[str]:
    """The texts that the search asks about when nothing is worked on ahead."""
    seen: set[str] = set()

    def judge(pairs: Pairs) -> list[float]:
        seen.update(text for _, text in pairs)
        return hashed_scores("mixed", 0, pairs)

    fake_decoder(lm)[0].generate(PROMPT, search=replace(rain, evaluator=judge, width=1), max_new_tokens=12)
    return seen


def test_a_failure_ahead_of_the_search_is_none_until_it_is_needed() -> None:
    lm = HashLM(31)
    used, failures = used_texts(QUICK, lm), []

    def judge(pairs: Pairs) -> list[float]:
        for _, text in pairs:
            if text not in used:
                failures.append(text)
                raise ValueError("asked about a text of no use")
        return hashed_scores("mixed", 0, pairs)

    results = []
    for evaluator, width in ((partial(hashed_scores, "mixed", 0), 1), (judge, 8)):
        rain = replace(QUICK, evaluator=evaluator, width=width)
        (done,) = fake_decoder(lm)[0].generate(PROMPT, search=rain, max_new_tokens=12)
        results.append(outcome(done))
    assert failures
    assert results[0] == results[1]


@pytest.mark.parametrize("answer", ["raises", "nan", "too few"])
def test_a_failing_evaluator_ends_its_request_only(answer: str) -> None:
    def judge(pairs: Pairs) -> list[float]:
        scores = hashed_scores("mixed", 0, pairs)
        faulty = [prompt == "H:b\nA:" for prompt, _ in pairs]
        if answer == "raises" and any(faulty):
            raise ValueError("no")
        if answer == "too few" and any(faulty):
            return scores[1:]
        return [float("nan") if bad else score for bad, score in zip(faulty, scores, strict=True)]

    decoder, _ = fake_decoder(HashLM(5))
    rain = replace(QUICK, evaluator=judge, width=4)
    prompts = ["H:a\nA:", "H:b\nA:", "H:c\nA:"]
    done = decoder.generate(prompts, search=rain, max_new_tokens=8, errors="return")
    assert [type(d) for d in done] == [Completion, EvaluatorError, Completion]


def test_closed_in_the_middle_of_work_ahead() -> None:
    """The slots are looked at by the fixture that follows every test."""
    decoder, _ = fake_decoder(HashLM(6))
    requests = decoder.requests(["H:a\nA:", "H:b\nA:"], search=QUICK, max_new_tokens=20)
    stream = decoder.stream(requests, search=replace(QUICK, width=8, max_iterations=40))
    next(stream)
    stream.close()
    assert decoder.engine.num_running == 0
