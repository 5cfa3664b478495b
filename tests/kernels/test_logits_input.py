"""mix_sample: bad input named before anything runs, given results, registration, random calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rainkernels import DeviceError, DtypeError, RangeError, ShapeError, StrideError, has_native
from rainkernels.ops.logits import MixSample, MixStats, mix_sample, mix_sample_workspace, rank_workspace
from rainkernels.reference import logits as reference
from rainkernels.testing.cases_logits import CASES

pytestmark = pytest.mark.skipif(not has_native(), reason="rainkernels._C is not built")
ROWS, VOCAB = 4, 60
BY_ID = {case.id: case for case in CASES}


@pytest.fixture(params=["cpu", "reference"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


def call(**changes: Any) -> tuple[MixSample, MixStats | None]:
    g = torch.Generator().manual_seed(0)
    arguments: dict[str, Any] = {
        "logits": [torch.randn(ROWS, VOCAB, generator=g), torch.randn(ROWS, VOCAB, generator=g)],
        "weights": torch.tensor([[0.25, 0.75]]).repeat(ROWS, 1),
        "temperature": torch.ones(ROWS),
        "top_k": torch.full((ROWS,), 10, dtype=torch.int32),
        "top_p": torch.full((ROWS,), 0.9),
        "min_p": torch.full((ROWS,), 0.01),
        "plausibility": torch.full((ROWS,), 0.001),
        "bias": torch.zeros(ROWS, VOCAB),
        "seed": torch.arange(ROWS),
        "position": torch.arange(ROWS),
    }
    arguments |= {name: change(arguments[name]) if callable(change) else change for name, change in changes.items()}
    return mix_sample(arguments.pop("logits"), arguments.pop("weights"), **arguments)


def put(value: float) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t[2] = value
        return t

    return change


NAN, INF = float("nan"), float("inf")
VALUES = [
    ("weights", NAN), ("weights", INF), ("temperature", -1e-6), ("temperature", NAN), ("temperature", INF),
    ("top_k", -1), ("top_p", 0.0), ("top_p", 1.0001), ("top_p", NAN), ("min_p", -0.1), ("min_p", 1.5), ("min_p", NAN),
    ("plausibility", -0.1), ("plausibility", 1.1), ("plausibility", NAN),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_bad_values_name_their_row(name: str, value: float, lane: str) -> None:
    call()  # the same signature was seen and is fine
    with pytest.raises(RangeError, match=rf"{name}\[2\] is .*(must be|allowed)"):
        call(**{name: put(value)})


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": lambda h: h[0]}, DtypeError, "logits must be a list"),
    ({"logits": []}, ShapeError, "0 models, allowed are 1..8"),
    ({"logits": lambda h: [h[0]] * 9}, ShapeError, "9 models"),
    ({"logits": lambda h: [h[0], 5]}, DtypeError, r"logits\[1\] must be a torch.Tensor"),
    ({"logits": lambda h: [h[0], h[1].double()]}, DtypeError, r"logits\[1\]"),
    ({"logits": lambda h: [x.double() for x in h]}, DtypeError, r"logits\[0\]"),
    ({"logits": lambda h: [h[0], h[1][:3]]}, ShapeError, r"logits\[1\]"),
    ({"logits": lambda h: [h[0], h[1][0]]}, ShapeError, r"logits\[1\] has rank 1"),
    ({"logits": lambda h: [h[0], h[1].t().contiguous().t()]}, StrideError, r"logits\[1\]"),
    ({"logits": lambda h: [h[0], h[1].to("meta")]}, DeviceError, r"logits\[1\] is on meta"),
    ({"logits": lambda h: [h[0], torch._neg_view(h[1])]}, StrideError, r"logits\[1\] is a lazy"),
    ({"logits": lambda h: [x[:, :0] for x in h], "bias": None}, RangeError, "vocab_size is 0"),
    ({"weights": lambda t: t.double()}, DtypeError, "weights"),
    ({"weights": lambda t: t[:, :1]}, ShapeError, "weights"),
    ({"weights": lambda t: t.t().contiguous().t()}, StrideError, "weights"),
    ({"temperature": None}, DtypeError, "temperature"),
    ({"temperature": 1.0}, DtypeError, "temperature"),
    ({"temperature": lambda t: t[:1].expand(ROWS)}, StrideError, "temperature"),
    ({"top_k": lambda t: t.long()}, DtypeError, "top_k"),
    ({"top_p": lambda t: t[:3]}, ShapeError, "top_p"),
    ({"min_p": lambda t: t.half()}, DtypeError, "min_p"),
    ({"plausibility": lambda t: t[:, None]}, ShapeError, "plausibility has rank 2"),
    ({"plausibility_model": 2}, RangeError, "allowed: 0..1"),
    ({"plausibility_model": -1}, RangeError, "allowed: 0..1"),
    ({"plausibility_model": 1.0}, DtypeError, "plausibility_model must be a Python int"),
    ({"seed": lambda t: t.int()}, DtypeError, "seed"),
    ({"position": lambda t: t.float()}, DtypeError, "position"),
    ({"position": lambda t: t[:, None]}, ShapeError, r"position has shape \[4, 1\]"),
    ({"position": lambda t: torch.stack((t, t)).t()}, StrideError, "position"),
    ({"bias": lambda t: t[:, :50]}, ShapeError, "bias"),
    ({"bias": lambda t: t.bfloat16()}, DtypeError, "bias"),
    ({"bias": lambda t: t.t().contiguous().t()}, StrideError, "bias"),
    ({"order": "p_k_min"}, RangeError, "'joint'"),
    ({"vocab_size": VOCAB + 1}, RangeError, "allowed: 1..60"),
    ({"vocab_size": 0}, RangeError, "vocab_size is 0"),
    ({"vocab_size": float(VOCAB)}, DtypeError, "vocab_size must be a Python int"),
    ({"out": (torch.zeros(ROWS),) * 3}, DtypeError, "out must be a MixSample"),
    ({"out": MixSample(torch.zeros(ROWS), torch.zeros(ROWS), torch.zeros(ROWS))}, DtypeError, "out.token"),
    ({"out": MixSample(torch.zeros(ROWS).int(), torch.zeros(3), torch.zeros(ROWS))}, ShapeError, "out.prob"),
    ({"out_stats": MixStats(*(torch.zeros(ROWS),) * 7), "stats": True}, ShapeError, "out_stats.logprob_models"),
    ({"out_stats": MixStats(*(torch.zeros(ROWS),) * 7)}, DtypeError, "out_stats is given but stats"),
    ({"workspace": torch.zeros(8).half()}, DtypeError, "workspace"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "says"), WRONG)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], says: str, lane: str) -> None:
    call()
    with pytest.raises(error, match=says):
        call(**changes)


@pytest.mark.parametrize("stats", [False, True])
def test_writes_into_what_is_given(stats: bool, lane: str) -> None:
    inputs = BY_ID["three-models"].make(torch.bfloat16)
    fresh, fresh_stats = mix_sample(inputs.logits, inputs.weights, stats=stats, **inputs.options)
    out = MixSample(*(torch.empty_like(t) for t in fresh))
    out_stats = None if fresh_stats is None else MixStats(*(torch.empty_like(t) for t in fresh_stats))
    space = torch.empty(mix_sample_workspace(6, 3, 1000, "cpu"))
    back, back_stats = mix_sample(
        inputs.logits, inputs.weights, stats=stats, out=out, out_stats=out_stats, workspace=space, **inputs.options
    )  # fmt: skip
    for results, into, wanted in ((back, out, fresh), (back_stats, out_stats, fresh_stats)):
        for a, b, c in zip(results or (), into or (), wanted or (), strict=True):
            assert a.data_ptr() == b.data_ptr()
            assert torch.equal(a, c)


def test_statistics_nobody_asked_for_are_refused_after_a_good_call_too(lane: str) -> None:
    inputs = BY_ID["three-models"].make(torch.float32)
    _, into = mix_sample(inputs.logits, inputs.weights, stats=True, **inputs.options)
    mix_sample(inputs.logits, inputs.weights, stats=True, out_stats=into, **inputs.options)
    with pytest.raises(DtypeError, match="out_stats"):
        mix_sample(inputs.logits, inputs.weights, out_stats=into, **inputs.options)


@pytest.mark.parametrize(
    ("sizes", "error", "name"),
    [
        (("a", 2, 100), DtypeError, "batch"), ((-1, 2, 100), RangeError, "batch"), ((4, 99, 100), RangeError, "num_models"),
        ((4, 0, 100), RangeError, "num_models"), ((4, 2.0, 100), DtypeError, "num_models"),
        ((4, 2, 0), RangeError, "vocab_size"), ((4, 2, True), DtypeError, "vocab_size"),
    ],
)  # fmt: skip
def test_bad_workspace_sizes_are_named(
    sizes: tuple[Any, Any, Any], error: type[Exception], name: str, lane: str
) -> None:
    with pytest.raises(error, match=name):
        mix_sample_workspace(*sizes, "cpu")
    if name != "num_models":
        with pytest.raises(error, match=name):
            rank_workspace(sizes[0], sizes[2], "cpu")


def test_logits_and_bias_may_overlap_and_repeat(lane: str) -> None:
    """One tensor as both models, rows with stride 0, and a tuple of models."""
    row = torch.randn(1, VOCAB).expand(ROWS, -1)
    same, _ = call(
        logits=(row, row), bias=torch.zeros(1, VOCAB).expand(ROWS, -1), seed=torch.zeros(ROWS, dtype=torch.int64)
    )
    dense, _ = call(logits=[row.contiguous(), row.contiguous()], seed=torch.zeros(ROWS, dtype=torch.int64))
    assert torch.equal(same.token, dense.token)


def test_inputs_are_not_written(lane: str) -> None:
    inputs = BY_ID["plausibility"].make(torch.float32)
    before = [h.clone() for h in inputs.logits]
    mix_sample(inputs.logits, inputs.weights, stats=True, **inputs.options)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs.logits, strict=True))


@pytest.mark.parametrize("name", ["tiles", "bias", "plausibility", "wide-position", "eight-models"])
def test_registered_op(name: str) -> None:
    inputs = BY_ID[name].make(torch.bfloat16)
    op = torch.ops.rainkernels.mix_sample
    for stats in (False, True):
        arguments = {"logits": inputs.logits, "weights": inputs.weights, "stats": stats, **inputs.options}
        positional = [arguments.pop(n) for n in ("logits", "weights", "temperature", "seed", "position")]
        torch.library.opcheck(op.default, tuple(positional), arguments)
        with torch.inference_mode():
            results = op(*positional, **arguments)
        sample, measured = mix_sample(inputs.logits, inputs.weights, stats=stats, **inputs.options)
        assert len(results) == 10
        for a, b in zip(results, (*sample, *(measured or ())), strict=False):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        assert stats or all(t.numel() == 0 for t in results[3:])


SPECIAL = st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF, -INF, NAN, 1e4, -1e4, 3e38, -3e38, 1e-40, 88.0])
VALUE = st.one_of(st.floats(-20, 20, width=32), st.floats(-20, 20, width=32), st.sampled_from([0.0, 1.0, 2.0]), SPECIAL)
WEIGHT = st.one_of(st.floats(-4, 4, width=32), st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, 3e38]))


@st.composite
def random_calls(draw: st.DrawFn) -> dict[str, Any]:
    rows, models = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    vocab = draw(st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 257, 1023, 1024, 1025, 2050])))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    # A few values, repeated: ties, and all of them special now and then.
    palette = torch.tensor(draw(st.lists(VALUE, min_size=1, max_size=24)), dtype=torch.float32)
    g = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))

    def table() -> Tensor:
        return palette[torch.randint(0, len(palette), (rows, vocab), generator=g)]

    def column(values: st.SearchStrategy[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor([draw(values) for _ in range(rows)], dtype=dtype)

    def maybe(values: st.SearchStrategy[Any], dtype: torch.dtype = torch.float32) -> Tensor | None:
        return column(values, dtype) if draw(st.booleans()) else None

    share = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 1.0, 1e-30]))
    whole = st.integers(-(1 << 63), (1 << 63) - 1)
    return {
        "logits": [table().to(dtype) for _ in range(models)],
        "weights": torch.tensor([[draw(WEIGHT) for _ in range(models)] for _ in range(rows)], dtype=torch.float32),
        "temperature": column(st.one_of(st.floats(0, 4, width=32), st.sampled_from([0.0, 1.0, 1e-38, 1e38])), torch.float32),
        "top_k": maybe(st.one_of(st.integers(0, vocab + 2), st.just((1 << 31) - 1)), torch.int32),
        "top_p": maybe(st.one_of(st.floats(2**-10, 1, width=32), st.sampled_from([1e-30, 1.0]))),
        "min_p": maybe(share),
        "plausibility": maybe(share),
        "plausibility_model": draw(st.integers(0, models - 1)),
        "bias": table() if draw(st.booleans()) else None,
        "order": draw(st.sampled_from(["k_p_min", "min_k_p", "joint"])),
        "seed": column(whole, torch.int64),
        "position": column(whole, torch.int64),
    }  # fmt: skip


def check_random_call(arguments: dict[str, Any]) -> None:
    """A token the float64 filters keep on the float32 mixture, or an invalid row where the definition says so."""
    logits, weights = arguments.pop("logits"), arguments.pop("weights")
    vocab = logits[0].shape[1]
    sample, stats = mix_sample(logits, weights, stats=True, **arguments)
    again, nothing = mix_sample(logits, weights, **arguments)
    assert nothing is None
    assert torch.equal(sample.token, again.token)
    z, valid = reference.mixed_logits(logits, weights, vocab)
    o = {n: v for n, v in arguments.items() if n not in ("seed", "position", "plausibility_model")}
    judge = logits[arguments["plausibility_model"]]
    mass, usable = reference.distribution(z, plausible=judge, **o)
    valid &= usable
    assert torch.equal(sample.token >= 0, valid), (sample.token, valid)
    assert stats is not None
    for t in (sample.prob, sample.logprob, stats.lse_mix, stats.entropy, stats.log_z):
        assert bool(t[~valid].isnan().all())
    assert bool(torch.isfinite(sample.prob[valid]).all())
    token = sample.token[valid].long()[:, None]
    # A boundary of a filter may fall on either side; an id with no mass under looser filters may never come out.
    looser = {n: None if v is None else (v.double() + 1e-5).clamp(max=1) for n, v in o.items() if n == "top_p"}
    looser |= {n: None if v is None else v.double() * (1 - 1e-5) for n, v in o.items() if n == "min_p"}
    # Scores are float32 sums: a bias may make two of them equal that are not in float64.
    scores = z if o["bias"] is None else z + o["bias"]
    loose, _ = reference.distribution(scores.double(), plausible=judge.double(), **(o | looser | {"bias": None}))
    assert bool((loose[valid].gather(1, token) > 0).all())
    share = (mass[valid].gather(1, token).double() / mass[valid].double().sum(1, keepdim=True))[:, 0]
    kept = share > 0
    off = (sample.prob[valid].double() - share).abs()[kept]
    assert bool((off <= 2e-3).all()), (sample.prob, share)


@given(random_calls())
@settings(
    max_examples=200, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)  # fmt: skip
def test_random_calls(arguments: dict[str, Any]) -> None:
    check_random_call(arguments)


@pytest.mark.slow
@given(random_calls())
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
def test_many_random_calls(arguments: dict[str, Any]) -> None:
    check_random_call(arguments)
