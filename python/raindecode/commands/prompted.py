"""Options that put a constant prompt before every query (URIAL)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from raindecode.commands.common import say
from raindecode.decoder import Decoder
from raindecode.errors import ConfigError
from raindecode.policy.policy import Policy
from raindecode.policy.prompt import ChatFormat
from raindecode.policy.urial import URIAL
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling

_PANEL = "Constant prompt (URIAL)"

PromptFileOption = Annotated[
    str | None,
    typer.Option(
        "--prompt-file",
        help="Put this prompt before every query: a file in URIAL's form (# Instruction, # Query:, # Answer:). Its K/V are "
        "computed once.",
        rich_help_panel=_PANEL,
    ),
]
UrialOption = Annotated[
    bool,
    typer.Option(
        "--urial",
        help="Put the default URIAL prompt before every query; for the testbed, one of its own.",
        rich_help_panel=_PANEL,
    ),
]
PrefixCacheOption = Annotated[
    str | None,
    typer.Option(
        "--prefix-cache",
        metavar="FILE",
        help="Read the K/V of the constant prompt (and of RAIN's judge) from this file; computed and written where there is none.",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True)
class ChosenPrompt:
    """The constant prompt a command was given. `format` is None without."""

    format: ChatFormat | None = None
    label: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides an answer, as plain data for the records of --output; empty without a prompt."""
        if self.format is None:
            return {}
        text = repr((self.format.prefix, self.format.turn, self.format.reply))
        return {"prompt": {"name": self.label, "sha256": hashlib.sha256(text.encode()).hexdigest()[:32]}}


def chosen_prompt(file: str | None, default: bool, model: str, *, others: tuple[str, ...] = ()) -> ChosenPrompt:
    """What the options above describe.

    Args:
        model: its name; the testbed has a default prompt of its own.
        others: options that were given and say how prompts are written, too.

    Raises:
        ConfigError: options exclude each other.
        PromptFileError: the file is missing or of another form.
    """
    given = [*(["--prompt-file"] if file is not None else []), *(["--urial"] if default else [])]
    if not given:
        return ChosenPrompt()
    if len(given) + len(others) > 1:
        raise ConfigError(
            f"{', '.join([*given, *others])} exclude each other: each says how prompts are written; give one"
        )
    if file is not None:
        return ChosenPrompt(URIAL.load(file), Path(file).name)
    return ChosenPrompt(URIAL.testbed() if model == "testbed" else URIAL.default(), "urial")


def use_prefix_cache(decoder: Decoder, file: str, policy: Policy, search: Sampling | RAIN) -> None:
    """Load the constant prompts' K/V from a file, or write it where there is none.

    Raises:
        PrefixFileError: it cannot be read or written, or belongs to another model or policy.
        ConfigError: nothing is constant.
    """
    if Path(file).expanduser().exists():
        decoder.load_prefix(file, policy=policy, search=search)
    else:
        tokens = decoder.save_prefix(file, policy=policy, search=search)
        say(f"wrote the K/V of {tokens} constant tokens to {file}")
