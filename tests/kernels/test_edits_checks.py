"""edits: bad input is refused by name before anything is written; tables, registration, inference mode."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rainkernels.errors import DtypeError, RangeError, ShapeError, StrideError
from rainkernels.ops.edits import BasisTable, EditTable, add_edit_rmsnorm, edit_
from rainkernels.ops.edits_tables import MAX_DIRECTIONS
from rainkernels.testing.cases_edits import CASES

BY_ID = {case.id: case for case in CASES}
I32 = torch.int32


@pytest.fixture(params=["cpu", "reference"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


def small_table(hidden: int = 8) -> EditTable:
    table = EditTable.create(3, 2, hidden)
    table.set_slot(1, torch.eye(hidden)[:2], op="project", alpha=1.0)
    return table


def good_call() -> dict[str, object]:
    return {
        "x": torch.ones(2, 8), "residual": torch.ones(2, 8), "weight": torch.ones(8), "table": small_table(),
        "slots": torch.tensor([1, 0], dtype=I32), "eps": 1e-6,
    }  # fmt: skip


BAD_CALLS: list[tuple[str, dict[str, object], type[Exception]]] = [
    ("x", {"x": [1.0]}, DtypeError),
    ("x", {"x": torch.ones(2, 8).double()}, DtypeError),
    ("x", {"x": torch.ones(16)}, ShapeError),
    ("x", {"x": torch.ones(2, 0)}, ShapeError),
    ("x", {"x": torch.ones(8, 2).T}, StrideError),
    ("x", {"x": torch._neg_view(torch.ones(2, 8))}, StrideError),
    ("x", {"x": torch.ones(2, 7)}, ShapeError),
    ("table", {"table": {"directions": torch.ones(1)}}, DtypeError),
    ("table", {"table": None}, DtypeError),
    ("slots", {"slots": None}, DtypeError),
    ("slots", {"slots": torch.tensor([1, 0])}, DtypeError),
    ("slots", {"slots": torch.tensor([1], dtype=I32)}, ShapeError),
    ("slots", {"slots": torch.tensor([1, 1, 0, 0], dtype=I32)[::2]}, StrideError),
    (r"slots\[1\] is 3", {"slots": torch.tensor([1, 3], dtype=I32)}, RangeError),
    (r"slots\[0\] is -1", {"slots": torch.tensor([-1, 0], dtype=I32)}, RangeError),
]
BAD_FUSED: list[tuple[str, dict[str, object], type[Exception]]] = [
    ("residual", {"residual": torch.ones(3, 8)}, ShapeError),
    ("residual", {"residual": torch.ones(2, 8).half()}, DtypeError),
    ("residual", {"residual": torch.ones(1, 8).expand(2, 8)}, StrideError),
    ("weight", {"weight": torch.ones(7)}, ShapeError),
    ("weight", {"weight": torch.ones(8).half()}, DtypeError),
    ("weight", {"weight": torch.ones(16)[::2]}, StrideError),
    ("out", {"out": torch.ones(2, 7)}, ShapeError),
    ("out", {"out": torch.ones(2, 8).half()}, DtypeError),
    ("out", {"out": torch.ones(8).expand(2, 8)}, StrideError),
    ("eps", {"eps": -1.0}, RangeError),
    ("eps", {"eps": math.nan}, RangeError),
    ("eps", {"eps": "1"}, DtypeError),
    ("tap", {"tap": "attn"}, RangeError),
    ("cast", {"cast": "none"}, RangeError),
    ("weight_offset", {"weight_offset": math.inf}, RangeError),
]


@pytest.mark.parametrize(("name", "change", "error"), [*BAD_CALLS, *BAD_FUSED])
def test_bad_fused_call_is_refused(name: str, change: dict[str, object], error: type[Exception], lane: str) -> None:
    arguments = good_call()
    add_edit_rmsnorm(**arguments)  # type: ignore[arg-type]
    arguments = good_call() | change
    residual = arguments["residual"]
    before = residual.clone() if isinstance(residual, Tensor) else None
    with pytest.raises(error, match=name):
        add_edit_rmsnorm(**arguments)  # type: ignore[arg-type]
    assert before is None or torch.equal(residual, before)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "change", "error"), BAD_CALLS)
def test_bad_edit_is_refused(name: str, change: dict[str, object], error: type[Exception], lane: str) -> None:
    arguments = {n: v for n, v in good_call().items() if n in ("x", "table", "slots")}
    edit_(**arguments)  # type: ignore[arg-type]
    arguments |= change
    x = arguments["x"]
    before = x.clone() if isinstance(x, Tensor) else None
    with pytest.raises(error, match=name):
        edit_(**arguments)  # type: ignore[arg-type]
    assert before is None or torch.equal(x, before)  # type: ignore[arg-type]


def test_memory_that_is_read_and_written_is_refused(lane: str) -> None:
    weight, buffer = torch.ones(8), torch.arange(96.0)
    wide = buffer[:48].view(3, 16)
    left, right, own = wide[:, :8], wide[:, 8:], lambda: torch.ones(3, 8)

    def call(x: Tensor, residual: Tensor, out: Tensor | None = None) -> None:
        add_edit_rmsnorm(x, residual, weight, None, None, eps=1e-6, out=out)

    def rows(at: int, step: int = 8) -> Tensor:
        return buffer.as_strided((3, 8), (step, 1), at)

    before = buffer.clone()
    for x, residual, out, name in (
        (left, left, None, "residual"),
        (rows(0), rows(8), None, "residual"),  # a row further on
        (rows(0), rows(1), None, "residual"),
        (rows(8), rows(1), None, "residual"),
        (left, rows(4, 16), None, "residual"),  # the same stride, four columns in common
        (rows(0, 0), rows(4), None, "residual"),  # one row for all
        (rows(0), rows(17, 10), None, "residual"),
        (own(), left, left, "residual"),
        (own(), rows(0), rows(23), "residual"),
        (rows(0), own(), rows(8), "out"),
        (left, own(), rows(0), "out"),
        (left, own(), rows(4, 16), "out"),
    ):
        for _ in range(2):  # addresses are looked at again where the signature is known
            with pytest.raises(StrideError, match=f"^{name} shares memory"):
                call(x, residual, out)
    assert torch.equal(buffer, before)
    call(left, right)
    call(left, own(), right)
    call(own(), left, right)
    call(rows(0), rows(24), rows(48))
    call(rows(0, 32), rows(10, 31), rows(20, 32))  # other strides: rows at 0, 32, 64, at 10, 41, 72 and at 20, 52, 84
    with pytest.raises(StrideError, match="x has strides"):
        edit_(torch.ones(1, 8).expand(2, 8), small_table(), torch.ones(2, dtype=I32))


@pytest.mark.parametrize("case", ["all-ops", "cap", "basis", "strided"])
def test_out_may_be_x(case: str, lane: str) -> None:
    c = BY_ID[case]
    a, b = c.make(torch.bfloat16), c.make(torch.bfloat16)
    wanted = add_edit_rmsnorm(a.x, a.residual, a.weight, a.table, a.slots, eps=1e-6, tap=c.tap)
    got = add_edit_rmsnorm(b.x, b.residual, b.weight, b.table, b.slots, eps=1e-6, tap=c.tap, out=b.x)
    assert got.normed is b.x
    assert got.residual is b.residual
    assert torch.equal(got.normed, wanted.normed)
    assert torch.equal(got.residual, wanted.residual)


# Tables

SET_SLOT: list[tuple[str, dict[str, object], type[Exception]]] = [
    ("slot", {"slot": 0}, RangeError),
    ("slot", {"slot": 3}, RangeError),
    ("slot", {"slot": True}, DtypeError),
    ("directions", {"directions": [[1.0] * 8]}, DtypeError),
    ("directions", {"directions": torch.ones(1, 8, dtype=I32)}, DtypeError),
    ("directions", {"directions": torch.ones(8)}, ShapeError),
    ("directions", {"directions": torch.ones(1, 7)}, ShapeError),
    ("directions", {"directions": torch.eye(8)[:3]}, ShapeError),
    (r"directions\[1\]", {"directions": torch.stack([torch.ones(8), torch.zeros(8)])}, RangeError),
    (r"directions\[0\]", {"directions": torch.full((1, 8), math.nan)}, RangeError),
    (r"directions\[0\]", {"directions": torch.full((1, 8), math.inf), "order": "orthonormal"}, RangeError),
    ("op", {"op": "erase"}, RangeError),
    ("op", {"op": ["add"]}, ShapeError),
    ("op", {"op": None}, DtypeError),
    ("op", {"op": 3}, DtypeError),
    ("op", {"op": ["add", 3]}, DtypeError),
    ("alpha", {"alpha": 10**400}, DtypeError),
    ("directions", {"directions": torch.eye(8)[:2].to_sparse()}, StrideError),
    ("alpha", {"alpha": math.nan}, RangeError),
    ("alpha", {"alpha": 1e300}, RangeError),
    ("alpha", {"alpha": [1.0, 2.0, 3.0]}, ShapeError),
    ("alpha", {"alpha": "much"}, DtypeError),
    ("target", {"target": math.inf}, RangeError),
    ("order", {"order": "joint"}, RangeError),
    ("norm", {"norm": "keep"}, RangeError),
    ("tolerance", {"tolerance": 2.0}, RangeError),
]


@pytest.mark.parametrize(("name", "change", "error"), SET_SLOT)
def test_bad_slot_is_refused_and_the_old_edit_stays(
    name: str, change: dict[str, object], error: type[Exception]
) -> None:
    table, x, slots = small_table(), torch.randn(4, 8), torch.ones(4, dtype=I32)
    wanted = edit_(x.clone(), table, slots)
    good: dict[str, object] = {"slot": 1, "directions": torch.eye(8)[2:4], "op": "project", "alpha": 1.0}
    with pytest.raises(error, match=name):
        table.set_slot(**(good | change))  # type: ignore[arg-type]
    assert torch.equal(edit_(x.clone(), table, slots), wanted)


def test_bad_tables_are_refused() -> None:
    for change in (
        {"num_slots": 0},
        {"max_directions": 0},
        {"hidden_size": 2.0},
        {"num_slots": True},
        {"max_directions": MAX_DIRECTIONS + 1},
    ):
        error = RangeError if type(next(iter(change.values()))) is int else DtypeError
        with pytest.raises(error, match=next(iter(change))):
            EditTable.create(**({"num_slots": 2, "max_directions": 2, "hidden_size": 4} | change))  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match="dtype"):
        EditTable.create(2, 2, 4, dtype=torch.float64)
    with pytest.raises(ShapeError, match="basis"):
        BasisTable.create(2, torch.ones(0, 4))
    with pytest.raises(RangeError, match=r"basis\[1\]"):
        BasisTable.create(2, torch.stack([torch.ones(4), torch.zeros(4)]))
    basis = BasisTable.create(2, torch.eye(4))
    with pytest.raises(ShapeError, match="alpha"):
        basis.set_slot(1, alpha=[1.0])
    with pytest.raises(RangeError, match="slot"):
        basis.clear_slot(0)
    t = small_table()
    with pytest.raises(ShapeError, match="gram"):
        EditTable(t.directions, t.scale, t.gram[:, :1].contiguous(), t.op, t.alpha, t.target, t.count, t.norm)
    with pytest.raises(DtypeError, match="count"):
        EditTable(t.directions, t.scale, t.gram, t.op, t.alpha, t.target, t.count.float(), t.norm)


def test_orthonormal_drops_what_depends_on_the_rest() -> None:
    table = EditTable.create(2, 4, 8)
    a, b = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    rows = torch.stack([a, torch.zeros(8), 3 * a, b, a - 2 * b, b + 1e-9])
    assert table.set_slot(1, rows, op="project", alpha=[1, 2, 3, 4, 5, 6], order="orthonormal") == 2
    assert table.count.tolist() == [0, 2]
    assert table.alpha[1, :2].tolist() == [1.0, 4.0]
    torch.testing.assert_close(table.gram[1, :2, :2], torch.eye(2), atol=1e-6, rtol=0)
    assert table.set_slot(1, torch.zeros(2, 8), op="project", alpha=1.0, order="orthonormal") == 0


def test_gram_is_that_of_the_stored_directions() -> None:
    table = EditTable.create(2, 3, 64, dtype=torch.bfloat16)
    table.set_slot(1, torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), op="project", alpha=1.0)
    unit = table.directions[1].double() * table.scale[1].double()[:, None]
    torch.testing.assert_close(table.gram[1].double(), unit @ unit.T, atol=1e-7, rtol=0)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-7, rtol=0)


def test_a_shorter_edit_replaces_a_longer_one(lane: str) -> None:
    table, x, slots = small_table(), torch.randn(4, 8), torch.ones(4, dtype=I32)
    table.set_slot(1, torch.eye(8)[5:6], op="project", alpha=1.0)
    wanted = x.clone()
    wanted[:, 5] = 0
    torch.testing.assert_close(edit_(x, table, slots), wanted)


def test_addresses_never_change() -> None:
    table = small_table()
    before = [t.data_ptr() for t in (table.directions, table.gram, table.alpha, table.count)]
    table.set_slot(2, torch.eye(8)[:1], op="add", alpha=2.0, order="orthonormal", norm="cap")
    table.clear_slot(1)
    assert [t.data_ptr() for t in (table.directions, table.gram, table.alpha, table.count)] == before


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10_000))
def test_no_content_of_a_table_leads_out_of_it(seed: int) -> None:
    """Counts, codes and norms of any value: no crash, and rows whose slot says nothing sensible come out finite or not."""
    g = torch.Generator().manual_seed(seed)
    i = BY_ID["all-ops"].make(torch.bfloat16, seed=seed)
    assert isinstance(i.table, EditTable)
    for t in (i.table.op, i.table.count, i.table.norm):
        t.copy_(torch.randint(-(1 << 31), 1 << 31, t.shape, generator=g).to(I32))
    edit_(i.x, i.table, i.slots)
    add_edit_rmsnorm(i.x, i.residual, i.weight, i.table, i.slots, eps=1e-6)


# Registration


def registered_tables() -> list[tuple[str, dict[str, Tensor | None]]]:
    found = []
    for name in ("all-ops", "basis"):
        table = BY_ID[name].make(torch.float32).table
        arguments = table.reference_arguments()
        if isinstance(table, EditTable):
            arguments["gram"] = table.gram
        found.append((name, arguments))
    return found


@pytest.mark.parametrize(("name", "table"), registered_tables(), ids=lambda v: v if isinstance(v, str) else "")
def test_registered_ops(name: str, table: dict[str, Tensor | None]) -> None:
    ops, i = torch.ops.rainkernels, BY_ID[name].make(torch.float32)
    torch.library.opcheck(ops.edit_.default, (i.x.clone(), i.slots), table)
    fused = (i.x, i.residual.clone(), i.weight, 1e-6)
    torch.library.opcheck(ops.add_edit_rmsnorm.default, fused, {"slots": i.slots, **table})
    torch.library.opcheck(ops.add_edit_rmsnorm.default, fused)
    with torch.inference_mode():
        x, residual = i.x.clone(), i.residual.clone()
        ops.edit_(x, i.slots, **table)
        normed = ops.add_edit_rmsnorm(i.x, residual, i.weight, 1e-6, "block_out", 1.0, "gemma", i.slots, **table)
        wanted = add_edit_rmsnorm(
            i.x, i.residual.clone(), i.weight, i.table, i.slots, eps=1e-6, tap="block_out", weight_offset=1.0, cast="gemma"
        )  # fmt: skip
    assert torch.equal(x, edit_(i.x.clone(), i.table, i.slots))
    assert torch.equal(normed, wanted.normed)
    assert torch.equal(residual, wanted.residual)


def test_tables_made_in_inference_mode_can_change_outside(lane: str) -> None:
    with torch.inference_mode():
        table, basis = small_table(), BasisTable.create(2, torch.eye(8))
    table.set_slot(2, torch.eye(8)[:1], op="add", alpha=2.0)
    basis.set_slot(1, alpha=1.0)
    x = torch.zeros(1, 8)
    with torch.inference_mode():
        edit_(x, table, torch.tensor([2], dtype=I32))
    assert x[0].tolist() == [2.0, *[0.0] * 7]
