"""Small KV pools: requests wait, lose their slots and come back with the same answers; what can never fit says so."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import pytest
from models import random_tokens, tiny_decoder, tiny_model

from raindecode.decoder import Decoder
from raindecode.engine.branch import Branch, Ledger
from raindecode.engine.engine import Engine
from raindecode.engine.kv_tree import KVTree
from raindecode.engine.loader import build_engine
from raindecode.engine.rng import name_draw
from raindecode.engine.sampler import Filter
from raindecode.engine.task import Task
from raindecode.engine.types import Draw, Want
from raindecode.errors import CapacityError, ConfigError, PromptError, RequestCancelled
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling
from raindecode.types import Completion

FREE = Sampling(ignore_eos=True)
PROMPTS = [("the inner on a " * 3)[i : i + 20 + i % 5] for i in range(14)]


def answers(decoder: Decoder, prompts: Sequence[str] = PROMPTS, **options: Any) -> list[Completion]:
    options.setdefault("search", FREE)
    return decoder.generate(prompts, max_new_tokens=20, seed=range(len(prompts)), **options)


def need(decoder: Decoder, prompts: Sequence[str] = PROMPTS) -> int:
    """Tokens the largest request holds at its end; nothing runs after its last token."""
    return max(len(decoder.codec.encode(prompt)) for prompt in prompts) + 20 - 1


@pytest.fixture(scope="module")
def expected() -> list[Completion]:
    return answers(tiny_decoder())


def assert_same(got: Sequence[Completion], expected: Sequence[Completion]) -> None:
    assert [c.token_ids for c in got] == [c.token_ids for c in expected]
    assert [c.text for c in got] == [c.text for c in expected]
    assert [c.stats.tokens_processed for c in got] == [c.stats.tokens_processed for c in expected]


@pytest.mark.parametrize("times", [1.0, 1.4, 2.5, 6.0])
def test_many_requests_on_a_small_pool(times: float, expected: list[Completion]) -> None:
    small = tiny_decoder(kv_tokens=math.ceil(need(tiny_decoder(kv_tokens=50)) * times))
    got = answers(small)
    assert_same(got, expected)
    charged = sum(c.stats.tokens_charged for c in got)
    assert charged >= sum(c.stats.tokens_charged for c in expected)
    assert small.engine.tree.num_evicted > 0
    assert_same(answers(small), expected)  # and once more, on what is cached now


def test_requests_lose_their_slots_and_come_back(expected: list[Completion], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_decoder(kv_tokens=100)
    paused: list[Task] = []
    pause = decoder.engine._pause
    monkeypatch.setattr(decoder.engine, "_pause", lambda task: (paused.append(task), pause(task)))
    got = answers(decoder)
    assert paused
    assert_same(got, expected)
    charged = {task.tag: task.ledger.tokens_charged for task in paused}
    assert any(count > expected[i].stats.tokens_processed for i, count in charged.items())  # they ran again


def test_a_pool_too_small_for_one_request_names_the_need(expected: list[Completion]) -> None:
    decoder = tiny_decoder(kv_tokens=30)
    with pytest.raises(
        CapacityError, match=r"holds 30 tokens.*branches hold \d+ and the next step adds up to \d+.*kv_tokens"
    ):
        answers(decoder)
    short = ["the"] * 3
    mixed = answers(decoder, [short[0], PROMPTS[0] * 2, short[1], short[2]], errors="return")
    assert isinstance(mixed[1], CapacityError)
    alone = answers(tiny_decoder(), [short[0], PROMPTS[0] * 2, short[1], short[2]])
    assert_same([mixed[0], *mixed[2:]], [alone[0], *alone[2:]])


def test_the_pool_that_just_holds_a_request_is_enough() -> None:
    prompt = PROMPTS[4:5]
    tokens = need(tiny_decoder(kv_tokens=50), prompt)
    assert answers(tiny_decoder(kv_tokens=tokens), prompt)[0].finish_reason == "length"
    with pytest.raises(CapacityError):
        answers(tiny_decoder(kv_tokens=tokens - 1), prompt)


def test_more_requests_than_run_together_wait_their_turn(expected: list[Completion]) -> None:
    assert_same(answers(tiny_decoder(kv_tokens=120, max_concurrent=3)), expected)


def test_rain_on_a_small_pool() -> None:
    search = RAIN(evaluator=lambda pairs: [0.1 * (len(reply) % 7) - 0.3 for _, reply in pairs])
    big, small = tiny_decoder(), tiny_decoder(kv_tokens=160)
    options = {"search": search, "max_new_tokens": 8, "seed": range(4)}
    got, expected = small.generate(PROMPTS[:4], **options), big.generate(PROMPTS[:4], **options)
    assert_same(got, expected)
    assert [c.stats.iterations for c in got] == [c.stats.iterations for c in expected]


# ---- any search on any pool -------------------------------------------------------------------------------------------
def wanders(engine: Engine, seed: int) -> tuple[Ledger, Generator[Any, Any, list[list[int]]]]:
    """A search that forks, extends and drops branches as its seed says, and returns what it drew."""
    ledger = Ledger()

    def search() -> Generator[Any, Any, list[list[int]]]:
        choose = np.random.default_rng(seed)
        branches: list[Branch] = [engine.open(ledger, random_tokens(int(choose.integers(1, 12)), seed % 3))]
        drawn = []
        for _ in range(8):
            for branch in list(branches):
                if len(branches) < 4 and choose.random() < 0.4:
                    branches.append(branch.fork(reserve=int(choose.integers(0, 6))))
            if len(branches) > 1 and choose.random() < 0.3:
                branches.pop(int(choose.integers(len(branches)))).release()
            for branch in branches:
                branch.append(random_tokens(int(choose.integers(0, 4)), int(choose.integers(1000))))
            wants = [
                Want(b, draws=[Draw(Filter(), seed, name_draw(b.hash, 1))], keep=choose.random() < 0.3)
                for b in branches
            ]
            got = yield wants
            for branch, answer in zip(branches, got, strict=True):
                branch.append([answer.drawn[0].token])
            drawn.append([answer.drawn[0].token for answer in got])
        ledger.measure()
        return drawn

    return ledger, search()


def test_any_search_on_any_pool_ends_as_on_a_big_one() -> None:
    runner = build_engine(tiny_model("llama"), kv_tokens=2000)[0].runner
    big = Engine(runner, KVTree(2001))

    def outcome(engine: Engine, seeds: Sequence[int], cancelled: int) -> list[tuple[Any, int]]:
        tasks = [Task(search, ledger) for ledger, search in (wanders(engine, seed) for seed in seeds)]
        for done, _ in enumerate(engine.run(tasks)):
            if done == cancelled:
                tasks[-1].cancel()
        engine.tree.clear()
        assert engine.tree.num_free == engine.tree.num_slots
        return [(type(t.error) if t.error else t.result, t.ledger.tokens_processed) for t in tasks]

    finished = refused = 0
    for trial in range(25):
        choose = np.random.default_rng(trial)
        seeds = [int(s) for s in choose.integers(0, 50, 5)]
        cancelled = int(choose.integers(0, 9))
        slots, tasks = int(choose.integers(20, 160)), int(choose.integers(1, 6))
        small = Engine(runner, KVTree(slots), max_tasks=tasks, max_rows=17)
        both = zip(outcome(small, seeds, cancelled), outcome(big, seeds, 99), strict=True)
        for seed, (ours, theirs) in zip(seeds, both, strict=True):
            if isinstance(ours[0], list):
                assert ours == theirs
                finished += 1
            elif ours[0] is CapacityError:  # only what cannot run alone either
                assert outcome(Engine(runner, KVTree(slots)), [seed], 99)[0][0] is CapacityError
                refused += 1
            else:
                assert ours[0] is RequestCancelled
    assert finished > 40
    assert refused > 5


# ---- what is refused before anything runs -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder(kv_tokens=100)


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        ("", "prompt 0 is empty"),
        (["the", " \n\t"], "prompt 1 is empty"),
        ("a" * 1024, "1024 tokens.*context.*at most 1023"),
        ([[]], "0 token ids"),
        ([5, -1], "each from 0 to"),
        ([[5], [5, 10**6]], "prompt 1 has 2 token ids"),
    ],
    ids=["empty", "white space", "too long", "no ids", "negative id", "id outside the vocabulary"],
)
def test_prompts_that_cannot_be_answered(decoder: Decoder, prompts: Any, reason: str) -> None:
    steps = decoder.engine.model_steps
    with pytest.raises(PromptError, match=reason):
        decoder.generate(prompts)
    assert decoder.engine.model_steps == steps


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"seed": [1, 2]}, "2 seeds were given for 1 prompts"),
        ({"stop": "abc"}, "stop is the string 'abc'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_followed(decoder: Decoder, options: dict[str, Any], reason: str) -> None:
    steps = decoder.engine.model_steps
    with pytest.raises(ConfigError, match=reason):
        decoder.generate("the", **options)
    assert decoder.engine.model_steps == steps


def test_no_prompts_are_no_work(decoder: Decoder) -> None:
    assert decoder.generate([]) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv_tokens": 0}, "kv_tokens is 0"),
        ({"kv_tokens": -5}, "kv_tokens is -5"),
        ({"max_concurrent": 0}, "max_concurrent is 0"),
    ],
    ids=str,
)
def test_decoders_that_cannot_be_made(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        tiny_decoder(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "meta"}, "device is 'meta'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
    ids=str,
)
def test_places_and_number_types_that_are_not_served(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Decoder.from_pretrained("nowhere", **{"device": "cpu", **options})


def test_the_pool_may_be_sized_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAINDECODE_KV_TOKENS", "321")
    assert tiny_decoder(kv_tokens=None).engine.tree.num_slots == 321
    assert tiny_decoder(kv_tokens=50).engine.tree.num_slots == 50
    monkeypatch.setenv("RAINDECODE_KV_TOKENS", "many")
    with pytest.raises(ValueError, match="RAINDECODE_KV_TOKENS='many'"):
        tiny_decoder(kv_tokens=None)


def test_without_a_size_the_pool_is_made_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAINDECODE_KV_TOKENS", raising=False)
    monkeypatch.setattr("raindecode.engine.loader._POOL_BYTES_CPU", 2**22)
    engine, _ = build_engine(tiny_model("llama"))
    keys_and_values, hidden = 2 * 2 * 2 * 16 * 4, 64 * 4  # layers, K and V, heads, width, bytes
    assert engine.tree.num_slots == 2**22 // (keys_and_values + hidden)


@pytest.mark.parametrize(
    ("prompts", "options", "kind"),
    [
        (None, {}, PromptError),
        ([None], {}, PromptError),
        ([[1.5, 2.5]], {}, PromptError),
        ("a", {"stop": [""]}, ConfigError),
        ("a", {"stop_token_ids": ["x"]}, ConfigError),
        ("a", {"max_new_tokens": 2.5}, ConfigError),
        ("a", {"seed": True}, ConfigError),
        ("a", {"errors": "ignore"}, ConfigError),
        ("\ud800", {}, PromptError),
    ],
)
def test_odd_arguments_are_refused_before_anything_runs(
    decoder: Decoder, prompts: Any, options: dict[str, Any], kind: type[Exception]
) -> None:
    steps = decoder.engine.model_steps
    with pytest.raises(kind):
        decoder.generate(prompts, **options)
    assert decoder.engine.model_steps == steps
