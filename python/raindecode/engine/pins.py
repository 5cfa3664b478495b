"""Pins: constant prompts whose K/V stay in the tree from one request to the next."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from raindecode.engine.kv_tree import Cursor, KVTree

LEAST_PINNED = 64
"""Tokens below which a prompt costs less to compute than to look after."""
_SHARE = 2  # at most one in so many slots is pinned


class Pins:
    """Cursors at the ends of constant prompts, the least recently used first. They are given up before a request has to wait."""

    def __init__(self, tree: KVTree) -> None:
        self._tree = tree
        self._cursors: OrderedDict[tuple[Sequence[int], int], Cursor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._cursors)

    @property
    def num_tokens(self) -> int:
        """Of all pinned prompts, those that share a beginning counted apart."""
        return sum(len(keys) for keys, _ in self._cursors)

    @property
    def most(self) -> int:
        """Tokens that can be pinned at a time."""
        return self._tree.num_slots // _SHARE

    def takes(self, length: int, least: int = LEAST_PINNED) -> bool:
        """Whether a prompt of so many tokens would be pinned."""
        return least <= length <= self.most

    def pin(self, keys: Sequence[int], pools: int, *, least: int = LEAST_PINNED) -> array[int] | None:
        """Hold the K/V of a path, where all of `pools` have all of it; its slots, or None.

        Args:
            keys: the path as the KV tree spells it.
            least: tokens it must have.
        """
        name = tuple(keys), pools
        if name in self._cursors:
            self._cursors.move_to_end(name)
            return self._tree.slots(self._cursors[name])
        if not self.takes(len(keys), least):
            return None
        cursor = self._tree.match(keys, pools=pools)
        if cursor.length < len(keys):
            self._tree.release(cursor)
            return None
        self._tree.part(cursor)
        self._cursors[name] = cursor
        while self.num_tokens > self.most:
            self._tree.release(self._cursors.popitem(last=False)[1])
        return self._tree.slots(cursor)

    def clear(self) -> bool:
        """Let go of everything; whether there was anything."""
        there = bool(self._cursors)
        while self._cursors:
            self._tree.release(self._cursors.popitem()[1])
        return there
