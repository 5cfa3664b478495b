"""The published variants of AlignEZ and two baselines, as settings of a fit."""

from __future__ import annotations

from typing import Final

from raindecode.errors import ConfigError
from raindecode.policy.alignez.edits import Positions
from raindecode.policy.alignez.fit import FitSettings

_EVERY_STEP: Final = Positions("last")

PRESETS: Final[dict[str, FitSettings]] = {
    "svd": FitSettings("svd", pool="prompt", context="elicited", layers="half", positions=_EVERY_STEP),
    "ccs": FitSettings("ccs", pool="prompt", context="elicited", layers="half", positions=_EVERY_STEP),
    "svd-knn": FitSettings("svd-knn", pool="prompt", context="elicited", layers="half", positions=_EVERY_STEP),
    "svd-diff": FitSettings("svd-diff", pool="last", positions=_EVERY_STEP),
    "mean-diff": FitSettings("mean-diff", tap="block_out", pool="last", positions=Positions("all")),
    "logistic": FitSettings("logistic", tap="block_out", pool="last", positions=Positions("all")),
}
"""Settings by name."""


def preset(name: str) -> FitSettings:
    """The settings of a name.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"the preset is {name!r}; allowed: {', '.join(PRESETS)}")
    return PRESETS[name]
