"""Steps of a FusedModel as CUDA graphs, one per padded number of rows of the members that take part, over memory that stays
where it is.

A step of a small model on a fast GPU is mostly launches. A graph replays them all at once; what changes from step to step
is copied to the addresses it was captured with: ids, positions and slots in one copy, the tree in another.

The language-model head is not in the graph. How many rows want logits varies on its own (one of 256 in a prefill, all of
them in a decode step), and where a vocabulary is large, products nobody wants are not free. Two launches after the graph
give exactly the rows that are wanted.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from raindecode.engine.attention import KVPool, TreeContext
from raindecode.engine.batch import Part, stage_all
from raindecode.engine.edits import RowEdits, SiteTable
from raindecode.engine.fused_model import FusedModel
from rainkernels.errors import RangeError
from rainkernels.ops.attention import AttentionBuffers, AttentionPlan

_log = logging.getLogger("raindecode")

# Rows that graphs are captured for. A step of more is long enough to launch kernel by kernel.
BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)

_CHUNK = 256  # positions of a partial result of attention, as tree_attention's own
_LEVELS = 2
_PARTIAL_BYTES = 64 << 20  # of partial results that a graph may hold; steps over longer paths run uncaptured

Run = Callable[[], Tensor]
_Key: TypeAlias = (
    "tuple[tuple[int, ...], int, bool]"  # members, padded rows of each, and whether hidden states are edited
)
# Takes a function of static memory, returns one that does the same again and gives the same static output.
Capture = Callable[[Run], Run]


class StaticPlan(Protocol):
    """Where a captured step finds what its rows attend to."""

    def load(self, plan: AttentionPlan, context: TreeContext) -> bool:
        """Make `context` attend by `plan`; False where it does not fit."""


# (padded rows, model, positions of the longest path, slots of the pool, device)
MakePlan = Callable[[int, FusedModel, int, int, torch.device], StaticPlan]


class BufferedPlan:
    """The plan in AttentionBuffers, which the attention of every layer reads on the device. Arguments: see MakePlan."""

    def __init__(self, rows: int, fused: FusedModel, positions: int, num_slots: int, device: torch.device) -> None:
        weights = fused.weights
        each = weights.num_qo_heads * (weights.head_dim + 2) * 4
        partials = max(rows, min(rows * -(-positions // _CHUNK), _PARTIAL_BYTES // each))
        self.buffers = AttentionBuffers.create(
            max_rows=rows, max_partials=partials,
            # Within a chunk every level gives a row one item at most; branches that nest deeper read their keys themselves.
            max_items=_LEVELS * partials, max_keys=num_slots + rows * _CHUNK, num_slots=num_slots,
            num_qo_heads=weights.num_qo_heads, num_kv_heads=weights.num_kv_heads, head_dim=weights.head_dim,
            dtype=weights.embedding.dtype, device=device, chunk=_CHUNK, levels=_LEVELS,
        )  # fmt: skip

    def load(self, plan: AttentionPlan, context: TreeContext) -> bool:
        try:
            self.buffers.load(plan)
        except RangeError:  # longer paths or more of them than there is room for
            return False
        context.plan, context.buffers = plan, self.buffers
        return True


class CudaCapture:
    """Records functions as CUDA graphs.

    All graphs share one memory pool: they run one after another on one stream, and what a replay leaves is read before the
    next begins.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        with torch.cuda.device(self.device):
            main = torch.cuda.current_stream()
            self._side.wait_stream(main)
            with torch.cuda.stream(self._side):
                for _ in range(2):  # compiles, and makes the libraries' workspaces; a step may run twice unharmed
                    run()
            main.wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            # The stream of the warm-up, whose workspaces exist. Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class StepGraphs:
    """The captured steps of one model. Captures at the first step of each number of rows.

    Args:
        fused: the model. It has to run in PyTorch operations, not as one native call.
        capture: how a function is captured.
        make_plan: makes the memory that holds a step's plan.
    Attributes:
        replays: steps that ran from a graph.
        failed: why nothing is captured any more; None while all is well.
    """

    def __init__(self, fused: FusedModel, capture: Capture, make_plan: MakePlan = BufferedPlan) -> None:
        self.replays = 0
        self.failed: str | None = None
        self._fused = fused
        self._capture = capture
        self._make_plan = make_plan
        self._pools: dict[int, KVPool] = {}  # by member
        self._rotary: tuple[Tensor, Tensor] | None = None  # the tables that the graphs read
        self._tables: Sequence[SiteTable] = ()  # of edits, that the graphs read
        self._steps: dict[_Key, _Step] = {}

    @property
    def captured(self) -> tuple[int, ...]:
        """Numbers of rows that there is a graph for."""
        return tuple(sorted(rows for (_, rows, _), step in self._steps.items() if step.replay is not None))

    def drop(self) -> None:
        """Forget all graphs: the pools they read and write are about to go."""
        self._steps.clear()
        self._pools.clear()
        self._rotary = None

    def forward(
        self, parts: Sequence[Part], wanted: Sequence[Sequence[int]], pools: Sequence[KVPool], states: Sequence[Tensor],
        edits: RowEdits | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Run batches of different members, made on the host, from a graph.

        Args:
            wanted: rows of each part whose logits are wanted.
            pools, states: of each part's member; final states [num_slots, hidden_size] are written to the rows' slots.
            edits: of the rows of all parts, their slots on the host.
        Returns:
            Logits [n, vocabulary], one part's after the other's; None where the step has to run uncaptured, and nothing was
            done.
        """
        at = bisect_left(BUCKETS, max(part.batch.num_rows for part in parts))
        fits = all(len(rows) <= part.batch.num_rows for rows, part in zip(wanted, parts, strict=True))
        members = tuple(part.member for part in parts)
        if self.failed is not None or at == len(BUCKETS) or not fits or len(set(members)) < len(members):
            return None
        for member, pool in zip(members, pools, strict=True):
            if self._pools.setdefault(member, pool) is not pool:
                self.drop()
                self._pools[member] = pool
        if (
            edits is not None and edits.tables is not self._tables
        ):  # they grew: graphs that read the old ones are of no use
            self._steps = {key: step for key, step in self._steps.items() if not key[2]}
            self._tables = edits.tables
        key = members, BUCKETS[at], edits is not None
        step = self._steps.get(key)
        if step is None or step.replay is None:
            step = self._captured(key, parts, wanted, pools, states, edits)
        elif not step.load(parts, wanted, edits):
            return None
        if step is None or step.replay is None:
            return None
        self.replays += 1
        return self._fused.logits(step.replay(), step.inputs[3, : sum(map(len, wanted))])

    def _captured(
        self, key: _Key, parts: Sequence[Part], wanted: Sequence[Sequence[int]], pools: Sequence[KVPool],
        states: Sequence[Tensor], edits: RowEdits | None,
    ) -> _Step | None:  # fmt: skip
        """The step of a key, loaded and captured; None where the batches do not fit or nothing can be captured."""
        try:
            step = self._steps.get(key)
            if step is None:
                tables = self._positions(pools)
                step = _Step(key[1], self._fused, parts, pools, states, tables, self._make_plan, edits)
                self._steps[key] = step
            if not step.load(parts, wanted, edits):
                return None
            step.replay = self._capture(step.run)
            return step
        except Exception as error:  # of memory, a driver, a library: the step itself may still run
            self.failed = f"{type(error).__name__}: {error}"
            self.drop()
            _log.warning("steps run without CUDA graphs: capturing %d rows failed (%s)", key[1], self.failed)
            return None

    def _positions(self, pools: Sequence[KVPool]) -> tuple[Tensor, Tensor]:
        """Rotary tables that stay where they are for every position the pools or the model have room for."""
        slots = pools[0].num_slots
        if self._rotary is None:
            self._rotary = self._fused.rotary.reserve(min(slots, self._fused.context_length or slots))
        for pool in pools:
            self._fused.make_pools(pool)  # before any capture, in memory of the stream that everything else runs on
        return self._rotary


class _Step:
    """One number of rows of each of some members: static inputs, and the function of them that is captured."""

    def __init__(
        self, rows: int, fused: FusedModel, parts: Sequence[Part], pools: Sequence[KVPool], states: Sequence[Tensor],
        tables: tuple[Tensor, Tensor], make_plan: MakePlan, edits: RowEdits | None,
    ) -> None:  # fmt: skip
        device = states[0].device
        # ids, positions, slots, one part's rows after the other's; then the wanted rows
        self.inputs = torch.zeros(4, rows * len(parts), dtype=torch.int64, device=device)
        self.replay: Run | None = None
        self._rows = rows
        self._fused = fused
        self._states = list(states)
        self._tables = tables
        self._plans = [make_plan(rows, fused, len(tables[0]), pool.num_slots, device) for pool in pools]
        self._contexts = [
            TreeContext(pool, part.batch.slot_mapping, part.batch.plan) for pool, part in zip(pools, parts, strict=True)
        ]
        self._contexts[0].more = tuple(self._contexts[1:])
        self._adapted = fused.adapted_rows([part.member for part in parts], [rows] * len(parts))
        self._edits: RowEdits | None = None
        if edits is not None:
            slots = torch.zeros(len(edits.slots), rows * len(parts), dtype=torch.int32, device=device)
            self._edits = RowEdits(edits.tables, slots)

    def load(self, parts: Sequence[Part], wanted: Sequence[Sequence[int]], edits: RowEdits | None) -> bool:
        """Copy a step's numbers to where the graph reads them; False where it does not fit."""
        for part, plan, context in zip(parts, self._plans, self._contexts, strict=True):
            if part.batch.max_position >= len(self._tables[0]) or not plan.load(part.batch.plan, context):
                return False
        host = stage_all([part.batch for part in parts], wanted, self._rows, pinned=self.inputs.is_cuda)
        self.inputs.copy_(host, non_blocking=True)
        if self._edits is not None and edits is not None:
            self._edits.slots.copy_(
                _padded(edits.slots, [part.batch.num_rows for part in parts], self._rows), non_blocking=True
            )
        return True

    def run(self) -> Tensor:
        """Final states of the static inputs, a row each; K/V and states of padding rows go to the trash slot."""
        ids, positions, slots, _ = self.inputs
        cos, sin = self._tables
        own = slots.split(self._rows)
        for context, mine in zip(self._contexts, own, strict=True):
            context.slot_mapping = mine.int()
        final = self._fused.final_states(
            ids, cos[positions], sin[positions], self._contexts[0], self._adapted, self._edits
        )
        for pool, mine, rows in zip(self._states, own, final.split(self._rows), strict=True):
            pool.index_copy_(0, mine, rows)
        return final


def _padded(slots: Tensor, sizes: Sequence[int], rows: int) -> Tensor:
    """Row slots [columns, all rows] with `rows` of them for each part; padding is not edited."""
    host = torch.zeros(len(slots), rows * len(sizes), dtype=torch.int32)
    for i, own in enumerate(slots.split(list(sizes), dim=1)):
        host[:, rows * i : rows * i + own.shape[1]] = own
    return host
