"""TokenBatch: the one place where lists of integers become tensors."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raindecode.engine.branch import EDIT_SHIFT
from raindecode.engine.kv_tree import Node, Row
from raindecode.engine.slots import TRASH_SLOT
from rainkernels.ops.attention import AttentionPlan, attention_plan_of


@dataclass(frozen=True)
class TokenBatch:
    """Rows of one forward, in depth-first order: the rows below any tree node are one interval.

    `build_batches` makes it on the host, `upload` copies it to where the model is.

    Attributes:
        input_ids: [1, T] int64.
        position_ids: [1, T] int64.
        slot_mapping: [T] int32, the slot each row's K/V is written to.
        plan: what each row attends to.
        row_of_slot: row index by slot.
        max_position: the largest position id.
        edits: number of each row's edit of hidden states [T]; None where no row has one.
    """

    input_ids: Tensor
    position_ids: Tensor
    slot_mapping: Tensor
    plan: AttentionPlan
    row_of_slot: dict[int, int]
    max_position: int
    edits: npt.NDArray[np.int64] | None = None

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[1]


class Part(NamedTuple):
    """Rows of one forward: `member` 0 is the model as it is, member i the model with its adapter i - 1."""

    member: int
    batch: TokenBatch


_position = attrgetter("position")


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


def build_batches(rows: Iterable[Row], max_rows: int, pad_rows: int = 0) -> list[TokenBatch]:
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
            here.sort(key=_position)
            ordered += here
            row_segment += [index] * len(here)
        stack += [(child, index) for child in reversed(below.get(node, ()))]
    return [
        _make(ordered[i : i + max_rows], row_segment[i : i + max_rows], segments, pad_rows)
        for i in range(0, len(ordered), max_rows)
    ]


def stage(batch: TokenBatch, wanted: Sequence[int], rows: int, *, pinned: bool) -> Tensor:
    """[4, rows] int64 on the host: ids, positions, slots and the wanted rows of a batch, so that one copy takes them all.

    Rows past the batch's are padding: token 0 at position 0 in the trash slot. `pinned` memory is copied without the host
    waiting; torch gives it to nobody else before the copy is done.
    """
    return stage_all([batch], [wanted], rows, pinned=pinned)


def stage_all(batches: Sequence[TokenBatch], wanted: Sequence[Sequence[int]], rows: int, *, pinned: bool) -> Tensor:
    """[4, rows * len(batches)] int64: as `stage`, `rows` for each batch and one batch behind the other.

    Wanted rows are counted over all of them.
    """
    host = torch.zeros(4, rows * len(batches), dtype=torch.int64, pin_memory=pinned)
    for i, batch in enumerate(batches):
        own, used = host[:, rows * i : rows * (i + 1)], batch.num_rows
        own[0, :used] = batch.input_ids[0]
        own[1, :used] = batch.position_ids[0]
        own[2, :used] = batch.slot_mapping
        own[2, used:] = TRASH_SLOT
    named = [rows * i + row for i, mine in enumerate(wanted) for row in mine]
    host[3, : len(named)] = torch.tensor(named, dtype=torch.int64)
    return host


def upload(batch: TokenBatch, wanted: Sequence[int], device: torch.device) -> tuple[TokenBatch, Tensor]:
    """A batch made on the host, and the indices of its wanted rows [len(wanted)] int64, on `device`."""
    if device.type == "cpu":
        return batch, torch.tensor(wanted, dtype=torch.int64)
    used = batch.num_rows
    host = stage(batch, wanted, max(used, len(wanted)), pinned=device.type == "cuda")
    there = host.to(device, non_blocking=True)
    placed = replace(
        batch, input_ids=there[:1, :used], position_ids=there[1:2, :used], slot_mapping=there[2, :used].int()
    )
    return placed, there[3, : len(wanted)]


def _touched(rows: Iterable[Row]) -> tuple[dict[Node, list[Row]], dict[Node, list[Node]], list[Node]]:
    """Rows by node, and the part of the tree above them as child lists and roots."""
    rows_at: dict[Node, list[Row]] = {}
    below: dict[Node, list[Node]] = {}
    roots: list[Node] = []
    known: set[Node] = set()
    last: Node | None = None  # rows of one node mostly come together
    here: list[Row] = []
    for row in rows:
        node = row.node
        if node is last and row.position >= node.start:
            here.append(row)
            continue
        while row.position < node.start:  # the node was split after the row was made: its head holds the token
            assert node.parent is not None
            node = node.parent
        last, here = node, rows_at.setdefault(node, [])
        here.append(row)
        while node not in known:
            known.add(node)
            if node.parent is None:
                roots.append(node)
                break
            below.setdefault(node.parent, []).append(node)
            node = node.parent
    return rows_at, below, roots


def _make(rows: list[Row], row_segment: list[int], segments: _Segments, pad_rows: int) -> TokenBatch:
    tokens, positions, places, _, _ = zip(*rows, strict=True)
    slots = list(places)
    padding = max(pad_rows - len(rows), 0)
    ids = np.zeros((2, len(rows) + padding), dtype=np.int64)
    ids[0, : len(rows)], ids[1, : len(rows)] = tokens, positions
    edits = ids[0] >> EDIT_SHIFT
    edited = bool(edits.any())
    if edited:
        ids[0] &= (1 << EDIT_SHIFT) - 1
    both = torch.from_numpy(ids)
    row_of_slot = dict(zip(slots, range(len(slots)), strict=True))
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
        slot_mapping=torch.from_numpy(np.array(slots, dtype=np.int32)),
        plan=plan,
        row_of_slot=row_of_slot,
        max_position=int(ids[1].max(initial=0)),
        edits=edits if edited else None,
    )
