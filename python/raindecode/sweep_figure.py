"""The figure of a λ sweep, drawn with matplotlib where that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from raindecode import figures

Values: TypeAlias = "Sequence[tuple[float, tuple[float, float] | None]]"  # mean and interval per point
_BLUE: Final = "#1f5fa8"


def save_figure(
    path: str | Path,
    at: Sequence[float] | None,
    labels: Sequence[str],
    axis: str,
    panels: Sequence[tuple[str, Values]],
) -> None:
    """Write panels side by side, each a quantity with its 95 % intervals against the same axis.

    Args:
        at: where the points stand; None takes them side by side under their labels.
        axis: what the horizontal axis is.
        panels: (what the vertical axis is, values of the points); a mean that is nan leaves a gap.

    Raises:
        ConfigError: see figures.check_plot.
        OSError: the file cannot be written.
    """
    figures.check_plot(path)
    figure = figures.new_figure(4.4 * len(panels), 3.3)
    order = sorted(range(len(labels)), key=lambda i: i if at is None else at[i])
    x = [float(i) if at is None else at[i] for i in order]
    for i, (name, values) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), i)
        _draw(axes, x, [values[j] for j in order], joined=at is not None)
        axes.set_xlabel(axis)
        axes.set_ylabel(name)
        if at is None:
            axes.set_xticks(x, [labels[j] for j in order])
    figures.save_figure(figure, path)


def _draw(axes: Any, x: Sequence[float], values: Values, *, joined: bool) -> None:
    """One curve with its intervals."""
    means = [mean for mean, _ in values]
    axes.plot(x, means, marker="o", markersize=4.5, linewidth=1.5 if joined else 0, color=_BLUE, clip_on=False)
    for at, (_, interval) in zip(x, values, strict=True):
        if interval is not None:
            axes.plot([at, at], interval, color=_BLUE, linewidth=1.0, alpha=0.7)
    axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
