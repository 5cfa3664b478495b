"""Right calls of the kv and attention ops for the fuzz tests."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from fuzz import Call, FuzzOp, ints, randn, same_within
from torch import Tensor

from rainkernels.ops.attention import attention_plan, merge_state, tree_attention
from rainkernels.ops.kv import kv_copy, kv_write

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PLAN = ("segment_parent", "segment_start", "segment_slots_indptr", "slots", "row_segment", "row_position")


def write_call(rng: Random) -> Call:
    tokens, heads, slots = rng.choice([0, 1, 2, 5]), rng.choice([1, 2, 3]), rng.choice([1, 4, 9])
    dim, dim_v, dtype = rng.choice([1, 2, 7, 16]), rng.choice([1, 5, 16]), rng.choice(FLOATS)
    return {
        "k": randn(rng, tokens, heads, dim, dtype=dtype), "v": randn(rng, tokens, heads, dim_v, dtype=dtype),
        "k_pool": randn(rng, slots, heads, dim, dtype=dtype), "v_pool": randn(rng, slots, heads, dim_v, dtype=dtype),
        "slot_mapping": ints([rng.randrange(-1, slots) for _ in range(tokens)]),
    }  # fmt: skip


def copy_call(rng: Random) -> Call:
    made = write_call(rng)
    slots = made["k_pool"].shape[0]
    n = min(rng.choice([0, 1, 3]), slots + 1)
    return {
        "k_pool": made["k_pool"], "v_pool": made["v_pool"],
        "src": ints([rng.randrange(slots) for _ in range(n)]), "dst": ints([-1, *rng.sample(range(slots), slots)][:n]),
    }  # fmt: skip


def plan_call(rng: Random) -> Call:
    """A forest of segments with a few rows, some of them padding."""
    parent, start, length = [], [], []
    for s in range(rng.choice([0, 1, 2, 4])):
        parent.append(rng.randrange(-1, s) if s else -1)
        start.append(0 if parent[s] < 0 else start[parent[s]] + length[parent[s]])
        length.append(rng.choice([0, 1, 3, 20]))
    indptr = [sum(length[:s]) for s in range(len(length) + 1)]
    rows = []
    for _ in range(rng.choice([0, 1, 3])):
        s = rng.randrange(-1, len(parent))
        inside = s >= 0 and length[s] > 0
        rows.append((s, start[s] + rng.randrange(length[s])) if inside else (-1, rng.choice([0, 5, -1])))
    slots = [rng.randrange(24) for _ in range(indptr[-1])]
    columns = (parent, start, indptr, slots, [s for s, _ in rows], [p for _, p in rows])
    return dict(zip(PLAN, map(ints, columns), strict=True))


def attention_call(rng: Random) -> Call:
    plan = plan_call(rng)
    kv_heads, group, dtype = rng.choice([1, 2]), rng.choice([1, 3, 4]), rng.choice(FLOATS)
    dim, dim_v = rng.choice([1, 8, 17, 64]), rng.choice([1, 16, 33])
    rows, heads = plan["row_segment"].shape[0], kv_heads * group
    return plan | {
        "q": randn(rng, rows, heads, dim, dtype=dtype), "k_pool": randn(rng, 24, kv_heads, dim, dtype=dtype),
        "v_pool": randn(rng, 24, kv_heads, dim_v, dtype=dtype), "softmax_scale": dim**-0.5,
        "softcap": rng.choice([0.0, 5.0]), "sliding_window": rng.choice([0, 0, 2, 100]),
        "sinks": rng.choice([None, randn(rng, heads)]),
        "out": rng.choice([None, torch.empty(rows, heads, dim_v, dtype=dtype).zero_()]),
        "return_lse": rng.choice([False, True]),
    }  # fmt: skip


def attend(**call: Any) -> Any:
    plan = attention_plan(**{name: call.pop(name) for name in PLAN if name in call})
    return tree_attention(plan=plan, **call)


def make_plan(**call: Any) -> list[Tensor]:
    plan = attention_plan(**call)
    return [getattr(plan, name) for name in PLAN]


def merge_call(rng: Random) -> Call:
    tokens, heads, dim, dtype = rng.choice([0, 1, 3]), rng.choice([1, 2]), rng.choice([1, 5, 32]), rng.choice(FLOATS)
    call: Call = {}
    for side in "ab":
        call[f"v_{side}"] = randn(rng, tokens, heads, dim, dtype=dtype)
        lse = 5 * randn(rng, tokens, heads)
        call[f"lse_{side}"] = torch.where(lse > 4, -torch.inf, lse)
    outputs = torch.zeros(tokens, heads, dim, dtype=dtype), torch.zeros(tokens, heads)
    return call | {"out": rng.choice([None, outputs])}


_CLOSE = same_within({torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3})
OPS = {
    "kv_write": FuzzOp(write_call, kv_write),
    "kv_copy": FuzzOp(copy_call, kv_copy),
    "attention_plan": FuzzOp(plan_call, make_plan),
    "tree_attention": FuzzOp(attention_call, attend, also_named=("plan",), same=_CLOSE),
    "merge_state": FuzzOp(merge_call, merge_state, same=_CLOSE),
}
