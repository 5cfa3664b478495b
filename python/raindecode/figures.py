"""What figures share: which files they go to, and matplotlib, which need not be installed."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any, Final

from raindecode.errors import ConfigError

SUFFIXES: Final = (".png", ".svg", ".pdf")


def check_plot(path: str | Path) -> None:
    """Refuse what cannot be drawn, before anything has run.

    Raises:
        ConfigError: the suffix is not one of SUFFIXES, or matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ConfigError(f"the plot is to go to {str(path)!r}; allowed: a file that ends in {', '.join(SUFFIXES)}")
    _figure_class()


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure, in inches, made without pyplot: the caller's backend stays as it is.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    return _figure_class()(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure.

    Raises:
        OSError: the file cannot be written.
    """
    drawn = BytesIO()  # whole before the file is touched: what it held stays when drawing fails
    figure.savefig(drawn, dpi=160, format=Path(path).suffix.lower().removeprefix("."))
    Path(path).write_bytes(drawn.getvalue())


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib, which is not installed: pip install 'rainkernels[bench]'") from error
    return Figure
