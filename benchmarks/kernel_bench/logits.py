"""mix_sample and rank: two models mixed, filtered and drawn from, and a token's rank, against chains of PyTorch ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernel_bench.bench import OURS, Bench, Settings, Verdict, compiled, num_input_sets
from kernel_bench.machine import l2_bytes
from kernel_bench.measure import Run, Runs
from rainkernels._lanes import choose_lane
from rainkernels.ops.logits import mix_sample, mix_sample_workspace, rank, rank_workspace

_VOCABULARY = 128_256  # Llama 3
_WEIGHT = 0.7  # of the aligned model; the base gets the rest


@dataclass(frozen=True)
class Filters:
    """What one case asks for; 0 and 1 turn a filter off."""

    name: str
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    stats: bool = False

    def title(self, rows: int, vocabulary: int) -> str:
        """The case's name in records."""
        return f"mix 2 models, {self.name}, {rows} x {vocabulary:,}"


# The first is the shape the project's goal is written in.
CASES = (
    Filters("top-k 50, top-p 0.95", top_k=50, top_p=0.95),
    Filters("top-k 50", top_k=50),
    Filters("no filter", temperature=1.0),
    Filters("top-p 0.95", top_p=0.95),
    Filters("greedy", temperature=0.0),
    Filters("no filter, statistics", temperature=1.0, stats=True),
)


@dataclass(frozen=True)
class Inputs:
    """Logits of two models, their weights, and seeds."""

    base: Tensor  # [rows, vocabulary]
    aligned: Tensor
    weights: Tensor  # [rows, 2] float32
    seed: Tensor
    position: Tensor
    token: Tensor  # [rows] int32, likely ones, for rank


def makers(settings: Settings) -> list[tuple[str, Callable[[], Bench]]]:
    """Names of the cases, and what makes each."""
    on_gpu = settings.device.type == "cuda"
    rows, vocabulary = (64, _VOCABULARY) if on_gpu else (16, _VOCABULARY)
    if settings.quick and not on_gpu:
        rows, vocabulary = 3, 2000
    dtypes = (torch.bfloat16, torch.float32) if on_gpu else (torch.float32,)
    made: list[tuple[str, Callable[[], Bench]]] = []
    for case in CASES[:1] if settings.quick else CASES:
        for dtype in dtypes[: 1 if settings.quick or case is not CASES[0] else None]:
            made.append((case.title(rows, vocabulary), partial(make, case, rows, vocabulary, dtype, settings)))
    made.append((f"rank, {rows} x {vocabulary:,}", partial(make_rank, rows, vocabulary, dtypes[0], settings)))
    return made


def draw_inputs(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator().manual_seed(seed)
    base = 3 * torch.randn(rows, vocabulary, generator=rng)
    aligned = base + torch.randn(rows, vocabulary, generator=rng)
    return Inputs(
        base.to(device, dtype),
        aligned.to(device, dtype),
        torch.tensor([[1 - _WEIGHT, _WEIGHT]]).repeat(rows, 1).to(device),
        torch.arange(rows, device=device),
        torch.full((rows,), 11, dtype=torch.int64, device=device),
        aligned.topk(4)[1][:, 3].to(device, torch.int32),
    )


def make(case: Filters, rows: int, vocabulary: int, dtype: torch.dtype, settings: Settings) -> Bench:
    """mix_sample next to the chain a framework runs, and the best order of PyTorch ops for the same draw."""
    sets = _sets(rows, vocabulary, dtype, settings)
    builders: dict[str, Callable[[], Runs]] = {OURS: lambda: [ours(case, i) for i in sets]}
    chain, best = chain_of(case), best_of(case)

    def runs(function: Callable[[Tensor, Tensor, Tensor], object]) -> Runs:
        return [partial(function, i.base, i.aligned, i.weights) for i in sets]

    builders["PyTorch chain"] = lambda: runs(chain)
    if best is not None:
        builders["best PyTorch order"] = lambda: runs(best)
    if settings.compile and case in (CASES[0], CASES[2]):
        builders["torch.compile"] = lambda: runs(compiled(best or chain))
    if settings.device.type == "cuda" and (case.top_k or case.top_p < 1):
        builders["FlashInfer sampling"] = lambda: runs(flashinfer_chain(case, rows))
    num_bytes = 2.0 * rows * vocabulary * dtype.itemsize
    name = case.title(rows, vocabulary)
    notes = {"input_sets": len(sets), "rows": rows, "vocabulary": vocabulary}
    lane = choose_lane("logits", settings.device)
    return Bench("mix_sample", name, dtype, builders, Exact(case, sets[0]), num_bytes, 0.0, lane, notes)


def ours(case: Filters, i: Inputs) -> Run:
    rows, vocabulary = i.base.shape
    device = i.base.device

    def filled(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    floats = mix_sample_workspace(rows, 2, vocabulary, device)
    options: dict[str, Any] = {
        "temperature": filled(case.temperature),
        "top_k": filled(case.top_k, torch.int32) if case.top_k else None,
        "top_p": filled(case.top_p) if case.top_p < 1 else None,
        "seed": i.seed,
        "position": i.position,
        "stats": case.stats,
        "workspace": torch.empty(floats, device=device),
    }
    sample, stats = mix_sample([i.base, i.aligned], i.weights, **options)
    options |= {"out": sample, "out_stats": stats}
    return lambda: mix_sample([i.base, i.aligned], i.weights, **options)


def mixed(base: Tensor, aligned: Tensor, weights: Tensor) -> Tensor:
    return weights[:, :1] * base.float() + weights[:, 1:] * aligned.float()


def statistics(base: Tensor, aligned: Tensor, z: Tensor, token: Tensor) -> tuple[Tensor, ...]:
    """Log-probabilities, KLs and the mixture's entropy from full log-softmaxes."""
    logs = [torch.log_softmax(x.float(), -1) for x in (base, aligned)]
    mixture = torch.log_softmax(z, -1)
    p = mixture.exp()
    kls = [(p * (mixture - each)).sum(-1) for each in logs]
    between = (logs[1].exp() * (logs[1] - logs[0])).sum(-1)
    at = token.long()[:, None]
    return *(each.gather(1, at) for each in logs), *kls, between, -(p * mixture).sum(-1)


def chain_of(case: Filters) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Mix, temperature, top-k, top-p, softmax, multinomial, each over the whole vocabulary: a list of logits processors."""

    def chain(base: Tensor, aligned: Tensor, weights: Tensor) -> Tensor:
        mixture = mixed(base, aligned, weights)
        if case.temperature == 0:
            return mixture.argmax(-1)
        z = mixture / case.temperature
        if case.top_k:
            least = torch.topk(z, case.top_k)[0][:, -1:]
            z = z.masked_fill(z < least, float("-inf"))
        if case.top_p < 1:
            ascending, ids = torch.sort(z, descending=False)
            removed = ascending.softmax(-1).cumsum(-1) <= 1 - case.top_p
            removed[:, -1:] = False
            z = z.masked_fill(removed.scatter(1, ids, removed), float("-inf"))
        token = torch.multinomial(z.softmax(-1), 1)[:, 0]
        if case.stats:
            statistics(base, aligned, mixture, token)
        return token

    return chain


def best_of(case: Filters) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The cheapest order of PyTorch ops we know: top-k first where there is one, else a race of exponentials."""

    def short(base: Tensor, aligned: Tensor, weights: Tensor) -> Tensor:
        values, ids = torch.topk(mixed(base, aligned, weights), case.top_k)
        p = (values / case.temperature).softmax(-1)
        if case.top_p < 1:
            p = p * (p.cumsum(-1) - p < case.top_p)
        return ids.gather(1, torch.multinomial(p, 1))[:, 0]

    def race(base: Tensor, aligned: Tensor, weights: Tensor) -> Tensor:
        z = mixed(base, aligned, weights)
        p = (z / case.temperature).softmax(-1)
        token = p.div_(torch.empty_like(p).exponential_()).argmax(-1)
        if case.stats:
            statistics(base, aligned, z, token)
        return token

    if case.temperature == 0 or (case.top_p < 1 and not case.top_k):
        return None
    return short if case.top_k else race


def flashinfer_chain(case: Filters, rows: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlashInfer's rejection sampler behind a plain mix."""
    import flashinfer.sampling as sampling

    def chain(base: Tensor, aligned: Tensor, weights: Tensor) -> Tensor:
        z = mixed(base, aligned, weights) / case.temperature
        token: Tensor = sampling.top_k_top_p_sampling_from_logits(
            z, case.top_k or z.shape[1], case.top_p, filter_apply_order="top_k_first"
        )
        return token

    return chain


class Exact:
    """Tokens must survive the filters, and our log-probabilities must be the exact ones, in float64."""

    def __init__(self, case: Filters, i: Inputs) -> None:
        # Exactly the mixture the ops see: weights and logits as stored, products and sums in float64.
        z = i.weights[:, :1].double() * i.base.double() + i.weights[:, 1:].double() * i.aligned.double()
        self.log_p = torch.log_softmax(z, -1)
        p = torch.softmax(z / case.temperature, -1) if case.temperature else torch.zeros_like(z)
        if case.temperature == 0:
            p.scatter_(1, z.argmax(-1, keepdim=True), 1.0)
        # Tokens whose place is within float32 rounding of the cut may be either side of it.
        if case.top_k:
            least = p.topk(case.top_k)[0][:, -1:]
            p = p * (p >= least * (1 - 1e-5))
        if case.top_p < 1:
            ordered, ids = p.sort(descending=True)
            before = (ordered / ordered.sum(-1, keepdim=True)).cumsum(-1) - ordered / ordered.sum(-1, keepdim=True)
            p = torch.zeros_like(p).scatter(1, ids, ordered * (before < case.top_p + 1e-5))
        self.kept = p / p.sum(-1, keepdim=True)

    def __call__(self, label: str, run: Run) -> Verdict:
        out: Any = run()
        token = (out[0].token if label == OURS else out).long()[:, None]
        error = float((self.kept.gather(1, token) == 0).sum())
        if label != OURS:
            return Verdict(error, 0.0, "rows with a token that the filters remove")
        exact, prob = self.log_p.gather(1, token)[:, 0], self.kept.gather(1, token)[:, 0]
        error += float((out[0].logprob.double() - exact).abs().max())
        error += float(((out[0].prob.double() - prob).abs() / prob.clamp_min(1e-30)).max())
        return Verdict(error, 2e-4, "rows with a removed token + error of logprob + relative error of prob")


def make_rank(rows: int, vocabulary: int, dtype: torch.dtype, settings: Settings) -> Bench:
    """rank next to counting and next to sorting."""
    sets = _sets(rows, vocabulary, dtype, settings)

    def counted(base: Tensor, aligned: Tensor, token: Tensor) -> tuple[Tensor, ...]:
        at = token.long()[:, None]
        logs = [torch.log_softmax(x.float(), -1) for x in (base, aligned)]
        own = base.gather(1, at)
        ids = torch.arange(base.shape[1], device=base.device)
        place = 1 + (base > own).sum(-1) + ((base == own) & (ids < at)).sum(-1)
        kl = (logs[1].exp() * (logs[1] - logs[0])).sum(-1)
        return place, kl, logs[0].gather(1, at)[:, 0], logs[1].gather(1, at)[:, 0]

    def sorted_(base: Tensor, aligned: Tensor, token: Tensor) -> tuple[Tensor, ...]:
        order = torch.sort(base, descending=True, stable=True)[1]
        place = 1 + (order == token.long()[:, None]).to(torch.int8).argmax(-1)
        return place, *counted(base, aligned, token)[1:]

    def plain(function: Callable[..., object]) -> Callable[[], Runs]:
        return lambda: [partial(function, i.base, i.aligned, i.token) for i in sets]

    builders: dict[str, Callable[[], Runs]] = {
        OURS: lambda: [ours_rank(i) for i in sets],
        "PyTorch, counting": plain(counted),
        "PyTorch, sorting": plain(sorted_),
    }
    if settings.compile:
        builders["torch.compile"] = lambda: plain(compiled(counted))()
    first = sets[0]
    wanted = counted(first.base.double(), first.aligned.double(), first.token)

    def verify(label: str, run: Run) -> Verdict:
        got: Any = run()
        place, kl, base, aligned = got
        error = float((place.long() != wanted[0]).sum())
        for value, exact in ((kl, wanted[1]), (base, wanted[2]), (aligned, wanted[3])):
            error += float(((value.double() - exact).abs() / exact.abs().clamp_min(1.0)).max())
        return Verdict(error, 2e-4, "rows of another rank + errors of KL and log-probabilities")

    num_bytes = 2.0 * rows * vocabulary * dtype.itemsize
    lane = choose_lane("logits", settings.device)
    notes = {"input_sets": len(sets), "rows": rows, "vocabulary": vocabulary}
    return Bench("rank", f"{rows} x {vocabulary:,}", dtype, builders, verify, num_bytes, 0.0, lane, notes)


def ours_rank(i: Inputs) -> Run:
    workspace = torch.empty(rank_workspace(*i.base.shape, i.base.device), device=i.base.device)
    out = rank(i.base, i.aligned, i.token, workspace=workspace)
    return lambda: rank(i.base, i.aligned, i.token, out=out, workspace=workspace)


def _sets(rows: int, vocabulary: int, dtype: torch.dtype, settings: Settings) -> list[Inputs]:
    size = 2.0 * rows * vocabulary * dtype.itemsize
    on_gpu = settings.device.type == "cuda"
    count = num_input_sets(settings, size, l2_bytes(settings.device) if on_gpu else 0)
    return [draw_inputs(rows, vocabulary, dtype, settings.device, seed) for seed in range(count)]
