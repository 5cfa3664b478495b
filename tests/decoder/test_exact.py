"""Exact mode: a row keeps its bits whatever else is in the forward, however it came there, on any number of threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from models import EXACT, logits_after, random_tokens, stock_copy, stock_row, tiny_decoder, tiny_model

from raindecode.engine import loader
from raindecode.engine.engine import Engine
from raindecode.engine.exact import PADDED_ROWS, use_rowwise_activations
from raindecode.engine.kv_tree import KVTree
from raindecode.engine.loader import build_engine
from raindecode.errors import ConfigError
from raindecode.search.sampling import Sampling

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="exact mode rests on MKL's strict mode")

ROWS = 300
# Every residue modulo 32, then powers of two with their neighbours, and the ends.
COUNTS = [*range(1, 34), 47, 63, 64, 65, 96, 127, 128, 129, 200, 255, 256, 257, 299, 300]
assert {count % 32 for count in COUNTS} == set(range(32))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(engine: Engine, paths: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
    """[len(paths), vocabulary], from a forward with nothing cached."""
    engine.tree.clear()
    return np.stack(logits_after(engine, paths))


def leaves() -> list[list[int]]:
    """Paths that end in as many different tokens below one stem, so that n of them are n rows of decoding."""
    stem = random_tokens(9, 1)
    ends = itertools.product(range(3, 153), range(3, 5))
    return [[*stem, a, b] for b, a in sorted((b, a) for a, b in ends)][:ROWS]


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.usefixtures("threads")
def test_rows_do_not_depend_on_their_number(family: str) -> None:
    engine, mode = build_engine(tiny_model(family), kv_tokens=1000)
    assert mode == "rows"
    paths = leaves()
    torch.set_num_threads(1)
    whole = rows_of(engine, paths)
    for count in (1, 2):
        torch.set_num_threads(count)
        for rows in COUNTS:
            first = (rows * 7) % (ROWS - rows + 1)
            part = paths[first : first + rows]
            logits_after(engine, [path[:-1] for path in part])  # what is left for the next forward: `rows` rows
            steps = engine.model_steps
            got = np.stack(logits_after(engine, part))
            assert engine.model_steps == steps + 1
            assert np.array_equal(got, whole[first : first + rows]), f"{rows} rows on {count} threads"
            engine.tree.clear()


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.usefixtures("threads")
def test_a_prompt_in_pieces_is_the_prompt_at_once(family: str) -> None:
    """300 tokens prefilled in one forward, in pieces, and one by one; the last row's bits are the same."""
    engine, _ = build_engine(tiny_model(family), kv_tokens=1000)
    prompt = random_tokens(ROWS, 2)
    torch.set_num_threads(2)
    (whole,) = rows_of(engine, [prompt])
    for pieces in ([1] * 40, [3, 32, 1, 64, 100], [257]):
        engine.tree.clear()
        for end in itertools.accumulate(pieces):
            logits_after(engine, [prompt[:end]])
        (got,) = logits_after(engine, [prompt])
        assert np.array_equal(got, whole)


def test_a_row_does_not_depend_on_who_else_runs_in_its_forward() -> None:
    """The same path beside long and short prompts, other branches of it, and in a forward that is cut in two."""
    engine, _ = build_engine(tiny_model("llama"), kv_tokens=2000)
    path = random_tokens(120, 3)
    (alone,) = rows_of(engine, [path])
    others = [random_tokens(n, 50 + n) for n in (1, 13, 200, 301)]
    branches = [path[:n] + random_tokens(5, n) for n in (1, 60, 119)]
    assert np.array_equal(rows_of(engine, [*others, path, *branches])[len(others)], alone)
    engine.max_rows = 50
    assert np.array_equal(rows_of(engine, [*others, path, *branches])[len(others)], alone)


# ---- padded mode ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padded_mode_is_exact_and_right(family: str) -> None:
    model = tiny_model(family)
    stock = stock_copy(model)
    engine, _ = build_engine(model, kv_tokens=1000)
    padded = Engine(engine.runner, KVTree(1001), pad_rows=PADDED_ROWS)
    paths = leaves()
    whole = rows_of(padded, paths)
    for rows in (1, 2, 31, 63, 64, 65, 129):
        assert np.array_equal(rows_of(padded, paths[:rows]), whole[:rows])
    for at in (0, 77, ROWS - 1):
        assert np.abs(whole[at] - stock_row(stock, paths[at])).max() <= 1e-4


def test_padded_forwards_all_have_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = build_engine(tiny_model("llama"), kv_tokens=1000)
    padded = Engine(engine.runner, KVTree(1001), pad_rows=PADDED_ROWS)
    sizes = []
    forward = padded.runner.forward
    monkeypatch.setattr(
        padded.runner, "forward", lambda batch, wanted: (sizes.append(batch.num_rows), forward(batch, wanted))[1]
    )
    rows_of(padded, [random_tokens(150, 1), random_tokens(3, 2)])
    assert sizes == [PADDED_ROWS] * 3


@pytest.mark.parametrize(
    ("holds", "mode", "pad_rows"), [((True,), "rows", 0), ((False, True), "padded", 64), ((False, False), "off", 0)]
)
def test_the_probe_decides_the_mode(
    holds: tuple[bool, ...], mode: str, pad_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(holds)
    monkeypatch.setattr(loader, "rows_are_invariant", lambda engine: next(answers))
    engine, got = build_engine(tiny_model("llama"), kv_tokens=100)
    assert got == mode
    assert engine.pad_rows == pad_rows


def test_a_decoder_in_padded_mode_gives_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_decoder()
    answers = iter((False, True))
    monkeypatch.setattr(loader, "rows_are_invariant", lambda engine: next(answers))
    padded = tiny_decoder()
    assert (plain.exact, padded.exact) == ("rows", "padded")
    prompts = ["the", "inner on", "a"]
    sampling = Sampling.greedy(ignore_eos=True)
    ours = [d.generate(prompts, search=sampling, max_new_tokens=12) for d in (plain, padded)]
    assert [c.token_ids for c in ours[0]] == [c.token_ids for c in ours[1]]


# ---- settings ---------------------------------------------------------------------------------------------------------
def test_exact_mode_can_be_left_off() -> None:
    model = tiny_model("llama")
    silu = type(model.model.layers[0].mlp.act_fn)
    _, mode = build_engine(model, kv_tokens=100, exact=False)
    assert mode == "off"
    assert type(model.model.layers[0].mlp.act_fn) is silu


def test_exact_mode_is_not_promised_where_it_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="float32 on a CPU"):
        build_engine(tiny_model("llama").to(torch.bfloat16), kv_tokens=100, exact=True)
    monkeypatch.setattr(loader, "rows_are_invariant", lambda engine: False)
    with pytest.raises(ConfigError, match="exact mode was asked for"):
        build_engine(tiny_model("llama"), kv_tokens=100, exact=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_rowwise_activations_are_the_same_functions(family: str) -> None:
    model = tiny_model(family)
    path = random_tokens(20, 1)
    before = stock_row(model, path)
    assert use_rowwise_activations(model) == 2  # one per layer
    assert use_rowwise_activations(model) == 0
    assert np.abs(stock_row(model, path) - before).max() < 1e-4
