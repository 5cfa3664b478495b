"""Right calls of the edits ops for the fuzz tests, and tables made of tensors that may hold anything."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from fuzz import Call, FuzzOp, ints, randn, same_within

from rainkernels.ops.edits import BasisTable, EditTable, add_edit_rmsnorm, edit_

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PRIVATE = ("directions", "scale", "gram", "op", "alpha", "target", "count", "norm")
SHARED = ("basis", "scale", "op", "alpha", "target", "norm")
OPS_OF_A_SLOT = ("project", "boost", "set", "add", "tanh")


def table_tensors(rng: Random, hidden: int, slots: int) -> Call:
    """The tensors of a filled table of either kind."""
    dtype, k = rng.choice(FLOATS), rng.choice([1, 2, 5])
    if rng.random() < 0.5:
        table = EditTable.create(slots, k, hidden, dtype=dtype)
        for s in range(1, slots):
            n = rng.randint(1, k)
            names = [rng.choice(OPS_OF_A_SLOT) for _ in range(n)]
            table.set_slot(s, randn(rng, n, hidden), op=names, alpha=0.5, norm=rng.choice(["none", "preserve", "cap"]))
        return {name: getattr(table, name) for name in PRIVATE}
    shared = BasisTable.create(slots, randn(rng, k, hidden), dtype=dtype)
    for s in range(1, slots):
        shared.set_slot(s, alpha=[rng.choice([0.0, 0.3]) for _ in range(k)], op=rng.choice(OPS_OF_A_SLOT))
    return {name: getattr(shared, name) for name in SHARED}


def table_of(call: Call) -> EditTable | BasisTable:
    """Takes the table's tensors out of the call."""
    kind, names = (BasisTable, SHARED) if "basis" in call else (EditTable, PRIVATE)
    return kind(**{name: call.pop(name) for name in names if name in call})


def edit_call(rng: Random) -> Call:
    rows, hidden, slots = rng.choice([0, 1, 3]), rng.choice([1, 16, 37]), rng.choice([1, 3])
    x, at = randn(rng, rows, hidden, dtype=rng.choice(FLOATS)), ints([rng.randrange(slots) for _ in range(rows)])
    return {"x": x, "slots": at} | table_tensors(rng, hidden, slots)


def edit(**call: Any) -> Any:
    return edit_(table=table_of(call), **call)


def norm_call(rng: Random) -> Call:
    call = edit_call(rng)
    x = call["x"]
    return call | {
        "residual": randn(rng, *x.shape, dtype=x.dtype), "weight": randn(rng, x.shape[1], dtype=x.dtype),
        "eps": rng.choice([1e-6, 1e-5]), "tap": rng.choice(["mlp_out", "block_out"]),
        "weight_offset": rng.choice([0.0, 1.0]), "cast": rng.choice(["llama", "gemma"]),
        "out": rng.choice([None, torch.zeros_like(x)]),
    }  # fmt: skip


def plain_norm_call(rng: Random) -> Call:
    """Without an edit."""
    call = norm_call(rng)
    table_of(call)
    return call | {"table": None, "slots": None}


def normed(**call: Any) -> Any:
    return add_edit_rmsnorm(table=table_of(call), **call)


_CLOSE = same_within({torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-9})
OPS = {
    "edit_": FuzzOp(edit_call, edit, also_named=("table",), same=_CLOSE, derived=("gram",)),
    "add_edit_rmsnorm": FuzzOp(norm_call, normed, also_named=("table",), same=_CLOSE, derived=("gram",)),
    "add_rmsnorm": FuzzOp(plain_norm_call, add_edit_rmsnorm, same=_CLOSE),
}
