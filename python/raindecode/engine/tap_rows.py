"""TapRows: which hidden states the wants of a step ask for, and the means they get."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raindecode.engine.edits import Tapped
from raindecode.engine.forward import Forward
from raindecode.engine.kv_tree import Row
from raindecode.engine.types import Want
from raindecode.hidden_edits import Site


class TapRows:
    """See the module's text. Sums grow forward by forward, so that a long prompt's states are never held together."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[Want, int, frozenset[int]]] = {}  # want, model, slots of its rows
        self._sums: dict[int, Tensor] = {}

    def add(self, want: Want, model: int, rows: Sequence[Row]) -> None:
        """Note a want of `model`'s states of these rows."""
        self._asked[id(want)] = want, model, frozenset(row.slot for row in rows)

    def wanted(self, forward: Forward) -> Tapped | None:
        """What is wanted of one forward; None for nothing."""
        if not self._asked:
            return None
        sites: dict[Site, None] = {}
        rows: list[list[int]] = []
        for part, model in zip(forward.parts, forward.models, strict=True):
            slots: set[int] = set()
            for want, of, own in self._asked.values():
                if of == model and not own.isdisjoint(part.batch.row_of_slot):
                    slots |= own
                    sites |= dict.fromkeys(want.taps)
            rows.append([row for slot, row in part.batch.row_of_slot.items() if slot in slots])
        return Tapped(list(sites), rows) if sites else None

    def take(self, forward: Forward, tapped: Tapped | None) -> None:
        """Add what a forward left."""
        if tapped is None or tapped.states is None:
            return
        place: dict[tuple[int, int], int] = {}  # index among the rows taken, by model and slot
        for part, model, rows in zip(forward.parts, forward.models, tapped.rows, strict=True):
            slot_of = {row: slot for slot, row in part.batch.row_of_slot.items()}
            for row in rows:
                place[model, slot_of[row]] = len(place)
        for name, (want, model, slots) in self._asked.items():
            found = [place[model, slot] for slot in slots if (model, slot) in place]
            if found:
                which = [tapped.sites.index(site) for site in want.taps]
                total = tapped.states[which][:, sorted(found)].sum(1, dtype=torch.float64)
                self._sums[name] = self._sums[name] + total if name in self._sums else total

    def mean(self, want: Want) -> Tensor:
        """[len(taps), hidden_size] float32 on the cpu."""
        _, _, slots = self._asked[id(want)]
        mean: Tensor = (self._sums[id(want)] / len(slots)).float().cpu()
        return mean
