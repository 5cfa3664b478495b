"""TokenBatch: the one place where lists of integers become tensors."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raindecode.engine.kv_tree import Node, Row
from raindecode.engine.slots import TRASH_SLOT
from rainkernels.ops.attention import AttentionPlan, attention_plan_of


@dataclass(frozen=True)
class TokenBatch:
    """Rows of one forward, in depth-first order: the rows below any tree node are one interval.

    Attributes:
        input_ids: [1, T] int64.
        position_ids: [1, T] int64.
        slot_mapping: [T] int32, the slot each row's K/V is written to.
        plan: what each row attends to.
        row_of_slot: row index by slot.
        max_position: the largest position id.
    """

    input_ids: Tensor
    position_ids: Tensor
    slot_mapping: Tensor
    plan: AttentionPlan
    row_of_slot: dict[int, int]
    max_position: int

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[1]


class _Segments:
    """Runs on the paths of a batch's rows, as flat arrays; parents before children."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.start: list[int] = []
        self.indptr: list[int] = [0]
        self.slots: array[int] = array("i")

    def add(self, node: Node, parent: int) -> int:
        if not node.tokens:
            return parent
        self.parent.append(parent)
        self.start.append(node.start)
        self.slots.extend(node.slots)
        self.indptr.append(len(self.slots))
        return len(self.parent) - 1


def build_batches(rows: Iterable[Row], device: torch.device, max_rows: int, pad_rows: int = 0) -> list[TokenBatch]:
    """Lay rows out depth first and cut them into forwards of at most `max_rows`.

    Depth-first order puts a token's ancestors before it, so a row never needs a later forward. With `pad_rows` every
    forward has exactly that many rows; the padding writes to the trash slot and attends to nothing.
    """
    rows_at, below, roots = _touched(rows)
    segments = _Segments()
    ordered: list[Row] = []
    row_segment: list[int] = []
    stack = [(root, -1) for root in reversed(roots)]
    while stack:
        node, parent = stack.pop()
        index = segments.add(node, parent)
        here = rows_at.get(node)
        if here:
            here.sort(key=lambda row: row.position)
            ordered += here
            row_segment += [index] * len(here)
        stack += [(child, index) for child in reversed(below.get(node, ()))]
    return [
        _make(ordered[i : i + max_rows], row_segment[i : i + max_rows], segments, device, pad_rows)
        for i in range(0, len(ordered), max_rows)
    ]


def _touched(rows: Iterable[Row]) -> tuple[dict[Node, list[Row]], dict[Node, list[Node]], list[Node]]:
    """Rows by node, and the part of the tree above them as child lists and roots."""
    rows_at: dict[Node, list[Row]] = {}
    below: dict[Node, list[Node]] = {}
    roots: list[Node] = []
    known: set[Node] = set()
    for row in rows:
        node = row.node
        while row.position < node.start:  # the node was split after the row was made: its head holds the token
            assert node.parent is not None
            node = node.parent
        rows_at.setdefault(node, []).append(row)
        while node not in known:
            known.add(node)
            if node.parent is None:
                roots.append(node)
                break
            below.setdefault(node.parent, []).append(node)
            node = node.parent
    return rows_at, below, roots


def _make(
    rows: list[Row], row_segment: list[int], segments: _Segments, device: torch.device, pad_rows: int
) -> TokenBatch:
    slots = [row.slot for row in rows]
    padding = max(pad_rows - len(rows), 0)
    ids = np.zeros((2, len(rows) + padding), dtype=np.int64)
    ids[:, : len(rows)] = [[row.token for row in rows], [row.position for row in rows]]
    both = torch.from_numpy(ids).to(device, non_blocking=True)
    row_of_slot = {slot: i for i, slot in enumerate(slots)}
    if padding:
        row_segment = row_segment + [-1] * padding  # no segment: such a row attends to nothing
        slots = slots + [TRASH_SLOT] * padding
    plan = attention_plan_of(
        segment_parent=segments.parent,
        segment_start=segments.start,
        segment_slots_indptr=segments.indptr,
        slots=segments.slots,
        row_segment=row_segment,
        row_position=ids[1],
    )
    return TokenBatch(
        input_ids=both[:1],
        position_ids=both[1:],
        slot_mapping=torch.from_numpy(np.array(slots, dtype=np.int32)).to(device, non_blocking=True),
        plan=plan,
        row_of_slot=row_of_slot,
        max_position=int(ids[1].max(initial=0)),
    )
