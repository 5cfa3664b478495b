"""Attention plans: which keys every row sees, checked once, with everything derived from them kept beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rainkernels._checks import check_tensor
from rainkernels._lanes import choose_lane, native
from rainkernels.errors import RangeError, ShapeError
from rainkernels.reference import attention as reference

__all__ = [
    "AttentionPlan",
    "attention_plan",
    "attention_plan_of",
    "check_unchanged",
    "gathered",
    "layout_of",
    "plan_addresses",
]

_CPU = torch.device("cpu")
# Order shared with csrc/include/rainkernels/attention.h (enum PlanRule).
_RULES = ("", "indptr", "parent", "start", "slot", "row_segment", "row_position")
# The tensors of a plan in the order of its checks, each with the one before it that has the same length.
_PLAN_TENSORS: dict[str, str | None] = {
    "segment_parent": None, "segment_start": "segment_parent", "segment_slots_indptr": None, "slots": None,
    "row_segment": None, "row_position": "row_segment",
}  # fmt: skip
_CACHES = ("_gather", "_layouts", "_items", "_workspaces", "_calls")
_RULE_TEXT = {
    "indptr": "segment_slots_indptr[{i}] breaks the rule: it must start at 0, never decrease and end at len(slots)",
    "parent": "segment_parent[{i}] must be -1 (a root) or the index of an earlier segment: parents before children",
    "start": "segment_start[{i}] must be 0 for a root and the parent's start + the parent's number of slots otherwise: "
    "split the parent where the child forks",
    "slot": "slots[{i}] is negative: give every key a slot of the pool",
    "row_segment": "row_segment[{i}] must be a segment index, or -1 for a padding row that sees nothing",
    "row_position": "row_position[{i}] must lie inside its own segment, start <= position < start + number of slots",
}


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
    _items: dict[object, Any] = field(default_factory=dict, repr=False)  # ItemTable by tile rows, chunk and levels
    _workspaces: dict[object, Any] = field(default_factory=dict, repr=False)  # by lane and size
    _calls: dict[object, Any] = field(default_factory=dict, repr=False)  # by signature

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
        for name in _CACHES:
            object.__setattr__(self, name, {})
        object.__setattr__(self, "max_slot", _checked_max_slot(self))


def plan_addresses(plan: AttentionPlan) -> tuple[int, ...]:
    """The plan's tensors as the native planners take them: addresses and sizes."""
    return (
        plan.segment_parent.data_ptr(), plan.segment_start.data_ptr(), plan.segment_slots_indptr.data_ptr(),
        plan.num_segments, plan.slots.data_ptr(), plan.slots.shape[0], plan.row_segment.data_ptr(),
        plan.row_position.data_ptr(), plan.num_rows,
    )  # fmt: skip


def _checked_max_slot(plan: AttentionPlan) -> int:
    """The greatest slot of a plan whose tensors hold to every rule; RangeError where they do not."""
    if choose_lane("attention", _CPU) == "reference":
        fault = reference.plan_fault(*(getattr(plan, name) for name in _PLAN_TENSORS))
        max_slot = int(plan.slots.max()) if plan.slots.numel() else -1
    else:
        rule, index, max_slot = native().attention_plan_check(*plan_addresses(plan))
        fault = reference.PlanFault(_RULES[rule], index) if rule else None
    if fault is not None:
        raise RangeError(f"attention_plan: {_RULE_TEXT[fault.rule].format(i=fault.at)}")
    return int(max_slot)


def check_unchanged(plan: AttentionPlan) -> None:
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


def attention_plan_of(
    *,
    segment_parent: Sequence[int],
    segment_start: Sequence[int],
    segment_slots_indptr: Sequence[int],
    slots: Sequence[int],
    row_segment: Sequence[int],
    row_position: Sequence[int],
) -> AttentionPlan:
    """`attention_plan` of Python's numbers: what an engine has in lists becomes tensors once, here.

    Raises:
        ShapeError, RangeError: as `attention_plan`; OverflowError: a number is no 32-bit int.
    """
    lists = (segment_parent, segment_start, segment_slots_indptr, slots, row_segment, row_position)
    plan = object.__new__(AttentionPlan)
    fields: dict[str, Any] = {
        name: torch.from_numpy(np.array(values, dtype=np.int32))
        for name, values in zip(_PLAN_TENSORS, lists, strict=True)
    }
    num_rows, num_segments = len(row_segment), len(segment_parent)
    if (len(segment_start), len(segment_slots_indptr), len(row_position)) != (num_segments, num_segments + 1, num_rows):
        raise ShapeError(
            f"there are {num_segments} parents, {len(segment_start)} starts, {len(segment_slots_indptr)} offsets of slots, "
            f"{num_rows} rows and {len(row_position)} positions: give one start per parent and one offset more, and one "
            "position per row"
        )
    fields |= {"num_rows": num_rows, "num_segments": num_segments}
    fields |= {name: {} for name in _CACHES}
    plan.__dict__.update(fields)
    plan.__dict__["max_slot"] = _checked_max_slot(plan)
    return plan


def gathered(plan: AttentionPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Slot index and length of every row's path on `device`, for the reference lane."""
    if device not in plan._gather:
        check_unchanged(plan)
        index, length = reference.path_slots(
            plan.segment_parent, plan.segment_slots_indptr, plan.slots, plan.row_segment, plan.row_position
        )  # fmt: skip
        plan._gather[device] = index.to(device), length.to(device)
    return plan._gather[device]


def layout_of(plan: AttentionPlan, group: int) -> Tensor:
    """The plan's row blocks for `group` query heads per KV head (csrc/cpu/attention_plan.cpp), built once."""
    layout = plan._layouts.get(group)
    if layout is None:
        check_unchanged(plan)
        raw = native().attention_layout(*plan_addresses(plan), group)
        layout = plan._layouts[group] = torch.frombuffer(raw, dtype=torch.int32)
    return layout
