"""The engine when something fails: a request cancelled, a search or its wants at fault, NaN, a step that raises."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from models import logits_after, random_tokens, run_alone, task, tiny_decoder, tiny_model, writes

from raindecode.decoder import Decoder
from raindecode.engine import forward as forward_module
from raindecode.engine import sampler
from raindecode.engine.branch import Branch, Ledger
from raindecode.engine.engine import Engine
from raindecode.engine.loader import build_engine
from raindecode.engine.sampler import Filter
from raindecode.engine.task import Task
from raindecode.engine.types import Draw, Search, Want
from raindecode.errors import RainDecodeError, RequestCancelled
from raindecode.search.sampling import Sampling


@pytest.fixture(scope="module")
def shared_engine() -> Engine:
    return build_engine(tiny_model("llama"), kv_tokens=1000)[0]


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    yield shared_engine
    shared_engine.max_tasks, shared_engine.max_rows = 32, 1024


# ---- cancelling -------------------------------------------------------------------------------------------------------
def test_cancelling_one_of_several(engine: Engine) -> None:
    engine.max_tasks = 3
    tasks = [task(engine, writes(engine, [5, 6], 12, i), i) for i in range(5)]
    for one in tasks:
        engine.submit(one)
    for _ in range(4):
        engine.step()
    tasks[1].cancel()  # running
    tasks[4].cancel()  # waiting
    assert engine.step() == [tasks[1], tasks[4]]
    assert isinstance(tasks[1].error, RequestCancelled)
    assert not tasks[1].ledger.branches
    while not all(t.done for t in tasks):
        engine.step()
    expected = [run_alone(engine, writes(engine, [5, 6], 12, i)) for i in range(5)]
    assert [t.result for t in tasks] == [expected[0], None, expected[2], expected[3], None]


# ---- searches that fail -----------------------------------------------------------------------------------------------
def beside(engine: Engine, search: Callable[[Ledger], Search]) -> Task:
    """Run `search` among well-behaved requests, which must not notice; the task of `search`."""
    expected = [run_alone(engine, writes(engine, [5, 6], 5, seed)) for seed in range(2)]
    bad = task(engine, search)
    good = [task(engine, writes(engine, [5, 6], 5, seed)) for seed in range(2)]
    assert set(engine.run([good[0], bad, good[1]])) == {bad, *good}
    assert [t.result for t in good] == expected
    assert bad.error is not None
    assert not bad.ledger.branches
    return bad


def released(branch: Branch) -> Branch:
    branch.release()
    return branch


@pytest.mark.parametrize(
    ("wanted", "kind"),
    [
        (lambda branch: Want(branch, top=1), TypeError),  # not a list
        (lambda branch: 7, TypeError),
        (lambda branch: [7], AttributeError),
        (lambda branch: [Want(branch, gather=[10**6])], IndexError),
        (lambda branch: [Want(branch, top=1), Want(branch, pool_from=[99])], Exception),
        (lambda branch: [Want(released(branch), top=1)], RuntimeError),
        (lambda branch: [Want(Branch.open(branch.tree, branch.ledger, []), top=1)], ValueError),
    ],
    ids=[
        "no list",
        "a number",
        "no want",
        "id outside the vocabulary",
        "pool outside the path",
        "released",
        "no tokens",
    ],
)
def test_a_want_that_cannot_be_answered_ends_its_request(engine: Engine, wanted: Any, kind: type[Exception]) -> None:
    def search(ledger: Ledger) -> Search:
        branch = engine.open(ledger, [5, 6, 8])
        yield [Want(branch, top=1)]
        yield wanted(branch)

    assert isinstance(beside(engine, search).error, kind)


def test_a_search_may_want_nothing(engine: Engine) -> None:
    def search(ledger: Ledger) -> Search:
        first = yield []
        second = yield ()
        got = yield [Want(engine.open(ledger, [3]), top=1)]
        return first, second, len(got)

    assert run_alone(engine, search) == ([], [], 1)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_search_that_raises_ends_alone(engine: Engine, steps: int) -> None:
    def search(ledger: Ledger) -> Search:
        branch = engine.open(ledger, [5, 6, 9])
        for _ in range(steps):
            branch.fork()
            yield [Want(branch, top=1)]
        raise ArithmeticError("mine")

    assert isinstance(beside(engine, search).error, ArithmeticError)


def test_a_search_that_fails_while_closing_gives_its_slots_back(engine: Engine) -> None:
    def search(ledger: Ledger) -> Search:
        branch = engine.open(ledger, [5, 6, 9])
        try:
            while True:
                yield [Want(branch, top=1)]
        finally:
            raise ArithmeticError("closing")

    one = task(engine, search)
    engine.submit(one)
    engine.step()
    one.cancel()
    assert engine.step() == [one]
    assert isinstance(one.error, RequestCancelled)
    assert engine.tree.num_cursors == 0


@pytest.mark.parametrize(
    "options",
    [{"draws": [Draw(Filter())]}, {"draws": [Draw(Filter(temperature=0))]}, {"top": 3}, {"gather": [4, 5]}],
    ids=["draw", "greedy", "top", "gather"],
)
def test_nan_logits_end_only_the_request_at_fault(options: dict[str, Any]) -> None:
    model = tiny_model("llama")
    poison = 77
    model.get_input_embeddings().weight.data[poison] = torch.nan
    engine, _ = build_engine(model, kv_tokens=300, verify=False)
    stem = random_tokens(40, 1)
    stem = [t if t != poison else 3 for t in stem]
    (clean,) = logits_after(engine, [[*stem, 4]])
    engine.tree.clear()

    def sick(ledger: Ledger) -> Search:
        yield [Want(engine.open(ledger, [*stem, poison, 4, 5]), **options)]

    def healthy(ledger: Ledger) -> Search:
        branch = engine.open(ledger, [*stem, 4])
        got = yield [Want(branch, logits=True)]
        return got[0].logits

    tasks = [task(engine, search) for search in (healthy, sick, healthy)]
    list(engine.run(tasks))
    assert isinstance(tasks[1].error, FloatingPointError)
    assert np.array_equal(tasks[0].result, clean)
    assert np.array_equal(tasks[2].result, clean)


# ---- steps that fail --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("nth", [1, 2, 4])
def test_a_forward_that_fails_frees_everything(
    engine: Engine, error: BaseException, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is the second piece of a step: what had run before it is forgotten with the rest."""
    prompts = [random_tokens(20, i) for i in range(3)]
    expected = [run_alone(engine, writes(engine, prompt, 4)) for prompt in prompts]
    engine.tree.clear()
    engine.max_rows = 40
    calls = 0
    forward = engine.runner.forward

    def failing(batch: Any, wanted: Sequence[int]) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise error
        return forward(batch, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "forward", failing)
        tasks = [task(engine, writes(engine, prompt, 4)) for prompt in prompts]
        with pytest.raises(type(error)):
            list(engine.run(tasks))
    assert all(isinstance(t.error, RainDecodeError) for t in tasks)
    assert engine.tree.num_cursors == 0
    assert [run_alone(engine, writes(engine, prompt, 4)) for prompt in prompts] == expected


def test_a_step_that_fails_before_its_forward_leaves_no_unwritten_tokens(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_tokens(10, 1)
    (expected,) = logits_after(engine, [path])
    engine.tree.clear()

    def failing(*_: Any) -> Any:
        raise MemoryError("no room for a batch")

    with monkeypatch.context() as patch:
        patch.setattr(forward_module, "build_batches", failing)
        with pytest.raises(MemoryError):
            logits_after(engine, [path])
    found = engine.tree.match(path)
    assert found.length == 0
    engine.tree.release(found)
    assert np.array_equal(logits_after(engine, [[5], path])[1], expected)


def test_a_model_outlives_its_decoder_without_keeping_it() -> None:
    model = tiny_model("llama")
    decoder = Decoder(model, tiny_decoder().codec.tokenizer, kv_tokens=100)
    runner = weakref.ref(decoder.engine.runner)
    assert decoder.generate([5, 6], max_new_tokens=2)
    del decoder
    gc.collect()
    assert runner() is None


def test_a_draw_that_cannot_be_made_ends_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_decoder()
    (expected,) = decoder.generate("on a", max_new_tokens=5, seed=1)
    plain = sampler.draw_all

    def picky(requests: Sequence[sampler.DrawRequest]) -> Any:
        if any(r.shape.top_k == 7 for r in requests):
            raise ValueError("seven")
        return plain(requests)

    monkeypatch.setattr(sampler, "draw_all", picky)
    tasks = [
        (Sampling(), {"seed": 1}),
        (Sampling(top_k=7), {"seed": 2}),
    ]
    outcomes = []
    for search, options in tasks:
        outcomes += decoder.generate("on a", search=search, max_new_tokens=5, errors="return", **options)
    assert outcomes[0].token_ids == expected.token_ids
    assert isinstance(outcomes[1], ValueError)
    (large,) = decoder.generate("on a", search=Sampling(top_k=2**63), max_new_tokens=5, seed=1)
    assert large.token_ids == expected.token_ids
