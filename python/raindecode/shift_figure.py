"""The figure of a token shift, drawn with matplotlib where that is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from raindecode import figures

_COLOURS: Final = ("#9fc2a5", "#e8c468", "#c8553d")  # unshifted, marginal, shifted
_BLUE: Final = "#1f5fa8"


def save_curve(path: str | Path, curve: Sequence[Mapping[str, Any]], classes: Sequence[str], title: str) -> None:
    """Write two panels against the position in the answer: shares of the classes, stacked, and mean KL.

    Args:
        curve: as TokenShift.curve.
        classes: names of the shares in it, drawn from below.

    Raises:
        ConfigError: see figures.check_plot.
        OSError: the file cannot be written.
    """
    figures.check_plot(path)
    figure = figures.new_figure(8.8, 3.5)
    figure.suptitle(title, fontsize=10)
    at = [point["position"] for point in curve]
    # Edges of a step per position, so that one position alone has a width as well.
    edges = [*(t - 0.5 for t in at), at[-1] + 0.5] if at else []
    shares, kl = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    below = np.zeros(len(at))
    for name, colour in zip(classes, _COLOURS, strict=True):
        above = below + [point[name] for point in curve]
        if at:
            shares.stairs(above, edges, baseline=below, fill=True, color=colour, label=name)
        below = above
    shares.set_ylabel("share of answers")
    shares.set_ylim(0, 1)
    if at:
        shares.legend(loc="lower right", fontsize=8)
    kl.plot(at, [np.nan if point["kl"] is None else point["kl"] for point in curve], linewidth=1.5, color=_BLUE)
    kl.set_ylabel("KL(aligned || base), nats per token")
    kl.set_ylim(bottom=0)
    for axes in (shares, kl):
        axes.set_xlabel("position in the answer")
        axes.spines[["top", "right"]].set_visible(False)
    kl.grid(axis="y", linewidth=0.5, alpha=0.4)
    figures.save_figure(figure, path)
