"""Free KV slots as disjoint intervals, handed out contiguously where possible."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

TRASH_SLOT = 0  # padding rows write here; never handed out
_FIRST_FIT_LOOKS = 32  # intervals looked at before a request is pieced together from fragments


class SlotAllocator:
    """Hands out the slots 1 .. num_slots-1 of a pool; slot 0 is the trash slot.

    Args:
        num_slots: slots of the pool, the trash slot included; at least 2.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 2:
            raise ValueError(f"num_slots is {num_slots}, at least 2 are needed (slot 0 is the trash slot)")
        self.num_slots = num_slots
        self._end_of: dict[int, int] = {1: num_slots}  # interval start -> its exclusive end
        self._start_of: dict[int, int] = {num_slots: 1}
        self.num_free = num_slots - 1

    def allocate(self, count: int) -> array[int] | None:
        """`count` slots, one contiguous run when one exists; None (and no change) when too few are free."""
        if count > self.num_free:
            return None
        slots: array[int] = array("i")
        if count <= 0:
            return slots
        start = self._first_fit(count)
        if start is not None:
            self._take(start, count, slots)
            return slots
        while len(slots) < count:
            start, end = next(iter(self._end_of.items()))
            self._take(start, min(count - len(slots), end - start), slots)
        return slots

    def free(self, slots: Iterable[int]) -> None:
        """Give slots back. The caller owns each of them exactly once."""
        begin = previous = -2
        for slot in slots:
            if slot != previous + 1:
                if begin >= 0:
                    self._give(begin, previous + 1)
                begin = slot
            previous = slot
        if begin >= 0:
            self._give(begin, previous + 1)

    def _first_fit(self, count: int) -> int | None:
        for looked, (start, end) in enumerate(self._end_of.items()):
            if end - start >= count:
                return start
            if looked >= _FIRST_FIT_LOOKS:
                break
        return None

    def _take(self, start: int, count: int, into: array[int]) -> None:
        end = self._end_of.pop(start)
        into.extend(range(start, start + count))
        if start + count < end:
            self._end_of[start + count] = end
            self._start_of[end] = start + count
        else:
            del self._start_of[end]
        self.num_free -= count

    def _give(self, start: int, end: int) -> None:
        self.num_free += end - start
        left = self._start_of.pop(start, None)
        if left is not None:
            del self._end_of[left]
            start = left
        right = self._end_of.pop(end, None)
        if right is not None:
            del self._start_of[right]
            end = right
        # Freed intervals go last, so that first-fit keeps long untouched runs whole for long prefixes.
        self._end_of[start] = end
        self._start_of[end] = start
