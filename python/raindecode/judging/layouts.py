"""The published layouts of answers: written for others' tools, and read to judge answers that are there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raindecode.errors import PromptError
from raindecode.judging.tasks import Question, Task

Place = tuple[int, int]
"""A question's position in its file, from 0, and a turn, from 1."""


@dataclass(frozen=True)
class Answer:
    """What a model said at one turn.

    Attributes:
        model_input: the whole prompt it was given; None when it is not known.
        finish_reason: as of Completion; "" when it is not known.
        tokens: generated; None when it is not known.
        time: seconds since the epoch when it was there; 0 when it is not known.
    """

    text: str
    model_input: str | None = None
    finish_reason: str = ""
    tokens: int | None = None
    seed: int | None = None
    time: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def published(task: Task, questions: Sequence[Question], answers: Mapping[Place, Answer], model: str) -> dict[str, str]:
    """The published files of a task, by name; of mt-bench the per-turn lists and FastChat's lines.

    Questions without an answer are left out; of FastChat's file those without both.
    """
    if task.turns == 1:
        entries = [
            _just_eval_entry(question, answers[question.index, 1], model)
            for question in questions
            if (question.index, 1) in answers
        ]
        return {f"{task.name}.json": _json(entries)}
    files = {}
    for turn in range(1, task.turns + 1):
        entries = [
            {
                "question_id": question.id, "category": question.category, f"turn{turn}_output": answers[place].text,
                "model_id": model, "turn_id": turn, "model_input": answers[place].model_input,
            }
            for question in questions
            if (place := (question.index, turn)) in answers
        ]  # fmt: skip
        files[f"{task.name}-turn{turn}.json"] = _json(entries)
    lines = []
    for question in questions:
        said = [answers.get((question.index, turn)) for turn in range(1, task.turns + 1)]
        whole = [answer for answer in said if answer is not None]
        if len(whole) == task.turns:
            lines.append(json.dumps(_fastchat_entry(question, whole, model)) + "\n")
    return {**files, f"{task.name}-fastchat.jsonl": "".join(lines)}


def _just_eval_entry(question: Question, answer: Answer, model: str) -> dict[str, Any]:
    return {
        "id": question.id, "instruction": question.turns[0], "output": answer.text, "generator": model, **question.origin,
        "datasplit": "just_eval", "model_input": answer.model_input,
    }  # fmt: skip


def _fastchat_entry(question: Question, answers: Sequence[Answer], model: str) -> dict[str, Any]:
    turns = [answer.text for answer in answers]
    # FastChat draws a name; one that follows from the content stays the same when the file is written again.
    name = hashlib.sha256(json.dumps([question.id, model, turns]).encode()).hexdigest()[:22]
    return {
        "question_id": question.id, "answer_id": name, "model_id": model, "choices": [{"index": 0, "turns": turns}],
        "tstamp": max(answer.time for answer in answers),
    }  # fmt: skip


def _json(entries: list[dict[str, Any]]) -> str:
    return json.dumps(entries, indent=2, ensure_ascii=True) + "\n"


def read_answers(
    task: Task, paths: Sequence[str], questions: Sequence[Question]
) -> tuple[dict[Place, Answer], str]:  # fmt: skip
    """Answers in a published layout, and the model that gave them.

    Args:
        paths: one file, or one per turn: a JSON list (just-eval; one turn of mt-bench) or JSON lines (FastChat).
        questions: all of the question file.

    Raises:
        PromptError: a file is no such layout, speaks of other questions, or says something twice; the message says where.
    """
    known = {question.id: question for question in questions}
    found: dict[Place, Answer] = {}
    models: dict[str, None] = {}
    for path in paths:
        for where, entry in _entries(path):
            given = entry.get(task.id_field)
            question = known.get(given) if isinstance(given, (int, str)) and not isinstance(given, bool) else None
            if question is None:
                raise PromptError(
                    f"{where} has {given!r:.60} as {task.id_field}, which is none of --questions: give the questions these "
                    "answers are to"
                )
            if task.turns == 1 and entry.get("instruction", question.turns[0]) != question.turns[0]:
                raise PromptError(
                    f"{where} answers another instruction than {task.id_field} {given!r} of --questions: give the questions "
                    "these answers are to"
                )
            models[str(entry.get("generator" if task.turns == 1 else "model_id") or "unknown")] = None
            for turn, answer in _said(task, entry, where):
                if (question.index, turn) in found:
                    raise PromptError(f"{where} answers {task.id_field} {given!r}, turn {turn}, a second time")
                found[question.index, turn] = answer
    if not found:
        raise PromptError(f"{', '.join(map(repr, paths))} holds no answer")
    if len(models) > 1:
        raise PromptError(f"the answers are of several models ({', '.join(models)}): judge one at a time")
    return found, next(iter(models))


def _said(task: Task, entry: dict[str, Any], where: str) -> list[tuple[int, Answer]]:
    """The answers of an entry by turn."""
    if task.turns == 1:
        names = ["output"]
        said = [(1, entry["output"])] if "output" in entry else []
    else:
        names = [f"turn{turn}_output" for turn in range(1, task.turns + 1)]
        said = [(turn, entry[name]) for turn, name in enumerate(names, start=1) if name in entry]
        choices = entry.get("choices")
        if not said and isinstance(choices, list) and choices and isinstance(choices[0], dict):
            turns = choices[0].get("turns")
            said = list(enumerate(turns, start=1)) if isinstance(turns, list) and len(turns) == task.turns else []
            names.append(f"choices with {task.turns} turns")
    if not said or not all(isinstance(text, str) for _, text in said):
        raise PromptError(
            f"{where} has no text as {' or '.join(names)}: give answers to {task.name} in a published layout"
        )
    time = entry.get("tstamp", 0.0)
    shared: dict[str, Any] = {"time": float(time) if isinstance(time, (int, float)) else 0.0}
    model_input = entry.get("model_input")
    shared["model_input"] = model_input if isinstance(model_input, str) else None
    return [(turn, Answer(text, **shared)) for turn, text in said]


def _entries(path: str) -> list[tuple[str, dict[str, Any]]]:
    """(where, object) of a JSON list or of JSON lines."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PromptError(
            f"the answers {path!r} cannot be read ({error.strerror}): give a file in a published layout"
        ) from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path!r} is not UTF-8 text (byte {error.start}): convert it to UTF-8") from error
    try:
        if text.lstrip().startswith("["):
            values = [(f"entry {at} of {path!r}", value) for at, value in enumerate(json.loads(text))]
        else:
            lines = [
                (f"line {n} of {path!r}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()
            ]
            values = [(where, json.loads(line)) for where, line in lines]
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path!r} is neither a JSON list nor JSON lines ({error})") from error
    for where, value in values:
        if not isinstance(value, dict):
            raise PromptError(f"{where} is a JSON {type(value).__name__}; an answer is an object")
    return values
