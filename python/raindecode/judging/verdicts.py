"""Verdicts, and how they are read out of what a judge says: forgiving about what stands around them, strict about what they say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from raindecode.errors import JudgeError
from raindecode.judging.rubric import LOWEST, Rubric

_LONGEST = 100_000  # characters of a reply that is read
_MOST_OBJECTS = 1_000  # places where an object may begin that are tried
_SHOWN = 160  # characters of a reply that a message shows


@dataclass(frozen=True)
class Verdict:
    """The scores of one answer.

    Attributes:
        scores: by aspect.
        reasons: by aspect; "" where the judge gave none.
    """

    scores: dict[str, float]
    reasons: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """{aspect: {"score": number, "reason": text}}."""
        return {aspect: {"score": score, "reason": self.reasons[aspect]} for aspect, score in self.scores.items()}


def parse_verdict(text: str, rubric: Rubric) -> Verdict:
    """The verdict in a reply: a JSON object, alone, in a fence, or among other words.

    What a model writes before a closing </think> is left out. Several objects are fine when they give the same scores.

    Raises:
        JudgeError: there is none, an aspect is missing, a score is no number in range, or two objects differ.
    """
    said = text.rpartition("</think>")[2]
    if len(said) > _LONGEST:
        raise JudgeError(f"the judge's reply has {len(said):,} characters, more than the {_LONGEST:,} that are read")
    found: list[Verdict] = []
    problem: JudgeError | None = None
    for candidate in _candidates(_objects(said), rubric):
        try:
            found.append(as_verdict(candidate, rubric))
        except JudgeError as error:
            problem = error
    if not found:
        if problem is not None:
            raise JudgeError(f"{problem} (the judge said {_shown(said)})")
        raise JudgeError(f"the judge's reply holds no JSON object: {_shown(said)}")
    if any(verdict.scores != found[0].scores for verdict in found):
        raise JudgeError(f"the judge gave two verdicts that differ: {_shown(said)}")
    return found[-1]


def as_verdict(given: Mapping[Any, Any], rubric: Rubric) -> Verdict:
    """{aspect: score} or {aspect: {"score": ..., "reason": ...}} as a verdict; other keys are ignored.

    A score is a number, or text such as "4" or "4/5". With one aspect, {"score": ..., "reason": ...} will do.

    Raises:
        JudgeError: an aspect is missing or its score is no number in range.
    """
    entries = {str(key).strip().lower(): value for key, value in given.items()}
    if len(rubric.aspects) == 1 and rubric.aspects[0] not in entries and "score" in entries:
        entries = {rubric.aspects[0]: entries}
    missing = [aspect for aspect in rubric.aspects if aspect not in entries]
    if missing:
        raise JudgeError(f"the verdict lacks {', '.join(missing)}; asked for: {', '.join(rubric.aspects)}")
    scores, reasons = {}, {}
    for aspect in rubric.aspects:
        entry = entries[aspect]
        if isinstance(entry, Mapping):
            fields = {str(key).strip().lower(): value for key, value in entry.items()}
            score, reason = fields.get("score"), fields.get("reason")
        else:
            score, reason = entry, None
        scores[aspect] = _score(aspect, score, rubric.highest)
        reasons[aspect] = reason.strip() if isinstance(reason, str) else ""
    return Verdict(scores, reasons)


def _score(aspect: str, given: Any, highest: int) -> float:
    value: Any = given
    if isinstance(value, str):
        number, slash, of = value.strip().partition("/")
        try:
            value = float(number) if not slash or float(of) == highest else None
        except ValueError:
            value = None
    try:
        right = isinstance(value, Real) and not isinstance(value, bool) and LOWEST <= float(value) <= highest
    except OverflowError:
        right = False
    if not right or math.isnan(float(value)):
        raise JudgeError(f"the score of {aspect} is {given!r:.60}; allowed: a number from {LOWEST} to {highest}")
    return int(value) if float(value).is_integer() else float(value)


def _objects(text: str) -> list[dict[Any, Any]]:
    """The outermost JSON objects in a text."""
    decoder, found, at = json.JSONDecoder(), [], 0
    for _ in range(_MOST_OBJECTS):
        at = text.find("{", at)
        if at < 0:
            break
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        found.append(value)
    return found


def _candidates(objects: list[dict[Any, Any]], rubric: Rubric) -> list[dict[Any, Any]]:
    """The objects, and in the place of one that speaks of no aspect the objects in it, such as in {"scores": {...}}."""
    found = []
    for one in objects:
        inner = [value for value in one.values() if isinstance(value, dict)]
        speaks = {str(key).strip().lower() for key in one} & {*rubric.aspects, "score"}
        found += [one] if speaks or not inner else inner
    return found


def _shown(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= _SHOWN else words[:_SHOWN] + "...")
