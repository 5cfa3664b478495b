"""How a prompt, or a conversation, becomes model input. Plain text, no tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from raindecode.errors import ConfigError, PromptError
from raindecode.settings import as_strings

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """What was said so far, and what the user says now.

    Attributes:
        prompt: the user's last words, which the model answers.
        history: earlier exchanges, what the user said and what was answered.
        system: instructions before the first exchange; "" for none.
    """

    prompt: str
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], where: str = "the conversation") -> Conversation:
        """Chat messages, {"role": ..., "content": ...} each: at most one of the system, first, then user and assistant in turns.

        Args:
            where: what to call it in messages.

        Raises:
            PromptError: they are something else; the message names the one at fault.
        """
        said = [_message(message, f"message {i} of {where}") for i, message in enumerate(messages)]
        system = said.pop(0)[1] if said and said[0][0] == "system" else ""
        if not said or said[-1][0] != "user":
            raise PromptError(
                f"{where} does not end with words of the user: its last message has to have the role 'user'"
            )
        for i, (role, _) in enumerate(said):
            if role != _ROLES[1 + i % 2]:
                raise PromptError(
                    f"{where} has a message of {role!r} where one of {_ROLES[1 + i % 2]!r} belongs; allowed: one of the system, first, "
                    "then user and assistant in turns"
                )
        texts = [text for _, text in said]
        return cls(texts[-1], tuple(zip(texts[:-1:2], texts[1::2], strict=True)), system)

    def messages(self) -> list[dict[str, str]]:
        """As chat messages."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        for prompt, reply in self.history:
            said += [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        return [*said, {"role": "user", "content": self.prompt}]


def _message(message: object, where: str) -> tuple[str, str]:
    """Role and text."""
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} is a {type(message).__name__}; give {{'role': ..., 'content': ...}}")
    role, content = message.get("role"), message.get("content")
    role = "system" if role == "developer" else role
    if role not in _ROLES:
        raise PromptError(f"{where} has the role {role!r}; allowed: {', '.join(_ROLES)}")
    if isinstance(content, Sequence) and not isinstance(content, str):  # parts, as some clients send them
        if not all(
            isinstance(p, Mapping) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
        ):
            raise PromptError(f"{where} holds parts that are not text; allowed: {{'type': 'text', 'text': ...}}")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not content.strip():
        raise PromptError(f"{where} has the content {content!r:.80}; give text that is not white space alone")
    return role, content


@dataclass(frozen=True)
class ChatFormat:
    """A transcript format.

    Attributes:
        turn: one exchange up to where the model answers; "{prompt}" stands for the user's text.
        prefix: few-shot exchanges or a preamble before the turn.
        stop: strings that mean the model has begun the next speaker's turn.
        reply: an earlier answer with what parts it from the next turn; "{reply}" stands for it.
        system: how instructions of a conversation stand behind the prefix; "{system}" stands for them.
        removed: strings that are taken out of an answer; white space is then taken off its ends, too.
    """

    turn: str = "{prompt}"
    prefix: str = ""
    stop: tuple[str, ...] = ()
    reply: str = " {reply}\n\n"
    system: str = "{system}\n\n"
    removed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, mark in (("turn", "{prompt}"), ("reply", "{reply}"), ("system", "{system}")):
            text = getattr(self, name)
            if not isinstance(text, str) or mark not in text:
                raise ConfigError(f"the {name} {text!r} does not say where the {mark[1:-1]} goes: put {mark} into it")
        object.__setattr__(self, "stop", as_strings("stop", self.stop))
        object.__setattr__(self, "removed", as_strings("removed", self.removed))

    def render(self, said: str | Conversation) -> str:
        """What the model is fed for a prompt or a conversation."""
        talk = Conversation(said) if isinstance(said, str) else said
        system = self.system.replace("{system}", talk.system) if talk.system else ""
        earlier = (
            self.exchange(prompt) + self.reply.replace("{reply}", reply.strip()) for prompt, reply in talk.history
        )
        return self.prefix + system + "".join(earlier) + self.exchange(talk.prompt)

    def exchange(self, prompt: str) -> str:
        """The turn with the user's text."""
        return self.turn.replace("{prompt}", prompt)


@cache
def template(name: str) -> str:
    """A text file of raindecode/templates, newlines as "\\n"."""
    return resources.files("raindecode").joinpath("templates", name).read_text(encoding="utf-8").rstrip("\n")
