"""The request parameters of DeRa in other stacks: `dera_lambda` and `dera_allow_negative`."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, Final

from raindecode.errors import ConfigError
from raindecode.policy.dera import LARGEST

LAMBDA: Final = "dera_lambda"
ALLOW_NEGATIVE: Final = "dera_allow_negative"
_KNOWN: Final = (LAMBDA, ALLOW_NEGATIVE)


def lambda_of(given: Mapping[str, Any] | None) -> float | None:
    """λ of a request from its free-form parameters; None where it asks for no mixture.

    Args:
        given: parameters by name; of those that do not begin with "dera_" nothing is thought.

    Raises:
        ConfigError: λ is no number, not finite, or outside 0 to 1000 (-1000 to 1000 with `dera_allow_negative`), or another
            parameter begins with "dera_".
    """
    if not given:
        return None
    unknown = sorted(name for name in given if isinstance(name, str) and name.startswith("dera_"))
    unknown = [name for name in unknown if name not in _KNOWN]
    if unknown:
        raise ConfigError(f"the request has {', '.join(unknown)}; allowed of DeRa: {', '.join(_KNOWN)}")
    negative = given.get(ALLOW_NEGATIVE, False)
    if negative not in (False, True):  # 0 and 1 too: not every API can send a boolean
        raise ConfigError(f"{ALLOW_NEGATIVE} is {negative!r}; allowed: true or false")
    value = given.get(LAMBDA)
    if value is None:
        if LAMBDA in given or ALLOW_NEGATIVE in given:
            raise ConfigError(f"{LAMBDA} is {value!r}; give a number, or leave all parameters of DeRa out")
        return None
    least = -LARGEST if negative else 0.0
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= LARGEST:  # type: ignore[operator]
        wider = "" if negative else f"; with {ALLOW_NEGATIVE} from -{LARGEST:g} on, which reverses the alignment"
        raise ConfigError(
            f"{LAMBDA} is {value!r}; allowed: a number from {least:g} to {LARGEST:g}, 0 being the reference and 1 the aligned model{wider}"
        )
    return float(value)
