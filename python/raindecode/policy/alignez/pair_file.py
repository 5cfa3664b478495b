"""The JSON-lines file that pairs are written to while they are made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from raindecode.errors import ConfigError
from raindecode.policy.alignez.pairs import HEADER

Record = dict[str, Any]
_VERSION = 1


class PairFile:
    """A first line with the settings, then a line per pair, dropped ones included, written through line by line.

    Args:
        path: the file, made when there is none; None keeps nothing.
        settings: plain data; a file that was begun with others is refused.

    Raises:
        ConfigError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Record) -> None:
        self.name = "" if path is None else os.fspath(path)
        self._settings = json.loads(json.dumps(settings))  # as it will be read again
        self._file: IO[bytes] | None = None
        if path is None:
            return
        place = Path(path)
        try:
            self._file = place.open("a+b")
        except OSError as error:
            raise ConfigError(
                f"{self.name!r} cannot be written ({error.strerror}): name a file in a folder that exists"
            ) from error

    def records(self) -> dict[tuple[str, int], Record]:
        """What the file holds, by question and number of the answer. A last line that a killed run left unfinished is cut off.

        Raises:
            ConfigError: it was begun with other settings, or is no file of pairs of this program.
        """
        if self._file is None:
            return {}
        self._file.seek(0)
        found: dict[tuple[str, int], Record] = {}
        whole = 0  # bytes of whole lines
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self._file.truncate(whole)
                break
            whole += len(line)
            record = self._parsed(line, number)
            if number == 1:
                self._check(record)
            else:
                found[record["prompt"], record["answer"]] = record
        if not whole:
            self.write({HEADER: _VERSION, "settings": self._settings})
        return found

    def write(self, record: Record) -> None:
        """Add a line. It is in the operating system's hands when this returns."""
        if self._file is not None:
            self._file.write(json.dumps(record).encode("ascii") + b"\n")
            self._file.flush()

    def _parsed(self, line: bytes, number: int) -> Record:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        wanted = {HEADER, "settings"} if number == 1 else {"prompt", "answer", "chosen", "rejected", "dropped"}
        if not isinstance(record, dict) or not wanted <= set(record):
            raise ConfigError(
                f"line {number} of {self.name!r} was not written by generate_pairs, so nothing can be added to it: name a new "
                "file, or that of the run to go on with"
            )
        return record

    def _check(self, header: Record) -> None:
        if header[HEADER] != _VERSION:
            raise ConfigError(f"{self.name!r} was written by another version of raindecode: name another file")
        found = header["settings"] if isinstance(header["settings"], dict) else {}
        for name in dict.fromkeys((*self._settings, *found)):
            if found.get(name) != self._settings.get(name):
                raise ConfigError(
                    f"{self.name!r} was begun with {name} {json.dumps(found.get(name)):.200}, this run has "
                    f"{json.dumps(self._settings.get(name)):.200}: give the same settings to go on, or name another file"
                )

    def __enter__(self) -> PairFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
