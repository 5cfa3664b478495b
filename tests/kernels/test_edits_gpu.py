"""The edits family on a CUDA device: every named case, exact no-ops, graph capture, and independence of the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_edits import (
    EPS,
    assert_close_enough,
    fused,
    fused_truth,
    same_bits,
    table_with_idle_slots,
    truth,
    ugly_rows,
    unfused,
)

from rainkernels.ops.edits import BasisTable, EditTable, add_edit_rmsnorm, edit_
from rainkernels.testing.cases_edits import CASES, EditCase, EditInputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_ID = {case.id: case for case in CASES}
# Row sizes of real models, the widest in registers and beyond them; a basis of every room.
LARGE = [
    EditCase("llama", 65, 4096, num_slots=6, overlap=0.3, alpha=0.8),
    EditCase("widest-in-registers", 9, 8192, directions=6, overlap=0.3, norm="preserve", tap="block_out"),
    EditCase("blocks", 9, 12291, directions=6, ops=("project", "tanh"), overlap=0.3, norm="cap", plain_rows=False),
    EditCase("blocks-many", 5, 16384, directions=40, alpha=0.5, tap="block_out", plain_rows=False),
    EditCase("basis-llama", 37, 4096, directions=48, shared=True, order="orthonormal", magnitude=2.0),
    EditCase("basis-256", 18, 2048, directions=256, shared=True, order="orthonormal", norm="preserve", alpha=0.7),
]


def to_cuda(i: EditInputs) -> EditInputs:
    """The same numbers: a table's tensors are what the cpu made of the directions."""
    return EditInputs(i.x.cuda(), i.residual.cuda(), i.weight.cuda(), table_to_cuda(i.table), i.slots.cuda())


def table_to_cuda(table: EditTable | BasisTable) -> EditTable | BasisTable:
    if isinstance(table, BasisTable):
        names = ("basis", "scale", "op", "alpha", "target", "norm")
        return BasisTable(*(getattr(table, name).cuda() for name in names))
    names = ("directions", "scale", "gram", "op", "alpha", "target", "count", "norm")
    return EditTable(*(getattr(table, name).cuda() for name in names))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_matches_definition(case: EditCase, dtype: torch.dtype) -> None:
    i = case.make(dtype)
    on_device = to_cuda(i)
    # bfloat16 tables are multiplied as two bfloat16 parts of the row: 2^-17 of a component stays out.
    atol = 2.0**-17 if case.shared and dtype == torch.bfloat16 else 1e-6
    assert_close_enough(unfused(on_device).cpu(), truth(i, dtype), truth(i, torch.float64), atol)
    got, exact, plain = fused(case, on_device), fused_truth(case, i, torch.float64), fused_truth(case, i, dtype)
    assert got.normed.dtype == got.residual.dtype == dtype
    assert_close_enough(got.normed.cpu(), plain[0], exact[0], atol)
    assert_close_enough(got.residual.cpu(), plain[1], exact[1], atol)


def test_strided_rows() -> None:
    """Slices of wider rows, which to_cuda makes contiguous; what lies beside them stays as it was."""
    for name in ("strided", "basis-skew"):
        case = replace(BY_ID[name], strided=True)
        i = to_cuda(case.make(torch.bfloat16))
        wanted, edited = fused(case, i), unfused(i)
        x, residual, out = (
            torch.zeros(case.rows, case.hidden + 24, dtype=torch.bfloat16, device="cuda") for _ in range(3)
        )
        inside = slice(8, 8 + case.hidden)
        x[:, inside], residual[:, inside] = i.x, i.residual
        add_edit_rmsnorm(
            x[:, inside], residual[:, inside], i.weight, i.table, i.slots, eps=EPS, tap=case.tap,
            weight_offset=case.weight_offset, cast=case.cast, out=out[:, inside],
        )  # fmt: skip
        edit_(x[:, inside], i.table, i.slots)
        for wide, want in ((x, edited), (residual, wanted.residual), (out, wanted.normed)):
            assert same_bits(wide[:, inside], want)
            assert not wide[:, :8].any()
            assert not wide[:, 8 + case.hidden :].any()


@pytest.mark.parametrize("hidden", [70, 4096, 12291])
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_rows_without_an_edit_keep_every_bit(dtype: torch.dtype, shared: bool, hidden: int) -> None:
    """Beside an edited row, where no row is edited, and for slots outside the table, which count as 0."""
    x = ugly_rows(dtype, 6, hidden).cuda()
    table = table_to_cuda(table_with_idle_slots(hidden, shared=shared))
    for chosen in ([0, 2, 3, 1, 4, 0], [0, 2, 3, 0, 4, 0], [-1, 5, 1, 2**31 - 1, 0, 0]):
        slots = torch.tensor(chosen, dtype=torch.int32, device="cuda")
        idle = slots != 1
        assert same_bits(edit_(x.clone(), table, slots)[idle], x[idle])


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("hidden", [70, 4096, 12291])
def test_fused_rows_without_an_edit_have_the_bits_of_no_table(hidden: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    x, residual = (torch.randn(6, hidden, generator=g).to("cuda", dtype) for _ in range(2))
    weight = torch.randn(hidden, generator=g).to("cuda", dtype)
    table = table_to_cuda(table_with_idle_slots(hidden, shared=False))
    slots = torch.tensor([0, 2, 3, 1, 4, 0], dtype=torch.int32, device="cuda")
    without = add_edit_rmsnorm(x, residual.clone(), weight, None, None, eps=EPS)
    for a, b in zip(add_edit_rmsnorm(x, residual.clone(), weight, table, slots, eps=EPS), without, strict=True):
        assert same_bits(a[slots != 1], b[slots != 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [BY_ID["all-ops"], BY_ID["cap"], BY_ID["basis"], *LARGE], ids=str)
def test_a_row_does_not_depend_on_its_batch(case: EditCase, dtype: torch.dtype) -> None:
    """Nor on its place in a tile, or on a row of NaN beside it."""
    i = to_cuda(case.make(dtype))
    whole, edited = fused(case, i), unfused(i)
    i.x[3] = float("nan")
    g = torch.Generator().manual_seed(6)
    for count in (1, 2, case.rows - 3):
        others = 4 + torch.randperm(case.rows - 4, generator=g)
        rows = torch.cat((torch.tensor([3]), others))[:count].flip(0).cuda()
        some = EditInputs(i.x[rows], i.residual[rows], i.weight, i.table, i.slots[rows])
        part, clean = fused(case, some), rows != 3
        assert same_bits(part.normed[clean], whole.normed[rows][clean])
        assert same_bits(part.residual[clean], whole.residual[rows][clean])
        assert same_bits(unfused(some)[clean], edited[rows][clean])


GRAPHS = [BY_ID[name] for name in ("project", "all-ops-block", "odd-width", "basis", "basis-skew")] + LARGE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", GRAPHS, ids=str)
def test_graph_replays_follow_their_inputs(case: EditCase, dtype: torch.dtype) -> None:
    """Captured once, both ops read rows, slots and the table as they are at each replay, and allocate nothing."""
    first, second = (to_cuda(case.make(dtype, seed=seed)) for seed in (0, 1))
    second = EditInputs(second.x, second.residual, first.weight, first.table, second.slots)
    i = first.copy()
    i = EditInputs(i.x, i.residual, i.weight, i.table, i.slots.clone())
    alone, out = i.x.clone(), torch.empty_like(i.x)

    def both() -> None:
        edit_(alone, i.table, i.slots)
        add_edit_rmsnorm(
            i.x, i.residual, i.weight, i.table, i.slots, eps=EPS, tap=case.tap, weight_offset=case.weight_offset,
            cast=case.cast, out=out,
        )  # fmt: skip

    def load(source: EditInputs) -> None:
        for target, new in ((alone, source.x), (i.x, source.x), (i.residual, source.residual), (i.slots, source.slots)):
            target.copy_(new)

    both()  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        both()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    halved = False
    for source in (first, second, first):
        if halved:  # a change of strength after the capture, in the table's own memory
            i.table.alpha.mul_(0.5)
        wanted, edited = fused(case, source), unfused(source)
        load(source)
        graph.replay()
        assert same_bits(alone, edited)
        assert same_bits(out, wanted.normed)
        assert same_bits(i.residual, wanted.residual)
        halved = source is second
