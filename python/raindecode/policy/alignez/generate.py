"""Pairs that the model makes itself: two batched rounds of plain decoding, a filter, and a file that outlives the run."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from raindecode.errors import ConfigError, FitError, PromptError
from raindecode.policy.alignez.elicitation import SIDES, Elicitation, Side
from raindecode.policy.alignez.pair_file import PairFile, Record
from raindecode.policy.alignez.pairs import Pair, PairSet
from raindecode.policy.policy import Policy
from raindecode.progress import ProgressDisplay
from raindecode.settings import require_finite, require_whole
from raindecode.types import Completion

_CHUNK = 64  # pairs asked for together: enough to fill batches, and at most this many are lost when a run is killed


class PairMaker(Protocol):
    """A decoder, as far as making pairs goes."""

    def generate(self, prompts: Any, **options: Any) -> list[Any]: ...

    def activations(self, passages: Sequence[tuple[str, str]], **options: Any) -> Tensor: ...


@dataclass(frozen=True)
class _Job:
    """One pair to make: the question, and its how-manyeth answer this is."""

    question: str
    answer: int


def generate_pairs(
    decoder: PairMaker,
    questions: Iterable[str],
    *,
    elicitation: Elicitation | None = None,
    answers: int = 1,
    max_new_tokens: int = 128,
    seed: int = 0,
    search: Any = None,
    out: str | os.PathLike[str] | None = None,
    similarity: float | None = 0.98,
    similarity_layer: int = 0,
    progress: bool | None = None,
) -> PairSet:
    """Ask the model what good and bad answers to each question would be, and for an answer of either kind.

    Pairs are dropped, and counted by reason, when an answer is empty ("empty"), no characteristic was named ("no trait"), both
    answers are the same text ("identical"), or nearly the same ("similar"). A pair depends on its own question, on `seed` and
    on which of the question's answers it is, not on the other questions (where the decoder is exact).

    Args:
        questions: distinct questions without any chat format; one given twice is asked once.
        elicitation: what is asked; None takes the paper's words.
        answers: pairs per question.
        max_new_tokens: limit of each answer.
        search: how answers are drawn, as in Decoder.generate; None samples. Greedy search gives all `answers` alike.
        out: JSON-lines file that pairs are added to as they are made. What it holds already, made with the same settings, is
            not asked again, so that a killed run can be gone on with. `read_pairs` reads it.
        similarity: pairs whose answers' mean hidden states at `similarity_layer` have a cosine above this are dropped; the
            paper drops near-duplicates and gives no value. None drops identical texts only.
        similarity_layer: counted from 0; block output, mean over the answer.
        progress: as in Decoder.generate.

    Raises:
        PromptError: no question, or one that is no text, blank, or too long for the model with what is asked about it.
        ConfigError: a setting is outside what is allowed, or `out` was written with other settings.
        FitError: every pair was dropped.
    """
    elicitation = Elicitation.published() if elicitation is None else elicitation
    asked = _checked(questions)
    require_whole("answers", answers, 1)
    require_whole("max_new_tokens", max_new_tokens, 1)
    require_whole("seed", seed, 0)
    require_whole("similarity_layer", similarity_layer, 0)
    if similarity is not None:
        require_finite("similarity", similarity)
        if not -1 < similarity <= 1:
            raise ConfigError(
                f"similarity is {similarity!r}; allowed: a cosine above -1, up to 1, or None for no filter"
            )
    settings = {
        "elicitation": elicitation.to_json(), "max_new_tokens": max_new_tokens, "seed": seed, "search": repr(search),
        "similarity": similarity, "similarity_layer": similarity_layer, "model": getattr(decoder, "name", None),
    }  # fmt: skip
    jobs = [_Job(question, answer) for question in asked for answer in range(answers)]
    with PairFile(out, settings) as file:
        known = file.records()
        todo = [job for job in jobs if (job.question, job.answer) not in known]
        maker = _Maker(decoder, elicitation, max_new_tokens, seed, search)
        with ProgressDisplay.choose(progress, 4 * len(todo), searching=False) as display:
            for start in range(0, len(todo), _CHUNK):
                chunk = todo[start : start + _CHUNK]
                records = maker.make(chunk, display, 4 * start)
                if similarity is not None:
                    _drop_similar(decoder, records, similarity, similarity_layer)
                for record in records:
                    known[record["prompt"], record["answer"]] = record
                    file.write(record)
    return _collected(jobs, known, len(asked), len(todo), maker.tokens)


def _checked(questions: Iterable[str]) -> list[str]:
    if isinstance(questions, str) or not isinstance(questions, Iterable):
        raise PromptError(f"questions is {questions!r:.60}; give a list of texts")
    asked = list(questions)
    if not asked:
        raise PromptError(
            "no question was given; give some like those the edit shall be used on, 100 are a good number"
        )
    for index, question in enumerate(asked):
        if not isinstance(question, str) or not question.strip():
            raise PromptError(f"question {index} is {question!r:.60}; give a text that is not blank")
    return list(dict.fromkeys(asked))


def _collected(
    jobs: Sequence[_Job], known: dict[tuple[str, int], Record], questions: int, asked: int, tokens: int
) -> PairSet:
    records = [known[job.question, job.answer] for job in jobs]
    dropped = Counter(record["dropped"] for record in records if record.get("dropped"))
    pairs = tuple(_pair(record) for record in records if not record.get("dropped"))
    if not pairs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        raise FitError(
            f"every pair was dropped ({reasons}): ask more questions, raise similarity or max_new_tokens, or use an elicitation "
            "that this model understands (Elicitation(...))"
        )
    stats = {"questions": questions, "asked": asked, "reused": len(jobs) - asked, "tokens": tokens}
    return PairSet(pairs, dict(dropped), stats)


def _pair(record: Record) -> Pair:
    return Pair(**{name: record.get(name) for name in Pair.__dataclass_fields__})  # type: ignore[arg-type]


class _Maker:
    """Asks for pairs, a chunk at a time."""

    def __init__(
        self, decoder: PairMaker, elicitation: Elicitation, max_new_tokens: int, seed: int, search: Any
    ) -> None:
        self.decoder = decoder
        self.elicitation = elicitation
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.search = search
        self.tokens = 0

    def make(self, jobs: Sequence[_Job], display: ProgressDisplay, first: int) -> list[Record]:
        """A record per job. The display counts the answers from `first`."""
        sides: list[tuple[_Job, Side]] = [(job, side) for job in jobs for side in SIDES]
        form = self.elicitation
        said = self._ask(
            [form.ask_trait(job.question, side) for job, side in sides], [self._seed(*one, "trait") for one in sides],
            form.trait_stop, form.trait_tokens, _reporting(display, first),
        )  # fmt: skip
        traits = [form.read_trait(text) for text in said]
        named = [i for i, trait in enumerate(traits) if trait and traits[i ^ 1]]  # of either side
        prompts = {i: form.ask_answer(sides[i][0].question, traits[i]) for i in named}
        replies = self._ask(
            list(prompts.values()), [self._seed(*sides[i], "answer") for i in named],
            form.answer_stop, self.max_new_tokens, _reporting(display, first + len(sides)),
        )  # fmt: skip
        for index in range(first, first + 2 * len(sides)):
            display.finished(index)
        texts = dict(zip(named, replies, strict=True))
        return [self._record(job, 2 * k, traits, prompts, texts) for k, job in enumerate(jobs)]

    def _record(
        self, job: _Job, at: int, traits: Sequence[str], prompts: dict[int, str], texts: dict[int, str]
    ) -> Record:
        record: Record = {"prompt": job.question, "answer": job.answer, "dropped": None}
        for i, side in enumerate(SIDES, start=at):
            record |= {side: texts.get(i, ""), f"{side}_trait": traits[i], f"{side}_prompt": prompts.get(i)}
        chosen, rejected = record["chosen"].strip(), record["rejected"].strip()
        if at not in prompts:
            record["dropped"] = "no trait"
        elif not chosen or not rejected:
            record["dropped"] = "empty"
        elif chosen == rejected:
            record["dropped"] = "identical"
        return record

    def _seed(self, job: _Job, side: Side, step: str) -> int:
        """Of one text: the question counts, so that no two questions draw the same random numbers."""
        name = "/".join((str(self.seed), str(job.answer), side, step, job.question))
        return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "little")

    def _ask(
        self, prompts: list[str], seeds: list[int], stop: tuple[str, ...], limit: int,
        on_progress: Callable[[int, int, int], None] | None,
    ) -> list[str]:  # fmt: skip
        if not prompts:
            return []
        completions: list[Completion] = self.decoder.generate(
            prompts, search=self.search, policy=Policy(prompt=self.elicitation.format), max_new_tokens=limit, seed=seeds,
            stop=stop, on_progress=on_progress, progress=False,
        )  # fmt: skip
        self.tokens += sum(len(completion.token_ids) for completion in completions)
        return [completion.text for completion in completions]


def _reporting(display: ProgressDisplay, first: int) -> Callable[[int, int, int], None] | None:
    if display.reporter(first) is None:
        return None

    def report(index: int, tokens: int, iterations: int) -> None:
        reporter = display.reporter(first + index)
        if reporter is not None:
            reporter(tokens, iterations)

    return report


def _drop_similar(decoder: PairMaker, records: Sequence[Record], similarity: float, layer: int) -> None:
    """Mark pairs whose answers are nearly the same."""
    kept = [record for record in records if not record["dropped"]]
    if not kept:
        return
    passages = [(record["prompt"], record[side]) for side in SIDES for record in kept]
    states = decoder.activations(passages, layers=[layer], tap="block_out", pool="mean", progress=False)[0].double()
    cosines = torch.cosine_similarity(states[: len(kept)], states[len(kept) :], dim=-1)
    for record, cosine in zip(kept, cosines.tolist(), strict=True):
        if cosine > similarity:
            record["dropped"] = "similar"
