"""Evaluators: (prompt, response) -> a score in [-1, 1]. RAIN's self-evaluation, a Python callable, or a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from raindecode.engine.branch import Branch
from raindecode.engine.types import Got, HostCall, Want
from raindecode.errors import ConfigError, EvaluatorError, ModelError
from raindecode.search.context import SearchContext
from raindecode.text import Codec

ScoreFunction = Callable[[list[tuple[str, str]]], Sequence[float]]


@dataclass(frozen=True)
class JudgeTemplate:
    """A multiple-choice question a model answers about a dialogue.

    The evaluation prompt is `header + exchange + question`; the next token is the verdict. Asked in two orders, the
    questions come last, so that the prompts share all tokens but their ends (Li et al. 2024, section 3.4 of RAIN).

    Attributes:
        header: instruction and few-shot verdicts.
        turn: the exchange, as in ChatFormat.
        good_first: question whose first option is the good one.
        good_second: the same with the options swapped; None asks in one order only.
        letters: the option letters, first and second.
    """

    header: str
    turn: str
    good_first: str
    good_second: str | None
    letters: tuple[str, str] = ("A", "B")

    def prompts(self, prompt: str, reply: str) -> list[str]:
        """The evaluation prompts, one per order."""
        stem = self.header + self.turn.replace("{prompt}", prompt) + reply
        questions = [self.good_first] if self.good_second is None else [self.good_first, self.good_second]
        return [stem + question for question in questions]


class Evaluator(Protocol):
    """Scores responses. A generator, so that evaluation prompts share forwards with everything else."""

    def evaluate(self, context: SearchContext, prompt: str, response: str) -> Generator[Any, Any, float]:
        """Score one response to one prompt, from -1 (bad) to 1 (good)."""
        ...


@dataclass(frozen=True)
class SelfEvaluation:
    """The language model judges its own text, the options asked in both orders.

    a = [p(good) > p(bad)] with the good option first, b the same with it second; score = 2 ((a + b) / 2 - 1/2), so in
    {-1, 0, 1}. Ties count as bad. With one order the score is -1 or 1. Where several models are mixed the reference judges, or
    the first model whose weight is not 0. Source: RAIN, section 3.4 and official code.
    """

    template: JudgeTemplate

    def evaluate(self, context: SearchContext, prompt: str, response: str) -> Generator[Any, Any, float]:
        cut, letters, constant = _read_in_context(context.codec, self.template)
        if context.request.removed:
            response = f" {response}"  # what stood before it in the prompt's own format was taken off
        branches: list[Branch] = []
        for text in self.template.prompts(prompt, response):
            ids = context.codec.encode(text)
            _check_room(context, len(ids))
            branches.append(context.open_judge(ids[: len(ids) - cut]))
        context.keep_for_judge(constant)
        answers: list[Got] = yield [Want(branch, gather=letters) for branch in branches]
        context.ledger.measure()  # evaluation prompts are where a request holds most
        for branch in branches:
            branch.release()
        good = 0
        for order, answer in enumerate(answers):
            first, second = answer.gathered
            good += first > second if order == 0 else second > first
        return 2.0 * (good / len(answers) - 0.5)


@dataclass(frozen=True, eq=False)  # hashed by identity: a function of your own need not be hashable
class CallableEvaluator:
    """A function of your own: a list of (prompt, response) to as many scores in [-1, 1].

    Called once for all responses that are ready, of all requests.
    """

    function: ScoreFunction

    def evaluate(self, context: SearchContext, prompt: str, response: str) -> Generator[Any, Any, float]:
        try:
            (score,) = yield HostCall(self._scores, [(prompt, response)])
        except GeneratorExit:
            raise
        except Exception as error:
            raise EvaluatorError(
                f"the evaluator {_name(self.function)} failed: {type(error).__name__}: {error}"
            ) from error
        return checked_score(score, _name(self.function))

    def _scores(self, pairs: list[tuple[str, str]]) -> Sequence[float]:
        return self.function(pairs)


class ClassifierEvaluator:
    """A sequence classifier of transformers as evaluator: score = 2 p(good label) - 1.

    Args:
        model: local folder or hub id of a sequence-classification model.
        good_label: name (config.id2label) or index of the label that means good.
        batch_size: responses of one forward.

    Raises:
        ModelError: the model does not load or has no such label.
    """

    def __init__(self, model: str, good_label: str | int, *, batch_size: int = 32, device: str = "cpu") -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self._model = AutoModelForSequenceClassification.from_pretrained(model).to(device).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ModelError(f"no sequence classifier could be loaded from {model!r}: {error}") from error
        names = {str(name): int(index) for index, name in self._model.config.id2label.items()}
        index = names.get(good_label) if isinstance(good_label, str) else good_label
        if index is None or not 0 <= index < len(names):
            raise ModelError(f"{model!r} has no label {good_label!r}; its labels are {', '.join(names)}")
        self._good = index
        self._batch_size = batch_size
        self._callable = CallableEvaluator(self.scores)

    def scores(self, pairs: list[tuple[str, str]]) -> list[float]:
        """Scores of (prompt, response) pairs."""
        import torch

        result: list[float] = []
        for start in range(0, len(pairs), self._batch_size):
            part = pairs[start : start + self._batch_size]
            inputs = self._tokenizer(
                [p for p, _ in part], [r for _, r in part], padding=True, truncation=True, return_tensors="pt"
            ).to(self._model.device)
            with torch.inference_mode():
                probs = self._model(**inputs).logits.float().softmax(-1)
            result += (2 * probs[:, self._good] - 1).tolist()
        return result

    def evaluate(self, context: SearchContext, prompt: str, response: str) -> Generator[Any, Any, float]:
        return self._callable.evaluate(context, prompt, response)


def as_evaluator(given: Evaluator | ScoreFunction | JudgeTemplate) -> Evaluator:
    """What a user passes as `evaluator`, as an Evaluator.

    Raises:
        ConfigError: it is none of: an Evaluator, a function, a JudgeTemplate.
    """
    if isinstance(given, JudgeTemplate):
        return SelfEvaluation(given)
    if hasattr(given, "evaluate"):
        return given
    if callable(given):
        return CallableEvaluator(given)
    raise ConfigError(
        f"evaluator is a {type(given).__name__}; allowed: a function (pairs -> scores), a JudgeTemplate, or an object with evaluate()"
    )


def checked_score(score: Any, name: str) -> float:
    """`score` as a float in [-1, 1].

    Raises:
        EvaluatorError: it is something else.
    """
    try:
        value = float(score)
    except (TypeError, ValueError) as error:
        raise EvaluatorError(
            f"the evaluator {name} returned {score!r}; allowed: a number from -1 to 1 per response"
        ) from error
    if not (math.isfinite(value) and -1.0 <= value <= 1.0):
        raise EvaluatorError(f"the evaluator {name} returned {value}; allowed: a number from -1 to 1 per response")
    return value


class _InContext(NamedTuple):
    """What a template comes to with a tokenizer.

    Attributes:
        cut, letters: see Codec.options.
        constant: ids that every prompt of it begins with.
    """

    cut: int
    letters: list[int]
    constant: tuple[int, ...]


_known: WeakKeyDictionary[Codec, dict[JudgeTemplate, _InContext]] = WeakKeyDictionary()


def _read_in_context(codec: Codec, template: JudgeTemplate) -> _InContext:
    """Option tokens and constant tokens of a template with this tokenizer, found once."""
    known = _known.setdefault(codec, {})
    if template not in known:
        contexts = [codec.options(text, template.letters) for text in template.prompts("Hello.", " Hi.")]
        if any(found != contexts[0] for found in contexts):
            raise ModelError(
                "the two questions of the evaluation template lead to different option tokens: end both the same way"
            )
        known[template] = _InContext(*contexts[0], judge_prefix(codec, template))
    return known[template]


def judge_prefix(codec: Codec, template: JudgeTemplate) -> tuple[int, ...]:
    """Token ids that every evaluation prompt begins with: instruction and few-shot verdicts."""
    return codec.common_prefix(lambda said: template.prompts(said, " Hi.")[0])


def _check_room(context: SearchContext, length: int) -> None:
    """Refuse an evaluation prompt the model has no positions for, before it reaches the shared forward."""
    config = context.first_model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and length > room:
        raise EvaluatorError(
            f"the evaluation prompt has {length} tokens, the context of the model {room}: "
            "shorten the template's header, the prompt or max_new_tokens"
        )


def _name(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
