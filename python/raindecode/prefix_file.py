"""Files of constant prompts' K/V: safetensors, with what they belong to and checksums in the metadata."""

from __future__ import annotations

import json
import os
import secrets
import stat
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raindecode.errors import PrefixFileError

_FORMAT: Final = "rainkernels-prefix/1"
_AGAIN: Final = "write it again (Decoder.save_prefix; with --prefix-cache remove it first, or name another file)"


class PrefixRecord(NamedTuple):
    """One constant prompt of a file.

    Attributes:
        what: what it is called.
        ids: token ids.
        models: of each model that ran it: number, architecture, fingerprint, adapter's fingerprint, number type.
        edits: from which row on which edit is in force.
        tensors: rows [len(ids), ...] by "model.layer.k" and so on.
    """

    what: str
    ids: tuple[int, ...]
    models: Sequence[Mapping[str, Any]]
    edits: Sequence[tuple[int, str]]
    tensors: dict[str, Tensor]


def write_prefixes(path: str | Path, records: Sequence[PrefixRecord]) -> None:
    """Write records; a failure leaves what was there.

    Raises:
        PrefixFileError: the file cannot be written.
    """
    file = Path(path).expanduser()
    tensors: dict[str, Tensor] = {}
    for number, record in enumerate(records):
        tensors[f"{number}.ids"] = torch.tensor(record.ids, dtype=torch.int32)
        tensors |= {f"{number}.{name}": rows.contiguous().cpu() for name, rows in record.tensors.items()}
    metadata = {
        "format": _FORMAT,
        "prefixes": json.dumps(
            [{"what": r.what, "models": list(r.models), "edits": [list(edit) for edit in r.edits]} for r in records]
        ),
        "crc32": json.dumps(_checksums(tensors)),
    }
    beside = file.with_name(f".{file.name}.{secrets.token_hex(6)}.tmp") if file.name else file
    try:
        try:
            os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            mode = stat.S_IMODE(beside.stat().st_mode)
            save_file(tensors, beside, metadata)
            beside.chmod(mode)  # the library leaves files to their owner alone
            os.replace(beside, file)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except (OSError, ValueError, SafetensorError) as error:
        raise PrefixFileError(
            f"{str(path)!r} could not be written ({error}): give a file in a folder that exists and may be written to"
        ) from error


def read_prefixes(path: str | Path, expected: Sequence[PrefixRecord]) -> list[PrefixRecord]:
    """The records of a file, with tensors, where they are those expected.

    Raises:
        PrefixFileError: it cannot be read, is damaged, or holds something else; the message says what differs.
    """
    name = str(path)
    file = Path(path).expanduser()
    try:
        if not file.is_file():
            raise PrefixFileError(f"there is no file {name!r}: write one with Decoder.save_prefix")
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise PrefixFileError(
                    f"{name!r} is no file of prompts' K/V (format {metadata.get('format')!r}, this version reads {_FORMAT!r}): {_AGAIN}"
                )
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, PrefixFileError):
            raise
        raise PrefixFileError(
            f"{name!r} could not be read ({error}): it is damaged or no safetensors file; {_AGAIN}"
        ) from error
    try:
        described = json.loads(metadata["prefixes"])
        sums = json.loads(metadata["crc32"])
        _compare_records(name, described, tensors, expected)
        wrong = sorted(key for key, value in _checksums(tensors).items() if sums.get(key) != value)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, PrefixFileError):
            raise
        raise PrefixFileError(f"{name!r} is damaged: its metadata could not be read ({error!r}); {_AGAIN}") from error
    if wrong or set(sums) != set(tensors):
        raise PrefixFileError(
            f"{name!r} is damaged: checksums of {', '.join(wrong[:3]) or 'its tensors'} do not agree; {_AGAIN}"
        )
    return [
        record._replace(tensors=_tensors_of(name, tensors, number, len(record.ids)))
        for number, record in enumerate(expected)
    ]


def _tensors_of(name: str, tensors: Mapping[str, Tensor], number: int, length: int) -> dict[str, Tensor]:
    mine = {key.partition(".")[2]: rows for key, rows in tensors.items() if key.startswith(f"{number}.")}
    del mine["ids"]
    if not mine or any(rows.dim() < 2 or len(rows) != length for rows in mine.values()):
        raise PrefixFileError(f"{name!r} is damaged: not every tensor has a row per token; {_AGAIN}")
    return mine


def _compare_records(
    name: str, described: Any, tensors: Mapping[str, Tensor], expected: Sequence[PrefixRecord]
) -> None:
    """Raise PrefixFileError where the file belongs to something else."""
    if len(described) != len(expected):
        raise PrefixFileError(
            f"{name!r} holds {len(described)} prompts ({', '.join(one['what'] for one in described)}), this policy and search have "
            f"{len(expected)} ({', '.join(one.what for one in expected)}): give those it was written with, or {_AGAIN}"
        )
    for number, (found, wanted) in enumerate(zip(described, expected, strict=True)):
        ids = tuple(tensors[f"{number}.ids"].tolist())
        if len(found["models"]) != len(wanted.models):
            raise PrefixFileError(
                f"{name!r} was made by {len(found['models'])} models, {len(wanted.models)} run {wanted.what} here: {_AGAIN}"
            )
        for theirs, ours in zip(found["models"], wanted.models, strict=True):
            for key, what in _NAMES.items():
                if theirs[key] != ours[key]:
                    raise PrefixFileError(
                        f"{name!r} was made by another {what} ({theirs[key] or 'none'}) than {wanted.what} is run by here "
                        f"({ours[key] or 'none'}): {_AGAIN}"
                    )
        if ids != tuple(wanted.ids):
            at = next((i for i, (a, b) in enumerate(zip(ids, wanted.ids)) if a != b), min(len(ids), len(wanted.ids)))  # noqa: B905
            raise PrefixFileError(
                f"{name!r} is of another prompt: {wanted.what} has {len(wanted.ids)} constant tokens, the file {len(ids)}, and they differ "
                f"from token {at} on; {_AGAIN}"
            )
        if [tuple(edit) for edit in found["edits"]] != [tuple(edit) for edit in wanted.edits]:
            raise PrefixFileError(
                f"{name!r} was made under other edits of hidden states than {wanted.what} has here: {_AGAIN}"
            )


_NAMES: Final = {
    "model": "model of the mixture",
    "architecture": "architecture",
    "fingerprint": "model",
    "adapter": "adapter",
    "dtype": "number type",
}


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """CRC-32 of every tensor's bytes."""

    def one(tensor: Tensor) -> int:
        return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # zlib lets go of the interpreter
        return dict(zip(tensors, pool.map(one, tensors.values()), strict=True))
