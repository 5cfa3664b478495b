"""Steps over static memory, everything but the capture: a CPU replays by calling the captured function again.

A CPU's attention takes no AttentionBuffers, so here the plan itself is padded (static_steps.py);
tests/interpreter/test_static_step.py runs the buffers, test_cuda_graph_gpu.py the graphs.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import logits_after, random_tokens, tiny_decoder, tiny_model
from static_steps import PaddedPlan, in_operations, with_graphs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raindecode import RAIN, doctor
from raindecode.engine import attention, batch, cuda_graph, fused_edits, fused_model, model_runner
from raindecode.engine.attention import KVPool, TreeContext
from raindecode.engine.cuda_graph import BUCKETS, CudaCapture, Run, StepGraphs
from raindecode.engine.engine import Engine
from raindecode.engine.fused_adapter import FusedAdapter
from raindecode.engine.loader import build_engine
from raindecode.engine.rotary import RotaryTable
from raindecode.engine.slots import TRASH_SLOT
from raindecode.errors import ConfigError
from raindecode.search.sampling import Sampling
from rainkernels.ops.attention import AttentionBuffers, attention_plan

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import engine_step

PROMPTS = ["the", "inner on a", "a"]


@pytest.fixture(scope="module")
def plain() -> Engine:
    return in_operations(build_engine(tiny_model("llama"), kv_tokens=1000)[0])


@pytest.fixture
def engine() -> Engine:
    return build_engine(tiny_model("llama"), kv_tokens=1000)[0]


@contextlib.contextmanager
def replayed(graphs: StepGraphs, count: int) -> Iterator[None]:
    """So many steps run from a graph meanwhile."""
    before = graphs.replays
    yield
    assert graphs.replays - before == count


def assert_same_rows(engine: Engine, plain: Engine, paths: Sequence[Sequence[int]]) -> None:
    ours, theirs = logits_after(engine, paths), logits_after(plain, paths)
    plain.tree.clear()
    np.testing.assert_allclose(np.stack(ours), np.stack(theirs), rtol=1e-4, atol=1e-4)


# ---- the same answers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_sampling_gives_the_same_answers(family: str) -> None:
    decoders = [tiny_decoder(family) for _ in range(2)]
    in_operations(decoders[0].engine)
    graphs = with_graphs(decoders[1].engine)
    sampling = Sampling(temperature=1.0, ignore_eos=True)
    plain, ours = (d.generate(PROMPTS, search=sampling, max_new_tokens=12, seed=range(3)) for d in decoders)
    assert [c.token_ids for c in ours] == [c.token_ids for c in plain]
    assert graphs.replays == decoders[1].engine.model_steps
    assert 4 in graphs.captured  # three prompts decoded together
    assert graphs.failed is None


def test_rain_gives_the_same_answers() -> None:
    search = RAIN(evaluator=lambda pairs: [0.1 * (len(reply) % 7) - 0.3 for _, reply in pairs], max_iterations=20)
    decoders = [tiny_decoder() for _ in range(2)]
    in_operations(decoders[0].engine)
    graphs = with_graphs(decoders[1].engine)
    plain, ours = (d.generate(PROMPTS, search=search, max_new_tokens=6, seed=range(3)) for d in decoders)
    assert [(c.token_ids, c.value, c.stats.iterations) for c in ours] == [
        (c.token_ids, c.value, c.stats.iterations) for c in plain
    ]
    assert graphs.replays == decoders[1].engine.model_steps > 10


# ---- padding ----------------------------------------------------------------------------------------------------------
def test_every_number_of_rows(engine: Engine, plain: Engine) -> None:
    """One graph per bucket, found again by every number of rows it serves; more rows than the last run uncaptured."""
    graphs = with_graphs(engine)
    counts = sorted({1, 3, 5, 100, 255, *BUCKETS})
    for count in counts:
        with replayed(graphs, 1):
            assert_same_rows(engine, plain, [random_tokens(count, count)])
        engine.tree.clear()
    assert graphs.captured == BUCKETS
    with replayed(graphs, 0):
        assert_same_rows(engine, plain, [random_tokens(BUCKETS[-1] + 1, 7)])


def test_branches_and_prefill_share_a_padded_step(engine: Engine, plain: Engine) -> None:
    """Rows deep in a tree that earlier steps wrote, and only some of them wanted; padding changes no slot but the trash."""
    graphs = with_graphs(engine)
    assert engine.runner.fused is not None
    engine.runner.fused.weights.embedding[0].fill_(0.5)  # the padding's token leaves something where it is written
    stem = random_tokens(20, 1)
    first, second = [stem, stem + random_tokens(9, 2)], [stem + random_tokens(n, 30 + n) for n in (1, 2, 40)]
    logits_after(engine, first)
    logits_after(plain, first)
    with replayed(graphs, 1):
        ours = logits_after(engine, second)
    np.testing.assert_allclose(np.stack(ours), np.stack(logits_after(plain, second)), rtol=1e-4, atol=1e-4)
    assert engine.runner.hidden is not None
    assert plain.runner.hidden is not None
    assert engine.runner.hidden[TRASH_SLOT].any()
    used = sorted({slot for node in engine.tree.nodes() for slot in node.slots})
    same = sorted({slot for node in plain.tree.nodes() for slot in node.slots})
    assert used == same
    assert len(used) == 20 + 9 + 43
    torch.testing.assert_close(engine.runner.hidden[used], plain.runner.hidden[used], rtol=1e-4, atol=1e-4)
    for layer in (0, 1):
        for ours_pool, theirs in zip(engine.runner.pool.layers[layer], plain.runner.pool.layers[layer], strict=True):
            torch.testing.assert_close(ours_pool[used], theirs[used], rtol=1e-4, atol=1e-4)
    free = torch.ones(1001, dtype=torch.bool)
    free[[TRASH_SLOT, *used]] = False
    for pool in (*engine.runner.pool.layers[1], engine.runner.hidden):
        assert not pool[free].any()
    plain.tree.clear()


def test_rows_nobody_wants_have_no_logits(engine: Engine) -> None:
    graphs = with_graphs(engine)
    logits_after(engine, [random_tokens(5, 1)])
    made: list[Any] = []
    forward = engine.runner.forward
    engine.runner.forward = lambda rows, wanted: made.append((rows, wanted)) or forward(rows, wanted)  # type: ignore
    whole = logits_after(engine, [random_tokens(6, 3), random_tokens(3, 4)])
    (rows, wanted), vocabulary = made[0], whole[0].shape[0]
    assert forward(rows, []).shape == (0, vocabulary)
    one = forward(rows, wanted[::-1])
    np.testing.assert_allclose(one.numpy(), np.stack(whole)[::-1], rtol=1e-5, atol=1e-5)
    assert graphs.failed is None


def test_a_replay_reads_and_writes_the_same_memory(engine: Engine) -> None:
    graphs = with_graphs(engine)
    fused, seen = engine.runner.fused, []
    assert fused is not None
    inner = fused.final_states

    def watched(ids: Tensor, cos: Tensor, sin: Tensor, context: TreeContext, *rest: Any) -> Tensor:
        pools = [t.data_ptr() for pair in context.pool.layers.values() for t in pair]
        seen.append((len(ids), ids.data_ptr(), *pools, engine.runner.hidden.data_ptr()))  # type: ignore[union-attr]
        return inner(ids, cos, sin, context, *rest)

    fused.final_states = watched  # type: ignore[method-assign]
    tables = []
    for seed, count in enumerate((4, 3, 16, 4, 900)):  # the last runs uncaptured
        logits_after(engine, [random_tokens(count, seed)])
        tables.append([t.data_ptr() for t in fused.rotary.upto(0)])
    by_rows = {rows: {call for call in seen if call[0] == rows} for rows in (4, 16)}
    assert all(len(calls) == 1 for calls in by_rows.values())
    assert tables[0] == tables[-1]
    assert graphs.captured == (4, 16)


# ---- what runs uncaptured ---------------------------------------------------------------------------------------------
def test_what_does_not_fit_runs_uncaptured(
    engine: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = with_graphs(engine)
    monkeypatch.setattr(PaddedPlan, "room", 12)
    stem = random_tokens(14, 1)
    for new, count in ((stem, 0), (random_tokens(4, 2), 1), (stem + random_tokens(4, 3), 0), (random_tokens(3, 4), 1)):
        with replayed(graphs, count):
            assert_same_rows(engine, plain, [new])
    assert graphs.captured == (4,)
    assert not caplog.records


def test_positions_past_the_reserved_tables() -> None:
    """The tables hold what the model was made for; a longer path makes new ones, and the graphs keep theirs."""
    engine, plain = (build_engine(tiny_model("llama", max_position_embeddings=1024), kv_tokens=1500)[0] for _ in "ab")
    in_operations(plain)
    graphs, stem = with_graphs(engine), random_tokens(1022, 5)
    logits_after(engine, [stem])
    for seed, (extra, count) in enumerate([(1, 1), (2, 1), (3, 0), (2, 1)]):
        with replayed(graphs, count):
            assert_same_rows(engine, plain, [stem + random_tokens(extra, 60 + seed)])
    assert graphs.failed is None


def test_hooks_and_adapters_are_honoured(engine: Engine, plain: Engine) -> None:
    graphs = with_graphs(engine)
    path, called = random_tokens(4, 1), []
    with replayed(graphs, 1):
        assert_same_rows(engine, plain, [path])
    hook = engine.runner.model.base_model.layers[1].mlp.register_forward_hook(lambda *_: called.append(1))
    with replayed(graphs, 0):
        assert_same_rows(engine, plain, [random_tokens(4, 2)])
    assert called
    hook.remove()
    with replayed(graphs, 1):
        assert_same_rows(engine, plain, [random_tokens(4, 3)])


def test_new_pools_need_new_graphs(engine: Engine, plain: Engine) -> None:
    graphs = with_graphs(engine)
    assert_same_rows(engine, plain, [random_tokens(4, 1)])
    assert graphs.captured == (4,)
    engine.tree.clear()
    engine.runner.resize(1001)
    assert graphs.captured == ()
    with replayed(graphs, 2):
        assert_same_rows(engine, plain, [random_tokens(4, 1)])
        assert_same_rows(engine, plain, [[*random_tokens(4, 1), 9]])
    assert graphs.captured == (1, 4)
    engine.tree.clear()
    engine.runner.pool = KVPool(1001, torch.device("cpu"))  # whoever puts it there
    assert_same_rows(engine, plain, [random_tokens(4, 1)])
    assert graphs.captured == (4,)
    assert engine.runner.pool.layers[1][0].any()


def test_a_capture_that_fails_is_told_once(engine: Engine, plain: Engine, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def failing(run: Run) -> Run:
        calls.append(run())
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = with_graphs(engine, failing)
    with caplog.at_level(logging.WARNING, logger="raindecode"), replayed(graphs, 0):
        assert_same_rows(engine, plain, [random_tokens(4, 1)])
        assert_same_rows(engine, plain, [random_tokens(9, 1)])
    assert len(calls) == len(caplog.records) == 1
    assert "4 rows failed (RuntimeError: operation not permitted" in caplog.text
    assert graphs.failed is not None


def test_a_replay_that_fails_is_an_error(engine: Engine) -> None:
    """A device that broke is no reason to go on in another way."""
    graphs = with_graphs(engine)
    logits_after(engine, [random_tokens(4, 1)])

    def broken() -> Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    graphs._steps[(0,), 4, False].replay = broken
    with pytest.raises(RuntimeError, match="illegal memory access"):
        logits_after(engine, [random_tokens(4, 2)])


# ---- settings ---------------------------------------------------------------------------------------------------------
def test_graphs_are_for_cuda() -> None:
    for wanted in (None, False):
        assert tiny_decoder(cuda_graphs=wanted).engine.runner.graphs is None
    with pytest.raises(ConfigError, match=r"cuda_graphs=True was asked for, but the model is on cpu.*None or False"):
        tiny_decoder(cuda_graphs=True)


def test_only_a_fused_model_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = build_engine(tiny_model("gpt2"), kv_tokens=50)[0].runner
    monkeypatch.setattr(runner, "device", torch.device("cuda"))
    assert "GPT2LMHeadModel" in str(runner.use_graphs())
    assert runner.graphs is None


def test_the_doctor_says_whether_graphs_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_decoder()
    runner = decoder.engine.runner
    assert "CUDA graphs" not in {check.name for check in doctor._loaded("model", decoder)}
    monkeypatch.setattr(runner, "device", torch.device("cuda"))

    def said() -> tuple[str, str]:
        (check,) = (check for check in doctor._loaded("model", decoder) if check.name == "CUDA graphs")
        return check.status, check.text

    monkeypatch.setattr(AttentionBuffers, "usable", staticmethod(lambda device: True))
    monkeypatch.setattr(model_runner, "kv_lane", lambda device: "reference")
    assert said()[1].startswith("off: the compiled module has no CUDA lane")
    monkeypatch.setattr(model_runner, "kv_lane", lambda device: "cuda")
    assert said() == ("note", "off: cuda_graphs=False (--no-cuda-graphs)")
    monkeypatch.setattr(AttentionBuffers, "usable", staticmethod(lambda device: False))
    assert "static memory on its Triton lane only" in said()[1]
    graphs = with_graphs(decoder.engine)
    assert said() == ("ok", "on: the layers of a step of up to 256 rows are one launch")
    graphs.failed = "no memory"
    assert said() == ("note", "off: a capture failed (no memory)")


# ---- what a capture needs ---------------------------------------------------------------------------------------------
_WAITS = r"\.item\(|\.tolist\(|\.cpu\(|\.numpy\(|\bbool\(|\bfloat\(|(?<!\.)\bint\(|nonzero|masked_select|synchronize|torch\.tensor\("


def test_nothing_in_a_captured_step_reads_back() -> None:
    """By the source, since a CPU waits for nothing: no call that makes the host wait for a device."""
    captured = [
        fused_model.FusedModel.final_states, fused_model.FusedModel.logits, fused_model.FusedModel._attend,
        fused_edits.add_norm, fused_edits.Joining, fused_edits._fused, fused_model._head_norm, attention.attend,
        attention._attend_part, FusedAdapter.add_, cuda_graph._Step.run, cuda_graph._Step.load,
    ]  # fmt: skip
    for function in captured:
        found = re.findall(_WAITS, inspect.getsource(function))
        assert not found, f"{function} has {found}"
    assert re.findall(_WAITS, inspect.getsource(batch.stage_all)) == ["torch.tensor("]  # of a list, on the host


class Operations(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_no_operation_of_a_captured_step_waits(family: str) -> None:
    """And by its operations: none whose result is a number, or whose shape depends on one."""
    engine = build_engine(tiny_model(family), kv_tokens=100)[0]
    watch = Operations()

    def capture(run: Run) -> Run:
        def watched() -> Tensor:
            with watch:
                return run()

        return watched

    graphs = with_graphs(engine, capture)
    logits_after(engine, [random_tokens(5, 1)])
    assert graphs.replays == 1
    assert {"linear", "embedding", "index_copy_"} <= watch.names
    waits = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}
    assert not watch.names & waits
    assert not {name for name in watch.names if "cpu" in name}


def test_reserved_tables_stay_and_have_the_same_bits(engine: Engine) -> None:
    def table() -> RotaryTable:
        model: Any = engine.runner.model
        return RotaryTable(model.model.rotary_emb, model.config, 16, torch.float32, torch.device("cpu"))

    grown, reserved = table(), table()
    cos, sin = reserved.reserve(2500)
    assert len(cos) >= 2500
    for position in (0, 1023, 1024, 2499):
        assert all(a is b for a, b in zip(reserved.upto(position), (cos, sin), strict=True))
        grown.upto(position)
    assert all(torch.equal(a, b) for a, b in zip(grown.upto(2499), (cos, sin), strict=True))
    assert [len(t) for t in reserved.upto(5000)] == [5120, 5120]


def test_one_host_tensor_holds_a_steps_numbers() -> None:
    two = torch.tensor([[7, 8]]), torch.tensor([[3, 4]]), torch.tensor([11, 12], dtype=torch.int32)
    plan = attention_plan(
        **{
            name: torch.tensor(values, dtype=torch.int32)
            for name, values in {
                "segment_parent": [], "segment_start": [], "segment_slots_indptr": [0], "slots": [],
                "row_segment": [-1, -1], "row_position": [3, 4],
            }.items()
        }
    )  # fmt: skip
    rows = batch.TokenBatch(*two, plan, {11: 0, 12: 1}, 4)
    assert batch.stage(rows, [1], 4, pinned=False).tolist() == [
        [7, 8, 0, 0],
        [3, 4, 0, 0],
        [11, 12, 0, 0],
        [1, 0, 0, 0],
    ]
    same, wanted = batch.upload(rows, [1, 0], torch.device("cpu"))
    assert same is rows
    assert wanted.tolist() == [1, 0]
    there, wanted = batch.upload(rows, [1, 0, 1], torch.device("meta"))
    assert (there.input_ids.shape, there.position_ids.shape, there.slot_mapping.shape) == ((1, 2), (1, 2), (2,))
    assert (there.slot_mapping.dtype, wanted.shape, wanted.device.type) == (torch.int32, (3,), "meta")
    assert there.plan is plan


class FakeCuda:
    """Stands in for torch.cuda: what was called on which stream, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.stream: Any = "main"
        side = type("Side", (), {"wait_stream": lambda _, other: self.calls.append(("side waits for", other))})()
        self.main = type("Main", (), {"wait_stream": lambda _, other: self.calls.append(("main waits for", other))})()
        self.side = side
        graph = type("Graph", (), {"replay": lambda _: self.calls.append(("replay",))})
        for name, value in {
            "Stream": lambda device: side, "graph_pool_handle": lambda: "pool", "CUDAGraph": graph,
            "current_stream": lambda: self.main, "stream": lambda stream: self.on(stream, "warm-up"),
            "device": lambda device: contextlib.nullcontext(),
            "graph": lambda graph, pool, stream, capture_error_mode: self.on(stream, f"capture into {pool}"),
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def on(self, stream: Any, what: str) -> Iterator[None]:
        self.stream = (stream, what)
        yield
        self.stream = "main"


def test_a_capture_warms_up_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, out = FakeCuda(monkeypatch), torch.zeros(1)
    capture = CudaCapture(torch.device("cuda"))

    def run() -> Tensor:
        cuda.calls.append(("run", *cuda.stream))
        return out

    replay = capture(run)
    side, main = cuda.side, cuda.main
    assert cuda.calls == [
        ("side waits for", main), ("run", side, "warm-up"), ("run", side, "warm-up"), ("main waits for", side),
        ("run", side, "capture into pool"),
    ]  # fmt: skip
    assert replay() is out
    assert cuda.calls[-1] == ("replay",)


# ---- the benchmark ----------------------------------------------------------------------------------------------------
def test_the_benchmark_compares_the_same_step(engine: Engine) -> None:
    arguments = argparse.Namespace(prefix=10, own=3, repeats=2)
    without = engine_step.compare(engine, 2, arguments)
    assert (without["status"], set(without["times"])) == ("ok", {engine_step.PLAIN})
    assert "CUDA device" in without["failed"][engine_step.GRAPH]
    graphs = with_graphs(engine)
    found = engine_step.compare(engine, 3, arguments)
    assert (found["status"], found["failed"]) == ("ok", {})
    assert set(found["times"]) == {engine_step.PLAIN, engine_step.GRAPH}
    assert found["checked"][engine_step.GRAPH]["error"] < 1e-5
    assert found["ratio"]["engine / engine, CUDA graphs"]["median"] > 0
    assert graphs.captured == (4,)
    assert graphs is engine.runner.graphs
    graphs.failed = "no memory"
    with pytest.raises(RuntimeError, match="did not run from a graph: no memory"):
        engine_step.compare(engine, 3, arguments)
