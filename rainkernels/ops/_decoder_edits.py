"""Where a decoder step edits and captures hidden states: the records, what must hold of them, and what they break."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rainkernels._checks import FLOATS, check_choice, check_int, check_no_grad, check_tensor
from rainkernels.errors import DtypeError, RangeError, ShapeError, StrideError
from rainkernels.ops.edits_tables import BasisTable, EditTable
from rainkernels.reference import decoder as reference

Tap = Literal["attn_out", "mlp_out", "block_out"]
# Order shared with csrc/include/rainkernels/decoder.h (enum StackTap).
TAPS: tuple[Tap, ...] = ("attn_out", "mlp_out", "block_out")
_CPU = torch.device("cpu")


class EditSite(NamedTuple):
    """One table at one place of the stack.

    layer:  block, from 0 on
    tap:    "attn_out", the output of `out`, and "mlp_out", that of `down`, biases and updates included, before they are
            added to the residual; "block_out", the residual after the mlp's sum, which the next block or last norm reads
    table:  what each slot does to a row; read where it lies, so a slot may be rewritten between steps
    column: the row of a step's `edit_slots` that names each row's slot in `table`
    """

    layer: int
    tap: Tap
    table: EditTable | BasisTable
    column: int


class Capture(NamedTuple):
    """Hidden states wanted from a step: those of a place before the edits there, after all edits in front of it.

    layer, tap: the place, as in EditSite
    rows:       [n] int64, rows of the step (of all T), in any order
    out:        [n, hidden] float32, contiguous, memory of its own, written
    """

    layer: int
    tap: Tap
    rows: Tensor
    out: Tensor


def check_sites(sites: Sequence[EditSite], num_blocks: int, hidden: int) -> None:
    """Raise a typed error that names the site unless a step can run them."""
    for i, site in enumerate(sites):
        name = f"sites[{i}]"
        if not isinstance(site, EditSite):
            raise DtypeError(f"{name} must be an EditSite, got {type(site).__name__}")
        _check_place(name, site.layer, site.tap, num_blocks)
        if not isinstance(site.table, EditTable | BasisTable):
            raise DtypeError(f"{name}.table must be an EditTable or a BasisTable, got {type(site.table).__name__}")
        check_tensor(f"{name}.table", _directions(site.table), dtype=FLOATS, device=_CPU)
        if site.table.hidden_size != hidden:
            raise ShapeError(
                f"{name}.table has directions of {site.table.hidden_size} elements, the stack's hidden states have {hidden}"
            )
        check_int(f"{name}.column", site.column, 0, hint="it is a row of a step's edit_slots")


def check_slots(sites: Sequence[EditSite], edit_slots: Tensor, rows: int) -> None:
    """Raise a typed error unless every site finds its column."""
    check_tensor("edit_slots", edit_slots, dtype=torch.int32, shape=(None, rows), device=_CPU)
    for i, site in enumerate(sites):
        if site.column >= len(edit_slots):
            raise ShapeError(
                f"edit_slots has shape {list(edit_slots.shape)}, sites[{i}] reads column {site.column}: expected "
                f"[{site.column + 1} or more, {rows}]"
            )


def check_captures(
    captures: Sequence[Capture], num_blocks: int, hidden: int, others: Sequence[tuple[str, Tensor]]
) -> None:
    """Raise a typed error that names the capture unless its output can be written beside the step's other tensors."""
    for i, capture in enumerate(captures):
        name = f"captures[{i}]"
        if not isinstance(capture, Capture):
            raise DtypeError(f"{name} must be a Capture, got {type(capture).__name__}")
        _check_place(name, capture.layer, capture.tap, num_blocks)
        check_tensor(f"{name}.rows", capture.rows, dtype=torch.int64, shape=(None,), device=_CPU)
        shape = len(capture.rows), hidden
        check_tensor(f"{name}.out", capture.out, dtype=torch.float32, shape=shape, device=_CPU)
        check_no_grad(f"{name}.out", capture.out)
    outs = [(f"captures[{i}].out", capture.out) for i, capture in enumerate(captures)]
    _check_apart(outs, [*((f"captures[{i}].rows", capture.rows) for i, capture in enumerate(captures)), *others])


def first_fault(
    sites: Sequence[EditSite], edit_slots: Tensor | None, captures: Sequence[Capture], rows: int
) -> RangeError | None:
    """What the native step would find: the first slot outside its table, else the first captured row that there is not."""
    for i, site in enumerate(sites if edit_slots is not None else ()):
        assert edit_slots is not None
        values = edit_slots[site.column]
        wrong = torch.nonzero((values < 0) | (values >= site.table.num_slots)).flatten()
        if len(wrong):
            return slot_fault(sites, edit_slots, i, int(wrong[0]))
    for i, capture in enumerate(captures):
        wrong = torch.nonzero((capture.rows < 0) | (capture.rows >= rows)).flatten()
        if len(wrong):
            return capture_fault(captures, rows, i, int(wrong[0]))
    return None


def slot_fault(sites: Sequence[EditSite], edit_slots: Tensor, which: int, row: int) -> RangeError:
    """The slot that site `which` finds for `row` is not in its table."""
    site = sites[which]
    return RangeError(
        f"edit_slots[{site.column}, {row}] is {int(edit_slots[site.column, row])}, allowed: 0 to {site.table.num_slots} - 1 "
        f"in the table of sites[{which}] (layer {site.layer}, {site.tap}); 0 means no edit"
    )


def capture_fault(captures: Sequence[Capture], rows: int, which: int, index: int) -> RangeError:
    """The step does not have this row."""
    value = int(captures[which].rows[index])
    return RangeError(f"captures[{which}].rows[{index}] is {value}, allowed: 0 to {rows} - 1")


def row_edits(sites: Sequence[EditSite], edit_slots: Tensor | None) -> list[reference.RowEdits]:
    """The sites as the definition takes them."""
    if edit_slots is None:
        return []
    return [
        reference.RowEdits(site.layer, site.tap, edit_slots[site.column], site.table.reference_arguments())
        for site in sites
    ]


def _directions(table: EditTable | BasisTable) -> Tensor:
    return table.directions if isinstance(table, EditTable) else table.basis


def _check_place(name: str, layer: int, tap: Tap, num_blocks: int) -> None:
    check_int(f"{name}.layer", layer, 0, num_blocks - 1)
    check_choice(f"{name}.tap", tap, TAPS)


def _check_apart(outs: Sequence[tuple[str, Tensor]], others: Sequence[tuple[str, Tensor]]) -> None:
    """Of contiguous tensors: no output lies in another one's memory. Others may share theirs."""
    if not outs:
        return
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), i < len(outs), name)
        for i, (name, t) in enumerate([*outs, *others])
        if t.numel()
    )
    farthest = 0, 0, False, ""  # of the spans before, the one that ends last
    for span in spans:
        if span[0] < farthest[1] and (span[2] or farthest[2]):
            first, second = (span[3], farthest[3]) if span[2] else (farthest[3], span[3])
            raise StrideError(f"{first} shares memory with {second}: give it memory of its own")
        farthest = max(farthest, span, key=lambda s: s[1])
