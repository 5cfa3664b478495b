"""edits: what the formulas promise (alignez notes, numerical details), and that the bounds would catch a wrong store."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rainkernels.ops.edits import BasisTable, EditTable, add_edit_rmsnorm, edit_
from rainkernels.ops.edits_tables import Norm, Op

HIDDEN = 256


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def directions_with_cosine(k: int, cosine: float, hidden: int = HIDDEN) -> Tensor:
    """k unit vectors, every pair at this cosine exactly (float64)."""
    gram = torch.full((k, k), cosine, dtype=torch.float64) + (1 - cosine) * torch.eye(k, dtype=torch.float64)
    frame = torch.linalg.qr(normal(hidden, k, seed=9).double()).Q
    return (frame @ torch.linalg.cholesky(gram).T).T


def edited(
    x: Tensor, directions: Tensor, op: Op | Sequence[Op], alpha: float | Sequence[float], *, target: float = 0.0,
    order: str = "sequential", norm: Norm = "none", dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    table = EditTable.create(2, max(1, directions.shape[0]), x.shape[1], dtype=dtype)
    table.set_slot(1, directions, op=op, alpha=alpha, target=target, order=order, norm=norm)  # type: ignore[arg-type]
    return edit_(x.clone(), table, torch.ones(x.shape[0], dtype=torch.int32))


def component(x: Tensor, u: Tensor) -> Tensor:
    return x.double() @ (u.double() / u.double().norm())


def loop(h: Tensor, directions: Tensor, op: str, alpha: float, target: float = 0.0) -> Tensor:
    """The published loop in float64, one direction after the other."""
    for u in directions.double():
        u = u / u.norm()
        c = h @ u
        b = {
            "project": -alpha * c, "boost": alpha * c, "set": alpha * (target - c),
            "add": torch.full_like(c, alpha), "tanh": alpha * torch.tanh(c),
        }[op]  # fmt: skip
        h = h + b[:, None] * u
    return h


OPS: tuple[Op, ...] = ("project", "boost", "set", "add", "tanh")


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    alpha=st.sampled_from([0.25, 1.0, 2.0, -1.0]), seed=st.integers(0, 50), strength=st.sampled_from([0.1, 1.0, 10.0])
)
def test_components_after_an_edit(alpha: float, seed: int, strength: float) -> None:
    x, u, target = strength * normal(8, HIDDEN, seed=seed), normal(1, HIDDEN, seed=seed + 1000), 2.5
    c = component(x, u[0])
    wanted = {
        "project": (1 - alpha) * c, "boost": (1 + alpha) * c, "set": c + alpha * (target - c), "add": c + alpha,
        "tanh": c + alpha * torch.tanh(c),
    }  # fmt: skip
    other = normal(HIDDEN, seed=seed + 2000).double()
    unit = u[0].double() / u[0].double().norm()
    other = other - (other @ unit) * unit
    for op in OPS:
        y = edited(x, u, op, alpha, target=target)
        bound = 1e-5 * strength * HIDDEN**0.5
        assert (component(y, u[0]) - wanted[op]).abs().max() < bound
        assert (component(y, other) - component(x, other)).abs().max() < bound
    assert (edited(x, u, "project", 1.0).double().norm(dim=1) <= x.double().norm(dim=1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.7, 0.95])
def test_gram_form_is_the_literal_loop(op: Op, cosine: float) -> None:
    x, u = normal(16, HIDDEN), directions_with_cosine(4, cosine)
    wanted = loop(x.double(), u, op, 0.8, 1.5)
    assert ((edited(x, u, op, 0.8, target=1.5).double() - wanted).norm(dim=1) <= 1e-5 * wanted.norm(dim=1)).all()


def test_duplicate_directions_are_edited_twice() -> None:
    x, u = normal(4, HIDDEN), normal(1, HIDDEN, seed=1)
    twice = edited(x, u.repeat(2, 1), "boost", 1.0)
    assert (component(twice, u[0]) - 4 * component(x, u[0])).abs().max() < 1e-4
    assert component(edited(x, u.repeat(2, 1), "project", 1.0), u[0]).abs().max() < 1e-5


@pytest.mark.parametrize("cosine", [0.3, 0.7, 0.95])
def test_share_left_in_the_span(cosine: float) -> None:
    """Of rows inside the span of four directions: an orthonormal basis removes all; the two other forms leave a share."""
    u = directions_with_cosine(4, cosine)
    q = torch.linalg.qr(u.T).Q
    x = (normal(4000, 4, seed=3).double() @ q.T).float()

    def left(y: Tensor) -> float:
        return float((y.double() @ q).norm() / (x.double() @ q).norm())

    basis = BasisTable.create(2, u)
    basis.set_slot(1, op="project", alpha=1.0)
    summed = left(edit_(x.clone(), basis, torch.ones(4000, dtype=torch.int32)))
    sequential = left(edited(x, u, "project", 1.0))
    # Rows of all directions in the span: the Frobenius norm of what is left of the identity there.
    assert summed == pytest.approx(float((torch.eye(4) - u @ u.T).norm() / 2), rel=0.05)
    assert (summed > 1) == (cosine >= 0.7), "removing overlapping directions at once can make a row larger"
    assert sequential == pytest.approx(float(loop(q.T, u, "project", 1.0).norm() / 2), rel=0.05)
    assert 0.2 < sequential < summed
    assert left(edited(x, u, "project", 1.0, order="orthonormal")) < 1e-6


def test_order_matters_unless_orthonormal() -> None:
    x, u, back = normal(8, HIDDEN), directions_with_cosine(3, 0.6), torch.tensor([2, 1, 0])
    assert (edited(x, u, "project", 1.0) - edited(x, u[back], "project", 1.0)).abs().max() > 1e-2
    same = (edited(x, v, "project", 1.0, order="orthonormal") for v in (u, u[back]))
    torch.testing.assert_close(next(same), next(same), atol=1e-5, rtol=0)


@pytest.mark.parametrize("op", OPS)
def test_one_shot_is_sequential_for_an_orthonormal_basis(op: Op) -> None:
    x, u = normal(8, HIDDEN), directions_with_cosine(12, 0.0)
    basis = BasisTable.create(2, u)
    basis.set_slot(1, op=op, alpha=0.7, target=1.0)
    shot = edit_(x.clone(), basis, torch.ones(8, dtype=torch.int32))
    torch.testing.assert_close(shot, edited(x, u, op, 0.7, target=1.0), atol=1e-5, rtol=0)


def test_basis_mask_is_a_choice_of_directions() -> None:
    x, u = normal(8, HIDDEN), directions_with_cosine(6, 0.0)
    basis = BasisTable.create(2, u)
    basis.set_slot(1, alpha=[0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    masked = edit_(x.clone(), basis, torch.ones(8, dtype=torch.int32))
    torch.testing.assert_close(masked, edited(x, u[[1, 4]], "tanh", 1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("op", ["project", "boost", "tanh"])
def test_even_in_the_direction_and_blind_to_its_length(op: Op) -> None:
    x, u = normal(8, HIDDEN), normal(2, HIDDEN, seed=1)
    wanted = edited(x, u, op, 0.9)
    for factor in (-1.0, 17.0, 1e-30, 1e30):
        torch.testing.assert_close(edited(x, u * factor, op, 0.9), wanted, atol=1e-5, rtol=0)


def test_equivariant_under_rotation() -> None:
    q = torch.linalg.qr(normal(HIDDEN, HIDDEN, seed=5).double()).Q
    x, u = normal(8, HIDDEN).double(), normal(3, HIDDEN, seed=1).double()
    turned = edited((x @ q).float(), u @ q, "tanh", 1.3)
    torch.testing.assert_close(turned, (edited(x.float(), u, "tanh", 1.3).double() @ q).float(), atol=3e-5, rtol=0)


def test_linear_edits_commute_with_a_sum_and_tanh_does_not() -> None:
    """What decides whether an edit may run before a tensor-parallel all-reduce."""
    a, b, u = normal(4, HIDDEN), normal(4, HIDDEN, seed=1), normal(2, HIDDEN, seed=2)

    def gap(op: Op) -> float:
        return float((edited(a + b, u, op, 1.0) - edited(a, u, op, 1.0) - edited(b, u, op, 1.0)).abs().max())

    assert max(gap("project"), gap("boost")) < 1e-5
    assert gap("tanh") > 1e-3


# Norm options


@pytest.mark.parametrize("op", ["project", "boost"])
def test_norm_options(op: Op) -> None:
    x, u = normal(16, HIDDEN), normal(2, HIDDEN, seed=1)
    free, before = edited(x, u, op, 1.0), x.norm(dim=1)
    kept, capped = edited(x, u, op, 1.0, norm="preserve"), edited(x, u, op, 1.0, norm="cap")
    torch.testing.assert_close(kept.norm(dim=1), before, rtol=1e-6, atol=0)
    assert torch.nn.functional.cosine_similarity(kept, free).min() > 1 - 1e-6
    assert torch.equal(capped, free if op == "project" else kept)


def test_cap_looks_at_each_row_alone() -> None:
    """One row that grew must not rescale its neighbours."""
    u = torch.eye(HIDDEN)[:1]
    x = torch.stack([5 * u[0], -5 * u[0] + torch.eye(HIDDEN)[1]])
    y = edited(x, u, "add", 1.0, norm="cap")
    torch.testing.assert_close(y[0], x[0])
    assert torch.equal(y[1], -4 * u[0] + torch.eye(HIDDEN)[1])


def test_preserve_does_not_stretch_noise() -> None:
    u = normal(1, HIDDEN, seed=1)
    y = edited(3 * u, u, "project", 1.0, norm="preserve")
    assert y.abs().max() < 1e-5


# Rounding


def truncating(y: Tensor) -> Tensor:
    """The mutant: float32 cut to bfloat16 instead of rounded."""
    return (y.contiguous().view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


def test_projection_is_idempotent_and_a_truncating_store_would_not_be() -> None:
    """Of the stored rows' length; rows whose component was small keep a part of it, so the middle row is looked at."""
    x, u = normal(64, 1024).bfloat16(), normal(1, 1024, seed=1)
    size = x.double().norm(dim=1)

    def drift(first: Tensor, second: Tensor) -> float:
        return float(((second.double() - first.double()).norm(dim=1) / size).median())

    once = edited(x, u, "project", 1.0)
    again = edited(once, u, "project", 1.0)
    assert drift(once, again) < 2e-5
    assert (again != once).float().mean() < 0.05
    cut = truncating(edited(x.float(), u, "project", 1.0))
    assert drift(cut, truncating(edited(cut.float(), u, "project", 1.0))) > 1e-3, "the bound would not see truncation"
    exact = edited(x.float(), u, "project", 1.0)
    assert drift(exact, edited(exact, u, "project", 1.0)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_store_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    """The sum is formed in float32 with the edit inside and rounded once: exactly what torch's own conversion gives."""
    x, residual, u = normal(32, HIDDEN).to(dtype), (8 * normal(32, HIDDEN, seed=1)).to(dtype), torch.eye(HIDDEN)[:1]
    table = EditTable.create(2, 1, HIDDEN)
    table.set_slot(1, u, op="add", alpha=0.0123)
    slots = torch.ones(32, dtype=torch.int32)
    got = add_edit_rmsnorm(x, residual.clone(), torch.ones(HIDDEN, dtype=dtype), table, slots, eps=1e-6)
    assert torch.equal(got.residual, (residual.float() + (x.float() + torch.tensor(0.0123) * u)).to(dtype))
    once = edit_(x.clone(), table, slots)
    assert torch.equal(once, (x.float() + torch.tensor(0.0123) * u).to(dtype))


@pytest.mark.parametrize(("scale", "realised"), [(1.0, 0.95), (10.0, 0.5), (100.0, 0.05)])
def test_bounded_steps_drown_in_a_large_bfloat16_row(scale: float, realised: float) -> None:
    """Why tanh edits belong on mlp_out: the share of the step that survives rounding falls with the size of the row."""
    x, u = (scale * normal(64, 1024)).bfloat16(), normal(1, 1024, seed=1)
    step = component(edited(x, u, "add", 1.0).double() - x.double(), u[0])
    share = float(step.mean())
    assert share > realised
    assert (share > 0.97) == (scale == 1.0)
    # Added in float32 to a small x first, the same step reaches a float32 sum whole.
    assert component(edited(x.float(), u, "add", 1.0).double() - x.double(), u[0]).mean() == pytest.approx(
        1.0, abs=1e-3
    )


def test_float16_rows_of_ten_thousand_do_not_overflow() -> None:
    x, u = torch.full((2, 512), 3000.0, dtype=torch.float16), torch.ones(1, 512)
    y = edited(x, u, "project", 0.5, norm="cap")
    assert torch.equal(y, torch.full_like(x, 1500.0))


def test_bfloat16_directions_are_unit_length_all_the_same() -> None:
    """A direction rounded to bfloat16 is longer or shorter by 1e-3 or so; the table's factor takes that out again."""
    x, u = normal(16, HIDDEN), normal(1, HIDDEN, seed=1)
    stored = EditTable.create(2, 1, HIDDEN, dtype=torch.bfloat16)
    stored.set_slot(1, u, op="project", alpha=1.0)
    y = edit_(x.clone(), stored, torch.ones(16, dtype=torch.int32))
    left = component(y, stored.directions[1, 0]) / component(x, stored.directions[1, 0])
    assert left.abs().max() < 2e-5
