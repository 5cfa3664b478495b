"""rank: every lane against the definition, ties, invalid rows, bad input, registration."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rainkernels import DtypeError, RangeError, ShapeError, StrideError, has_native
from rainkernels.ops.logits import Rank, _as_int32, rank, rank_workspace
from rainkernels.reference import logits as reference

pytestmark = pytest.mark.skipif(not has_native(), reason="rainkernels._C is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=["cpu", "reference"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pair(rows: int, vocab: int, dtype: torch.dtype = torch.float32, grid: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(vocab)
    base = torch.randn(rows, vocab + 5, generator=g) * 3
    aligned = base + torch.randn(rows, vocab + 5, generator=g)
    if grid:
        base, aligned = (base / grid).round() * grid, (aligned / grid).round() * grid
    aligned_token = aligned[:, :vocab].argmax(dim=1)
    token = torch.where(torch.arange(rows) % 2 == 0, aligned_token, torch.randint(0, vocab, (rows,), generator=g))
    return base.to(dtype)[:, :vocab], aligned.to(dtype)[:, :vocab], token


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 1000, 1024, 1025, 5003, 32000])
def test_matches_definition(vocab: int, dtype: torch.dtype, lane: str) -> None:
    base, aligned, token = pair(6, vocab, dtype, grid=0.5 if vocab == 5003 else 0.0)
    found = rank(base, aligned, token)
    exact = reference.rank(base.double(), aligned.double(), token)
    # By sorting, without the reference: the position in a stable descending order.
    place = base.double().sort(dim=1, descending=True, stable=True).indices == token[:, None]
    assert torch.equal(found.rank.long(), place.int().argmax(dim=1) + 1)
    for a, e in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-6, atol=2e-6)
    assert all(torch.equal(x, y) for x, y in zip(found, rank(base, aligned, token.int()), strict=True))


def test_ids_that_int32_cannot_hold_stay_invalid() -> None:
    """What the Triton lane is given on cuda, where nobody looks at the ids: 5 - 2**32 must not become 5."""
    token = torch.tensor([0, 9, 10, -1, 5 + 2**32, 5 - 2**32, 2**31 + 5, torch.iinfo(torch.int64).min])
    assert _as_int32(token, 10).tolist() == [0, 9, *[-1] * 6]
    assert _as_int32(token[:4].int(), 10).tolist() == [0, 9, 10, -1]


def test_ties_count_by_lower_id(lane: str) -> None:
    base = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]]).repeat(5, 1)
    assert rank(base, base, torch.arange(5)).rank.tolist() == [4, 1, 2, 5, 3]
    flat = torch.zeros(1, 3000).expand(3, -1)
    assert rank(flat, flat, torch.tensor([0, 1500, 2999])).rank.tolist() == [1, 1501, 3000]


def test_divergence_of_equals_is_zero_and_never_negative(lane: str) -> None:
    base, aligned, token = pair(8, 3000)
    assert float(rank(base, base, token).kl.abs().max()) == 0
    for closeness in (1e-4, 1e-2, 1.0):
        near = base + (aligned - base) * closeness + 1e4
        assert float(rank(base, near.contiguous(), token).kl.min()) >= -1e-6


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("which", [0, 1])
def test_a_bad_value_costs_its_row_only(value: float, which: int, lane: str) -> None:
    made = pair(4, 2100)
    before = rank(*made)
    made[which][2, 2099] = value
    after = rank(*made)
    others = [0, 1, 3]
    assert all(torch.equal(x[others], y[others]) for x, y in zip(before, after, strict=True))
    assert int(after.rank[2]) == 0
    assert all(bool(t[2].isnan()) for t in after[1:])


def test_banned_tokens(lane: str) -> None:
    base, aligned, token = pair(3, 50)
    base[0, 7], token[0] = -INF, 7
    aligned[1, 9], token[1] = -INF, 9
    base[2] = -INF
    found = rank(base, aligned, token)
    assert int(found.rank[0]) == 50
    assert float(found.logprob_base[0]) == -INF
    assert float(found.kl[0]) == INF
    assert float(found.logprob_aligned[1]) == -INF
    assert bool(torch.isfinite(found.kl[1]))
    assert int(found.rank[2]) == 0


def test_vocab_size_ends_everything(lane: str) -> None:
    base, aligned, token = pair(4, 1500)
    wide = [torch.cat([t, torch.full((4, 30), 99.0)], dim=1) for t in (base, aligned)]
    found = rank(wide[0], wide[1][:, :1510], token, vocab_size=1500)
    wanted = rank(base.contiguous(), aligned.contiguous(), token)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_bits_do_not_depend_on_batch_or_threads() -> None:
    base, aligned, token = pair(7, 20000)
    torch.set_num_threads(1)
    whole = rank(base, aligned, token)
    torch.set_num_threads(3)
    for a, b in zip(whole, rank(base, aligned, token), strict=True):
        assert torch.equal(a, b)
    for r in range(7):
        one = rank(base[r : r + 1], aligned[r : r + 1], token[r : r + 1])
        assert all(torch.equal(a[r : r + 1], b) for a, b in zip(whole, one, strict=True))


def test_writes_into_what_is_given(lane: str) -> None:
    base, aligned, token = pair(4, 300)
    out = Rank(torch.empty(4, dtype=torch.int32), *(torch.empty(4) for _ in range(3)))
    back = rank(base, aligned, token, out=out, workspace=torch.empty(rank_workspace(4, 300, "cpu")))
    assert all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(out, back, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(out, rank(base, aligned, token), strict=True))
    assert rank(base[:0], aligned[:0], token[:0]).rank.shape == (0,)


def test_bad_input(lane: str) -> None:
    base, aligned, token = pair(4, 300)
    for bad in (-1, 300, 1 << 40):
        wrong = token.clone()
        wrong[2] = bad
        with pytest.raises(RangeError, match=rf"token\[2\] is {bad}, allowed are 0..299"):
            rank(base, aligned, wrong)
    with pytest.raises(DtypeError, match="aligned"):
        rank(base, aligned.half(), token)
    with pytest.raises(DtypeError, match="token"):
        rank(base, aligned, token.float())
    with pytest.raises(DtypeError, match="base"):
        rank(base.double(), aligned, token)
    with pytest.raises(DtypeError, match="out must be a Rank"):
        rank(base, aligned, token, out=(token, token, token, token))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="aligned"):
        rank(base, aligned[:3], token)
    with pytest.raises(ShapeError, match="token"):
        rank(base, aligned, token[:3])
    with pytest.raises(StrideError, match="base"):
        rank(base.t().contiguous().t(), aligned, token)
    for size in (0, 301, -1):
        with pytest.raises(RangeError, match="vocab_size"):
            rank(base, aligned, token, vocab_size=size)


def test_registered_op() -> None:
    base, aligned, token = pair(4, 300)
    op = torch.ops.rainkernels.logits_rank
    torch.library.opcheck(op.default, (base, aligned, token))
    torch.library.opcheck(op.default, (base.bfloat16(), aligned.bfloat16(), token.int(), 200 + 1))
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(op(base, aligned, token), rank(base, aligned, token), strict=True))
