"""The logits family on a CUDA device: every named case, graph capture, and independence of the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_logits import assert_close, bits, unexplained
from torch import Tensor

from rainkernels.ops.logits import MixSample, MixStats, Rank, mix_sample, mix_sample_workspace, rank, rank_workspace
from rainkernels.reference import logits as reference
from rainkernels.testing.cases_logits import CASES, LogitsCase, LogitsInputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BY_ID = {case.id: case for case in CASES}
LARGE = [
    LogitsCase("llama", rows=64, vocab=128256, temperature=0.7, top_k=50, top_p=0.95),
    LogitsCase("qwen", rows=17, vocab=151936, top_p=(0.95, 0.3, 1.0), min_p=(0.0, 0.1)),
    LogitsCase("gemma-wide", rows=8, vocab=262208, spread=0.5, top_p=(0.9, 0.999), top_k=(0, 20000)),
]


def to_cuda(i: LogitsInputs) -> LogitsInputs:
    options = {name: v.cuda() if isinstance(v, Tensor) else v for name, v in i.options.items()}
    return LogitsInputs([h.cuda() for h in i.logits], i.weights.cuda(), options)


def run(i: LogitsInputs, **changes: Any) -> tuple[MixSample, MixStats]:
    sample, stats = mix_sample(i.logits, i.weights, stats=True, **(i.options | changes))
    assert stats is not None
    return sample, stats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_matches_definition(case: LogitsCase, dtype: torch.dtype) -> None:
    i = case.make(dtype)
    sample, stats = run(to_cuda(i))
    token = sample.token.cpu()
    assert unexplained(i, token) == []
    plain, plain_stats = reference.mix_sample(i.logits, i.weights, stats=True, **i.options)
    wide = i.converted(torch.float64)
    exact, exact_stats = reference.mix_sample(wide.logits, wide.weights, stats=True, **wide.options)
    assert plain_stats is not None
    assert exact_stats is not None
    agree = (token == exact[0]) & (token == plain[0])
    for name, a, p, e in (
        *zip(("prob", "logprob"), sample[1:], plain[1:], exact[1:], strict=True),
        *zip(MixStats._fields, stats, plain_stats, exact_stats, strict=True),
    ):
        rows = agree if name in ("prob", "logprob", "logprob_models") else torch.ones_like(agree)
        assert_close(name, a.cpu()[rows], p[rows], e[rows], 4e-6)


def test_a_row_does_not_depend_on_its_batch() -> None:
    i = to_cuda(replace(LARGE[0], rows=33).make(torch.bfloat16))
    whole = bits(run(i))
    for order in ([5], [32, 7, 7, 0]):
        options = {n: v[order].contiguous() if isinstance(v, Tensor) else v for n, v in i.options.items()}
        part = bits(run(LogitsInputs([h[order] for h in i.logits], i.weights[order].contiguous(), options)))
        assert all(torch.equal(a[order], b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize("name", ["tiles", "plain", "bias", "plausibility", "top-p-flat"])
def test_graph_replays_follow_their_inputs(name: str) -> None:
    """Captured once, the op reads what the tensors hold at each replay, and allocates nothing."""
    first, second = (to_cuda(BY_ID[name].make(torch.bfloat16, seed=s)) for s in (0, 1))
    rows, models = first.weights.shape
    position = first.options["position"]
    first.options["position"] = torch.stack((position, torch.zeros_like(position)), dim=1)
    position = second.options["position"]
    second.options["position"] = torch.stack((position, torch.zeros_like(position)), dim=1)
    expected = [bits(run(i)) for i in (first, second)]
    out, out_stats = run(first)
    workspace = torch.empty(mix_sample_workspace(rows, models, BY_ID[name].vocab, "cuda"), device="cuda")
    given = {"out": out, "out_stats": out_stats, "workspace": workspace}
    run(first, **given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        run(first, **given)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    for source, want in zip((first, second), expected, strict=True):
        for target, new in zip(first.logits, source.logits, strict=True):
            target.copy_(new)
        for key, value in source.options.items():
            if isinstance(value, Tensor):
                first.options[key].copy_(value)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(bits((out, out_stats)), want, strict=True))


def test_chi_square_of_draws() -> None:
    """A million draws over 512 tokens by varying the position: the statistic stays below its 1e-6 quantile."""
    rows, vocab = 1 << 20, 512
    h = torch.randn(1, vocab, generator=torch.Generator().manual_seed(4)).cuda() * 2
    ones = torch.ones(rows, device="cuda")
    seed = torch.full((rows,), 5, dtype=torch.int64, device="cuda")
    position = torch.arange(rows, device="cuda")
    sample, _ = mix_sample([h.expand(rows, vocab)], ones[:, None], temperature=ones, seed=seed, position=position)
    counts = torch.bincount(sample.token.long(), minlength=vocab).double()
    expected = torch.softmax(h[0].double(), dim=0) * rows
    common = expected >= 10
    rest = (counts[~common].sum() - expected[~common].sum()) ** 2 / expected[~common].sum().clamp(min=1)
    statistic = float(((counts - expected) ** 2 / expected)[common].sum() + rest)
    freedom = int(common.sum())
    # Wilson and Hilferty's cube for the quantile at 4.75 standard deviations.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rank(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    base = ((torch.randn(9, 128256, generator=g) * 4).round() / 2).to(dtype)
    aligned = (base.float() + torch.randn(9, 128256, generator=g)).to(dtype)
    base[2, 7] = float("nan")
    token = torch.randint(0, 128256, (9,), generator=g, dtype=torch.int32)
    want = reference.rank(base, aligned, token)
    exact = reference.rank(base.double(), aligned.double(), token)
    out = Rank(torch.empty(9, dtype=torch.int32, device="cuda"), *torch.empty(3, 9, device="cuda").unbind(0))
    workspace = torch.empty(rank_workspace(9, 128256, "cuda"), device="cuda")
    rank(base.cuda(), aligned.cuda(), token.cuda(), out=out, workspace=workspace)
    assert torch.equal(out.rank.cpu(), want[0])
    for name, a, p, e in zip(Rank._fields[1:], out[1:], want[1:], exact[1:], strict=True):
        assert_close(name, a.cpu(), p, e, 4e-6)
