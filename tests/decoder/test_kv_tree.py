"""KVTree and its slots: paths, sharing, eviction, reservations, rollback, and exact accounts."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from raindecode.engine.branch import Branch, Ledger
from raindecode.engine.kv_tree import Cursor, KVTree, Node, OutOfSlots
from raindecode.engine.slots import TRASH_SLOT, SlotAllocator


def run(tree: KVTree, cursor: Cursor, tokens: list[int], reserve: int = 0) -> list[int]:
    """Extend and commit; the slots of the rows that had to run."""
    rows = tree.extend(cursor, tokens, reserve=reserve)
    tree.commit()
    return [row.slot for row in rows]


def grown(tree: KVTree, tokens: list[int], namespace: Hashable = None) -> Cursor:
    cursor = tree.root(namespace)
    run(tree, cursor, tokens)
    return cursor


# ---- slots ------------------------------------------------------------------------------------------------------------
def test_slots_are_handed_out_in_one_run_where_one_is_free() -> None:
    slots = SlotAllocator(12)
    a, b, c = slots.allocate(3), slots.allocate(3), slots.allocate(3)
    assert a is not None
    assert b is not None
    assert c is not None
    assert list(a) == list(range(a[0], a[0] + 3))
    slots.free(b)
    slots.free(a)  # now one run of six
    again = slots.allocate(6)
    assert again is not None
    assert list(again) == list(range(again[0], again[0] + 6))
    assert TRASH_SLOT not in {*c, *again}


def test_slots_are_pieced_together_when_no_run_is_long_enough() -> None:
    slots = SlotAllocator(11)
    parts = [slots.allocate(2) for _ in range(5)]
    for part in parts[::2]:
        assert part is not None
        slots.free(part)
    pieced = slots.allocate(6)
    assert pieced is not None
    assert sorted(pieced) == sorted(s for part in parts[::2] for s in part or ())
    assert slots.num_free == 0


def test_too_many_slots_change_nothing() -> None:
    slots = SlotAllocator(5)
    assert slots.allocate(5) is None
    assert slots.num_free == 4
    assert list(slots.allocate(0) or ()) == []


@pytest.mark.parametrize("num_slots", [1, 0, -3])
def test_a_pool_holds_at_least_one_token(num_slots: int) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        SlotAllocator(num_slots)


# ---- paths ------------------------------------------------------------------------------------------------------------
def test_branches_share_what_they_have_in_common() -> None:
    tree = KVTree(50)
    a = grown(tree, [1, 2, 3, 4])
    b = tree.root()
    assert len(run(tree, b, [1, 2, 5])) == 1
    assert tree.slots(a)[:2] == tree.slots(b)[:2]
    assert tree.num_used == 5
    assert tree.tokens(a) == [1, 2, 3, 4]
    assert tree.tokens(b) == [1, 2, 5]


def test_fork_copies_nothing_at_any_token() -> None:
    tree = KVTree(50)
    a = grown(tree, [1, 2, 3, 4])
    for back in range(4):
        b = tree.fork(a)
        tree.rewind(b, back)
        used = tree.num_used
        run(tree, b, [9, back])
        assert tree.num_used == used + 2
        assert tree.tokens(b) == [*[1, 2, 3, 4][: 4 - back], 9, back]
    assert tree.tokens(a) == [1, 2, 3, 4]


def test_namespaces_never_match_each_other() -> None:
    tree = KVTree(50)
    grown(tree, [1, 2, 3])
    other = tree.match([1, 2, 3], namespace="adapter")
    assert other.length == 0
    assert len(run(tree, other, [1, 2, 3])) == 3
    assert tree.match([1, 2, 3, 4]).length == 3


def test_only_committed_tokens_are_matched() -> None:
    tree = KVTree(50)
    a = tree.root()
    tree.extend(a, [1, 2, 3])
    assert tree.match([1, 2, 3]).length == 0
    tree.commit()
    assert tree.match([1, 2, 3]).length == 3


def test_the_last_row_comes_again_when_its_logits_are_wanted() -> None:
    tree = KVTree(50)
    slots = tree.slots(grown(tree, [1, 2, 3]))
    b = tree.root()
    assert tree.extend(b, [1, 2, 3]) == []
    tree.rewind(b, 3)
    (row,) = tree.extend(b, [1, 2, 3], last=True)
    assert (row.token, row.position, row.slot) == (3, 2, slots[2])


@pytest.mark.parametrize("count", [-1, 4])
def test_rewinding_beyond_the_root_is_refused(count: int) -> None:
    tree = KVTree(50)
    cursor = grown(tree, [1, 2, 3])
    with pytest.raises(ValueError, match="cannot rewind"):
        tree.rewind(cursor, count)
    assert tree.tokens(cursor) == [1, 2, 3]


# ---- slots running out ------------------------------------------------------------------------------------------------
def test_the_least_recently_used_path_goes_first() -> None:
    tree = KVTree(13)
    for start in (10, 20, 30):
        tree.release(grown(tree, [start, start + 1, start + 2, start + 3]))
    tree.release(tree.match([10, 11, 12, 13]))  # used again
    grown(tree, [40, 41])
    kept = [tree.match([s, s + 1, s + 2, s + 3]).length for s in (10, 20, 30)]
    assert kept == [4, 0, 4]
    assert tree.num_evicted == 4


def test_a_path_under_a_cursor_is_never_evicted() -> None:
    tree = KVTree(9)
    held = grown(tree, [1, 2, 3, 4])
    tree.release(grown(tree, [1, 2, 7, 8]))
    with pytest.raises(OutOfSlots):
        tree.extend(tree.root(), [5] * 5)
    assert tree.tokens(held) == [1, 2, 3, 4]
    assert len(run(tree, tree.root(), [5] * 4)) == 4


def test_running_out_of_slots_fills_no_pool() -> None:
    tree = KVTree(8)
    held = grown(tree, [1, 2, 3])
    other = tree.root()
    with pytest.raises(OutOfSlots):
        tree.extend(other, [1, 2, 3, 4, 5, 6, 7, 8], pools=3)
    tree.commit()
    assert other.length == 0
    assert tree.match([1, 2, 3], pools=3).length == 0
    assert tree.match([1, 2, 3], pools=1).length == held.length
    rows = tree.extend(other, [1, 2, 3, 4], pools=3)
    tree.commit()
    assert [row.position for row in rows] == [0, 1, 2, 3]
    assert tree.match([1, 2, 3, 4], pools=3).length == 4


def test_a_reservation_keeps_a_chain_in_one_run_and_yields_to_need() -> None:
    tree = KVTree(17)
    chain = tree.root()
    run(tree, chain, [1], reserve=8)
    run(tree, tree.root(), [9, 9])
    for token in range(2, 9):
        run(tree, chain, [token])
    slots = list(tree.slots(chain))
    assert slots == list(range(slots[0], slots[0] + 8))

    other = tree.root()
    run(tree, other, [3], reserve=6)
    assert tree.num_free == 0
    assert len(run(tree, tree.root(), [4] * 5)) == 5  # the five slots reserved and not used


def test_what_a_released_chain_had_reserved_is_free() -> None:
    tree = KVTree(17)
    chain = tree.root()
    run(tree, chain, [1, 2], reserve=10)
    assert tree.num_free == 6
    tree.release(chain)
    assert tree.num_free == 14


def test_peak_counts_shared_tokens_once() -> None:
    tree, ledger = KVTree(50), Ledger()
    a = Branch.open(tree, ledger, [1, 2, 3, 4])
    b = a.fork()
    b.append([5])
    c = Branch.open(tree, ledger, [1, 2, 9])
    for branch in (a, b, c):
        tree.extend(branch.live(), branch.pending)
        branch.settle()
    tree.commit()
    ledger.measure()
    assert ledger.kv_tokens_peak == 6
    b.release()
    tree.rewind(a.live(), 1)
    ledger.measure()
    assert ledger.kv_tokens_peak == 6
    ledger.release()
    assert tree.num_cursors == 0


# ---- any sequence of operations ---------------------------------------------------------------------------------------
@dataclass(eq=False)
class Held:
    """A cursor and the token path it has to stand for."""

    cursor: Cursor
    path: list[int]
    namespace: Hashable


@dataclass
class Memory:
    """What a model would have written to each slot of one pool: the namespace and token path it belongs to."""

    written: dict[int, tuple[Hashable, tuple[int, ...]]] = field(default_factory=dict)


TOKENS = st.lists(st.integers(0, 2), max_size=7)
NAMESPACES = st.sampled_from([None, "adapter"])
POOLS = st.sampled_from([1, 1, 1, 3])


class AnyTree(RuleBasedStateMachine):
    @initialize(num_slots=st.sampled_from([9, 21, 60, 200]))
    def start(self, num_slots: int) -> None:
        self.tree = KVTree(num_slots)
        self.held: list[Held] = []
        self.pools = {1: Memory(), 2: Memory()}

    def pick(self, index: int) -> Held:
        return self.held[index % len(self.held)]

    @rule(namespace=NAMESPACES)
    def root(self, namespace: Hashable) -> None:
        self.held.append(Held(self.tree.root(namespace), [], namespace))

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 99), back=st.integers(0, 99))
    def fork(self, index: int, back: int) -> None:
        one = self.pick(index)
        other = Held(self.tree.fork(one.cursor), list(one.path), one.namespace)
        self.held.append(other)
        self.rewind_by(other, back)

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 99), back=st.integers(0, 99))
    def rewind(self, index: int, back: int) -> None:
        self.rewind_by(self.pick(index), back)

    def rewind_by(self, one: Held, back: int) -> None:
        count = back % (len(one.path) + 1)
        self.tree.rewind(one.cursor, count)
        one.path = one.path[: len(one.path) - count]

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 99))
    def release(self, index: int) -> None:
        one = self.pick(index)
        self.held.remove(one)
        self.tree.release(one.cursor)

    @rule(tokens=TOKENS, namespace=NAMESPACES, pools=POOLS)
    def match(self, tokens: list[int], namespace: Hashable, pools: int) -> None:
        cursor = self.tree.match(tokens, namespace, pools)
        path = tokens[: cursor.length]
        for at, slot in enumerate(self.tree.slots(cursor)):
            for bit in (1, 2):
                if pools & bit:
                    assert self.pools[bit].written[slot] == (namespace, tuple(path[: at + 1]))
        for other in self.held:  # a committed path that is held is found whole
            whole = other.path[: len(tokens)] == tokens and other.namespace == namespace
            assert pools != 1 or not whole or cursor.length == len(tokens)
        self.held.append(Held(cursor, path, namespace))

    @precondition(lambda self: self.held)
    @rule(
        wants=st.lists(
            st.tuples(st.integers(0, 99), TOKENS, st.sampled_from([0, 0, 8]), POOLS, st.booleans()),
            min_size=1,
            max_size=4,
        ),
        fails=st.sampled_from([False, False, False, True]),
    )
    def step(self, wants: list[tuple[int, list[int], int, int, bool]], fails: bool) -> None:
        """A step of the engine: insert for several cursors, run, then commit or roll back."""
        before = {id(one): len(one.path) for one in self.held}
        ran: set[int] = set()
        written: dict[int, dict[int, tuple[Hashable, tuple[int, ...]]]] = {1: {}, 2: {}}
        for index, tokens, reserve, pools, last in wants:
            one = self.pick(index)
            try:
                rows = self.tree.extend(one.cursor, tokens, reserve=reserve, pools=pools, last=pools if last else 0)
            except OutOfSlots:
                assert self.tree.num_free < len(tokens)
                assert not self.evictable()
                assert self.tree.tokens(one.cursor) == one.path
                continue
            one.path = one.path + tokens
            ran |= {row.slot for row in rows}
            if last and tokens:
                assert self.tree.slots(one.cursor)[-1] in ran
            for row in rows:
                assert row.token == one.path[row.position]
                for bit in (1, 2):
                    if row.pools & bit:
                        written[bit][row.slot] = (one.namespace, tuple(one.path[: row.position + 1]))
        if fails:
            self.tree.rollback()
            for one in self.held:
                left = one.cursor.length
                assert before[id(one)] <= left <= len(one.path)
                one.path = one.path[:left]
        else:
            self.tree.commit()
            for bit, slots in written.items():
                self.pools[bit].written.update(slots)

    @rule(count=st.integers(0, 30))
    def evict(self, count: int) -> None:
        free, total, evictable = self.tree.num_free, self.tree.num_evicted, self.evictable()
        freed = self.tree.evict(count)
        assert freed >= min(count, evictable)
        assert freed <= evictable
        assert self.tree.num_free == free + freed
        assert self.tree.num_evicted == total + freed

    def evictable(self) -> int:
        """Tokens below no cursor and on no cursor's path."""
        held: set[Node] = set()
        for one in self.held:
            node: Node | None = one.cursor.node
            while node is not None:
                held.add(node)
                node = node.parent
        return sum(len(node.slots) for node in self.tree.nodes() if node not in held)

    @invariant()
    def slots_are_neither_shared_nor_lost(self) -> None:
        slots = [slot for node in self.tree.nodes() for slot in (*node.slots, *node.spare)]
        assert len(set(slots)) == len(slots)
        assert all(0 < slot <= self.tree.num_slots for slot in slots)
        assert len(slots) == self.tree.num_used
        assert self.tree.num_free + self.tree.num_used == self.tree.num_slots

    @invariant()
    def nodes_fit_together(self) -> None:
        for node in self.tree.nodes():
            assert len(node.tokens) == len(node.slots) == node.ready
            assert node.parent is None or node.tokens
            for first, child in node.children.items():
                assert (child.parent, child.start, child.tokens[0]) == (node, node.end, first)

    @invariant()
    def cursors_stand_for_their_paths(self) -> None:
        assert self.tree.num_cursors == len(self.held)
        for one in self.held:
            assert self.tree.tokens(one.cursor) == one.path
            assert one.cursor.length == len(one.path)
            for at, slot in enumerate(self.tree.slots(one.cursor)):
                assert self.pools[1].written[slot] == (one.namespace, tuple(one.path[: at + 1]))

    def teardown(self) -> None:
        if not hasattr(self, "tree"):
            return
        for one in self.held:
            self.tree.release(one.cursor)
        self.tree.clear()
        assert self.tree.num_free == self.tree.num_slots
        assert not list(self.tree.nodes())


TestAnyTree = AnyTree.TestCase
TestAnyTree.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
