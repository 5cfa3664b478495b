"""Captured steps on a CUDA device: the answers of uncaptured ones, one graph per padded number of rows, new pools."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from models import byte_tokenizer, logits_after, random_tokens, tiny_model

from raindecode import RAIN
from raindecode.decoder import Decoder
from raindecode.engine.cuda_graph import BUCKETS, StepGraphs
from raindecode.engine.engine import Engine
from raindecode.search.sampling import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPTS = ["the", "inner on a", "a"]
DTYPES = [torch.float32, torch.bfloat16]
# Rows that one graph pads and another call does not take other tiles and products: their last bits may differ.
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.05}


def decoder(dtype: torch.dtype, *, graphs: bool, family: str = "llama") -> Decoder:
    model = tiny_model(family).to("cuda", dtype)
    return Decoder(model, byte_tokenizer(), kv_tokens=2000, cuda_graphs=graphs)


def graphs_of(engine: Engine) -> StepGraphs:
    graphs = engine.runner.graphs
    assert graphs is not None
    return graphs


def close(ours: list[np.ndarray], theirs: list[np.ndarray], dtype: torch.dtype) -> bool:  # type: ignore[type-arg]
    a, b = np.stack(ours), np.stack(theirs)
    return bool(np.abs(a - b).max() <= CLOSE[dtype] * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_rows(dtype: torch.dtype) -> None:
    with_graphs, plain = (decoder(dtype, graphs=on).engine for on in (True, False))
    graphs = graphs_of(with_graphs)
    assert plain.runner.graphs is None
    for count in sorted({1, 3, 5, 100, 255, *BUCKETS}):
        before = graphs.replays
        path = [random_tokens(count, count)]
        assert close(logits_after(with_graphs, path), logits_after(plain, path), dtype), count
        assert graphs.replays == before + 1
        for engine in (with_graphs, plain):
            engine.tree.clear()
    assert graphs.captured == BUCKETS
    assert graphs.failed is None
    before = graphs.replays
    path = [random_tokens(BUCKETS[-1] + 1, 7)]
    assert close(logits_after(with_graphs, path), logits_after(plain, path), dtype)
    assert graphs.replays == before


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_trees_that_grow_and_branch(family: str) -> None:
    """One graph, one tree after another: what was loaded last is what the rows see, also their K/V of earlier replays."""
    with_graphs, plain = (decoder(torch.float32, graphs=on, family=family).engine for on in (True, False))
    stem = random_tokens(300, 1)
    for step in range(6):
        paths = [stem[: 40 + 50 * step] + random_tokens(1 + (seed + step) % 4, 10 * step + seed) for seed in range(4)]
        assert close(logits_after(with_graphs, paths), logits_after(plain, paths), torch.float32)
    graphs = graphs_of(with_graphs)
    assert graphs.failed is None
    assert graphs.replays == 6
    assert graphs.captured == (48, 64)


def test_greedy_answers_are_the_same() -> None:
    decoders = [decoder(torch.float32, graphs=on) for on in (True, False)]
    sampling = Sampling.greedy(ignore_eos=True)
    ours, plain = (d.generate(PROMPTS, search=sampling, max_new_tokens=24) for d in decoders)
    assert [c.token_ids for c in ours] == [c.token_ids for c in plain]
    graphs = graphs_of(decoders[0].engine)
    assert graphs.failed is None
    assert graphs.replays == decoders[0].engine.model_steps


def test_rain_gives_the_same_answers() -> None:
    search = RAIN(evaluator=lambda pairs: [0.1 * (len(reply) % 7) - 0.3 for _, reply in pairs], max_iterations=20)
    decoders = [decoder(torch.float32, graphs=on) for on in (True, False)]
    ours, plain = (d.generate(PROMPTS, search=search, max_new_tokens=6, seed=range(3)) for d in decoders)
    assert [(c.token_ids, c.stats.iterations) for c in ours] == [(c.token_ids, c.stats.iterations) for c in plain]
    assert graphs_of(decoders[0].engine).failed is None


def test_new_pools_and_freed_graphs() -> None:
    engine = decoder(torch.float32, graphs=True).engine
    graphs, path = graphs_of(engine), [random_tokens(4, 1)]
    first = logits_after(engine, path)
    engine.tree.clear()
    engine.runner.resize(2001)
    gc.collect()
    assert graphs.captured == ()
    assert close(logits_after(engine, path), first, torch.float32)
    assert graphs.captured == (4,)
    assert graphs.failed is None


def test_no_step_waits_but_for_its_logits() -> None:
    """torch raises where the host would wait: in a captured step and in one that is too large for a graph."""
    engine = decoder(torch.float32, graphs=True).engine
    counts = (4, 300)
    for seed, count in enumerate(counts):  # captures, and compiles
        logits_after(engine, [random_tokens(count, seed)])
    forward = engine.runner.forward

    def watched(batch, wanted):  # type: ignore[no-untyped-def]
        torch.cuda.set_sync_debug_mode("error")
        try:
            return forward(batch, wanted)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.runner.forward = watched  # type: ignore[method-assign]
    for seed, count in enumerate(counts):
        logits_after(engine, [random_tokens(count, 10 + seed)])
    assert graphs_of(engine).replays == 2
