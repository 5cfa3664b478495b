"""What the edits of one request do to each of its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from raindecode.errors import ConfigError
from raindecode.hidden_edits import ModelIdentity, RowEdit, Schedule, Site, Stage
from raindecode.policy.alignez.edits import AlignEZ

Resolved = tuple[AlignEZ, Sequence[tuple[Site, Stage]]]


def models_of(edit: AlignEZ, num_models: int) -> range:
    """Which of a decoder's models an edit is for.

    Raises:
        ConfigError: it is for aligned models, and there is none.
    """
    if edit.on == "aligned" and num_models == 1:
        raise ConfigError(
            "an edit is for the aligned model, but this decoder has the reference only: load it with adapter= or aligned= "
            "(--adapter, --aligned), or use on='reference'"
        )
    return {"reference": range(1), "aligned": range(1, num_models), "both": range(num_models)}[edit.on]


def check_fits(edit: AlignEZ, models: Sequence[ModelIdentity]) -> None:
    """Raise ConfigError unless an edit belongs to the models it is for."""
    for index in models_of(edit, len(models)):
        model = models[index]
        if edit.hidden_size != model.hidden_size:
            raise ConfigError(
                f"an edit is for a hidden size of {edit.hidden_size}, model {index} of this decoder has {model.hidden_size}: "
                "fit one for this model (raindecode fit-edit)"
            )
        beyond = [site.layer for site in edit.sites if site.layer >= model.num_layers]
        if beyond:
            raise ConfigError(
                f"an edit is for layer {max(beyond)}, model {index} of this decoder has layers 0 to {model.num_layers - 1}"
            )
        if edit.model is not None and edit.model.fingerprint != model.fingerprint and not edit.force:
            raise ConfigError(
                f"an edit was fitted on another model ({edit.model.architecture}, {edit.model.fingerprint}) than model {index} of "
                f"this decoder ({model.architecture}, {model.fingerprint}): fit one for this model, or force it "
                "(AlignEZ.load(..., force=True), --force-edit)"
            )


@dataclass(frozen=True, eq=False)
class Edits:
    """The edits of one request over a decoder of `num_models` models: an EditPlan."""

    edits: tuple[AlignEZ, ...]
    num_models: int

    @property
    def queries(self) -> dict[int, list[Site]]:
        """See EditPlan. The first model an edit is for decides what is done to all it is for."""
        wanted: dict[int, dict[Site, None]] = {}
        for edit in self.edits:
            if edit.needs_query and edit.strength:
                wanted.setdefault(models_of(edit, self.num_models)[0], {}).update(dict.fromkeys(edit.sites))
        return {model: list(sites) for model, sites in wanted.items()}

    def schedule(self, prompt_length: int, states: Mapping[int, Mapping[Site, Tensor]]) -> tuple[Schedule, Schedule]:
        """See EditPlan."""
        resolved = [
            (edit, edit.resolve(states.get(models_of(edit, self.num_models)[0]) if edit.needs_query else None))
            for edit in self.edits
        ]
        judging = [one for one in resolved if one[0].judge and one[1]]
        judge: Schedule = ((0, row_edit(judging, self.num_models)),) if judging else ()
        return schedule_of(resolved, prompt_length, self.num_models), judge


def constant_schedules(edits: Sequence[AlignEZ], num_models: int) -> tuple[Schedule, Schedule]:
    """What edits do to the rows that every prompt begins with, and to those of a model that judges.

    Raises:
        ConfigError: that is decided prompt by prompt.
    """
    active = [edit for edit in edits if edit.strength and (edit.positions.prompt == "all" or edit.judge)]
    if any(edit.needs_query for edit in active):
        raise ConfigError(
            "an edit decides prompt by prompt what it does to every token (select 'cosine' or 'knn' with positions 'all'), so no K/V are "
            "the same for all prompts: leave it out, or edit from the prompt's last token on (positions 'last')"
        )
    resolved = [(edit, edit.resolve(None)) for edit in active]

    def of(some: Sequence[Resolved]) -> Schedule:
        return ((0, row_edit(some, num_models)),) if some else ()

    return (
        of([one for one in resolved if one[1] and one[0].positions.prompt == "all"]),
        of([one for one in resolved if one[1] and one[0].judge]),
    )


def schedule_of(edits: Sequence[Resolved], prompt_length: int, num_models: int) -> Schedule:
    """The edits of every row of a request; edits that do nothing leave no trace."""
    spans = [(start, end, edit) for edit in edits if edit[1] for start, end in edit[0].positions.spans(prompt_length)]
    bounds = sorted({start for start, _, _ in spans} | {end for _, end, _ in spans if end is not None})
    made: dict[tuple[int, ...], RowEdit | None] = {(): None}
    schedule: list[tuple[int, RowEdit | None]] = []
    for at in bounds:
        active = [edit for start, end, edit in spans if start <= at and (end is None or at < end)]
        key = tuple(map(id, active))
        if key not in made:
            made[key] = row_edit(active, num_models)
        if schedule and schedule[-1][1] is made[key]:
            continue
        schedule.append((at, made[key]))
    return tuple(schedule)


def row_edit(edits: Sequence[Resolved], num_models: int) -> RowEdit:
    """Several edits of one row, one after the other at each site."""
    digest = hashlib.sha256()
    stages: dict[int, list[tuple[Site, Stage]]] = {}
    for edit, mine in edits:
        models = models_of(edit, num_models)
        digest.update(repr((edit.name, list(models))).encode())
        for site, stage in mine:
            digest.update(repr((*site, stage.ops, stage.alphas, stage.targets, stage.norm)).encode())
            if edit.select == "knn":  # else the edit's name speaks for its directions
                digest.update(stage.directions.numpy().tobytes())
        for model in models:
            stages.setdefault(model, []).extend(mine)
    return RowEdit(digest.hexdigest()[:32], stages)
