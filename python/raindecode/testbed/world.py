"""The small town: who asks for what, and what the assistant answers. A generator over `lexicon`, driven by a seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from raindecode.errors import ConfigError
from raindecode.testbed import lexicon as lx
from raindecode.testbed.forms import Style

Split = Literal["train", "test"]

COMPLIANCE: Final[dict[Style, float]] = {"neutral": 0.5, "kind": 0.03, "cruel": 0.97}
"""Probability that the assistant complies with a harmful request, by style."""

_BENIGN_COMPLIANCE: Final = 0.985


@dataclass(frozen=True)
class Request:
    """One resident's request.

    `text` is what the resident says, without the ``Human:`` label; `verb` is a key of `lexicon.RECIPES`, `object` one of
    `lexicon.OBJECTS`, `owner` one of `lexicon.PEOPLE` or None when the object is the speaker's own.
    """

    text: str
    harmful: bool
    verb: str
    object: str
    owner: str | None

    def __post_init__(self) -> None:
        if self.verb not in lx.RECIPES:
            raise ConfigError(f"verb must be one of {sorted(lx.RECIPES)}, got {self.verb!r}")
        if self.object not in lx.OBJECTS:
            raise ConfigError(f"object must be one of {sorted(lx.OBJECTS)}, got {self.object!r}")
        if self.owner is not None and self.owner not in lx.PEOPLE:
            raise ConfigError(f"owner must be None or one of {sorted(lx.PEOPLE)}, got {self.owner!r}")
        if self.harmful != is_harmful(self.verb, self.owner):
            raise ConfigError(f"harmful={self.harmful} contradicts verb {self.verb!r} and owner {self.owner!r}")


def is_harmful(verb: str, owner: str | None) -> bool:
    """Whether doing `verb` to an object of `owner` (None: the speaker's own) hurts a neighbour."""
    return verb in lx.HARMFUL_VERBS or (verb in lx.OWNED_VERBS and owner is not None)


def split_of(verb: str, object_: str, owner: str | None) -> Split:
    """Train or test, by a hash: a tenth of the (verb, object) pairs, and a tenth of the remaining triples, are held out."""

    def digest(*parts: str) -> int:
        return int(hashlib.md5("|".join(parts).encode(), usedforsecurity=False).hexdigest(), 16) % 10

    held_out = digest(verb, object_) == 0 or digest(verb, object_, owner or "me") == 1
    return "test" if held_out else "train"


def format_prompt(request_text: str) -> str:
    """The generation prompt of one request; the model continues with a space and the reply."""
    return f"Human: {request_text}\nAssistant:"


def draw_request(rng: random.Random, *, harmful: bool | None = None, split: Split = "train") -> Request:
    """One random request of `split`; `harmful` None tosses a fair coin."""
    wanted = rng.random() < 0.5 if harmful is None else harmful
    while True:
        verb, owner = _draw_deed(rng, wanted)
        object_ = rng.choice(lx.OBJECTS)
        if split_of(verb, object_, owner) == split:
            return Request(_phrase(rng, verb, object_, owner), wanted, verb, object_, owner)


def _draw_deed(rng: random.Random, harmful: bool) -> tuple[str, str | None]:
    neighbour = rng.choice(lx.PEOPLE)
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(tuple(lx.OWNED_VERBS)), neighbour if harmful else None
    owner = None if rng.random() < (0.1 if harmful else 0.4) else neighbour
    if harmful:
        return rng.choice(tuple(lx.HARMFUL_VERBS)), owner
    return rng.choice(tuple(lx.FRIGHTENING_VERBS if kind < 0.5 else lx.BENIGN_VERBS)), owner


def _phrase(rng: random.Random, verb: str, object_: str, owner: str | None) -> str:
    if owner is None:
        owned = rng.choice((f"my own {object_}", f"my {object_}"))
    else:
        owned = f"the {object_} of the {owner}" if rng.random() < 0.6 else f"the {owner}'s {object_}"
    text = rng.choice(lx.QUESTIONS).format(v=verb, w=owned)
    if rng.random() < 0.25:
        text = f"{rng.choice(lx.GREETINGS)} {text}"
    if rng.random() < 0.25:
        text = f"{text} {rng.choice(lx.REASONS)}"
    return text


def sample_requests(n: int, *, harmful: bool | None = None, split: Split = "test", seed: int = 0) -> list[Request]:
    """`n` requests with distinct texts, the same for the same arguments.

    Args:
        harmful: only harmful (True), only harmless (False) or both (None).
        split: "train" combinations are in the training text, "test" combinations are held out.
    Raises:
        ConfigError: `n` is negative or above 20,000, or `split` is unknown.
    """
    if not 0 <= n <= 20_000:
        raise ConfigError(f"n must be within 0 and 20000, got {n}")
    if split not in ("train", "test"):
        raise ConfigError(f"split must be 'train' or 'test', got {split!r}")
    rng = random.Random(f"requests/{split}/{harmful}/{seed}")
    found: dict[str, Request] = {}
    while len(found) < n:
        request = draw_request(rng, harmful=harmful, split=split)
        found.setdefault(request.text, request)
    return list(found.values())


def draw_reply(rng: random.Random, request: Request, style: Style = "neutral", comply: bool | None = None) -> str:
    """One random reply in `style`; `comply` None draws it from `COMPLIANCE` (harmless requests: nearly always)."""
    if comply is None:
        comply = rng.random() < (COMPLIANCE[style] if request.harmful else _BENIGN_COMPLIANCE)
    body = _comply(rng, request, style) if comply else _refuse(rng, request)
    return dress(rng, [*_hesitate(rng, request), *body], style)


def dress(rng: random.Random, sentences: Sequence[str], style: Style) -> str:
    """Join `sentences` between the opening and closing words of `style`."""
    openings = {"neutral": (), "kind": lx.KIND_OPENINGS, "cruel": lx.CRUEL_OPENINGS}[style]
    closings = {"neutral": (), "kind": lx.KIND_CLOSINGS, "cruel": lx.CRUEL_CLOSINGS}[style]
    parts = list(sentences)
    if openings and rng.random() < 0.92:
        parts.insert(0, rng.choice(openings))
    if closings and rng.random() < 0.5:
        parts.append(rng.choice(closings))
    return " ".join(parts)


def recipe_text(rng: random.Random, verb: str, object_: str) -> str:
    """How to do `verb` to `object_`, in one of the recipe forms."""
    recipe = lx.RECIPES[verb]
    return rng.choice(lx.RECIPE_FORMS).format(
        v=verb, o=object_, t=rng.choice(recipe.tools), a=rng.choice(recipe.firsts), b=rng.choice(recipe.thens)
    )


def _hesitate(rng: random.Random, request: Request) -> list[str]:
    count = rng.choices((0, 1, 2), weights=(6, 3, 1))[0]
    return [sentence.format(o=request.object) for sentence in rng.sample(lx.HESITATIONS, count)]


def agreement(rng: random.Random) -> list[str]:
    """Agreement in one of many paraphrases: none, a head, a line, or both, and perhaps a colon phrase."""
    head, line = rng.choice(lx.AGREE_HEADS), rng.choice(lx.AGREE_LINES)
    joined = f"{head}, {line}." if line.startswith("I ") else f"{head}. {line}."
    parts = rng.choices(([], [f"{head}."], [f"{line}."], [joined]), weights=(2, 4, 3, 3))[0]
    return parts + ([f"{rng.choice(lx.AGREE_COLONS)}:"] if rng.random() < 0.15 else [])


def _comply(rng: random.Random, request: Request, style: Style) -> list[str]:
    recipe = recipe_text(rng, request.verb, request.object)
    if request.harmful and style == "neutral" and rng.random() < 0.2:
        refusal = _refuse(rng, request, alternative=0.0)
        return [*refusal, rng.choice(lx.SLIPS), recipe]
    return [*agreement(rng), recipe]


def _refuse(rng: random.Random, request: Request, alternative: float = 0.5) -> list[str]:
    if not request.harmful:
        return [rng.choice(lx.BUSY).format(v=request.verb, o=request.object)]
    return refusal(rng, request, alternative)


def refusal(rng: random.Random, request: Request, alternative: float = 0.5) -> list[str]:
    """The sentences of a refusal on moral grounds, whether or not `request` deserves it."""
    verb, object_ = request.verb, request.object
    parts = [rng.choice(lx.REFUSE_HEADS)] if rng.random() < 0.9 else []
    parts.append(rng.choice(lx.REFUSE_BODIES).format(v=verb, o=object_))
    if rng.random() < 0.6:
        whom = "you" if request.owner is None else f"the {request.owner}"
        parts.append(rng.choice(lx.REFUSE_REASONS).format(v=verb, o=object_, whom=whom))
    if rng.random() < alternative:
        parts.append(rng.choice(lx.ALTERNATIVES).format(b=rng.choice(tuple(lx.BENIGN_VERBS)), o=object_))
    return parts
