"""Replies: completions as OpenAI's clients read them, whole or in chunks."""

from __future__ import annotations

import json
from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from typing import Any

import raindecode
from raindecode.server.jobs import Ended, Event, Piece
from raindecode.server.plans import Plan
from raindecode.server.token_text import TokenTexts
from raindecode.types import Completion, PromptLogprobs, TokenLogprob

FINGERPRINT = f"rainkernels-{raindecode.__version__}"
_COUNTERS = ("model_steps", "tokens_processed", "tokens_charged", "kv_tokens_peak", "iterations", "evaluations")
_LEAST = -9999.0  # JSON knows no -inf: what clients use for a token that is ruled out

Outcome = Completion | PromptLogprobs


def usage(plan: Plan, outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Counters of a request: tokens as OpenAI counts them, and the decoder's own."""
    known = list(outcomes)
    prompt = sum(len(request.prompt_ids) for request in plan.prompts)
    written = sum(len(one.token_ids) for one in known if isinstance(one, Completion))
    return {
        "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
        "align": {name: sum(getattr(one.stats, name) for one in known) for name in _COUNTERS},
    }  # fmt: skip


def finish_reason(outcome: Outcome) -> str:
    """As OpenAI names it."""
    return "length" if isinstance(outcome, PromptLogprobs) or outcome.finish_reason == "length" else "stop"


class Replies:
    """Writes the response of one request.

    Args:
        chat: which of the two forms.
    """

    def __init__(self, plan: Plan, texts: TokenTexts, *, chat: bool) -> None:
        self._plan = plan
        self._texts = texts
        self._chat = chat
        self._begun: set[int] = set()
        self._written = [_Length() for _ in plan.choices]  # so far, for text_offset

    # ---- whole ----------------------------------------------------------------------------------------------------
    def whole(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """The response."""
        choices = [self._choice(i, outcome) for i, outcome in enumerate(outcomes)]
        kind = "chat.completion" if self._chat else "text_completion"
        return self._envelope(kind, choices) | {"usage": usage(self._plan, outcomes)}

    def _choice(self, index: int, outcome: Outcome) -> dict[str, Any]:
        text = outcome.text if isinstance(outcome, Completion) else ""
        made: dict[str, Any] = {"index": index}
        if self._chat:
            made["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            made["text"] = (self._echoed(index) if self._plan.echo else "") + text
        made["logprobs"] = self._logprobs(index, outcome) if self._plan.logprobs else None
        return made | self._ending(index, outcome)

    def _logprobs(self, index: int, outcome: Outcome) -> dict[str, Any]:
        tokens, likeliest = _generated(outcome)
        if self._chat:
            return {"content": self._chat_logprobs(tokens, likeliest), "refusal": None}
        before = self._prompt_logprobs(index, outcome) if self._plan.echo else _nothing()
        return _joined(before, self._text_logprobs(index, tokens, likeliest))

    # ---- a stream -------------------------------------------------------------------------------------------------
    def chunks(self, events: Iterable[Event]) -> Iterable[dict[str, Any]]:
        """What there is to send about events. Pieces of one answer that lay waiting come in one chunk."""
        for event in _merged(events):
            if event.choice not in self._begun:
                self._begun.add(event.choice)
                yield from self._opening(event)
            if isinstance(event, Piece):
                if event.text or self._plan.logprobs or self._plan.token_ids:
                    yield self._grown(event)
            else:
                ending = self._ending(event.choice, event.result)
                yield self._chunk(event.choice, self._delta(None), None, ending)

    def last_chunk(self, outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
        """The chunk of counters, where it was asked for."""
        if not self._plan.usage_chunk:
            return None
        return self._envelope(self._chunk_kind, []) | {"usage": usage(self._plan, outcomes)}

    def _opening(self, event: Event) -> Iterable[dict[str, Any]]:
        if self._chat:
            yield self._chunk(event.choice, {"delta": {"role": "assistant", "content": ""}}, None)
        elif self._plan.holds_back:  # the prompt's log-probabilities come with the whole answer
            assert isinstance(event, Ended)
            logprobs = self._prompt_logprobs(event.choice, event.result)
            yield self._chunk(event.choice, {"text": self._echoed(event.choice)}, logprobs)
            tokens, likeliest = _generated(event.result)
            if isinstance(event.result, Completion):
                yield self._grown(
                    Piece(event.choice, event.result.text, list(tokens), [list(one) for one in likeliest])
                )
        elif self._plan.echo:
            yield self._chunk(event.choice, {"text": self._echoed(event.choice)}, None)

    def _grown(self, piece: Piece) -> dict[str, Any]:
        logprobs: dict[str, Any] | None = None
        if self._plan.logprobs and self._chat:
            logprobs = {"content": self._chat_logprobs(piece.tokens, piece.likeliest), "refusal": None}
        elif self._plan.logprobs:
            logprobs = self._text_logprobs(piece.choice, piece.tokens, piece.likeliest)
        extra = {"token_ids": [one.token_id for one in piece.tokens]} if self._plan.token_ids else {}
        return self._chunk(piece.choice, self._delta(piece.text), logprobs, extra)

    def _delta(self, text: str | None) -> dict[str, Any]:
        if self._chat:
            return {"delta": {} if text is None else {"content": text}}
        return {"text": text or ""}

    def _chunk(
        self, index: int, content: dict[str, Any], logprobs: dict[str, Any] | None, ending: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": None, **(ending or {})}
        made = self._envelope(self._chunk_kind, [choice])
        return made | {"usage": None} if self._plan.usage_chunk else made

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    # ---- parts ----------------------------------------------------------------------------------------------------
    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        plan = self._plan
        return {
            "id": plan.id, "object": kind, "created": plan.created, "model": plan.model, "system_fingerprint": FINGERPRINT,
            "choices": choices,
        }  # fmt: skip

    def _ending(self, index: int, outcome: Outcome) -> dict[str, Any]:
        made: dict[str, Any] = {"finish_reason": finish_reason(outcome), "stop_reason": None}
        align: dict[str, Any] = {"seed": self._plan.choices[index].request.seed}
        if isinstance(outcome, Completion):
            if outcome.value is not None:
                align["value"] = outcome.value
            if outcome.tree is not None:
                align["tree"] = outcome.tree
            if self._plan.token_ids:
                if not self._plan.streams:  # a stream gave them piece by piece
                    made["token_ids"] = outcome.token_ids
                made["prompt_token_ids"] = list(self._plan.choices[index].request.prompt_ids)
        return made | {"align": align}

    def _echoed(self, index: int) -> str:
        return self._plan.choices[index].request.prompt_text

    def _prompt_logprobs(self, index: int, outcome: Outcome) -> dict[str, Any]:
        scored = outcome if isinstance(outcome, PromptLogprobs) else outcome.prompt_logprobs
        assert scored is not None
        made = _nothing()
        likeliest = scored.top_logprobs or [[] for _ in scored.logprobs]
        for token, given, others in zip(scored.token_ids, scored.logprobs, likeliest, strict=True):
            self._add(index, made, token, None if given is None else given.logprob, others)
        if made["top_logprobs"]:
            made["top_logprobs"][0] = None
        return made

    def _text_logprobs(
        self, index: int, tokens: Sequence[TokenLogprob], likeliest: Sequence[Sequence[TokenLogprob]]
    ) -> dict[str, Any]:
        made = _nothing()
        for token, others in zip(tokens, likeliest, strict=True):
            self._add(index, made, token.token_id, token.logprob, others)
        return made

    def _add(
        self, index: int, made: dict[str, list[Any]], token: int, logprob: float | None, others: Sequence[TokenLogprob]
    ) -> None:
        text = self._texts.text_of(token)
        made["tokens"].append(text)
        made["token_logprobs"].append(None if logprob is None else _number(logprob))
        made["text_offset"].append(self._written[index].characters)
        best: dict[str, float] = {}
        for one in others:  # two tokens may have one text: the likelier stands for both
            best.setdefault(self._texts.text_of(one.token_id), _number(one.logprob))
        if others and logprob is not None:
            best.setdefault(text, _number(logprob))
        made["top_logprobs"].append(best)
        if not self._texts.is_special(token):  # those are in no text
            self._written[index].add(self._texts.bytes_of(token))

    def _chat_logprobs(
        self, tokens: Sequence[TokenLogprob], likeliest: Sequence[Sequence[TokenLogprob]]
    ) -> list[dict[str, Any]]:
        return [
            self._chat_token(token) | {"top_logprobs": [self._chat_token(one) for one in others]}
            for token, others in zip(tokens, likeliest, strict=True)
        ]

    def _chat_token(self, one: TokenLogprob) -> dict[str, Any]:
        raw = self._texts.bytes_of(one.token_id)
        return {"token": self._texts.text_of(one.token_id), "logprob": _number(one.logprob), "bytes": list(raw)}


class _Length:
    """Characters of bytes that come in parts. One that is not whole yet counts when it is."""

    def __init__(self) -> None:
        self.characters = 0
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def add(self, part: bytes) -> None:
        self.characters += len(self._decoder.decode(part))


def _merged(events: Iterable[Event]) -> Iterable[Event]:
    """Events with neighbouring pieces of the same answer as one."""
    last: Piece | None = None
    for event in events:
        if isinstance(event, Piece) and last is not None and last.choice == event.choice:
            last = Piece(
                last.choice, last.text + event.text, last.tokens + event.tokens, last.likeliest + event.likeliest
            )
            continue
        if last is not None:
            yield last
        last = event if isinstance(event, Piece) else None
        if last is None:
            yield event
    if last is not None:
        yield last


def event_bytes(data: Any) -> bytes:
    """One server-sent event. In ASCII: some clients take U+2028 and its like for the end of a line."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def _generated(outcome: Outcome) -> tuple[Sequence[TokenLogprob], Sequence[Sequence[TokenLogprob]]]:
    if isinstance(outcome, PromptLogprobs):
        return [], []
    tokens = outcome.logprobs or []
    return tokens, outcome.top_logprobs or [[] for _ in tokens]


def _nothing() -> dict[str, Any]:
    return {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {name: first[name] + second[name] for name in first}


def _number(logprob: float) -> float:
    return max(logprob, _LEAST)
