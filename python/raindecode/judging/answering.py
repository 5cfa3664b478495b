"""A decoder answers the questions of a task, turn by turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from raindecode.decoder import Decoder
from raindecode.errors import PromptError
from raindecode.judging.layouts import Answer, Place
from raindecode.judging.tasks import Question, Task
from raindecode.policy.policy import Policy
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling
from raindecode.types import Completion, Request

NO_ANSWER: Final = "(no answer)"
"""What stands in later prompts for an answer without any text."""
_LEFT = 8  # an answer leaves at least one part in so many of the context to each later turn's answer


def answer_questions(
    decoder: Decoder, task: Task, questions: Sequence[Question], *, search: Sampling | RAIN, policy: Policy,
    max_new_tokens: int, seed: int = 0, known: Mapping[Place, Answer] | None = None,
    on_answer: Callable[[Place, Answer], None] | None = None, progress: bool | None = None,
) -> tuple[dict[Place, Answer], dict[Place, BaseException]]:  # fmt: skip
    """Answer all questions: the first turns together, then the second ones, whose prompts hold the first turns and their answers.

    Turn t of the question at position i has the seed `seed` + i * turns + t - 1. An answer has at most `max_new_tokens` tokens and
    what the context has room for, less what later turns need: their questions, and an eighth of the context for each answer.

    Args:
        known: answers of an earlier run; these are not run.
        on_answer: called with each other answer as it finishes.
        progress: as in Decoder.generate.
    Returns:
        The answers, and why others are missing: such as a prompt longer than the context.

    Raises:
        ConfigError: a setting is not allowed.
    """
    answers = dict(known or {})
    failed: dict[Place, BaseException] = {}
    for turn in range(1, task.turns + 1):
        left: list[tuple[Place, Request]] = []
        for question in questions:
            place = (question.index, turn)
            if place in answers:
                continue
            before = [answers.get((question.index, earlier)) for earlier in range(1, turn)]
            said = [answer.text for answer in before if answer is not None]
            if len(said) < len(before):
                failed[place] = PromptError(f"question {question.id}, turn {turn}: the turn before it has no answer")
                continue
            try:
                limit = _limit(decoder, question, turn, said, search, policy, max_new_tokens)
                [request] = decoder.requests(
                    [conversation(question.turns[:turn], said)], search=search, policy=policy, max_new_tokens=limit,
                    seed=seed + question.index * task.turns + turn - 1,
                )  # fmt: skip
            except PromptError as error:
                said_of = str(error).removeprefix("prompt 0 ")
                failed[place] = PromptError(f"question {question.id}, turn {turn}, {said_of}")
                continue
            left.append((place, request))
        requests = [request for _, request in left]
        for at, outcome in decoder.stream(requests, search=search, progress=progress):
            place, request = left[at]
            if not isinstance(outcome, Completion):
                failed[place] = outcome
                continue
            answers[place] = Answer(
                text=outcome.text.strip(), model_input=request.prompt_text, finish_reason=outcome.finish_reason,
                tokens=len(outcome.token_ids), seed=outcome.seed, time=round(time.time(), 3),
            )  # fmt: skip
            if on_answer is not None:
                on_answer(place, answers[place])
    return answers, failed


def conversation(questions: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    """Chat messages of the questions with the answers given between them; there is one answer fewer.

    An empty answer is written as NO_ANSWER, because a conversation has no empty messages.
    """
    messages = []
    for at, question in enumerate(questions):
        messages.append({"role": "user", "content": question})
        if at < len(answers):
            messages.append({"role": "assistant", "content": answers[at] or NO_ANSWER})
    return messages


def _limit(
    decoder: Decoder, question: Question, turn: int, said: Sequence[str], search: Sampling | RAIN, policy: Policy,
    max_new_tokens: int,
) -> int:  # fmt: skip
    """Most tokens of the answer at a turn, so that the later turns fit behind it."""
    later = len(question.turns) - turn
    if not later:
        return max_new_tokens
    context = decoder.context_length
    whole = conversation(question.turns, [*said, *["."] * later])
    try:
        [last] = decoder.requests([whole], search=search, policy=policy, max_new_tokens=1)
    except PromptError:  # no room for them anyway
        return max_new_tokens
    return max(1, min(max_new_tokens, context - len(last.prompt_ids) - later * (context // _LEFT)))
