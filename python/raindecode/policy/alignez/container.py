"""Tensors and text metadata in the safetensors format, for files of edits: nothing in them is ever executed.

Layout: u64 header length, little-endian; the header, JSON in UTF-8; the tensors' bytes, one after another without gaps. Own reader and
writer: what is read is checked against the file before it is used, and the same content gives the same bytes, so that a file
can be told by its hash.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from raindecode.errors import EditFileError
from raindecode.policy.alignez.whole_files import read_bounded, write_atomically

__all__ = ["load_tensors", "save_tensors"]

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA: Final = "__metadata__"
_MOST_BYTES: Final = 1 << 32
_MOST_HEADER: Final = 1 << 24
_MOST_DIMENSIONS: Final = 8
_MOST_ELEMENTS: Final = 1 << 40  # also bounds the other dimensions of a tensor without elements
_WHAT: Final = "a safetensors file of edits"


class _Bad(Exception):
    """Why the bytes are no such file."""


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file that any safetensors reader takes; it appears whole or not at all.

    Args:
        tensors: by name, on any device, of any shape, float64, float32, float16, bfloat16 or integers, all finite.
        metadata: texts by name.

    Raises:
        EditFileError: a name, tensor or text cannot be stored, or the file cannot be written.
    """
    header: dict[str, Any] = {}
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in metadata.items()):
        raise EditFileError(f"the metadata are {dict(metadata)!r}; allowed: texts by name")
    if metadata:
        header[_METADATA] = dict(sorted(metadata.items()))
    _check_tensors(tensors)
    parts, offset = [], 0
    # Wide elements first: every tensor then begins at a multiple of its element's size.
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name].detach().cpu().contiguous()
        parts.append(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        end = offset + len(parts[-1])
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise EditFileError(
            f"a name or a text of the metadata cannot be written as UTF-8 ({error}); change it"
        ) from error
    text += b" " * (-len(text) % 8)
    if len(text) > _MOST_HEADER or offset > _MOST_BYTES - len(text) - 8:
        raise EditFileError(
            f"names and metadata take {len(text)} bytes and tensors {offset}; allowed are {_MOST_HEADER} and {_MOST_BYTES} in all"
        )
    write_atomically(path, b"".join([struct.pack("<Q", len(text)), text, *parts]))


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors, on the cpu and by increasing name, and the metadata.

    The file may have 4 GiB. It is read whole; nothing in it makes this take more memory than a small multiple of that.

    Raises:
        EditFileError: the file is missing, a folder, of another format (a pickle is never opened), damaged, or holds a tensor of another
            dtype than `save_tensors` takes, NaN or inf.
    """
    data = read_bounded(path, _MOST_BYTES, _WHAT)
    try:
        header, begin = _header(data)
        metadata = _metadata(header.pop(_METADATA, {}))
        _check_layout(header, len(data) - begin)
        return {name: _tensor(name, header[name], data, begin) for name in sorted(header)}, metadata
    except _Bad as why:
        raise EditFileError(
            f"{str(path)!r} is no {_WHAT[2:]} that can be read: {why}; save or download it again"
        ) from why


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _NAMES)
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name or name == _METADATA:
            raise EditFileError(f"a tensor's name is {name!r}; allowed: text, not empty and not {_METADATA}")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in _NAMES:
            kind = f"{tensor.dtype} ({tensor.layout})" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise EditFileError(f"{name!r} is {kind}; allowed: a dense tensor of {allowed}")
        if tensor.ndim > _MOST_DIMENSIONS:
            raise EditFileError(f"{name!r} has {tensor.ndim} dimensions; allowed: up to {_MOST_DIMENSIONS}")
        if not torch.isfinite(tensor).all():
            raise EditFileError(f"{name!r} holds NaN or inf; a file of edits holds finite numbers: fit it again")


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin."""
    if data[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05") and data[8:9] != b"{":
        raise _Bad("it looks like a pickle or a zip archive, such as torch.save writes; these are never opened")
    if len(data) < 8:
        raise _Bad(f"it has {len(data)} bytes, fewer than a header")
    (length,) = struct.unpack_from("<Q", data)
    if length > min(_MOST_HEADER, len(data) - 8):
        raise _Bad(
            f"its header would have {length} bytes; the file has {len(data)} and a header may have {_MOST_HEADER}"
        )
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
        json.dumps(header, ensure_ascii=False).encode(
            "utf-8"
        )  # half a surrogate pair, written as an escape, is no text
    except (ValueError, RecursionError) as error:
        raise _Bad(f"its header is no JSON ({str(error)[:200]})") from error
    if not isinstance(header, dict):
        raise _Bad("its header is no object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Bad("its header gives a name twice")
    return found


def _metadata(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise _Bad(f"its {_METADATA} are not texts by name")
    return found


def _check_layout(header: dict[str, Any], size: int) -> None:
    """Refuse entries that are none, and tensors that do not fill the rest of the file one after another."""
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise _Bad(f"the entry of {name[:80]!r} is not dtype, shape and data_offsets")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
            raise _Bad(f"{name[:80]!r} is of dtype {str(entry['dtype'])[:20]!r}; allowed: {', '.join(_DTYPES)}")
        if not _are_sizes(entry["shape"]) or len(entry["shape"]) > _MOST_DIMENSIONS:
            raise _Bad(f"{name[:80]!r} has the shape {str(entry['shape'])[:80]}")
        if math.prod(n for n in entry["shape"] if n) > _MOST_ELEMENTS:
            raise _Bad(f"{name[:80]!r} has the shape {str(entry['shape'])[:80]}, more than any tensor here")
        if not _are_sizes(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
            raise _Bad(f"{name[:80]!r} has the offsets {str(entry['data_offsets'])[:80]}")
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        needed = math.prod(entry["shape"]) * _DTYPES[entry["dtype"]].itemsize
        if first != end or last - first != needed:
            raise _Bad(
                f"{name[:80]!r} lies at bytes {first} to {last}; its shape and the tensors before it say {end} to {end + needed}"
            )
        end = last
    if end != size:
        raise _Bad(f"its tensors have {end} bytes and the file has {size} for them")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _tensor(name: str, entry: dict[str, Any], data: bytes, begin: int) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    first, last = entry["data_offsets"]
    if first == last:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.frombuffer(bytearray(memoryview(data)[begin + first : begin + last]), dtype=dtype).reshape(shape)
    if not torch.isfinite(tensor).all():
        raise _Bad(f"{name[:80]!r} holds NaN or inf")
    return tensor
