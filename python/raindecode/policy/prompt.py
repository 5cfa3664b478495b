"""How a prompt becomes model input. Plain text, no tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

from raindecode.errors import ConfigError


@dataclass(frozen=True)
class ChatFormat:
    """A transcript format.

    Attributes:
        turn: one exchange up to where the model answers; "{prompt}" stands for the user's text.
        prefix: few-shot exchanges or a preamble before the turn.
        stop: strings that mean the model has begun the next speaker's turn.
    """

    turn: str = "{prompt}"
    prefix: str = ""
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "{prompt}" not in self.turn:
            raise ConfigError(f"the turn {self.turn!r} does not say where the prompt goes: put {{prompt}} into it")

    def render(self, prompt: str) -> str:
        """What the model is fed."""
        return self.prefix + self.exchange(prompt)

    def exchange(self, prompt: str, reply: str = "") -> str:
        """The turn with the user's text, and the reply behind it."""
        return self.turn.replace("{prompt}", prompt) + reply


@cache
def template(name: str) -> str:
    """A text file of raindecode/templates, newlines as "\\n"."""
    return resources.files("raindecode").joinpath("templates", name).read_text(encoding="utf-8").rstrip("\n")
