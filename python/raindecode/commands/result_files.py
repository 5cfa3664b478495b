"""Files that a command writes once, at its end: refused before anything has run where they cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from raindecode.commands.output import open_for_writing
from raindecode.errors import ConfigError


@contextmanager
def result_files(
    written: Mapping[str, str | None], others: Mapping[str, str | None], overwrite: bool
) -> Iterator[None]:
    """Files that it made and nothing came into are removed at the end.

    Args:
        written: by option, None where it was not given.
        others: that the command reads or keeps in another way; "-" is none.
        overwrite: whether a file may hold something.

    Raises:
        ConfigError: a file cannot be written, is named twice, or holds something and `overwrite` is off.
    """
    named = {option: path for option, path in written.items() if path is not None}
    if overwrite and not named:
        raise ConfigError(f"--overwrite says what to do with a file: name it with {' or '.join(written)}")
    seen: dict[Path, str] = {}
    for option, path in {**others, **named}.items():
        if path is None or (option in others and path == "-"):
            continue
        other = seen.setdefault(Path(path).resolve(), option)
        if other != option:
            raise ConfigError(f"{other} and {option} both name {path!r}: give each a file of its own")
    new = []
    try:
        for path in named.values():
            there = Path(path).exists()
            open_for_writing(path).close()
            if not there:
                new.append(Path(path))
            elif not overwrite and Path(path).is_file() and Path(path).stat().st_size:
                raise ConfigError(f"{path!r} holds something already: --overwrite replaces it; or name another file")
        yield
    finally:
        for made in new:
            if made.exists() and not made.stat().st_size:
                made.unlink()
