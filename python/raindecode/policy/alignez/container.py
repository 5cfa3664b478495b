"""Tensors and texts in one safetensors file, for files of edits: nothing in them is ever executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from raindecode.errors import EditFileError
from raindecode.policy.alignez.whole_files import checked_file, write_atomically

__all__ = ["load_tensors", "save_tensors"]

_DTYPES: Final = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
)  # fmt: skip
_KEY: Final = "raindecode"  # all texts under one key, sorted: safetensors promises no order of several
_MOST_BYTES: Final = 1 << 32
_WHAT: Final = "a safetensors file of edits"


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file that any safetensors reader takes; it appears whole or not at all. The same content gives the same bytes.

    Args:
        tensors: at least one, by name; dense, on any device, float64, float32, float16, bfloat16 or integers, all finite.
        metadata: texts by name.

    Raises:
        EditFileError: a name, tensor or text cannot be stored, or the file cannot be written.
    """
    if not tensors:
        raise EditFileError("no tensor was given; a file of edits holds at least one")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise EditFileError(f"{name!r} is {type(tensor).__name__}, or sparse; allowed: a dense tensor")
        _check(name, tensor)
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise EditFileError(f"the metadata are {dict(metadata)!r:.200}; allowed: texts by name")
    try:
        data = save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            {_KEY: json.dumps(dict(metadata), sort_keys=True)},
        )
    except Exception as error:  # the library's errors have no base of their own
        raise EditFileError(f"the tensors {list(tensors)!r:.200} cannot be stored ({str(error)[:200]})") from error
    write_atomically(path, data)


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors, on the cpu and by increasing name, and the texts; of a file of another program no texts.

    The file may have 4 GiB.

    Raises:
        EditFileError: the file is missing, a folder, of another format (a pickle is never opened), damaged, or holds a tensor of
            another dtype than `save_tensors` takes, NaN or inf.
    """
    file = checked_file(path, _MOST_BYTES, _WHAT)
    try:
        with safe_open(file, "pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get(_KEY, "{}"))
            tensors = {
                name: opened.get_tensor(name).clone() for name in sorted(opened.keys())
            }  # own memory, no mapped file
        for name, tensor in tensors.items():
            _check(name, tensor)
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are not texts by name")
    except Exception as error:  # as above; and json's
        raise EditFileError(
            f"{str(path)!r} is no {_WHAT[2:]} that can be read ({str(error)[:200]}); save or download it again"
        ) from error
    return tensors, metadata


def _check(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise EditFileError(f"{name!r} is {tensor.dtype}; allowed: {allowed}")
    if not torch.isfinite(tensor).all():
        raise EditFileError(f"{name!r} holds NaN or inf; a file of edits holds finite numbers: fit it again")
