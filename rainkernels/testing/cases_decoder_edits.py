"""Named cases of edits in a decoder step: where, by which kinds of tables. Shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rainkernels.ops.decoder import Capture, EditSite, Tap
from rainkernels.ops.edits_tables import BasisTable, EditTable, Norm, Op
from rainkernels.testing.cases_decoder import DecoderCase

__all__ = ["CASES", "PLACES", "StackEdits", "captures_of", "edit_slots", "edit_table"]

Kind = Literal["private", "basis", "bfloat16", "preserve", "cap"]
NUM_SLOTS = 6  # 0 edits nothing, as the last but one (alpha 0) and the last (never filled) do
_OPS: tuple[Op, ...] = ("project", "boost", "set", "add", "tanh")
# Of a stack of two blocks.
PLACES: tuple[tuple[int, Tap], ...] = (
    (0, "attn_out"), (0, "mlp_out"), (0, "block_out"), (1, "attn_out"), (1, "mlp_out"), (1, "block_out"),
)  # fmt: skip


@dataclass(frozen=True)
class StackEdits:
    """Sites in their order; each has a table and a column of its own, or those of the site before."""

    id: str
    places: tuple[tuple[int, Tap], ...]
    kinds: tuple[Kind, ...] = ("private", "basis")  # of the tables in turn
    one_table: bool = False

    def __str__(self) -> str:
        return self.id

    def sites(self, hidden: int, seed: int = 0) -> list[EditSite]:
        """The sites, their tables filled."""
        made: list[EditSite] = []
        for i, (layer, tap) in enumerate(self.places):
            if self.one_table and made:
                made.append(made[0]._replace(layer=layer, tap=tap))
            else:
                kind = self.kinds[i % len(self.kinds)]
                made.append(EditSite(layer, tap, edit_table(kind, hidden, seed=seed + i), i))
        return made


def edit_table(kind: Kind, hidden: int, *, num_slots: int = NUM_SLOTS, seed: int = 0) -> EditTable | BasisTable:
    """A table of 1 to 3 directions per slot and all ops; the last slot but one has alpha 0, the last is empty."""
    g = torch.Generator().manual_seed(seed)
    norm: Norm = "preserve" if kind == "preserve" else "cap" if kind == "cap" else "none"
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    vectors = [torch.randn(3, hidden, generator=g) for _ in range(num_slots)]
    alpha = [0.0 if s == num_slots - 2 else 0.3 + 0.1 * s for s in range(num_slots)]
    if kind == "basis":
        shared = BasisTable.create(num_slots, vectors[0], dtype=dtype)
        for s in range(1, num_slots - 1):
            ops = [_OPS[(seed + s + j) % len(_OPS)] for j in range(3)]
            shared.set_slot(s, alpha=[alpha[s], 0.0, -alpha[s]], op=ops, target=0.5)
        return shared
    table = EditTable.create(num_slots, 3, hidden, dtype=dtype)
    for s in range(1, num_slots - 1):
        k = 1 + s % 3
        ops = [_OPS[(seed + s + j) % len(_OPS)] for j in range(k)]
        table.set_slot(s, vectors[s][:k], op=ops, alpha=alpha[s], target=0.5, norm=norm)
    return table


def edit_slots(sites: Sequence[EditSite], rows: int, seed: int = 0) -> Tensor:
    """Slots of every kind, by column."""
    columns = 1 + max((site.column for site in sites), default=-1)
    g = torch.Generator().manual_seed(seed)
    return torch.randint(NUM_SLOTS, (columns, rows), generator=g, dtype=torch.int32)


def captures_of(
    case: DecoderCase, rows: Tensor, places: Sequence[tuple[int, Tap]] = PLACES, dtype: torch.dtype = torch.float32
) -> tuple[Capture, ...]:
    """These rows of every place."""
    return tuple(Capture(layer, tap, rows, torch.zeros(len(rows), case.hidden, dtype=dtype)) for layer, tap in places)


CASES = [
    *(StackEdits(f"{tap}-{layer}", ((layer, tap),), ("private",)) for layer, tap in PLACES),
    *(StackEdits(f"basis-{tap}", ((0, tap),), ("basis",)) for _, tap in PLACES[:3]),
    StackEdits("every-place", PLACES, ("private", "basis", "preserve", "bfloat16", "cap")),
    StackEdits("two-at-every-place", PLACES * 2, ("basis", "private", "cap")),
    StackEdits("three-at-one-place", ((1, "block_out"),) * 3 + ((1, "mlp_out"),) * 3, ("private", "basis", "preserve")),
    StackEdits("one-table-everywhere", PLACES, ("private",), one_table=True),
]
