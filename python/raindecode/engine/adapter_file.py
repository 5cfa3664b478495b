"""Reads the two files of a PEFT folder, `adapter_config.json` and the tensors, without the peft package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.hub import cached_file

from raindecode.errors import AdapterError

CONFIG: Final = "adapter_config.json"
TENSORS: Final = ("adapter_model.safetensors", "adapter_model.bin")
_WHAT_TO_GIVE = f"give a folder saved by peft's save_pretrained ({CONFIG} and {TENSORS[0]}), or a hub id"


def read_adapter(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors, on the CPU, of a local folder or a hub id. Safetensors are preferred to a .bin file.

    Raises:
        AdapterError: nothing is there, or what is there cannot be read.
    """
    config = _find(path, CONFIG)
    if config is None:
        raise AdapterError(f"adapter {path!r} has no {CONFIG}: {_WHAT_TO_GIVE}")
    settings = _read_config(path, config)
    for name in TENSORS:
        file = _find(path, name)
        if file is not None:
            return settings, _read_tensors(path, file)
    raise AdapterError(f"adapter {path!r} has neither {' nor '.join(TENSORS)}: {_WHAT_TO_GIVE}")


def _find(path: str, name: str) -> Path | None:
    """The file of that name, or None where the folder or the repository lacks it."""
    local = Path(path).expanduser()
    if local.exists() and path.strip():  # an empty path would be the working directory
        if not local.is_dir():
            raise AdapterError(f"adapter {path!r} is a file: {_WHAT_TO_GIVE}")
        return local / name if (local / name).is_file() else None
    if path.startswith(("/", ".", "~")) or not path.strip():
        raise AdapterError(f"there is no folder {path!r}: {_WHAT_TO_GIVE}")
    try:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"no adapter at {path!r}: it is no local folder and could not be read as a hub id ({_first_line(error)}); "
            f"{_WHAT_TO_GIVE} that is cached or reachable"
        ) from error
    return None if found is None else Path(found)


def _read_config(path: str, file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{CONFIG} of adapter {path!r} could not be read ({_first_line(error)}): fetch or save the adapter again"
        ) from error
    if not isinstance(settings, dict):
        raise AdapterError(f"{CONFIG} of adapter {path!r} holds a {type(settings).__name__}; it must hold an object")
    return settings


def _read_tensors(path: str, file: Path) -> dict[str, Tensor]:
    again = "fetch or save the adapter again"
    try:
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{file.name} of adapter {path!r} could not be read ({_first_line(error)}): {again}"
        ) from error
    except Exception as error:  # torch.load raises many kinds: pickle's, zip's, RuntimeError, EOFError
        raise AdapterError(
            f"{file.name} of adapter {path!r} does not load as plain tensors ({_first_line(error)}): {again}, best as {TENSORS[0]}"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()
    ):
        raise AdapterError(f"{file.name} of adapter {path!r} is no dictionary of tensors: {again}")
    return tensors


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
