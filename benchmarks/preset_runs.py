"""What an edit of AlignEZ does to the answers of the embedded testbed, run by run. Used by alignez_presets.py and
urial_combinations.py.

A run is what follows from one pair seed: the training requests, the pairs made of them, the held-out requests, the numbers that
answers are drawn with. All arms of a run answer the same requests with the same numbers, so they may be compared request by request.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any, Final

from raindecode import testbed
from raindecode.commands.fitting import Timed
from raindecode.decoder import Decoder
from raindecode.evaluation import MAX_NEW_TOKENS, SEARCHES, Rate, town_requests
from raindecode.policy.alignez.directions import svd_group
from raindecode.policy.alignez.edits import AlignEZ, Positions
from raindecode.policy.alignez.elicitation import Elicitation
from raindecode.policy.alignez.pairs import PairSet
from raindecode.policy.alignez.presets import PRESETS
from raindecode.policy.dera import DeRa
from raindecode.policy.policy import Policy
from raindecode.policy.prompt import ChatFormat
from raindecode.search.rain import RAIN
from raindecode.types import Completion

Row = dict[str, Any]
FIRST_WORD: Final = Positions("last", end=0)  # only the row that the answer's first token is drawn from
RATES: Final = ("harmful", "helpful", "known")
KINDS: Final = ("all", "harmful", "benign")  # of requests
_FORMAT: Final = RAIN.preset("town").format or ChatFormat()
_SEED_STEP: Final = 100_000  # between the answers of two runs
_UNSEEN: Final = 1_000  # validation requests are drawn with seeds from here on
_Z95: Final = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Variant:
    """A preset with what is changed in it."""

    preset: str
    positions: Positions | None = None

    @property
    def settings(self) -> Row:
        """For AlignEZ.fit."""
        return {} if self.positions is None else {"positions": self.positions}

    @property
    def end0(self) -> bool:
        """Whether no row of a generated token is edited."""
        return (self.positions or PRESETS[self.preset].positions).end == 0


def variants() -> dict[str, Variant]:
    """Every preset, and the two that edit every generated token with that left out."""
    found = {name: Variant(name) for name in PRESETS}
    for name in ("svd", "svd-knn"):
        if PRESETS[name].positions != FIRST_WORD:
            found[f"{name}, end=0"] = Variant(name, FIRST_WORD)
    return found


@dataclass(frozen=True)
class Sizes:
    """How many requests there are of each kind."""

    pairs: int = 100
    requests: int = 200
    validation: int = 100
    rain: int = 60


@dataclass(frozen=True)
class Run:
    """Requests of one pair seed, harmful ones first.

    Attributes:
        questions: training requests that pairs are made from.
        validation: other training requests, by which the best preset is chosen.
        test: held-out requests.
        rain: the part of `test` that RAIN answers.
    """

    seed: int
    questions: tuple[str, ...]
    validation: tuple[testbed.Request, ...]
    test: tuple[testbed.Request, ...]
    rain: tuple[testbed.Request, ...]

    @classmethod
    def of(cls, seed: int, sizes: Sizes) -> Run:
        """Draw the requests of a seed."""
        questions = tuple(r.text for r in testbed.sample_requests(sizes.pairs, split="train", seed=seed))
        harmful, benign = town_requests(sizes.requests, sizes.requests, seed)
        unseen: list[testbed.Request] = []
        for kind in (True, False):
            drawn = testbed.sample_requests(
                sizes.validation + sizes.pairs, harmful=kind, split="train", seed=seed + _UNSEEN
            )
            unseen += [r for r in drawn if r.text not in questions][: sizes.validation]
        return cls(seed, questions, tuple(unseen), (*harmful, *benign), (*harmful[: sizes.rain], *benign[: sizes.rain]))

    def make_pairs(self, decoder: Decoder) -> tuple[PairSet, float]:
        """Pairs of the model's own, and the seconds they took."""
        started = time.perf_counter()
        pairs = AlignEZ.generate_pairs(
            decoder, self.questions, elicitation=Elicitation.testbed(), seed=self.seed, progress=False
        )
        return pairs, time.perf_counter() - started

    def answer(
        self, decoder: Decoder, requests: Sequence[testbed.Request], *, search: str = "vanilla",
        edit: AlignEZ | None = None, dera: DeRa | None = None, prompt: ChatFormat = _FORMAT,
    ) -> list[Completion]:  # fmt: skip
        """Answers of one arm, from empty caches."""
        decoder.engine.forget()
        first = _SEED_STEP * self.seed
        return decoder.generate(
            [request.text for request in requests], search=SEARCHES[search](),
            policy=Policy(prompt=prompt, dera=dera, edits=() if edit is None else edit),
            max_new_tokens=MAX_NEW_TOKENS, seed=list(range(first, first + len(requests))), progress=False,
        )  # fmt: skip


def fitted(decoder: Decoder, pairs: PairSet, variant: Variant, seed: int) -> tuple[AlignEZ, Row]:
    """A variant's edit, and what there is to say of the fit: layers, cos(help, harm) by layer, seconds."""
    timed, started = Timed(decoder), time.perf_counter()
    edit = AlignEZ.fit(timed, pairs, variant.preset, progress=False, seed=seed, **variant.settings)
    seconds = time.perf_counter() - started
    return edit, {
        "tap": edit.sites[0].tap, "layers": [site.layer for site in edit.sites], "positions": asdict(edit.positions),
        "cos_help_harm": cosines(edit), "seconds": {"forwards": timed.seconds, "fit": seconds - timed.seconds},
    }  # fmt: skip


def cosines(edit: AlignEZ) -> dict[str, float]:
    """Cosine of the boosted with the rejected direction by layer, where an edit has both; of "svd-knn" that of all its examples."""
    found: dict[str, float] = {}
    for site, examples in edit.examples.items():
        good, bad = (svd_group(rows[None]).vectors[0, 0] for rows in (examples.helpful, examples.harmful))
        found[str(site.layer)] = float(good @ bad)
    for site in edit.sites:
        by_op = {stage.ops[0]: stage.directions[0].double() for at, stage in edit.stages if at == site}
        if set(by_op) == {"project", "boost"}:
            found[str(site.layer)] = float(by_op["project"] @ by_op["boost"])
    return found


def counts(requests: Sequence[testbed.Request], answers: Sequence[Completion]) -> Row:
    """Rates of one arm in one run by the exact judge, with 95 % intervals, and its tokens per answer."""
    cases: dict[str, list[bool]] = {name: [] for name in RATES}
    for request, answer in zip(requests, answers, strict=True):
        verdict = testbed.judge(request, answer.text)
        cases["known"].append(verdict.known)
        if request.harmful:
            cases["harmful"].append(verdict.harmful)
        else:
            cases["helpful"].append(verdict.helpful)
    return {
        **{name: share(Rate(sum(hits), len(hits))) for name, hits in cases.items()},
        "tokens_generated": fmean(len(answer.token_ids) for answer in answers),
        "tokens_processed": fmean(answer.stats.tokens_processed for answer in answers),
    }


def share(rate: Rate) -> Row:
    """A rate as plain data."""
    return {"rate": rate.rate, "ci": list(rate.interval), "hits": rate.hits, "n": rate.n}


def pooled(runs: Sequence[Row]) -> Row:
    """All runs of an arm as one: their requests differ, so that the cases may be counted together."""
    found: Row = {
        name: share(Rate(sum(run[name]["hits"] for run in runs), sum(run[name]["n"] for run in runs))) for name in RATES
    }
    for key in ("tokens_generated", "tokens_processed"):
        found[key] = fmean(run[key] for run in runs)
    return found


def rain_counts(requests: Sequence[testbed.Request], answers: Sequence[Completion]) -> Row:
    """`counts`, and by kind of request the iterations and the tokens of an answer; `each` holds the iterations of every one."""
    iterations, tokens = [one.stats.iterations for one in answers], [len(one.token_ids) for one in answers]
    each = {kind: _of_kind(kind, requests, iterations) for kind in KINDS}
    return counts(requests, answers) | {
        "iterations": {kind: fmean(numbers) for kind, numbers in each.items()},
        "tokens": {kind: fmean(_of_kind(kind, requests, tokens)) for kind in KINDS},
        "evaluations": fmean(one.stats.evaluations for one in answers),
        "each": each,
    }


def _of_kind(kind: str, requests: Sequence[testbed.Request], numbers: Sequence[int]) -> list[int]:
    return [n for n, one in zip(numbers, requests, strict=True) if kind == "all" or one.harmful == (kind == "harmful")]


def pooled_rain(runs: Sequence[Row], alone: Sequence[Row]) -> Row:
    """`pooled`, with iterations, and how many fewer they are than those of `alone`: paired means with 95 % intervals."""
    found = pooled(runs)
    for name in ("iterations", "tokens"):
        found[name] = {kind: fmean(run[name][kind] for run in runs) for kind in KINDS}
    found["evaluations"] = fmean(run["evaluations"] for run in runs)
    found["fewer_iterations"] = {kind: _fewer(alone, runs, kind) for kind in KINDS}
    return found


def _fewer(alone: Sequence[Row], runs: Sequence[Row], kind: str) -> Row:
    saved = [
        a - b
        for before, after in zip(alone, runs, strict=True)
        for a, b in zip(before["each"][kind], after["each"][kind], strict=True)
    ]
    half = _Z95 * stdev(saved) / math.sqrt(len(saved))
    return {"mean": fmean(saved), "ci": [fmean(saved) - half, fmean(saved) + half]}
