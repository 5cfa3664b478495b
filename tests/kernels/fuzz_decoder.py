"""Right calls of the decoder ops for the fuzz tests: small stacks, their adapters, steps of several members, edits, captures.

Every tensor has memory of its own size, the workspace too: under AddressSanitizer a step past the end of any is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from random import Random
from typing import Any
from unittest import mock

import torch
from fuzz import Call, FuzzOp, ints, randn, same_within
from fuzz_edits import PRIVATE, SHARED, table_of, table_tensors
from fuzz_kv import PLAN
from torch import Tensor

from rainkernels._decoder_weights import UPDATED
from rainkernels.ops import decoder
from rainkernels.ops._decoder_edits import TAPS
from rainkernels.ops.attention import attention_plan
from rainkernels.ops.decoder import (
    BlockUpdate,
    Capture,
    DecoderStack,
    EditSite,
    LinearWeight,
    LowRank,
    StackWeights,
    StepPart,
    linear_rows,
)
from rainkernels.testing.cases_decoder import DecoderCase, rotary

Columns = dict[str, Tensor]  # the tensors of a plan


# Stacks


def random_case(rng: Random) -> DecoderCase:
    """Odd sizes; now and then a product longer than a piece or wide enough for a second thread, or many rows."""
    kv_heads, hidden = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 5, 16, 33, 47, 130])
    wide = rng.choice(["hidden", "intermediate", "heads", "rows"]) if rng.random() < 0.16 else "fuzz"
    return DecoderCase(
        wide,
        num_qo_heads=kv_heads * rng.choice([1, 2, 3]),
        num_kv_heads=kv_heads,
        head_dim=rng.choice([258, 320])
        if wide == "heads"
        else rng.choice([34, 64] if wide == "rows" else [2, 6, 8, 16, 18, 34, 64]),
        hidden=rng.choice([513, 1030]) if wide == "hidden" else hidden,
        intermediate=rng.choice([515, 1100]) if wide == "intermediate" else rng.choice([0, 1, 3, 15, 16, 37, 90, 129]),
        vocab=rng.choice([1, 7, 31, 32, 65, 130]),
        num_blocks=rng.choice([1, 1, 2, 3]),
        bias=rng.random() < 0.5,
        head_bias=rng.random() < 0.5,
        head_norms=rng.random() < 0.5,
        sinks=rng.random() < 0.5,
        softcap=rng.choice([0.0, 2.0]),
        windows=rng.choice([(), (1,), (3, 0), (0, 300)]),
        # A norm of few numbers near 0 magnifies what two lanes round differently by eps^-1/2.
        eps=1e-2 if hidden < 16 else rng.choice([1e-6, 1e-2]),
    )


def random_adapter(rng: Random, case: DecoderCase) -> tuple[BlockUpdate, ...]:
    """Updates of some products of some blocks, in up to three parts each, in any order."""
    queries, keys = case.num_qo_heads * case.head_dim, case.num_kv_heads * case.head_dim
    shapes = {
        "qkv": (queries + 2 * keys, case.hidden), "out": (case.hidden, queries),
        "gate_up": (2 * case.intermediate, case.hidden), "down": (case.hidden, case.intermediate),
    }  # fmt: skip

    def parts(outputs: int, inputs: int) -> tuple[LowRank, ...]:
        if not outputs or rng.random() < 0.4:
            return ()
        ends = sorted(rng.sample(range(1, outputs + 1), min(outputs, rng.choice([1, 2, 3]))))
        made = []
        for start, end in zip([0, *ends], ends, strict=False):
            first, rank = rng.randrange(start, end), rng.choice([1, 2, 3, 7, 15, 16, 17, 20])
            down, up = randn(rng, rank, inputs), randn(rng, end - first, rank)
            made.append(LowRank(down * max(inputs, 1) ** -0.5, up * rank**-0.5, first, rng.choice([0.5, -1.0, 0.0])))
        return tuple(rng.sample(made, len(made)))

    return tuple(BlockUpdate(**{name: parts(*s) for name, s in shapes.items()}) for _ in range(case.num_blocks))


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of weights or updates, in one order."""
    if is_dataclass(value):
        value = tuple(getattr(value, f.name) for f in fields(value))
    if isinstance(value, tuple | list):
        return [t for v in value for t in tensors_of(v)]
    return [value] if isinstance(value, Tensor) else []


def with_tensors(value: Any, tensors: Iterator[Any]) -> Any:
    """The same weights or updates, made of other tensors."""
    if isinstance(value, Tensor):
        return next(tensors)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: with_tensors(getattr(value, f.name), tensors) for f in fields(value)})
    if isinstance(value, tuple):
        items = [with_tensors(v, tensors) for v in value]
        return value._make(items) if hasattr(value, "_make") else tuple(items)
    return value


def listed(value: Any, otherwise: list[Any]) -> list[Any]:
    """The list a change left; a list of tensors one of which is none already may have become a number."""
    return value if isinstance(value, list) else otherwise


# Steps


def random_plan(rng: Random, rows: int, num_slots: int) -> Columns:
    """A forest of segments over any slots but 0, and rows anywhere in it; some see nothing."""
    parent: list[int] = []
    start: list[int] = []
    length: list[int] = []
    for s in range(rng.choice([0, 1, 2, 5])):
        parent.append(rng.randrange(-1, s) if s else -1)
        start.append(0 if parent[s] < 0 else start[parent[s]] + length[parent[s]])
        length.append(rng.choice([0, 1, 3, 17, 40]))
    indptr = [sum(length[:s]) for s in range(len(length) + 1)]
    seen = [s for s, n in enumerate(length) if n]
    at = [rng.choice(seen) if seen and rng.random() < 0.9 else -1 for _ in range(rows)]
    position = [start[s] + rng.randrange(length[s]) if s >= 0 else 0 for s in at]
    slots = [rng.randrange(1, num_slots) for _ in range(indptr[-1])]
    return dict(zip(PLAN, map(ints, (parent, start, indptr, slots, at, position)), strict=True))


def below(rng: Random, limit: int, n: int) -> Tensor:
    """Numbers from 0 on, the last one often: one more is a wrong call."""
    return torch.tensor([rng.choice([limit - 1, rng.randrange(limit)]) for _ in range(n)], dtype=torch.int64)


def random_edits(rng: Random, case: DecoderCase, rows: int) -> Call:
    """Sites in any order over tables of either kind, some rows without an edit; captures of any rows."""
    tables = [table_tensors(rng, case.hidden, rng.choice([1, 2, 3, 6])) for _ in range(rng.choice([1, 1, 2, 3]))]
    columns = rng.choice([1, 2, 4])
    # Few places: several tables meet there. Columns are those of tables, so that each slot is in all of them.
    of_column = [rng.randrange(len(tables)) for _ in range(columns)]
    sites = tuple(
        (rng.randrange(case.num_blocks), rng.choice(TAPS), of_column[column], column)
        for column in (rng.randrange(columns) for _ in range(rng.choice([0, 1, 2, 4, 8])))
    )
    limits = [len(tables[of_column[column]]["alpha"]) for column in range(columns)]
    slots = [[rng.choice([0, rng.randrange(limit)]) for _ in range(rows)] for limit in limits]
    counts = [rng.choice([0, 1, 2, 7]) if rows else 0 for _ in range(rng.choice([0, 1, 3]))]
    captures = tuple((rng.randrange(case.num_blocks), rng.choice(TAPS)) for _ in counts)
    call: Call = {
        "sites": sites, "names": tuple(tuple(table) for table in tables),
        "tables": [t for table in tables for t in table.values()],
        "edit_slots": ints([s for column in slots for s in column]).view(columns, rows), "captures": captures,
    }  # fmt: skip
    if sites:
        call |= {"layer": sites[0][0], "column": sites[0][3]}
    if counts:
        call |= {
            "captured_rows": [below(rng, rows, n) for n in counts],
            "captured": [torch.zeros(n, case.hidden) for n in counts],
        }
    return call


def edits_call(rng: Random) -> Call:
    return step_call(rng, edits=1.0)


def step_call(rng: Random, edits: float = 0.3) -> Call:
    case = random_case(rng)
    weights = case.make(rng.getrandbits(30))
    adapters = [random_adapter(rng, case) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
    members = [rng.randrange(len(adapters) + 1) for _ in range(rng.choice([0, 1, 1, 2, 3, 5]))]
    sizes = [rng.choice([0, 1, 1, 2, 3, 5, 17, 40]) for _ in members]
    if case.id == "rows":  # then attention of the parts runs side by side, one thread each
        members, sizes = [rng.randrange(len(adapters) + 1) for _ in range(4)], [40, 56, 48, 40]
    total = sum(sizes)
    num_slots, slots = [], torch.zeros(total, dtype=torch.int32)
    of_row = torch.tensor([m for m, n in zip(members, sizes, strict=True) for _ in range(n)])
    for member in range(len(adapters) + 1):
        own = torch.nonzero(of_row == member).flatten()
        num_slots.append(len(own) + rng.choice([2, 2, 9]))
        slots[own] = ints(rng.sample(range(1, num_slots[-1]), len(own)))
    if total and rng.random() < 0.2:  # rows that nothing sees may share a slot
        slots[rng.randrange(total) :] = 0
    shape, kept = (case.num_kv_heads, case.head_dim), [m for m in range(len(num_slots)) if rng.random() < 0.5]
    positions = rng.choice([1, 30])
    cos, sin = rotary(positions, case.head_dim)
    num_wanted = rng.choice([0, 1, 2, 5, 20]) if total else 0
    call: Call = {
        "stack": weights, "updates": adapters, "threads": rng.choice([1, 2]),
        "num_qo_heads": case.num_qo_heads, "num_kv_heads": case.num_kv_heads, "head_dim": case.head_dim,
        "softmax_scale": case.head_dim**-0.5, "softcap": case.softcap, "sliding_window": weights.blocks[0].sliding_window,
        "eps": weights.norm.eps,
        "weights": tensors_of(weights),
        "pools": [randn(rng, n, *shape) for n in num_slots for _ in range(2 * case.num_blocks)],
        "kept": tuple(kept),
        "plans": tuple(random_plan(rng, n, num_slots[m]) for m, n in zip(members, sizes, strict=True)),
        "parts": tuple((m, n, rng.random() < 0.7) for m, n in zip(members, sizes, strict=True)),
        "ids": below(rng, case.vocab, total),
        "positions": below(rng, positions, total),
        "slots": slots, "cos": cos, "sin": sin, "wanted": below(rng, total, num_wanted),
    }  # fmt: skip
    if members:
        call |= {"member": members[0], "rows": sizes[0]}
    updated = [
        part for blocks in adapters for block in blocks for product in UPDATED for part in getattr(block, product)
    ]
    if kept:
        call["states"] = [randn(rng, num_slots[m], case.hidden) for m in kept]
    if updated:
        call |= {"adapters": tensors_of(adapters), "first": updated[0].first, "scale": updated[0].scale}
    if rng.random() < edits:
        call |= random_edits(rng, case, total)
    return call


def stack_of(
    stack: StackWeights, updates: Sequence[Any], weights: Sequence[Any], adapters: Sequence[Any], numbers: Call
) -> DecoderStack:
    """The stack of a call's tensors: `stack` and `updates` say where each belongs."""
    made: StackWeights = with_tensors(stack, iter(weights))
    of_block = {name: numbers.pop(name) for name in OF_BLOCK if name in numbers}
    of_update = {name: numbers.pop(name) for name in ("first", "scale") if name in numbers}
    norm = made.norm._replace(**{name: numbers.pop(name) for name in ("eps",) if name in numbers})
    made = replace(made, norm=norm, blocks=(replace(made.blocks[0], **of_block), *made.blocks[1:]), **numbers)
    changed = with_tensors(tuple(updates), iter(adapters))
    return DecoderStack(made, with_first(changed, of_update))


def with_first(updates: tuple[tuple[BlockUpdate, ...], ...], changes: Call) -> list[list[BlockUpdate]]:
    """The updates with these fields in the first part of all."""
    made = [list(blocks) for blocks in updates]
    for blocks in made:
        for i, block in enumerate(blocks):
            for name in UPDATED:
                if parts := getattr(block, name):
                    blocks[i] = replace(block, **{name: (parts[0]._replace(**changes), *parts[1:])})
                    return made
    return made


def run_step(
    *, stack: StackWeights, updates: Sequence[Any], weights: Sequence[Any], adapters: Sequence[Any] | None = None,
    pools: Sequence[Any], states: Sequence[Any] = (), kept: tuple[int, ...], plans: tuple[Columns, ...],
    parts: tuple[tuple[int, int, bool], ...], threads: int, ids: Any, positions: Any, slots: Any, cos: Any, sin: Any,
    wanted: Any, member: Any = None, rows: Any = None, edit_slots: Any = None, captures: Sequence[tuple[int, Any]] = (),
    captured_rows: Any = (), captured: Any = (), sites: Sequence[tuple[int, Any, int, int]] = (), names: Sequence[Any] = (),
    tables: Any = (), layer: Any = None, column: Any = None, **numbers: Any,
) -> Tensor:  # fmt: skip
    if unknown := numbers.keys() - {*OF_STACK, *OF_BLOCK, "eps", "first", "scale"}:
        raise TypeError(f"unknown keywords {unknown}")
    weights, adapters = listed(weights, tensors_of(stack)), listed(adapters, tensors_of(updates))
    made = stack_of(stack, updates, weights, adapters, numbers)
    pools, states = listed(pools, []), listed(states, [])
    pairs, n = list(zip(pools[::2], pools[1::2], strict=True)), len(stack.blocks)
    for i in range(made.num_members):
        made.set_pools(pairs[i * n : (i + 1) * n], i)
    given = dict(zip(kept, states, strict=False))
    step_parts = [
        StepPart(m, count, attention_plan(**plan), given.get(m) if has_states else None)
        for (m, count, has_states), plan in zip(parts, plans, strict=True)
    ]
    if step_parts:
        step_parts[0] = step_parts[0]._replace(member=member, rows=rows)
    made.set_edits(sites_of(sites, names, listed(tables, []), layer, column))
    wanted_rows = [
        Capture(*place, at, out)
        for place, at, out in zip(captures, listed(captured_rows, []), listed(captured, []), strict=False)
    ]
    with exact_memory(), with_threads(threads):
        logits = made.step(ids, positions, slots, step_parts, cos, sin, wanted, edit_slots, wanted_rows)
    for written in (*pools, *(part.states for part in step_parts if part.states is not None)):
        written[0] = 0  # where several rows meet, whichever comes last stays
    return logits


def sites_of(
    sites: Sequence[tuple[int, Any, int, int]], names: Sequence[Any], tensors: list[Any], layer: Any, column: Any
) -> list[EditSite]:
    """The sites over tables of these tensors, the first one at this layer and column."""
    left = iter(tensors)
    tables = [table_of(dict(zip(of_table, left, strict=False))) for of_table in names] if tensors else []
    made = [EditSite(at, tap, tables[table], i) for at, tap, table, i in sites] if tables else []
    if made:
        made[0] = made[0]._replace(layer=layer, column=column)
    return made


@contextmanager
def exact_memory() -> Iterator[None]:
    """A workspace of the size that was asked for, of NaN before it is written, and layouts in memory of their own."""
    layout_of = decoder.layout_of
    with (
        mock.patch.object(decoder, "_at_least", lambda _, floats: torch.full((floats,), float("nan"))),
        mock.patch.object(decoder, "layout_of", lambda plan, group: layout_of(plan, group).clone()),
    ):
        yield


@contextmanager
def with_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


# Products


def linear_call(rng: Random) -> Call:
    rows, inputs = rng.choice([0, 1, 2, 3, 5, 17, 40]), rng.choice([0, 1, 7, 16, 33, 130, 513, 1100])
    outputs = rng.choice([0, 1, 2, 7, 8, 33, 65, 130])
    call: Call = {"x": randn(rng, rows, inputs), "weight": randn(rng, outputs, inputs), "threads": rng.choice([1, 2])}
    if rng.random() < 0.5:
        call["bias"] = randn(rng, outputs)
    return call | {"out": rng.choice([None, torch.zeros(rows, outputs)])}


def product(*, x: Any, weight: Any, bias: Any = None, out: Any = None, threads: int) -> Tensor:
    with with_threads(threads):
        return linear_rows(x, LinearWeight(weight, bias), out)


OF_STACK = ("num_qo_heads", "num_kv_heads", "head_dim")
OF_BLOCK = ("softmax_scale", "softcap", "sliding_window")  # of the first one
_STRUCTURE = ("stack", "updates", "threads", "kept", "plans", "parts", "sites", "names", "captures")
_OF_STACK = ("weights", "adapters", *OF_STACK, *OF_BLOCK, "eps", "first", "scale")
_OF_STEP = ("ids", "positions", "slots", "cos", "sin", "wanted", "pools", "states", "member", "rows")
_OF_EDITS = ("tables", "edit_slots", "layer", "column", "captured", "captured_rows")
_NAMED = ("blocks", "embedding", "norm", "head", "heads", "parts", "table", *PRIVATE, *SHARED)
# A wrong number in a weight or in a pool can leave no digits to agree on; rows that meet in a slot are in a race.
_DERIVED = (*_OF_STACK, "pools", "cos", "sin", "slots", "tables")
# Nothing but float32 is computed; tensors of other types are there unread.
_CLOSE = same_within(dict.fromkeys((torch.float32, torch.float64, torch.float16, torch.bfloat16), 2e-4))
OPS = {
    "linear_rows": FuzzOp(linear_call, product, same=_CLOSE, steady=("threads",)),
    "decoder_stack": FuzzOp(
        step_call, run_step, _NAMED, same=_CLOSE, steady=(*_STRUCTURE, *_OF_STEP, *_OF_EDITS), derived=_DERIVED
    ),
    "decoder_step": FuzzOp(
        step_call, run_step, _NAMED, same=_CLOSE, steady=(*_STRUCTURE, *_OF_STACK, *_OF_EDITS), derived=_DERIVED
    ),
    "decoder_edits": FuzzOp(
        edits_call, run_step, _NAMED, same=_CLOSE, steady=(*_STRUCTURE, *_OF_STACK, *_OF_STEP), derived=_DERIVED
    ),
}  # fmt: skip
