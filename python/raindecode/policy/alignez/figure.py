"""The figure of what diagnostics found, drawn with matplotlib where that is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from raindecode import figures
from raindecode.policy.alignez.diagnostics import METHODS, Diagnostics, LayerDiagnostics

_COLOURS: Final = ("#1f5fa8", "#c2571a", "#3a8a4d", "#7a4fa3", "#8a8a8a")
_CHANCE: Final = 0.5
_BLIND: Final = 0.2  # CCS loss of a probe that tells nothing apart


def save_diagnostics(path: str | Path, found: Diagnostics) -> None:
    """Draw four panels per tap against the layer: singular values of the differences, cos(θ_help, θ_harm), CCS loss, accuracy.

    Raises:
        ConfigError: see figures.check_plot.
        OSError: the file cannot be written.
    """
    figures.check_plot(path)
    taps = found.taps()
    figure = figures.new_figure(15.0, 3.1 * len(taps))
    grid = figure.subplots(len(taps), 4, squeeze=False)
    for row, tap in zip(grid, taps, strict=True):
        _draw_tap(row, tap, found.at(tap))
    figures.save_figure(figure, path)


def _draw_tap(row: Sequence[Any], tap: str, layers: Sequence[LayerDiagnostics]) -> None:
    at = [one.layer for one in layers]
    depth = min(len(one.sigma_diff) for one in layers)
    sigma = {f"σ{j + 1}": [one.sigma_diff[j] for one in layers] for j in range(depth)}
    _draw(row[0], at, sigma, f"{tap}: σ of differences")
    row[0].set_ylim(bottom=0)
    _draw(row[1], at, {"": [one.cosine for one in layers]}, "cos(θ help, θ harm)")
    _draw(row[2], at, {"": [one.ccs_loss for one in layers]}, "CCS loss", mark=_BLIND)
    shares = {method: [one.accuracy[method] for one in layers] for method in METHODS}
    _draw(row[3], at, shares, "held-out pairs told apart", mark=_CHANCE)


def _draw(
    axes: Any, at: Sequence[int], curves: Mapping[str, Sequence[float]], name: str, mark: float | None = None
) -> None:
    """One panel; `mark` is a dashed line across it."""
    for i, (label, values) in enumerate(curves.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(at, values, marker="o", markersize=3.5, linewidth=1.3, color=colour, label=label, clip_on=False)
    if mark is not None:
        axes.axhline(mark, linestyle="--", linewidth=0.8, color="#555555")
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize="small")
    axes.set_xlabel("layer")
    axes.set_ylabel(name)
    axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
