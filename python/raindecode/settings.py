"""Checks of settings a user gives, shared by the dataclasses and calls that take them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from raindecode.errors import ConfigError


def is_whole(value: object) -> bool:
    """True for an integer of any kind, not for a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_whole(name: str, value: object, least: int) -> None:
    """Raise ConfigError unless `value` is an integer of at least `least`."""
    if not is_whole(value) or value < least:  # type: ignore[operator]
        raise ConfigError(f"{name} is {value!r}; allowed: a whole number, {least} or more")


def require_finite(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a finite number."""
    try:
        finite = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        finite = False
    if not finite:
        raise ConfigError(f"{name} is {value!r}; allowed: a finite number")


def as_strings(name: str, given: Any) -> tuple[str, ...]:
    """`given` as a tuple of non-empty strings.

    Raises:
        ConfigError: it is something else, such as one bare string.
    """
    if isinstance(given, str):
        raise ConfigError(f"{name} is the string {given!r}; give a list of strings, such as [{given!r}]")
    if not isinstance(given, Iterable):
        raise ConfigError(f"{name} is {given!r}; allowed: a list of strings")
    strings = tuple(given)
    if any(not isinstance(s, str) or not s for s in strings):
        raise ConfigError(f"{name} holds {list(strings)!r}; allowed: non-empty strings")
    return strings


def as_token_ids(name: str, given: Any) -> tuple[int, ...]:
    """`given` as a tuple of token ids, 0 or more each.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f"{name} is {given!r}; allowed: a list of token ids")
    ids = tuple(given)
    if any(not is_whole(t) or t < 0 for t in ids):
        raise ConfigError(f"{name} holds {list(ids)!r}; allowed: token ids, 0 or more each")
    return tuple(int(t) for t in ids)
