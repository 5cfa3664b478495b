"""RequestMaker: turns what a user asks into requests, or says what is wrong with it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, cast

from raindecode.errors import ConfigError, PromptError
from raindecode.hidden_edits import EditPlan, ModelIdentity
from raindecode.mixture import Mix
from raindecode.policy.alignez.schedule import Edits, check_fits, constant_schedules
from raindecode.policy.policy import Policy
from raindecode.policy.prompt import ChatFormat, Conversation
from raindecode.prefix_store import Constant
from raindecode.prompt_ids import PromptIds, Written, require_text
from raindecode.search.evaluator import SelfEvaluation, judge_prefix
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling
from raindecode.settings import as_strings, as_token_ids, is_whole, require_whole
from raindecode.types import Request

Prompt: TypeAlias = "str | Sequence[int] | Sequence[Mapping[str, Any]]"
"""Text, token ids that are fed as they are, or a conversation as chat messages."""


@dataclass(frozen=True)
class RequestMaker:
    """What a decoder allows its requests.

    Attributes:
        name: of the model, for messages.
        format: how plain prompts are written when neither policy nor search says.
        contexts: tokens of prompt and answer together, of every model.
        ends: end-of-text ids of every model.
        vocabulary: ids that every model has.
        identities: of every model, asked for where hidden states are edited only.

    What a plain prompt comes to in a format is remembered while a maker lives, for callers that make several lists of requests of the
    same prompts; `fresh` remembers nothing.
    """

    ids: PromptIds
    name: str
    format: ChatFormat | None
    contexts: Sequence[int]
    ends: Sequence[frozenset[int]]
    vocabulary: int
    identities: Callable[[], Sequence[ModelIdentity]]
    _written: dict[tuple[str, ChatFormat | None], Written] = field(default_factory=dict, repr=False)

    def fresh(self) -> RequestMaker:
        """The same maker without what it remembers, for those who keep one."""
        return replace(self, _written={})

    def make(
        self, prompts: Prompt | Sequence[Prompt], *, search: Sampling | RAIN | None, policy: Policy | Sequence[Policy] | None,
        max_new_tokens: int, seed: int | Sequence[int], stop: Sequence[str], stop_token_ids: Sequence[int],
        least: int = 1,
    ) -> list[Request]:  # fmt: skip
        """A request per prompt. Arguments as in Decoder.generate.

        Args:
            least: tokens to generate at the least; with 0 a prompt may fill the context, and its last token is not run.

        Raises:
            PromptError, ConfigError: something given is not allowed.
        """
        if not isinstance(prompts, (str, Sequence)):
            raise PromptError(
                f"prompts is a {type(prompts).__name__}; give a text, a list of token ids, a list of chat messages, or a list of these"
            )
        _require_search(search)
        require_whole("max_new_tokens", max_new_tokens, least)
        stop_ids = self._known_ids("stop_token_ids", as_token_ids("stop_token_ids", stop_token_ids))
        if isinstance(search, Sampling):
            self._known_ids("stop_token_ids", search.stop_token_ids)
        single = isinstance(prompts, str) or (
            len(prompts) > 0 and (is_whole(prompts[0]) or isinstance(prompts[0], Mapping))
        )
        every = cast("Sequence[Prompt]", [prompts] if single else prompts)
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(every)
        if len(seeds) != len(every):
            raise ConfigError(
                f"{len(seeds)} seeds were given for {len(every)} prompts; give one seed, or one per prompt"
            )
        policies = (
            list(policy) if isinstance(policy, Sequence) else [Policy() if policy is None else policy] * len(every)
        )
        if len(policies) != len(every):
            raise ConfigError(
                f"{len(policies)} policies were given for {len(every)} prompts; give one policy, or one per prompt"
            )
        stops = as_strings("stop", stop)
        return [
            self._request(
                prompt, i, self._format(search, policies[i]), max_new_tokens, seeds[i], stops, frozenset(stop_ids),
                self._mix(search, policies[i]), self._edits(policies[i]), least,
            )
            for i, prompt in enumerate(every)
        ]  # fmt: skip

    def _write(self, said: str | Conversation, format: ChatFormat | None, where: str) -> Written:
        if not isinstance(said, str):
            return self.ids.write(said, format, where)
        name = said, format
        if name not in self._written:
            self._written[name] = self.ids.write(said, format, where)
        return self._written[name]

    def constants(self, policy: Policy, search: Sampling | RAIN | None, system: str) -> list[Constant]:
        """What every request of a policy begins with: its prompt, and where a template judges, that one's prompt.

        Raises:
            ConfigError: as `make`, or edits are decided prompt by prompt.
            PromptError: the system text is none.
        """
        _require_search(search)
        if not isinstance(system, str) or (system and not system.strip()):
            raise PromptError(f'system is {system!r:.80}; give a text that is not white space alone, or "" for none')
        require_text(system, "system")
        format, mix = self._format(search, policy), self._mix(search, policy)
        self._edits(policy)
        assert isinstance(policy.edits, tuple)
        rows, judge = constant_schedules(policy.edits, len(self.contexts))
        found = []
        if format is not None or system:
            found.append(Constant("the prompt", self.ids.beginning(format, system), mix, rows))
        if isinstance(search, RAIN) and isinstance(search.evaluator, SelfEvaluation):
            ids = judge_prefix(self.ids.codec, search.evaluator.template)
            found.append(Constant("the judge's prompt", ids, mix.only_first, judge))
        return [constant for constant in found if constant.ids]

    def _known_ids(self, name: str, ids: tuple[int, ...]) -> tuple[int, ...]:
        if any(t >= self.vocabulary for t in ids):
            raise ConfigError(f"{name} holds {list(ids)}; allowed: ids of this vocabulary, 0 to {self.vocabulary - 1}")
        return ids

    def _mix(self, search: Sampling | RAIN | None, policy: Policy) -> Mix:
        if policy.dera is None:
            return Mix((1.0,) + (0.0,) * (len(self.contexts) - 1))
        mix = policy.dera.mix(len(self.contexts))
        return replace(mix, stats=False) if isinstance(search, RAIN) else mix  # RAIN's answers are not measured

    def _edits(self, policy: Policy) -> EditPlan | None:
        edits = policy.edits
        assert isinstance(edits, tuple)
        if not edits:
            return None
        for edit in edits:
            check_fits(edit, self.identities())
            if edit.on == "aligned" and policy.dera is None:
                raise ConfigError(
                    "an edit is for the aligned model, which takes no part without DeRa: give Policy(dera=DeRa(weight), ...) "
                    "(--lambda), or on='reference'"
                )
        return Edits(edits, len(self.contexts))

    def _format(self, search: Sampling | RAIN | None, policy: object) -> ChatFormat | None:
        if not isinstance(policy, Policy):
            raise ConfigError(f"policy is a {type(policy).__name__}; give a Policy, or one per prompt")
        if policy.prompt is not None:
            return policy.prompt
        if isinstance(search, RAIN) and search.format is not None:
            return search.format
        return self.format

    def _request(
        self, prompt: Prompt, index: int, format: ChatFormat | None, max_new_tokens: int, seed: int,
        stops: tuple[str, ...], stop_ids: frozenset[int], mix: Mix, edits: EditPlan | None, least: int,
    ) -> Request:  # fmt: skip
        where = f"prompt {index}"
        constant = 0
        said: str | Conversation | None = None
        if isinstance(prompt, str):
            if not prompt.strip():
                raise PromptError(f"{where} is empty; give at least one character that is not white space")
            said = prompt
        elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            said = Conversation.of(cast("Sequence[Mapping[str, Any]]", prompt), where)
            prompt = said.prompt
        if said is not None:
            text, ids, constant = self._write(said, format, where)
            if ids and max(ids) >= self.vocabulary:
                raise PromptError(
                    f"{where} has token id {max(ids)}, and the model has ids 0 to {self.vocabulary - 1} only: its tokenizer is of another "
                    "model; load the one it was trained with"
                )
        else:
            ids = _token_ids(prompt, where)
            if not ids or any(not 0 <= t < self.vocabulary for t in ids):
                raise PromptError(
                    f"{where} has {len(ids)} token ids; allowed: at least one, each from 0 to {self.vocabulary - 1}"
                )
            prompt = text = self.ids.codec.decode(ids)
        longest = min(context for model, context in enumerate(self.contexts) if mix.models >> model & 1)
        room = longest - len(ids)
        if room < (1 if least else -1):
            owner = self.name if len(self.contexts) == 1 else "the models that answer it"
            advice = f"shorten it to at most {longest - 1 if least else longest + 1} tokens"
            if constant >= longest:
                advice = f"{constant} of them are of the constant prompt alone: use a shorter one (policy.prompt, --prompt-file)"
            raise PromptError(
                f"{where} has {len(ids)} tokens with its format, the context of {owner} {longest}: {advice}"
            )
        if not is_whole(seed) or not 0 <= seed < 2**64:
            raise ConfigError(f"seed is {seed!r}; allowed: a whole number from 0 to 2**64 - 1")
        form = ChatFormat() if format is None else format
        ends = None if len(set(self.ends)) == 1 else frozenset().union(*(self.ends[model] for model in mix.speakers))
        return Request(
            str(prompt), text, ids, max(0, min(max_new_tokens, room)), seed, stops + form.stop, stop_ids, mix, ends, edits, form.removed,
            constant,
        )  # fmt: skip


def parted(requests: Sequence[Request], starts: Sequence[int]) -> list[Request]:
    """The same requests, the prompt of each ending where its entry in `starts` says and the rest forced behind it.

    Raises:
        ConfigError: there are not as many, or one leaves a prompt or what is behind it empty.
    """
    if not isinstance(starts, Sequence) or len(starts) != len(requests):
        count = f"{len(starts)} of" if isinstance(starts, Sequence) else f"a {type(starts).__name__} for"
        raise ConfigError(f"starts is {count} {len(requests)} prompts; give one whole number per prompt, or None")
    for i, (request, start) in enumerate(zip(requests, starts, strict=True)):
        if not is_whole(start) or not 0 < start < len(request.prompt_ids):
            raise ConfigError(
                f"starts[{i}] is {start!r}, and prompt {i} has {len(request.prompt_ids)} tokens; allowed: 1 to "
                f"{len(request.prompt_ids) - 1}, so that there is a token on either side"
            )
    return [
        replace(one, prompt_ids=one.prompt_ids[:start], forced=tuple(one.prompt_ids[start:]), constant=min(one.constant, start))
        for one, start in zip(requests, starts, strict=True)
    ]  # fmt: skip


def _require_search(search: object) -> None:
    if search is not None and not isinstance(search, (Sampling, RAIN)):
        raise ConfigError(f"search is a {type(search).__name__}; give Sampling() or RAIN")


def _token_ids(prompt: object, where: str) -> list[int]:
    """A prompt given as token ids.

    Raises:
        PromptError: it is something else.
    """
    try:
        return [operator.index(t) for t in prompt]  # type: ignore[attr-defined]
    except TypeError as error:
        raise PromptError(
            f"{where} is {prompt!r:.80}; give a text, a list of token ids, or a list of chat messages"
        ) from error
