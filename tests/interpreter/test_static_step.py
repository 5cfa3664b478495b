"""An engine's steps over AttentionBuffers, as CUDA graphs replay them, with tree attention in Triton's interpreter.

Run as `TRITON_INTERPRET=1 python -m pytest tests/interpreter/test_static_step.py`: Triton decides at import.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "decoder"))

from models import logits_after, random_tokens, tiny_model

from raindecode.engine import cuda_graph
from raindecode.engine.cuda_graph import BufferedPlan, StepGraphs
from raindecode.engine.engine import Engine
from raindecode.engine.loader import build_engine
from rainkernels._lanes import FAMILY_LANES
from rainkernels.ops import _attention_buffers
from rainkernels.triton import attention as lane

pytestmark = pytest.mark.skipif(not lane._INTERPRETED, reason="needs TRITON_INTERPRET=1")


def make_engine() -> Engine:
    engine = build_engine(tiny_model("llama"), kv_tokens=200)[0]
    assert engine.runner.fused is not None
    engine.runner.fused._stack = None  # as on a GPU: in operations, not as one native call
    return engine


@pytest.fixture
def plain() -> Engine:
    return make_engine()


@pytest.fixture
def static(plain: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine that replays by calling again. From here on attention alone takes its Triton lane."""
    engine = make_engine()
    fused = engine.runner.fused
    assert fused is not None
    engine.runner.graphs = StepGraphs(fused, capture=lambda run: run)
    monkeypatch.setitem(FAMILY_LANES["attention"], "cpu", ("triton",))
    monkeypatch.setattr(_attention_buffers, "_PROGRAMS", 4)  # idle programs cost a GPU nothing and the interpreter much
    return engine


def test_steps_of_any_number_of_rows_and_any_tree(static: Engine, plain: Engine) -> None:
    """Prefill, branches and single rows, padded, one plan after another in the same buffers."""
    graphs = static.runner.graphs
    assert graphs is not None
    stem = random_tokens(6, 1)
    steps = [[stem], [stem + random_tokens(n, 10 + n) for n in (1, 1, 2, 3)], [[*stem, 9]], [random_tokens(5, 2)]]
    for paths in steps:
        ours, theirs = logits_after(static, paths), logits_after(plain, paths)
        np.testing.assert_allclose(np.stack(ours), np.stack(theirs), rtol=1e-4, atol=1e-4)
    held = [plan.buffers for step in graphs._steps.values() for plan in step._plans if isinstance(plan, BufferedPlan)]
    assert graphs.replays == len(steps)
    assert graphs.captured == (1, 8)
    assert [(buffers.max_rows, buffers.plan is not None) for buffers in held] == [(8, True), (1, True)]


def test_a_path_longer_than_the_buffers_runs_uncaptured(
    static: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one partial result per row, of 64 positions: the 65th needs another."""
    monkeypatch.setattr(cuda_graph, "_CHUNK", 64)
    monkeypatch.setattr(cuda_graph, "_PARTIAL_BYTES", 1)
    graphs = static.runner.graphs
    assert graphs is not None
    stem = random_tokens(63, 3)
    for tokens, replays in ((stem[:2], 1), (stem, 2), ([*stem, 5], 3), ([*stem, 5, 6], 3)):
        ours, theirs = logits_after(static, [tokens]), logits_after(plain, [tokens])
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-4)
        assert graphs.replays == replays
    assert graphs.failed is None
