"""λ sweep: the same prompts under several mixtures, with reward and divergence measured, so that a weight can be chosen.

Source: Liu et al., Decoding-time Realignment of Language Models, ICML 2024, which chooses the strength this way (section 4).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeAlias

from raindecode.errors import ConfigError
from raindecode.mixture import Mix
from raindecode.policy.dera import DeRa
from raindecode.policy.policy import Policy
from raindecode.search.evaluator import Evaluator, JudgeTemplate, ScoreFunction, as_evaluator
from raindecode.search.sampling import Sampling
from raindecode.search.scored import Scored
from raindecode.settings import require_finite, require_whole
from raindecode.sweep_figure import save_figure
from raindecode.types import Completion, Request

Lambda: TypeAlias = "float | Sequence[float] | DeRa"


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval; the interval is None when there is one case only."""

    mean: float
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, groups: Sequence[Sequence[float]], least: float = -math.inf, most: float = math.inf) -> Mean:
        """Of values that lie in [least, most], those of each prompt in a group of their own, none of them empty.

        Student's t over the means of the prompts, because answers to one prompt are not independent cases of all prompts;
        with one prompt, over its answers.
        """
        cases = list(groups[0]) if len(groups) == 1 else [fmean(group) for group in groups]
        mean = fmean(cases)
        if len(cases) < 2:
            return cls(mean, None)
        half = _student95(len(cases) - 1) * stdev(cases) / math.sqrt(len(cases))
        return cls(mean, (max(least, mean - half), min(most, mean + half)))

    def to_json(self) -> dict[str, Any]:
        """Plain data; the interval is [low, high] or null."""
        return {"mean": self.mean, "interval": None if self.interval is None else list(self.interval)}


@dataclass(frozen=True)
class SweepPoint:
    """What one mixture did. Divergences are in nats, of the mixture before temperature and filters.

    Answers that failed are left out of everything but `failed`. Without any answer, `n` is 0 and every mean None.

    Attributes:
        label: the weights as text, or the target.
        weights: λ of each aligned model; None where a KL is aimed at.
        target_kl: the KL aimed at, per token; None where the weights are given.
        n: answers that were given.
        reward: score of an answer, in [-1, 1]; None without evaluator.
        kl: sum over the tokens of an answer of KL(mixture || reference): an estimate of the divergence between sequences.
        kl_per_token: the same per token, all answers together.
        tokens: per answer.
        mean_weight: mean λ over all tokens where a KL is aimed at; else None.
        ess: effective sample size as a share of the samples, in (0, 1], of the weights exp(log_weight) that turn samples into
            such of the mixture of whole sequences; mean over the prompts. 1: drawing token by token changed nothing that shows.
            None with one sample per prompt or greedy; prompts that fewer than two answers are left of do not count.
        answers: prompt by prompt, the samples of a prompt together; `value` is the score.
        failed: answers that failed.
    """

    label: str
    weights: tuple[float, ...] | None
    target_kl: float | None
    n: int
    reward: Mean | None
    kl: Mean | None
    kl_per_token: float | None
    tokens: float | None
    mean_weight: float | None
    ess: float | None
    answers: list[Completion]
    failed: int = 0

    def to_json(self, *, answers: bool = True) -> dict[str, Any]:
        """Plain data, the answers (without what was measured at single tokens) included unless that is turned off."""
        data: dict[str, Any] = {
            "label": self.label,
            "weights": None if self.weights is None else list(self.weights),
            "target_kl": self.target_kl,
            "n": self.n,
            "failed": self.failed,
            "reward": None if self.reward is None else self.reward.to_json(),
            "kl": None if self.kl is None else self.kl.to_json(),
            "kl_per_token": self.kl_per_token,
            "tokens_per_answer": self.tokens,
            "mean_weight": self.mean_weight,
            "ess": self.ess,
        }
        return {**data, "answers": [_answer_json(answer) for answer in self.answers]} if answers else data


@dataclass(frozen=True)
class SweepResult:
    """A sweep's points in the order of its λ.

    Attributes:
        model_steps: batched forwards of the whole sweep.
        seconds: wall time.
        errors: why answers failed, prompt by prompt.
    """

    points: list[SweepPoint]
    model_steps: int = 0
    seconds: float = 0.0
    errors: tuple[BaseException, ...] = ()

    def choose(self, *, kl: float | None = None, reward: float | None = None) -> SweepPoint | None:
        """The λ that meets a target on average, None if none does.

        Args:
            kl: at most this many nats per answer: the largest such λ.
            reward: at least this mean score: the smallest such λ. With both, the smallest that meets both.

        "Largest" goes by measured KL where λ is not one number (several aligned models, KL targets). A λ without answers meets
        no target.

        Raises:
            ConfigError: no target is given, or a reward without an evaluator.
        """
        if kl is None and reward is None:
            raise ConfigError("nothing to choose by: give a largest KL, a smallest reward, or both")
        answered = [point for point in self.points if point.kl is not None]
        fitting = sorted(answered, key=self._strength)
        if kl is not None:
            require_finite("kl", kl)
            fitting = [point for point in fitting if point.kl is not None and point.kl.mean <= kl]
        if reward is not None:
            require_finite("reward", reward)
            if any(point.reward is None for point in answered):
                raise ConfigError("a reward cannot be chosen by: this sweep ran without an evaluator")
            fitting = [point for point in fitting if point.reward is not None and point.reward.mean >= reward]
        if not fitting:
            return None
        return fitting[-1] if reward is None else fitting[0]

    def to_json(self, *, answers: bool = True) -> dict[str, Any]:
        """Plain data for json.dumps."""
        points = [point.to_json(answers=answers) for point in self.points]
        return {"points": points, "model_steps": self.model_steps, "seconds": round(self.seconds, 3)}

    def save_plot(self, path: str | Path) -> None:
        """Draw reward (where there is one) and KL against λ into a .png, .svg or .pdf file; a λ without answers is a gap.

        Raises:
            ConfigError: another suffix, or matplotlib is not installed.
            OSError: the file cannot be written.
        """
        gap = Mean(math.nan, None)
        panels = {"KL from the reference (nats per answer)": [p.kl or gap for p in self.points]}
        if any(p.reward is not None for p in self.points):
            panels = {"reward (mean score, −1 to 1)": [p.reward or gap for p in self.points], **panels}
        at, name = self._axis()
        drawn = [(title, [(one.mean, one.interval) for one in means]) for title, means in panels.items()]
        save_figure(path, at, [point.label for point in self.points], name, drawn)

    def _axis(self) -> tuple[list[float] | None, str]:
        """Where the points stand and what that is; None where they are no numbers of one kind."""
        weights = [p.weights[0] for p in self.points if p.weights is not None and len(p.weights) == 1]
        if len(weights) == len(self.points):
            return weights, "weight λ of the aligned model"
        targets = [p.target_kl for p in self.points if p.target_kl is not None]
        if len(targets) == len(self.points):
            return targets, "target KL (nats per token)"
        return None, "weights λ of the aligned models" if not targets else "weight λ, or target KL (nats per token)"

    def _strength(self, point: SweepPoint) -> float:
        """Weaker mixtures come first: by λ, or by measured KL where λ is not one number everywhere."""
        if all(one.weights is not None and len(one.weights) == 1 for one in self.points):
            assert point.weights is not None
            return point.weights[0]
        return math.inf if point.kl is None else point.kl.mean


class Sweep:
    """A sweep that is set up: the requests to run, the search to run them with, and what is made of the answers.

    Args:
        lambdas: weights (with several aligned models, vectors of weights), or DeRa objects.
        num_models: of the decoder.
        evaluator: as that of RAIN; None measures divergences only.

    Raises:
        ConfigError: a setting is outside what is allowed.
    """

    def __init__(
        self, lambdas: Iterable[Lambda], *, num_models: int, sampling: object = None, num_samples: int = 1,
        evaluator: Evaluator | ScoreFunction | JudgeTemplate | None = None,
    ) -> None:  # fmt: skip
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise ConfigError(
                f"the search of a sweep is a {type(sampling).__name__}; allowed: Sampling. A sweep measures the mixture at every "
                "token that was drawn, and the answers of RAIN, which are searched for, are not measured"
            )
        require_whole("num_samples", num_samples, 1)
        if num_samples > 1 and not sampling.temperature:
            raise ConfigError(
                f"num_samples is {num_samples} and the sampling greedy, so all samples would be alike: give 1, or a temperature"
            )
        self.num_samples = num_samples
        self.search = Scored(sampling, None if evaluator is None else as_evaluator(evaluator))
        self._greedy = not sampling.temperature
        self._dera = _dera_list(lambdas)
        self._mixes = [dera.mix(num_models) for dera in self._dera]

    def check_seed(self, seed: int, prompts: int) -> None:
        """Refuse a first seed that leaves too few above it.

        Raises:
            ConfigError: some answer's seed would be outside 0 to 2**64 - 1.
        """
        require_whole("seed", seed, 0)
        if seed + prompts * self.num_samples > 2**64:
            raise ConfigError(
                f"seed is {seed} for {prompts} prompts, {self.num_samples} samples each; allowed: seeds to 2**64 - 1"
            )

    def policies(self, base: Policy) -> list[Policy]:
        """`base` under every λ, everything measured. Each has requests of its own: where answers end and how long they may be is the
        models' that take part.
        """
        return [replace(base, dera=replace(dera, stats=True)) for dera in self._dera]

    def requests(self, given: Sequence[Sequence[Request]], seed: int) -> list[Request]:
        """Every prompt's samples under every λ; a prompt's stand together, because what it leaves in the cache is shared.

        Sample k of prompt i has the seed `seed` + i num_samples + k, whatever λ is: points then differ by their mixture and
        not by their luck, and prompts do not share random numbers.

        Args:
            given: requests of all prompts, λ by λ.

        Raises:
            ConfigError: there are too few seeds above `seed`.
        """
        self.check_seed(seed, len(given[0]))
        return [
            replace(request, seed=seed + i * self.num_samples + k)
            for i, of_prompt in enumerate(zip(*given, strict=True))
            for k in range(self.num_samples)
            for request in of_prompt
        ]

    def result(
        self, outcomes: Sequence[Completion | BaseException], *, model_steps: int = 0, seconds: float = 0.0
    ) -> SweepResult:
        """What the answers, or errors in their place, say; in the order of `requests`."""
        size = len(self._dera)
        points = [self._point(i, outcomes[i::size]) for i in range(size)]
        errors = tuple(outcome for outcome in outcomes if isinstance(outcome, BaseException))
        return SweepResult(points, model_steps, seconds, errors)

    def _point(self, index: int, outcomes: Sequence[Completion | BaseException]) -> SweepPoint:
        dera, mix = self._dera[index], self._mixes[index]
        prompts = [
            [outcome for outcome in outcomes[i : i + self.num_samples] if isinstance(outcome, Completion)]
            for i in range(0, len(outcomes), self.num_samples)
        ]
        answers = [answer for group in prompts for answer in group]
        tokens = sum(len(answer.token_ids) for answer in answers)
        kls = [[_kl(answer) for answer in group] for group in prompts]
        scores = [[answer.value for answer in group if answer.value is not None] for group in prompts]
        return SweepPoint(
            label=_label(dera),
            weights=None if dera.kl is not None else mix.weights[1:],
            target_kl=dera.kl,
            n=len(answers),
            reward=_mean_of(scores, -1.0, 1.0) if self.search.evaluator is not None else None,
            kl=_mean_of(kls, 0.0),
            kl_per_token=math.fsum(kl for group in kls for kl in group) / tokens if tokens else None,
            tokens=tokens / len(answers) if answers else None,
            mean_weight=_mean_weight(mix, answers),
            ess=self._ess(prompts),
            answers=answers,
            failed=len(outcomes) - len(answers),
        )

    def _ess(self, prompts: Sequence[Sequence[Completion]]) -> float | None:
        if self._greedy:
            return None
        groups = [[a.mixture.log_weight for a in group if a.mixture is not None] for group in prompts]
        shares = [effective_share([log for log in logs if log is not None]) for logs in groups if len(logs) > 1]
        return fmean(shares) if shares else None


def _mean_of(prompts: Sequence[Sequence[float]], least: float = -math.inf, most: float = math.inf) -> Mean | None:
    """Over the values that there are, those of each prompt in a group of their own."""
    groups = [group for group in prompts if group]
    if len(groups) == 1 and len(prompts) > 1:
        groups = [[fmean(groups[0])]]  # one case of several prompts: its answers say nothing about the others
    return Mean.of(groups, least, most) if groups else None


def effective_share(log_weights: Sequence[float]) -> float:
    """(sum w)^2 / (n sum w^2): 1 for equal weights, 1/n when one outweighs all (Kish, Survey Sampling, 1965)."""
    top = max(log_weights)
    weights = [math.exp(value - top) for value in log_weights]
    return math.fsum(weights) ** 2 / (len(weights) * math.fsum(w * w for w in weights))


def _dera_list(lambdas: Iterable[Lambda]) -> list[DeRa]:
    if isinstance(lambdas, (str, Real, DeRa)) or not isinstance(lambdas, Iterable):
        raise ConfigError(f"lambdas is {lambdas!r}; give a list of weights, such as [0, 0.5, 1]")
    every = [replace(one if isinstance(one, DeRa) else DeRa(one), stats=True) for one in lambdas]
    if not every:
        raise ConfigError("lambdas is empty: give at least one weight, such as [0, 0.5, 1]")
    seen: set[DeRa] = set()
    for dera in every:
        same = replace(dera, allow_negative=True)
        if same in seen:
            raise ConfigError(f"lambdas holds {_label(dera)} twice: give each once, and num_samples for more answers")
        seen.add(same)
    return every


def _label(dera: DeRa) -> str:
    return dera.label + (f", plausibility {dera.plausibility:g}" if dera.plausibility else "")


def _kl(answer: Completion) -> float:
    assert answer.mixture is not None
    return answer.mixture.kl_reference


def _mean_weight(mix: Mix, answers: Sequence[Completion]) -> float | None:
    if mix.target_kl is None:
        return None
    weights = [token.weights[1] for answer in answers if answer.mixture for token in answer.mixture.tokens]
    return fmean(weights) if weights else None


def _answer_json(answer: Completion) -> dict[str, Any]:
    assert answer.mixture is not None
    return {
        "prompt": answer.prompt,
        "text": answer.text,
        "seed": answer.seed,
        "finish_reason": answer.finish_reason,
        "tokens": len(answer.token_ids),
        "score": answer.value,
        "kl": answer.mixture.kl_reference,
        "log_weight": answer.mixture.log_weight,
    }


def _student95(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t: expansion in 1/freedom (Abramowitz and Stegun 26.7.5), to 1 % from 2 on."""
    if freedom == 1:
        return 12.7062047364
    z = 1.959963984540054
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / float(freedom) ** power for power, term in enumerate(terms, start=1))
