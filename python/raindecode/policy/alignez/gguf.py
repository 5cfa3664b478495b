"""Control vectors in GGUF, the file format that llama.cpp and others exchange additive edits in.

A control vector is one direction per layer. The file has general.architecture = "controlvector", controlvector.model_hint (string),
controlvector.layer_count (u32, how many directions) and one-dimensional float32 tensors "direction.<layer>". It has no field
for an operator, a rank, a place, a scale or a model's hash: only additive edits of rank 1 can be exchanged this way.

Layers: direction.N is added to the output of block N counted from 0, after its last residual addition, which is layer N at the tap
`block_out` here. direction.0 does not occur: llama.cpp stores nothing for block 0 and refuses such a tensor. This numbering, and the
layout of the file below, are written from our knowledge of llama.cpp; they were not checked against its source.

Layout, all little-endian: "GGUF", u32 version, u64 tensors, u64 keys; per key a string (u64 length, UTF-8), a u32 type, the value;
per tensor a name, u32 dimensions, u64 each, u32 type (0 is float32), u64 offset; then, at the next multiple of
general.alignment (32 by default), the data, every tensor at an offset that is such a multiple.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raindecode.errors import EditFileError
from raindecode.policy.alignez.whole_files import read_bounded, write_atomically
from raindecode.settings import is_whole

__all__ = ["read_control_vector", "write_control_vector"]

_MAGIC: Final = b"GGUF"
_VERSION: Final = 3  # 2 has the same layout; 1 had counts of 32 bits
_ALIGNMENT: Final = 32
_MOST_BYTES: Final = 1 << 26  # 256 layers of width 65,536
_MOST_LAYERS: Final = 100_000
_MOST_KEYS: Final = 4096
_STRING, _ARRAY, _U32 = 8, 9, 4
_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, _U32: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of scalar types
_FLOAT32: Final = 0
_NAME: Final = re.compile(r"direction\.(0|[1-9][0-9]{0,5})", re.ASCII)
_WHAT: Final = "a control vector in GGUF"


class _Bad(Exception):
    """Why the bytes are no control vector."""


class _Info(NamedTuple):
    """A tensor's place: `offset` counts from the start of the data."""

    layer: int
    width: int
    offset: int


def read_control_vector(path: str | Path) -> tuple[str, dict[int, Tensor]]:
    """Read the model hint and the directions.

    The file is read as hostile: every count, length and offset is checked against the bytes there are before it is used, so memory
    stays within a small multiple of the file, which may have 64 MiB. Unknown keys and bytes after the last tensor are skipped.

    Returns:
        The hint, "" where there is none, and per layer N (1 or more, see the module's text) a direction [d] float32, all of
        one width and finite, in increasing order of the layers.

    Raises:
        EditFileError: the file cannot be read, or is damaged, of another kind, or holds what no control vector holds.
    """
    data = read_bounded(path, _MOST_BYTES, _WHAT)
    try:
        return _parse(data)
    except _Bad as why:
        raise EditFileError(
            f"{str(path)!r} is no control vector that can be read: {why}; export or download it again"
        ) from why


def write_control_vector(path: str | Path, model_hint: str, directions: Mapping[int, Tensor]) -> None:
    """Write directions as float32; the file appears whole or not at all, and its bytes depend on the arguments alone.

    Args:
        model_hint: the model's architecture, such as "llama"; for the reader's information.
        directions: per layer of 1 or more (see the module's text) [d] floats of one width, scaled as they are to be added.

    Raises:
        EditFileError: a layer or tensor cannot be stored, or the file cannot be written.
    """
    rows = _as_rows(directions)
    try:
        hint = model_hint.encode("utf-8")
    except (AttributeError, UnicodeEncodeError) as error:
        raise EditFileError(f"model_hint is {model_hint!r}; allowed: text, such as 'llama'") from error
    keys = [
        _string(b"general.architecture") + struct.pack("<I", _STRING) + _string(b"controlvector"),
        _string(b"controlvector.model_hint") + struct.pack("<I", _STRING) + _string(hint),
        _string(b"controlvector.layer_count") + struct.pack("<II", _U32, len(rows)),
    ]
    infos, parts, offset = [], [], 0
    for layer, row in rows.items():
        infos.append(_string(b"direction.%d" % layer) + struct.pack("<IQIQ", 1, len(row), _FLOAT32, offset))
        parts.append(_padded(row.tobytes()))
        offset += len(parts[-1])
    header = _MAGIC + struct.pack("<IQQ", _VERSION, len(rows), len(keys)) + b"".join(keys + infos)
    data = _padded(header) + b"".join(parts)
    if len(data) > _MOST_BYTES:
        raise EditFileError(f"these directions take {len(data)} bytes; a control vector may have {_MOST_BYTES}")
    write_atomically(path, data)


def _as_rows(directions: Mapping[int, Tensor]) -> dict[int, np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """Rows of one width by increasing layer, checked."""
    if not directions:
        raise EditFileError("there are no directions to write; give at least one layer's")
    for layer in directions:
        if not is_whole(layer) or not 1 <= layer <= _MOST_LAYERS:
            raise EditFileError(
                f"a direction is for layer {layer!r}; a control vector in GGUF takes layers from 1 to {_MOST_LAYERS}, and none for "
                "block 0: leave it out, or save the edit as safetensors"
            )
    rows = {}
    for layer in sorted(directions):
        tensor = directions[layer]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim != 1 or not len(tensor):
            given = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise EditFileError(f"the direction of layer {layer} is {given}; allowed: a tensor of floats [width]")
        row = tensor.detach().to("cpu", torch.float32).contiguous()
        if not torch.isfinite(row).all():
            raise EditFileError(f"the direction of layer {layer} holds NaN or numbers beyond float32; fit it again")
        rows[int(layer)] = row.numpy().astype("<f4")
    widths = {len(row) for row in rows.values()}
    if len(widths) > 1:
        raise EditFileError(f"the directions have widths {sorted(widths)}; they must be of one width, the model's")
    return rows


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


class _Reader:
    """Takes bytes from the front, never more than there are."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def skip(self, count: int, what: str) -> int:
        """Move on by `count` bytes; where they began."""
        if count > len(self.data) - self.at:
            raise _Bad(f"it ends within {what} (byte {self.at} of {len(self.data)})")
        self.at += count
        return self.at - count

    def number(self, form: str, what: str) -> int:
        """A number of struct's form."""
        form = "<" + form
        return int(struct.unpack_from(form, self.data, self.skip(struct.calcsize(form), what))[0])

    def string(self, what: str) -> str:
        """A length and UTF-8."""
        length = self.number("Q", what)
        begin = self.skip(length, what)
        try:
            return self.data[begin : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Bad(f"{what} is no text") from error

    def value(self, kind: int, what: str) -> str | int | None:
        """A string, or an integer of 32 bits without sign; None for every other kind, which is skipped."""
        if kind == _STRING:
            return self.string(what)
        if kind == _U32:
            return self.number("I", what)
        if kind == _ARRAY:
            self._skip_array(what)
        elif kind in _SIZES:
            self.skip(_SIZES[kind], what)
        else:
            raise _Bad(f"{what} is of the unknown type {kind}")
        return None

    def _skip_array(self, what: str) -> None:
        kind, length = self.number("I", what), self.number("Q", what)
        if kind in _SIZES:
            self.skip(_SIZES[kind] * length, what)
        elif kind == _STRING:
            self.room(length, 8, what)
            for _ in range(length):
                self.skip(self.number("Q", what), what)
        else:
            raise _Bad(f"{what} is an array of the type {kind}, which is not read")

    def room(self, count: int, each: int, what: str) -> None:
        """Refuse a count of things of at least `each` bytes that cannot be there."""
        if count * each > len(self.data) - self.at:
            raise _Bad(f"it names {count} {what}, more than its {len(self.data)} bytes can hold")


def _parse(data: bytes) -> tuple[str, dict[int, Tensor]]:
    reader = _Reader(data)
    if data[:4] != _MAGIC:
        raise _Bad("it does not begin with GGUF")
    reader.skip(4, "the header")
    version = reader.number("I", "the header")
    if version not in (2, _VERSION):
        raise _Bad(f"it is of GGUF version {version}, little-endian; versions 2 and 3 are read")
    num_tensors, num_keys = reader.number("Q", "the header"), reader.number("Q", "the header")
    hint, alignment = _keys(reader, num_keys)
    reader.room(num_tensors, 8 + 4 + 8 + 4 + 8, "tensors")
    if not 1 <= num_tensors <= _MOST_LAYERS:
        raise _Bad(f"it holds {num_tensors} directions; 1 to {_MOST_LAYERS} are read")
    infos = [_info(reader) for _ in range(num_tensors)]
    if len({info.layer for info in infos}) < num_tensors:
        raise _Bad("it holds two directions of one layer")
    if len({info.width for info in infos}) > 1:
        raise _Bad(f"its directions have widths {sorted({info.width for info in infos})[:5]}")
    begin = -(-reader.at // alignment) * alignment
    return hint, _tensors(data, begin, alignment, infos)


def _keys(reader: _Reader, count: int) -> tuple[str, int]:
    """The hint and the alignment; refuses what is no control vector."""
    reader.room(count, 8 + 4 + 1, "keys")
    if count > _MOST_KEYS:
        raise _Bad(f"it has {count} keys, more than the {_MOST_KEYS} that are read")
    values: dict[str, str | int | None] = {}
    for _ in range(count):
        key = reader.string("a key")
        if key in values:
            raise _Bad(f"it gives the key {key[:80]!r} twice")
        values[key] = reader.value(reader.number("I", "a key's type"), f"the value of {key[:80]!r}")
    architecture = values.get("general.architecture")
    if architecture != "controlvector":
        shown = "missing" if architecture is None else repr(architecture)[:80]
        raise _Bad(f"its general.architecture is {shown}, not 'controlvector'")
    hint = values.get("controlvector.model_hint", "")
    if not isinstance(hint, str):
        raise _Bad("its controlvector.model_hint is no text")
    alignment = values.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise _Bad(f"its general.alignment is {alignment!r}, no power of two up to 2^20")
    return hint, alignment


def _info(reader: _Reader) -> _Info:
    name = reader.string("a tensor's name")
    match = _NAME.fullmatch(name)
    if match is None:
        raise _Bad(f"it holds a tensor {name[:80]!r}; a control vector holds direction.<layer>")
    layer = int(match[1])
    if not 1 <= layer <= _MOST_LAYERS:
        raise _Bad(f"it holds {name}; layers go from 1 to {_MOST_LAYERS}")
    dimensions = reader.number("I", name)
    if dimensions != 1:
        raise _Bad(f"{name} has {dimensions} dimensions; a direction has one")
    width, kind, offset = reader.number("Q", name), reader.number("I", name), reader.number("Q", name)
    if kind != _FLOAT32:
        raise _Bad(f"{name} is of the tensor type {kind}; a direction is float32 (type 0)")
    if not width:
        raise _Bad(f"{name} is empty")
    return _Info(layer, width, offset)


def _tensors(data: bytes, begin: int, alignment: int, infos: list[_Info]) -> dict[int, Tensor]:
    """Every tensor by increasing layer; refuses what overlaps or lies outside the file."""
    end = 0
    for info in sorted(infos, key=lambda info: info.offset):
        name = f"direction.{info.layer}"
        if info.offset % alignment:
            raise _Bad(f"{name} is at offset {info.offset}, no multiple of {alignment}")
        if info.offset < end:
            raise _Bad(f"{name} overlaps another direction")
        end = info.offset + 4 * info.width
        if begin + end > len(data):
            raise _Bad(f"it ends within {name} ({len(data)} bytes of {begin + end})")
    found = {}
    for info in sorted(infos):
        row = np.frombuffer(data, "<f4", info.width, begin + info.offset).astype(np.float32)
        if not np.isfinite(row).all():
            raise _Bad(f"direction.{info.layer} holds NaN or inf")
        found[info.layer] = torch.from_numpy(row)
    return found
