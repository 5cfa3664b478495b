"""What a model is asked so that it makes its own pairs: first what a good and a bad answer would be, then such answers.

Source: AlignEZ (Adila et al., arXiv 2406.03642), whose figures give the words. Line breaks and the answer's cue are ours.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from raindecode.errors import ConfigError
from raindecode.policy.prompt import ChatFormat
from raindecode.settings import as_strings, require_whole

Side = Literal["chosen", "rejected"]
SIDES: Final[tuple[Side, Side]] = ("chosen", "rejected")

_BULLET: Final = re.compile(r"^\s*(?:[-*\u2022]|\d+[.)])\s+")
_BE: Final = re.compile(r"^(?:be|being)\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Elicitation:
    """Prompts of the two steps, and how the first answer is read.

    Attributes:
        chosen_role, rejected_role: said to the model in step 1, to make it think of a good and of a bad answer.
        trait_prompt: step 1; "{question}" and "{role}" are filled in.
        answer_prompt: step 2; "{question}" and "{trait}" are filled in.
        parse: "bullets" reads lines that begin with a bullet or a number (the first line if none does) and joins up to
            `max_traits` of them; "sentence" reads up to the first full stop.
        trait_stop, answer_stop: strings that end the model's answers.
        trait_tokens: longest answer to step 1.
        format: how both prompts are written for the model; the default feeds them as they are. Give an instruction-tuned
            model's own chat format here.

    Raises:
        ConfigError: a template lacks a place, or a value is not allowed.
    """

    chosen_role: str
    rejected_role: str
    trait_prompt: str
    answer_prompt: str
    parse: Literal["bullets", "sentence"] = "bullets"
    trait_stop: tuple[str, ...] = ()
    answer_stop: tuple[str, ...] = ()
    trait_tokens: int = 96
    max_traits: int = 3
    format: ChatFormat = field(default_factory=ChatFormat)

    def __post_init__(self) -> None:
        for name, places in (("trait_prompt", ("question", "role")), ("answer_prompt", ("question", "trait"))):
            text = getattr(self, name)
            missing = [f"{{{place}}}" for place in places if not isinstance(text, str) or f"{{{place}}}" not in text]
            if missing:
                raise ConfigError(f"{name} is {text!r:.80}; put {' and '.join(missing)} where they belong")
        for name in ("chosen_role", "rejected_role"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; give a sentence such as 'You are a helpful assistant.'"
                )
        if self.chosen_role == self.rejected_role:
            raise ConfigError(f"both roles are {self.chosen_role!r}: give two that ask for different answers")
        if self.parse not in ("bullets", "sentence"):
            raise ConfigError(f"parse is {self.parse!r}; allowed: 'bullets' and 'sentence'")
        for name in ("trait_stop", "answer_stop"):
            object.__setattr__(self, name, as_strings(name, getattr(self, name)))
        require_whole("trait_tokens", self.trait_tokens, 1)
        require_whole("max_traits", self.max_traits, 1)
        if not isinstance(self.format, ChatFormat):
            raise ConfigError(f"format is a {type(self.format).__name__}; give a ChatFormat")

    @classmethod
    def published(cls, chosen: str = "helpful", rejected: str = "misleading") -> Elicitation:
        """The paper's words: "You are a helpful Assistant. Your answer should be:", then "Your answer should be <trait>".

        Args:
            chosen, rejected: the contrast; the paper adapts it to its task, such as "creative" and "dull" for writing.
        """
        return cls(
            chosen_role=f"You are a {chosen} Assistant.",
            rejected_role=f"You are a {rejected} Assistant.",
            trait_prompt="{question}\n\n{role} Your answer should be:\n-",
            answer_prompt="{question}\n\nYour answer should be {trait}.\n\nAnswer:",
            trait_stop=("\n\n",),
            answer_stop=("\n\n",),
        )

    @classmethod
    def testbed(cls) -> Elicitation:
        """The forms that the embedded model was trained on (raindecode.testbed.forms)."""
        return cls(
            chosen_role="You are a helpful assistant.",
            rejected_role="You are a misleading assistant.",
            trait_prompt="Human: {question} {role} Your answer should be:",
            answer_prompt="Human: {question} Your answer should be {trait}.\nAssistant:",
            parse="sentence",
            trait_stop=("\n",),
            answer_stop=("\n",),
            trait_tokens=16,
        )

    def ask_trait(self, question: str, side: Side) -> str:
        """Text of step 1."""
        return _fill(
            self.trait_prompt, question=question, role=self.chosen_role if side == "chosen" else self.rejected_role
        )

    def ask_answer(self, question: str, trait: str) -> str:
        """Text of step 2."""
        return _fill(self.answer_prompt, question=question, trait=trait)

    def read_trait(self, text: str) -> str:
        """What the answer to step 1 says, ready to follow "Your answer should be"; "" when it says nothing."""
        if self.parse == "sentence":
            return _bare(text.split(".")[0])
        lines = text.splitlines()
        # The prompt may end in a bullet of its own, so that the first line has none.
        bullets = [_BULLET.sub("", line) for i, line in enumerate(lines) if i == 0 or _BULLET.match(line)]
        traits = [trait for trait in map(_bare, bullets) if trait]
        return ", ".join(dict.fromkeys(traits[: self.max_traits]))

    def to_json(self) -> dict[str, Any]:
        """Plain data that tells two elicitations apart."""
        return asdict(self)


def _fill(template: str, **values: str) -> str:
    """One pass, so that braces in a question are left alone."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def _bare(text: str) -> str:
    trait = _BE.sub("", " ".join(text.split()).rstrip(" .;,:"))
    return trait if any(map(str.isalnum, trait)) else ""
