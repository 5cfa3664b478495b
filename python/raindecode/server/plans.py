"""Plans: what the body of a request comes to, checked and written as token ids. Runs in one thread of its own."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from uuid import uuid4

from raindecode.errors import ConfigError, PromptError
from raindecode.policy.policy import Policy
from raindecode.requests import RequestMaker
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling
from raindecode.search.scoring import Scoring
from raindecode.server.align import Align
from raindecode.server.catalog import Catalog
from raindecode.server.faults import Fault
from raindecode.server.jobs import Choice
from raindecode.server.protocol import ChatBody, CompletionBody
from raindecode.server.settings import ServerSettings
from raindecode.types import Request

_SEEDS = 2**64
_MOST_LOGPROBS = 2**20  # of one request: about 150 bytes each until the answer is sent
_TOKEN_CHARACTERS = (
    64  # a prompt with more characters than this per token of the context does not fit, and is not tokenised
)


@dataclass(frozen=True)
class Plan:
    """A request that can be run.

    Attributes:
        id, created, model: of the response.
        choices: answers to make: the first prompt's n, then the next's.
        prompts: one request per prompt, for what they are counted and echoed by.
        echo: give the prompt back before the answer.
        logprobs: report log-probabilities; top_logprobs: of so many of the likeliest tokens at each place.
        token_ids: give token ids.
        usage_chunk: end a stream with a chunk of counters.
        warnings: what was not taken as it was given.
    """

    id: str
    created: int
    model: str
    choices: tuple[Choice, ...]
    prompts: tuple[Request, ...]
    echo: bool
    logprobs: bool
    top_logprobs: int
    token_ids: bool
    streams: bool
    usage_chunk: bool
    align: Align
    warnings: tuple[str, ...] = ()
    started: float = field(default_factory=time.perf_counter)

    @property
    def n(self) -> int:
        """Answers per prompt."""
        return len(self.choices) // len(self.prompts)

    @property
    def holds_back(self) -> bool:
        """Whether a stream has to wait for whole answers."""
        return self.echo and self.logprobs

    @property
    def headers(self) -> dict[str, str]:
        """Of the response."""
        return {"X-Align-Warning": "; ".join(self.warnings)} if self.warnings else {}

    @property
    def label(self) -> str:
        """How it is answered, for logs and metrics."""
        parts = ["rain" if self.align.searches else "sampling"]
        parts += [name for name in ("dera", "edits", "urial") if getattr(self.align, name)]
        return "+".join(parts)


class Planner:
    """Makes plans. Not for several threads at a time.

    Args:
        maker: of the decoder, for this thread alone.
    """

    def __init__(self, catalog: Catalog, settings: ServerSettings, maker: RequestMaker) -> None:
        self._catalog = catalog
        self._settings = settings
        self._maker = maker
        self.codec = maker.ids.codec

    def chat(self, body: ChatBody) -> Plan:
        """Raises Fault when it cannot be answered."""
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise Fault(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
        limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        messages = [message.model_dump() for message in body.messages]
        return self._plan(
            body, "chatcmpl", [messages], "messages", limit, chat=True, echo=False,
            logprobs=bool(body.logprobs), top=body.top_logprobs or 0,
        )  # fmt: skip

    def completion(self, body: CompletionBody) -> Plan:
        """Raises Fault when it cannot be answered."""
        single = isinstance(body.prompt, str) or (bool(body.prompt) and isinstance(body.prompt[0], int))
        prompts: Sequence[Any] = [body.prompt] if single else body.prompt
        if not prompts:
            raise Fault(400, "prompt is an empty list; give at least one text or list of token ids", param="prompt")
        return self._plan(
            body, "cmpl", prompts, "prompt", body.max_tokens, chat=False, echo=bool(body.echo),
            logprobs=body.logprobs is not None, top=body.logprobs or 0,
        )  # fmt: skip

    def _plan(
        self, body: ChatBody | CompletionBody, kind: str, prompts: Sequence[Any], field: str, limit: int | None, *, chat: bool,
        echo: bool, logprobs: bool, top: int,
    ) -> Plan:  # fmt: skip
        settings, n = self._settings, body.n or 1
        if len(prompts) * n > settings.max_answers:
            raise Fault(
                400, f"{len(prompts)} prompts times n = {n} are {len(prompts) * n} answers; allowed: up to {settings.max_answers} per "
                "request", param="n",
            )  # fmt: skip
        align = self._catalog.align_of(body.model, body.align, _flat_weight(body))
        warnings: list[str] = []
        scores_only = limit == 0
        if scores_only and not echo:
            raise Fault(400, "max_tokens is 0, which is allowed with echo only; give 1 or more", param="max_tokens")
        self._require_short(prompts, field)
        search, policy = self._chosen(body, align, chat, logprobs, top, echo, scores_only, warnings)
        wanted = 0 if scores_only else self._limit(limit)
        made = self._requests(body, prompts, field, search, policy, wanted)
        if limit and any(request.max_new_tokens < wanted for request in made):
            warnings.append(f"max_tokens {limit} was cut to what the context leaves")
        if logprobs:
            places = n * sum(one.max_new_tokens + (len(one.prompt_ids) if echo else 0) for one in made)
            if places * (1 + top) > _MOST_LOGPROBS:
                raise Fault(
                    400, f"logprobs of up to {places} tokens with {top} others each are {places * (1 + top)} numbers; allowed: up to "
                    f"{_MOST_LOGPROBS} per request: ask for fewer at a time", param="logprobs",
                )  # fmt: skip
        seed = secrets.randbits(63) if body.seed is None else body.seed % _SEEDS
        choices = [Choice(replace(r, seed=(seed + k) % _SEEDS), search) for r in made for k in range(n)]
        return Plan(
            id=f"{kind}-{uuid4().hex}", created=int(time.time()), model=body.model or self._catalog.name, choices=tuple(choices),
            prompts=tuple(made), echo=echo, logprobs=logprobs, top_logprobs=top, token_ids=bool(body.return_token_ids),
            streams=bool(body.stream),
            usage_chunk=body.stream_options is not None and bool(body.stream_options.include_usage), align=align,
            warnings=tuple(warnings),
        )  # fmt: skip

    def _require_short(self, prompts: Sequence[Any], field: str) -> None:
        """Texts nobody's tokenizer makes short enough: reading them would hold up everybody else.

        Raises:
            Fault: one is longer.
        """
        context = max(self._maker.contexts)
        most = context * max(_TOKEN_CHARACTERS, self._longest_token)
        for prompt in prompts:
            if isinstance(prompt, str):
                length = len(prompt)
            else:
                length = sum(_length_of(part) for part in prompt)
            if length > most:
                raise Fault(
                    400, f"a prompt has {length} characters; the context of {context} tokens holds at most {most}: shorten it", param=field,
                    code="context_length_exceeded",
                )  # fmt: skip

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.codec.tokenizer.get_vocab()), default=1)

    def _chosen(
        self, body: ChatBody | CompletionBody, align: Align, chat: bool, logprobs: bool, top: int, echo: bool, scores_only: bool,
        warnings: list[str],
    ) -> tuple[Sampling | RAIN | Scoring, Policy]:  # fmt: skip
        shape: dict[str, Any] = {
            "temperature": body.temperature, "top_k": None if body.top_k is None else max(0, body.top_k), "top_p": body.top_p,
            "min_p": body.min_p, "repetition_penalty": body.repetition_penalty,
        }  # fmt: skip
        given = {name: value for name, value in shape.items() if value is not None}
        sampling = Sampling(
            **given,
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
            top_logprobs=top,
            prompt_logprobs=logprobs and echo,
        )
        try:
            search, policy = self._catalog.choose(align, sampling, chat=chat)
        except ConfigError as error:
            raise Fault(400, str(error), param="align") from error
        if scores_only:
            return Scoring(top), policy
        if isinstance(search, RAIN):
            if logprobs:
                raise Fault(
                    400, "RAIN chooses tokens by search, so they have no log-probability; leave logprobs out, or ask for search "
                    "'sampling'", param="logprobs",
                )  # fmt: skip
            if given or body.ignore_eos:
                warnings.append(f"RAIN takes no {', '.join([*given, *(['ignore_eos'] if body.ignore_eos else [])])}")
        return search, policy

    def _limit(self, limit: int | None) -> int:
        most = self._settings.max_new_tokens
        if limit is None:
            return min(self._settings.default_new_tokens, most or self._settings.default_new_tokens)
        if most and limit > most:
            raise Fault(400, f"max_tokens is {limit}; allowed: up to {most} on this server", param="max_tokens")
        return limit

    def _requests(
        self,
        body: ChatBody | CompletionBody,
        prompts: Sequence[Any],
        field: str,
        search: Any,
        policy: Policy,
        wanted: int,
    ) -> list[Request]:
        try:
            return self._maker.fresh().make(
                prompts, search=None if isinstance(search, Scoring) else search, policy=policy, max_new_tokens=wanted, seed=0,
                stop=body.stops, stop_token_ids=tuple(body.stop_token_ids or ()), least=1 if wanted else 0,
            )  # fmt: skip
        except PromptError as error:
            code = "context_length_exceeded" if "context of" in str(error) else None
            raise Fault(400, str(error), param=field, code=code) from error
        except ConfigError as error:
            raise Fault(400, str(error)) from error


def _length_of(part: Any) -> int:
    """Characters of a message; of a token id, none."""
    if not isinstance(part, dict):
        return 0
    content = part["content"]
    return len(content) if isinstance(content, str) else sum(len(one["text"]) for one in content)


def _flat_weight(body: ChatBody | CompletionBody) -> float | None:
    """dera_lambda, or that of vllm_xargs."""
    if body.dera_lambda is not None:
        return body.dera_lambda
    given = (body.vllm_xargs or {}).get("dera_lambda")
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not abs(given) <= 1000:
        raise Fault(
            400, f"vllm_xargs.dera_lambda is {given!r:.80}; allowed: a number from -1000 to 1000", param="vllm_xargs"
        )
    return float(given)
