"""Attention over tree paths: many rows, one pool of token slots, shared prefixes read once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from rainkernels._checks import DTYPE_CODE, FLOATS, check_tensor
from rainkernels._lanes import choose_lane, native
from rainkernels.errors import DtypeError, RangeError, ShapeError, StrideError
from rainkernels.reference import attention as reference

__all__ = ["AttentionPlan", "MergedState", "attention_plan", "merge_state", "tree_attention"]

_CPU = torch.device("cpu")
# Order shared with csrc/include/rainkernels/attention.h (enum PlanRule).
_RULES = ("", "indptr", "parent", "start", "slot", "row_segment", "row_position")
# The tensors of a plan in the order of its checks, each with the one before it that has the same length.
_PLAN_TENSORS: dict[str, str | None] = {
    "segment_parent": None, "segment_start": "segment_parent", "segment_slots_indptr": None, "slots": None,
    "row_segment": None, "row_position": "row_segment",
}  # fmt: skip
_RULE_TEXT = {
    "indptr": "segment_slots_indptr[{i}] breaks the rule: it must start at 0, never decrease and end at len(slots)",
    "parent": "segment_parent[{i}] must be -1 (a root) or the index of an earlier segment: parents before children",
    "start": "segment_start[{i}] must be 0 for a root and the parent's start + the parent's number of slots otherwise: "
    "split the parent where the child forks",
    "slot": "slots[{i}] is negative: give every key a slot of the pool",
    "row_segment": "row_segment[{i}] must be a segment index, or -1 for a padding row that sees nothing",
    "row_position": "row_position[{i}] must lie inside its own segment, start <= position < start + number of slots",
}


class MergedState(NamedTuple):
    """A partial attention result: v like the inputs' v, lse [num_tokens, num_qo_heads] float32, natural log."""

    v: Tensor
    lse: Tensor


class _Call(NamedTuple):
    """A checked call: what every repetition with the same shapes, strides, dtypes and options needs."""

    native: Callable[..., None] | None  # None: the reference lane
    out_shape: tuple[int, int, int]
    lse_shape: tuple[int, int]
    workspace_floats: int
    arguments: tuple[object, ...]


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Which keys every row sees. Made by `attention_plan`, opaque, shared by all layers of a forward.

    All tensors are int32 on the cpu. Layouts, workspaces and the lane are found at the first call of each shape and kept
    with the plan; several threads may use one plan. The tensors are copies and must not be changed: what a changed plan
    gives is undefined. A plan made by `dataclasses.replace` is copied and checked like a new one and shares nothing.

    Raises:
        As `attention_plan`; ShapeError also where num_rows or num_segments does not fit the tensors.
    """

    segment_parent: Tensor  # [num_segments]
    segment_start: Tensor  # [num_segments]
    segment_slots_indptr: Tensor  # [num_segments + 1]
    slots: Tensor  # [num_keys]
    row_segment: Tensor  # [num_rows]
    row_position: Tensor  # [num_rows]
    num_rows: int
    num_segments: int
    max_slot: int = -1  # found from `slots`, whatever is given; -1 when there is no key
    _gather: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _layouts: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _workspaces: dict[int, Tensor] = field(default_factory=dict, repr=False)  # by size in floats
    _calls: dict[object, _Call] = field(default_factory=dict, repr=False)  # by signature

    def __post_init__(self) -> None:
        for name, length_of in _PLAN_TENSORS.items():
            length = None if length_of is None else getattr(self, length_of).shape[0]
            check_tensor(name, getattr(self, name), dtype=torch.int32, shape=(length,), device=_CPU)
        if self.num_rows != self.row_segment.shape[0] or self.num_segments != self.segment_parent.shape[0]:
            raise ShapeError(
                f"AttentionPlan has {self.num_rows} rows and {self.num_segments} segments, but tensors for "
                f"{self.row_segment.shape[0]} and {self.segment_parent.shape[0]}: use attention_plan()"
            )
        check_tensor("segment_slots_indptr", self.segment_slots_indptr, shape=(self.num_segments + 1,))
        # Copied first and checked then: nobody can change a checked slot afterwards.
        for name in _PLAN_TENSORS:
            object.__setattr__(self, name, getattr(self, name).clone())
        # dataclasses.replace hands over the old plan's caches, which describe the old tensors.
        for name in ("_gather", "_layouts", "_workspaces", "_calls"):
            object.__setattr__(self, name, {})
        object.__setattr__(self, "max_slot", _checked_max_slot(self))


def _checked_max_slot(plan: AttentionPlan) -> int:
    """The greatest slot of a plan whose tensors hold to every rule; RangeError where they do not."""
    if choose_lane("attention", _CPU) == "reference":
        fault = reference.plan_fault(*(getattr(plan, name) for name in _PLAN_TENSORS))
        max_slot = int(plan.slots.max()) if plan.slots.numel() else -1
    else:
        rule, index, max_slot = native().attention_plan_check(
            plan.segment_parent.data_ptr(), plan.segment_start.data_ptr(), plan.segment_slots_indptr.data_ptr(),
            plan.num_segments, plan.slots.data_ptr(), plan.slots.shape[0], plan.row_segment.data_ptr(),
            plan.row_position.data_ptr(), plan.num_rows,
        )  # fmt: skip
        fault = reference.PlanFault(_RULES[rule], index) if rule else None
    if fault is not None:
        raise RangeError(f"attention_plan: {_RULE_TEXT[fault.rule].format(i=fault.at)}")
    return int(max_slot)


def _check_unchanged(plan: AttentionPlan) -> None:
    """Before a layout is built from the tensors: a write to them since must not lead a kernel out of the pools."""
    max_slot = _checked_max_slot(plan)
    if max_slot > plan.max_slot:
        raise RangeError(f"plan.slots was changed and names slot {max_slot}: make a new plan with attention_plan()")


def attention_plan(
    *,
    segment_parent: Tensor,
    segment_start: Tensor,
    segment_slots_indptr: Tensor,
    slots: Tensor,
    row_segment: Tensor,
    row_position: Tensor,
) -> AttentionPlan:
    """Describe one forward: a forest of segments (runs of token slots) and the rows that attend over it.

    A row at position p in segment s attends to every key at a position <= p on the path from the root to s, its own
    key included: K and V of the rows must be in their slots before attention runs. A child forks at its parent's end.

    Shapes (all int32, on the cpu; copied):
        segment_parent:       [num_segments], -1 for a root, parents before children
        segment_start:        [num_segments], position of the first token; 0 for a root
        segment_slots_indptr: [num_segments + 1], segment s owns slots[indptr[s]:indptr[s + 1]]
        slots:                [num_keys], slot of each key in position order
        row_segment:          [num_rows], -1 for a padding row, which sees nothing
        row_position:         [num_rows], inside the row's own segment (free for padding rows)
    Raises:
        DeviceError, DtypeError, ShapeError, StrideError, RangeError: naming the argument, entry and rule.
    Source: docs/design.md, attention.  Reference: rainkernels.reference.attention.plan_fault
    """
    for name, t in (("segment_parent", segment_parent), ("row_segment", row_segment)):
        check_tensor(name, t, dtype=torch.int32, shape=(None,), device=_CPU)
    return AttentionPlan(
        segment_parent, segment_start, segment_slots_indptr, slots, row_segment, row_position,
        row_segment.shape[0], segment_parent.shape[0],
    )  # fmt: skip


@overload
def tree_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: AttentionPlan, *, softmax_scale: float, softcap: float = ...,
    sliding_window: int = ..., sinks: Tensor | None = ..., out: Tensor | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def tree_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: AttentionPlan, *, softmax_scale: float, softcap: float = ...,
    sliding_window: int = ..., sinks: Tensor | None = ..., out: Tensor | None = ..., return_lse: Literal[True],
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
    Returns:
        out, or MergedState(out, lse) with return_lse; lse [num_rows, num_qo_heads] float32, natural log, sink included
    Edge cases:
        A padding row gives zeros and lse = -inf. Arithmetic is float32 for every dtype. On the cpu lane a row's bits do
        not depend on the other rows, on where the path is split, on thread count or instruction set.
    Raises:
        DeviceError, DtypeError, ShapeError, StrideError, RangeError: naming the argument.
    Devices: cpu; cuda runs the reference.  Reference: rainkernels.reference.attention.tree_attention
    """
    threads = torch.get_num_threads()
    try:
        signature = (
            q.shape, q.stride(), q.dtype, q.device, k_pool.shape, k_pool.dtype, k_pool.device, k_pool.is_contiguous(),
            v_pool.shape, v_pool.dtype, v_pool.device, v_pool.is_contiguous(),
            q.is_neg(), k_pool.is_neg(), v_pool.is_neg(), softmax_scale, softcap, sliding_window, threads,
        )  # fmt: skip
        call = plan._calls.get(signature)
    except (AttributeError, TypeError):  # not a tensor, or not a plan: the checks say which
        _check_attention(q, k_pool, v_pool, plan, softmax_scale, softcap, sliding_window)
        raise
    if call is None:
        call = _prepare(q, k_pool, v_pool, plan, softmax_scale, softcap, sliding_window, threads)
        plan._calls[signature] = call
    if sinks is not None:
        check_tensor("sinks", sinks, dtype=torch.float32, shape=(call.lse_shape[1],), device=q.device)
    if out is not None:
        check_tensor("out", out, dtype=q.dtype, shape=call.out_shape, device=q.device)
    if call.native is None:
        result, lse = reference.tree_attention(
            q, k_pool, v_pool, *_gathered(plan, q.device), softmax_scale=softmax_scale, softcap=softcap,
            sliding_window=sliding_window, sinks=sinks,
        )  # fmt: skip
        result = result if out is None else out.copy_(result)
        return MergedState(result, lse) if return_lse else result
    if out is None:
        out = q.new_empty(call.out_shape)
    lse_out = torch.empty(call.lse_shape) if return_lse else None
    # Taken out while in use, so that two threads sharing a plan never share a workspace.
    workspace = plan._workspaces.pop(call.workspace_floats, None)
    if workspace is None:
        workspace = torch.empty(call.workspace_floats)
    call.native(
        q.data_ptr(), k_pool.data_ptr(), v_pool.data_ptr(), out.data_ptr(),
        0 if lse_out is None else lse_out.data_ptr(), 0 if sinks is None else sinks.data_ptr(),
        workspace.data_ptr(), *call.arguments,
    )  # fmt: skip
    plan._workspaces[call.workspace_floats] = workspace
    return out if lse_out is None else MergedState(out, lse_out)


def _prepare(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: AttentionPlan, scale: float, softcap: float, window: int,
    threads: int,
) -> _Call:  # fmt: skip
    """Check everything a call's signature fixes, and derive what all its repetitions (the layers of a step) share."""
    _check_attention(q, k_pool, v_pool, plan, scale, softcap, window)
    num_rows, num_qo_heads, head_dim = q.shape
    _, num_kv_heads, head_dim_v = v_pool.shape
    out_shape, lse_shape = (num_rows, num_qo_heads, head_dim_v), (num_rows, num_qo_heads)
    if choose_lane("attention", q.device) == "reference":
        return _Call(None, out_shape, lse_shape, 0, ())
    layout = _layout(plan, num_qo_heads // num_kv_heads)
    sizes = (layout.data_ptr(), num_qo_heads, num_kv_heads, head_dim, head_dim_v, threads)
    arguments = (q.stride(0), q.stride(1), DTYPE_CODE[q.dtype], float(scale), float(softcap), int(window), *sizes)
    return _Call(native().attention_cpu, out_shape, lse_shape, native().attention_workspace_floats(*sizes), arguments)


def _gathered(plan: AttentionPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Slot index and length of every row's path on `device`, for the reference lane."""
    if device not in plan._gather:
        _check_unchanged(plan)
        index, length = reference.path_slots(
            plan.segment_parent, plan.segment_slots_indptr, plan.slots, plan.row_segment, plan.row_position
        )  # fmt: skip
        plan._gather[device] = index.to(device), length.to(device)
    return plan._gather[device]


def _layout(plan: AttentionPlan, group: int) -> Tensor:
    """The plan's row blocks for `group` query heads per KV head (csrc/cpu/attention_plan.cpp), built once."""
    layout = plan._layouts.get(group)
    if layout is None:
        _check_unchanged(plan)
        raw = native().attention_layout(
            plan.segment_parent.data_ptr(), plan.segment_start.data_ptr(), plan.segment_slots_indptr.data_ptr(),
            plan.num_segments, plan.slots.data_ptr(), plan.slots.shape[0], plan.row_segment.data_ptr(),
            plan.row_position.data_ptr(), plan.num_rows, group,
        )  # fmt: skip
        layout = plan._layouts[group] = torch.frombuffer(raw, dtype=torch.int32)
    return layout


def _check_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: AttentionPlan, scale: float, softcap: float, window: int
) -> None:
    if not isinstance(plan, AttentionPlan):
        raise DtypeError(f"plan must come from attention_plan(), got {type(plan).__name__}")
    check_tensor("q", q, dtype=FLOATS, shape=(None, None, None), contiguous=False)
    device, dtype = q.device, q.dtype
    num_rows, num_qo_heads, head_dim = q.shape
    check_tensor("k_pool", k_pool, dtype=dtype, shape=(None, None, head_dim), device=device)
    num_slots, num_kv_heads, _ = k_pool.shape
    check_tensor("v_pool", v_pool, dtype=dtype, shape=(num_slots, num_kv_heads, None), device=device)
    if num_rows != plan.num_rows:
        raise ShapeError(f"q has {num_rows} rows, the plan has {plan.num_rows}: build the plan from the same batch")
    if num_kv_heads == 0 or num_qo_heads == 0 or num_qo_heads % num_kv_heads:
        raise ShapeError(f"q has {num_qo_heads} heads, k_pool {num_kv_heads}: q's must be a positive multiple of it")
    if head_dim > 1 and q.stride(2) != 1:
        raise StrideError(f"q has strides {list(q.stride())}, its last dim must have stride 1: call .contiguous()")
    if plan.max_slot >= num_slots:
        raise RangeError(f"plan names slot {plan.max_slot}, k_pool has {num_slots}: allowed are 0..{num_slots - 1}")
    if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
        raise RangeError(f"softmax_scale is {scale}, it must be finite and > 0, usually head_dim ** -0.5")
    if not (isinstance(softcap, (int, float)) and math.isfinite(softcap) and softcap >= 0):
        raise RangeError(f"softcap is {softcap}, it must be finite and >= 0; 0 means none")
    if not (isinstance(window, int) and 0 <= window < 1 << 31):
        raise RangeError(f"sliding_window is {window}, it must be a number of tokens in 0..2**31-1; 0 means none")


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
        lse = -inf marks an empty partial, whatever its v holds; two empty partials give v = 0, lse = -inf.
    Raises:
        DeviceError, DtypeError, ShapeError, StrideError: naming the argument.
    Devices: cpu; cuda runs the reference.  Reference: rainkernels.reference.attention.merge_state
    """
    check_tensor("v_a", v_a, dtype=FLOATS, shape=(None, None, None))
    device, shape = v_a.device, v_a.shape
    check_tensor("lse_a", lse_a, dtype=torch.float32, shape=shape[:2], device=device)
    check_tensor("v_b", v_b, dtype=v_a.dtype, shape=shape, device=device)
    check_tensor("lse_b", lse_b, dtype=torch.float32, shape=shape[:2], device=device)
    if out is not None:
        check_tensor("out[0]", out[0], dtype=v_a.dtype, shape=shape, device=device)
        check_tensor("out[1]", out[1], dtype=torch.float32, shape=shape[:2], device=device)
    if choose_lane("attention", device) == "reference":
        v, lse = reference.merge_state(v_a, lse_a, v_b, lse_b)
        return MergedState(v, lse) if out is None else MergedState(out[0].copy_(v), out[1].copy_(lse))
    v, lse = (torch.empty_like(v_a), torch.empty_like(lse_a)) if out is None else out
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
