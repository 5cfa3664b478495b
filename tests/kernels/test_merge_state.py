"""merge_state: every lane against float64, empty sides, agreement with tree_attention, bad input, registration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rainkernels.errors import DtypeError, ShapeError, StrideError
from rainkernels.ops.attention import MergedState, merge_state, tree_attention
from rainkernels.reference import attention as reference
from rainkernels.testing.cases_attention import AttentionCase, AttentionInputs, chain


@pytest.fixture(params=["cpu", "reference"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


def attend(i: AttentionInputs) -> MergedState:
    return tree_attention(i.q, i.k_pool, i.v_pool, i.plan(), return_lse=True, **i.options)


def assert_close_enough(actual: Tensor, plain: Tensor, exact: Tensor, atol: float) -> None:
    """Error against float64 at most twice plain PyTorch's, plus atol (relative above 1)."""
    error = (actual.double() - exact).abs().max()
    assert error <= 2 * (plain.double() - exact).abs().max() + atol * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 4, 33), (300, 8, 64)])
def test_merge_state_matches_definition(dtype: torch.dtype, shape: tuple[int, int, int], lane: str) -> None:
    g = torch.Generator().manual_seed(3)
    v_a, v_b = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    lse_a, lse_b = (30 * torch.randn(shape[:2], generator=g) for _ in range(2))
    merged = merge_state(v_a, lse_a, v_b, lse_b)
    exact = reference.merge_state(v_a.double(), lse_a.double(), v_b.double(), lse_b.double())
    plain = reference.merge_state(v_a, lse_a, v_b, lse_b)
    assert_close_enough(merged.v, plain[0], exact[0], 1e-6)
    assert_close_enough(merged.lse, plain[1], exact[1], 5e-7)


def test_merge_state_with_empty_sides(lane: str) -> None:
    inf = float("inf")
    v_a, v_b = torch.full((4, 1, 3), 2.0), torch.full((4, 1, 3), float("nan"))
    lse_a, lse_b = torch.tensor([[1.0], [-inf], [-inf], [0.0]]), torch.tensor([[-inf], [-inf], [-inf], [-inf]])
    v, lse = merge_state(v_a, lse_a, v_b, lse_b)
    assert torch.equal(v, torch.tensor([2.0, 0.0, 0.0, 2.0])[:, None, None].expand(4, 1, 3))
    assert torch.equal(lse, lse_a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_hides_a_nan(dtype: torch.dtype, lane: str) -> None:
    """Every pair of odd log-sum-exps, over finite values and NaN ones: NaN where the definition has NaN, nowhere else."""
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, 3.0, -1.0, -150.0])
    lse_a, lse_b = odd.repeat_interleave(7)[:, None].contiguous(), odd.repeat(7)[:, None].contiguous()
    for v_a, v_b in ((1.0, 2.0), (float("nan"), 2.0), (1.0, float("nan")), (float("inf"), 2.0)):
        pair = torch.full((49, 1, 3), v_a, dtype=dtype), torch.full((49, 1, 3), v_b, dtype=dtype)
        merged = merge_state(pair[0], lse_a, pair[1], lse_b)
        wanted = reference.merge_state(pair[0], lse_a, pair[1], lse_b)
        torch.testing.assert_close(merged.v, wanted[0], equal_nan=True)
        torch.testing.assert_close(merged.lse, wanted[1], equal_nan=True)
    broken = torch.isnan(lse_a) | torch.isnan(lse_b) | (lse_a == torch.inf) | (lse_b == torch.inf)
    finite = torch.ones(49, 1, 3, dtype=dtype)
    assert torch.equal(torch.isnan(merge_state(finite, lse_a, finite, lse_b).v).all(-1), broken)


def test_merge_state_of_halves_is_the_whole(lane: str) -> None:
    whole = AttentionCase("whole", chain(100, 1), 4, 2, 32, scattered=False).make(torch.float32)
    halves: list[Tensor] = []
    for part in (slice(0, 37), slice(37, 100)):
        slots = whole.plan_inputs["slots"][part].contiguous()
        halves += attend(replace(whole, plan_inputs=chain(len(slots), 1).plan_inputs(slots)))
    into = torch.empty_like(halves[0]), torch.empty_like(halves[1])
    merged = merge_state(*halves, out=into)
    assert merged.v is into[0]
    wanted = attend(whole)
    torch.testing.assert_close(merged.v, wanted.v)
    torch.testing.assert_close(merged.lse, wanted.lse)


@pytest.mark.parametrize(
    ("name", "at", "value", "error"),
    [
        ("v_a", 0, torch.zeros(2, 3), ShapeError),
        ("v_a", 0, torch.zeros(2, 3, 4).double(), DtypeError),
        ("lse_a", 1, torch.zeros(2, 3).half(), DtypeError),
        ("v_b", 2, torch.zeros(2, 3, 5), ShapeError),
        ("v_b", 2, torch.zeros(2, 4, 3).transpose(1, 2), StrideError),
        ("lse_b", 3, torch.zeros(3, 3), ShapeError),
    ],
)
def test_bad_merge_is_refused(name: str, at: int, value: Tensor, error: type[Exception], lane: str) -> None:
    arguments = [torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(2, 3)]
    arguments[at] = value
    with pytest.raises(error, match=name):
        merge_state(*arguments)


def test_registered_op() -> None:
    pair = (torch.randn(3, 2, 8), torch.randn(3, 2))
    torch.library.opcheck(torch.ops.rainkernels.merge_state.default, (*pair, *pair))
