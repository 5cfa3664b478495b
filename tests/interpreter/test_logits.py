"""The Triton lane of the logits family under Triton's interpreter, against the definition in plain PyTorch.

Run as `TRITON_INTERPRET=1 python -m pytest tests/interpreter/test_logits.py`: Triton decides at import.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rainkernels.errors import RangeError
from rainkernels.ops.logits import MixSample, MixStats, Rank, mix_sample, mix_sample_workspace, rank
from rainkernels.reference import logits as reference
from rainkernels.testing.cases_logits import CASES, LogitsCase, LogitsInputs
from rainkernels.triton import logits as kernels

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for -inf - -inf inside a masked branch
INF, NAN = float("inf"), float("nan")
BOUNDARY = 1e-5  # of the cumulative distribution: closer than this, rounding may pick the neighbour
BY_ID = {case.id: case for case in CASES}
# Wider than the buffer of candidates, so that searches, ties and the draw go over the row itself.
WIDE = [
    LogitsCase("wide-p", rows=3, vocab=9000, spread=0.3, top_p=(0.3, 0.97, 0.9999)),
    LogitsCase("wide-k", rows=3, vocab=9000, spread=0.3, top_k=(6000, 4097, 8999), top_p=(1.0, 0.9, 0.999)),
    LogitsCase("wide-ties", rows=2, vocab=9000, rounding=2.0, spread=1.0, top_k=(5500, 6500), top_p=(1.0, 0.95)),
    LogitsCase("wide-equal", rows=2, vocab=9000, spread=0.0, closeness=0.0, top_k=(0, 4500), top_p=(0.75, 1.0)),
    LogitsCase("wide-min", rows=2, vocab=9000, spread=0.3, top_k=(7000, 0), top_p=(0.9, 1.0), min_p=(0.3, 0.2)),
    LogitsCase("wide-models", rows=1, vocab=9000, spread=0.3, weights=((0.5, 0.25, 0.25),), top_p=0.9, bias=True),
]


@pytest.fixture(autouse=True)
def _triton_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAINKERNELS_LANE", "triton")


def run(i: LogitsInputs, **changes: Any) -> tuple[MixSample, MixStats]:
    sample, stats = mix_sample(i.logits, i.weights, stats=True, **(i.options | changes))
    assert stats is not None
    return sample, stats


def assert_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    """Equal as integers: NaN equals NaN."""
    assert all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b, strict=True))


def at_boundary(i: LogitsInputs, token: Tensor) -> Tensor:
    """Rows where the definition's draw lies within BOUNDARY of the interval of `token`."""
    o = i.options
    z, _ = reference.mixed_logits(i.logits, i.weights, o["vocab_size"])
    names = ("temperature", "top_k", "top_p", "min_p", "bias", "plausibility", "order")
    judge = None if o["plausibility"] is None else i.logits[o["plausibility_model"]][:, : o["vocab_size"]]
    mass, _ = reference.distribution(z, plausible=judge, **{name: o[name] for name in names})
    share = mass.double() / mass.double().sum(dim=1, keepdim=True)
    at = token.long().clamp(min=0)[:, None]
    high, own = share.cumsum(dim=1).gather(1, at)[:, 0], share.gather(1, at)[:, 0]
    u = reference.uniforms(o["seed"], o["position"])
    return (token >= 0) & (own > 0) & (u > high - own - BOUNDARY) & (u < high + BOUNDARY)


def assert_close(name: str, actual: Tensor, plain: Tensor, exact: Tensor, atol: float = 2e-6) -> None:
    """Error against float64 at most twice plain PyTorch's, plus atol (relative above 1); infinities in the same places."""
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(actual), finite), name
    assert torch.equal(actual[~finite].double().nan_to_num(nan=7.0), exact[~finite].nan_to_num(nan=7.0)), name
    if finite.any():
        atol *= max(1.0, float(exact[finite].abs().max()))
        error = (actual.double() - exact)[finite].abs().max()
        allowed = 2 * (plain.double() - exact)[finite].abs().max() + atol
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def assert_matches_definition(i: LogitsInputs) -> MixSample:
    sample, stats = run(i)
    plain, plain_stats = reference.mix_sample(i.logits, i.weights, stats=True, **i.options)
    wide = i.converted(torch.float64)
    exact, exact_stats = reference.mix_sample(wide.logits, wide.weights, stats=True, **wide.options)
    assert plain_stats is not None
    assert exact_stats is not None
    other = sample.token != plain[0]
    assert bool((~other | at_boundary(i, sample.token)).all()), f"{sample.token.tolist()} not {plain[0].tolist()}"
    assert int(other.sum()) <= 1, "more than one row at a boundary: not by chance"
    agree = (sample.token == exact[0]) & ~other
    for name, a, p, e in (
        *zip(("prob", "logprob"), sample[1:], plain[1:], exact[1:], strict=True),
        *zip(MixStats._fields, stats, plain_stats, exact_stats, strict=True),
    ):
        # What belongs to the drawn token can only be compared where it is the same token.
        rows = agree if name in ("prob", "logprob", "logprob_models") else torch.ones_like(agree)
        assert_close(name, a[rows], p[rows], e[rows])
    assert bool((stats.kl_ref[:, 0].nan_to_num() == 0).all())
    return sample


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_definition(case: LogitsCase) -> None:
    assert_matches_definition(replace(case, rows=min(case.rows, 8)).make(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["tiles", "three-models", "bias", "plausibility", "nan-row", "top-k"])
def test_half_precision_logits(name: str, dtype: torch.dtype) -> None:
    assert_matches_definition(replace(BY_ID[name], rows=3).make(dtype))


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_more_survivors_than_the_buffer_holds(case: LogitsCase) -> None:
    assert_matches_definition(case.make(torch.float32))


@pytest.mark.slow
def test_vocabulary_of_151936() -> None:
    case = LogitsCase("qwen", rows=2, vocab=151936, temperature=0.8, top_k=(0, 40), top_p=(0.9, 0.95), padding=(0, 128))
    assert_matches_definition(case.make(torch.bfloat16))


@pytest.mark.parametrize(
    "order", [*(pytest.param(order, marks=pytest.mark.slow) for order in ("k_p_min", "min_k_p")), "joint"]
)
def test_order_of_the_filters(order: str) -> None:
    """Probabilities .5 .25 .125 .0625 ...: top-k 3, top-p .8 and min-p .3 keep different sets in each order."""
    base = torch.log2(torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]])) * 0.6931471805599453
    rows = 12
    values = {"top_k": (3, torch.int32), "top_p": (0.8, torch.float32), "min_p": (0.3, torch.float32)}
    options = {name: torch.full((rows,), value, dtype=dtype) for name, (value, dtype) in values.items()}
    zeros, ones = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    i = LogitsInputs(
        [base.expand(rows, 5)],
        ones[:, None],
        {"temperature": ones, "seed": zeros, "position": torch.arange(rows), "bias": None, "plausibility": None,
         "plausibility_model": 0, "vocab_size": 5, "order": order, **options},
    )  # fmt: skip
    sample = assert_matches_definition(i)
    # Of three survivors .571 .286 .143 top-p needs two, of all five (.5 .25 .125) three; min-p drops what is under .15.
    assert sorted(set(sample.token.tolist())) == [0, 1]
    assert sorted({round(p, 4) for p in sample.prob.tolist()}) == [0.3333, 0.6667]


def test_a_row_does_not_depend_on_its_batch() -> None:
    case = replace(BY_ID["joint"], rows=5, vocab=3000)
    i = case.make(torch.float32)
    whole = run(i)
    order = [3, 1]
    o = {name: v[order].contiguous() if isinstance(v, Tensor) else v for name, v in i.options.items()}
    part = run(LogitsInputs([h[order] for h in i.logits], i.weights[order].contiguous(), o))
    for a, b in zip(whole, part, strict=True):
        assert_bits(tuple(t[order] for t in a), b)


def test_dirty_workspace_and_given_results() -> None:
    """What was in the workspace and the results before does not matter, and nothing else is written."""
    i = replace(BY_ID["tiles"], rows=2).make(torch.float32)
    fresh, fresh_stats = run(i)
    floats = mix_sample_workspace(2, 2, 5003, "cpu")
    workspace = torch.full((floats + 64,), NAN)
    workspace[floats:] = 3.0
    out = MixSample(torch.full((2,), 9, dtype=torch.int32), torch.full((2,), NAN), torch.full((2,), NAN))
    out_stats = MixStats(*(torch.full_like(t, NAN) for t in fresh_stats))
    got, got_stats = run(i, out=out, out_stats=out_stats, workspace=workspace)
    assert got is out
    assert got_stats is out_stats
    assert_bits(fresh, got)
    assert_bits(fresh_stats, got_stats)
    assert bool((workspace[floats:] == 3.0).all())


def test_without_statistics_the_same_token() -> None:
    i = replace(BY_ID["min-first"], rows=3).make(torch.float32)
    with_stats, _ = run(i)
    sample, none = mix_sample(i.logits, i.weights, **i.options)
    assert none is None
    assert_bits(with_stats, sample)


def test_one_model_alone_keeps_its_bits() -> None:
    """Weights (1, 0) and (0, 1) give what the single model gives, whatever the other holds."""
    i = BY_ID["plain"].make(torch.float32)
    single = [mix_sample([h], torch.ones(6, 1), **i.options)[0] for h in i.logits]
    for m, weights in enumerate(((1.0, 0.0), (0.0, 1.0))):
        logits = [h if n == m else torch.full_like(h, NAN) for n, h in enumerate(i.logits)]
        sample, _ = mix_sample(logits, torch.tensor([weights] * 6), **i.options)
        assert_bits(sample, single[m])


@pytest.mark.parametrize("rows", [96, pytest.param(4096, marks=pytest.mark.slow)])
def test_draws_follow_the_distribution(rows: int) -> None:
    """Draws over 16 tokens, one of them banned, one of probability 1e-6: expected counts within five deviations."""
    vocab = 16
    g = torch.Generator().manual_seed(3)
    h = torch.randn(1, vocab, generator=g)
    h[0, 5], h[0, 9] = -INF, -14.0
    ones = torch.ones(rows)
    sample, _ = mix_sample(
        [h.expand(rows, vocab)],
        ones[:, None],
        temperature=ones,
        seed=torch.full((rows,), 77),
        position=torch.arange(rows),
    )
    counts = torch.bincount(sample.token.long(), minlength=vocab)
    expected = rows * torch.softmax(h[0].double(), dim=0)
    assert int(counts[5]) == 0
    assert bool(((counts - expected).abs() <= 5 * expected.sqrt() + 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rank(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    base = (torch.randn(9, 2300, generator=g) * 4).round() / 2  # many ties
    aligned = base + torch.randn(9, 2300, generator=g)
    base[1, 1100:1300] = -INF
    base[2, 7] = NAN
    aligned[3, 2299] = INF
    aligned[4] = -INF
    base[5, 30], aligned[5, 30] = -INF, 1.0  # KL is infinite there
    aligned[6] = base[6]
    base, aligned = base.to(dtype), aligned.to(dtype)
    token = torch.tensor([0, 1150, 5, 5, 5, 6, 2299, 2000, 1024], dtype=torch.int32)
    token[7] = int(base[7].argmax())
    got = rank(base, aligned, token)
    want = reference.rank(base, aligned, token)
    exact = reference.rank(base.double(), aligned.double(), token)
    assert torch.equal(got.rank, want[0])
    assert got.rank[2:5].tolist() == [0, 0, 0]
    assert int(got.rank[7]) == 1
    assert float(got.kl[6]) == 0.0
    assert float(got.kl[5]) == INF
    for name, a, p, e in zip(Rank._fields[1:], got[1:], want[1:], exact[1:], strict=True):
        assert_close(name, a, p, e)


def test_rank_of_a_token_outside_makes_the_row_invalid() -> None:
    """The launcher's contract on cuda, where the op does not look at the ids."""
    h = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    out = Rank(torch.empty(3, dtype=torch.int32), torch.empty(3), torch.empty(3), torch.empty(3))
    workspace = torch.empty(kernels.workspace_floats(3, 2, 50))
    kernels.rank(h, h, torch.tensor([-1, 50, 49], dtype=torch.int32), 50, out, workspace)
    assert out.rank.tolist()[:2] == [0, 0]
    assert int(out.rank[2]) == 1 + int((h[2] > h[2, 49]).sum())
    assert bool(out.kl[:2].isnan().all())


@pytest.mark.parametrize("name", ["mix_sample", "rank"])
def test_launches_go_to_the_tensors_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins on a second GPU: every kernel is launched while that one is the current device."""
    current: list[object] = []
    launched: list[tuple[str, list[object]]] = []

    @contextlib.contextmanager
    def place(device: object) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    class Kernel:
        def __init__(self, label: str) -> None:
            self.label = label

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **kwargs: launched.append((self.label, list(current)))

    wanted = ["rank_tiles", "rank_rows"] if name == "rank" else ["plausible_tiles", "mix_tiles", "mix_rows"]
    for label in wanted:
        monkeypatch.setattr(kernels, f"{label}_kernel", Kernel(label))
    monkeypatch.setattr(torch.cuda, "device", place)
    x: Any = SimpleNamespace(is_cuda=True, device="cuda:1", shape=(2, 50), stride=lambda dim: 50)
    out: Any = MixSample(x, x, x) if name == "mix_sample" else Rank(x, x, x, x)
    if name == "rank":
        kernels.rank(x, x, x, 50, out, x)
    else:
        w: Any = SimpleNamespace(is_cuda=True, device="cuda:1", shape=(2, 1))
        kernels.mix_sample([x], w, x, None, None, None, x, x, None, x, 0, "k_p_min", 50, False, out, None, x)
    assert launched == [(label, ["cuda:1"]) for label in wanted]
    assert not current


BAD = {
    "temperature": (-1.0, NAN, INF), "top_k": (-1,), "top_p": (0.0, -0.5, 1.5, NAN), "min_p": (-0.1, 1.1, NAN),
    "plausibility": (-0.1, 1.5, NAN),
}  # fmt: skip


@pytest.mark.parametrize("name", [*BAD, "weights"])
def test_bad_parameters_make_their_row_invalid(name: str) -> None:
    """The launcher's contract on cuda, where the op does not look at values."""
    bad = BAD.get(name, (NAN, INF, -INF))
    rows = len(bad) + 1
    i = LogitsCase("bad", rows=rows, vocab=1100, top_k=20, top_p=0.9, min_p=0.1, plausibility=0.01).make(torch.float32)
    o, weights = i.options, i.weights
    (weights[:, 1] if name == "weights" else o[name])[1:] = torch.tensor(bad)
    out = MixSample(torch.empty(rows, dtype=torch.int32), torch.empty(rows), torch.empty(rows))
    position = torch.stack((o["position"], torch.zeros_like(o["position"])), dim=1)
    kernels.mix_sample(
        i.logits, weights, o["temperature"], o["top_k"], o["top_p"], o["min_p"], o["seed"], position, None,
        o["plausibility"], 0, "k_p_min", 1100, False, out, None, torch.empty(kernels.workspace_floats(rows, 2, 1100)),
    )  # fmt: skip
    assert out.token[1:].tolist() == [-1] * len(bad)
    assert bool(out.prob[1:].isnan().all() & out.logprob[1:].isnan().all())
    assert int(out.token[0]) >= 0


def test_too_large_a_vocabulary_is_refused() -> None:
    ones, zeros = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RangeError, match="vocab_size is 1048577"):
        mix_sample([torch.zeros(1, 1048577)], ones[:, None], temperature=ones, seed=zeros, position=zeros)


def test_ahead_of_time_configurations_name_every_argument_once() -> None:
    listed = kernels.aot_kernels()
    assert len({k.name for k in listed}) == len(listed)
    for k in listed:
        assert set(k.aligned) <= set(k.signature)
        assert not set(k.signature) & set(k.constexprs)
    assert {k.constexprs["N"] for k in listed if "N" in k.constexprs} == {1, 2, 3, 8}
