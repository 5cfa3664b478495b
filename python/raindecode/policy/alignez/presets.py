"""The published variants of AlignEZ and two baselines, as settings of a fit."""

from __future__ import annotations

from typing import Final

from raindecode.errors import ConfigError
from raindecode.policy.alignez.edits import Positions
from raindecode.policy.alignez.fit import FitSettings

_MOST: Final = 0.75  # of the layers: their CCS losses differ little, but for those that hold no contrast yet
_FIRST_WORD: Final = Positions("last", end=0)

PRESETS: Final[dict[str, FitSettings]] = {
    "svd": FitSettings("svd", pool="prompt", context="elicited", layers=_MOST),
    "ccs": FitSettings("ccs", pool="prompt", context="elicited", layers=_MOST, normalize="none"),
    "svd-knn": FitSettings("svd-knn", pool="prompt", context="elicited", layers=_MOST),
    "svd-diff": FitSettings("svd-diff"),
    "mean-diff": FitSettings(
        "mean-diff", tap="block_out", pool="prompt", context="elicited", layers=0.5, positions=_FIRST_WORD
    ),
    "logistic": FitSettings(
        "logistic", tap="block_out", pool="prompt", context="elicited", layers=0.5, positions=_FIRST_WORD
    ),
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
