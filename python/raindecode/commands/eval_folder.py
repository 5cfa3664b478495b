"""The folder of an evaluation: answers and verdicts as they come, and what is written at the end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from raindecode.commands.answer_file import AnswerFile, Record, check_settings
from raindecode.errors import ConfigError, JudgeError
from raindecode.judging.layouts import Answer, Place
from raindecode.judging.rubric import Item
from raindecode.judging.tasks import Question, Task
from raindecode.judging.verdicts import Verdict, as_verdict

_FIELDS = [field.name for field in fields(Answer)]
_KINDS = {
    "text": str,
    "model_input": str | None,
    "finish_reason": str,
    "tokens": int | None,
    "seed": int | None,
    "time": int | float,
}
ANSWERS, VERDICTS, SUMMARY = "answers.jsonl", "verdicts.jsonl", "summary.json"


class EvalFolder:
    """Where a run of an instruction task keeps what it has. A context manager.

    Args:
        path: of the folder; made if only it is missing.
        answering: whether answers are given in this run; else only verdicts are kept.
        resume, overwrite: as of AnswerFile, of both files.

    Raises:
        ConfigError: it cannot be written, holds something, or belongs to a run with its own answers.
    """

    def __init__(self, path: str, task: Task, *, answering: bool, resume: bool, overwrite: bool) -> None:
        self.path = Path(path)
        self._task = task
        try:
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--output {path!r} cannot be made a folder ({error.strerror}): name a folder in one that exists"
            ) from error
        answers = self.path / ANSWERS
        if not answering and answers.exists() and answers.stat().st_size:
            raise ConfigError(
                f"{path!r} holds the answers of a run, and --answers judges others: name another folder with --output"
            )
        self._answers: AnswerFile | None = None
        if answering:
            self._answers = AnswerFile(str(answers), resume=resume, overwrite=overwrite)
        try:
            self._verdicts = AnswerFile(str(self.path / VERDICTS), resume=resume, overwrite=overwrite)
        except BaseException:
            self.close()
            raise
        self._settings: Record = {}
        self._verdict_settings: Record = {}

    def __enter__(self) -> EvalFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up both files."""
        for file in (self._answers, getattr(self, "_verdicts", None)):
            if file is not None:
                file.close()

    def begin_answers(self, questions: Sequence[Question], settings: Record) -> dict[Place, Answer]:
        """The answers that are there; from now on new ones are written with `settings`.

        Args:
            questions: all of the question file; answers to any of them may be there.
            settings: what decides an answer.

        Raises:
            ConfigError: something there is no answer to these questions with these settings.
        """
        assert self._answers is not None
        self._settings = settings
        found: dict[Place, Answer] = {}
        file = self._answers
        file.begin()
        for number, record in file.records() if file.resume else ():
            check_settings(file.path, number, record, settings)
            place, question = self._place(file, number, record, questions)
            if record.get("question") != question.turns[place[1] - 1]:
                raise ConfigError(
                    f"line {number} of {file.path!r} answers another question {question.id} than that of --questions: give "
                    "the same questions to go on, or name another folder"
                )
            given = record.get("answer")
            known = {name: given[name] for name in _FIELDS if name in given} if isinstance(given, dict) else {}
            if "text" not in known or not all(isinstance(value, _KINDS[name]) for name, value in known.items()):
                raise ConfigError(f"line {number} of {file.path!r} holds no answer: remove the line, or --overwrite")
            found[_new(found, place, file, number)] = Answer(**known)
        return found

    def add_answer(self, place: Place, question: Question, answer: Answer) -> None:
        """Write an answer."""
        assert self._answers is not None
        index, turn = place
        self._answers.write({
            "index": index, "turn": turn, "id": question.id, "category": question.category,
            "question": question.turns[turn - 1], "answer": answer.to_json(), "settings": self._settings,
        })  # fmt: skip

    def begin_verdicts(self, settings: Record | None) -> None:
        """Empty their file where --overwrite asks for it; from now on new ones are written with `settings`.

        Args:
            settings: what decides a verdict; None when nothing is judged.

        Raises:
            ConfigError: the verdicts there were given with other settings.
        """
        self._verdicts.begin()
        if settings is None:
            return
        self._verdict_settings = settings
        for number, record in self._verdicts.records() if self._verdicts.resume else ():
            check_settings(self._verdicts.path, number, record, settings)

    def known_verdicts(self, questions: Sequence[Question], items: Sequence[Item]) -> dict[Place, Verdict]:
        """The verdicts on `items` that are there; those on others are left alone.

        Args:
            questions: all of the question file.

        Raises:
            ConfigError: something there is no verdict on these answers.
        """
        mine = {(item.index, item.turn): item for item in items}
        found: dict[Place, Verdict] = {}
        file = self._verdicts
        for number, record in file.records() if file.resume else ():
            place, question = self._place(file, number, record, questions)
            item = mine.get(place)
            if item is not None and record.get("answer") != item.fingerprint:
                raise ConfigError(
                    f"line {number} of {file.path!r} is a verdict on another answer to question {question.id}: give the same "
                    "answers to go on, or name another folder"
                )
            given = record.get("verdict")
            try:
                verdict = as_verdict(given if isinstance(given, dict) else {}, self._task.rubric(question.category))
            except JudgeError as error:
                raise ConfigError(
                    f"line {number} of {file.path!r} holds no verdict: remove the line, or --overwrite"
                ) from error
            found[_new(found, place, file, number)] = verdict
        return {place: verdict for place, verdict in found.items() if place in mine}

    def add_verdict(self, item: Item, verdict: Verdict) -> None:
        """Write a verdict."""
        self._verdicts.write({
            "index": item.index, "turn": item.turn, "id": item.id, "category": item.category,
            "answer": item.fingerprint, "verdict": verdict.to_json(), "settings": self._verdict_settings,
        })  # fmt: skip

    def write(self, name: str, text: str) -> None:
        """Write a whole file, or leave the one that is there."""
        new = self.path / f".{name}.new"
        try:
            new.write_text(text, encoding="utf-8")
            os.replace(new, self.path / name)
        finally:
            with suppress(OSError):
                new.unlink()

    def remove(self, name: str) -> None:
        """Remove a file that is out of date."""
        (self.path / name).unlink(missing_ok=True)

    def _place(
        self, file: AnswerFile, number: int, record: Record, questions: Sequence[Question]
    ) -> tuple[Place, Question]:
        """The question and turn a record is about."""
        index, turn = record.get("index"), record.get("turn")
        whole = isinstance(index, int) and isinstance(turn, int) and not isinstance(index, bool)
        if whole and index in range(len(questions)) and turn in range(1, self._task.turns + 1):
            question = questions[index]  # type: ignore[index]
            if record.get("id") == question.id:
                return (int(index), int(turn)), question  # type: ignore[arg-type]
        raise ConfigError(
            f"line {number} of {file.path!r} is about {self._task.id_field} {record.get('id')!r:.60}, turn {turn!r:.20}, which the "
            "questions do not have there: give the same --questions to go on, or name another folder"
        )


def _new(found: dict[Place, Answer] | dict[Place, Verdict], place: Place, file: AnswerFile, number: int) -> Place:
    if place in found:
        raise ConfigError(
            f"line {number} of {file.path!r} holds question {place[0]}, turn {place[1]} a second time: remove one of the lines"
        )
    return place
