"""What mix_sample draws: distributions by chi-square, tails, supports, independence, kept sets against a sorted one."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from raindecode.engine import sampler
from rainkernels import has_native
from rainkernels.ops.logits import mix_sample
from rainkernels.reference import logits as reference

pytestmark = pytest.mark.skipif(not has_native(), reason="rainkernels._C is not built")
INF = float("inf")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(
    row: Tensor | list[Tensor], number: int, *, seed: int = 1, weights: tuple[float, ...] = (1.0,), **options: Any
) -> Tensor:
    """`number` draws from one row by running through the positions: all rows are that row, with stride 0."""
    rows = [row] if isinstance(row, Tensor) else row
    per_row = {"temperature": options.pop("temperature", 1.0)} | options
    dtypes = {"top_k": torch.int32}
    given = {
        name: torch.full((number,), value, dtype=dtypes.get(name, torch.float32))
        if isinstance(value, (int, float))
        else value
        for name, value in per_row.items()
    }
    sample, _ = mix_sample(
        [h[None].expand(number, -1) for h in rows], torch.tensor([weights]).repeat(number, 1),
        seed=torch.full((number,), seed), position=torch.arange(number), **given,
    )  # fmt: skip
    return sample.token


def chi_square_p(counts: Tensor, expected: Tensor) -> float:
    """Right tail of the chi-square statistic; bins are pooled, rarest first, until each expects ten or more."""
    order = expected.argsort()
    statistic, degrees, seen, wanted = 0.0, -1, 0.0, 0.0
    remaining = float(expected.sum())
    for c, e in zip(counts[order].tolist(), expected[order].tolist(), strict=True):
        seen, wanted, remaining = seen + c, wanted + e, remaining - e
        if wanted >= 10 and (remaining >= 10 or remaining < 1e-6):
            statistic, degrees = statistic + (seen - wanted) ** 2 / wanted, degrees + 1
            seen = wanted = 0.0
    assert seen == 0 or wanted > 1e-6, "drew what has no probability"
    if degrees < 1:
        return 1.0
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def expected_share(row: Tensor, **options: Any) -> Tensor:
    """Probability of every id, by the definition in float64."""
    given = {name: torch.tensor([value]) for name, value in ({"temperature": 1.0} | options).items()}
    mass, valid = reference.distribution(row.double()[None], **given)
    assert bool(valid)
    return mass[0] / mass.sum()


def logits_row(vocab: int, spread: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (1_000_000, {}),
        (1_000_000, {"temperature": 1.7, "min_p": 0.01}),
        (200_000, {"top_p": 0.8}),
        (200_000, {"temperature": 0.6, "top_k": 40, "top_p": 0.9}),
        pytest.param(1_000_000, {"temperature": 0.6, "top_k": 40, "top_p": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_a_million_draws_follow_the_distribution(number: int, options: dict[str, float]) -> None:
    row = logits_row(512)
    counts = torch.bincount(draw(row, number, **options).long(), minlength=512)
    share = expected_share(row, **options)
    assert int(counts[share == 0].sum()) == 0
    assert chi_square_p(counts, share * number) > 1e-4


@pytest.mark.parametrize("number", [8_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_draws_from_a_whole_vocabulary(number: int) -> None:
    row = logits_row(128_256, 3.0)
    counts = torch.zeros(128_256, dtype=torch.long)
    for at in range(0, number, 8_000):
        counts += torch.bincount(draw(row, 8_000, seed=5 + at).long(), minlength=128_256)
    assert chi_square_p(counts, expected_share(row) * number) > 1e-4


def test_two_models_draw_their_mixture() -> None:
    a, b = logits_row(256), logits_row(256, seed=1)
    number = 200_000
    counts = torch.bincount(draw([a, b], number, weights=(-0.5, 1.5)).long(), minlength=256)
    z = reference.mixed_logits([a.double()[None], b.double()[None]], torch.tensor([[-0.5, 1.5]]), 256)[0][0]
    assert chi_square_p(counts, expected_share(z) * number) > 1e-4


@pytest.mark.parametrize("share", [1e-2, 1e-3])
def test_a_tail_of_rare_tokens_keeps_its_mass(share: float) -> None:
    """All but one of 128,000 tokens hold `share` together, each far below float32 noise of the largest."""
    vocab, number = 128_000, 20_000
    row = torch.full((vocab,), math.log(share / (vocab - 1)))
    row[77_777] = math.log1p(-share)
    token = draw(row, number, seed=9)
    rare = token[token != 77_777]
    # Five standard deviations of a binomial.
    assert abs(len(rare) - share * number) < 5 * math.sqrt(share * number)
    assert len(rare.unique()) >= len(rare) - 1
    assert int(rare.min()) < vocab // 3
    assert int(rare.max()) > 2 * vocab // 3


def test_two_tokens_near_a_tie() -> None:
    number = 200_000
    for difference in (0.0, 1e-3, -1e-3, 0.05):
        ones = int(draw(torch.tensor([0.0, difference]), number, seed=3).sum())
        wanted = number / (1 + math.exp(-difference))
        assert abs(ones - wanted) < 4 * math.sqrt(number / 4), difference


@pytest.mark.parametrize("order", ["k_p_min", "min_k_p", "joint"])
def test_kept_sets_are_those_of_a_sorted_row(order: str) -> None:
    """Every id of the set is drawn and no other: the set is found here by sorting in float64, without the reference."""
    g = torch.Generator().manual_seed(2)
    for trial in range(12):
        vocab = (9, 40, 1500)[trial % 3]
        row = (torch.randn(vocab, generator=g) * 1.5 * 8).round() / 8  # ties
        k, p, m = (
            int(torch.randint(1, 12, (1,), generator=g)),
            float(torch.rand(1, generator=g)) * 0.9 + 0.05,
            0.02 + 0.1 * (trial % 4),
        )
        ids = sorted(range(vocab), key=lambda i: (-float(row[i]), i))
        weight = [math.exp(float(row[i]) - float(row[ids[0]])) for i in ids]

        def by_mass(n: int, weight: list[float] = weight, p: float = p) -> int:
            total, run = sum(weight[:n]), 0.0
            for j, w in enumerate(weight[:n]):
                run += w
                if run >= p * total:
                    return j + 1
            return n

        by_min = sum(w >= torch.tensor(m).item() for w in weight)
        kept = {
            "k_p_min": min(by_mass(min(k, vocab)), by_min),
            "min_k_p": by_mass(min(k, by_min)),
            "joint": min(k, by_min, by_mass(vocab)),
        }[order]
        options: dict[str, Any] = {"top_k": k, "top_p": p, "min_p": m}
        sample = draw(row, 4000, order=order, **options)
        assert set(sample.unique().tolist()) == set(ids[:kept]), (trial, k, p, m)


@pytest.mark.parametrize("vocab", [30, 5000])
def test_banned_and_cut_ids_never_come_out(vocab: int) -> None:
    """Half of the ids are banned by the logits, some at the ends of the vocabulary by the bias."""
    number = 10_000
    row = torch.zeros(vocab)
    row[1::2] = -INF
    bias = torch.zeros(vocab)
    bias[:4] = bias[-4:] = -INF
    for options in ({}, {"top_p": 0.999999}, {"top_k": vocab}, {"min_p": 1.0}, {"temperature": 1e30}):
        token = draw(row, number, bias=bias[None].expand(number, -1), **options)
        assert bool((token % 2 == 0).all())
        assert int(token.min()) >= 4
        assert int(token.max()) < vocab - 4


def test_numbers_at_the_ends_of_the_interval_stay_inside() -> None:
    """Positions whose u is nearest to 0 and 1 among half a million: the first and the last id, never one past."""
    number = 500_000
    u = reference.uniforms(torch.full((number,), 1), torch.arange(number))
    token = draw(torch.zeros(300), number, seed=1)
    assert torch.equal(token, (u * 300).floor().int())
    assert int(token[u.argmin()]) == 0
    assert int(token[u.argmax()]) == 299


def test_uniforms_are_those_of_the_engine() -> None:
    source = random.Random(4)
    keys = [source.getrandbits(64) for _ in range(200)] + [0, (1 << 64) - 1]
    counters = [source.getrandbits(128) for _ in range(200)] + [(1 << 128) - 1, 0]

    def signed(x: int) -> int:
        return x - (1 << 64) if x >> 63 else x

    seed = torch.tensor([signed(k) for k in keys])
    position = torch.tensor([[signed(c & ((1 << 64) - 1)), signed(c >> 64)] for c in counters])
    wanted = torch.from_numpy(sampler.uniforms(keys, counters))
    assert torch.equal(reference.uniforms(seed, position), wanted)
    # The compiled lane: equal logits on 2^20 ids show the first twenty bits of u.
    for name, wide in (("wide", position), ("low", position[:, 0].contiguous())):
        rows = len(keys)
        sample, _ = mix_sample(
            [torch.zeros(1, 1 << 20).expand(rows, -1)], torch.ones(rows, 1), temperature=torch.ones(rows), seed=seed,
            position=wide,
        )  # fmt: skip
        low = torch.from_numpy(sampler.uniforms(keys, [c & ((1 << 64) - 1) for c in counters]))
        assert torch.equal(sample.token, ((wanted if name == "wide" else low) * (1 << 20)).floor().int())


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    """Serial correlation, and chi-square of pairs of neighbouring draws, along positions and along seeds."""
    number, sides = 400_000, 16
    row = torch.zeros(sides)
    along = draw(row, number, seed=11)
    one = torch.ones(number)
    across = mix_sample(
        [row[None].expand(number, -1)], one[:, None], temperature=one, seed=torch.arange(number),
        position=torch.full((number,), 3),
    )[0].token  # fmt: skip
    for token in (along, across):
        x = token.double() - token.double().mean()
        for lag in (1, 2, 7):
            correlation = float((x[:-lag] * x[lag:]).mean() / x.square().mean())
            assert abs(correlation) < 4.5 / math.sqrt(number), lag
        for lag in (1, 3):
            pairs = (token[:-lag] * sides + token[lag:])[:: lag + 1].long()
            counts = torch.bincount(pairs, minlength=sides * sides)
            assert chi_square_p(counts, torch.full((sides * sides,), len(pairs) / sides**2)) > 1e-4


def test_every_part_of_the_counter_counts() -> None:
    """Distinct seeds and positions, high and low words, give distinct numbers."""
    position = torch.tensor([[a, b] for a in (0, 1, 1 << 32, -1) for b in (0, 1, 1 << 32, -1)])
    seeds = torch.tensor([0, 1, 1 << 32, -1])
    u = torch.cat([reference.uniforms(seed.expand(16), position) for seed in seeds])
    assert len(u.unique()) == 64


@pytest.mark.parametrize(("lam", "bound"), [(0.5, 0.005), (1.0, 0.005), (2.0, 0.01), (10.0, 0.08)])
def test_half_precision_logits_cost_this_much(lam: float, bound: float) -> None:
    """Total variation of the mixture from bfloat16 logits against float32 ones; it grows with lambda."""
    g = torch.Generator().manual_seed(0)
    ref = torch.randn(8, 32_000, generator=g) * 2
    aligned = ref + torch.randn(8, 32_000, generator=g) * 0.3
    weights = torch.tensor([[1 - lam, lam]]).repeat(8, 1)

    def share(logits: list[Tensor]) -> Tensor:
        return torch.softmax(reference.mixed_logits(logits, weights, 32_000)[0].double(), dim=1)

    whole = share([ref.double(), aligned.double()])
    rounded = share([ref.bfloat16(), aligned.bfloat16()])
    assert float((whole - rounded).abs().sum(1).max() / 2) < bound
    # float32 arithmetic on the rounded logits adds nothing to it.
    exact = share([ref.bfloat16().double(), aligned.bfloat16().double()])
    assert float((exact - rounded).abs().sum(1).max() / 2) < 1e-5
