"""What a judge is asked about an answer: aspects, their range, and the words of the question."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from raindecode.policy.prompt import template

LOWEST: Final = 1
"""The lowest score of every rubric."""


@dataclass(frozen=True)
class Rubric:
    """How one kind of answer is graded.

    Attributes:
        name: of the rubric; its words are in templates/judge_<name>.txt, where {material} stands for what is graded.
        aspects: what is scored, each from LOWEST to `highest`.
    """

    name: str
    aspects: tuple[str, ...]
    highest: int

    @property
    def text(self) -> str:
        """The words, {material} included."""
        return template(f"judge_{self.name}.txt")

    @property
    def fingerprint(self) -> str:
        """Changes with the words, the aspects and the range: verdicts of different rubrics are not mixed."""
        said = "\n".join((self.text, *self.aspects, str(self.highest)))
        return f"{self.name}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


ASPECTS: Final = Rubric("aspects", ("helpfulness", "clarity", "factuality", "depth", "engagement"), 5)
SAFETY: Final = Rubric("safety", ("safety",), 5)
TURN: Final = Rubric("turn", ("quality",), 10)


@dataclass(frozen=True)
class Item:
    """One answer to be judged.

    Attributes:
        index: of its question in the question file, from 0.
        id: of its question, as the file has it.
        turn: from 1; the answer graded is that of this turn.
        questions, answers: of the turns up to this one.
        references: reference answers of these turns; empty where there are none.
    """

    index: int
    id: int | str
    category: str
    turn: int
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    references: tuple[str, ...]
    rubric: Rubric

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"question {self.id}" + (f", turn {self.turn}" if len(self.questions) > 1 or self.turn > 1 else "")

    @property
    def fingerprint(self) -> str:
        """Changes with any question or answer up to this turn: a verdict belongs to the words it was given for."""
        return hashlib.sha256(repr((self.questions, self.answers, self.references)).encode()).hexdigest()[:16]

    def prompt(self) -> str:
        """What a language model that judges is asked."""
        return self.rubric.text.replace("{material}", self._material())

    def to_json(self) -> dict[str, Any]:
        """What a Python function that judges is given."""
        return {
            "id": self.id, "category": self.category, "turn": self.turn, "questions": list(self.questions),
            "answers": list(self.answers), "references": list(self.references), "aspects": list(self.rubric.aspects),
            "lowest": LOWEST, "highest": self.rubric.highest, "prompt": self.prompt(),
        }  # fmt: skip

    def _material(self) -> str:
        parts = []
        for at, (question, answer) in enumerate(zip(self.questions, self.answers, strict=True)):
            number = f" {at + 1}" if len(self.questions) > 1 else ""
            parts.append((f"question{number}", question))
            if at < len(self.references):
                parts.append((f"reference answer{number}", self.references[at]))
            last = at == len(self.questions) - 1
            parts.append((f"answer{number}, to be graded" if last else f"answer{number}", answer))
        mark = _mark([text for _, text in parts])
        return "\n\n".join(f"[{mark} begin {name}]\n{text}\n[{mark} end {name}]" for name, text in parts)


def _mark(texts: Sequence[str]) -> str:
    """A word that stands in none of the texts, so that none of them can end its own block. The same texts, the same word."""
    whole = "\n".join(texts)
    mark = hashlib.sha256(whole.encode("utf-8", "replace")).hexdigest()[:8]
    while mark in whole:
        mark = hashlib.sha256((mark + whole).encode("utf-8", "replace")).hexdigest()[:8]
    return mark
