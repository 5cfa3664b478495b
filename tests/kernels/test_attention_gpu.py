"""The attention family on a CUDA device: every named case, bits across trees, graph capture with one plan after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_attention import assert_close_enough, run, truth
from torch import Tensor

from rainkernels.ops.attention import AttentionBuffers, merge_state, tree_attention
from rainkernels.reference import attention as reference
from rainkernels.testing.cases_attention import (
    CASES,
    AttentionCase,
    AttentionInputs,
    Forest,
    chain,
    fan,
    split_everywhere,
    tiles_of_rows,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["fp32", "bf16", "fp16"]
# Shapes of real models, long prefixes, and more branches than one tile holds.
LARGE = [
    AttentionCase("llama-1b", fan(2048, 40, 32), 32, 8, 64),
    AttentionCase("llama-7b", fan(4096, 40, 32), 32, 32, 128),
    AttentionCase("llama-8b-160", fan(4096, 160, 8), 32, 8, 128),
    AttentionCase("gemma", fan(1500, 24, 20), 8, 4, 256, softcap=50.0, sliding_window=1024),
    AttentionCase("mqa", fan(513, 9, 3, rows=3), 71, 1, 64),
]


def to_cuda(i: AttentionInputs) -> AttentionInputs:
    sinks = None if i.sinks is None else i.sinks.cuda()
    return replace(i, q=i.q.cuda(), k_pool=i.k_pool.cuda(), v_pool=i.v_pool.cuda(), sinks=sinks)


def rounding_of(dtype: torch.dtype) -> float:
    """Weights are rounded to the values' dtype before their product: half an ulp of 1."""
    return 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_matches_definition(case: AttentionCase, dtype: torch.dtype) -> None:
    i = case.make(dtype)
    state = run(to_cuda(i))
    # On the device where it is large: the yardstick is the definition, not the machine that works it out.
    large = case in LARGE
    exact, plain = (truth_on("cuda" if large else "cpu", i, d) for d in (torch.float64, dtype))
    assert state.v.dtype == dtype
    assert_close_enough(state.v.cpu(), plain[0], exact[0], rounding_of(dtype))
    assert_close_enough(state.lse.cpu(), plain[1], exact[1], 1e-6)


def truth_on(device: str, i: AttentionInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A few rows at a time: the definition gathers the keys of every row."""
    if device == "cpu":
        return truth(i, dtype)
    p = i.plan_inputs
    index, length = reference.path_slots(
        p["segment_parent"], p["segment_slots_indptr"], p["slots"], p["row_segment"], p["row_position"]
    )
    q, k_pool, v_pool = (t.to(device, dtype) for t in (i.q, i.k_pool, i.v_pool))
    parts = [
        reference.tree_attention(
            q[at : at + 8], k_pool, v_pool, index[at : at + 8].to(device), length[at : at + 8].to(device), **i.options
        )
        for at in range(0, len(q), 8)
    ]
    v, lse = (torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True))
    return v, lse


INVARIANT = [case for case in [*CASES, *LARGE] if case.id in ("step", "comb", "sinks-window", "llama-1b", "gemma")]


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_bits_do_not_depend_on_the_tree(case: AttentionCase, dtype: torch.dtype) -> None:
    """Segments may be cut anywhere. Other rows may change the tiles a row lands in, and then its sums are only close."""
    i = to_cuda(case.make(dtype))
    wanted, tiles = run(i), tiles_of_rows(i)
    slots = i.plan_inputs["slots"]
    pieces = replace(i, plan_inputs=split_everywhere(case.forest, 5).plan_inputs(slots))
    assert tiles_of_rows(pieces) == tiles
    cut = run(pieces)
    assert torch.equal(cut.v, wanted.v)
    assert torch.equal(cut.lse, wanted.lse)
    g = torch.Generator().manual_seed(1)
    for count in (1, len(case.forest.rows) // 2, len(case.forest.rows)):
        rows = torch.randperm(len(case.forest.rows), generator=g)[:count]
        forest = Forest(case.forest.segments, tuple(case.forest.rows[r] for r in rows.tolist()))
        part = replace(i, q=i.q[rows.cuda()].contiguous(), plan_inputs=forest.plan_inputs(slots))
        same = torch.tensor([a == tiles[r] for a, r in zip(tiles_of_rows(part), rows.tolist(), strict=True)])
        assert count < len(case.forest.rows) or same.all()
        some, whole = run(part), [t[rows.cuda()] for t in wanted]
        for a, b in zip(some, whole, strict=True):
            assert torch.equal(a[same.cuda()], b[same.cuda()])
        torch.testing.assert_close(some.v, whole[0], rtol=0.02, atol=2 * rounding_of(dtype))
        torch.testing.assert_close(some.lse, whole[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_one_capture_replays_every_plan(dtype: torch.dtype) -> None:
    """Captured once: q, the pools and the tree change between replays, no address does, and nothing is allocated."""
    buffers = AttentionBuffers.create(
        max_rows=64, max_items=4096, max_keys=65536, max_partials=4096, num_slots=2048, num_qo_heads=8, num_kv_heads=2,
        head_dim=64, dtype=dtype, device="cuda",
    )  # fmt: skip
    forests = (fan(1024, 40, 9), chain(900, 64), fan(300, 20, 30, rows=3), Forest((), ((-1, 0),)))
    q = torch.zeros(64, 8, 64, dtype=dtype, device="cuda")
    k_pool, v_pool = torch.zeros(2, 2048, 2, 64, dtype=dtype, device="cuda").unbind(0)
    out = torch.empty_like(q)
    steps = [AttentionCase("step", forest, 8, 2, 64).make(dtype) for forest in forests]
    plans = [i.plan() for i in steps]

    def call() -> None:
        assert buffers.plan is not None
        tree_attention(q, k_pool, v_pool, buffers.plan, softmax_scale=64**-0.5, out=out, buffers=buffers)

    buffers.load(plans[0])
    graph = captured(call)
    for i, plan in zip(steps, plans, strict=True):
        rows, keys = len(i.q), len(i.k_pool)
        q.fill_(float("nan"))
        for target, new, size in ((q, i.q, rows), (k_pool, i.k_pool, keys), (v_pool, i.v_pool, keys)):
            target[:size].copy_(new)
        buffers.load(plan)
        out.fill_(7.0)
        graph.replay()
        alone = run(to_cuda(i)).v
        exact, plain = truth(i), truth(i, dtype)
        assert_close_enough(out[:rows].cpu(), plain[0], exact[0], rounding_of(dtype))
        torch.testing.assert_close(out[:rows], alone, rtol=0.02, atol=2 * rounding_of(dtype))
        assert torch.equal(out[rows:], torch.zeros_like(out[rows:]))


def captured(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The call as a graph, after one run to compile; nothing may be allocated while it is recorded."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        call()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    return graph


def test_merge_state_under_a_graph() -> None:
    g = torch.Generator().manual_seed(3)
    v_a, v_b = (torch.randn(33, 8, 128, generator=g).cuda() for _ in range(2))
    lse_a, lse_b = (10 * torch.randn(33, 8, generator=g).cuda() for _ in range(2))
    lse_b[3] = float("-inf")
    out = torch.empty_like(v_a), torch.empty_like(lse_a)
    graph = captured(lambda: merge_state(v_a, lse_a, v_b, lse_b, out=out) and None)
    for scale in (1.0, 3.0):
        v_a.mul_(scale)
        lse_b.sub_(scale)
        graph.replay()
        exact = reference.merge_state(v_a.double(), lse_a.double(), v_b.double(), lse_b.double())
        plain = reference.merge_state(v_a, lse_a, v_b, lse_b)
        assert_close_enough(out[0], plain[0], exact[0], 1e-6)
        assert_close_enough(out[1], plain[1], exact[1], 5e-7)
