"""Steps of a FusedModel as CUDA graphs, one per padded number of rows, over memory that stays where it is.

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
from typing import Protocol

import torch
from torch import Tensor

from raindecode.engine.attention import KVPool, TreeContext
from raindecode.engine.batch import TokenBatch, stage
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
        self._pool: KVPool | None = None
        self._rotary: tuple[Tensor, Tensor] | None = None  # the tables that the graphs read
        self._steps: dict[int, _Step] = {}

    @property
    def captured(self) -> tuple[int, ...]:
        """Numbers of rows that there is a graph for."""
        return tuple(sorted(rows for rows, step in self._steps.items() if step.replay is not None))

    def drop(self) -> None:
        """Forget all graphs: the pools they read and write are about to go."""
        self._steps.clear()
        self._pool = self._rotary = None

    def forward(self, batch: TokenBatch, wanted: Sequence[int], pool: KVPool, states: Tensor) -> Tensor | None:
        """Run a batch made on the host, from a graph.

        Args:
            wanted: rows whose logits are wanted.
            states: [num_slots, hidden_size]; final states are written to the rows' slots.
        Returns:
            Logits [len(wanted), vocabulary]; None where the step has to run uncaptured, and nothing was done.
        """
        at = bisect_left(BUCKETS, batch.num_rows)
        if self.failed is not None or at == len(BUCKETS) or len(wanted) > batch.num_rows:
            return None
        if pool is not self._pool:
            self.drop()
            self._pool = pool
        step = self._steps.get(BUCKETS[at])
        if step is None or step.replay is None:
            step = self._captured(BUCKETS[at], batch, wanted, pool, states)
        elif not step.load(batch, wanted):
            return None
        if step is None or step.replay is None:
            return None
        self.replays += 1
        return self._fused.logits(step.replay(), step.inputs[3, : len(wanted)])

    def _captured(
        self, rows: int, batch: TokenBatch, wanted: Sequence[int], pool: KVPool, states: Tensor
    ) -> _Step | None:
        """The step of `rows` rows, loaded and captured; None where the batch does not fit or nothing can be captured."""
        try:
            step = self._steps.get(rows)
            if step is None:
                tables = self._tables(pool)
                step = self._steps[rows] = _Step(rows, self._fused, batch, pool, states, tables, self._make_plan)
            if not step.load(batch, wanted):
                return None
            step.replay = self._capture(step.run)
            return step
        except Exception as error:  # of memory, a driver, a library: the step itself may still run
            self.failed = f"{type(error).__name__}: {error}"
            self.drop()
            _log.warning("steps run without CUDA graphs: capturing %d rows failed (%s)", rows, self.failed)
            return None

    def _tables(self, pool: KVPool) -> tuple[Tensor, Tensor]:
        """Rotary tables that stay where they are for every position the pool or the model has room for."""
        if self._rotary is None:
            self._rotary = self._fused.rotary.reserve(min(pool.num_slots, self._fused.context_length or pool.num_slots))
            self._fused.make_pools(pool)  # before any capture, in memory of the stream that everything else runs on
        return self._rotary


class _Step:
    """One number of rows: static inputs, and the function of them that is captured."""

    def __init__(
        self, rows: int, fused: FusedModel, first: TokenBatch, pool: KVPool, states: Tensor,
        tables: tuple[Tensor, Tensor], make_plan: MakePlan,
    ) -> None:  # fmt: skip
        device = states.device
        self.inputs = torch.zeros(4, rows, dtype=torch.int64, device=device)  # ids, positions, slots, wanted rows
        self.replay: Run | None = None
        self._fused = fused
        self._states = states
        self._tables = tables
        self._plan = make_plan(rows, fused, len(tables[0]), pool.num_slots, device)
        self._context = TreeContext(pool, first.slot_mapping, first.plan)

    def load(self, batch: TokenBatch, wanted: Sequence[int]) -> bool:
        """Copy a step's numbers to where the graph reads them; False where it does not fit."""
        if batch.max_position >= len(self._tables[0]) or not self._plan.load(batch.plan, self._context):
            return False
        host = stage(batch, wanted, self.inputs.shape[1], pinned=self.inputs.is_cuda)
        self.inputs.copy_(host, non_blocking=True)
        return True

    def run(self) -> Tensor:
        """Final states [rows, hidden_size] of the static inputs; K/V and states of padding rows go to the trash slot."""
        ids, positions, slots, _ = self.inputs
        cos, sin = self._tables
        self._context.slot_mapping = slots.int()
        final = self._fused.final_states(ids, cos[positions], sin[positions], self._context)
        self._states.index_copy_(0, slots, final)
        return final
