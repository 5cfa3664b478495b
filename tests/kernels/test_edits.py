"""edits: every lane against float64, exact no-ops, bitwise invariance of the cpu lane, equality with transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rainkernels.ops.edits import BasisTable, EditTable, NormedResidual, add_edit_rmsnorm, edit_
from rainkernels.reference import edits as reference
from rainkernels.testing.cases_edits import CASES, EditCase, EditInputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_ID = {case.id: case for case in CASES}
EPS = 1e-6


@pytest.fixture(params=["cpu", "reference"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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


def assert_close_enough(actual: Tensor, plain: Tensor, exact: Tensor, atol: float = 1e-6) -> None:
    """Error against float64 at most twice plain PyTorch's, plus atol (relative above 1)."""
    atol *= max(1.0, float(exact.abs().max()))
    error, allowed = (actual.double() - exact).abs().max(), 2 * (plain.double() - exact).abs().max() + atol
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_definition(case: EditCase, dtype: torch.dtype, lane: str) -> None:
    i = case.make(dtype)
    assert_close_enough(unfused(i), truth(i, dtype), truth(i, torch.float64))
    got, exact, plain = fused(case, i), fused_truth(case, i, torch.float64), fused_truth(case, i, dtype)
    assert got.normed.dtype == got.residual.dtype == dtype
    assert_close_enough(got.normed, plain[0], exact[0])
    assert_close_enough(got.residual, plain[1], exact[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", DTYPES)
def test_rows_and_tables_of_any_dtype(dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    case = EditCase("mixed", 9, 70, table_dtype=table_dtype, ops=("set", "boost"), target=1.0)
    i = case.make(dtype)
    assert_close_enough(unfused(i), truth(i, dtype), truth(i, torch.float64))


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
    """Slot 1 edits, slot 2 was cleared, slot 3 has strength 0 (with a norm option), slot 4 was never set."""
    g = torch.Generator().manual_seed(1)
    directions = torch.randn(3, hidden, generator=g)
    if shared:
        basis = BasisTable.create(5, directions)
        for slot, alpha in ((1, 1.0), (2, 1.0), (3, 0.0)):
            basis.set_slot(slot, alpha=alpha, op="project", norm="preserve")
        basis.clear_slot(2)
        return basis
    table = EditTable.create(5, 4, hidden)
    for slot, alpha in ((1, 1.0), (2, 1.0), (3, 0.0)):
        table.set_slot(slot, directions, op="project", alpha=alpha, norm="preserve")
    table.clear_slot(2)
    return table


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_rows_without_an_edit_keep_every_bit(dtype: torch.dtype, shared: bool, lane: str) -> None:
    x = ugly_rows(dtype, 6, 70)
    slots = torch.tensor([0, 2, 3, 1, 4, 0], dtype=torch.int32)
    table = table_with_idle_slots(70, shared=shared)
    idle = slots != 1
    assert same_bits(edit_(x.clone(), table, slots)[idle], x[idle])
    weight, residual = torch.randn(70).to(dtype), torch.randn(6, 70).to(dtype)
    with_table = add_edit_rmsnorm(x, residual.clone(), weight, table, slots, eps=EPS)
    without = add_edit_rmsnorm(x, residual.clone(), weight, None, None, eps=EPS)
    for a, b in zip(with_table, without, strict=True):
        assert same_bits(a[idle], b[idle])


def test_slot_0_edits_nothing_whatever_it_holds(lane: str) -> None:
    table = table_with_idle_slots(16, shared=False)
    assert isinstance(table, EditTable)
    for t in (table.directions, table.scale, table.op, table.alpha, table.count):
        t[0] = t[1]
    x = torch.randn(3, 16)
    assert same_bits(edit_(x.clone(), table, torch.zeros(3, dtype=torch.int32)), x)


def test_no_rows(lane: str) -> None:
    table = table_with_idle_slots(16, shared=False)
    none, slots = torch.empty(0, 16), torch.empty(0, dtype=torch.int32)
    assert edit_(none, table, slots).shape == (0, 16)
    assert add_edit_rmsnorm(none, torch.empty(0, 16), torch.ones(16), table, slots, eps=EPS).normed.shape == (0, 16)


def test_a_row_edited_to_zero_normalises_to_zero(lane: str) -> None:
    """h parallel to u: nothing is left, and eps keeps the norm finite."""
    table = EditTable.create(2, 1, 64)
    table.set_slot(1, torch.eye(64)[5:6], op="project", alpha=1.0)
    x = torch.zeros(1, 64)
    x[0, 5] = 7.0
    got = add_edit_rmsnorm(x, torch.zeros(1, 64), torch.ones(64), table, torch.tensor([1], dtype=torch.int32), eps=EPS)
    assert torch.equal(got.residual, torch.zeros(1, 64))
    assert torch.equal(got.normed, torch.zeros(1, 64))


# Equality with the model library where no edit is made


def sums_exactly(rows: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and residual whose sum has few bits, so that every order of the sum of squares gives the same float32."""
    g = torch.Generator().manual_seed(2)
    x = torch.randint(-8, 9, (rows, hidden), generator=g) / 4
    residual = torch.randint(-16, 17, (rows, hidden), generator=g) / 4
    return x.to(dtype), residual.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast", ["llama", "gemma"])
@pytest.mark.parametrize("hidden", [64, 96, 77, 1000])
def test_equals_transformers_bit_for_bit(dtype: torch.dtype, cast: str, hidden: int, lane: str) -> None:
    x, residual = sums_exactly(40, hidden, dtype)
    norm = (LlamaRMSNorm if cast == "llama" else GemmaRMSNorm)(hidden, eps=EPS).to(dtype)
    with torch.no_grad():
        norm.weight.add_(0.1 * torch.randn(hidden, generator=torch.Generator().manual_seed(3)).to(dtype))
        wanted = norm(residual + x)
    offset = 1.0 if cast == "gemma" else 0.0
    weight = norm.weight.detach()
    got = add_edit_rmsnorm(x, residual.clone(), weight, None, None, eps=EPS, cast=cast, weight_offset=offset)  # type: ignore[arg-type]
    assert same_bits(got.residual, residual + x)
    assert same_bits(got.normed, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_transformers_but_for_the_order_of_the_sum(dtype: torch.dtype) -> None:
    """On any data the mean of squares may differ in its last bits: at most one unit in the last place of the output."""
    g = torch.Generator().manual_seed(4)
    x, residual = (torch.randn(64, 512, generator=g).to(dtype) for _ in range(2))
    norm = LlamaRMSNorm(512, eps=EPS).to(dtype)
    got = add_edit_rmsnorm(x, residual.clone(), norm.weight.detach(), None, None, eps=EPS)
    wanted = norm(residual + x).detach()
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    apart = (got.normed.view(kind).long() - wanted.view(kind).long()).abs()
    assert same_bits(got.residual, residual + x)
    assert apart.max() <= (3 if dtype == torch.float32 else 1)
    assert (apart > 0).float().mean() < (0.6 if dtype == torch.float32 else 0.01)


def test_weight_in_float32(lane: str) -> None:
    x, residual = sums_exactly(5, 64, torch.bfloat16)
    weight = torch.randn(64, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    narrow = add_edit_rmsnorm(x, residual.clone(), weight, None, None, eps=EPS).normed
    wide = add_edit_rmsnorm(x, residual.clone(), weight.float(), None, None, eps=EPS).normed
    assert same_bits(narrow, wide)


# Bitwise invariance of the cpu lane

INVARIANT = [BY_ID[name] for name in ("project", "overlapping", "all-ops", "odd-width", "cap", "basis", "basis-skew")]


@pytest.mark.parametrize("case", INVARIANT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_batch(case: EditCase, dtype: torch.dtype) -> None:
    i = case.make(dtype)
    whole, edited = fused(case, i), unfused(i)
    g = torch.Generator().manual_seed(6)
    for count in (1, 2, 3, case.rows):
        rows = torch.randperm(case.rows, generator=g)[:count]
        some = EditInputs(i.x[rows], i.residual[rows], i.weight, i.table, i.slots[rows])
        part = fused(case, some)
        assert same_bits(part.normed, whole.normed[rows])
        assert same_bits(part.residual, whole.residual[rows])
        assert same_bits(unfused(some), edited[rows])


def test_bits_do_not_depend_on_padding_or_other_slots() -> None:
    g = torch.Generator().manual_seed(7)
    directions, x = torch.randn(3, 50, generator=g), torch.randn(6, 50, generator=g)
    results = []
    for slots, room, slot in ((2, 3, 1), (9, 8, 7), (3, 64, 2)):
        table = EditTable.create(slots, room, 50)
        for other in range(1, slots):
            table.set_slot(other, torch.randn(2, 50), op="add", alpha=5.0)
        table.set_slot(slot, directions, op="tanh", alpha=0.7)
        results.append(edit_(x.clone(), table, torch.full((6,), slot, dtype=torch.int32)))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize("case", [EditCase("wide", 70, 1030, num_slots=5), *INVARIANT], ids=str)
def test_bits_do_not_depend_on_threads(case: EditCase) -> None:
    i = case.make(torch.bfloat16)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append((*fused(case, i), unfused(i)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert same_bits(a, b)


_DIGEST = """
import hashlib, torch
from rainkernels import _C
from rainkernels.ops.edits import add_edit_rmsnorm, edit_
from rainkernels.testing.cases_edits import CASES
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for case in CASES:
        i = case.make(dtype)
        out = add_edit_rmsnorm(i.x, i.residual, i.weight, i.table, i.slots, eps=1e-6, tap=case.tap, cast=case.cast)
        for t in (*out, edit_(i.x, i.table, i.slots)):
            digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
print(_C.isa(), digest.hexdigest())
"""


def test_bits_do_not_depend_on_instruction_set() -> None:
    seen = {}
    for isa in ("avx512", "avx2", "baseline"):
        env = os.environ | {"RAINKERNELS_ISA": isa, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", _DIGEST], env=env, capture_output=True, text=True, check=True)
        used, digest = done.stdout.split()
        seen[used] = digest
    assert "baseline" in seen
    assert len(set(seen.values())) == 1, seen


@st.composite
def cases(draw: st.DrawFn) -> EditCase:
    shared = draw(st.booleans())
    return EditCase(
        "drawn",
        rows=draw(st.integers(1, 12)),
        hidden=draw(st.integers(1, 70) | st.sampled_from([128, 257])),
        num_slots=draw(st.integers(1, 5)),
        directions=draw(st.integers(1, 7)),
        ops=draw(st.lists(st.sampled_from(reference.OPS), min_size=1, max_size=5)),  # type: ignore[arg-type]
        alpha=draw(st.sampled_from([0.0, 0.5, -1.0, 1.5])),
        target=draw(st.sampled_from([0.0, -3.0])),
        order="sequential" if shared else draw(st.sampled_from(["sequential", "orthonormal"])),
        overlap=draw(st.sampled_from([0.0, 0.5, 1.0])),
        norm=draw(st.sampled_from(reference.NORMS)),  # type: ignore[arg-type]
        shared=shared,
        strided=draw(st.booleans()),
        tap=draw(st.sampled_from(["mlp_out", "block_out"])),
        cast=draw(st.sampled_from(["llama", "gemma"])),
    )


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_random_cases(case: EditCase, dtype: torch.dtype, seed: int) -> None:
    i = case.make(dtype, seed=seed)
    # Seven boosts of one direction multiply a row and its error by 2.5 ** 7; rescaling by a small rest does the same.
    grown = max(1.0, float(truth(i, torch.float64).abs().max())) * (1.0 if case.norm == "none" else 30.0)
    assert_close_enough(unfused(i), truth(i, dtype), truth(i, torch.float64), 3e-6 * grown)
    got, exact, plain = fused(case, i), fused_truth(case, i, torch.float64), fused_truth(case, i, dtype)
    assert_close_enough(got.residual, plain[1], exact[1], 3e-6 * grown)
    if float(exact[1].square().mean(-1).min()) > 0.05:  # a nearly vanished row is normalised up, errors and all
        assert_close_enough(got.normed, plain[0], exact[0], 3e-5 * grown)
