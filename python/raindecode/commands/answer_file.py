"""A JSON-lines file of answers that outlives the run that writes it: killed at any moment, it can be gone on with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from raindecode.errors import ConfigError

try:
    import fcntl
except ImportError:  # not on this system: two runs on one file are then not noticed
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]
_BEGINNING = b'{"index": '  # of every record


class AnswerFile:
    """One JSON object per line, written through to the operating system line by line.

    Nothing that is there is lost by opening it: a file that holds answers is refused unless one of the two options says
    what to do with them.

    Args:
        path: the file; a device or pipe may be written, and not resumed.
        resume: go on behind the answers it holds; a new file when there is none.
        overwrite: empty it, once `begin` is called.

    Raises:
        ConfigError: it cannot be written, holds answers, or another run is writing it; the message says what to do.
    """

    def __init__(self, path: str, *, resume: bool = False, overwrite: bool = False) -> None:
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite exclude each other; give one of them")
        self.path = path
        self.resume = resume
        place = Path(path)
        regular = place.is_file() or not place.exists()
        self._empties = overwrite and regular
        if resume and not regular:
            raise ConfigError(f"--resume reads {path!r} first, which is no ordinary file: drop --resume, or name one")
        try:
            self._file: IO[bytes] = place.open("a+b" if regular else "wb")
        except OSError as error:
            raise ConfigError(
                f"{path!r} cannot be written ({error.strerror}): name a file in a folder that exists"
            ) from error
        try:
            if regular:
                self._claim()
            if regular and not resume and not overwrite and place.stat().st_size:
                raise ConfigError(
                    f"{path!r} holds answers already: --resume goes on with them, --overwrite drops them; "
                    "or name another file"
                )
        except BaseException:
            self._file.close()
            raise

    def begin(self) -> None:
        """The run can be done: empty the file where that was asked for."""
        if self._empties:
            self._file.truncate(0)

    def records(self) -> Iterator[tuple[int, Record]]:
        """(line number, record) of every whole line. A last line that a killed run left unfinished is cut off.

        Raises:
            ConfigError: a line is no JSON object.
        """
        self._file.seek(0)
        whole = 0  # bytes of whole lines
        for number, line in enumerate(self._file, start=1):
            record = _parsed(line)
            ended = line.endswith(b"\n")
            if record is None and (ended or not _is_torn(line)):
                raise ConfigError(
                    f"line {number} of {self.path!r} is no answer of raindecode: name the file of the run to go on with, "
                    "or --overwrite to drop what it holds"
                )
            if record is None:
                self._file.truncate(whole)
                return
            whole += len(line)
            yield number, record
            if not ended:  # only the line's end is missing
                self._file.write(b"\n")
                self._file.flush()

    def write(self, record: Record) -> None:
        """Add a line. It is in the operating system's hands when this returns.

        Raises:
            OSError: the disk is full or gone.
        """
        self._file.write(json.dumps(record).encode("ascii") + b"\n")  # ASCII: no character of it breaks a line
        self._file.flush()

    def close(self) -> None:
        """Close the file; another run may have it."""
        self._file.close()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _claim(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another run is writing {self.path!r}: wait for it or stop it, or name another file"
            ) from error
        except OSError:
            return  # a file system without locks


def require_output(output: str | None, resume: bool, overwrite: bool) -> None:
    """Refuse options about a file that was not named.

    Raises:
        ConfigError: --resume or --overwrite stands alone.
    """
    if output is None and (resume or overwrite):
        raise ConfigError(
            f"{'--resume' if resume else '--overwrite'} says what to do with a file: name it with --output"
        )


def check_settings(path: str, number: int, record: Record, settings: Record) -> None:
    """Refuse a record that was made with other settings than those of this run.

    Raises:
        ConfigError: the message names the first setting that differs.
    """
    found = record.get("settings")
    if not isinstance(found, dict):
        raise ConfigError(
            f"line {number} of {path!r} does not say what settings it was made with, so nothing can be added to it: "
            "name another file, or --overwrite to drop what it holds"
        )
    for name in dict.fromkeys((*settings, *found)):
        if found.get(name) != settings.get(name):
            raise ConfigError(
                f"{path!r} was written with {_said(name, found)} (line {number}), this run has {_said(name, settings)}: "
                "give the same settings to go on, or name another file"
            )


def _said(name: str, settings: Record) -> str:
    return f"{name} {json.dumps(settings[name])}" if name in settings else f"the default {name}"


def _is_torn(line: bytes) -> bool:
    """Whether a line without an end may be the beginning of a record."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith(_BEGINNING) or _BEGINNING.startswith(line)
    return False


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
