"""Whole files in and out: reads are bounded, writes leave either the old file or the new one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from raindecode.errors import EditFileError


def checked_file(path: str | Path, most: int, what: str) -> Path:
    """The path of an ordinary file of at most `most` bytes.

    Raises:
        EditFileError: there is no such file, it is a folder, pipe or device, or it is larger.
    """
    file = Path(path).expanduser()
    try:
        if not file.exists():
            raise EditFileError(f"there is no file {str(path)!r}: give the path of {what}")
        if not file.is_file():
            kind = "a folder" if file.is_dir() else "no ordinary file"
            raise EditFileError(f"{str(path)!r} is {kind}: give the path of {what}")
        size = file.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        if isinstance(error, EditFileError):
            raise
        raise EditFileError(f"{str(path)!r} could not be read ({error}): give the path of {what}") from error
    if size > most:
        raise EditFileError(
            f"{str(path)!r} has {size} bytes, and {what} may have {most} at the most: check that it is one"
        )
    return file


def read_bounded(path: str | Path, most: int, what: str) -> bytes:
    """The content of an ordinary file of at most `most` bytes.

    Raises:
        EditFileError: see checked_file; or it cannot be read.
    """
    file = checked_file(path, most, what)
    try:
        with file.open("rb") as stream:
            return stream.read(most)
    except OSError as error:
        raise EditFileError(f"{str(path)!r} could not be read ({error}): give the path of {what}") from error


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file beside `path`, then put it in its place; a failure leaves what was there.

    Raises:
        EditFileError: it cannot be written.
    """
    file = Path(path).expanduser()
    beside = file.with_name(f".{file.name}.{secrets.token_hex(6)}.tmp") if file.name else file
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(beside, file)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:
        raise EditFileError(
            f"{str(path)!r} could not be written ({error}): give a file in a folder that exists and may be written to"
        ) from error
