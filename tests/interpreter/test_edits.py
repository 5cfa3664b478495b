"""The Triton lane of the edits family under Triton's interpreter, against the definition in plain PyTorch.

Run as `TRITON_INTERPRET=1 python -m pytest tests/interpreter/test_edits.py`: Triton decides at import.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rainkernels.ops.edits import BasisTable, EditTable, NormedResidual, add_edit_rmsnorm, edit_
from rainkernels.reference import edits as reference
from rainkernels.testing.cases_edits import CASES, EditCase, EditInputs
from rainkernels.triton import edits as kernels
from rainkernels.triton.edits_basis import INTERPRETED

pytestmark = [
    pytest.mark.skipif(not INTERPRETED.value, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, for NaN rows that are masked out
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_ID = {case.id: case for case in CASES}
EPS = 1e-6
# One unit in the last place: the interpreter cuts bfloat16 off where the definition, and a GPU, round to nearest.
CUT = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 0.0}
WIDE = 2 * kernels.MAX_REGISTER_ROW - 4096 - 3  # three blocks, the last one ragged


@pytest.fixture(autouse=True)
def _triton_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAINKERNELS_LANE", "triton")


def fused(case: EditCase, i: EditInputs, *, edited: bool = True) -> NormedResidual:
    """On a copy of the inputs."""
    return add_edit_rmsnorm(
        i.x, i.residual.clone(), i.weight, i.table if edited else None, i.slots if edited else None,
        eps=EPS, tap=case.tap, weight_offset=case.weight_offset, cast=case.cast,
    )  # fmt: skip


def unfused(i: EditInputs) -> Tensor:
    return edit_(i.x.clone(), i.table, i.slots)


def fused_truth(case: EditCase, i: EditInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The definition with rows of `dtype`; the table is what it is."""
    return reference.add_edit_rmsnorm(
        i.x.to(dtype), i.residual.to(dtype), i.weight.to(dtype), i.slots, i.table.reference_arguments(),
        eps=EPS, tap=case.tap, weight_offset=case.weight_offset, cast=case.cast,
    )  # fmt: skip


def truth(i: EditInputs, dtype: torch.dtype) -> Tensor:
    return reference.edit(i.x.to(dtype), i.slots, **i.table.reference_arguments())  # type: ignore[arg-type]


def assert_close_enough(actual: Tensor, plain: Tensor, exact: Tensor, cuts: int) -> None:
    """Error against float64 at most twice plain PyTorch's, plus 1e-6 (relative above 1), plus `cuts` bfloat16 cut-offs.

    A cut-off is allowed element by element: it is a share of the element, not of the largest one.
    """
    atol = 1e-6 * max(1.0, float(exact.abs().max()))
    error = (actual.double() - exact).abs() - cuts * CUT[actual.dtype] * exact.abs()
    allowed = 2 * (plain.double() - exact).abs().max() + atol
    assert error.max() <= allowed, f"error {error.max():.3e}, allowed {allowed:.3e}"


def assert_matches_definition(case: EditCase, dtype: torch.dtype) -> None:
    i = case.make(dtype)
    assert_close_enough(unfused(i), truth(i, dtype), truth(i, torch.float64), 1)
    got, exact, plain = fused(case, i), fused_truth(case, i, torch.float64), fused_truth(case, i, dtype)
    assert got.normed.dtype == got.residual.dtype == dtype
    assert_close_enough(got.residual, plain[1], exact[1], 1)
    # The cut-offs of the residual, of the normalised row (llama) and of the result.
    assert_close_enough(got.normed, plain[0], exact[0], 3)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_definition(case: EditCase, dtype: torch.dtype) -> None:
    most = 18 if case.shared else 7 if dtype == torch.float32 else 4  # two tiles of a shared basis
    assert_matches_definition(replace(case, rows=min(case.rows, most)), dtype)


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
@pytest.mark.parametrize("tap", ["mlp_out", "block_out"])
@pytest.mark.parametrize("cast", ["llama", "gemma"])
def test_both_taps_and_casts(shared: bool, tap: str, cast: str) -> None:
    case = EditCase("forms", 7, 70, directions=5, ops=reference.OPS, alpha=0.7, target=1.0, shared=shared)  # type: ignore[arg-type]
    assert_matches_definition(replace(case, tap=tap, cast=cast, norm="preserve"), torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_tables_of_any_dtype(dtype: torch.dtype, table_dtype: torch.dtype, shared: bool) -> None:
    case = EditCase("mixed", 3, 70, table_dtype=table_dtype, ops=("set", "boost"), target=1.0, shared=shared)
    assert_matches_definition(case, dtype)


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
@pytest.mark.parametrize("directions", [17, 65, 200])
def test_many_directions(directions: int, shared: bool) -> None:
    """Every room a kernel has for them, none of them filled."""
    case = EditCase("many", 3, 210, 2, directions, ("project", "tanh"), 0.5, shared=shared, plain_rows=False)
    assert_matches_definition(replace(case, order="orthonormal"), torch.float32)


def test_a_bfloat16_basis_keeps_what_bfloat16_would_lose() -> None:
    """Rows along the one direction: what projecting leaves is less than a bfloat16 step would be wrong by."""
    direction = torch.randn(1, 64, generator=torch.Generator().manual_seed(5))
    table = BasisTable.create(2, direction, dtype=torch.bfloat16)
    table.set_slot(1, op="project", alpha=1.0)
    x = (torch.tensor([[101.3], [77.7], [90.1]]) * direction / direction.norm()).to(torch.bfloat16)
    i = EditInputs(x, x, x[0], table, torch.ones(3, dtype=torch.int32))
    error = (unfused(i).double() - truth(i, torch.float64)).abs().max()
    assert error < 100 * 2.0**-15, f"error {error:.2e}"


@pytest.mark.parametrize("norm", ["none", "preserve"])
@pytest.mark.parametrize("tap", ["mlp_out", "block_out"])
def test_rows_wider_than_registers(tap: str, norm: str) -> None:
    case = EditCase("wide", 3, WIDE, 6, 5, ("project", "tanh", "boost"), 0.7, overlap=0.5, plain_rows=False)
    assert int(case.make(torch.float32).slots.max()) >= 3, "a row of three directions shows how they act on each other"
    assert_matches_definition(replace(case, tap=tap, norm=norm), torch.float32)  # type: ignore[arg-type]


# Rows without an edit


def ugly_rows(dtype: torch.dtype, rows: int, hidden: int) -> Tensor:
    """-0.0, infinities, NaN with a payload, subnormals among ordinary numbers."""
    x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(0)).to(dtype)
    kind, patterns = (torch.int32, (-(1 << 31), 0x7F800000, 0x7FC12345, -0x3EDCBB, 3))
    if dtype != torch.float32:
        nan = 0x7FD5 if dtype == torch.bfloat16 else 0x7E75
        kind, patterns = (torch.int16, (-(1 << 15), 0x7F80 if dtype == torch.bfloat16 else 0x7C00, nan, nan - 32768, 3))
    for at, bits in enumerate(patterns):
        x.view(kind)[:, 3 * at] = bits
    return x


def table_with_idle_slots(hidden: int, *, shared: bool) -> EditTable | BasisTable:
    """Slot 0 holds what slot 1 does, slot 1 edits, slot 2 was cleared, slot 3 has strength 0, slot 4 was never set."""
    directions = torch.randn(3, hidden, generator=torch.Generator().manual_seed(1))
    table = BasisTable.create(5, directions) if shared else EditTable.create(5, 4, hidden)
    given = () if isinstance(table, BasisTable) else (directions,)
    for slot, alpha in ((1, 1.0), (2, 1.0), (3, 0.0)):
        table.set_slot(slot, *given, alpha=alpha, op="project", norm="preserve")  # type: ignore[arg-type]
    table.clear_slot(2)
    parts = [table.op, table.alpha, table.norm]
    if isinstance(table, EditTable):
        parts += [table.directions, table.scale, table.count]
    for t in parts:
        t[0] = t[1]
    return table


@pytest.mark.parametrize("hidden", [70, WIDE], ids=["registers", "wide"])
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_an_edit_keep_every_bit(dtype: torch.dtype, shared: bool, hidden: int) -> None:
    """Beside an edited row, and where no row is edited."""
    x = ugly_rows(dtype, 6, hidden)
    table = table_with_idle_slots(hidden, shared=shared)
    g = torch.Generator().manual_seed(2)
    weight, residual = torch.randn(hidden, generator=g).to(dtype), torch.randn(6, hidden, generator=g).to(dtype)
    without = add_edit_rmsnorm(x, residual.clone(), weight, None, None, eps=EPS)
    for slots in (torch.tensor([0, 2, 3, 1, 4, 0]), torch.tensor([0, 2, 3, 0, 4, 0])):
        slots = slots.int()
        idle = slots != 1
        assert same_bits(edit_(x.clone(), table, slots)[idle], x[idle])
        with_table = add_edit_rmsnorm(x, residual.clone(), weight, table, slots, eps=EPS)
        for a, b in zip(with_table, without, strict=True):
            assert same_bits(a[idle], b[idle])


def test_a_slot_outside_the_table_is_slot_0() -> None:
    """The launcher's contract on cuda, where the op does not look at the slots."""
    for shared in (False, True):
        table = table_with_idle_slots(70, shared=shared)
        x = ugly_rows(torch.float32, 3, 70)
        out = x.clone()
        kernels.edit_(out, table, torch.tensor([-1, 5, 2**31 - 1], dtype=torch.int32))
        assert same_bits(out, x)


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_a_row_edited_to_zero_normalises_to_zero(shared: bool) -> None:
    """h parallel to u: nothing is left, eps keeps the norm finite, and no norm option brings back what rounding left."""
    direction = torch.eye(64)[5:6]
    table = BasisTable.create(2, direction) if shared else EditTable.create(2, 1, 64)
    given = () if isinstance(table, BasisTable) else (direction,)
    table.set_slot(1, *given, op="project", alpha=1.0, norm="preserve")  # type: ignore[arg-type]
    x = torch.zeros(1, 64)
    x[0, 5] = 7.0
    got = add_edit_rmsnorm(x, torch.zeros(1, 64), torch.ones(64), table, torch.tensor([1], dtype=torch.int32), eps=EPS)
    assert torch.equal(got.residual, torch.zeros(1, 64))
    assert torch.equal(got.normed, torch.zeros(1, 64))


def test_no_rows() -> None:
    table = table_with_idle_slots(16, shared=False)
    none, slots = torch.empty(0, 16), torch.empty(0, dtype=torch.int32)
    assert edit_(none, table, slots).shape == (0, 16)
    assert add_edit_rmsnorm(none, torch.empty(0, 16), torch.ones(16), table, slots, eps=EPS).normed.shape == (0, 16)


# Where results go, and what they depend on


def test_result_in_place_of_x_and_weight_in_float32() -> None:
    case = replace(BY_ID["all-ops"], rows=5)
    i = case.make(torch.float16)
    wanted = fused(case, i)
    x, residual = i.x.clone(), i.residual.clone()
    got = add_edit_rmsnorm(x, residual, i.weight.float(), i.table, i.slots, eps=EPS, out=x)
    assert got.normed is x
    assert got.residual is residual
    assert same_bits(x, wanted.normed)
    assert same_bits(residual, wanted.residual)


def test_nothing_beside_the_rows_is_written() -> None:
    for name in ("strided", "basis-skew"):
        case = replace(BY_ID[name], strided=True)
        i = case.make(torch.float32)
        out = torch.zeros(case.rows, case.hidden + 24)[:, 8 : 8 + case.hidden]
        edit_(i.x, i.table, i.slots)
        add_edit_rmsnorm(i.x, i.residual, i.weight, i.table, i.slots, eps=EPS, out=out)
        for t in (i.x, i.residual, out):
            wide = t.as_strided((case.rows, case.hidden + 24), (case.hidden + 24, 1), 0)
            assert not wide[:, :8].any()
            assert not wide[:, 8 + case.hidden :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["project", "overlapping", "odd-width", "cap", "basis", "basis-skew"])
def test_a_row_does_not_depend_on_its_batch(name: str, dtype: torch.dtype) -> None:
    """Nor on its place in a tile of a shared basis, or on what the other rows of the tile hold."""
    case = replace(BY_ID[name], rows=19 if BY_ID[name].shared else 9, plain_rows=True)
    i = case.make(dtype)
    whole, edited = fused(case, i), unfused(i)
    i.x[3] = float("nan")
    g = torch.Generator().manual_seed(6)
    for count in (1, 2, case.rows - 3):
        rows = torch.cat((torch.tensor([3]), 4 + torch.randperm(case.rows - 4, generator=g)))[:count].flip(0)
        some = EditInputs(i.x[rows], i.residual[rows], i.weight, i.table, i.slots[rows])
        part, clean = fused(case, some), rows != 3
        assert same_bits(part.normed[clean], whole.normed[rows][clean])
        assert same_bits(part.residual[clean], whole.residual[rows][clean])
        assert same_bits(unfused(some)[clean], edited[rows][clean])


def test_padding_and_other_slots_change_no_bit() -> None:
    g = torch.Generator().manual_seed(7)
    directions, x = torch.randn(3, 50, generator=g), torch.randn(6, 50, generator=g)
    results = []
    for slots, room, slot in ((2, 3, 1), (9, 8, 7), (3, 64, 2)):
        table = EditTable.create(slots, room, 50)
        for other in range(1, slots):
            table.set_slot(other, torch.randn(2, 50, generator=g), op="add", alpha=5.0)
        table.set_slot(slot, directions, op="tanh", alpha=0.7)
        results.append(edit_(x.clone(), table, torch.full((6,), slot, dtype=torch.int32)))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_ahead_of_time_configurations_name_every_argument_once() -> None:
    listed = kernels.aot_kernels()
    assert len({k.name for k in listed}) == len(listed)
    for k in listed:
        assert set(k.aligned) <= set(k.signature)
        assert set(k.signature) | set(k.constexprs) == set(k.fn.arg_names)
        assert not set(k.signature) & set(k.constexprs)
