"""mix_sample: every lane against the definition, identities of the mixture, invalid rows, bits that may not change."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rainkernels import has_native
from rainkernels.ops.logits import MixSample, MixStats, mix_sample
from rainkernels.reference import logits as reference
from rainkernels.testing.cases_logits import CASES, LogitsCase, LogitsInputs

pytestmark = pytest.mark.skipif(not has_native(), reason="rainkernels._C is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_ID = {case.id: case for case in CASES}
LAMBDAS = (-1.0, 0.0, 1e-6, 0.5, 1.0, 1 + 1e-6, 2.0, 10.0, 100.0)


@pytest.fixture(params=["cpu", "reference"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(i: LogitsInputs, **changes: Any) -> tuple[MixSample, MixStats]:
    sample, stats = mix_sample(i.logits, i.weights, stats=True, **(i.options | changes))
    assert stats is not None
    return sample, stats


def bits(results: tuple[MixSample, MixStats | None]) -> list[Tensor]:
    """Everything a call returned, as integers: NaN equals NaN."""
    return [t.view(torch.int32) for part in results if part is not None for t in part]


def assert_same(a: tuple[MixSample, MixStats | None], b: tuple[MixSample, MixStats | None]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


def unexplained(i: LogitsInputs, token: Tensor, tolerance: float = 1e-5) -> list[int]:
    """Rows whose token is not the definition's in float64, although u is further than `tolerance` from its interval.

    The float32 mixture is taken as given. Where a filter's boundary is that near, either side of it is right.
    """
    o = i.options
    z, fine = reference.mixed_logits(i.logits, i.weights, o["vocab_size"])
    judge = None if o["plausibility"] is None else i.logits[o["plausibility_model"]][:, : o["vocab_size"]].double()
    u = reference.uniforms(o["seed"], o["position"])[:, None]
    right = torch.zeros_like(token, dtype=torch.bool)
    for shift in (0.0, -tolerance, tolerance):
        nudged = {n: None if o[n] is None else (o[n].double() * (1 + shift)) for n in ("top_p", "min_p")}
        if nudged["top_p"] is not None:
            nudged["top_p"] = nudged["top_p"].clamp(max=1.0).where(o["top_p"] < 1, 1.0)
        if nudged["min_p"] is not None:
            nudged["min_p"].clamp_(max=1.0)
        mass, usable = reference.distribution(
            z.double(), temperature=o["temperature"], top_k=o["top_k"], bias=o["bias"], plausible=judge,
            plausibility=o["plausibility"], order=o["order"], **nudged,
        )  # fmt: skip
        valid = fine & usable
        cdf = mass.cumsum(1) / mass.sum(1, keepdim=True)
        at = token.long().clamp(min=0)[:, None]
        high, own = cdf.gather(1, at), (mass / mass.sum(1, keepdim=True)).gather(1, at)
        inside = (u > high - own - tolerance) & (u < high + tolerance) & (own > 0)
        right |= torch.where(valid, inside[:, 0] & (token >= 0), token == -1)
    return (~right).nonzero()[:, 0].tolist()


def assert_close(name: str, actual: Tensor, plain: Tensor, exact: Tensor, atol: float) -> None:
    """Error against float64 at most twice plain PyTorch's, plus atol (relative above 1); infinities in the same places."""
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(actual), finite), name
    assert torch.equal(actual[~finite].double().nan_to_num(nan=7.0), exact[~finite].nan_to_num(nan=7.0)), name
    if finite.any():
        atol *= max(1.0, float(exact[finite].abs().max()))
        error = (actual.double() - exact)[finite].abs().max()
        allowed = 2 * (plain.double() - exact)[finite].abs().max() + atol
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def assert_matches_definition(i: LogitsInputs, sample: MixSample, stats: MixStats) -> None:
    assert unexplained(i, sample.token) == []
    plain, plain_stats = reference.mix_sample(i.logits, i.weights, stats=True, **i.options)
    wide = i.converted(torch.float64)
    exact, exact_stats = reference.mix_sample(wide.logits, wide.weights, stats=True, **wide.options)
    assert plain_stats is not None
    assert exact_stats is not None
    agree = (sample.token == exact[0]) & (sample.token == plain[0])
    for name, a, p, e in (
        *zip(("prob", "logprob"), sample[1:], plain[1:], exact[1:], strict=True),
        *zip(MixStats._fields, stats, plain_stats, exact_stats, strict=True),
    ):
        # What belongs to the drawn token can only be compared where it is the same token.
        rows = agree if name in ("prob", "logprob", "logprob_models") else torch.ones_like(agree)
        assert_close(name, a[rows], p[rows], e[rows], 2e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_definition(case: LogitsCase, dtype: torch.dtype, lane: str) -> None:
    inputs = case.make(dtype)
    sample, stats = run(inputs)
    assert_matches_definition(inputs, sample, stats)


@pytest.mark.parametrize("vocab", [1, 7, 1000, 32000, 128256, 151936, 152064, 262208])
def test_vocabularies(vocab: int) -> None:
    """Model sizes in use, with rows that are not a multiple of anything apart."""
    case = LogitsCase("vocabulary", rows=2, vocab=vocab, row_gap=3, temperature=0.8, top_k=(0, 40), top_p=(0.9, 0.95))
    inputs = case.make(torch.float32)
    sample, stats = run(inputs)
    assert_matches_definition(inputs, sample, stats)


@pytest.mark.parametrize("rows", [0, 1, 3, 64, 257])
def test_batch_sizes(rows: int, lane: str) -> None:
    case = LogitsCase("batch", rows=rows, vocab=300, weights=tuple((1 - x, x) for x in LAMBDAS), temperature=0.9)
    inputs = case.make(torch.bfloat16)
    sample, stats = run(inputs)
    assert sample.token.shape == (rows,)
    assert stats.kl_mix.shape == (rows, 2)
    if rows:
        assert_matches_definition(inputs, sample, stats)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_mixture_is_exact(lam: float, shift: float, lane: str) -> None:
    """One token per row has all the mass: lse_mix is its mixed logit, against float64."""
    g = torch.Generator().manual_seed(1)
    ref, aligned = torch.randn(40, generator=g) * 5 + shift, torch.randn(40, generator=g) * 5 + shift
    only = torch.full((40, 40), float("-inf"))
    logits = [torch.where(torch.eye(40, dtype=torch.bool), h[:, None], only) for h in (ref, aligned)]
    weights = torch.tensor([[1 - lam, lam]], dtype=torch.float32).repeat(40, 1)
    zeros = torch.zeros(40, dtype=torch.int64)
    sample, stats = mix_sample(
        logits, weights, temperature=torch.ones(40), seed=zeros, position=zeros, stats=True
    )  # fmt: skip
    w = weights.double()
    exact = w[:, 0] * ref.double() + w[:, 1] * aligned.double()
    bound = 1e-5 * (abs(lam) * aligned.abs().max() + abs(1 - lam) * ref.abs().max())
    assert stats is not None
    assert sample.token.tolist() == list(range(40))
    # The weights themselves are rounded: 1 - lam + lam need not be 1 by as much as 6e-8, which a shift multiplies.
    assert float((stats.lse_mix - exact).abs().max()) <= bound + abs(shift) * 1.2e-7


def single(i: LogitsInputs, model: int) -> LogitsInputs:
    return replace(i, logits=[i.logits[model]], weights=torch.ones_like(i.weights[:, :1]).contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tiles", "min-first", "joint", "greedy", "bias", "padded-vocabulary", "plain"])
def test_one_weight_of_one_is_that_model(name: str, dtype: torch.dtype, lane: str) -> None:
    inputs = BY_ID[name].make(dtype)
    for model in (0, 1):
        weights = torch.zeros_like(inputs.weights)
        weights[:, model] = 1
        both = mix_sample(inputs.logits, weights, **inputs.options)
        alone = mix_sample(single(inputs, model).logits, weights[:, model : model + 1].contiguous(), **inputs.options)
        assert_same(both, alone)


def test_zero_weight_is_as_if_absent(lane: str) -> None:
    inputs = BY_ID["tiles"].make(torch.float32)
    junk = torch.full_like(inputs.logits[0], float("nan"))
    for at in range(3):
        logits, weights = list(inputs.logits), list(inputs.weights.unbind(1))
        logits.insert(at, junk)
        weights.insert(at, torch.zeros_like(weights[0]))
        with_junk = mix_sample(logits, torch.stack(weights, 1), **inputs.options)
        assert_same(with_junk, mix_sample(inputs.logits, inputs.weights, **inputs.options))


def test_order_of_models_does_not_matter(lane: str) -> None:
    inputs = LogitsCase("three", rows=40, vocab=700, weights=((0.2, 0.3, 0.5), (1.5, -1.0, 0.5))).make(torch.float32)
    _, stats = run(inputs)
    turned = LogitsInputs(inputs.logits[::-1], inputs.weights.flip(1).contiguous(), inputs.options)
    other, other_stats = run(turned)
    assert unexplained(inputs, other.token) == []
    torch.testing.assert_close(stats.lse_mix, other_stats.lse_mix)
    torch.testing.assert_close(stats.log_z, other_stats.log_z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.kl_mix, other_stats.kl_mix.flip(1), rtol=1e-5, atol=2e-6)


def test_temperature_commutes_with_mixing(lane: str) -> None:
    """Halving all logits is temperature 2, bit for bit."""
    inputs = LogitsCase("halves", rows=30, vocab=2000, temperature=2.0, top_k=(0, 40), top_p=(1.0, 0.9)).make(
        torch.float32
    )
    halved = replace(inputs, logits=[h / 2 for h in inputs.logits])
    one = torch.ones(30)
    assert torch.equal(run(inputs)[0].token, run(halved, temperature=one)[0].token)
    assert torch.equal(run(inputs)[0].prob, run(halved, temperature=one)[0].prob)


def test_log_z_has_the_sign_of_the_side(lane: str) -> None:
    """Between the models the normaliser is at most 1 (Hoelder), outside at least 1."""
    for lam in LAMBDAS:
        inputs = LogitsCase("z", rows=8, vocab=500, weights=((1 - lam, lam),)).make(torch.float32)
        log_z = run(inputs)[1].log_z
        assert bool((log_z <= 2e-5).all() if 0 <= lam <= 1 else (log_z >= -2e-5 * abs(lam)).all()), lam


def test_divergences_are_never_negative_and_zero_for_equals(lane: str) -> None:
    for closeness in (1e-4, 1e-3, 1e-2, 1.0):
        for shift in ((0.0,), (1e4, -1e4), (30.0, 0.0)):
            inputs = LogitsCase("kl", rows=16, vocab=3000, closeness=closeness, shift=shift).make(torch.float32)
            stats = run(inputs)[1]
            assert float(stats.kl_mix.min()) >= -1e-6
            assert float(stats.kl_ref.min()) >= -1e-6
    equal = run(BY_ID["equal-models"].make(torch.float32))[1]
    assert float(equal.kl_mix.abs().max()) == 0
    assert float(equal.kl_ref.abs().max()) == 0
    assert float(run(BY_ID["tiles"].make(torch.float32))[1].kl_ref[:, 0].abs().max()) == 0


def test_statistics_do_not_see_constants_added_to_a_row(lane: str) -> None:
    """Logits on a grid that survives the shift: the same statistics to the last digits, except the sums themselves."""
    case = LogitsCase("grid", rows=12, vocab=2000, rounding=1 / 64, weights=((0.25, 0.75), (-1.0, 2.0)))
    inputs = case.make(torch.float32)
    moved = replace(inputs, logits=[inputs.logits[0] + 8192, inputs.logits[1] - 8192])
    (sample, stats), (there, stats_there) = run(inputs), run(moved)
    assert torch.equal(sample.token, there.token)
    for name in ("entropy", "kl_mix", "kl_ref", "log_z", "logprob_models"):
        torch.testing.assert_close(getattr(stats, name), getattr(stats_there, name), rtol=1e-6, atol=3e-6, msg=name)


# Bans and invalid rows.


@pytest.mark.parametrize("weight", [(0.5, 0.5), (-1.0, 2.0), (2.0, -1.0), (0.3, 0.2), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("model", [0, 1])
def test_a_ban_by_a_model_with_weight_holds_for_any_sign(weight: tuple[float, float], model: int, lane: str) -> None:
    inputs = LogitsCase("ban", rows=200, vocab=60, weights=(weight,), spread=0.5).make(torch.float32)
    inputs.logits[model][:, 10:] = float("-inf")
    sample, stats = run(inputs)
    assert bool((sample.token >= 0).all())
    assert bool((sample.token < 10).all()) == (weight[model] != 0)
    assert bool(torch.isfinite(sample.logprob).all())
    assert bool(torch.isfinite(stats.lse_mix).all())
    # The mixture puts mass where the other model has none exactly when that model's weight is 0.
    assert bool((stats.kl_mix[:, model] == float("inf")).all()) == (weight[model] == 0)


def test_a_bias_ban_survives_any_weight(lane: str) -> None:
    inputs = LogitsCase("ban", rows=64, vocab=60, weights=((2.0, -1.0), (-9.0, 10.0)), bias=True, banned_share=0.9)
    made = inputs.make(torch.float32)
    token = run(made)[0].token.long()
    assert bool((made.options["bias"].gather(1, token[:, None]) > float("-inf")).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["first", "second", "bias", "judge"])
@pytest.mark.parametrize("vocab", [40, 1024, 5000])
def test_a_bad_value_costs_its_row_only(value: float, where: str, vocab: int, lane: str) -> None:
    case = LogitsCase("bad", rows=5, vocab=vocab, bias=True, plausibility=0.01, plausibility_model=1, top_k=(20, 0))
    inputs = case.make(torch.float32)
    if where == "judge":
        inputs.weights[:] = torch.tensor([1.0, 0.0])
    before = run(inputs)
    bad = {"first": inputs.logits[0], "second": inputs.logits[1], "judge": inputs.logits[1]}
    bad.get(where, inputs.options["bias"])[3, vocab - 1] = value
    after = run(inputs)
    others = [0, 1, 2, 4]
    for x, y in zip(bits(before), bits(after), strict=True):
        assert torch.equal(x[others], y[others])
    assert int(after[0].token[3]) == -1
    for t in (*after[0][1:], *after[1]):
        assert bool(torch.isnan(t[3]).all())


def test_rows_with_nothing_left_are_invalid(lane: str) -> None:
    inputs = LogitsCase("empty", rows=3, vocab=50, bias=True).make(torch.float32)
    inputs.options["bias"][1] = float("-inf")
    inputs.weights[2] = 0
    sample, _ = run(inputs)
    assert sample.token[1:].tolist() == [-1, -1]
    assert bool(sample.prob[1:].isnan().all())
    assert int(sample.token[0]) >= 0


def test_only_existing_tokens_come_out(lane: str) -> None:
    """Padding columns hold the largest values of the row and enter nothing."""
    inputs = BY_ID["padded-vocabulary"].make(torch.float32)
    cut = replace(inputs, logits=[h[:, :1900].contiguous() for h in inputs.logits])
    assert_same(run(inputs), run(cut))


# Bits.


@pytest.mark.parametrize("name", ["tiles", "joint", "top-p-flat", "plausibility", "bias", "eight-models", "nan-row"])
def test_bits_do_not_depend_on_the_batch(name: str) -> None:
    inputs = BY_ID[name].make(torch.float32)
    sample, stats = run(inputs)
    rows = inputs.weights.shape[0]
    for picked in ([0], [rows - 1], list(range(rows))[::-1], [1, 1, 0, 2] * 5):
        o = {n: t[picked] if isinstance(t, Tensor) else t for n, t in inputs.options.items()}
        part = LogitsInputs([h[picked] for h in inputs.logits], inputs.weights[picked], o)
        wanted = [t[picked] for t in (*bits((sample, None)), *bits((sample, stats)))][3:]
        assert all(torch.equal(x, y) for x, y in zip(bits(run(part)), wanted, strict=True)), picked


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("name", ["joint", "plausibility", "nan-row", "inf-row"])
def test_bits_do_not_depend_on_threads(name: str, rows: int) -> None:
    """Rows over the threads, and the tiles of one row over the threads."""
    inputs = replace(BY_ID[name], rows=rows, vocab=40000).make(torch.float32)
    seen = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        seen.append(run(inputs))
    for other in seen[1:]:
        assert_same(seen[0], other)


_DIGEST = """
import hashlib, torch
from rainkernels.ops.logits import mix_sample, rank
from rainkernels.testing.cases_logits import CASES
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for case in CASES:
        i = case.make(dtype)
        sample, stats = mix_sample(i.logits, i.weights, stats=True, **i.options)
        ranks = rank(i.logits[0], i.logits[-1], sample.token.clamp(min=0), vocab_size=case.vocab)
        for t in (*sample, *stats, *ranks):
            digest.update(t.nan_to_num(nan=-7.0).contiguous().view(torch.uint8).numpy().tobytes())
from rainkernels import _C
print(_C.isa(), digest.hexdigest())
"""


def test_bits_do_not_depend_on_instruction_set() -> None:
    seen = {}
    for isa in ("avx512", "avx2", "baseline"):
        env = os.environ | {"RAINKERNELS_ISA": isa, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", _DIGEST], env=env, capture_output=True, text=True, check=True)
        used, digest = done.stdout.split()
        seen[used] = digest
    assert "baseline" in seen
    assert len(set(seen.values())) == 1, seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_matches_definition(case: LogitsCase, dtype: torch.dtype) -> None:
    inputs, host = case.make(dtype, "cuda"), case.make(dtype)
    sample, stats = run(inputs)
    assert_matches_definition(host, MixSample(*(t.cpu() for t in sample)), MixStats(*(t.cpu() for t in stats)))
