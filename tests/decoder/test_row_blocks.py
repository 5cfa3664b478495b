"""Rows of logits behind many tokens of a branch: the same as one by one, wherever they were cached or cut."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from aligned_models import aligned_model, pair, reference_model
from models import random_tokens, run_alone, stock_copy, tiny_decoder, tiny_model

from raindecode.engine.branch import Branch, Ledger
from raindecode.engine.engine import Engine
from raindecode.engine.logit_rows import LogitRow
from raindecode.engine.mixing import mixed_block, mixed_row
from raindecode.engine.sampler import Filter
from raindecode.engine.types import Draw, Got, Want
from raindecode.errors import ConfigError
from raindecode.mixture import SINGLE, Mix

PATH = random_tokens(13, 0)


def ask(engine: Engine, asked: Sequence[tuple[Sequence[int], int]], mixed: Mix = SINGLE, **more: Any) -> list[Got]:
    """One step that wants rows of every path from a position on."""

    def search(ledger: Ledger) -> Generator[Any, Any, list[Got]]:
        branches: list[Branch] = [engine.open(ledger, path, mixed) for path, _ in asked]
        got: list[Got] = yield [
            Want(branch, rows_from=first, **more) for branch, (_, first) in zip(branches, asked, strict=True)
        ]
        return got

    found: list[Got] = run_alone(engine, search)
    return found


def block(got: Got, model: int = 0) -> torch.Tensor:
    rows = got.rows[model]
    assert rows is not None
    return rows.clone()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("max_rows", [3, 1024])
def test_rows_are_those_of_a_plain_forward(family: str, max_rows: int) -> None:
    """Fresh, cached in part, cached whole, below a fork, and of paths that share a beginning."""
    decoder = tiny_decoder(family, vocabulary=160)
    decoder.engine.max_rows = max_rows
    twin = stock_copy(tiny_model(family))
    other = PATH[:6] + random_tokens(5, 1)
    for asked in ([(PATH[:7], 2)], [(PATH, 0)], [(PATH, 4), (other, 5), (PATH[:9], 8)], [(other, 0), (other, 3)]):
        for (path, first), got in zip(asked, ask(decoder.engine, asked), strict=True):
            with torch.inference_mode():
                expected = twin(torch.tensor([path]), use_cache=False).logits[0, first:]
            torch.testing.assert_close(block(got), expected, rtol=1e-4, atol=1e-4)


def test_rows_that_lie_together_are_not_copied() -> None:
    decoder = tiny_decoder("llama", vocabulary=160)
    first, second = (got.rows[0] for got in ask(decoder.engine, [(PATH, 3), (random_tokens(9, 2), 0)]))
    assert first is not None
    assert second is not None
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_other_wants_of_the_step_are_answered_as_ever() -> None:
    """A row that is wanted alone and as one of a block runs once, and both are right."""
    engine = tiny_decoder("llama", vocabulary=160).engine
    (got,) = ask(engine, [(PATH, 4)], logits=True, draws=[Draw(Filter(temperature=0.0))])
    assert got.logits is not None
    rows = block(got)
    assert rows.shape[0] == len(PATH) - 4
    np.testing.assert_array_equal(rows[-1].numpy(), got.logits)
    assert got.drawn[0].token == int(got.logits.argmax())


def test_tokens_are_counted_once_and_charged_when_they_run_again() -> None:
    engine = tiny_decoder("llama", vocabulary=160).engine
    counted = []

    def search(ledger: Ledger) -> Generator[Any, Any, None]:
        for _ in range(2):
            branch = engine.open(ledger, PATH)
            yield [Want(branch, rows_from=5)]
            counted.append((ledger.tokens_processed, ledger.tokens_charged))

    run_alone(engine, search)
    run_alone(engine, search)
    assert counted == [(13, 13), (13, 21), (13, 8), (13, 16)]


def test_every_model_of_a_mixture_gives_its_rows() -> None:
    reference = reference_model()
    decoder = pair(reference, aligned_model(reference), aligned_model(reference, seed=2))
    twins = [stock_copy(m) for m in (reference, aligned_model(reference), aligned_model(reference, seed=2))]
    (got,) = ask(decoder.engine, [(PATH, 2)], Mix((0.5, 0.0, 0.5)))
    assert got.rows[1] is None
    for model in (0, 2):
        with torch.inference_mode():
            expected = twins[model](torch.tensor([PATH]), use_cache=False).logits[0, 2:]
        torch.testing.assert_close(block(got, model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [-1, 13, 99])
def test_a_position_outside_the_branch_is_refused(first: int) -> None:
    engine = tiny_decoder("llama", vocabulary=160).engine
    with pytest.raises(ValueError, match=f"rows from position {first} of a branch of 13 tokens"):
        ask(engine, [(PATH, first)])


# ---- mixtures of blocks ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "mix",
    [Mix((0.4, 0.6)), Mix((-0.5, 1.5)), Mix((0.0, 1.0)), Mix((1.0, 0.0)), Mix((0.2, 0.3, 0.5)), Mix((0.0, 2.0, -1.0))],
)
def test_a_mixed_block_is_its_rows_mixed(mix: Mix) -> None:
    made = torch.Generator().manual_seed(0)
    blocks: list[torch.Tensor | None] = [5 * torch.randn(7, width, generator=made) for width in (40, 44, 41)]
    blocks = blocks[: len(mix.weights)]
    for i, one in enumerate(blocks):
        assert one is not None
        one[i, 3 + i] = -torch.inf
    ours = mixed_block(blocks, mix, 38)
    assert ours.shape == (7, 38)
    for i in range(7):
        rows = [LogitRow.of(one[i].numpy()) for one in blocks if one is not None]
        expected = mixed_row(rows, mix, 38)[:38]
        np.testing.assert_allclose(ours[i].numpy(), expected, rtol=1e-6, atol=1e-5)


def test_a_mixed_block_takes_any_dtype_and_keeps_one_model_as_it_is() -> None:
    made = torch.Generator().manual_seed(0)
    blocks: list[torch.Tensor | None] = [torch.randn(3, 9, generator=made).bfloat16() for _ in range(2)]
    alone = mixed_block(blocks, Mix((0.0, 1.0)), 9)
    assert alone.dtype == torch.bfloat16
    assert blocks[1] is not None
    assert alone.data_ptr() == blocks[1].data_ptr()
    assert mixed_block(blocks, Mix((0.5, 0.5)), 9).dtype == torch.float32
    with pytest.raises(ConfigError, match="leave plausibility out"):
        mixed_block(blocks, Mix((0.5, 0.5), plausibility=0.1), 9)


def test_nan_in_one_model_stays_in_its_row() -> None:
    blocks: list[torch.Tensor | None] = [torch.randn(3, 9), torch.randn(3, 9)]
    assert blocks[1] is not None
    blocks[1][1, 4] = torch.nan
    mixed = mixed_block(blocks, Mix((0.5, 0.5)), 9)
    assert torch.isnan(mixed).sum(1).tolist() == [0, 1, 0]
