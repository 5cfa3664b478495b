"""Pins: constant prompts whose K/V stay in the tree from one request to the next."""

from __future__ import annotations

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

    def takes(self, length: int) -> bool:
        """Whether a prompt of so many tokens would be pinned."""
        return LEAST_PINNED <= length <= self._tree.num_slots // _SHARE

    def pin(self, keys: Sequence[int], pools: int) -> bool:
        """Hold the K/V of a path, where all of `pools` have all of it; whether they did.

        Args:
            keys: the path as the KV tree spells it.
        """
        name = tuple(keys), pools
        if name in self._cursors:
            self._cursors.move_to_end(name)
            return True
        if not self.takes(len(keys)):
            return False
        cursor = self._tree.match(keys, pools=pools)
        if cursor.length < len(keys):
            self._tree.release(cursor)
            return False
        self._tree.part(cursor)
        self._cursors[name] = cursor
        while self.num_tokens > self._tree.num_slots // _SHARE:
            self._tree.release(self._cursors.popitem(last=False)[1])
        return True

    def clear(self) -> bool:
        """Let go of everything; whether there was anything."""
        there = bool(self._cursors)
        while self._cursors:
            self._tree.release(self._cursors.popitem()[1])
        return there
