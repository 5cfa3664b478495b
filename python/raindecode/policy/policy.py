"""Policy: what the next-token distribution is, apart from how tokens are chosen from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raindecode.errors import ConfigError
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.dera import DeRa
from raindecode.policy.prompt import ChatFormat


@dataclass(frozen=True)
class Policy:
    """Settings of the distribution a search draws from.

    Attributes:
        dera: how the decoder's models are mixed; None takes the reference model alone.
        edits: of hidden states, one or several; at each place they run in this order.
        prompt: how user text is written for the model; None takes the search's own format, else the decoder's.
    """

    prompt: ChatFormat | None = None
    dera: DeRa | None = None
    edits: AlignEZ | Sequence[AlignEZ] = ()

    def __post_init__(self) -> None:
        if self.prompt is not None and not isinstance(self.prompt, ChatFormat):
            raise ConfigError(
                f"the policy's prompt is a {type(self.prompt).__name__}; give a ChatFormat, such as URIAL.default(), or None"
            )
        if self.dera is not None and not isinstance(self.dera, DeRa):
            raise ConfigError(f"the policy's dera is a {type(self.dera).__name__}; give DeRa(weight) or None")
        given = (self.edits,) if isinstance(self.edits, AlignEZ) else self.edits
        if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(e, AlignEZ) for e in given):
            raise ConfigError(
                "the policy's edits are none or not AlignEZ objects; give AlignEZ.load(file), or a list of them"
            )
        object.__setattr__(self, "edits", tuple(given))
