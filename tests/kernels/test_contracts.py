"""What holds for all families alike: number types, float32's range, autograd, the lane asked for, layouts, buffers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rainkernels import DtypeError, LaneError, RangeError, ShapeError, StrideError, has_native
from rainkernels._lanes import requested_lane
from rainkernels.ops.attention import (
    AttentionBuffers,
    AttentionPlan,
    attention_plan,
    attention_traffic,
    merge_state,
    tree_attention,
)
from rainkernels.ops.edits import EditTable, add_edit_rmsnorm, edit_
from rainkernels.ops.kv import kv_copy, kv_write
from rainkernels.ops.logits import MixSample, Rank, mix_sample, rank
from rainkernels.reference import attention as reference

pytestmark = pytest.mark.skipif(not has_native(), reason="rainkernels._C is not built")


@pytest.fixture(params=["cpu", "reference"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def small_plan() -> AttentionPlan:
    return attention_plan(
        segment_parent=ints(-1), segment_start=ints(0), segment_slots_indptr=ints(0, 3), slots=ints(0, 1, 2),
        row_segment=ints(0, 0), row_position=ints(1, 2),
    )  # fmt: skip


def attend(plan: AttentionPlan | None = None, **options: Any) -> Tensor:
    pool = torch.ones(3, 2, 8)
    return tree_attention(
        torch.ones(2, 4, 8), pool, pool, plan or small_plan(), **({"softmax_scale": 0.5, "softcap": 1.0} | options)
    )


def normed(**options: Any) -> Tensor:
    return add_edit_rmsnorm(
        torch.ones(2, 8), torch.ones(2, 8), torch.ones(8), None, None, **({"eps": 0.5, "weight_offset": 1.0} | options)
    ).normed  # fmt: skip


# Numbers

REALS: list[tuple[Callable[..., Tensor], str]] = [
    (attend, "softmax_scale"), (attend, "softcap"), (normed, "eps"), (normed, "weight_offset"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "name"), REALS, ids=lambda v: v if isinstance(v, str) else "")
def test_reals_are_python_numbers_finite_in_float32(call: Callable[..., Tensor], name: str, lane: str) -> None:
    plan = {"plan": small_plan()} if call is attend else {}
    for good in (1, 1.0, np.float64(1.0), 3.4e38):
        call(**plan, **{name: good})
    for bad, kind in (
        (np.float32(1.0), "numpy.float32"), (np.int64(1), "numpy.int64"), (torch.tensor(1.0), "torch.Tensor"), (True, "bool"),
        ("1", "str"), (None, "NoneType"), (1j, "complex"), (np.ones(1), "numpy.ndarray"),
    ):  # fmt: skip
        with pytest.raises(DtypeError, match=f"^{name} must be a Python number, got {kind}$"):
            call(**plan, **{name: bad})
    for bad in (math.inf, -math.inf, math.nan, 1e39, -1e39, 10**40, 10**5000):
        with pytest.raises(RangeError, match=f"^{name} is .*finite in float32"):
            call(**plan, **{name: bad})


def test_a_positive_number_must_stay_positive_in_float32(lane: str) -> None:
    for call, name in REALS[:3]:
        call(**{name: 1.5e-45})
        with pytest.raises(RangeError, match=f"^{name} is 1e-46, which is 0 in float32"):
            call(**{name: 1e-46})
    normed(weight_offset=1e-46)
    normed(eps=0.0)
    attend(softcap=0)
    with pytest.raises(RangeError, match=r"softmax_scale is 0\.0"):
        attend(softmax_scale=0.0)


def test_counts_are_python_ints(lane: str) -> None:
    plan = small_plan()
    attend(plan, sliding_window=2, chunk=64)
    for name, value in (("sliding_window", 2), ("chunk", 64)):
        for bad in (float(value), np.int64(value), torch.tensor(value), True):
            with pytest.raises(DtypeError, match=f"^{name} must be a Python int"):
                attend(plan, **{name: bad})


# The lane asked for


def test_a_reused_plan_takes_the_lane_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    plain = reference.tree_attention
    monkeypatch.setattr(reference, "tree_attention", lambda *a, **k: calls.append("reference") or plain(*a, **k))
    plan = small_plan()
    monkeypatch.delenv("RAINKERNELS_LANE", raising=False)
    assert requested_lane() is None
    attend(plan)
    assert calls == []
    for wanted in (1, 2):
        monkeypatch.setenv("RAINKERNELS_LANE", "reference")
        attend(plan)
        assert len(calls) == wanted
        monkeypatch.setenv("RAINKERNELS_LANE", "cpu")
        attend(plan)
        assert len(calls) == wanted
    monkeypatch.setenv("RAINKERNELS_LANE", "cuda")
    with pytest.raises(LaneError, match="no such lane"):
        attend(plan)


# Autograd


def written() -> list[tuple[str, Callable[[Tensor], object], Tensor]]:
    """The argument that is written, a call with it, and what it may be."""
    table, slots = EditTable.create(2, 1, 8), ints(0, 1)
    table.set_slot(1, torch.eye(8)[:1], op="project", alpha=1.0)
    x, weight, k, lse = torch.ones(2, 8), torch.ones(8), torch.ones(2, 1, 8), torch.zeros(2, 1)
    logits, one, seed = torch.zeros(2, 8), torch.ones(2), torch.arange(2)
    sample = MixSample(ints(0, 0), torch.zeros(2), torch.zeros(2))

    def fused(residual: Tensor, out: Tensor | None = None) -> object:
        return add_edit_rmsnorm(x, residual, weight, table, slots, eps=1e-6, out=out)

    def draw(prob: Tensor) -> object:
        out = sample._replace(prob=prob)
        return mix_sample([logits], torch.ones(2, 1), temperature=one, seed=seed, position=seed, out=out)

    return [
        ("x", lambda t: edit_(t, table, slots), torch.ones(2, 8)),
        ("residual", fused, torch.ones(2, 8)),
        ("out", lambda t: fused(torch.ones(2, 8), t), torch.ones(2, 8)),
        ("k_pool", lambda t: kv_write(k, k, t, torch.zeros(3, 1, 8), slots), torch.zeros(3, 1, 8)),
        ("v_pool", lambda t: kv_write(k, k, torch.zeros(3, 1, 8), t, slots), torch.zeros(3, 1, 8)),
        ("k_pool", lambda t: kv_copy(t, torch.zeros(3, 1, 8), slots, slots), torch.zeros(3, 1, 8)),
        ("v_pool", lambda t: kv_copy(torch.zeros(3, 1, 8), t, slots, slots), torch.zeros(3, 1, 8)),
        ("out", lambda t: attend(out=t), torch.zeros(2, 4, 8)),
        (r"out\[0\]", lambda t: merge_state(k, lse, k, lse, out=(t, lse.clone())), torch.zeros(2, 1, 8)),
        ("out.prob", draw, torch.zeros(2)),
        (
            "out.kl",
            lambda t: rank(logits, logits, slots, out=Rank(slots.clone(), t, lse[:, 0], lse[:, 0])),
            torch.zeros(2),
        ),
    ]


@pytest.mark.parametrize("at", range(len(written())))
def test_what_is_written_may_not_require_grad(at: int, lane: str) -> None:
    name, call, good = written()[at]
    call(good.clone())
    leaf = good.clone().requires_grad_()
    for t in (leaf, leaf * 1):
        for _ in range(2):
            with pytest.raises(DtypeError, match=rf"^{name} requires grad .*\.detach\(\).*no_grad.*inference_mode"):
                call(t)
        assert torch.equal(t, good)
        with torch.no_grad():
            call(t)
        with pytest.raises(DtypeError, match="requires grad"):
            call(t)
    call((leaf * 1).detach())
    with torch.inference_mode():
        call(good.clone())


def test_what_is_read_may_require_grad_and_gives_none(lane: str) -> None:
    x, residual, weight = torch.ones(2, 8, requires_grad=True), torch.ones(2, 8), torch.ones(8, requires_grad=True)
    for _ in range(2):
        result = add_edit_rmsnorm(x, residual, weight, None, None, eps=1e-6, out=torch.zeros(2, 8))
        assert not result.normed.requires_grad
        assert not residual.requires_grad
    pool, k = torch.zeros(3, 1, 8), torch.ones(2, 1, 8, requires_grad=True)
    kv_write(k, k, pool, pool.clone(), ints(0, 1))
    assert not pool.requires_grad
    q = torch.ones(2, 4, 8, requires_grad=True)
    assert not tree_attention(q, pool, pool, small_plan(), softmax_scale=0.5).requires_grad
    lse = torch.zeros(2, 4, requires_grad=True)
    assert not merge_state(q, lse, q, lse).v.requires_grad


# Layouts


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_compressed_sparse_tensors_are_refused(lane: str) -> None:
    x, sparse, slots = torch.ones(2, 8), torch.ones(2, 8).to_sparse_csr(), ints(0, 1)
    table = EditTable.create(2, 1, 8)
    for _ in range(2):
        with pytest.raises(StrideError, match=r"x has layout torch\.sparse_csr"):
            edit_(sparse, table, slots)
        with pytest.raises(StrideError, match=r"residual has layout torch\.sparse_csr"):
            add_edit_rmsnorm(x, sparse, torch.ones(8), None, None, eps=1e-6)
        with pytest.raises(StrideError, match=r"logits\[0\] has layout torch\.sparse_csr"):
            mix_sample([sparse], torch.ones(2, 1), temperature=torch.ones(2), seed=slots.long(), position=slots.long())
        with pytest.raises(ShapeError, match="k has"):
            kv_write(sparse, sparse, torch.zeros(2, 1, 8), torch.zeros(2, 1, 8), slots)
        with pytest.raises(ShapeError, match="q has"):
            tree_attention(sparse, torch.ones(3, 2, 8), torch.ones(3, 2, 8), small_plan(), softmax_scale=0.5)
        edit_(x, table, slots)


# Buffers and traffic

SIZES: dict[str, Any] = {
    "max_rows": 2, "max_items": 8, "max_keys": 64, "max_partials": 8, "num_slots": 3, "num_qo_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "dtype": torch.float32, "device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"max_rows": 1.5}, DtypeError), ({"max_items": True}, DtypeError), ({"num_slots": 0}, RangeError),
        ({"max_keys": 1 << 31}, RangeError), ({"head_dim": 16.0}, DtypeError), ({"head_dim": 0}, RangeError),
        ({"head_dim_v": 100_000}, RangeError), ({"levels": "a"}, DtypeError), ({"levels": 5}, RangeError),
        ({"num_kv_heads": 0}, RangeError), ({"num_qo_heads": 5}, ShapeError), ({"num_qo_heads": "4"}, DtypeError),
        ({"dtype": torch.float64}, DtypeError), ({"chunk": 64.0}, DtypeError), ({"chunk": 65}, RangeError),
    ],
    ids=str,
)  # fmt: skip
def test_bad_buffers_are_named(change: dict[str, Any], error: type[Exception], lane: str) -> None:
    with pytest.raises(error, match=next(iter(change))):
        AttentionBuffers.create(**(SIZES | change))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"num_kv_heads": 0}, RangeError), ({"num_qo_heads": 0}, RangeError), ({"num_qo_heads": 5}, ShapeError),
        ({"num_kv_heads": 2.0}, DtypeError), ({"head_dim": "8"}, DtypeError), ({"dtype": torch.float64}, DtypeError),
        ({"chunk": None}, DtypeError), ({"chunk": 100}, RangeError), ({"plan": None}, DtypeError),
    ],
    ids=str,
)  # fmt: skip
def test_bad_traffic_is_named(change: dict[str, Any], error: type[Exception], lane: str) -> None:
    good: dict[str, Any] = {"plan": small_plan(), "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    assert attention_traffic(**good).num_items > 0
    with pytest.raises(error, match=next(iter(change))):
        attention_traffic(**(good | change))


def test_buffers_keep_their_chunk_and_their_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here reaches a kernel: the buffers are made as the interpreter's, and every call is refused."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("RAINKERNELS_LANE", "triton")
    try:
        buffers = AttentionBuffers.create(**SIZES, chunk=128)
    except LaneError as error:
        pytest.skip(str(error))
    plan = small_plan()
    buffers.load(plan)
    for chunk in (256, 64, "auto"):
        with pytest.raises(RangeError, match="the buffers were made for 128"):
            attend(plan, buffers=buffers, chunk=chunk)
    monkeypatch.setenv("RAINKERNELS_LANE", "cpu")
    for chunk in (None, 128):
        with pytest.raises(LaneError, match="buffers are for the triton lane"):
            attend(plan, buffers=buffers, chunk=chunk)
