"""Steps over static memory on a CPU: replayed by calling the captured function again, the plan padded instead of buffered."""

from __future__ import annotations

from typing import Any

import torch

from raindecode.engine.attention import TreeContext
from raindecode.engine.cuda_graph import Run, StepGraphs
from raindecode.engine.engine import Engine
from rainkernels.ops.attention import AttentionPlan, attention_plan


class PaddedPlan:
    """The plan with padding rows, which see nothing. `room`: keys of the largest plan that fits."""

    room = 1 << 30

    def __init__(self, rows: int, *_: Any) -> None:
        self.rows = rows

    def load(self, plan: AttentionPlan, context: TreeContext) -> bool:
        if len(plan.slots) > self.room:
            return False
        padding = torch.full((self.rows - plan.num_rows,), -1, dtype=torch.int32)
        context.plan = attention_plan(
            segment_parent=plan.segment_parent, segment_start=plan.segment_start,
            segment_slots_indptr=plan.segment_slots_indptr, slots=plan.slots,
            row_segment=torch.cat([plan.row_segment, padding]), row_position=torch.cat([plan.row_position, padding]),
        )  # fmt: skip
        return True


def captured_twice(run: Run) -> Run:
    """As CudaCapture: the function runs before it is replayed."""
    run()
    return run


def in_operations(engine: Engine) -> Engine:
    """The same engine, its model run as on a GPU: in operations, not as one native call."""
    assert engine.runner.fused is not None
    engine.runner.fused._stack = None
    return engine


def with_graphs(engine: Engine, capture: Any = captured_twice, make_plan: Any = PaddedPlan) -> StepGraphs:
    """Make an engine take its steps from static memory."""
    fused = in_operations(engine).runner.fused
    assert fused is not None
    graphs = engine.runner.graphs = StepGraphs(fused, capture, make_plan)
    return graphs
