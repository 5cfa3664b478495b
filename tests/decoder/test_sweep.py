"""λ sweeps: against the same answers given one by one, on random models; what is measured, and how a λ is chosen."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from cli_models import save_llama

from raindecode import RAIN, Decoder, DeRa, JudgeTemplate, Policy, Sampling
from raindecode.errors import ConfigError, EvaluatorError, PromptError
from raindecode.sweep import Mean, Sweep, SweepPoint, SweepResult, effective_share
from raindecode.types import Completion, Request

PROMPTS = ["Once upon", "A dog", "Rain falls on"]
JUDGE = JudgeTemplate(
    "Judge.\n", "Q: {prompt}\nA:", "", None
)  # asked at once: the verdict hangs on the reply's last byte
STEPS = 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [str(save_llama(tmp_path_factory.mktemp("llama"), seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def pair(folders: list[str]) -> Decoder:
    """A reference and an aligned model, both random."""
    return Decoder.from_pretrained(folders[0], aligned=folders[1], kv_tokens=8192)


def share_of_e(pairs: Sequence[tuple[str, str]]) -> list[float]:
    return [2 * reply.count("e") / max(1, len(reply)) - 1 for _, reply in pairs]


def one_by_one(decoder: Decoder, dera: DeRa, samples: int, **options: Any) -> list[Completion]:
    """The answers a sweep should have, prompt by prompt."""
    found: list[Completion] = []
    for i, prompt in enumerate(PROMPTS):
        for k in range(samples):
            found += decoder.generate(
                prompt, policy=Policy(dera=dera), max_new_tokens=STEPS, seed=7 + i * samples + k, **options
            )
    return found


def test_points_are_the_answers_given_one_by_one(pair: Decoder) -> None:
    lambdas = [1.5, 0, DeRa.target_kl(0.002), 1]
    result = pair.sweep(PROMPTS, lambdas, num_samples=2, max_new_tokens=STEPS, seed=7, evaluator=share_of_e)
    assert [point.label for point in result.points] == ["1.5", "0", "KL 0.002", "1"]
    for given, point in zip(lambdas, result.points, strict=True):
        expected = one_by_one(pair, given if isinstance(given, DeRa) else DeRa(given, stats=True), 2)
        assert [a.token_ids for a in point.answers] == [e.token_ids for e in expected]
        kls = [e.mixture.kl_reference for e in expected if e.mixture is not None]
        assert [a.mixture.kl_reference for a in point.answers if a.mixture] == pytest.approx(kls, rel=1e-5, abs=1e-9)
        assert point.kl.mean == pytest.approx(fmean(kls), rel=1e-5, abs=1e-9)
        assert point.tokens == fmean(len(e.token_ids) for e in expected)
        assert point.kl_per_token == pytest.approx(math.fsum(kls) / sum(len(e.token_ids) for e in expected), abs=1e-9)
        scores = share_of_e([(e.prompt, e.text) for e in expected])
        assert [a.value for a in point.answers] == scores
        assert point.reward is not None
        assert point.reward.mean == pytest.approx(fmean(scores))
        logs = [e.mixture.log_weight for e in expected if e.mixture is not None]
        shares = [effective_share([logs[i] or 0.0, logs[i + 1] or 0.0]) for i in (0, 2, 4)]
        assert point.ess == pytest.approx(fmean(shares), abs=1e-6)
        assert (point.n, len(point.answers)) == (6, 6)
    stronger, reference, aimed, _ = result.points
    assert reference.kl.mean == pytest.approx(0, abs=1e-9)
    assert reference.ess == pytest.approx(1)
    assert stronger.kl.mean > 0
    assert aimed.mean_weight is not None
    assert 0 < aimed.mean_weight < 2
    assert (aimed.weights, aimed.target_kl, stronger.mean_weight) == (None, 0.002, None)
    assert aimed.kl_per_token == pytest.approx(0.002, rel=0.01)


def test_a_sweep_needs_fewer_forwards_than_its_points(pair: Decoder) -> None:
    lambdas = [0.25, 0.5, 0.75]
    pair.engine.tree.clear()
    together = pair.sweep(PROMPTS, lambdas, max_new_tokens=STEPS, evaluator=JUDGE).model_steps
    alone = 0
    for weight in lambdas:
        pair.engine.tree.clear()
        alone += pair.sweep(PROMPTS, [weight], max_new_tokens=STEPS, evaluator=JUDGE).model_steps
    assert together <= alone / 2


def test_prompts_are_read_once_for_all_weights(pair: Decoder) -> None:
    prompt = "A long prompt that is worth caching. " * 8
    pair.engine.tree.clear()
    result = pair.sweep(prompt, [0.2, 0.4, 0.6, 0.8], max_new_tokens=1)
    rows = [point.answers[0].stats.tokens_charged for point in result.points]
    assert sum(rows) < 2 * len(prompt) + 10  # each of the two models reads it once, not four times


def test_the_reference_judges_whatever_the_mixture(pair: Decoder, folders: list[str]) -> None:
    result = pair.sweep(PROMPTS, [0, 1], num_samples=3, max_new_tokens=STEPS, evaluator=JUDGE)
    stock = AutoModelForCausalLM.from_pretrained(folders[0])
    letters = [pair.codec.encode(letter)[0] for letter in "AB"]
    seen = set()
    for answer in (answer for point in result.points for answer in point.answers):
        (text,) = JUDGE.prompts(answer.prompt, answer.text)
        with torch.inference_mode():
            good, bad = stock(torch.tensor([pair.codec.encode(text)])).logits[0, -1, letters]
        assert answer.value == (1 if good > bad else -1)
        assert answer.stats.evaluations == 1
        seen.add(answer.value)
    assert len(seen) > 1


def test_several_aligned_models(folders: list[str]) -> None:
    decoder = Decoder.from_pretrained(folders[0], aligned=folders[1:], kv_tokens=4096)
    result = decoder.sweep("Hi", [(0.5, 0.25), (0, 0), DeRa([1, 1])], max_new_tokens=4)
    assert [point.label for point in result.points] == ["0.5, 0.25", "0, 0", "1, 1"]
    assert [point.weights for point in result.points] == [(0.5, 0.25), (0.0, 0.0), (1.0, 1.0)]
    assert all(point.reward is None and point.ess is None for point in result.points)
    weakest = result.choose(kl=1e-6)
    assert weakest is not None
    assert weakest.label == "0, 0"


def test_greedy_answers_have_no_importance_weights(pair: Decoder) -> None:
    (point,) = pair.sweep("Hi", [0.5], search=Sampling.greedy(), max_new_tokens=4).points
    assert point.ess is None
    assert point.kl.interval is None
    assert point.answers[0].mixture is not None
    assert point.answers[0].mixture.log_weight is None


@pytest.mark.parametrize(
    ("lambdas", "options", "said"),
    [
        ([], {}, "lambdas is empty"),
        (0.5, {}, "give a list of weights"),
        ("0,1", {}, "give a list of weights"),
        ([0.5, 1, 0.5], {}, "holds 0.5 twice"),
        ([DeRa(0.5), 0.5], {}, "holds 0.5 twice"),
        ([float("nan")], {}, "the DeRa weight is nan"),
        ([0.5, -1], {}, "allow_negative=True"),
        ([[0.5, 0.5]], {}, "2 DeRa weights were given for 1 aligned models"),
        ([1], {"search": RAIN.preset("hh")}, "the answers of RAIN, which are searched for, are not measured"),
        ([1], {"num_samples": 0}, "num_samples is 0"),
        ([1], {"num_samples": 2, "search": Sampling.greedy()}, "all samples would be alike"),
        ([1], {"evaluator": 3}, "evaluator is a int"),
        ([1], {"policy": Policy(dera=DeRa(1))}, "leave dera out"),
        ([1], {"policy": [Policy(dera=DeRa(0.7))]}, "the policy of a sweep is a list; give one Policy"),
        ([1], {"seed": [1]}, "seed is [1]; allowed: a whole number"),
        ([1], {"errors": "ignore"}, "allowed: 'raise' and 'return'"),
        ([1], {"seed": -1}, "seed is -1; allowed: a whole number"),
        ([1], {"seed": 2**64 - 1, "num_samples": 2}, "allowed: seeds to 2"),
    ],
)
def test_refused_before_anything_runs(pair: Decoder, lambdas: Any, options: dict[str, Any], said: str) -> None:
    steps = pair.engine.model_steps
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        pair.sweep("Hi", lambdas, **options)
    assert pair.engine.model_steps == steps


def test_errors_of_prompts_and_evaluators(pair: Decoder, folders: list[str]) -> None:
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        pair.sweep(["Hi", " "], [1])
    with pytest.raises(PromptError, match="there is no prompt"):
        pair.sweep([], [1])
    with pytest.raises(EvaluatorError, match="an evaluator of mine"):
        pair.sweep("Hi", [0, 1], evaluator=broken, max_new_tokens=2)
    with pytest.raises(ConfigError, match="one model only"):
        Decoder.from_pretrained(folders[0], kv_tokens=64).sweep("Hi", [1])


def broken(pairs: Sequence[tuple[str, str]]) -> list[float]:
    raise ValueError("an evaluator of mine")


def failing_on(texts: set[str]) -> Any:
    """share_of_e, except that answers with these texts cannot be scored."""

    def scores(pairs: Sequence[tuple[str, str]]) -> list[float]:
        if any(text in texts for _, text in pairs):
            raise ValueError("no score for this")
        return share_of_e(pairs)

    return scores


def test_answers_that_fail_are_left_out(pair: Decoder) -> None:
    options: dict[str, Any] = {"num_samples": 2, "max_new_tokens": STEPS, "seed": 7}
    whole = pair.sweep(PROMPTS, [0, 1.5], evaluator=share_of_e, **options)
    good, answers = whole.points[0], whole.points[1].answers
    lost = {answers[i].text for i in (0, 2, 3)}  # a sample of the first prompt, both of the second
    assert not lost & {answer.text for answer in (*good.answers, answers[1], *answers[4:])}
    with pytest.raises(EvaluatorError, match="no score for this"):
        pair.sweep(PROMPTS, [0, 1.5], evaluator=failing_on(lost), **options)
    result = pair.sweep(PROMPTS, [0, 1.5], evaluator=failing_on(lost), errors="return", **options)
    assert len(result.errors) == 3
    assert all(isinstance(error, EvaluatorError) for error in result.errors)
    untouched, point = result.points
    assert (untouched.n, untouched.failed, untouched.kl, untouched.reward) == (6, 0, good.kl, good.reward)
    assert (point.n, point.failed) == (3, 3)
    assert [answer.text for answer in point.answers] == [answers[i].text for i in (1, 4, 5)]
    kls = [answer.mixture.kl_reference for answer in answers if answer.mixture is not None]
    assert point.kl is not None
    assert point.kl.mean == pytest.approx((kls[1] + (kls[4] + kls[5]) / 2) / 2, rel=1e-5)
    assert point.reward is not None
    values = [answer.value or 0.0 for answer in answers]
    assert point.reward.mean == pytest.approx((values[1] + (values[4] + values[5]) / 2) / 2)
    logs = [answer.mixture.log_weight or 0.0 for answer in answers if answer.mixture is not None]
    assert point.ess == pytest.approx(effective_share(logs[4:]), abs=1e-6)
    data = result.to_json()["points"][1]
    assert (data["n"], data["failed"], len(data["answers"])) == (3, 3, 3)


def test_one_prompt_that_is_left_is_one_case(pair: Decoder) -> None:
    whole = pair.sweep(PROMPTS, [1.5], num_samples=2, max_new_tokens=STEPS, seed=7)
    lost = {answer.text for answer in whole.points[0].answers[2:]}
    result = pair.sweep(
        PROMPTS, [1.5], num_samples=2, max_new_tokens=STEPS, seed=7, evaluator=failing_on(lost), errors="return"
    )
    (point,) = result.points
    assert point.n == 2
    assert point.kl is not None
    assert point.kl.interval is None


def test_a_weight_without_answers_breaks_nothing(pair: Decoder, tmp_path: Path) -> None:
    lambdas = [0, DeRa.target_kl(0.002), 1.5]
    whole = pair.sweep("Hi", lambdas, max_new_tokens=STEPS, num_samples=2)
    lost = {answer.text for point in whole.points[1:] for answer in point.answers}
    result = pair.sweep("Hi", lambdas, max_new_tokens=STEPS, num_samples=2, evaluator=failing_on(lost), errors="return")
    assert [(point.n, point.failed) for point in result.points] == [(2, 0), (0, 2), (0, 2)]
    for point in result.points[1:]:
        assert (point.reward, point.kl, point.kl_per_token, point.tokens, point.mean_weight, point.ess) == (None,) * 6
        assert point.answers == []
    chosen = [result.choose(kl=100), result.choose(reward=-1), result.choose(kl=100, reward=-1)]
    assert [one.label if one else None for one in chosen] == ["0", "0", "0"]
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))["points"]
    assert [(p["kl"] is None, p["reward"] is None, p["kl_per_token"] is None) for p in data] == [(False,) * 3] + [
        (True,) * 3
    ] * 2
    pytest.importorskip("matplotlib")
    for points in (result.points, result.points[1:], [whole.points[0], result.points[2]]):
        path = tmp_path / "sweep.svg"
        SweepResult(points).save_plot(path)
        assert "KL from the reference" in path.read_text()
    assert SweepResult(result.points[1:]).choose(kl=100) is None


def test_negative_weights_and_plausibility_are_points_like_others(pair: Decoder) -> None:
    lambdas = [DeRa(-0.5, allow_negative=True), 2, DeRa(2, plausibility=0.1)]
    result = pair.sweep("Hi", lambdas, max_new_tokens=3)
    assert [point.label for point in result.points] == ["-0.5", "2", "2, plausibility 0.1"]


def test_prompt_major_order_and_seeds() -> None:
    plan = Sweep([0, 1], num_models=2, num_samples=2)
    mixes = [policy.dera.mix(2) for policy in plan.policies(Policy()) if policy.dera is not None]
    given = [[Request(p, p, [1], 5, 0, mix=mix) for p in "ab"] for mix in mixes]
    found = [(r.prompt, r.seed, r.mix.weights, r.mix.stats) for r in plan.requests(given, 5)]
    assert found == [
        (p, 5 + 2 * i + k, weights, True)
        for i, p in enumerate("ab")
        for k in range(2)
        for weights in ((1.0, 0.0), (0.0, 1.0))
    ]


# ---- numbers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("n", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042), (10001, 1.960)]
)
def test_interval_of_a_mean_is_students(n: int, quantile: float) -> None:
    rng = random.Random(n)
    values = [rng.gauss(0, 1) for _ in range(n)]
    mean = sum(values) / n
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    for groups in ([[v] for v in values], [values]):  # prompts, or samples of the one prompt
        found = Mean.of(groups)
        assert found.mean == pytest.approx(mean)
        assert found.interval == pytest.approx((mean - quantile * error, mean + quantile * error), rel=0.01)


def test_samples_of_a_prompt_are_no_cases_of_their_own() -> None:
    assert Mean.of([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]) == Mean.of([[0.0], [1.0]])
    assert Mean.of([[0.25]]).interval is None
    assert Mean.of([[-1.0], [1.0]], -1.0, 1.0).interval == (-1.0, 1.0)


def test_effective_share() -> None:
    assert effective_share([-700.0] * 4) == pytest.approx(1)
    assert effective_share([0.0, -1000.0, -1000.0, -1000.0]) == pytest.approx(0.25)
    assert effective_share([0.0, math.log(3)]) == pytest.approx(16 / 20)


def point(
    weights: tuple[float, ...] | None, kl: float, reward: float | None, target: float | None = None
) -> SweepPoint:
    label = f"{target or weights}"
    score = None if reward is None else Mean(reward, None)
    return SweepPoint(label, weights, target, 1, score, Mean(kl, (kl - 0.1, kl + 0.1)), kl, 1.0, None, None, [])


def test_choosing() -> None:
    result = SweepResult(
        [point((w,), kl, reward) for w, kl, reward in [(1, 3, 0.6), (0, 0, 0.1), (2, 9, 0.4), (0.5, 1, 0.5)]]
    )

    def chosen(**targets: float) -> float | None:
        found = result.choose(**targets)
        return None if found is None or found.weights is None else found.weights[0]

    assert chosen(kl=3) == 1
    assert chosen(kl=2.9) == 0.5
    assert chosen(kl=100) == 2
    assert chosen(kl=-1) is None
    assert chosen(reward=0.4) == 0.5
    assert chosen(reward=0.7) is None
    assert chosen(kl=3, reward=0.4) == 0.5
    assert chosen(kl=3, reward=0.55) == 1
    assert chosen(kl=0.5, reward=0.5) is None
    with pytest.raises(ConfigError, match="nothing to choose by"):
        result.choose()
    with pytest.raises(ConfigError, match="kl is nan"):
        result.choose(kl=math.nan)
    with pytest.raises(ConfigError, match="without an evaluator"):
        SweepResult([point((1.0,), 1, None)]).choose(reward=0)


def test_choosing_among_targets_goes_by_measured_divergence() -> None:
    aimed = SweepResult([point(None, 2, 0.1, 0.2), point(None, 1, 0.2, 0.1)])
    best = aimed.choose(kl=5)
    assert best is not None
    assert best.target_kl == 0.2


def test_json_is_plain(pair: Decoder) -> None:
    result = pair.sweep("Hi", [0.5, DeRa.target_kl(0.01)], num_samples=2, max_new_tokens=3, evaluator=share_of_e)
    data = json.loads(json.dumps(result.to_json()))
    first, aimed = data["points"]
    assert (first["label"], first["weights"], first["target_kl"], first["n"]) == ("0.5", [0.5], None, 2)
    assert (aimed["weights"], aimed["target_kl"]) == (None, 0.01)
    assert first["reward"]["mean"] == pytest.approx(fmean(answer["score"] for answer in first["answers"]))
    assert first["kl"]["mean"] == pytest.approx(fmean(answer["kl"] for answer in first["answers"]))
    assert {"prompt", "text", "seed", "finish_reason", "tokens", "log_weight"} <= first["answers"][0].keys()
    assert "answers" not in result.to_json(answers=False)["points"][0]


# ---- the figure -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_plots(tmp_path: Path, suffix: str, begins: bytes) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = (
        dict.__getitem__(matplotlib.rcParams, "backend"),
        "matplotlib.pyplot" in sys.modules,
    )  # get_backend() sets one
    path = tmp_path / f"sweep{suffix}"
    SweepResult([point((1,), 3, 0.5), point((0,), 0, 0.1)]).save_plot(path)
    assert path.read_bytes().startswith(begins)
    assert (dict.__getitem__(matplotlib.rcParams, "backend"), "matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([point((1,), 3, 0.5)], ["weight λ of the aligned model", "reward", "nats per answer"]),
        ([point(None, 3, 0.5, 0.1)], ["target KL (nats per token)", "reward"]),
        ([point((1, 2), 3, 0.5)], ["weights λ of the aligned models", "(1, 2)"]),
        ([point((1,), 3, 0.5), point(None, 3, 0.5, 0.1)], ["weight λ, or target KL (nats per token)", "0.1"]),
        ([point((1,), 3, None)], ["KL from the reference"]),
    ],
)
def test_plots_name_what_they_show(tmp_path: Path, points: list[SweepPoint], said: list[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "sweep.svg"
    SweepResult(points).save_plot(path)
    text = path.read_text()  # letters are drawn as shapes, with the text beside them in comments
    assert all(f"<!-- {part}" in text or part in text for part in said)
    assert ("reward" in text) == (points[0].reward is not None)


def test_plots_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = SweepResult([point((1,), 3, 0.5)])
    with pytest.raises(ConfigError, match=r"ends in \.png, \.svg, \.pdf"):
        result.save_plot(tmp_path / "sweep.jpg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'rainkernels\[bench\]'"):
        result.save_plot(tmp_path / "sweep.png")
