"""Branch: a token path of one request, and Ledger: what that request has used."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache

from raindecode.engine.edit_path import EditPath
from raindecode.engine.kv_tree import Cursor, KVTree, Node
from raindecode.engine.rng import MASK128, MULTIPLIER, mix
from raindecode.mixture import SINGLE, Mix

_SALT = 0x51A7
EDIT_SHIFT = 32
"""Keys of the KV tree are token ids; where a row's hidden states are edited, the edit's number stands above this bit."""
_TOKEN = (1 << EDIT_SHIFT) - 1


@cache
def _marks(models: int) -> list[int]:
    """What turns the name of a path into that of the path run by each model of a mask; the first model's is the path's own."""
    return [mix(0, _SALT + m) if m else 0 for m in range(models.bit_length()) if models >> m & 1]


class Ledger:
    """Exact, machine-independent accounts of one request.

    Attributes:
        tokens_processed: distinct token prefixes the request had run, each once per model of its mixture; independent of
            batch-mates and of what was cached.
        tokens_charged: rows actually run on its behalf.
        model_steps: forwards it took part in.
        kv_tokens_peak: the largest number of KV tokens its branches were seen to hold together (see `measure`).
        seconds: wall time by phase; the time of a shared step is divided by rows.
    """

    def __init__(self) -> None:
        self.tokens_processed = 0
        self.tokens_charged = 0
        self.model_steps = 0
        self.kv_tokens_peak = 0
        self.seconds: dict[str, float] = {}
        self.branches: set[Branch] = set()
        self.at_end: list[Callable[[], None]] = []  # called when the request ends
        self._seen: set[int] = set()
        self._kept: set[Hashable] = set()

    @property
    def origin(self) -> Ledger:
        """The request's own ledger."""
        return self

    def count(self, path_hash: int) -> None:
        """Count a token prefix the first time the request has it run."""
        if path_hash not in self._seen:
            self._seen.add(path_hash)
            self.tokens_processed += 1

    def count_all(self, path_hashes: Iterable[int]) -> None:
        """Count several prefixes."""
        before = len(self._seen)
        self._seen.update(path_hashes)
        self.tokens_processed += len(self._seen) - before

    def keep(self, what: Hashable) -> bool:
        """Whether this is asked for the first time."""
        known = what in self._kept
        self._kept.add(what)
        return not known

    def measure(self) -> None:
        """Note how many KV tokens the open branches hold together; searches call it where they hold most."""
        held: dict[Node, int] = {}
        for branch in self.branches:
            if branch.cursor is None:
                continue
            node: Node | None = branch.cursor.node
            offset = branch.cursor.offset
            while node is not None and held.get(node, -1) < offset:
                fresh = node not in held
                held[node] = offset
                if not fresh:
                    break
                node = node.parent
                offset = len(node.tokens) if node is not None else 0
        self.kv_tokens_peak = max(self.kv_tokens_peak, sum(held.values()))

    def release(self) -> None:
        """Release every branch still open. Called when a request ends, whatever way it ends."""
        for branch in list(self.branches):
            branch.release()
        self._seen.clear()
        while self.at_end:
            self.at_end.pop()()


class Tab(Ledger):
    """What one piece of a request's work runs, noted and booked to the request only if the work is used.

    Its branches belong to the request.

    Attributes:
        ran: whether the work ran anything.
    """

    def __init__(self, request: Ledger) -> None:
        super().__init__()
        self._request = request.origin
        self.branches = request.branches
        self.ran = False
        self._noted: dict[int, None] = {}

    @property
    def origin(self) -> Ledger:
        return self._request

    def count(self, path_hash: int) -> None:
        self.ran = True
        self._noted[path_hash] = None

    def count_all(self, path_hashes: Iterable[int]) -> None:
        self._noted.update(dict.fromkeys(path_hashes))
        self.ran = self.ran or bool(self._noted)

    def measure(self) -> None:
        self._request.measure()

    def book(self) -> None:
        """Count what was noted as the request's."""
        for path_hash in self._noted:
            self._request.count(path_hash)
        self._noted.clear()


class Branch:
    """A token path. Appending is free; tokens run when something downstream is wanted.

    Attributes:
        hash: 128-bit hash of the namespace and every token, pending ones included. Edits do not enter it, so that draws under
            an edit use the random numbers they would use without.
        length: number of tokens, pending ones included.
        pending: keys of the tokens that have not run yet.
        reserve: slots to keep in one run when the branch starts a new one.
        mix: the distribution after it.
        models: bit mask of the models that run its tokens.
        edits: how the hidden states of its rows are edited; None for not at all.
    """

    __slots__ = (
        "_hashes", "cursor", "edits", "hash", "ledger", "length", "mix", "models", "pending", "reserve", "tree",
    )  # fmt: skip

    def __init__(
        self, tree: KVTree, ledger: Ledger, cursor: Cursor, path_hash: int, length: int, mixed: Mix, models: int,
        edits: EditPath | None = None,
    ) -> None:  # fmt: skip
        self.tree = tree
        self.ledger = ledger
        self.mix = mixed
        self.models = models
        self.edits = edits
        self.cursor: Cursor | None = cursor
        self.hash = path_hash
        self.length = length
        self.pending: list[int] = []
        self._hashes: list[int] = []
        self.reserve = 0
        ledger.branches.add(self)

    @classmethod
    def open(
        cls, tree: KVTree, ledger: Ledger, tokens: Sequence[int], namespace: Hashable = None, mixed: Mix = SINGLE,
        edits: EditPath | None = None,
    ) -> Branch:  # fmt: skip
        """A new branch of `tokens` in `namespace`. Cached prefixes are found when it first runs."""
        seed = 0
        for byte in repr(namespace).encode():  # not hash(): that changes from process to process
            seed = mix(seed, byte)
        branch = cls(tree, ledger, tree.root(namespace), seed, 0, mixed, mixed.models, edits)
        branch.append(tokens)
        return branch

    def fork(self, *, reserve: int = 0, ledger: Ledger | None = None) -> Branch:
        """A second branch with the same tokens, of the same ledger unless another is given. Copies no K/V."""
        at = self.tree.fork(self.live())
        other = Branch(self.tree, ledger or self.ledger, at, self.hash, self.length, self.mix, self.models, self.edits)
        other.pending = list(self.pending)
        other._hashes = list(self._hashes)
        other.reserve = reserve
        return other

    def append(self, tokens: Sequence[int]) -> list[int]:
        """Add tokens to the path; names of what a ledger counts when they run. Nothing runs yet.

        A name is the hash of the path, and where another model than the first runs it, one with the model mixed in.
        """
        state, names = self.hash, []
        for token in tokens:  # mix(state, token + 1), written out: a call for each token is most of the time
            state = ((state ^ (token + 1)) * MULTIPLIER) & MASK128
            state ^= state >> 61
            names.append(state)
        self.hash = state
        edits = self.edits
        numbers = [edits.at(self.length + i) for i in range(len(tokens))] if edits is not None else ()
        if edits is not None:
            known = self.is_edited
            first = 0 if known else next((i for i, number in enumerate(numbers) if number), len(names))
            names[first:] = [mix(name, edits.salt) for name in names[first:]]
        marks = _marks(self.models)
        hashes = names if marks == [0] else [name ^ mark for name in names for mark in marks]
        self._hashes += hashes
        if any(numbers):
            self.pending += [token | number << EDIT_SHIFT for token, number in zip(tokens, numbers, strict=True)]
        else:
            self.pending.extend(tokens)
        self.length += len(tokens)
        return hashes

    @property
    def is_edited(self) -> bool:
        """Whether any of its rows is edited."""
        edits = self.edits
        return edits is not None and any(
            n and s < self.length for s, n in zip(edits.starts, edits.numbers, strict=True)
        )

    @property
    def name(self) -> int:
        """What its K/V and logits are found by: `hash`, and where rows are edited the schedule mixed in."""
        return mix(self.hash, self.edits.salt) if self.edits is not None and self.is_edited else self.hash

    def tokens(self) -> list[int]:
        """The whole path, pending tokens included."""
        return [key & _TOKEN for key in self.tree.tokens(self.live()) + self.pending]

    def account(self) -> None:
        """Book the pending tokens: they are about to run."""
        self.ledger.count_all(self._hashes)

    def settle(self) -> None:
        """The pending tokens have run."""
        self.pending = []
        self._hashes = []

    def unpin(self) -> None:
        """Give up the hold on the path's K/V but remember its tokens: they run again when next needed."""
        cursor = self.live()
        if cursor.length:
            # Their hashes were counted when they first ran; counting again is a no-op by construction.
            self.pending = self.tree.tokens(cursor) + self.pending
            self.tree.rewind(cursor, cursor.length)

    def release(self) -> None:
        """Close the branch. Safe to call twice."""
        if self.cursor is not None:
            self.tree.release(self.cursor)
            self.cursor = None
            self.ledger.branches.discard(self)

    def live(self) -> Cursor:
        """The cursor of a branch that is open."""
        if self.cursor is None:
            raise RuntimeError("this branch was released")
        return self.cursor
