"""Many requests in one call: the batch stays full, nothing grows, and one that is cancelled harms no other."""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from models import task, tiny_decoder

from raindecode.decoder import Decoder
from raindecode.engine.branch import Ledger
from raindecode.engine.types import HostCall, Search, Want
from raindecode.errors import ConfigError, RequestCancelled
from raindecode.search import embedder
from raindecode.search.rain import RAIN, JudgeTemplate
from raindecode.search.sampling import Sampling
from raindecode.types import Completion

PROMPTS = [f"the inner {i} on a" for i in range(32)]


def scores(pairs: Sequence[tuple[str, str]]) -> list[float]:
    return [0.2 * (len(reply) % 9) - 0.9 for _, reply in pairs]


JUDGE = JudgeTemplate("", "{prompt}:", " good (A) or (B)? (", " bad (A) or (B)? (", letters=("A", "B"))
SEARCHES = {
    "sampling": Sampling(),  # answers end by themselves, some after a token
    "rain, a function judges": RAIN(evaluator=scores, max_iterations=4, min_new_iterations=2),
    "rain judges itself": RAIN(evaluator=JUDGE, max_iterations=4, min_new_iterations=2),
}


@pytest.fixture(params=SEARCHES)
def search(request: pytest.FixtureRequest) -> Sampling | RAIN:
    return SEARCHES[request.param]


def asked(search: Sampling | RAIN, count: int = len(PROMPTS)) -> dict[str, Any]:
    return {"search": search, "max_new_tokens": 12 if isinstance(search, Sampling) else 4, "seed": range(count)}


# ---- the batch --------------------------------------------------------------------------------------------------------
def test_the_batch_stays_full(search: Sampling | RAIN, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_decoder(max_concurrent=7)
    engine, ended = decoder.engine, [0]
    under_way: list[tuple[int, int]] = []  # requests in a forward, and how many there should be
    finish, forward = engine._finish, engine.runner.forward

    def finishing(*args: Any, **outcome: Any) -> None:
        ended[0] += 1
        finish(*args, **outcome)

    def counting(*args: Any) -> Any:
        under_way.append((engine.num_running, min(7, len(PROMPTS) - ended[0])))
        return forward(*args)

    monkeypatch.setattr(engine, "_finish", finishing)
    monkeypatch.setattr(engine.runner, "forward", counting)
    decoder.generate(PROMPTS, **asked(search))
    assert ended[0] == len(PROMPTS)
    assert len(under_way) > 10
    assert all(there == expected for there, expected in under_way)


def test_a_request_that_ends_in_a_host_call_leaves_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_decoder(max_concurrent=5).engine
    sizes: list[int] = []
    forward = engine.runner.forward
    steps = iter([1, 2, 2, 2, 2] + [2] * 12)

    def counting(*args: Any) -> Any:
        sizes.append(engine.num_running)
        return forward(*args)

    def search(ledger: Ledger) -> Search:
        branch = engine.open(ledger, [7, 8, 9])
        for _ in range(next(steps)):
            branch.append([7])
            yield [Want(branch, top=1)]
        return (yield HostCall(lambda items: items, ["verdict"]))

    monkeypatch.setattr(engine.runner, "forward", counting)
    ended = list(engine.run(task(engine, search) for _ in range(17)))
    assert [one.result for one in ended] == [["verdict"]] * 17
    assert sizes == [5, 5, 5, 5, 5, 5, 2, 1]  # 33 rows, no two of a request at once


# ---- memory -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive() -> Counter[str]:
    """Objects of this package, by type, but for what caches K/V."""
    kinds = (type(thing) for thing in gc.get_objects())
    names = Counter(kind.__name__ for kind in kinds if str(kind.__module__).startswith("raindecode"))
    del names["Node"]
    return names


def test_nothing_of_a_finished_request_stays(search: Sampling | RAIN, no_collector: None) -> None:
    """Not even for the garbage collector to find: on a large model that would be megabytes per request."""
    slots = 300 if isinstance(search, Sampling) else 700
    decoder = tiny_decoder(kv_tokens=slots, max_concurrent=7)
    tree = decoder.engine.tree
    requests = decoder.requests(PROMPTS, **asked(search))
    deque(decoder.stream(requests[:1], search=search), maxlen=0)  # what is read of a template stays, once
    before = alive()
    deque(decoder.stream(requests, search=search), maxlen=0)
    assert alive() == before
    assert tree.num_cursors == 0
    assert not embedder._centers
    assert tree.num_evicted > 0
    assert sum(len(node.tokens) for node in tree.nodes()) == tree.num_used <= slots
    kept = decoder.engine.kept
    assert len(kept) <= slots // 4
    assert kept.num_bytes == sum(row.nbytes for row in kept._rows.values())


# ---- cancelling -------------------------------------------------------------------------------------------------------
def outcomes(answers: Sequence[Any]) -> list[Any]:
    """What does not depend on the machine and on what was cached."""
    return [
        (one.token_ids, one.text, one.value, one.stats.tokens_processed, one.stats.iterations, one.stats.evaluations)
        if isinstance(one, Completion)
        else type(one)
        for one in answers
    ]


@pytest.mark.parametrize("kv_tokens", [4000, 300], ids=["room", "a small pool"])
def test_a_request_cancelled_in_mid_search_harms_no_other(search: Sampling | RAIN, kv_tokens: int) -> None:
    prompts = PROMPTS[:12]
    expected = outcomes(tiny_decoder().generate(prompts, **asked(search, 12)))
    decoder = tiny_decoder(kv_tokens=kv_tokens, max_concurrent=5)
    reports: Counter[int] = Counter()
    long = [i for i, (_, _, _, _, iterations, _) in enumerate(expected) if iterations > 3 or len(expected[i][0]) > 3]
    cancelled = (long[0], long[len(long) // 2], long[-1])

    def on_progress(index: int, tokens: int, iterations: int) -> None:
        reports[index] += 1
        if index in cancelled and max(tokens, iterations) >= 3:
            raise RequestCancelled("not wanted any more")

    got = decoder.generate(prompts, **asked(search, 12), on_progress=on_progress, errors="return")
    assert outcomes(got) == [RequestCancelled if i in cancelled else one for i, one in enumerate(expected)]
    assert all(str(got[i]) == "not wanted any more" for i in cancelled)
    assert set(reports) == set(range(12))
    assert decoder.engine.tree.num_cursors == 0
    decoder.engine.tree.clear()
    assert decoder.engine.tree.num_free == kv_tokens
    assert outcomes(decoder.generate(prompts, **asked(search, 12))) == expected


def test_closing_the_iterator_cancels_what_is_left(search: Sampling | RAIN) -> None:
    decoder = tiny_decoder(max_concurrent=5)
    expected = outcomes(decoder.generate(PROMPTS[:12], **asked(search, 12)))
    stream: Any = decoder.stream(decoder.requests(PROMPTS[:12], **asked(search, 12)), search=search)
    index, first = next(stream)
    assert outcomes([first]) == [expected[index]]
    assert decoder.engine.num_running + len(decoder.engine._waiting) > 0
    stream.close()
    assert decoder.engine.num_running == 0
    assert decoder.engine.tree.num_cursors == 0
    assert outcomes(decoder.generate(PROMPTS[:12], **asked(search, 12))) == expected


def test_a_callback_that_fails_ends_its_request_only() -> None:
    decoder = tiny_decoder()
    search = Sampling(ignore_eos=True)

    def on_text(index: int, _: str) -> None:
        if index == 1:
            raise KeyError("a bug of the caller's")

    got = decoder.generate(PROMPTS[:3], **asked(search, 3), on_text=on_text, errors="return")
    assert [type(one) for one in got] == [Completion, KeyError, Completion]


def test_progress_is_reported_to_a_function(search: Sampling | RAIN) -> None:
    decoder = tiny_decoder()
    seen: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    got = decoder.generate(
        PROMPTS[:2], **asked(search, 2), on_progress=lambda index, tokens, done: seen[index].append((tokens, done))
    )
    for index, answer in enumerate(got):
        steps = [max(pair) if isinstance(search, Sampling) else pair[1] for pair in seen[index]]
        assert steps == list(range(1, len(steps) + 1))
        assert steps[-1] == (len(answer.token_ids) if isinstance(search, Sampling) else answer.stats.iterations)
        assert [tokens for tokens, _ in seen[index]] == sorted(tokens for tokens, _ in seen[index])


def test_what_is_no_function_is_refused() -> None:
    decoder: Decoder = tiny_decoder()
    odd: Any = "yes"
    with pytest.raises(ConfigError, match="on_progress is a str; give a function of"):
        decoder.generate("the", on_progress=odd)
