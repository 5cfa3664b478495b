"""EditPath: which edit each row of a branch has. Integers only."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class EditPath:
    """A schedule as branches carry it: numbers of the engine instead of edits.

    Attributes:
        starts: ascending positions.
        numbers: number of the edit from each start on; 0 for none.
        salt: names the schedule, the same in every process.
    """

    starts: tuple[int, ...]
    numbers: tuple[int, ...]
    salt: int

    def at(self, position: int) -> int:
        """Number of the edit of the row at `position`."""
        i = bisect_right(self.starts, position)
        return self.numbers[i - 1] if i else 0
