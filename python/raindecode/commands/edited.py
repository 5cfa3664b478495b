"""Options that edit hidden states in a command (AlignEZ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from raindecode.errors import ConfigError
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.alignez.schedule import models_of

_PANEL = "Edits of hidden states (AlignEZ)"

EditOption = Annotated[
    list[str] | None,
    typer.Option(
        "--edit",
        metavar="FILE[:STRENGTH]",
        help="Edit hidden states as this file says: one of `raindecode fit-edit`, or a GGUF control vector (.gguf). A number behind "
        "the last colon multiplies its strength: 0 is off, 1 as fitted (default). Which rows are edited is the file's "
        "(`fit-edit --positions`). May be repeated; at each place they run in this order.",
        rich_help_panel=_PANEL,
    ),
]
EditOnOption = Annotated[
    str | None,
    typer.Option(
        "--edit-on",
        help="Which models are edited: `reference` (default: --model), `aligned`, or `both`.",
        rich_help_panel=_PANEL,
    ),
]
ForceEditOption = Annotated[
    bool,
    typer.Option(
        "--force-edit",
        help="Use an edit that was fitted on another model of the same form.",
        rich_help_panel=_PANEL,
    ),
]
EditJudgeOption = Annotated[
    bool,
    typer.Option(
        "--edit-judge",
        help="Also edit the model while it judges its own drafts for RAIN; it is left alone otherwise.",
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True)
class ChosenEdits:
    """The edits a command was given.

    Attributes:
        files: with the strength each was given.
        edits: for Policy(edits=...), as many.
    """

    files: tuple[tuple[str, float], ...] = ()
    edits: tuple[AlignEZ, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides an answer, as plain data for the records of --output; empty without edits."""
        if not self.edits:
            return {}
        first = self.edits[0]
        return {
            # The name is a fingerprint: answers of a file that was fitted anew are not gone on with.
            "edit": [
                {"file": file, "strength": strength, "name": edit.name}
                for (file, strength), edit in zip(self.files, self.edits, strict=True)
            ],
            **({"edit_on": first.on} if first.on != "reference" else {}),
            **({"edit_judge": True} if first.judge else {}),
        }

    @property
    def label(self) -> str:
        """The edits in a few words, such as "helpful.safetensors:0.5"; "" without."""
        if not self.edits:
            return ""
        on = "" if self.edits[0].on == "reference" else f" on {self.edits[0].on}"
        parts = (Path(file).name + ("" if strength == 1 else f":{strength:g}") for file, strength in self.files)
        return ", ".join(parts) + on


def chosen_edits(
    given: Sequence[str] | None, *, on: str | None = None, judge: bool = False, force: bool = False, judges: bool = True,
    num_aligned: int = 0,
) -> ChosenEdits:  # fmt: skip
    """What the options above describe; the files are read.

    Args:
        judges: whether a model judges its own drafts in this run.
        num_aligned: aligned models that are loaded beside the reference.

    Raises:
        ConfigError: a value is not allowed, or an option has nothing to speak of.
        EditFileError: a file is missing, damaged or of another kind.
    """
    if not given:
        options = {"--edit-on": on is not None, "--force-edit": force, "--edit-judge": judge}
        named = [name for name, there in options.items() if there]
        if named:
            raise ConfigError(f"{', '.join(named)} is about an edit, and none was given: name its file with --edit")
        return ChosenEdits()
    if judge and not judges:
        raise ConfigError(
            "--edit-judge is about RAIN, whose model judges its own drafts: use --search rain, or drop it"
        )
    files = tuple(file_and_strength(text) for text in given)
    choices: dict[str, Any] = {"on": "reference" if on is None else on, "judge": judge, "force": force}
    edits = tuple(AlignEZ.load(file, strength=strength, **choices) for file, strength in files)
    for edit in edits:
        models_of(edit, 1 + num_aligned)  # so that an edit of no model is refused before models are loaded
    return ChosenEdits(files, edits)


def file_and_strength(text: str) -> tuple[str, float]:
    """The two parts of FILE[:STRENGTH]. What stands behind the last colon belongs to the path unless it is a number."""
    path, colon, number = text.rpartition(":")
    try:
        return (path, float(number)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0
