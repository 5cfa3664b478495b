"""`raindecode eval --task just-eval|mt-bench`: answers to the questions, their verdicts, and a summary."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from raindecode.commands.common import raise_first, say
from raindecode.commands.eval_folder import SUMMARY, VERDICTS, EvalFolder
from raindecode.decoder import Decoder
from raindecode.errors import ConfigError, JudgeError, JudgeUnavailableError
from raindecode.judging.answering import answer_questions
from raindecode.judging.judges import Judge
from raindecode.judging.layouts import Answer, Place, published, read_answers
from raindecode.judging.run import judge_all
from raindecode.judging.summary import Score, Summary, summarise
from raindecode.judging.tasks import Question, Task
from raindecode.judging.verdicts import Verdict
from raindecode.policy.policy import Policy
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling

Record = dict[str, Any]
_WIDTH = 120  # of the table where the output is no terminal


@dataclass(frozen=True)
class Answerer:
    """Who answers.

    Attributes:
        load: makes the decoder.
        label: what the published files call it.
        settings: what decides an answer, besides what the decoder says of itself.
    """

    load: Callable[[], Decoder]
    label: str
    search: Sampling | RAIN
    policy: Policy
    max_new_tokens: int
    seed: int
    settings: Record


@dataclass
class InstructionRun:
    """One run of an instruction task.

    Attributes:
        questions: all of the file.
        chosen: that this run is about.
        answerer: None where `given` holds answers.
        given: published files with answers.
    """

    task: Task
    questions: Sequence[Question]
    chosen: Sequence[Question]
    folder: EvalFolder
    answerer: Answerer | None
    given: Sequence[str]
    judge: Judge | None
    as_json: bool

    def run(self) -> None:
        """Answer, judge, and show what came of it.

        Raises:
            RainDecodeError: answers or verdicts failed; the others have been written, and so has the summary.
            JudgeUnavailableError: the judge cannot be asked; answers and the verdicts there are have been written.
        """
        failed: dict[Place, BaseException] = {}
        if self.answerer is None:
            answers, model = read_answers(self.task, self.given, self.questions)
            self.folder.begin_verdicts(self._verdict_settings)
        else:
            answers, failed = self._answer(self.answerer)
            model = self.answerer.label
        items = [
            self.task.item(question, turn, [answers[question.index, t].text for t in range(1, turn + 1)])
            for question in self.chosen
            for turn in range(1, self.task.turns + 1)
            if all((question.index, t) in answers for t in range(1, turn + 1))
        ]
        if not items and not failed:
            raise ConfigError("--answers holds no answer to the questions chosen: see --limit and --category")
        verdicts: dict[Place, Verdict] = {}
        lost: list[JudgeError] = []
        if self.judge is not None:
            verdicts, lost = self._judge(self.judge, items)
        summary = summarise(self.task, self.chosen, answers, verdicts, model=model)
        judged = {} if self.judge is None else self.judge.settings
        data = {**summary.to_json(), **judged, "failed_answers": len(failed), "failed_verdicts": len(lost)}
        self.folder.write(SUMMARY, json.dumps(data, indent=2) + "\n")
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=_WIDTH)
        if summary.scores:
            console.print(summary_table(self.task, summary))
        else:
            console.print(f"{summary.answers} answers to {summary.questions} questions; none judged")
        if self.as_json:
            console.out(json.dumps(data), highlight=False)
        if failed:
            raise_first(list(failed.values()), self.task.turns * len(self.chosen), "answers")
        if lost:
            raise_first(lost, len(items), "verdicts")

    @property
    def _verdict_settings(self) -> Record | None:
        if self.judge is None:
            return None
        rubrics = sorted(rubric.fingerprint for rubric in self.task.rubrics.values())
        return {"task": self.task.name, **self.judge.settings, "rubrics": rubrics}

    def _answer(self, answerer: Answerer) -> tuple[dict[Place, Answer], dict[Place, BaseException]]:
        decoder = answerer.load()
        settings = {
            "task": self.task.name, "dtype": decoder.dtype, "device": decoder.engine.runner.device.type, "exact": decoder.exact,
            **answerer.settings,
        }  # fmt: skip
        there = self.folder.begin_answers(self.questions, settings)
        self.folder.begin_verdicts(self._verdict_settings)
        for name in (SUMMARY, *published(self.task, (), {}, "")):
            self.folder.remove(name)  # they would not be of this run
        by_index = {question.index: question for question in self.questions}
        total = len(self.chosen) * self.task.turns
        known = sum(place[0] in {question.index for question in self.chosen} for place in there)
        say(f"{self.task.name}: {total} answers" + (f", {known} of them there already" if known else ""))
        finished = known

        def write(place: Place, answer: Answer) -> None:
            nonlocal finished
            self.folder.add_answer(place, by_index[place[0]], answer)
            finished += 1

        try:
            answers, failed = answer_questions(
                decoder, self.task, self.chosen, search=answerer.search, policy=answerer.policy,
                max_new_tokens=answerer.max_new_tokens, seed=answerer.seed, known=there, on_answer=write,
            )  # fmt: skip
        except KeyboardInterrupt:
            say(f"{finished} of {total} answers had finished; --resume goes on from there")
            raise
        for name, text in published(self.task, self.questions, answers, answerer.label).items():
            self.folder.write(name, text)
        return answers, failed

    def _judge(self, judge: Judge, items: Sequence[Any]) -> tuple[dict[Place, Verdict], list[JudgeError]]:
        verdicts = self.folder.known_verdicts(self.questions, items)
        self.folder.remove(SUMMARY)
        left = [item for item in items if (item.index, item.turn) not in verdicts]
        say(f"judging {len(items)} answers" + (f", {len(verdicts)} of them judged already" if verdicts else ""))

        def write(at: int, verdict: Verdict) -> None:
            self.folder.add_verdict(left[at], verdict)
            verdicts[left[at].index, left[at].turn] = verdict

        lost: list[JudgeError] = []
        try:
            for item, outcome in zip(left, judge_all(judge, left, write), strict=True):
                if isinstance(outcome, JudgeError):
                    lost.append(JudgeError(f"{item.name}: {outcome}"))
        except JudgeUnavailableError as error:
            raise JudgeUnavailableError(
                f"{error}; {len(verdicts)} of {len(items)} verdicts are in {str(self.folder.path / VERDICTS)!r}: --resume goes on "
                "from there"
            ) from error
        except KeyboardInterrupt:
            say(f"{len(verdicts)} of {len(items)} verdicts were there; --resume goes on from there")
            raise
        return verdicts, lost


def summary_table(task: Task, summary: Summary) -> Table:
    """The scores as a table: of just-eval by aspect, of mt-bench by category and turn."""
    length = f"answers of {summary.characters:,.0f} characters on average" if summary.characters is not None else ""
    table = Table(
        title=f"{summary.task}, {summary.model}: {summary.verdicts} verdicts on {summary.answers} answers",
        caption=f"mean scores with 95 % intervals (Student's t over questions); {length}",
    )
    table.add_column("")
    if task.turns == 1:
        for name in ("score", "questions"):
            table.add_column(name, justify="right")
        for category, row in summary.scores.items():
            for name, score in row.items():
                label = f"mean of {len(row) - 1} ({category})" if name == "mean" else name
                table.add_row(label, _cell(score), str(score.n), end_section=name == list(row)[-1])
        return table
    columns = [*(f"turn {turn}" for turn in range(1, task.turns + 1)), "mean"]
    for name in (*columns, "questions"):
        table.add_column(name, justify="right")
    for category, scores in summary.scores.items():
        most = max(score.n for score in scores.values())
        table.add_row(category, *(_cell(scores.get(name)) for name in columns), str(most))
    return table


def _cell(score: Score | None) -> str:
    if score is None:
        return "–"
    if score.mean.interval is None:
        return f"{score.mean.mean:.2f}"
    low, high = score.mean.interval
    return f"{score.mean.mean:.2f}  [{low:.2f}, {high:.2f}]"


def misplaced(task: str, options: Mapping[str, Any]) -> None:
    """Refuse options that say nothing about a task.

    Args:
        options: by name, None (or False) where not given.

    Raises:
        ConfigError: one was given.
    """
    named = [name for name, value in options.items() if value is not None and value is not False]
    if named:
        raise ConfigError(f"{', '.join(named)} does not belong to --task {task}: drop it")
