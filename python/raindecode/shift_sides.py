"""The two sides of a token shift: what is compared, whether it differs, and the answers it is compared along."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import TypeAlias

import numpy as np

from raindecode.errors import ConfigError, PromptError
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.alignez.schedule import models_of
from raindecode.policy.dera import DeRa
from raindecode.policy.policy import Policy
from raindecode.policy.prompt import ChatFormat
from raindecode.teacher_forcing import Forced
from raindecode.text import Codec
from raindecode.types import Completion, Request

Side: TypeAlias = "Policy | DeRa | float | AlignEZ | ChatFormat | None"
Answer: TypeAlias = "str | Sequence[int]"
_ALLOWED = "a Policy, a DeRa, a number (weight λ of the aligned model), an AlignEZ, a ChatFormat, or None for the reference model alone"


def as_policy(name: str, given: object) -> Policy:
    """What a side says its next-token distribution is.

    Raises:
        ConfigError: it says nothing of the kind, or names a distribution that gives most tokens no probability.
    """
    if given is None:
        return Policy()
    if isinstance(given, (DeRa, Real)) and not isinstance(given, bool):
        given = Policy(dera=given if isinstance(given, DeRa) else DeRa(float(given)))
    elif isinstance(given, AlignEZ):
        given = Policy(edits=given)
    elif isinstance(given, ChatFormat):
        given = Policy(prompt=given)
    if not isinstance(given, Policy):
        raise ConfigError(f"{name} is a {type(given).__name__}; give {_ALLOWED}")
    if given.dera is not None and given.dera.plausibility:
        raise ConfigError(
            f"{name} has a DeRa with plausibility {given.dera.plausibility:g}, which gives most tokens no probability, so that "
            "ranks and divergences say nothing: leave plausibility out"
        )
    return given


def label_of(policy: Policy, name: str) -> str:
    """A side in a few words, for the heads of tables: `name` is the decoder's."""
    parts = [name]
    if policy.dera is not None:
        parts.append(policy.dera.label if policy.dera.kl is not None else f"λ {policy.dera.label}")
    assert isinstance(policy.edits, tuple)
    parts += [f"edited at strength {edit.strength:g}" for edit in policy.edits]
    if policy.prompt is not None:
        parts.append("prompt of its own")
    return ", ".join(parts)


def check_difference(base: Sequence[Request], aligned: Sequence[Request]) -> None:
    """Refuse to compare what is the same.

    Raises:
        ConfigError: no prompt has another distribution on one side than on the other.
    """
    if all(_distribution(one) == _distribution(other) for one, other in zip(base, aligned, strict=True)):
        raise ConfigError(
            "base and aligned are the same, so nothing can have shifted: give one of them an aligned model (DeRa or its weight λ; "
            "--adapter, --aligned), an edit of a model that takes part (AlignEZ; --edit), or a prompt of its own (ChatFormat; --urial, "
            "--prompt-file)"
        )


def _distribution(request: Request) -> tuple[object, ...]:
    """What decides a request's next-token distributions."""
    mix = request.mix
    mixed = mix.target_kl or mix.weights, mix.target_kl and mix.max_weight
    edits = getattr(request.edits, "edits", ())
    told = [id(e) for e in edits if e.strength and any(mix.models >> m & 1 for m in models_of(e, len(mix.weights)))]
    return mixed, tuple(request.prompt_ids), tuple(told)


def forced_answers(
    base: Sequence[Request], aligned: Sequence[Request], answers: Iterable[Completion | None]
) -> list[Forced]:
    """Answers that the aligned side has written greedily; None for one that failed."""
    return [
        Forced(i, one, other, answer.token_ids, answer.text, answer.finish_reason, is_top=True)
        for i, (one, other, answer) in enumerate(zip(base, aligned, answers, strict=True))
        if answer is not None
    ]


def given_answers(
    base: Sequence[Request], aligned: Sequence[Request], answers: object, codec: Codec, vocab_size: int
) -> list[Forced]:
    """Answers that were given as texts or token ids, one per prompt.

    A text becomes the tokens that follow the aligned side's prompt when prompt and answer are encoded together. Where a token spans
    the seam, it is encoded alone, and taken if those tokens spell it behind the prompt.

    Raises:
        PromptError: an answer is neither, empty, does not fit a context, or cannot be tokenised behind its prompt.
    """
    if isinstance(answers, str) or not isinstance(answers, Sequence) or len(answers) != len(aligned):
        count = "" if isinstance(answers, str) or not isinstance(answers, Sequence) else f" of {len(answers)}"
        raise PromptError(
            f"answers is a {type(answers).__name__}{count} for {len(aligned)} prompts; give one text or list of token ids per prompt"
        )
    found = []
    for i, (one, other, answer) in enumerate(zip(base, aligned, answers, strict=True)):
        if isinstance(answer, str):
            ids, text = _answer_ids(codec, other, answer, i), answer
        else:
            ids = _known_ids(answer, i, vocab_size)
            text = codec.continuation(other.prompt_ids, ids)
        if not ids:
            raise PromptError(f"answer {i} is empty: give at least one token, or leave its prompt out")
        room = min(one.max_new_tokens, other.max_new_tokens)
        if len(ids) > room:
            raise PromptError(
                f"answer {i} has {len(ids)} tokens, and behind its prompt the models' context has room for {room}: shorten it"
            )
        found.append(Forced(i, one, other, ids, text, "given", is_top=False))
    return found


def _answer_ids(codec: Codec, request: Request, answer: str, index: int) -> list[int]:
    try:
        answer.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"answer {index} is not text: it holds a lone surrogate at character {error.start}"
        ) from error
    prompt = list(request.prompt_ids)
    whole = codec.encode(request.prompt_text + answer)
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    alone = codec.encode(answer)[len(codec.encode("")) :]
    if codec.continuation(prompt, alone) != answer:
        raise PromptError(
            f"answer {index} cannot be tokenised behind its prompt: the tokenizer joins {request.prompt_text[-10:]!r} and "
            f"{answer[:10]!r}; give its token ids"
        )
    return alone


def _known_ids(answer: object, index: int, vocab_size: int) -> list[int]:
    try:
        ids = np.asarray(answer)
    except ValueError:  # lists of unequal length
        ids = np.zeros(0)
    if not isinstance(answer, Sequence) or ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise PromptError(f"answer {index} is {answer!r:.60}; give a text or a list of token ids")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise PromptError(f"answer {index} holds token ids that no model knows; allowed: 0 to {vocab_size - 1}")
    found: list[int] = ids.tolist()
    return found
