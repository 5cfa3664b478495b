"""The Triton lane of attention in Triton's interpreter: every case against float64, bits across forests, static buffers.

Run as `TRITON_INTERPRET=1 python -m pytest tests/interpreter/test_attention.py`: Triton decides at import.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rainkernels.errors import DeviceError, DtypeError, RangeError, ShapeError
from rainkernels.ops import attention as ops
from rainkernels.ops.attention import AttentionBuffers, AttentionPlan, MergedState, merge_state, tree_attention
from rainkernels.reference import attention as reference
from rainkernels.testing.cases_attention import (
    CASES,
    AttentionCase,
    AttentionInputs,
    Forest,
    chain,
    fan,
    split_everywhere,
    tiles_of_rows,
)
from rainkernels.triton import attention as lane

pytestmark = pytest.mark.skipif(not lane._INTERPRETED, reason="needs TRITON_INTERPRET=1")
BY_ID = {case.id: case for case in CASES}


@pytest.fixture(autouse=True)
def _triton_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAINKERNELS_LANE", "triton")


def run(i: AttentionInputs, **options: object) -> MergedState:
    return tree_attention(  # type: ignore[call-overload, no-any-return]
        i.q, i.k_pool, i.v_pool, i.plan(), sinks=i.sinks, return_lse=True, **(dict(i.options) | options)
    )


def truth(i: AttentionInputs, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    p = i.plan_inputs
    index, length = reference.path_slots(
        p["segment_parent"], p["segment_slots_indptr"], p["slots"], p["row_segment"], p["row_position"]
    )
    sinks = None if i.sinks is None else i.sinks.to(torch.float64 if dtype == torch.float64 else torch.float32)
    q, k_pool, v_pool = (t.to(dtype) for t in (i.q, i.k_pool, i.v_pool))
    return reference.tree_attention(q, k_pool, v_pool, index, length, sinks=sinks, **i.options)


def assert_close_enough(actual: Tensor, plain: Tensor, exact: Tensor, atol: float) -> None:
    """Error against float64 at most twice plain PyTorch's, plus atol (relative above 1); infinities in the same places."""
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(actual), finite)
    if finite.any():
        atol *= max(1.0, float(exact[finite].abs().max()))
        error = (actual.double() - exact)[finite].abs().max()
        allowed = 2 * (plain.double() - exact)[finite].abs().max() + atol
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


# Weights are rounded to the values' dtype: half an ulp of 1. The interpreter cuts bfloat16 off where a GPU rounds.
ATOL = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
HALF = ("one-row-one-token", "fan-gqa8", "step", "odd-dims", "softcap", "sinks-window", "wide-heads")


@pytest.mark.parametrize(
    ("dtype", "case"),
    [(torch.float32, case) for case in CASES]
    + [(dtype, BY_ID[name]) for dtype in (torch.float16, torch.bfloat16) for name in HALF],
    ids=str,
)
def test_matches_definition(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = case.make(dtype)
    state, exact, plain = run(inputs), truth(inputs), truth(inputs, dtype)
    assert state.v.dtype == dtype
    assert_close_enough(state.v, plain[0], exact[0], ATOL[dtype])
    assert_close_enough(state.lse, plain[1], exact[1], 1e-6)


@pytest.mark.parametrize("chunk", [64, 512, "auto"])
def test_any_chunk(chunk: int | str) -> None:
    for inputs in (BY_ID["window"].make(torch.float32), BY_ID["fan-gqa8"].make(torch.float32)):
        state, exact, plain = run(inputs, chunk=chunk), truth(inputs), truth(inputs, torch.float32)
        assert_close_enough(state.v, plain[0], exact[0], 1e-6)
        assert_close_enough(state.lse, plain[1], exact[1], 1e-6)


@pytest.mark.parametrize("heads", [(20, 1), (71, 1)])
def test_more_heads_than_a_tile_holds(heads: tuple[int, int]) -> None:
    inputs = AttentionCase("mqa", fan(70, 2, 3), *heads, 16, 24).make(torch.float32)
    exact, plain = truth(inputs), truth(inputs, torch.float32)
    assert_close_enough(run(inputs).v, plain[0], exact[0], 1e-6)


def test_rows_without_keys_are_zero() -> None:
    inputs = AttentionCase("padding", Forest(((-1, 3),), ((-1, 0), (0, 2), (-1, 5))), sinks=True).make(torch.float32)
    state = run(inputs)
    assert torch.equal(state.v[[0, 2]], torch.zeros_like(state.v[[0, 2]]))
    assert torch.equal(state.lse[[0, 2]], torch.full_like(state.lse[[0, 2]], float("-inf")))
    assert torch.isfinite(state.lse[1]).all()


def test_no_rows_and_no_keys() -> None:
    assert run(AttentionCase("none", Forest(((-1, 3),), ())).make(torch.float32)).v.shape == (0, 4, 64)
    state = run(AttentionCase("keyless", Forest((), ((-1, 0),))).make(torch.float32))
    assert torch.equal(state.v, torch.zeros(1, 4, 64))
    assert torch.equal(state.lse, torch.full((1, 4), float("-inf")))


def test_nan_stays_where_it_is_seen() -> None:
    """Keys of a sibling never leak into a row, whatever they hold; a row whose keys are all NaN is NaN."""
    inputs = AttentionCase("siblings", fan(70, 3, 4, rows=2)).make(torch.float32)
    clean = run(inputs).v
    last = inputs.plan_inputs["slots"][-1]  # last token of the last branch: seen by the last row only
    inputs.k_pool[last] = float("nan")
    inputs.v_pool[last] = float("nan")
    dirty = run(inputs).v
    assert torch.equal(dirty[:-2], clean[:-2])
    assert torch.isnan(dirty[-1]).all()
    inputs.k_pool.fill_(float("nan"))
    assert torch.isnan(run(inputs).v).all()


def test_out_is_written_and_returned() -> None:
    i = AttentionCase("out", fan(70, 2, 3), 6, 3, 24, 16).make(torch.float32)
    out = torch.empty(2, 6, 16)
    plan = i.plan()
    with torch.inference_mode():
        assert tree_attention(i.q, i.k_pool, i.v_pool, plan, out=out, **i.options) is out
        assert torch.equal(tree_attention(i.q, i.k_pool, i.v_pool, plan, **i.options), out)


@pytest.mark.parametrize(("heads", "dims", "error"), [(2, (300, 16), ShapeError), (2, (16, 0), ShapeError)])
def test_head_dim_out_of_range(heads: int, dims: tuple[int, int], error: type[Exception]) -> None:
    pool = torch.zeros(4, heads, dims[0]), torch.zeros(4, heads, dims[1])
    plan = ops.attention_plan(**chain(3, 1).plan_inputs(torch.arange(3, dtype=torch.int32)))
    with pytest.raises(error, match="head_dim"):
        tree_attention(torch.zeros(1, heads, dims[0]), *pool, plan, softmax_scale=1.0)


# Bits. numpy multiplies tiles of different shapes in different orders, so one tile shape serves both classes here; mma and
# wgmma tiles of a GPU differ alike, and there too only rows that land in the same tiles keep their bits.


@pytest.fixture
def one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = ops.choose_tiles

    def narrow_only(*shape: object) -> object:
        tiles = choose(*shape)  # type: ignore[arg-type]
        assert tiles.narrow is not None
        return tiles._replace(wide=tiles.narrow)

    monkeypatch.setattr(ops, "choose_tiles", narrow_only)


INVARIANT = [BY_ID[name] for name in ("step", "comb", "sinks-window")]


@pytest.mark.usefixtures("one_tile")
@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_bits_do_not_depend_on_splits(case: AttentionCase) -> None:
    inputs = case.make(torch.float32)
    cut = replace(inputs, plan_inputs=split_everywhere(case.forest, 5).plan_inputs(inputs.plan_inputs["slots"]))
    for whole, pieces in zip(run(inputs), run(cut), strict=True):
        assert torch.equal(whole, pieces)


@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_bits_depend_on_a_rows_tiles_alone(case: AttentionCase) -> None:
    """Wide and narrow tiles, as a GPU has them: rows that land in the same ones keep their bits, the others stay close."""
    inputs, g = case.make(torch.float32), torch.Generator().manual_seed(1)
    wanted, tiles = run(inputs), tiles_of_rows(inputs)
    kept = []
    for count in (3, len(tiles) // 2, len(tiles) - 1, len(tiles)):
        rows = torch.randperm(len(tiles), generator=g)[:count]
        forest = Forest(case.forest.segments, tuple(case.forest.rows[r] for r in rows.tolist()))
        some = replace(
            inputs, q=inputs.q[rows].contiguous(), plan_inputs=forest.plan_inputs(inputs.plan_inputs["slots"])
        )
        same = torch.tensor([a == tiles[r] for a, r in zip(tiles_of_rows(some), rows.tolist(), strict=True)])
        for part, whole in zip(run(some), wanted, strict=True):
            assert torch.equal(part[same], whole[rows[same]])
            torch.testing.assert_close(part, whole[rows], rtol=1e-5, atol=1e-6)
        kept.append(float(same.float().mean()))
    assert min(kept) < 1.0
    assert kept[-1] == 1.0


@pytest.mark.usefixtures("one_tile")
@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_bits_do_not_depend_on_other_rows(case: AttentionCase) -> None:
    """Rows left out, branches with them, and rows in another order."""
    inputs, g = case.make(torch.float32), torch.Generator().manual_seed(1)
    wanted = run(inputs)
    for count in (1, len(case.forest.rows) // 2, len(case.forest.rows)):
        rows = torch.randperm(len(case.forest.rows), generator=g)[:count]
        forest = Forest(case.forest.segments, tuple(case.forest.rows[r] for r in rows.tolist()))
        some = replace(
            inputs, q=inputs.q[rows].contiguous(), plan_inputs=forest.plan_inputs(inputs.plan_inputs["slots"])
        )
        state = run(some)
        assert torch.equal(state.v, wanted.v[rows])
        assert torch.equal(state.lse, wanted.lse[rows])


@pytest.mark.usefixtures("one_tile")
def test_bits_do_not_depend_on_folding(monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys of a chunk read by each branch for itself, against shared on up to four levels."""
    forest = Forest(
        ((-1, 70), (0, 140), (0, 20), *((1 + b % 2, 9 + b) for b in range(8))), tuple((3 + b, 8) for b in range(8))
    )
    inputs = AttentionCase("nested", forest, 2, 1, 32).make(torch.float32)
    states, counts = [], set()
    for levels in (1, 2, 4):
        build = functools.partial(ops.item_table, levels=levels)
        monkeypatch.setattr(ops, "item_table", build)
        states.append(run(inputs))
        monkeypatch.undo()
        monkeypatch.setenv("RAINKERNELS_LANE", "triton")
        counts.add(build(inputs.plan(), ops.choose_tiles(torch.float32, 32, 32, 2, 8), 256).num_items)
    assert len(counts) > 1
    for state in states[1:]:
        assert torch.equal(state.v, states[0].v)
        assert torch.equal(state.lse, states[0].lse)


# Static buffers, as a captured graph would use them: one set of addresses, one plan after another.


def make_buffers(**changes: int) -> AttentionBuffers:
    sizes = {"max_rows": 12, "max_items": 64, "max_keys": 2048, "max_partials": 128, "num_slots": 700} | changes
    return AttentionBuffers.create(
        **sizes, num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32, device="cpu"
    )


FORESTS = (fan(130, 6, 5), chain(300, 12), fan(40, 3, 70, rows=2), Forest((), ((-1, 0),)))


def padded(inputs: AttentionInputs, rows: int) -> Tensor:
    return torch.cat([inputs.q, torch.full((rows - inputs.q.shape[0], *inputs.q.shape[1:]), float("nan"))])


def test_buffers_take_one_plan_after_another() -> None:
    buffers = make_buffers()
    addresses = [t.data_ptr() for t in (buffers.table, *buffers.state)]
    for forest in FORESTS:
        inputs = AttentionCase("static", forest, 4, 2, 16).make(torch.float32)
        plan, wanted, rows = inputs.plan(), run(inputs), len(forest.rows)
        pools = [torch.cat([t, t.new_zeros(700 - t.shape[0], *t.shape[1:])]) for t in (inputs.k_pool, inputs.v_pool)]
        buffers.load(plan)
        out = torch.full((12, 4, 16), 7.0)
        state = tree_attention(
            padded(inputs, 12), *pools, plan, out=out, return_lse=True, buffers=buffers, **inputs.options
        )
        torch.testing.assert_close(out[:rows], wanted.v, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state.lse[:rows], wanted.lse)
        assert torch.equal(out[rows:], torch.zeros(12 - rows, 4, 16))
        assert torch.equal(state.lse[rows:], torch.full((12 - rows, 4), float("-inf")))
    assert addresses == [t.data_ptr() for t in (buffers.table, *buffers.state)]


def some_plan(forest: Forest = FORESTS[0]) -> AttentionPlan:
    return AttentionCase("static", forest, 4, 2, 16).make(torch.float32).plan()


@pytest.mark.parametrize("name", ["max_rows", "max_items", "max_keys", "max_partials"])
def test_a_plan_that_does_not_fit_is_refused(name: str) -> None:
    buffers = make_buffers(**{name: 3})
    buffers.load(small := some_plan(chain(3, 1)))
    with pytest.raises(RangeError, match=rf"{name} >= \d+, the buffers have 3"):
        buffers.load(some_plan())
    assert buffers.plan is small


def test_load_records_on_the_device_of_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another device current, the event would guard nothing and the next load could overwrite the staging memory."""
    current: list[object] = []
    seen: list[object] = []

    @contextlib.contextmanager
    def place(device: object) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    buffers = make_buffers()
    second = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device", place)
    monkeypatch.setattr(AttentionBuffers, "device", property(lambda self: second))
    buffers._copied = SimpleNamespace(  # type: ignore[assignment]
        synchronize=lambda: None, record=lambda: seen.extend([*current, int(buffers.table[0])])
    )
    buffers.load(some_plan())
    assert seen == [second, 6]  # recorded there, after the copy: the table's first word is the number of rows
    assert not current


def test_bad_buffers_and_calls_are_refused() -> None:
    with pytest.raises(RangeError, match="num_slots is 20"):
        make_buffers(num_slots=20).load(some_plan())
    with pytest.raises(RangeError, match="max_items is 0"):
        make_buffers(max_items=0)
    buffers, plan = make_buffers(), some_plan()
    with pytest.raises(DtypeError, match="attention_plan"):
        buffers.load(None)  # type: ignore[arg-type]
    q, pool = torch.zeros(12, 4, 16), torch.zeros(700, 2, 16)
    with pytest.raises(RangeError, match="load"):
        tree_attention(q, pool, pool, plan, softmax_scale=1.0, buffers=buffers)
    buffers.load(plan)
    tree_attention(q, pool, pool, plan, softmax_scale=1.0, buffers=buffers)
    bad: list[tuple[Tensor, Tensor, type[Exception], str]] = [
        (q[:5], pool, ShapeError, "pad the rows"),
        (q[:, :2].contiguous(), pool, ShapeError, "made for"),
        (q, pool[:600], ShapeError, "num_slots"),
        (q, torch.zeros(700, 1, 16), ShapeError, "made for"),
        (q.half(), pool.half(), DtypeError, "dtype"),
    ]
    for q_, pool_, error, text in bad:
        with pytest.raises(error, match=text):
            tree_attention(q_, pool_, pool_, plan, softmax_scale=1.0, buffers=buffers)
    with pytest.raises(DtypeError, match="buffers must"):
        tree_attention(q, pool, pool, plan, softmax_scale=1.0, buffers="none")  # type: ignore[call-overload]
    assert issubclass(DeviceError, ValueError)


def test_two_threads_never_share_partials() -> None:
    """A workspace is taken out of the plan while a call uses it."""
    inputs = BY_ID["one-row-one-token"].make(torch.float32)
    plan = inputs.plan()
    tree_attention(inputs.q, inputs.k_pool, inputs.v_pool, plan, **inputs.options)
    (state,) = plan._workspaces.values()
    tree_attention(inputs.q, inputs.k_pool, inputs.v_pool, plan, **inputs.options)
    assert list(plan._workspaces.values()) == [state]


# merge_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 4, 33), (70, 8, 64)])
def test_merge_state_matches_definition(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    g = torch.Generator().manual_seed(3)
    v_a, v_b = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    lse_a, lse_b = (30 * torch.randn(shape[:2], generator=g) for _ in range(2))
    merged = merge_state(v_a, lse_a, v_b, lse_b)
    exact = reference.merge_state(v_a.double(), lse_a.double(), v_b.double(), lse_b.double())
    plain = reference.merge_state(v_a, lse_a, v_b, lse_b)
    assert_close_enough(merged.v, plain[0], exact[0], 1e-6 if dtype == torch.float32 else ATOL[dtype])
    assert_close_enough(merged.lse, plain[1], exact[1], 5e-7)


def test_merge_state_with_empty_sides_and_in_place() -> None:
    inf = float("inf")
    v_a, v_b = torch.full((4, 1, 3), 2.0), torch.full((4, 1, 3), float("nan"))
    lse_a, lse_b = torch.tensor([[1.0], [-inf], [-inf], [0.0]]), torch.full((4, 1), -inf)
    v, lse = merge_state(v_a, lse_a, v_b, lse_b)
    assert torch.equal(v, torch.tensor([2.0, 0.0, 0.0, 2.0])[:, None, None].expand(4, 1, 3))
    assert torch.equal(lse, lse_a)
    merged = merge_state(v_a, lse_a, v_b, lse_b, out=(v_a, lse_a))
    assert merged.v is v_a
    assert torch.equal(v_a, v)
    assert merge_state(v_a[:0], lse_a[:0], v_b[:0], lse_b[:0]).v.shape == (0, 1, 3)


def test_aot_kernels_are_launchable_configurations() -> None:
    names = [kernel.name for kernel in lane.aot_kernels()]
    assert len(names) == len(set(names))
    for kernel in lane.aot_kernels():
        assert set(kernel.signature) | set(kernel.constexprs) == set(kernel.fn.arg_names)
        assert set(kernel.aligned) <= set(kernel.signature)
