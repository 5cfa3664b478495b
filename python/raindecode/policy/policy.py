"""Policy: what the next-token distribution is, apart from how tokens are chosen from it."""

from __future__ import annotations

from dataclasses import dataclass

from raindecode.policy.prompt import ChatFormat


@dataclass(frozen=True)
class Policy:
    """Settings of the distribution a search draws from.

    Attributes:
        prompt: how user text is written for the model; None takes the search's own format, else the decoder's.
    """

    prompt: ChatFormat | None = None
