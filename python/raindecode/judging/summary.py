"""Means of a task's verdicts, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from raindecode.judging.layouts import Answer, Place
from raindecode.judging.rubric import LOWEST
from raindecode.judging.tasks import Question, Task
from raindecode.judging.verdicts import Verdict
from raindecode.sweep import Mean


@dataclass(frozen=True)
class Score:
    """A mean of scores.

    Attributes:
        mean: with its 95 % interval, by Student's t over the questions.
        n: questions; those not judged are left out.
    """

    mean: Mean
    n: int

    def to_json(self) -> dict[str, Any]:
        return {**self.mean.to_json(), "n": self.n}


@dataclass(frozen=True)
class Summary:
    """What came of a task.

    Attributes:
        scores: just-eval: {category: {aspect}}, and "mean", of the five of a question. mt-bench: {category: {"turn 1", "turn 2",
            "mean"}}, and category "all"; "mean" is over questions with both turns judged. What nothing was judged of is left out.
        questions, answers, verdicts: how many; answers and verdicts count turns.
        characters: mean length of an answer; None without any.
        tokens: mean number generated; None where it is not known of all.
    """

    task: str
    model: str
    scores: dict[str, dict[str, Score]]
    questions: int
    answers: int
    verdicts: int
    characters: float | None
    tokens: float | None

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task, "model": self.model, "questions": self.questions, "answers": self.answers,
            "verdicts": self.verdicts, "mean_characters": self.characters, "mean_tokens": self.tokens,
            "scores": {
                group: {name: score.to_json() for name, score in row.items()} for group, row in self.scores.items()
            },
        }  # fmt: skip


def summarise(
    task: Task, questions: Sequence[Question], answers: Mapping[Place, Answer], verdicts: Mapping[Place, Verdict], *,
    model: str,
) -> Summary:  # fmt: skip
    """The means over `questions`."""
    chosen = {question.index for question in questions}
    mine = [answer for (index, _), answer in answers.items() if index in chosen]
    judged = {place: verdict for place, verdict in verdicts.items() if place[0] in chosen}
    tokens = [answer.tokens for answer in mine if answer.tokens is not None]
    return Summary(
        task=task.name, model=model,
        scores=_by_aspect(task, questions, judged) if task.turns == 1 else _by_category(task, questions, judged),
        questions=len(questions), answers=len(mine), verdicts=len(judged),
        characters=fmean(len(answer.text) for answer in mine) if mine else None,
        tokens=fmean(tokens) if mine and len(tokens) == len(mine) else None,
    )  # fmt: skip


def _by_aspect(
    task: Task, questions: Sequence[Question], verdicts: Mapping[Place, Verdict]
) -> dict[str, dict[str, Score]]:
    found: dict[str, dict[str, Score]] = {}
    for category, rubric in task.rubrics.items():
        given = [verdicts[q.index, 1].scores for q in questions if q.category == category and (q.index, 1) in verdicts]
        if not given:
            continue
        row = {aspect: _score([scores[aspect] for scores in given], rubric.highest) for aspect in rubric.aspects}
        if len(rubric.aspects) > 1:
            row["mean"] = _score([fmean(scores.values()) for scores in given], rubric.highest)
        found[category] = row
    return found


def _by_category(
    task: Task, questions: Sequence[Question], verdicts: Mapping[Place, Verdict]
) -> dict[str, dict[str, Score]]:  # fmt: skip
    found: dict[str, dict[str, Score]] = {}
    groups = {
        **{name: [q for q in questions if q.category == name] for name in dict.fromkeys(q.category for q in questions)},
        "all": list(questions),
    }
    for name, some in groups.items():
        highest = max(task.rubric(question.category).highest for question in some)
        turns = [
            {q.index: fmean(verdicts[q.index, turn].scores.values()) for q in some if (q.index, turn) in verdicts}
            for turn in range(1, task.turns + 1)
        ]
        row = {f"turn {at}": _score(list(of.values()), highest) for at, of in enumerate(turns, start=1) if of}
        both = [fmean(of[q.index] for of in turns) for q in some if all(q.index in of for of in turns)]
        if both:
            row["mean"] = _score(both, highest)
        if row:
            found[name] = row
    return found


def _score(values: Sequence[float], highest: int) -> Score:
    return Score(Mean.of([[value] for value in values], LOWEST, highest), len(values))
