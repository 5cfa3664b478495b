"""Positions: which rows of a request are edited, and the text that says it on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from raindecode.errors import ConfigError
from raindecode.settings import require_whole

_TEXT: Final = re.compile(r"(all|last|none)(?::(\d*)-(\d*))?", re.ASCII)


@dataclass(frozen=True)
class Positions:
    """Which rows are edited.

    Attributes:
        prompt: "all", "last" (the row the first new token is drawn from) or "none".
        first, end: of the rows of generated tokens, counted from 0, those from `first` up to and without `end`; None: all.

    Raises:
        ConfigError: a value is not allowed.
    """

    prompt: Literal["all", "last", "none"] = "last"
    first: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        if self.prompt not in ("all", "last", "none"):
            raise ConfigError(f"positions.prompt is {self.prompt!r}; allowed: 'all', 'last', 'none'")
        require_whole("positions.first", self.first, 0)
        if self.end is not None:
            require_whole("positions.end", self.end, 0)

    @property
    def everywhere(self) -> bool:
        """Whether every row is edited."""
        return self.prompt == "all" and self.first == 0 and self.end is None

    def spans(self, prompt_length: int) -> list[tuple[int, int | None]]:
        """Edited positions as [start, end) of a request, ascending; None: without end."""
        spans: list[tuple[int, int | None]] = []
        if self.prompt != "none" and prompt_length:
            spans.append((0 if self.prompt == "all" else prompt_length - 1, prompt_length))
        if self.end is None or self.end > self.first:
            spans.append((prompt_length + self.first, None if self.end is None else prompt_length + self.end))
        return spans

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Read "all", "last" or "none", what is edited of the prompt, and with a window FIRST-END behind a colon which generated rows.

        "last:0-8" edits the prompt's last row and generated rows 0 to 7, "none:4-" generated rows from 4 on, "last" the prompt's
        last row and all generated ones.

        Raises:
            ConfigError: it is something else.
        """
        found = _TEXT.fullmatch(text)
        if found is None or text.endswith(":-"):
            raise ConfigError(
                f"positions are {text!r}; allowed: all, last or none (of the prompt), alone or with a window of generated rows, such "
                "as last:0-8 (rows 0 to 7) or none:4- (from row 4 on)"
            )
        prompt, first, end = found.groups()
        return cls(prompt, int(first or 0), int(end) if end else None)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """As `parse` reads it."""
        if not self.first and self.end is None:
            return self.prompt
        return f"{self.prompt}:{self.first}-{'' if self.end is None else self.end}"
