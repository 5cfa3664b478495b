"""tree_attention: every lane against float64, bitwise invariance of the cpu lane, bad input, registration."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rainkernels.errors import DtypeError, RangeError, ShapeError, StrideError
from rainkernels.ops.attention import MergedState, attention_plan, tree_attention
from rainkernels.reference import attention as reference
from rainkernels.testing.cases_attention import (
    CASES,
    AttentionCase,
    AttentionInputs,
    Forest,
    chain,
    fan,
    split_everywhere,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_ID = {case.id: case for case in CASES}


@pytest.fixture(params=["cpu", "reference"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(i: AttentionInputs) -> MergedState:
    return tree_attention(i.q, i.k_pool, i.v_pool, i.plan(), sinks=i.sinks, return_lse=True, **i.options)


def truth(i: AttentionInputs, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The definition in `dtype`; float64 is the yardstick, the inputs' own dtype is plain PyTorch's error."""
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


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_definition(case: AttentionCase, dtype: torch.dtype, lane: str) -> None:
    inputs = case.make(dtype)
    state, exact, plain = run(inputs), truth(inputs), truth(inputs, dtype)
    assert state.v.dtype == dtype
    assert_close_enough(state.v, plain[0], exact[0], 1e-6)
    assert_close_enough(state.lse, plain[1], exact[1], 5e-7)


def test_definition_is_causal_attention() -> None:
    """One segment, all rows: the definition must be PyTorch's own causal attention."""
    i = AttentionCase("causal", chain(20, 20), 4, 2, 16, scattered=False).make(torch.float64)
    q, k, v = (t.transpose(0, 1)[None] for t in (i.q, i.k_pool[1:], i.v_pool[1:]))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(truth(i)[0], wanted[0].transpose(0, 1))


def test_rows_without_keys_are_zero(lane: str) -> None:
    inputs = AttentionCase("padding", Forest(((-1, 3),), ((-1, 0), (0, 2), (-1, 5))), sinks=True).make(torch.float32)
    state = run(inputs)
    assert torch.equal(state.v[[0, 2]], torch.zeros_like(state.v[[0, 2]]))
    assert torch.equal(state.lse[[0, 2]], torch.full_like(state.lse[[0, 2]], float("-inf")))
    assert torch.isfinite(state.lse[1]).all()


def test_no_rows_and_no_keys(lane: str) -> None:
    assert run(replace(AttentionCase("none", Forest(((-1, 3),), ())).make(torch.float32))).v.shape == (0, 4, 64)
    state = run(AttentionCase("keyless", Forest((), ((-1, 0),))).make(torch.float32))
    assert torch.equal(state.v, torch.zeros(1, 4, 64))


def test_nan_stays_where_it_is_seen() -> None:
    """Keys of a sibling, and of later tokens, never leak into a row, whatever they hold."""
    inputs = AttentionCase("siblings", fan(40, 3, 4, rows=2)).make(torch.float32)
    clean = run(inputs).v
    last = inputs.plan_inputs["slots"][-1]  # last token of the last branch: seen by the last row only
    inputs.k_pool[last] = float("nan")
    inputs.v_pool[last] = float("nan")
    dirty = run(inputs).v
    assert torch.equal(dirty[:-2], clean[:-2])
    assert torch.isnan(dirty[-1]).all()


def test_out_and_default_return(lane: str) -> None:
    i = BY_ID["step"].make(torch.bfloat16)
    out = torch.empty_like(i.q, memory_format=torch.contiguous_format)
    plan = i.plan()
    assert tree_attention(i.q, i.k_pool, i.v_pool, plan, out=out, **i.options) is out
    assert torch.equal(tree_attention(i.q, i.k_pool, i.v_pool, plan, **i.options), out)


# Bitwise invariance: the promise exact mode rests on.


INVARIANT = [
    BY_ID[name] for name in ("prefill", "fan-gqa8", "step", "comb", "window", "softcap", "sinks-window", "odd-dims")
]


@pytest.mark.parametrize("case", INVARIANT, ids=str)
@pytest.mark.parametrize("step", [1, 5, 64, 100])
def test_bits_do_not_depend_on_splits(case: AttentionCase, step: int) -> None:
    inputs = case.make(torch.float32)
    cut = replace(inputs, plan_inputs=split_everywhere(case.forest, step).plan_inputs(inputs.plan_inputs["slots"]))
    for whole, pieces in zip(run(inputs), run(cut), strict=True):
        assert torch.equal(whole, pieces)


@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_bits_do_not_depend_on_batch_order_or_slots(case: AttentionCase) -> None:
    inputs = case.make(torch.float32)
    wanted = run(inputs)
    g = torch.Generator().manual_seed(1)
    moved = torch.randperm(inputs.k_pool.shape[0], generator=g)
    home = torch.argsort(moved)
    for count in (1, 2, len(case.forest.rows) // 2, len(case.forest.rows)):
        rows = torch.randperm(len(case.forest.rows), generator=g)[:count]
        forest = Forest(case.forest.segments, tuple(case.forest.rows[r] for r in rows.tolist()))
        some = replace(
            inputs,
            q=inputs.q[rows],
            k_pool=inputs.k_pool[moved],
            v_pool=inputs.v_pool[moved],
            plan_inputs=forest.plan_inputs(home[inputs.plan_inputs["slots"].long()].to(torch.int32)),
        )
        state = run(some)
        assert torch.equal(state.v, wanted.v[rows])
        assert torch.equal(state.lse, wanted.lse[rows])


@pytest.mark.parametrize("case", [*INVARIANT, BY_ID["decode-long"]], ids=str)
def test_bits_do_not_depend_on_threads(case: AttentionCase) -> None:
    inputs = case.make(torch.float32)
    states = []
    for threads in (1, 2, 3, 8):  # one unit per thread, chunks dealt out, more threads than work
        torch.set_num_threads(threads)
        states.append(run(inputs))
    for state in states[1:]:
        assert torch.equal(state.v, states[0].v)
        assert torch.equal(state.lse, states[0].lse)


_DIGEST = """
import hashlib, torch
from rainkernels.ops.attention import tree_attention
from rainkernels.testing.cases_attention import CASES
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for case in CASES:
        i = case.make(dtype)
        for t in tree_attention(i.q, i.k_pool, i.v_pool, i.plan(), sinks=i.sinks, return_lse=True, **i.options):
            digest.update(t.view(torch.uint8).numpy().tobytes())
from rainkernels import _C
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


def test_plan_keeps_what_it_checked(lane: str) -> None:
    inputs = BY_ID["step"].make(torch.float32)
    plan, wanted = inputs.plan(), run(inputs).v
    for t in inputs.plan_inputs.values():
        t.fill_(1 << 30)
    assert torch.equal(tree_attention(inputs.q, inputs.k_pool, inputs.v_pool, plan, **inputs.options), wanted)


def test_plan_shared_by_two_threads() -> None:
    inputs = BY_ID["step"].make(torch.float32)
    plan, wanted = inputs.plan(), run(inputs).v
    results: list[Tensor] = []

    def work() -> None:
        for _ in range(20):
            results.append(tree_attention(inputs.q, inputs.k_pool, inputs.v_pool, plan, **inputs.options))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 40
    assert all(torch.equal(result, wanted) for result in results)


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    segments: list[tuple[int, int]] = []
    for s in range(draw(st.integers(1, 12))):
        up = draw(st.integers(-1, s - 1))
        segments.append((up, draw(st.integers(0, 9) | st.integers(120, 270))))
    filled = [s for s, (_, length) in enumerate(segments) if length]
    rows: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(1, 30))):
        s = draw(st.sampled_from([-1, *filled]))
        rows.append((s, draw(st.integers(0, segments[s][1] - 1)) if s >= 0 else 0))
    return Forest(tuple(segments), tuple(rows))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    forest=forests(),
    heads=st.sampled_from([(1, 1), (4, 2), (7, 1)]),
    dims=st.sampled_from([(16, 16), (33, 20), (8, 48)]),
    window=st.sampled_from([0, 0, 1, 17, 256, 300]),
    seed=st.integers(0, 99),
)
def test_random_forests(forest: Forest, heads: tuple[int, int], dims: tuple[int, int], window: int, seed: int) -> None:
    case = AttentionCase("random", forest, *heads, *dims, sliding_window=window)
    inputs = case.make(torch.float32, seed=seed)
    state, exact, plain = run(inputs), truth(inputs), truth(inputs, torch.float32)
    assert_close_enough(state.v, plain[0], exact[0], 1e-6)
    assert_close_enough(state.lse, plain[1], exact[1], 5e-7)
    cut = replace(inputs, plan_inputs=split_everywhere(forest, 3).plan_inputs(inputs.plan_inputs["slots"]))
    assert torch.equal(run(cut).v, state.v)


# Bad input

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


GOOD_PLAN = Forest(((-1, 4), (0, 3), (0, 2)), ((1, 2), (2, 0))).plan_inputs(torch.arange(9, dtype=torch.int32))
BAD_PLANS: list[tuple[str, dict[str, Tensor], type[Exception]]] = [
    ("segment_parent", {"segment_parent": ints(-1, 1, 0)}, RangeError),
    ("segment_parent", {"segment_parent": ints(-2, 0, 0)}, RangeError),
    ("segment_parent", {"segment_parent": GOOD_PLAN["segment_parent"].long()}, DtypeError),
    ("segment_start", {"segment_start": ints(0, 4, 3)}, RangeError),
    ("segment_start", {"segment_start": ints(1, 4, 4)}, RangeError),
    ("segment_start", {"segment_start": ints(0, 4)}, ShapeError),
    ("segment_slots_indptr", {"segment_slots_indptr": ints(1, 4, 7, 9)}, RangeError),
    ("segment_slots_indptr", {"segment_slots_indptr": ints(0, 4, 7, 8)}, RangeError),
    ("segment_slots_indptr", {"segment_slots_indptr": ints(0, 4, 12, 9)}, RangeError),
    ("segment_slots_indptr", {"segment_slots_indptr": ints(0, 4, 3, 9)}, RangeError),
    ("segment_slots_indptr", {"segment_slots_indptr": ints(0, 4, 7)}, ShapeError),
    ("slots", {"slots": ints(0, 1, 2, 3, 4, -5, 6, 7, 8)}, RangeError),
    ("slots", {"slots": torch.arange(18, dtype=torch.int32)[::2]}, StrideError),
    ("row_segment", {"row_segment": ints(1, 3)}, RangeError),
    ("row_segment", {"row_segment": ints(1, -2)}, RangeError),
    ("row_segment", {"row_segment": ints(1, 2)[:, None]}, ShapeError),
    ("row_position", {"row_position": ints(7, 4)}, RangeError),
    ("row_position", {"row_position": ints(3, 4)}, RangeError),
    ("row_position", {"row_position": ints(6)}, ShapeError),
]


@pytest.mark.parametrize(("name", "change", "error"), BAD_PLANS)
def test_bad_plan_is_refused(name: str, change: dict[str, Tensor], error: type[Exception], lane: str) -> None:
    with pytest.raises(error, match=name):
        attention_plan(**(GOOD_PLAN | change))


BAD_CALLS: list[tuple[str, dict[str, object], type[Exception]]] = [
    ("q", {"q": torch.zeros(2, 4, 8).double()}, DtypeError),
    ("q", {"q": [1.0]}, DtypeError),
    ("q", {"q": torch.zeros(2, 32)}, ShapeError),
    ("q", {"q": torch.zeros(3, 4, 8)}, ShapeError),
    ("q", {"q": torch.zeros(2, 3, 8)}, ShapeError),
    ("q", {"q": torch.zeros(2, 0, 8)}, ShapeError),
    ("q", {"q": torch.zeros(2, 8, 4).transpose(1, 2)}, StrideError),
    ("k_pool", {"k_pool": torch.zeros(9, 2, 16)}, ShapeError),
    ("k_pool", {"k_pool": torch.zeros(9, 2, 8).half()}, DtypeError),
    ("k_pool", {"k_pool": torch.zeros(2, 9, 8).transpose(0, 1)}, StrideError),
    ("v_pool", {"v_pool": torch.zeros(9, 1, 8)}, ShapeError),
    ("v_pool", {"v_pool": torch.zeros(8, 2, 8)}, ShapeError),
    ("v_pool", {"v_pool": torch.zeros(9, 2, 8).bfloat16()}, DtypeError),
    ("slot 8", {"k_pool": torch.zeros(8, 2, 8), "v_pool": torch.zeros(8, 2, 8)}, RangeError),
    ("plan", {"plan": GOOD_PLAN}, DtypeError),
    ("softmax_scale", {"softmax_scale": 0.0}, RangeError),
    ("softmax_scale", {"softmax_scale": float("nan")}, RangeError),
    ("softcap", {"softcap": -1.0}, RangeError),
    ("sliding_window", {"sliding_window": -1}, RangeError),
    ("sinks", {"sinks": torch.zeros(3)}, ShapeError),
    ("sinks", {"sinks": torch.zeros(4).double()}, DtypeError),
    ("out", {"out": torch.zeros(2, 4, 7)}, ShapeError),
    ("out", {"out": torch.zeros(4, 2, 8).transpose(0, 1)}, StrideError),
]


@pytest.mark.parametrize(("name", "change", "error"), BAD_CALLS)
def test_bad_call_is_refused(name: str, change: dict[str, object], error: type[Exception], lane: str) -> None:
    plan = attention_plan(**GOOD_PLAN)
    good = {"q": torch.zeros(2, 4, 8), "k_pool": torch.zeros(9, 2, 8), "v_pool": torch.zeros(9, 2, 8)}
    arguments: dict[str, object] = {**good, "plan": plan, "softmax_scale": 0.5}
    tree_attention(**arguments)  # type: ignore[call-overload]
    with pytest.raises(error, match=name):
        tree_attention(**(arguments | change))  # type: ignore[call-overload]


def test_registered_ops() -> None:
    i = BY_ID["step"].make(torch.float32)
    op = torch.ops.rainkernels.tree_attention
    torch.library.opcheck(op.default, (i.q, i.k_pool, i.v_pool, *i.plan_inputs.values(), 0.125, 0.0, 20, None))
    with torch.inference_mode():
        v, lse = op(i.q, i.k_pool, i.v_pool, *i.plan_inputs.values(), **i.options)
        wanted = run(i)
    assert torch.equal(v, wanted.v)
    assert torch.equal(lse, wanted.lse)
