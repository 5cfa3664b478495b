"""The engine: what a step runs and books, what it answers, and how several runs share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from models import logits_after, random_tokens, run_alone, stock_copy, stock_row, task, tiny_decoder, tiny_model, writes
from transformers import PreTrainedModel

from raindecode.engine import logit_rows
from raindecode.engine.branch import Ledger
from raindecode.engine.engine import Engine
from raindecode.engine.loader import build_engine
from raindecode.engine.types import HostCall, Search, Want
from raindecode.errors import RainDecodeError, RequestCancelled
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling


@pytest.fixture(scope="module")
def stock() -> PreTrainedModel:
    return stock_copy(tiny_model("llama"))


@pytest.fixture(scope="module")
def shared_engine() -> Engine:
    return build_engine(tiny_model("llama"), kv_tokens=1000)[0]


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    yield shared_engine
    shared_engine.max_tasks, shared_engine.max_rows = 32, 1024


@pytest.fixture
def sizes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every forward of the test."""
    found: list[int] = []
    forward = engine.runner.forward

    def counted(batch: Any, wanted: Sequence[int]) -> Any:
        found.append(batch.num_rows)
        return forward(batch, wanted)

    monkeypatch.setattr(engine.runner, "forward", counted)
    return found


def prefixes(paths: Sequence[Sequence[int]]) -> set[tuple[int, ...]]:
    return {tuple(path[: i + 1]) for path in paths for i in range(len(path))}


# ---- what runs, and what is booked ------------------------------------------------------------------------------------
def test_tokens_processed_are_the_distinct_prefixes(engine: Engine, sizes: list[int]) -> None:
    stem = random_tokens(12, 1)
    paths = [stem + random_tokens(n, 20 + n) for n in (0, 3, 3, 7)]
    paths += [[*paths[3], 9], stem[:5] + random_tokens(2, 3)]

    def search(ledger: Ledger) -> Search:
        yield [Want(engine.open(ledger, path), top=1) for path in paths[:4]]
        yield [Want(engine.open(ledger, path), top=1) for path in paths[2:]]

    one = task(engine, search)
    list(engine.run([one]))
    assert one.error is None
    assert one.ledger.tokens_processed == len(prefixes(paths)) == sum(sizes) - 2  # two last tokens ran again for logits
    assert one.ledger.tokens_charged == sum(sizes)
    assert one.ledger.model_steps == len(sizes) == 2


def test_a_prompt_of_several_requests_runs_once(engine: Engine, sizes: list[int]) -> None:
    prompt = random_tokens(30, 1)
    tasks = [task(engine, writes(engine, prompt, 4, seed)) for seed in range(5)]
    done = list(engine.run(tasks))
    paths = [prompt + t.result[:-1] for t in tasks]  # nothing asks for what follows the last token
    assert done == tasks
    assert sizes[0] == len(prompt)
    assert sum(sizes) == len(prefixes(paths)) == sum(t.ledger.tokens_charged for t in tasks)
    assert [t.ledger.tokens_processed for t in tasks] == [len(prompt) + 3] * 5


def test_what_is_cached_costs_the_last_row_only(engine: Engine, sizes: list[int]) -> None:
    prompt = random_tokens(30, 1)
    first, second = task(engine, writes(engine, prompt, 1)), task(engine, writes(engine, prompt, 1))
    list(engine.run([first]))
    list(engine.run([second]))
    assert sizes == [30, 1]
    assert (second.ledger.tokens_processed, second.ledger.tokens_charged) == (30, 1)
    assert first.result == second.result


def test_equal_wants_of_one_step_share_their_row(engine: Engine, sizes: list[int]) -> None:
    path = random_tokens(8, 1)
    rows = logits_after(engine, [path, path, path[:-1], path])
    assert sizes == [8]
    assert np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[0], rows[3])


def test_a_kept_row_is_not_run_again(engine: Engine, sizes: list[int]) -> None:
    def search(ledger: Ledger) -> Search:
        branch = engine.open(ledger, random_tokens(8, 2))
        first = yield [Want(branch, top=3, keep=True)]
        second = yield [Want(branch, top=3), Want(branch.fork(), top=3)]
        return [got.top_probs for got in first + second]

    one, two, three = run_alone(engine, search)
    assert one == two == three
    assert sizes == [8]


def test_kept_rows_give_way_without_harm(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_rows, "_KEPT_BYTES", 1)
    paths = [random_tokens(4, seed) for seed in range(6)]

    def search(ledger: Ledger) -> Search:
        branches = [engine.open(ledger, path) for path in paths]
        answers = []
        for _ in range(3):
            got = yield [Want(branch, top=2, keep=True) for branch in branches]
            answers.append([one.top_probs for one in got])
        return answers

    answers = run_alone(engine, search)
    assert answers[0] == answers[1] == answers[2]


def test_a_long_step_is_cut_into_several_forwards(engine: Engine, sizes: list[int], stock: PreTrainedModel) -> None:
    stem = random_tokens(20, 1)
    paths = [stem + random_tokens(9, seed) for seed in range(3)] + [random_tokens(5, 9), stem[:3]]
    whole = logits_after(engine, paths)
    engine.tree.clear()
    engine.max_rows = 16
    cut = logits_after(engine, paths)
    assert sizes == [52, 16, 16, 16, 4]
    for path, a, b in zip(paths, whole, cut, strict=True):
        assert np.array_equal(a, b)
        assert np.abs(a - stock_row(stock, path)).max() < 1e-4


def test_no_more_requests_run_together_than_allowed(engine: Engine, sizes: list[int]) -> None:
    engine.max_tasks = 3
    tasks = [task(engine, writes(engine, random_tokens(1, 30 + i), 3, i)) for i in range(8)]
    assert len(list(engine.run(tasks))) == 8
    assert max(sizes) == 3
    assert all(t.error is None for t in tasks)


# ---- what is answered -------------------------------------------------------------------------------------------------
def test_answers_against_the_stock_model(engine: Engine, stock: PreTrainedModel) -> None:
    path, starts = random_tokens(25, 4), [0, 3, 17, 24]

    def search(ledger: Ledger) -> Search:
        branch = engine.open(ledger, path)
        (got,) = yield [Want(branch, top=4, gather=[5, 150, 5], logits=True, pool_from=starts)]
        return got

    got = run_alone(engine, search)
    row = stock_row(stock, path)
    assert np.abs(got.logits - row).max() < 1e-4
    assert got.gathered == pytest.approx([row[5], row[150], row[5]], abs=1e-4)
    best = np.argsort(-row)[:4]
    assert got.top_ids == best.tolist()
    weights = np.exp(row[best] - row[best].max())
    assert got.top_probs == pytest.approx((weights / weights.sum()).tolist(), abs=1e-4)
    with torch.inference_mode():
        states = stock.base_model(input_ids=torch.tensor([path])).last_hidden_state[0]
    expected = torch.stack([states[start:].mean(0) for start in starts])
    assert torch.allclose(got.pooled, expected, atol=1e-4)


def test_pooled_states_of_branches_do_not_mix(engine: Engine, stock: PreTrainedModel) -> None:
    stem = random_tokens(6, 1)
    paths = [stem + random_tokens(4, seed) for seed in (2, 3)]

    def search(ledger: Ledger) -> Search:
        got = yield [Want(engine.open(ledger, path), pool_from=[len(stem)]) for path in paths]
        return [one.pooled for one in got]

    for path, pooled in zip(paths, run_alone(engine, search), strict=True):
        with torch.inference_mode():
            states = stock.base_model(input_ids=torch.tensor([path])).last_hidden_state[0]
        assert torch.allclose(pooled[0], states[len(stem) :].mean(0), atol=1e-4)


def test_a_branch_goes_its_own_way_after_a_fork(engine: Engine, stock: PreTrainedModel) -> None:
    def search(ledger: Ledger) -> Search:
        trunk = engine.open(ledger, [5, 6, 7])
        trunk.append([8])
        side = trunk.fork()
        side.append([9, 10])
        trunk.append([11])
        first = yield [Want(side, logits=True), Want(trunk, logits=True)]
        again = side.fork()
        side.release()
        again.append([12])
        second = yield [Want(again, logits=True)]
        return [
            (again.tokens(), second[0].logits),
            (trunk.tokens(), first[1].logits),
            ([*range(5, 11)], first[0].logits),
        ]

    for path, row in run_alone(engine, search):
        assert np.abs(row - stock_row(stock, path)).max() < 1e-4


# ---- host calls -------------------------------------------------------------------------------------------------------
def asks(engine: Engine, function: Any, items: list[Any]) -> Callable[[Ledger], Search]:
    def search(ledger: Ledger) -> Search:
        branch = engine.open(ledger, [3, 4])
        yield [Want(branch, top=1)]
        return (yield HostCall(function, items))

    return search


def test_host_calls_of_all_requests_are_one_batch(engine: Engine) -> None:
    batches: list[list[int]] = []

    def double(items: list[int]) -> list[int]:
        batches.append(items)
        return [2 * item for item in items]

    tasks = [task(engine, asks(engine, double, items)) for items in ([1, 2], [], [3])]
    list(engine.run(tasks))
    assert batches == [[1, 2, 3]]
    assert [t.result for t in tasks] == [[2, 4], [], [6]]


@pytest.mark.parametrize("kind", ["raises", "too few results"])
def test_a_failing_host_call_ends_only_its_request(engine: Engine, kind: str) -> None:
    def function(items: list[int]) -> list[int]:
        if 13 in items:
            if kind == "raises":
                raise ZeroDivisionError("thirteen")
            return []
        return items

    tasks = [task(engine, asks(engine, function, [item])) for item in (1, 13, 2)]
    list(engine.run(tasks))
    assert [t.result for t in tasks] == [[1], None, [2]]
    assert isinstance(tasks[1].error, ZeroDivisionError if kind == "raises" else ValueError)


# ---- runs inside and beside each other --------------------------------------------------------------------------------
def test_two_runs_over_one_engine_get_their_own_requests(engine: Engine) -> None:
    outer = [task(engine, writes(engine, [5, 6], 3 + i, i), f"outer {i}") for i in range(3)]
    seen = []
    for done in engine.run(outer):
        seen.append(done.tag)
        inner = [task(engine, writes(engine, [7], 6, i), f"inner {i}") for i in range(2)]
        seen += [t.tag for t in engine.run(inner)]
        assert all(len(t.result) == 6 for t in inner)
    assert sorted(seen) == [*["inner 0"] * 3, *["inner 1"] * 3, "outer 0", "outer 1", "outer 2"]
    assert [len(t.result) for t in outer] == [3, 4, 5]


def test_a_decoder_called_from_inside_its_own_step_says_so() -> None:
    decoder = tiny_decoder()

    def evaluator(pairs: list[tuple[str, str]]) -> list[float]:
        decoder.generate("the", max_new_tokens=1)
        return [0.0] * len(pairs)

    def on_text(index: int, piece: str) -> None:
        decoder.generate("the", max_new_tokens=1)

    with pytest.raises(RainDecodeError):
        decoder.generate("the inner", search=RAIN(evaluator=evaluator), max_new_tokens=4)
    with pytest.raises(RainDecodeError, match="in the middle of a step"):
        decoder.generate("the inner", search=Sampling(ignore_eos=True), max_new_tokens=4, on_text=on_text)
    assert decoder.generate("the", max_new_tokens=1)


def test_closing_a_run_early_frees_everything(engine: Engine) -> None:
    engine.max_tasks = 3
    tasks = [task(engine, writes(engine, random_tokens(4, i), 2 + 5 * i, i)) for i in range(9)]
    run = engine.run(iter(tasks))
    first = next(run)
    run.close()
    assert first is tasks[0]
    assert first.error is None
    assert engine.tree.num_cursors == 0
    assert all(isinstance(t.error, RequestCancelled) for t in tasks[1:6])  # running, and in the queue
    assert [t.done for t in tasks[6:]] == [False] * 3  # never handed over
    assert len(run_alone(engine, writes(engine, [5], 2))) == 2


def test_an_answer_stream_left_early_frees_everything() -> None:
    decoder = tiny_decoder()
    requests = decoder.requests(["the", "inner", "on"], max_new_tokens=30)
    stream = decoder.stream(requests, search=Sampling(ignore_eos=True), progress=False)
    index, _ = next(stream)
    stream.close()
    assert index == 0
    assert decoder.engine.tree.num_cursors == 0
