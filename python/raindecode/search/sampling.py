"""Plain decoding: greedy or sampled, one token per step."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from raindecode.engine.rng import name_draw
from raindecode.engine.sampler import Filter
from raindecode.engine.types import Draw, Got, Want
from raindecode.mixture import Measured, MeasuredAnswer
from raindecode.search.context import SearchContext
from raindecode.search.scoring import likeliest, score_prompt
from raindecode.settings import as_strings, as_token_ids, require_whole
from raindecode.text import TextFilter, TextStream, find_stop
from raindecode.types import Completion, FinishReason, TokenLogprob

_PURPOSE = 0


@dataclass(frozen=True)
class Sampling:
    """One token at a time from the policy's distribution.

    Attributes:
        temperature, top_k, top_p, min_p, repetition_penalty: see engine.sampler.Filter; temperature 0 is greedy.
        stop: strings that end the answer; not part of it.
        stop_token_ids: ids that end the answer, besides the model's own end-of-text ids.
        ignore_eos: go on past end-of-text tokens (benchmarks).
        logprobs: report the log-probability of every token.
        top_logprobs: and of so many of the likeliest tokens at its place.
        prompt_logprobs: report the log-probabilities of the prompt's tokens, `top_logprobs` likeliest ones among them.

    Raises:
        ConfigError: a value lies outside what is allowed.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        require_whole("top_logprobs", self.top_logprobs, 0)
        object.__setattr__(self, "stop", as_strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", as_token_ids("stop_token_ids", self.stop_token_ids))
        self.filter()

    @classmethod
    def greedy(cls, **options: Any) -> Sampling:
        """The most likely token every time."""
        return cls(temperature=0.0, **options)

    def filter(self) -> Filter:
        return Filter(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)

    def search(self, context: SearchContext) -> Generator[list[Want], list[Got], Completion]:
        """Decode one request."""
        request = context.request
        scored = (yield from score_prompt(context, self.top_logprobs)) if self.prompt_logprobs else None
        branch = context.open(request.prompt_ids)
        branch.reserve = len(request.prompt_ids) + request.max_new_tokens
        answer = _Answer(context, self)
        shape = self.filter()
        measured: list[Measured] | None = [] if request.mix.stats else None
        log_weight = 0.0
        penalised = list(request.prompt_ids) if shape.repetition_penalty != 1.0 else None
        while answer.finish_reason is None:
            counter = name_draw(0, branch.length, _PURPOSE)
            draw = Draw(shape, request.seed, counter, context=penalised, logprob=True)
            got = yield [Want(branch, draws=[draw], logits=self.top_logprobs > 0)]
            drawn, row = got[0].drawn[0], got[0].logits
            answer.push(drawn.token, drawn.logprob, [] if row is None else likeliest(row, self.top_logprobs))
            branch.append([drawn.token])
            if measured is not None and drawn.measured is not None:
                measured.append(drawn.measured)
                log_weight += _log_weight(drawn.measured, drawn.prob)
            if penalised is not None:
                penalised.append(drawn.token)
            if context.on_progress is not None:
                context.on_progress(len(answer.token_ids), 0)
        return Completion(
            prompt=request.prompt,
            text=answer.text(),
            token_ids=answer.token_ids,
            finish_reason=answer.finish_reason,
            seed=request.seed,
            stats=context.stats(),
            logprobs=answer.logprobs if self.logprobs else None,
            top_logprobs=answer.top_logprobs if self.top_logprobs else None,
            prompt_logprobs=scored,
            mixture=None if measured is None else MeasuredAnswer(measured, log_weight if shape.temperature else None),
        )


def _log_weight(measured: Measured, prob: float) -> float:
    """Log of what a token drawn with `prob` weighs under prod_i p_i^w_i."""
    pairs = zip(measured.weights, measured.logprob_models, strict=True)
    return math.fsum(w * logprob for w, logprob in pairs if w) - math.log(prob)


class _Answer:
    """Tokens and text of a growing answer; decides when it ends and streams what is safe to show."""

    def __init__(self, context: SearchContext, sampling: Sampling) -> None:
        request = context.request
        self._context = context
        self._stream = TextStream(context.codec, request.prompt_ids)
        self._stops = tuple(dict.fromkeys(sampling.stop + request.stop))
        self._eos = frozenset() if sampling.ignore_eos else context.eos_token_ids
        self._stop_ids = request.stop_token_ids | frozenset(sampling.stop_token_ids)
        self._hold = (
            max((len(s) for s in self._stops), default=1) - 1
        )  # a stop string may have begun in these characters
        self._filter = TextFilter(request.removed)
        self._shown = 0
        self._cut: int | None = None
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.top_logprobs: list[list[TokenLogprob]] = []
        self.finish_reason: FinishReason | None = None

    def push(self, token: int, logprob: float, likeliest: list[TokenLogprob]) -> None:
        self.token_ids.append(token)
        self.logprobs.append(TokenLogprob(token, logprob))
        self.top_logprobs.append(likeliest)
        if self._context.on_token is not None:
            self._context.on_token(self.logprobs[-1], likeliest)
        before = len(self._stream.text)
        if token in self._eos:
            self._end("eos")
            return
        if token in self._stop_ids:
            self._end("stop")
            return
        self._stream.push(token)
        at = find_stop(self._stream.text, self._stops, max(0, before - self._hold))
        if at >= 0:
            self._cut = at
            self._end("stop")
        elif len(self.token_ids) >= self._context.request.max_new_tokens:
            self._end("length")
        else:
            self._show(final=False)

    def text(self) -> str:
        """The answer as far as it goes."""
        return self._filter.clean(self._stream.text if self._cut is None else self._stream.text[: self._cut])

    def _end(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        if self._cut is None:
            self._stream.finish()
            at = find_stop(self._stream.text, self._stops)
            self._cut = at if at >= 0 else None
        self._show(final=True)

    def _show(self, *, final: bool) -> None:
        if self._context.on_text is None:
            return
        text = self._stream.text
        upto = max(0, len(text) - self._hold)
        visible = self.text() if final else self._filter.settled(text[:upto])
        if len(visible) > self._shown:
            self._context.on_text(visible[self._shown :])
            self._shown = len(visible)
