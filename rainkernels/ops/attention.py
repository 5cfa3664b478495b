"""Attention over tree paths: many rows, one pool of token slots, shared prefixes read once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from rainkernels._checks import (
    DTYPE_CODE,
    FLOATS,
    check_int,
    check_no_grad,
    check_outputs,
    check_real,
    check_tensor,
)
from rainkernels._lanes import choose_lane, native, requested_lane
from rainkernels.errors import DeviceError, DtypeError, LaneError, RangeError, ShapeError, StrideError
from rainkernels.ops import _attention_items
from rainkernels.ops._attention_buffers import AttentionBuffers, check_chunk, check_heads
from rainkernels.ops._attention_items import (
    AttentionTraffic,
    Chunk,
    ItemTable,
    item_table,
    resolve_chunk,
    stream_of,
)
from rainkernels.ops._attention_plan import AttentionPlan, attention_plan, attention_plan_of, gathered, layout_of
from rainkernels.reference import attention as reference
from rainkernels.triton.attention_tiles import MAX_HEAD_DIM, choose_tiles

__all__ = [
    "AttentionBuffers", "AttentionPlan", "AttentionTraffic", "MergedState", "attention_plan", "attention_plan_of",
    "attention_traffic", "merge_state", "tree_attention",
]  # fmt: skip

_CHUNK = 256


class MergedState(NamedTuple):
    """A partial attention result: v like the inputs' v, lse [num_tokens, num_qo_heads] float32, natural log."""

    v: Tensor
    lse: Tensor


class _Call(NamedTuple):
    """A checked call: what every repetition with the same shapes, strides, dtypes and options needs."""

    lane: str
    out_shape: tuple[int, int, int]
    lse_shape: tuple[int, int]
    # cpu lane
    native: Callable[..., None] | None = None
    workspace_floats: int = 0
    arguments: tuple[object, ...] = ()
    # triton lane: rainkernels.triton.attention.Shapes, and the plan's items
    shapes: Any = None
    items: ItemTable | None = None


@overload
def tree_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: AttentionPlan, *, softmax_scale: float, softcap: float = ...,
    sliding_window: int = ..., sinks: Tensor | None = ..., out: Tensor | None = ..., return_lse: Literal[False] = ...,
    chunk: Chunk | None = ..., buffers: AttentionBuffers | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def tree_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: AttentionPlan, *, softmax_scale: float, softcap: float = ...,
    sliding_window: int = ..., sinks: Tensor | None = ..., out: Tensor | None = ..., return_lse: Literal[True],
    chunk: Chunk | None = ..., buffers: AttentionBuffers | None = ...,
) -> MergedState: ...  # fmt: skip


def tree_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    plan: AttentionPlan,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    sliding_window: int = 0,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    return_lse: bool = False,
    chunk: Chunk | None = None,
    buffers: AttentionBuffers | None = None,
) -> Tensor | MergedState:
    """Attention of every row over its tree path.

    score = softmax_scale * q.k, then softcap * tanh(score / softcap) if softcap > 0; out = softmax(score) v

    Shapes:
        q:      [num_rows, num_qo_heads, head_dim]      float32 | bfloat16 | float16, last dim contiguous
        k_pool: [num_slots, num_kv_heads, head_dim]     same dtype, contiguous; num_qo_heads % num_kv_heads == 0
        v_pool: [num_slots, num_kv_heads, head_dim_v]   same dtype, contiguous
        sinks:  [num_qo_heads] float32, a logit per head that enters the denominator only
        out:    [num_rows, num_qo_heads, head_dim_v]    like q, contiguous; allocated when None
        sliding_window: tokens, 0 for none; a key is visible while row position - key position < sliding_window
        chunk: positions that one partial result spans on the triton lane, a multiple of 64. A number cuts a row's sums at
            the same positions in every batch; "auto" fits it to the batch (fewer, longer partials), so the cuts, and the
            bits with them, change with the other rows. The cpu lane always cuts at multiples of 256.
        buffers: static memory for CUDA graphs; `plan` must be the one loaded last, and q has buffers.max_rows rows
    Returns:
        out, or MergedState(out, lse) with return_lse; lse [num_rows, num_qo_heads] float32, natural log, sink included
    Edge cases:
        A padding row gives zeros and lse = -inf. Sums are float32 for every dtype; on the triton lane weights are rounded
        to the values' dtype before they meet them. On the cpu lane a row's bits do not depend on the other rows, on
        where the path is split, on thread count or instruction set. On the triton lane they depend on its path, on
        `chunk` and on the shapes of the tiles it lands in: where the path is split changes none of them, but how many
        rows there are and which keys they share chooses the tiles, so that other rows may change a row's last bits.
        With `out` and `buffers` given (and no return_lse) nothing is allocated, and the host never waits.
        Where `chunk` is None it is 256, or what the buffers were made for; with buffers any other is refused.
    Raises:
        DeviceError, DtypeError, ShapeError, StrideError, RangeError, LaneError: naming the argument.
    Devices: cpu, cuda.  Reference: rainkernels.reference.attention.tree_attention
    """
    threads = torch.get_num_threads()
    try:
        signature = (
            q.shape, q.stride(), q.dtype, q.device, k_pool.shape, k_pool.dtype, k_pool.device, k_pool.is_contiguous(),
            v_pool.shape, v_pool.dtype, v_pool.device, v_pool.is_contiguous(),
            q.is_neg(), k_pool.is_neg(), v_pool.is_neg(), softmax_scale, type(softmax_scale), softcap, type(softcap),
            sliding_window, type(sliding_window), threads, chunk, type(chunk), buffers, requested_lane(),
        )  # fmt: skip
        call = plan._calls.get(signature)
    except (AttributeError, TypeError, RuntimeError):  # not a dense tensor, or not a plan: the checks say which
        _check_attention(q, k_pool, v_pool, plan, softmax_scale, softcap, sliding_window, chunk, buffers)
        raise
    if call is None:
        options = (softmax_scale, softcap, sliding_window, chunk, buffers)
        call = plan._calls[signature] = _prepare(q, k_pool, v_pool, plan, *options, threads)
    if buffers is not None and buffers.plan is not plan:
        raise RangeError("plan is not the one the buffers hold: call buffers.load(plan) first")
    if sinks is not None:
        check_tensor("sinks", sinks, dtype=torch.float32, shape=(call.lse_shape[1],), device=q.device)
    if out is not None:
        check_tensor("out", out, dtype=q.dtype, shape=call.out_shape, device=q.device)
        check_no_grad("out", out)
    if call.lane == "reference":
        with torch.no_grad():
            result, lse = reference.tree_attention(
                q, k_pool, v_pool, *gathered(plan, q.device), softmax_scale=float(softmax_scale), softcap=float(softcap),
                sliding_window=sliding_window, sinks=sinks,
            )  # fmt: skip
            result = result if out is None else out.copy_(result)
        return MergedState(result, lse) if return_lse else result
    if out is None:
        out = q.new_empty(call.out_shape)
    lse_out = torch.empty(call.lse_shape, dtype=torch.float32, device=q.device) if return_lse else None
    if call.lane == "triton":
        _run_triton(call, q, k_pool, v_pool, plan, sinks, out, lse_out, buffers)
    else:
        _run_cpu(call, q, k_pool, v_pool, plan, sinks, out, lse_out)
    return out if lse_out is None else MergedState(out, lse_out)


def attention_traffic(
    plan: AttentionPlan,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    chunk: Chunk = _CHUNK,
) -> AttentionTraffic:
    """Count the bytes `tree_attention` moves for this plan and these head shapes on the Triton lane.

    Raises:
        DtypeError, ShapeError, RangeError: naming the argument.
    """
    if not isinstance(plan, AttentionPlan):
        raise DtypeError(f"plan must come from attention_plan(), got {type(plan).__name__}")
    check_heads(num_qo_heads, num_kv_heads, head_dim, head_dim if head_dim_v is None else head_dim_v, dtype)
    check_chunk(chunk)
    return _attention_items.attention_traffic(
        plan, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype,
        chunk=chunk,
    )  # fmt: skip


def _run_cpu(
    call: _Call, q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: AttentionPlan, sinks: Tensor | None, out: Tensor,
    lse: Tensor | None,
) -> None:  # fmt: skip
    assert call.native is not None
    # Taken out while in use, so that two threads sharing a plan never share a workspace.
    workspace = plan._workspaces.pop(call.workspace_floats, None)
    if workspace is None:
        workspace = torch.empty(call.workspace_floats, dtype=torch.float32)
    call.native(
        q.data_ptr(), k_pool.data_ptr(), v_pool.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr(),
        0 if sinks is None else sinks.data_ptr(), workspace.data_ptr(), *call.arguments,
    )  # fmt: skip
    plan._workspaces[call.workspace_floats] = workspace


def _run_triton(
    call: _Call, q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: AttentionPlan, sinks: Tensor | None, out: Tensor,
    lse: Tensor | None, buffers: AttentionBuffers | None,
) -> None:  # fmt: skip
    from rainkernels.triton import attention as lane

    if out.numel() == 0:
        return
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        if buffers is not None:
            state = lane.State(*buffers.state)
            lane.attend(call.shapes, buffers.launches, buffers.places, buffers.table, state, q, k_pool, v_pool)
            lane.merge(call.shapes, q.shape[0], buffers.places, buffers.table, state, sinks, out, lse)
            return
        items, stream = call.items, stream_of(q.device)
        assert items is not None
        key = (q.device, stream, items.num_partials, *call.out_shape[1:])
        # By stream, and taken out while in use: calls that may overlap never share partials.
        state = plan._workspaces.pop(key, None) or lane.State.create(items.num_partials, *call.out_shape[1:], q.device)
        table = items.on(q.device, stream)
        lane.attend(call.shapes, items.launches, items.places, table, state, q, k_pool, v_pool)
        lane.merge(call.shapes, q.shape[0], items.places, table, state, sinks, out, lse)
        plan._workspaces[key] = state


def _prepare(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: AttentionPlan, scale: float, softcap: float, window: int,
    chunk: Chunk | None, buffers: AttentionBuffers | None, threads: int,
) -> _Call:  # fmt: skip
    """Check everything a call's signature fixes, and derive what all its repetitions (the layers of a step) share."""
    _check_attention(q, k_pool, v_pool, plan, scale, softcap, window, chunk, buffers)
    chunk = _CHUNK if chunk is None else chunk
    num_rows, num_qo_heads, head_dim = q.shape
    _, num_kv_heads, head_dim_v = v_pool.shape
    out_shape, lse_shape = (num_rows, num_qo_heads, head_dim_v), (num_rows, num_qo_heads)
    lane = choose_lane("attention", q.device)
    if buffers is not None and lane != "triton":
        raise LaneError(f"buffers are for the triton lane, this call takes the {lane} lane: leave them out")
    if lane == "reference":
        return _Call(lane, out_shape, lse_shape)
    group = num_qo_heads // num_kv_heads
    if lane == "triton":
        from rainkernels.triton.attention import Shapes

        for name, dim in (("q's head_dim", head_dim), ("v_pool's head_dim_v", head_dim_v)):
            if not 0 < dim <= MAX_HEAD_DIM:
                raise ShapeError(f"{name} is {dim}, allowed: 1..{MAX_HEAD_DIM}; RAINKERNELS_LANE=reference takes any")
        if num_qo_heads > 65535:
            raise ShapeError(f"q has {num_qo_heads} heads, allowed: up to 65535")
        tiles = choose_tiles(q.dtype, head_dim, head_dim_v, group, num_rows) if buffers is None else buffers.tiles
        shapes = Shapes(
            tiles, num_qo_heads, num_kv_heads, head_dim, head_dim_v, float(scale), float(softcap), int(window)
        )
        items = None
        if buffers is None:
            items = item_table(plan, tiles, resolve_chunk(chunk, plan, tiles, num_qo_heads, num_kv_heads, head_dim_v))
        return _Call(lane, out_shape, lse_shape, shapes=shapes, items=items)
    layout = layout_of(plan, group)
    sizes = (layout.data_ptr(), num_qo_heads, num_kv_heads, head_dim, head_dim_v, threads)
    arguments = (q.stride(0), q.stride(1), DTYPE_CODE[q.dtype], float(scale), float(softcap), int(window), *sizes)
    return _Call(
        lane, out_shape, lse_shape, native().attention_cpu, native().attention_workspace_floats(*sizes), arguments
    )


def _check_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: AttentionPlan, scale: float, softcap: float, window: int,
    chunk: Chunk | None, buffers: AttentionBuffers | None,
) -> None:  # fmt: skip
    if not isinstance(plan, AttentionPlan):
        raise DtypeError(f"plan must come from attention_plan(), got {type(plan).__name__}")
    check_tensor("q", q, dtype=FLOATS, shape=(None, None, None), contiguous=False)
    device, dtype = q.device, q.dtype
    num_rows, num_qo_heads, head_dim = q.shape
    check_tensor("k_pool", k_pool, dtype=dtype, shape=(None, None, head_dim), device=device)
    num_slots, num_kv_heads, _ = k_pool.shape
    check_tensor("v_pool", v_pool, dtype=dtype, shape=(num_slots, num_kv_heads, None), device=device)
    if buffers is not None:
        _check_buffers(q, k_pool, v_pool, buffers)
    elif num_rows != plan.num_rows:
        raise ShapeError(f"q has {num_rows} rows, the plan has {plan.num_rows}: build the plan from the same batch")
    if num_kv_heads == 0 or num_qo_heads == 0 or num_qo_heads % num_kv_heads:
        raise ShapeError(f"q has {num_qo_heads} heads, k_pool {num_kv_heads}: q's must be a positive multiple of it")
    if head_dim > 1 and q.stride(2) != 1:
        raise StrideError(f"q has strides {list(q.stride())}, its last dim must have stride 1: call .contiguous()")
    if chunk is not None:
        check_chunk(chunk)
        if buffers is not None and chunk != buffers.chunk:
            raise RangeError(f"chunk is {chunk!r}, the buffers were made for {buffers.chunk!r}: leave it out")
    if plan.max_slot >= num_slots:
        raise RangeError(f"plan names slot {plan.max_slot}, k_pool has {num_slots}: allowed are 0..{num_slots - 1}")
    check_real("softmax_scale", scale, "it must be finite in float32 and > 0, usually head_dim ** -0.5", positive=True)
    check_real("softcap", softcap, "it must be finite in float32 and >= 0; 0 means none")
    check_int("sliding_window", window, 0, hint="tokens, 0 means none")


def _check_buffers(q: Tensor, k_pool: Tensor, v_pool: Tensor, buffers: AttentionBuffers) -> None:
    if not isinstance(buffers, AttentionBuffers):
        raise DtypeError(f"buffers must come from AttentionBuffers.create(), got {type(buffers).__name__}")
    if q.device != buffers.device:
        raise DeviceError(f"q is on {q.device}, the buffers are on {buffers.device}")
    if q.dtype != buffers.dtype:
        raise DtypeError(f"q has dtype {q.dtype}, the buffers were made for {buffers.dtype}")
    made = (buffers.max_rows, buffers.num_qo_heads, buffers.head_dim)
    if q.shape != made:
        raise ShapeError(f"q has shape {list(q.shape)}, the buffers were made for {list(made)}: pad the rows")
    if (*k_pool.shape[1:], v_pool.shape[2]) != (buffers.num_kv_heads, buffers.head_dim, buffers.head_dim_v):
        raise ShapeError(
            f"k_pool has shape {list(k_pool.shape)} and v_pool {list(v_pool.shape)}, the buffers were made for "
            f"{buffers.num_kv_heads} heads of {buffers.head_dim} and {buffers.head_dim_v}"
        )
    if k_pool.shape[0] < buffers.num_slots:
        raise ShapeError(f"k_pool has {k_pool.shape[0]} slots, the buffers were made for num_slots={buffers.num_slots}")


def merge_state(
    v_a: Tensor, lse_a: Tensor, v_b: Tensor, lse_b: Tensor, *, out: tuple[Tensor, Tensor] | None = None
) -> MergedState:
    """Merge two attention partials over disjoint key sets.

    v = (exp(lse_a) v_a + exp(lse_b) v_b) / (exp(lse_a) + exp(lse_b));  lse = logaddexp(lse_a, lse_b)

    Shapes:
        v_a, v_b:     [num_tokens, num_qo_heads, head_dim]  float16 | bfloat16 | float32, contiguous
        lse_a, lse_b: [num_tokens, num_qo_heads]            float32, natural log, contiguous
        out:          (v, lse) to write into, contiguous; may be the a or the b pair itself
    Returns:
        v: like v_a;  lse: like lse_a
    Edge cases:
        lse = -inf marks an empty partial, whatever its v holds; two empty partials give v = 0, lse = -inf. An lse that is NaN
        or +inf gives v = NaN.
    Raises:
        DeviceError, DtypeError, ShapeError, StrideError: naming the argument.
    Devices: cpu, cuda.  Reference: rainkernels.reference.attention.merge_state
    """
    check_tensor("v_a", v_a, dtype=FLOATS, shape=(None, None, None))
    device, shape = v_a.device, v_a.shape
    check_tensor("lse_a", lse_a, dtype=torch.float32, shape=shape[:2], device=device)
    check_tensor("v_b", v_b, dtype=v_a.dtype, shape=shape, device=device)
    check_tensor("lse_b", lse_b, dtype=torch.float32, shape=shape[:2], device=device)
    if out is not None:
        check_outputs("out", out, MergedState._fields)
        check_tensor("out[0]", out[0], dtype=v_a.dtype, shape=shape, device=device)
        check_tensor("out[1]", out[1], dtype=torch.float32, shape=shape[:2], device=device)
        check_no_grad("out[0]", out[0])
        check_no_grad("out[1]", out[1])
    lane = choose_lane("attention", device)
    if lane == "reference":
        with torch.no_grad():
            v, lse = reference.merge_state(v_a, lse_a, v_b, lse_b)
            return MergedState(v, lse) if out is None else MergedState(out[0].copy_(v), out[1].copy_(lse))
    v, lse = (torch.empty_like(v_a), torch.empty_like(lse_a)) if out is None else out
    if lane == "triton":
        from rainkernels.triton import attention as triton_lane

        if v.numel():
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                triton_lane.merge_state(v_a, lse_a, v_b, lse_b, v, lse)
        else:
            lse.copy_(reference.merge_state(v_a, lse_a, v_b, lse_b)[1])
        return MergedState(v, lse)
    native().merge_state_cpu(
        v_a.data_ptr(), lse_a.data_ptr(), v_b.data_ptr(), lse_b.data_ptr(), v.data_ptr(), lse.data_ptr(),
        shape[0] * shape[1], shape[2], DTYPE_CODE[v_a.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return MergedState(v, lse)


def _tree_attention_op(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, segment_parent: Tensor, segment_start: Tensor,
    segment_slots_indptr: Tensor, slots: Tensor, row_segment: Tensor, row_position: Tensor, softmax_scale: float,
    softcap: float = 0.0, sliding_window: int = 0, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The dispatcher's form: plan tensors instead of a plan object, so that nothing unchecked can be passed."""
    plan = attention_plan(
        segment_parent=segment_parent, segment_start=segment_start, segment_slots_indptr=segment_slots_indptr,
        slots=slots, row_segment=row_segment, row_position=row_position,
    )  # fmt: skip
    state = tree_attention(
        q, k_pool, v_pool, plan, softmax_scale=softmax_scale, softcap=softcap, sliding_window=sliding_window,
        sinks=sinks, return_lse=True,
    )  # fmt: skip
    return state.v, state.lse


def _tree_attention_fake(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, *plan_and_options: object, **options: object
) -> tuple[Tensor, Tensor]:
    rows, heads, _ = q.shape
    return q.new_empty((rows, heads, v_pool.shape[2])), q.new_empty((rows, heads), dtype=torch.float32)


def _merge_state_op(v_a: Tensor, lse_a: Tensor, v_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    merged = merge_state(v_a, lse_a, v_b, lse_b)
    return merged.v, merged.lse


def _merge_state_fake(v_a: Tensor, lse_a: Tensor, v_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v_a), torch.empty_like(lse_a)


_LIBRARY: Any = torch.library.Library("rainkernels", "FRAGMENT")
_LIBRARY.define(
    "tree_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor segment_parent, Tensor segment_start, "
    "Tensor segment_slots_indptr, Tensor slots, Tensor row_segment, Tensor row_position, float softmax_scale, "
    "float softcap=0.0, int sliding_window=0, Tensor? sinks=None) -> (Tensor, Tensor)"
)
_LIBRARY.define("merge_state(Tensor v_a, Tensor lse_a, Tensor v_b, Tensor lse_b) -> (Tensor, Tensor)")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("tree_attention", _tree_attention_op, _key)
    _LIBRARY.impl("merge_state", _merge_state_op, _key)
torch.library.register_fake("rainkernels::tree_attention", _tree_attention_fake, lib=_LIBRARY)
torch.library.register_fake("rainkernels::merge_state", _merge_state_fake, lib=_LIBRARY)
