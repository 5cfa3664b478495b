"""Hostile input: corrupt forests, rebuilt plans, lazy views, foreign devices and things that are no tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rainkernels import DeviceError, DtypeError, RangeError, ShapeError, StrideError, has_native
from rainkernels._forest import FIELDS
from rainkernels.ops import tree
from rainkernels.ops.attention import AttentionPlan, attention_plan, merge_state, tree_attention
from rainkernels.ops.kv import kv_copy, kv_write

pytestmark = pytest.mark.skipif(not has_native(), reason="rainkernels._C is not built")
CONFIG = tree.TreeConfig(max_rows=4, max_children=3, max_embeddings=5, embedding_dim=8, max_depth=4)
HUGE = 10**9


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def forest_fields() -> dict[str, Tensor]:
    """A tree with a root of three children, the second expanded again."""
    forest = tree.Forest.create(1, CONFIG)
    for node in (0, 4):
        tree.expand(forest, ints(0), ints(node), torch.full((1, 3), 0.3), ints(3), ints(1))
    return {name: t.clone() for (name, _), t in zip(FIELDS, forest.tensors, strict=True)}


def put(name: str, at: tuple[int, ...], value: int) -> Callable[[dict[str, Tensor]], None]:
    def change(fields: dict[str, Tensor]) -> None:
        fields[name][at] = value

    return change


CORRUPT: list[tuple[str, Callable[[dict[str, Tensor]], None]]] = [
    ("child_row", lambda f: f["child_row"].fill_(HUGE)),  # type: ignore[list-item]
    ("child_row", put("child_row", (0, 0), 5)),
    ("child_row", put("child_row", (0, 0), -2)),
    ("child_row", put("child_row", (0, 3), 1)),
    ("child_row", put("child_row", (0, 0), 0)),
    ("embedding_of", put("embedding_of", (0, 3), 5)),
    ("embedding_of", put("embedding_of", (0, 3), 0)),
    ("owner", put("owner", (0, 1), 15)),
    ("owner", put("owner", (0, 1), -3)),
    ("count", put("count", (0, 1), 4)),
    ("count", put("count", (0, 1), 0)),
    ("count", put("count", (0, 1), -1)),
    ("set_length", put("set_length", (0, 1), -1)),
    ("free_rows", put("free_rows", (0, 0), 5)),
    ("free_rows", put("free_rows", (0, 0), 1)),
    ("free_rows", put("free_rows", (0, 0), 3)),
    ("free_embeddings", put("free_embeddings", (0, 0), 5)),
    ("in_flight", put("in_flight", (0, 0), -1)),
    ("header root", put("header", (0, 0), 15)),
    ("header free rows", put("header", (0, 1), 5)),
    ("free_rows", put("header", (0, 1), 4)),
    ("header free embeddings", put("header", (0, 2), 6)),
    ("header in_flight", put("header", (0, 3), -1)),
]


@pytest.mark.parametrize(("name", "change"), CORRUPT)
def test_corrupt_forest_is_refused(name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    fields = forest_fields()
    torch.ops.rainkernels.tree_select(list(fields.values()), CONFIG.as_floats(), ints(0))
    change(fields)
    with pytest.raises(RangeError, match=name):
        torch.ops.rainkernels.tree_select(list(fields.values()), CONFIG.as_floats(), ints(0))
    with pytest.raises(RangeError, match=name):
        tree.Forest(CONFIG, list(fields.values()))


def test_ring_and_long_path_are_refused() -> None:
    fields = forest_fields()
    # Rows 1 and 2 hang below each other, out of reach of the root.
    fields["owner"][0, 1], fields["child_row"][0, 7], fields["child_row"][0, 0] = 7, 1, -1
    with pytest.raises(RangeError, match="ring"):
        tree.Forest(CONFIG, list(fields.values()))
    with pytest.raises(RangeError, match="owner gives a path"):
        tree.Forest(replace(CONFIG, max_depth=2), list(forest_fields().values()))
    assert tree.Forest(replace(CONFIG, max_depth=3), list(forest_fields().values())).num_trees == 1


def plan_tensors() -> dict[str, Tensor]:
    return {
        "segment_parent": ints(-1, 0), "segment_start": ints(0, 2), "segment_slots_indptr": ints(0, 2, 4),
        "slots": ints(0, 1, 2, 3), "row_segment": ints(1, 0), "row_position": ints(3, 1),
    }  # fmt: skip


def attend(plan: AttentionPlan, q_rows: int = 2) -> Tensor:
    pool = torch.arange(64.0).reshape(4, 2, 8) / 64
    return tree_attention(torch.ones(q_rows, 4, 8), pool, pool, plan, softmax_scale=0.3)


@pytest.mark.parametrize("lane", ["cpu", "reference"])
def test_rebuilt_plan_is_checked_and_shares_nothing(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAINKERNELS_LANE", lane)
    plan = attention_plan(**plan_tensors())
    before = attend(plan)
    with pytest.raises(RangeError, match="slots"):
        replace(plan, slots=ints(0, 1, -2, 3))
    with pytest.raises(RangeError, match="row_segment"):
        replace(plan, row_segment=ints(1, HUGE))
    with pytest.raises(ShapeError, match="rows"):
        replace(plan, row_segment=ints(1), row_position=ints(3))
    with pytest.raises(DtypeError, match="slots"):
        replace(plan, slots=plan.slots.long())
    far = replace(plan, slots=ints(0, 1, 2, HUGE), max_slot=3, _layouts={}, _calls={}, _gather={})
    assert far.max_slot == HUGE
    with pytest.raises(RangeError, match=f"slot {HUGE}"):
        attend(far)
    swapped = replace(plan, slots=ints(3, 2, 1, 0))
    assert not torch.equal(attend(swapped)[1], before[1])
    assert torch.equal(attend(plan), before)


@pytest.mark.parametrize("lane", ["cpu", "reference"])
@pytest.mark.parametrize("value", [HUGE, -1])
def test_plan_written_before_its_first_use_is_refused(value: int, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAINKERNELS_LANE", lane)
    plan = attention_plan(**plan_tensors())
    plan.slots[2] = value
    with pytest.raises(RangeError, match="slots"):
        attend(plan)


def test_lazy_views_are_refused_by_every_family() -> None:
    k, pool, slots = torch.ones(2, 2, 8), torch.zeros(4, 2, 8), ints(0, 1)
    lazy = torch._neg_view(k)
    kv_write(k, k, pool, pool.clone(), slots)  # the same shapes pass first: a remembered signature must not let it in
    for arguments in ((lazy, k, slots), (k, lazy, slots), (k, k, torch._neg_view(slots))):
        with pytest.raises(StrideError, match="resolve_neg"):
            kv_write(arguments[0], arguments[1], pool, pool.clone(), arguments[2])
    with pytest.raises(StrideError, match="k_pool is a lazy"):
        kv_write(k, k, torch._neg_view(pool), pool.clone(), slots)
    plan, q, kv = attention_plan(**plan_tensors()), torch.ones(2, 4, 8), torch.zeros(4, 2, 8)
    tree_attention(q, kv, kv, plan, softmax_scale=0.3)
    with pytest.raises(StrideError, match="q is a lazy"):
        tree_attention(torch._neg_view(q), kv, kv, plan, softmax_scale=0.3)
    lse = torch.zeros(2, 4)
    with pytest.raises(StrideError, match="v_b is a lazy"):
        merge_state(q, lse, torch._neg_view(q), lse)
    with pytest.raises(StrideError, match="tree_ids is a lazy"):
        tree.select(tree.Forest.create(1, CONFIG), torch._neg_view(ints(0)))


def test_what_is_no_tensor_or_no_forest_is_named() -> None:
    pool = torch.zeros(4, 2, 8)
    with pytest.raises(DtypeError, match="k_pool must be"):
        kv_copy(None, pool, ints(0), ints(1))  # type: ignore[arg-type]
    for call in (tree.select, tree.best_child):
        with pytest.raises(DtypeError, match="forest must be"):
            call(None, ints(0))  # type: ignore[operator]
    with pytest.raises(DtypeError, match="forest must be"):
        tree.children(None, 0, 0)  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match="forest must be"):
        tree.node_stats(None, 0, [0])  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match="visits must be"):
        tree.Forest(CONFIG, [None] * len(FIELDS))  # type: ignore[list-item]


def test_other_devices_are_refused() -> None:
    pool, slots = torch.zeros(4, 2, 8, device="meta"), torch.zeros(2, dtype=torch.int32, device="meta")
    with pytest.raises(DeviceError, match="meta"):
        kv_write(pool[:2], pool[:2], pool, pool, slots)
    with pytest.raises(DeviceError, match="meta"):
        kv_copy(pool, pool, slots, slots)
    with pytest.raises(DeviceError, match="meta"):
        tree.Forest(CONFIG, [t.to("meta") for t in forest_fields().values()])
    with pytest.raises(DeviceError, match="meta"):
        tree.Forest.create(1, CONFIG, device="meta")
    with pytest.raises(DeviceError, match="meta"):
        tree_attention(pool[:2], pool, pool, attention_plan(**plan_tensors()), softmax_scale=0.3)
    state = torch.zeros(2, 4, device="meta")
    with pytest.raises(DeviceError, match="meta"):
        merge_state(pool[:2], state[:, :2], pool[:2], state[:, :2])


def test_sparse_tensors_are_refused_even_after_a_dense_call_of_their_shape() -> None:
    k, slots = torch.ones(2, 1, 4), ints(0, 1)
    pools = torch.zeros(3, 1, 4), torch.zeros(3, 1, 4)
    kv_write(k, k, *pools, slots)
    with pytest.raises(StrideError, match=r"k has layout torch\.sparse_coo"):
        kv_write(k.to_sparse(), k, *pools, slots)
    with pytest.raises(StrideError, match=r"v has layout torch\.sparse_coo"):
        kv_write(k, k.to_sparse(), *pools, slots)
    with pytest.raises(StrideError, match=r"src has layout torch\.sparse_coo"):
        kv_copy(*pools, slots.to_sparse(), slots)
