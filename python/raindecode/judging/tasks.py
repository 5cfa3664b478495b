"""The instruction tasks and their question files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from raindecode.errors import ConfigError, PromptError
from raindecode.judging.rubric import ASPECTS, SAFETY, TURN, Item, Rubric
from raindecode.settings import is_whole


@dataclass(frozen=True)
class Question:
    """One conversation to be held.

    Attributes:
        index: position in the file, from 0.
        id: as the file has it.
        turns: what the user says, turn by turn.
        references: reference answers, one per turn; empty where there are none.
        origin: just-eval: dataset and source_id, which the published layout repeats.
    """

    index: int
    id: int | str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A set of questions and how answers to them are graded.

    Attributes:
        turns: of every question.
        id_field: the question file's name for a question's number.
        rubrics: by category; "" is that of all others.
        read: makes a question of a line's object. Raises PromptError, which says where.
    """

    name: str
    turns: int
    id_field: str
    rubrics: dict[str, Rubric]
    read: Callable[[int, dict[str, Any], str], Question]

    def rubric(self, category: str) -> Rubric:
        """How an answer to a question of this category is graded."""
        return self.rubrics.get(category) or self.rubrics[""]

    def item(self, question: Question, turn: int, answers: Sequence[str]) -> Item:
        """What is judged of a question's answer at a turn, from 1, given the answers up to it."""
        return Item(
            question.index, question.id, question.category, turn, question.turns[:turn], tuple(answers[:turn]),
            question.references[:turn], self.rubric(question.category),
        )  # fmt: skip


def read_questions(task: Task, path: str) -> list[Question]:
    """The questions of a JSON-lines file.

    Raises:
        PromptError: the file cannot be read, a line is no question of this task, or two have one id; the message says where.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PromptError(
            f"the question file {path!r} cannot be read ({error.strerror}): give the JSON-lines file of {task.name}"
        ) from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path!r} is not UTF-8 text (byte {error.start}): convert it to UTF-8") from error
    questions: list[Question] = []
    seen: dict[int | str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path!r}"
        question = task.read(len(questions), _object(line, where), where)
        if question.id in seen:
            raise PromptError(
                f"{where} has the {task.id_field} {question.id!r} of line {seen[question.id]}: every question needs its own"
            )
        seen[question.id] = number
        questions.append(question)
    if not questions:
        raise PromptError(f"{path!r} holds no question: give the JSON-lines file of {task.name}")
    return questions


def choose(questions: Sequence[Question], *, limit: int | None, categories: Sequence[str] = ()) -> list[Question]:
    """The first `limit` questions of some categories; all without either.

    Raises:
        ConfigError: there is no such category, or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; allowed: 1 or more")
    known = list(dict.fromkeys(question.category for question in questions))
    for category in categories:
        if category not in known:
            raise ConfigError(f"--category is {category!r}; the questions have: {', '.join(known)}")
    return [question for question in questions if not categories or question.category in categories][:limit]


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where} is not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise PromptError(f"{where} is a JSON {type(entry).__name__}; give an object on every line")
    return entry


def _id(entry: dict[str, Any], name: str, where: str) -> int | str:
    value = entry.get(name)
    if is_whole(value) or (isinstance(value, str) and value):
        return value  # type: ignore[return-value]
    raise PromptError(f"{where} has {value!r:.60} as {name}; give a whole number or a name")


def _text(value: Any, what: str, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (empty or value.strip()):
        raise PromptError(f"{where} has {value!r:.60} as {what}; give a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"{where} has a lone surrogate in its {what}, at character {error.start}") from error
    return value


def _texts(value: Any, what: str, where: str, number: int, *, empty: bool = False) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) != number:
        raise PromptError(f"{where} has {value!r:.60} as {what}; give a list of {number} texts")
    return tuple(_text(one, what, where, empty=empty) for one in value)


def _just_eval(index: int, entry: dict[str, Any], where: str) -> Question:
    category = entry.get("category")
    if category not in ("regular", "safety"):
        raise PromptError(f"{where} has {category!r:.60} as category; allowed: regular, safety")
    origin = {name: entry.get(name) for name in ("dataset", "source_id")}
    return Question(
        index, _id(entry, "id", where), category, (_text(entry.get("instruction"), "instruction", where),), (), origin
    )


def _mt_bench(index: int, entry: dict[str, Any], where: str) -> Question:
    references = entry.get("reference")
    return Question(
        index, _id(entry, "question_id", where), _text(entry.get("category"), "category", where),
        _texts(entry.get("turns"), "turns", where, 2),
        () if references is None else _texts(references, "reference", where, 2, empty=True),
    )  # fmt: skip


JUST_EVAL: Final = Task("just-eval", 1, "id", {"regular": ASPECTS, "safety": SAFETY}, _just_eval)
"""1,000 instructions, of which 200 are about safety (Lin et al., The Unlocking Spell on Base LLMs, ICLR 2024)."""
MT_BENCH: Final = Task("mt-bench", 2, "question_id", {"": TURN}, _mt_bench)
"""80 conversations of two turns (Zheng et al., Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena, NeurIPS 2023)."""
TASKS: Final = {task.name: task for task in (JUST_EVAL, MT_BENCH)}
