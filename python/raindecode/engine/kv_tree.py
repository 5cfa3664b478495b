"""KVTree: a radix tree of token runs and the KV slots that hold them. Integers only.

A node owns a run of tokens and one slot per token. A path from a root spells a token sequence; branches share every
node above the point where they diverge, so nothing is ever copied. Roots are kept per namespace: K/V made by another
model, adapter or edit never match. Cursors are the only references: a node without cursors and children is evictable.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count, repeat
from typing import NamedTuple

from raindecode.engine.slots import SlotAllocator


class OutOfSlots(Exception):
    """No eviction can free enough slots. The tree is unchanged."""


class Node:
    """A run of tokens. `ready` of them have K/V in every pool of the bit mask `pools`."""

    __slots__ = ("children", "cursors", "parent", "pools", "ready", "slots", "spare", "start", "tokens")

    def __init__(self, parent: Node | None, start: int, tokens: list[int], slots: array[int], pools: int) -> None:
        self.parent = parent
        self.start = start  # position of tokens[0]
        self.tokens = tokens
        self.slots = slots
        self.spare: array[int] = array("i")  # reserved for this run, not yet used
        self.ready = 0
        self.pools = pools
        self.children: dict[int, Node] = {}  # by first token
        self.cursors: set[Cursor] = set()

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Cursor:
    """A position in the tree: the first `offset` tokens of `node`. Keeps its path from being evicted."""

    __slots__ = ("namespace", "node", "offset")

    def __init__(self, namespace: Hashable, node: Node, offset: int) -> None:
        self.namespace = namespace
        self.node = node
        self.offset = offset

    @property
    def length(self) -> int:
        """Tokens from the root to here."""
        return self.node.start + self.offset


class Row(NamedTuple):
    """One token to run by the models of the bit mask `pools`: its K/V go to `slot`, and it belongs to `node`."""

    token: int
    position: int
    slot: int
    node: Node
    pools: int = 1


_row = partial(tuple.__new__, Row)  # Row(...) takes three times as long


def _rows(tokens: Iterable[int], first: int, slots: Iterable[int], node: Node, pools: int) -> list[Row]:
    """A row per token, the first at position `first`."""
    return list(map(_row, zip(tokens, count(first), slots, repeat(node), repeat(pools))))


class KVTree:
    """Radix trees over one pool of token slots.

    Args:
        num_slots: slots of the pool, trash slot 0 included.
    """

    def __init__(self, num_slots: int) -> None:
        self._allocator = SlotAllocator(num_slots)
        self._roots: dict[Hashable, Node] = {}
        self._evictable: OrderedDict[Node, None] = OrderedDict()  # least recently used first
        self._pending: list[tuple[Node, int]] = []  # the uncommitted step: (node, pools it gained)
        self._spared: set[Node] = set()  # nodes that hold reserved slots
        self.num_cursors = 0
        self.num_evicted = 0  # tokens evicted so far

    # ---- accounting -----------------------------------------------------------------------------------------------
    @property
    def num_slots(self) -> int:
        """Slots that can hold tokens (the trash slot does not count)."""
        return self._allocator.num_slots - 1

    @property
    def num_free(self) -> int:
        return self._allocator.num_free

    @property
    def num_used(self) -> int:
        return self.num_slots - self.num_free

    def nodes(self) -> Iterator[Node]:
        """Every node, parents before children, the empty roots included."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    # ---- cursors --------------------------------------------------------------------------------------------------
    def root(self, namespace: Hashable = None) -> Cursor:
        """A cursor before the first token of `namespace`."""
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = Node(None, 0, [], array("i"), -1)
        return self._attach(Cursor(namespace, node, 0))

    def fork(self, cursor: Cursor) -> Cursor:
        """A second cursor at the same place. Copies nothing."""
        return self._attach(Cursor(cursor.namespace, cursor.node, cursor.offset))

    def match(self, tokens: Sequence[int], namespace: Hashable = None, pools: int = 1) -> Cursor:
        """A cursor after the longest prefix of `tokens` whose K/V are ready in all of `pools`."""
        cursor = self.root(namespace)
        done = 0
        while done < len(tokens):
            node = self._step_down(cursor, tokens[done])
            if node is None or (node.pools & pools) != pools:
                break
            moved = _common(node.tokens, cursor.offset, tokens, done, node.ready)
            cursor.offset += moved
            done += moved
            if moved == 0 or cursor.offset < len(node.tokens):
                break
        if cursor.offset == 0 and cursor.node.parent is not None:
            self._move(cursor, cursor.node.parent, len(cursor.node.parent.tokens))
        return cursor

    def rewind(self, cursor: Cursor, count: int) -> None:
        """Move the cursor `count` tokens towards the root. What lies behind it stays until evicted."""
        if not 0 <= count <= cursor.length:
            raise ValueError(f"cannot rewind {count} tokens: the cursor has {cursor.length}")
        node, offset = cursor.node, cursor.offset
        while node.parent is not None and count >= offset:
            count -= offset
            node = node.parent
            offset = len(node.tokens)
        self._move(cursor, node, offset - count)

    def release(self, cursor: Cursor) -> None:
        """Drop a cursor. Its path stays cached until the slots are needed."""
        self._detach(cursor)
        self.num_cursors -= 1

    def part(self, cursor: Cursor) -> None:
        """Make the cursor stand at the end of a node, so that it holds nothing behind it."""
        if cursor.offset < len(cursor.node.tokens):
            self._split(cursor.node, cursor.offset)

    def tokens(self, cursor: Cursor) -> list[int]:
        """The token path from the root to the cursor."""
        parts: list[list[int]] = [cursor.node.tokens[: cursor.offset]]
        node = cursor.node.parent
        while node is not None:
            parts.append(node.tokens)
            node = node.parent
        return [t for part in reversed(parts) for t in part]

    def slots(self, cursor: Cursor) -> array[int]:
        """The slot of every token from the root to the cursor."""
        parts = [cursor.node.slots[: cursor.offset]]
        node = cursor.node.parent
        while node is not None:
            parts.append(node.slots)
            node = node.parent
        path: array[int] = array("i")
        for part in reversed(parts):
            path.extend(part)
        return path

    # ---- growth ---------------------------------------------------------------------------------------------------
    def extend(
        self, cursor: Cursor, tokens: Sequence[int], *, reserve: int = 0, pools: int = 1, last: int = 0
    ) -> list[Row]:
        """Move the cursor along `tokens`, creating what is missing, and return the rows that have to be run.

        Args:
            reserve: slots to keep in one run for a chain that will grow to this many new tokens.
            pools: bit mask of the KV pools that must be filled along `tokens`.
            last: mask of pools whose models run the last token again when its K/V exist already (its logits are wanted).

        Raises:
            OutOfSlots: not enough free or evictable slots; nothing has changed.
        """
        walked, rows, refilled = self._walk(cursor, tokens, pools)
        missing = tokens[walked:]
        if missing:
            try:
                rows += self._append(cursor, missing, max(reserve - walked, len(missing)), pools)
            except OutOfSlots:
                self._undo_pools(refilled)
                self._pending = [entry for entry in self._pending if entry not in refilled]
                self.rewind(cursor, walked)
                raise
        elif last and tokens and cursor.offset <= cursor.node.ready:
            node, at = cursor.node, cursor.offset - 1
            if rows and rows[-1].slot == node.slots[at]:
                last |= rows.pop().pools
            rows.append(Row(node.tokens[at], node.start + at, node.slots[at], node, last))
        return rows

    def path_rows(self, cursor: Cursor, first: int, pools: int) -> list[Row]:
        """Rows of the tokens from position `first` to the cursor, to be run by `pools` whether they have run or not."""
        rows: list[Row] = []
        node: Node | None = cursor.node
        end = cursor.offset
        while node is not None and node.start + end > first:
            begin = max(first - node.start, 0)
            rows += _rows(node.tokens[begin:end], node.start + begin, node.slots[begin:end], node, pools)
            node = node.parent
            end = len(node.tokens) if node is not None else 0
        return rows

    def commit(self) -> None:
        """The rows returned since the last commit have run: their K/V may be matched from now on."""
        refilled = []
        for node, gained in self._pending:
            node.ready = len(node.tokens)
            if gained:
                refilled.append(node)
        self._pending.clear()
        for node in refilled:
            self._rejoin(node)

    def rollback(self) -> None:
        """The step failed: forget the tokens that were not run. Cursors beyond them move back to what is left."""
        self._undo_pools(self._pending)
        for node, _ in reversed(self._pending):
            if node.ready == len(node.tokens):
                continue
            for child in list(node.children.values()):
                self._forget(child)
            self._truncate(node)
        self._pending.clear()

    def evict(self, count: int) -> int:
        """Free at least `count` slots from the least recently used unreferenced leaves, if there are that many."""
        freed = 0
        while freed < count and self._evictable:
            node, _ = self._evictable.popitem(last=False)
            freed += len(node.slots)
            self._drop(node)
        self.num_evicted += freed
        return freed

    def clear(self) -> int:
        """Evict everything no cursor holds; the number of slots freed."""
        return self.evict(self._allocator.num_slots)

    # ---- inside ---------------------------------------------------------------------------------------------------
    def _walk(self, cursor: Cursor, tokens: Sequence[int], pools: int) -> tuple[int, list[Row], list[tuple[Node, int]]]:
        """Advance over tokens the tree has: how many, rows for those that lack a pool, and the nodes of these rows."""
        done = 0
        rows: list[Row] = []
        refilled: list[tuple[Node, int]] = []
        while done < len(tokens):
            node = self._step_down(cursor, tokens[done])
            if node is None:
                break
            moved = _common(node.tokens, cursor.offset, tokens, done, len(node.tokens))
            if moved == 0:
                break
            gained = pools & ~node.pools
            if gained:
                node = self._isolate(cursor, moved)
                rows += _rows(node.tokens, node.start, node.slots, node, gained)
                node.pools |= gained
                refilled.append((node, gained))
            else:
                cursor.offset += moved
            done += moved
        self._pending += refilled
        return done, rows, refilled

    def _step_down(self, cursor: Cursor, token: int) -> Node | None:
        """The node whose token at the cursor is looked at next; enters a child at the end of a node."""
        node = cursor.node
        if cursor.offset < len(node.tokens):
            return node
        child = node.children.get(token)
        if child is not None:
            self._move(cursor, child, 0)
        return child

    def _isolate(self, cursor: Cursor, moved: int) -> Node:
        """Make the `moved` tokens after the cursor a node of their own and put the cursor at its end."""
        node = cursor.node
        if cursor.offset > 0:
            self._split(node, cursor.offset)
        # After a split `node` is the tail; the cursor stands at the end of the head or at the tail's start.
        if moved < len(node.tokens):
            node = self._split(node, moved)
        self._move(cursor, node, len(node.tokens))
        return node

    def _rejoin(self, node: Node) -> None:
        """Give a node's run to its parent where nothing tells them apart any more: the cut was where a pool ended.

        A chain that follows another one with more pools is refilled token by token, and would leave a node for each.
        """
        parent = node.parent
        if parent is None or parent.parent is None:
            return
        if len(parent.children) > 1 or parent.pools != node.pools or parent.ready < len(parent.tokens):
            return
        shift = len(parent.tokens)
        self._return_spare(parent)
        parent.spare, node.spare = node.spare, array("i")
        self._spared.discard(node)
        if parent.spare:
            self._spared.add(parent)
        parent.tokens.extend(node.tokens)
        parent.slots.extend(node.slots)
        parent.ready += node.ready
        parent.children = node.children
        for child in node.children.values():
            child.parent = parent
        for cursor in node.cursors:
            cursor.node = parent
            cursor.offset += shift
            parent.cursors.add(cursor)
        node.cursors, node.children, node.parent = set(), {}, None
        if self._evictable.pop(node, 0) is None and not parent.cursors and not parent.children:
            self._evictable[parent] = None

    def _append(self, cursor: Cursor, tokens: Sequence[int], reserve: int, pools: int) -> list[Row]:
        node = cursor.node
        if cursor.offset < len(node.tokens):
            self._split(node, cursor.offset)
            node = cursor.node
        in_place = not node.children and node.parent is not None and node.pools == pools
        available = node.spare if in_place else array("i")
        if len(available) < len(tokens):
            self._return_spare(node)
            taken = self._allocate(reserve, len(tokens))
            if taken is None:
                raise OutOfSlots(
                    f"{len(tokens)} slots wanted, {self.num_free} of {self.num_slots} free and no more to evict"
                )
            available = taken
        slots = available[: len(tokens)]
        if in_place:
            first = len(node.tokens)
            node.tokens.extend(tokens)
            node.slots.extend(slots)
        else:
            first = 0
            child = Node(node, node.end, list(tokens), slots, pools)
            node.children[tokens[0]] = child
            self._return_spare(node)
            self._evictable.pop(node, None)
            node = child
        node.spare = available[len(tokens) :]
        if node.spare:
            self._spared.add(node)
        else:
            self._spared.discard(node)
        self._pending.append((node, 0))
        self._move(cursor, node, len(node.tokens))
        return _rows(tokens, node.start + first, slots, node, pools)

    def _allocate(self, wanted: int, needed: int) -> array[int] | None:
        """`wanted` slots where they are free, else `needed`, evicting for these; None when there are not so many."""
        slots = self._allocator.allocate(wanted)
        if slots is not None:
            return slots
        if self.num_free < needed:  # others' reservations go before anything that is cached
            for node in list(self._spared):
                self._return_spare(node)
        if self.num_free < needed:
            self.evict(needed - self.num_free)
        return self._allocator.allocate(needed)

    def _split(self, node: Node, at: int) -> Node:
        """Cut a node: a new head takes the first `at` tokens, `node` keeps the rest. Returns the head."""
        parent = node.parent
        assert parent is not None
        head = Node(parent, node.start, node.tokens[:at], node.slots[:at], node.pools)
        head.ready = min(node.ready, at)
        parent.children[head.tokens[0]] = head
        head.children[node.tokens[at]] = node
        node.parent = head
        node.tokens, node.slots = node.tokens[at:], node.slots[at:]
        node.start += at
        node.ready = max(node.ready - at, 0)
        for cursor in [c for c in node.cursors if c.offset <= at]:
            node.cursors.discard(cursor)
            cursor.node = head
            head.cursors.add(cursor)
        for cursor in node.cursors:
            cursor.offset -= at
        self._pending += [(head, gained) for other, gained in self._pending if other is node]
        if not node.cursors and not node.children:
            self._return_spare(node)
            self._evictable[node] = None
        return head

    @staticmethod
    def _undo_pools(pending: Sequence[tuple[Node, int]]) -> None:
        for node, gained in pending:
            node.pools &= ~gained

    def _attach(self, cursor: Cursor) -> Cursor:
        self.num_cursors += 1
        cursor.node.cursors.add(cursor)
        self._evictable.pop(cursor.node, None)
        return cursor

    def _detach(self, cursor: Cursor) -> None:
        node = cursor.node
        node.cursors.discard(cursor)
        if not node.cursors and not node.children:
            self._return_spare(node)
            if node.parent is not None:
                self._evictable[node] = None
            elif not node.tokens:
                self._roots.pop(cursor.namespace, None)

    def _move(self, cursor: Cursor, node: Node, offset: int) -> None:
        if node is not cursor.node:
            old = cursor.node
            node.cursors.add(cursor)
            self._evictable.pop(node, None)
            old.cursors.discard(cursor)
            if not old.cursors and not old.children and old.parent is not None:
                self._return_spare(old)
                self._evictable[old] = None
            cursor.node = node
        cursor.offset = offset

    def _return_spare(self, node: Node) -> None:
        if node.spare:
            self._allocator.free(node.spare)
            node.spare = array("i")
            self._spared.discard(node)

    def _drop(self, node: Node) -> None:
        """Remove an unreferenced leaf; its parent may become one."""
        parent = node.parent
        assert parent is not None
        self._return_spare(node)
        self._allocator.free(node.slots)
        del parent.children[node.tokens[0]]
        node.parent = None
        if parent.children or parent.cursors:
            return
        if parent.parent is not None:
            self._evictable[parent] = None
            self._evictable.move_to_end(parent, last=False)  # at least as old as the leaf it lost
        else:
            for namespace, root in list(self._roots.items()):
                if root is parent:
                    del self._roots[namespace]

    def _forget(self, node: Node) -> None:
        """Remove a subtree whose tokens were never run; its cursors fall back to the parent's end."""
        for child in list(node.children.values()):
            self._forget(child)
        parent = node.parent
        if parent is None:
            return
        for cursor in list(node.cursors):
            self._move(cursor, parent, len(parent.tokens))
        self._evictable.pop(node, None)
        self._drop(node)

    def _truncate(self, node: Node) -> None:
        if node.parent is None:
            return
        if node.ready == 0:
            self._forget(node)
            return
        self._allocator.free(node.slots[node.ready :])
        del node.tokens[node.ready :]
        del node.slots[node.ready :]
        for cursor in node.cursors:
            cursor.offset = min(cursor.offset, node.ready)


def _common(run: list[int], offset: int, tokens: Sequence[int], done: int, limit: int) -> int:
    """How many tokens of run[offset:limit] equal tokens[done:]."""
    count = min(limit - offset, len(tokens) - done)
    if count <= 0:
        return 0
    if run[offset : offset + count] == list(tokens[done : done + count]):
        return count
    for i in range(count):
        if run[offset + i] != tokens[done + i]:
            return i
    return count
