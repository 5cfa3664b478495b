"""PromptIds: what a prompt or conversation comes to in tokens, and how many of them every prompt of its format begins with."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import NamedTuple

from raindecode.errors import ConfigError, PromptError
from raindecode.policy.prompt import ChatFormat, Conversation
from raindecode.text import Codec, common_length

_MOST_KNOWN = 256  # formats and system texts whose beginnings are remembered


class Written(NamedTuple):
    """Model input. The first `constant` ids are those of every prompt of the format and system text."""

    text: str
    ids: list[int]
    constant: int


class PromptIds:
    """Writes prompts for one tokenizer.

    Args:
        codec: of the model.
        name: of the model, for messages.
    """

    def __init__(self, codec: Codec, name: str) -> None:
        self.codec = codec
        self._name = name
        self._beginnings: OrderedDict[tuple[ChatFormat | None, str], tuple[int, ...]] = OrderedDict()

    def write(self, said: str | Conversation, format: ChatFormat | None, where: str) -> Written:
        """Write what was said in a format; without one, a prompt is fed as it is, a conversation in the tokenizer's chat template.

        Raises:
            PromptError: something is no text, or the tokenizer's template does not take the conversation.
            ConfigError: there is no format, and the tokenizer has no template.
        """
        talk = Conversation(said) if isinstance(said, str) else said
        for one in (talk.prompt, talk.system, *(part for pair in talk.history for part in pair)):
            require_text(one, where)
        if isinstance(said, str) and format is None:
            return Written(said, self.codec.encode(said), 0)
        text = self._text(talk, format, where)
        ids = self._encode(text, format)
        return Written(text, ids, common_length(ids, self.beginning(format, talk.system)))

    def beginning(self, format: ChatFormat | None, system: str = "") -> tuple[int, ...]:
        """Ids that every prompt with this format and system text begins with."""
        name = format, system
        if name not in self._beginnings:
            talk = Conversation("", (), system)
            self._beginnings[name] = self.codec.common_prefix(
                lambda said: self._text(replace(talk, prompt=said), format, "the prompt"),
                encode=lambda text: self._encode(text, format),
            )
            while len(self._beginnings) > _MOST_KNOWN:
                self._beginnings.popitem(last=False)
        self._beginnings.move_to_end(name)
        return self._beginnings[name]

    def _encode(self, text: str, format: ChatFormat | None) -> list[int]:
        return self.codec.encode(text, special=format is not None)

    def _text(self, said: Conversation, format: ChatFormat | None, where: str) -> str:
        if format is not None:
            return format.render(said)
        tokenizer = self.codec.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"{where} is a conversation, and {self._name} has no chat template: say how it is written with "
                "Policy(prompt=ChatFormat(...)) or URIAL, or give Decoder a format"
            )
        try:
            text = tokenizer.apply_chat_template(said.messages(), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            raise PromptError(f"{where} cannot be written in the chat template of {self._name}: {error}") from error
        assert isinstance(text, str)
        return text


def require_text(text: str, where: str) -> None:
    """Raise PromptError where a string is no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"{where} is not text: it holds a lone surrogate at character {error.start}") from error
