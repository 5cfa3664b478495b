"""Files of edits: safetensors with the whole specification as metadata; GGUF control vectors in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raindecode.errors import ConfigError, EditFileError
from raindecode.hidden_edits import ModelIdentity, Site, Stage
from raindecode.policy.alignez.container import load_tensors, save_tensors
from raindecode.policy.alignez.edits import AlignEZ, Examples, Positions
from raindecode.policy.alignez.gguf import read_control_vector, write_control_vector

FORMAT = "raindecode.alignez"
VERSION = "1"
_MOST_ITEMS = 4096  # stages or places of one file


def save_edit(edit: AlignEZ, path: str | Path) -> None:
    """Write an edit, all at once. Strength and `on` are a user's, not the file's.

    Raises:
        EditFileError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    stages = []
    for i, (site, stage) in enumerate(edit.stages):
        tensors[f"stages.{i}.directions"] = stage.directions
        stages.append(
            {
                "layer": int(site.layer), "tap": site.tap, "ops": stage.ops, "alphas": _numbers(stage.alphas),
                "targets": _numbers(stage.targets), "norm": stage.norm,
            }
        )  # fmt: skip
    places = []
    for i, (site, examples) in enumerate(edit.examples.items()):
        places.append({"layer": site.layer, "tap": site.tap})
        tensors |= {f"examples.{i}.{name}": getattr(examples, name) for name in Examples._fields}
    spec = {
        "stages": stages, "examples": places, "select": edit.select, "threshold": edit.threshold,
        "neighbours": edit.neighbours, "recipe": edit.recipe, "positions": asdict(edit.positions),
    }  # fmt: skip
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "edit": json.dumps(spec),
        "model": "null" if edit.model is None else json.dumps(asdict(edit.model)),
        "origin": json.dumps(dict(edit.origin)),
    }
    save_tensors(path, {name: t.contiguous() for name, t in tensors.items()}, metadata)


def load_edit(path: str | Path) -> AlignEZ:
    """Read an edit: a file of `save_edit`, or a GGUF control vector.

    Raises:
        EditFileError: there is no such file, or it is damaged or of another kind. Nothing is ever unpickled.
    """
    if Path(path).suffix == ".gguf":
        return import_control_vector(path)
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise EditFileError(
            f"{path} is a safetensors file but holds no edit (its format is {metadata.get('format', 'not named')!r}); give a file "
            "that AlignEZ.save or `raindecode fit-edit` wrote"
        )
    if metadata.get("version") != VERSION:
        raise EditFileError(
            f"{path} has version {metadata.get('version')!r}, this program reads version {VERSION}: fit it anew, or update"
        )
    try:
        return _edit(tensors, metadata)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:  # ConfigError is a ValueError
        reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        raise EditFileError(f"{path} is damaged: {reason}; write it again with `raindecode fit-edit`") from error


def import_control_vector(path: str | Path) -> AlignEZ:
    """A GGUF control vector (llama.cpp) as an additive edit: direction.N is added to the residual stream behind layer N.

    Added to every row, as llama.cpp does; the file does not say which model it belongs to, but for its architecture.
    """
    hint, vectors = read_control_vector(path)
    stages = []
    for layer, vector in sorted(vectors.items()):
        length = float(vector.double().norm())
        if length:
            unit = (vector.double() / length).float()[None]
            stages.append((Site(layer, "block_out"), Stage(unit, ("add",), (length,), (0.0,))))
    if not stages:
        raise EditFileError(f"{path} holds zero vectors only: there is nothing to add")
    origin = {"imported": "GGUF control vector", "model_hint": hint}
    return AlignEZ(stages=tuple(stages), positions=Positions("all"), origin=origin)


def export_control_vector(edit: AlignEZ, path: str | Path) -> None:
    """Write an additive edit of the residual stream as a GGUF control vector, its strength included.

    Raises:
        ConfigError: the edit does something that a control vector cannot say.
        EditFileError: the file cannot be written.
    """
    vectors: dict[int, Tensor] = {}
    for site, stage in edit.stages:
        if site.tap != "block_out" or set(stage.ops) != {"add"} or stage.norm != "none":
            raise ConfigError(
                f"layer {site.layer} has {', '.join(sorted(set(stage.ops)))} at {site.tap} with norm {stage.norm!r}; a GGUF control "
                "vector holds plain additions at block_out only: keep it as safetensors"
            )
        alphas = torch.tensor(stage.alphas, dtype=torch.float64) * edit.strength
        total = (alphas[:, None] * stage.directions.double()).sum(0)
        vectors[site.layer] = vectors.get(site.layer, torch.zeros_like(total)) + total
    if edit.needs_query or not edit.positions.everywhere:
        raise ConfigError(
            "a GGUF control vector is added to every row of every request; this edit chooses by prompt or position: keep it as "
            "safetensors, or give it positions=Positions('all')"
        )
    hint = "" if edit.model is None else edit.model.architecture
    write_control_vector(path, hint, {layer: vector.float() for layer, vector in vectors.items()})


def _edit(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AlignEZ:
    spec: dict[str, Any] = json.loads(metadata["edit"])
    stages = []
    for i, given in enumerate(_items(spec["stages"])):
        stage = Stage(
            tensors[f"stages.{i}.directions"], tuple(given["ops"]), _numbers(given["alphas"]), _numbers(given["targets"]),
            given["norm"],
        )  # fmt: skip
        stages.append((Site(given["layer"], given["tap"]), stage))
    examples = {
        Site(given["layer"], given["tap"]): Examples(*(tensors[f"examples.{i}.{name}"] for name in Examples._fields))
        for i, given in enumerate(_items(spec["examples"]))
    }
    model: dict[str, Any] | None = json.loads(metadata["model"])
    edit = AlignEZ(
        stages=tuple(stages), examples=examples, select=spec["select"], threshold=spec["threshold"],
        neighbours=spec["neighbours"], recipe=tuple((g, op, float(a)) for g, op, a in spec["recipe"]),
        positions=Positions(**spec["positions"]), model=None if model is None else ModelIdentity(**model),
        origin={str(k): str(v) for k, v in json.loads(metadata["origin"]).items()},
    )  # fmt: skip
    known = {f"stages.{i}.directions" for i in range(len(stages))}
    known |= {f"examples.{i}.{name}" for i in range(len(examples)) for name in Examples._fields}
    if set(tensors) != known:
        raise ConfigError(f"it holds tensors that its specification does not name: {sorted(set(tensors) - known)[:3]}")
    return edit


def _items(given: object) -> Sequence[dict[str, Any]]:
    if not isinstance(given, list) or len(given) > _MOST_ITEMS:
        raise ConfigError(f"a list of at most {_MOST_ITEMS} items was expected")
    return given


def _numbers(given: object) -> tuple[float, ...]:
    if not isinstance(given, (list, tuple)):
        raise ConfigError("a list of numbers was expected")
    return tuple(float(number) for number in given)


def for_use(edit: AlignEZ, **choices: Any) -> AlignEZ:
    """An edit that was loaded, with what its user chooses: strength, on, judge, force, positions."""
    return replace(edit, **{name: value for name, value in choices.items() if value is not None})
