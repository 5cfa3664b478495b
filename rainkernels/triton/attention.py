"""Triton lane of the attention family: work items on tensor cores, merge of chunk partials, merge_state.

The item tables are made by csrc/cpu/attention_items.cpp. A (row, chunk, head) has one partial: the raw state of an online
softmax over that chunk's keys in position order - accumulator, maximum (base 2), sum. Level 0 items begin it, items of later
levels go on from it in place, the merge joins a row's chunks. Every size that changes between steps is read from device
memory, so a captured launch replays with another plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rainkernels.triton.aot import AotKernel
from rainkernels.triton.attention_tiles import Tile, Tiles, choose_tiles

__all__ = ["Shapes", "State", "aot_kernels", "attend", "merge", "merge_state"]

_LOG2E = 1.4426950408889634
# Partials that the merge joins at a time, and heads of a program.
_MERGE_CHUNKS, _MERGE_HEADS = 8, 4
_DTYPE_NAME = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """tanh without libdevice; the series keeps small arguments exact where 1 - t cancels."""
    t = tl.exp2(-2.8853900817779268 * tl.abs(x))
    big = (1.0 - t) / (1.0 + t)
    y = x * x
    small = x * (1.0 + y * (-0.33333333 + y * (0.13333333 + y * (-0.053968254 + y * 0.021869488))))
    return tl.where(tl.abs(x) < 0.3, small, tl.where(x < 0, -big, big))


# Sizes that change with every plan: specialising on their divisibility would compile a variant per plan.
_PLAN_INTS = ["launch", "items_at", "keys_at", "order_at", "position_at", "part_at", "window"]


@triton.jit(do_not_specialize=_PLAN_INTS)  # type: ignore[untyped-decorator]
def tree_items_kernel(  # type: ignore[no-untyped-def]
    Q, K, V, TABLE, ACC, MAX, SUM, launch, items_at, keys_at, order_at, position_at, part_at, score_scale, cap_scale,
    window, q_stride_row, q_stride_head, num_qo_heads, num_kv_heads,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    DV: tl.constexpr, VA: tl.constexpr, VB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAPPED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Items of one launch (a level and a tile class): program = (item, KV head x split of its query heads).

    Q [T, Hq, D] strided; K [slots, Hkv, D], V [slots, Hkv, DV] contiguous; TABLE: header, items, keys, rows;
    ACC [partials, Hq, DV], MAX, SUM [partials, Hq] fp32. A tile is rows x GT query heads of one KV head. D = DA + DB and
    DV = VA + VB after padding to powers of two: 80 and 96 are two pieces instead of 128. WIDEN is for the interpreter: it
    multiplies bfloat16 as if it were integers, while products of bfloat16 are exact in float32.
    """
    GT: tl.constexpr = (GROUP + SPLITS - 1) // SPLITS
    kv_head = tl.program_id(1) // SPLITS
    m = tl.arange(0, BM)
    r = m // GT
    in_group = (tl.program_id(1) % SPLITS) * GT + m % GT
    head = kv_head * GROUP + in_group
    da = tl.arange(0, DA)
    va = tl.arange(0, VA)
    count = tl.load(TABLE + 9 + 2 * launch)
    first = tl.load(TABLE + 8 + 2 * launch)
    for item in range(tl.program_id(0), count, tl.num_programs(0)):
        at = TABLE + items_at + (first + item) * 8
        key0 = tl.load(at)
        pos0 = tl.load(at + 1)
        pos1 = pos0 + tl.load(at + 2)
        row0 = tl.load(at + 3)
        ok = (r < tl.load(at + 4)) & (in_group < GROUP)
        chunk = tl.load(at + 5)
        old_rows = tl.load(at + 6) * BM  # all or none
        row = tl.load(TABLE + order_at + row0 + r, mask=ok, other=0)
        position = tl.load(TABLE + position_at + row0 + r, mask=ok, other=-1)
        part = tl.load(TABLE + part_at + row0 + r, mask=ok, other=0).to(tl.int64) + chunk
        base = part * num_qo_heads + head
        q_at = Q + row.to(tl.int64)[:, None] * q_stride_row + head[:, None] * q_stride_head
        qa = tl.load(q_at + da[None, :], mask=ok[:, None] & (da < D)[None, :], other=0.0)
        if DB > 0:
            db = DA + tl.arange(0, DB)
            qb = tl.load(q_at + db[None, :], mask=ok[:, None] & (db < D)[None, :], other=0.0)
        if WIDEN:
            qa = qa.to(tl.float32)
            if DB > 0:
                qb = qb.to(tl.float32)
        # The state so far; -inf and 0 where nothing was seen yet, whatever the accumulator's memory holds.
        load = ok & (r < old_rows)
        top = tl.load(MAX + base, mask=load, other=float("-inf"))
        total = tl.load(SUM + base, mask=load, other=0.0)
        acc_at = ACC + base[:, None] * DV
        seen = (load & (total != 0.0))[:, None]
        acca = tl.load(acc_at + va[None, :], mask=seen & (va < DV)[None, :], other=0.0)
        if VB > 0:
            vb = VA + tl.arange(0, VB)
            accb = tl.load(acc_at + vb[None, :], mask=seen & (vb < DV)[None, :], other=0.0)
        low = tl.where(window > 0, position - window, -1)
        # Blocks that no row of the tile sees are left out: they would not change a bit of the state.
        begin = tl.min(tl.where(ok, low, 2147483647), 0) + 1
        begin = tl.maximum(begin, pos0) // BN * BN
        end = tl.minimum(tl.max(position, 0) + 1, pos1)
        slot_at = TABLE + keys_at + key0 - pos0
        for n0 in range(begin, end, BN):
            n = n0 + tl.arange(0, BN)
            live = n < pos1
            slot = tl.load(slot_at + n, mask=live, other=0).to(tl.int64)
            key = slot * num_kv_heads + kv_head
            k_at = K + key[:, None] * D
            ka = tl.load(k_at + da[None, :], mask=live[:, None] & (da < D)[None, :], other=0.0)
            if WIDEN:
                ka = ka.to(tl.float32)
            score = tl.dot(qa, tl.trans(ka), input_precision="ieee")
            if DB > 0:
                kb = tl.load(k_at + db[None, :], mask=live[:, None] & (db < D)[None, :], other=0.0)
                if WIDEN:
                    kb = kb.to(tl.float32)
                score = tl.dot(qb, tl.trans(kb), score, input_precision="ieee")
            score = score * score_scale
            if CAPPED:
                score = _tanh(score) * cap_scale
            visible = (n[None, :] <= position[:, None]) & (n[None, :] > low[:, None]) & live[None, :]
            score = tl.where(visible, score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            alpha = tl.exp2(top - shift)
            p = tl.exp2(score - shift[:, None])
            total = total * alpha + tl.sum(p, 1)
            top = new_top
            v_at = V + key[:, None] * DV
            v = tl.load(v_at + va[None, :], mask=live[:, None] & (va < DV)[None, :], other=0.0)
            p = p.to(v.dtype)
            if WIDEN:
                p = p.to(tl.float32)
                v = v.to(tl.float32)
            acca = tl.dot(p, v, acca * alpha[:, None], input_precision="ieee")
            if VB > 0:
                w = tl.load(v_at + vb[None, :], mask=live[:, None] & (vb < DV)[None, :], other=0.0)
                if WIDEN:
                    w = w.to(tl.float32)
                accb = tl.dot(p, w, accb * alpha[:, None], input_precision="ieee")
        # A row that has seen nothing keeps its accumulator unwritten: nobody reads it where the sum is 0.
        keep = (ok & (total != 0.0))[:, None]
        tl.store(MAX + base, top, mask=ok)
        tl.store(SUM + base, total, mask=ok)
        tl.store(acc_at + va[None, :], acca, mask=keep & (va < DV)[None, :])
        if VB > 0:
            tl.store(acc_at + vb[None, :], accb, mask=keep & (vb < DV)[None, :])


@triton.jit(do_not_specialize=["order_at", "part_at"])  # type: ignore[untyped-decorator]
def tree_merge_kernel(  # type: ignore[no-untyped-def]
    ACC, MAX, SUM, TABLE, SINKS, OUT, LSE, order_at, part_at, num_qo_heads,
    DV: tl.constexpr, VP: tl.constexpr, BC: tl.constexpr, BH: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """BH heads of one row: out = sum acc_i 2^(m_i - M) / sum l_i 2^(m_i - M) over the row's chunks, BC at a time in order."""
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    is_head = head < num_qo_heads
    row = tl.load(TABLE + order_at + tl.program_id(0)).to(tl.int64)
    part0 = tl.load(TABLE + part_at + tl.program_id(0))
    part1 = tl.load(TABLE + part_at + tl.program_id(0) + 1)
    d = tl.arange(0, VP)
    acc = tl.full([BH, VP], 0.0, tl.float32)
    if HAS_SINKS:
        # The sink is one more term of the denominator; a padding row has no terms at all.
        top = tl.load(SINKS + head, mask=is_head & (head * 0 + part0 < part1), other=float("-inf")) * 1.4426950408889634
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    else:
        top = tl.full([BH], float("-inf"), tl.float32)
        total = tl.full([BH], 0.0, tl.float32)
    for c0 in range(part0, part1, BC):
        part = c0 + tl.arange(0, BC)
        base = part.to(tl.int64)[:, None] * num_qo_heads + head[None, :]
        inside = (part < part1)[:, None] & is_head[None, :]
        m = tl.load(MAX + base, mask=inside, other=float("-inf"))
        s = tl.load(SUM + base, mask=inside, other=0.0)
        seen = (s != 0.0)[:, :, None] & (d < DV)[None, None, :]
        a = tl.load(ACC + base[:, :, None] * DV + d[None, None, :], mask=seen, other=0.0)
        new_top = tl.maximum(top, tl.max(m, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        alpha = tl.exp2(top - shift)
        w = tl.exp2(m - shift[None, :])
        acc = acc * alpha[:, None] + tl.sum(a * w[:, :, None], 0)
        total = total * alpha + tl.sum(s * w, 0)
        top = new_top
    out = row * num_qo_heads + head
    safe = tl.where(total == 0.0, 1.0, total)
    result = (acc / safe[:, None]).to(OUT.dtype.element_ty)
    tl.store(OUT + out[:, None] * DV + d[None, :], result, mask=is_head[:, None] & (d < DV)[None, :])
    if HAS_LSE:
        lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(safe)) * 0.6931471805599453)
        tl.store(LSE + out, lse, mask=is_head)


@triton.jit  # type: ignore[untyped-decorator]
def merge_state_kernel(  # type: ignore[no-untyped-def]
    VA, LA, VB, LB, V, L, rows, D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr
):
    """BR rows of [rows, D]: weights exp(lse - top), a side with lse = -inf counts as zero whatever its v holds."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, DP)
    ok = r < rows
    la = tl.load(LA + r, mask=ok, other=0.0)
    lb = tl.load(LB + r, mask=ok, other=0.0)
    top = tl.maximum(la, lb)
    shift = tl.where(top == float("-inf"), 0.0, top)
    wa = tl.exp2((la - shift) * 1.4426950408889634)
    wb = tl.exp2((lb - shift) * 1.4426950408889634)
    total = wa + wb
    safe = tl.where(total == 0.0, 1.0, total)
    at = r[:, None] * D + d[None, :]
    inside = ok[:, None] & (d < D)[None, :]
    a = tl.load(VA + at, mask=inside & (wa != 0.0)[:, None], other=0.0).to(tl.float32)
    b = tl.load(VB + at, mask=inside & (wb != 0.0)[:, None], other=0.0).to(tl.float32)
    v = a * (wa / safe)[:, None] + b * (wb / safe)[:, None]
    # In place: several threads load a row's lse, in two layouts, and one stores it; all must have theirs by then.
    tl.debug_barrier()
    tl.store(V + at, v.to(V.dtype.element_ty), mask=inside)
    tl.store(L + r, tl.where(total == 0.0, float("-inf"), shift + tl.log2(safe) * 0.6931471805599453), mask=ok)


# Triton decides at import whether functions are compiled or interpreted.
_INTERPRETED = not isinstance(tree_items_kernel, triton.runtime.JITFunction)


class Shapes(NamedTuple):
    """What a call's tensors and options fix."""

    tiles: Tiles
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    softmax_scale: float
    softcap: float
    window: int


class State(NamedTuple):
    """Memory of the partials: acc [partials, Hq, Dv], maxima [partials, Hq] (base 2), sums [partials, Hq], all float32."""

    acc: Tensor
    maxima: Tensor
    sums: Tensor

    @staticmethod
    def create(partials: int, num_qo_heads: int, head_dim_v: int, device: torch.device) -> State:
        """Uninitialised: items of level 0 begin every partial."""
        heads = max(1, partials) * num_qo_heads
        acc = torch.empty(heads * head_dim_v, dtype=torch.float32, device=device)
        return State(acc, *torch.empty(2, heads, dtype=torch.float32, device=device))


def attend(
    shapes: Shapes,
    launches: Iterable[tuple[int, bool, int]],
    places: tuple[int, int, int, int, int],
    table: Tensor,
    state: State,
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
) -> None:
    """Fill the partials. `launches`: (level, narrow, programs per head) in level order; fewer programs than items loop."""
    items_at, keys_at, order_at, position_at, part_at = places
    tiles, softcap = shapes.tiles, shapes.softcap
    scale = shapes.softmax_scale * _LOG2E if softcap == 0.0 else shapes.softmax_scale / softcap
    for level, narrow, programs in launches:
        tile = tiles.narrow if narrow else tiles.wide
        assert tile is not None
        tree_items_kernel[(programs, shapes.num_kv_heads * tiles.splits)](
            q, k_pool, v_pool, table, *state, 2 * level + narrow, items_at, keys_at, order_at, position_at, part_at,
            scale, softcap * _LOG2E, shapes.window, q.stride(0), q.stride(1), shapes.num_qo_heads, shapes.num_kv_heads,
            **_constants(shapes, tile, _INTERPRETED and q.dtype == torch.bfloat16), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def _constants(shapes: Shapes, tile: Tile, widen: bool) -> dict[str, Any]:
    (da, db), (va, vb) = tile.k_pieces, tile.v_pieces
    return {
        "GROUP": shapes.num_qo_heads // shapes.num_kv_heads, "SPLITS": shapes.tiles.splits,
        "D": shapes.head_dim, "DA": da, "DB": db, "DV": shapes.head_dim_v, "VA": va, "VB": vb,
        "BM": tile.row_heads, "BN": tile.keys, "CAPPED": shapes.softcap > 0.0, "WIDEN": widen,
    }  # fmt: skip


def merge(
    shapes: Shapes, num_rows: int, places: tuple[int, int, int, int, int], table: Tensor, state: State,
    sinks: Tensor | None, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    """Join the partials of `num_rows` rows into out [rows, Hq, Dv] and, where given, lse [rows, Hq]."""
    tree_merge_kernel[(num_rows, triton.cdiv(shapes.num_qo_heads, _MERGE_HEADS))](
        *state, table, state.sums if sinks is None else sinks, out, state.sums if lse is None else lse,
        places[2], places[4], shapes.num_qo_heads,
        DV=shapes.head_dim_v, VP=triton.next_power_of_2(shapes.head_dim_v), BC=_MERGE_CHUNKS, BH=_MERGE_HEADS,
        HAS_SINKS=sinks is not None, HAS_LSE=lse is not None, num_warps=4, num_stages=1,
    )  # fmt: skip


def _merge_block(dim: int) -> tuple[int, int]:
    """Padded dim and rows of a merge_state program: about 4096 values."""
    padded = triton.next_power_of_2(dim)
    return padded, max(1, 4096 // padded)


def merge_state(v_a: Tensor, lse_a: Tensor, v_b: Tensor, lse_b: Tensor, v: Tensor, lse: Tensor) -> None:
    """v [T, H, D] and lse [T, H] from both sides; may write to either side itself."""
    rows, dim = lse_a.numel(), v_a.shape[2]
    padded, block = _merge_block(dim)
    merge_state_kernel[(triton.cdiv(rows, block),)](
        v_a, lse_a, v_b, lse_b, v, lse, rows, D=dim, DP=padded, BR=block, num_warps=4, num_stages=1
    )


_HEAD_DIMS = (64, 80, 96, 128, 256)
_GROUP = 4  # stands for all: it changes index arithmetic only


def aot_kernels() -> list[AotKernel]:
    """Every tile of every head dim and dtype, soft-capped ones for the dims of models that cap, and both merges."""
    found: dict[str, AotKernel] = {}
    for dtype, name in _DTYPE_NAME.items():
        for dim in _HEAD_DIMS:
            for rows, capped in ((16, False), (1024, False), (1024, True)):
                tiles = choose_tiles(dtype, dim, dim, _GROUP, rows)
                shapes = Shapes(tiles, 8 * _GROUP, 8, dim, dim, 1.0, float(capped), 0)
                if capped and (dim < 128 or name == "fp16"):
                    continue
                for tile in {tiles.wide, tiles.narrow} - {None}:
                    assert tile is not None
                    kernel = _aot_items(name, shapes, tile)
                    found[kernel.name] = kernel
        for dim in (64, 128, 256):
            found[f"attention_merge-{name}-d{dim}"] = _aot_merge(name, dim)
            found[f"attention_merge_state-{name}-d{dim}"] = _aot_merge_state(name, dim)
    return list(found.values())


def _aot_items(name: str, shapes: Shapes, tile: Tile) -> AotKernel:
    pointers = {"Q": f"*{name}", "K": f"*{name}", "V": f"*{name}", "TABLE": "*i32"}
    states = dict.fromkeys(("ACC", "MAX", "SUM"), "*fp32")
    strides = dict.fromkeys(("q_stride_row", "q_stride_head", "num_qo_heads", "num_kv_heads"), "i32")
    return AotKernel(
        name=f"attention_items-{name}-d{shapes.head_dim}-m{tile.row_heads}{'-cap' if shapes.softcap else ''}",
        fn=tree_items_kernel,
        signature=pointers | states | dict.fromkeys(_PLAN_INTS, "i32") | {"score_scale": "fp32", "cap_scale": "fp32"}
        | strides,
        constexprs=_constants(shapes, tile, False),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=("Q", "K", "V", "TABLE", "ACC", "MAX", "SUM", "q_stride_row", "q_stride_head"),
    )  # fmt: skip


def _aot_merge(name: str, dim: int) -> AotKernel:
    signature = dict.fromkeys(("ACC", "MAX", "SUM", "SINKS", "LSE"), "*fp32") | {"TABLE": "*i32", "OUT": f"*{name}"}
    return AotKernel(
        name=f"attention_merge-{name}-d{dim}",
        fn=tree_merge_kernel,
        signature=signature | dict.fromkeys(("order_at", "part_at", "num_qo_heads"), "i32"),
        constexprs={"DV": dim, "VP": dim, "BC": _MERGE_CHUNKS, "BH": _MERGE_HEADS, "HAS_SINKS": True, "HAS_LSE": True},
        num_warps=4,
        num_stages=1,
        aligned=("ACC", "MAX", "SUM", "SINKS", "LSE", "TABLE", "OUT"),
    )


def _aot_merge_state(name: str, dim: int) -> AotKernel:
    padded, block = _merge_block(dim)
    signature = dict.fromkeys(("LA", "LB", "L"), "*fp32") | dict.fromkeys(("VA", "VB", "V"), f"*{name}")
    return AotKernel(
        name=f"attention_merge_state-{name}-d{dim}",
        fn=merge_state_kernel,
        signature=signature | {"rows": "i32"},
        constexprs={"D": dim, "DP": padded, "BR": block},
        num_warps=4,
        num_stages=1,
        aligned=("VA", "LA", "VB", "LB", "V", "L"),
    )
