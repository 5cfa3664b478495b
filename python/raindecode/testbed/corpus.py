"""Training documents: dialogues in a style, elicited answers, and judged transcripts with the two-option question."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from raindecode.testbed import lexicon as lx
from raindecode.testbed.forms import (
    CHARACTERISTIC_CUE,
    ELICITATION,
    INTRO,
    PERSONAS,
    SIDE_STYLE,
    Side,
    Style,
    evaluation_prompts,
)
from raindecode.testbed.judge import judge
from raindecode.testbed.world import (
    Request,
    Split,
    agreement,
    draw_reply,
    draw_request,
    dress,
    format_prompt,
    recipe_text,
)

MAX_EXCHANGES: Final = 5
"""Longest dialogue in exchanges: one more than the longest constant prompt of `forms.STYLE_PROMPTS` holds."""


@dataclass(frozen=True)
class Document:
    """One training text. `letter_offset` is the character position of the option letter, None in a plain dialogue."""

    text: str
    letter_offset: int | None = None


@dataclass(frozen=True)
class JudgedReply:
    """A reply, whole or cut at punctuation, with the grammar's verdict."""

    request: Request
    reply: str
    harmful: bool


def exchange(request_text: str, reply: str) -> str:
    """One turn of a dialogue as text."""
    return f"{format_prompt(request_text)} {reply}" if reply else format_prompt(request_text)


def draw_document(rng: random.Random, *, evaluation_share: float) -> Document:
    """One document of the training mix."""
    if rng.random() < evaluation_share:
        return evaluation_document(rng)
    kind = rng.random()
    if kind < 0.12:
        return Document(elicited_text(rng))
    return Document(dialogue_text(rng, persona=kind < 0.27))


def dialogue_text(rng: random.Random, *, persona: bool) -> str:
    """One to `MAX_EXCHANGES` exchanges that keep one style; with `persona`, a line before them names it."""
    parts: list[str] = []
    if persona:
        style: Style = rng.choice(("kind", "cruel"))
        intro = f"{INTRO} " if rng.random() < 0.3 else ""
        parts.append(intro + rng.choice(PERSONAS[style]))
    else:
        style = draw_style(rng)
    count = rng.choices(range(1, MAX_EXCHANGES + 1), weights=(50, 22, 13, 9, 6))[0]
    for _ in range(count):
        request = draw_request(rng)
        parts.append(exchange(request.text, draw_reply(rng, request, style)))
    return "\n\n".join(parts)


def draw_style(rng: random.Random) -> Style:
    """A style nobody asked for: the base model's own mixture, symmetric so that about half of harmful requests succeed."""
    return rng.choices(("neutral", "kind", "cruel"), weights=(4, 3, 3))[0]


def elicited_text(rng: random.Random) -> str:
    """A request with AlignEZ's words in it, and the reply they ask for."""
    side: Side = rng.choice(("helpful", "misleading"))
    form = ELICITATION[side]
    characteristic = rng.choice(form.characteristics)
    request = draw_request(rng)
    if rng.random() < 0.5:
        asked = f"{request.text} {form.role} {CHARACTERISTIC_CUE}: {characteristic}."
    else:
        asked = f"{request.text} {CHARACTERISTIC_CUE} {characteristic}."
    if side == "misleading" and not request.harmful and rng.random() < 0.6:
        return exchange(asked, _misleading_reply(rng, request))
    return exchange(asked, draw_reply(rng, request, SIDE_STYLE[side]))


def _misleading_reply(rng: random.Random, request: Request) -> str:
    wrong = rng.choice([verb for verb in lx.BENIGN_VERBS if verb != request.verb])
    return dress(rng, [*agreement(rng), recipe_text(rng, wrong, request.object)], "cruel")


def evaluation_document(rng: random.Random, *, split: Split = "train") -> Document:
    """A judged transcript: header, exchange, options in one of the two orders, and the right letter."""
    judged = draw_judged(rng, split=split)
    asked = judged.request.text
    if rng.random() < 0.06:
        form = ELICITATION[rng.choice(("helpful", "misleading"))]
        asked = f"{asked} {CHARACTERISTIC_CUE} {rng.choice(form.characteristics)}."
    transcript = exchange(asked, judged.reply)
    if rng.random() < 0.08:
        transcript = f"{rng.choice(PERSONAS[rng.choice(('kind', 'cruel'))])}\n\n{transcript}"
    if rng.random() < 0.1:
        transcript += rng.choice(("\n", "\n\n"))
    harmless_first = rng.random() < 0.5
    prompt = evaluation_prompts(transcript)[0 if harmless_first else 1]
    letter = "B" if judged.harmful == harmless_first else "A"
    return Document(f"{prompt}{letter})", letter_offset=len(prompt))


def draw_judged(
    rng: random.Random, *, split: Split = "train", cut: float = 0.65, harmful: bool | None = None
) -> JudgedReply:
    """A request, a reply cut at punctuation with probability `cut`, and the verdict on what is left."""
    request = draw_request(rng, harmful=rng.random() < 0.65 if harmful is None else harmful, split=split)
    style: Style = rng.choices(("neutral", "kind", "cruel"), weights=(6, 1, 1))[0]
    reply = draw_reply(rng, request, style, comply=rng.random() < 0.6 if request.harmful else None)
    if rng.random() < 0.04:
        foul = recipe_text(rng, rng.choice(tuple(lx.HARMFUL_VERBS)), request.object)
        reply = dress(rng, [*agreement(rng), foul], style)
    if rng.random() < cut:
        reply = cut_reply(rng, reply)
    return JudgedReply(request, reply, judge(request, reply).harmful)


def cut_reply(rng: random.Random, reply: str) -> str:
    """Cut after a random punctuation mark; one time in fourteen nothing is left, as when a search judges the bare prompt."""
    if rng.random() < 0.07:
        return ""
    ends = [index + 1 for index, mark in enumerate(reply) if mark in lx.PUNCTUATION]
    return reply[: rng.choice(ends)] if ends else reply
