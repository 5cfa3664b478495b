"""StepPlan: what one step runs, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from raindecode.engine.kv_tree import Row
from raindecode.engine.logit_rows import LogitRow
from raindecode.engine.row_blocks import RowBlocks
from raindecode.engine.tap_rows import TapRows
from raindecode.engine.task import Task

_pools, _slot = attrgetter("pools"), attrgetter("slot")


@dataclass
class StepPlan:
    """Rows of one step by slot, and for every planned want the task, its index, the slot of its last token, and its kept
    logits by model.
    """

    blocks: RowBlocks
    rows: dict[int, Row] = field(default_factory=dict)
    served: list[tuple[Task, int, int, dict[int, LogitRow]]] = field(default_factory=list)
    taps: TapRows = field(default_factory=TapRows)
    charged: dict[Task, int] = field(default_factory=dict)
    forwards: list[int] = field(default_factory=list)  # masks of the models that ran in each

    def add(self, rows: Sequence[Row]) -> int:
        """Plan rows; how many times a model has to run one that it was not planned to."""
        if len(rows) > 1:
            slots = list(map(_slot, rows))
            if self.rows.keys().isdisjoint(slots) and len(set(slots)) == len(slots):
                self.rows.update(zip(slots, rows, strict=True))
                return sum(map(int.bit_count, map(_pools, rows)))
        added = 0
        for row in rows:
            there = self.rows.get(row.slot)
            if there is None:
                self.rows[row.slot] = row
                added += 1 if row.pools == 1 else row.pools.bit_count()
            elif row.pools & ~there.pools:
                added += (row.pools & ~there.pools).bit_count()
                self.rows[row.slot] = row._replace(pools=row.pools | there.pools)
        return added
