"""Requests and completions: what goes into a decoder and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from raindecode.hidden_edits import EditPlan
from raindecode.mixture import SINGLE, MeasuredAnswer, Mix

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability (natural log) under the policy's distribution, before temperature and filters."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class Stats:
    """Exact counters of one request; they do not depend on the machine.

    Attributes:
        model_steps: batched forwards the request took part in.
        tokens_processed: distinct token prefixes it had evaluated, whatever was cached or shared; each once per model of its
            mixture.
        tokens_charged: rows run for it.
        kv_tokens_peak: most KV tokens its branches held together.
        iterations: RAIN search iterations.
        evaluations: verdicts computed (not those read from the request's cache).
        seconds: wall time by phase: model, plan, sample. The time of a shared step is divided by rows.
    """

    model_steps: int = 0
    tokens_processed: int = 0
    tokens_charged: int = 0
    kv_tokens_peak: int = 0
    iterations: int = 0
    evaluations: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptLogprobs:
    """What a policy says of a text.

    Attributes:
        prompt: as given (text, or the decoded ids).
        token_ids: the prompt's.
        logprobs: of every token behind those before it; None of the first, and of all before the place where scoring began.
        top_logprobs: the likeliest tokens at every place, the likeliest first, when asked for; empty where there is no logprob.
    """

    prompt: str
    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    top_logprobs: list[list[TokenLogprob]] | None
    stats: Stats


@dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        prompt: the prompt as given (text, or the decoded ids).
        text: the answer, without stop string and special tokens.
        token_ids: every generated token that counts towards the answer, the one that ended it included.
        finish_reason: "eos", "stop" (a stop string or stop token) or "length".
        logprobs: per token, when asked for.
        top_logprobs: the likeliest tokens at every place, when asked for.
        prompt_logprobs: of the prompt's tokens, when asked for.
        mixture: plain sampling with DeRa(stats=True): the mixture at every token.
        value: RAIN: the mean evaluator score of the last chosen set, in [-1, 1]. A sweep with an evaluator: its score.
        tree: RAIN: the search trees as plain data, when asked for.
    """

    prompt: str
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    seed: int
    stats: Stats
    logprobs: list[TokenLogprob] | None = None
    top_logprobs: list[list[TokenLogprob]] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    mixture: MeasuredAnswer | None = None
    value: float | None = None
    tree: list[dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        plain = asdict(self)
        for name in ("top_logprobs", "prompt_logprobs"):  # asked for by few
            if plain[name] is None:
                del plain[name]
        return plain


@dataclass(frozen=True)
class Request:
    """One prompt with everything that decides its answer.

    Attributes:
        prompt: user text as given.
        prompt_text: what the model is fed (few-shot prefix and turn markers added).
        prompt_ids: its token ids.
        mix: the models it is answered by.
        eos_token_ids: end-of-text ids of these models; None takes the decoder's.
        seed: names the random numbers; same request and seed, same answer (exact mode).
        stop: strings that end the answer, besides those of the search.
        edits: of hidden states; None for none.
        removed: strings that are taken out of the answer's text.
        constant: leading tokens of the prompt that every request of its format begins with.
        forced: tokens behind the prompt, of a request that scores them and generates nothing.
    """

    prompt: str
    prompt_text: str
    prompt_ids: Sequence[int]
    max_new_tokens: int
    seed: int
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    mix: Mix = SINGLE
    eos_token_ids: frozenset[int] | None = None
    edits: EditPlan | None = None
    removed: tuple[str, ...] = ()
    constant: int = 0
    forced: tuple[int, ...] = ()
