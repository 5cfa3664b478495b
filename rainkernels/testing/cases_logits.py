"""Named cases of the logits family: logits, weights and parameters of a batch, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["CASES", "LogitsCase", "LogitsInputs", "row_values"]

_INF, _NAN = float("inf"), float("nan")


@dataclass(frozen=True)
class LogitsInputs:
    """Tensors of one case: `mix_sample(i.logits, i.weights, **i.options)`."""

    logits: list[Tensor]
    weights: Tensor
    options: dict[str, Any]

    def converted(self, dtype: torch.dtype) -> LogitsInputs:
        """The same values as logits of another dtype: float64 for the yardstick."""
        return LogitsInputs([h.to(dtype) for h in self.logits], self.weights, self.options)


def row_values(value: float | tuple[float, ...] | None, rows: int, dtype: torch.dtype) -> Tensor | None:
    """A per-row parameter: one value for all rows, or a tuple that repeats down the rows."""
    if value is None:
        return None
    values = value if isinstance(value, tuple) else (value,)
    return torch.tensor([values[b % len(values)] for b in range(rows)], dtype=dtype)


@dataclass(frozen=True)
class LogitsCase:
    """Shapes, weights and parameters; tuples repeat down the rows.

    `holes` sets single logits: (model, row or -1 for all, id from, id to, value).
    """

    id: str
    rows: int = 3
    vocab: int = 1000
    weights: tuple[tuple[float, ...], ...] = ((0.3, 0.7),)
    spread: float = 3.0  # standard deviation of the logits
    closeness: float = 1.0  # standard deviation of the later models' difference from the first
    shift: tuple[float, ...] = (0.0,)  # per model, added to all its logits
    padding: tuple[int, ...] = (0,)  # columns past vocab_size, per model, filled with large values
    row_gap: int = 0  # extra elements between rows
    temperature: float | tuple[float, ...] = 1.0
    top_k: float | tuple[float, ...] | None = None
    top_p: float | tuple[float, ...] | None = None
    min_p: float | tuple[float, ...] | None = None
    order: str = "k_p_min"
    bias: bool = False
    banned_share: float = 0.0  # share of ids with bias -inf
    plausibility: float | tuple[float, ...] | None = None
    plausibility_model: int = 0
    wide_position: bool = False
    rounding: float = 0.0  # logits become multiples of this: many ties
    holes: tuple[tuple[int, int, int, int, float], ...] = field(default=())
    hidden_shared: bool = False  # all rows are one row with stride 0

    def __str__(self) -> str:
        return self.id

    @property
    def num_models(self) -> int:
        return len(self.weights[0])

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> LogitsInputs:
        """Inputs drawn from a seeded normal distribution."""
        g = torch.Generator().manual_seed(seed)
        first = torch.randn(self.rows, self.vocab, generator=g) * self.spread
        logits = []
        for m in range(self.num_models):
            h = first if m == 0 else first + torch.randn(self.rows, self.vocab, generator=g) * self.closeness
            if self.rounding:
                h = (h / self.rounding).round() * self.rounding
            h = h + self.shift[m % len(self.shift)]
            for model, row, lo, hi, value in self.holes:
                if model == m and row < self.rows:
                    h[slice(None) if row < 0 else row, lo:hi] = value
            wide = self.vocab + self.padding[m % len(self.padding)]
            store = torch.full((self.rows, wide + self.row_gap), 1e4).to(device, dtype)
            store[:, : self.vocab] = h.to(device, dtype)
            logits.append(store[:1, :wide].expand(self.rows, wide) if self.hidden_shared else store[:, :wide])
        weights = torch.tensor([self.weights[b % len(self.weights)] for b in range(self.rows)], dtype=torch.float32)
        weights = weights.reshape(self.rows, self.num_models)
        position = torch.arange(self.rows, dtype=torch.int64) * 7919 + seed
        if self.wide_position:
            position = torch.stack((position - 5, (position << 40) - 1), dim=1)
        bias = None
        if self.bias:
            bias = torch.randn(self.rows, self.vocab, generator=g)
            bias[torch.rand(self.rows, self.vocab, generator=g) < self.banned_share] = -_INF
        options: dict[str, Any] = {
            "temperature": row_values(self.temperature, self.rows, torch.float32),
            "top_k": row_values(self.top_k, self.rows, torch.int32),
            "top_p": row_values(self.top_p, self.rows, torch.float32),
            "min_p": row_values(self.min_p, self.rows, torch.float32),
            "plausibility": row_values(self.plausibility, self.rows, torch.float32),
            "seed": torch.arange(self.rows, dtype=torch.int64) * -0x1234567890ABCDEF + 42 + seed,
            "position": position,
            "bias": bias,
        }
        options = {name: None if t is None else t.to(device) for name, t in options.items()}
        options |= {"order": self.order, "plausibility_model": self.plausibility_model}
        return LogitsInputs(logits, weights.to(device), options | {"vocab_size": self.vocab})


_EXTREME = (
    (-1.0, 2.0),
    (0.0, 1.0),
    (1 - 1e-6, 1e-6),
    (0.5, 0.5),
    (1.0, 0.0),
    (-1e-6, 1 + 1e-6),
    (-9.0, 10.0),
    (-99.0, 100.0),
)
_FILTERS: dict[str, Any] = {
    "temperature": 0.7,
    "top_k": (50, 0, 3),
    "top_p": (0.95, 1.0, 0.5),
    "min_p": (0.0, 0.02, 0.3),
}

CASES = [
    LogitsCase("one-token", rows=3, vocab=1),
    LogitsCase("seven", rows=5, vocab=7, temperature=(1.0, 0.0, 0.5)),
    LogitsCase("plain", rows=6, temperature=(1.0, 0.7, 1.5)),
    LogitsCase("one-model", weights=((1.0,),)),
    LogitsCase("one-model-scaled", weights=((2.5,), (-1.0,), (0.1,))),
    LogitsCase("extreme-lambda", rows=8, weights=_EXTREME, vocab=1500),
    LogitsCase("three-models", weights=((0.2, 0.3, 0.5), (0.5, 0.0, 0.5), (0.0, 0.0, 1.0)), rows=6),
    LogitsCase("eight-models", weights=((0.1, 0.2, 0.3, 0.4, -0.5, 0.25, 0.25, 0.0),), vocab=2100),
    LogitsCase("unnormalised", weights=((1.0, 1.0), (0.5, 0.2), (-0.5, -0.25))),
    LogitsCase("rows-64", rows=64, vocab=520, weights=_EXTREME, **_FILTERS),
    LogitsCase("tile-edge", rows=3, vocab=1024, **_FILTERS),
    LogitsCase("tile-edge-plus-one", rows=3, vocab=1025, **_FILTERS),
    LogitsCase("tiles", rows=6, vocab=5003, **_FILTERS),
    LogitsCase("min-first", rows=6, vocab=5003, order="min_k_p", **_FILTERS),
    LogitsCase("joint", rows=6, vocab=5003, order="joint", **_FILTERS),
    LogitsCase("top-k", rows=6, vocab=3000, top_k=(1, 2, 40, 2999, 3000, 2147483647)),
    LogitsCase("top-p", rows=6, vocab=3000, top_p=(1e-6, 0.1, 0.5, 0.9, 0.999999, 1.0)),
    LogitsCase("top-p-flat", rows=4, vocab=4000, spread=0.3, top_p=(0.3, 0.9, 0.99, 0.5)),
    LogitsCase("min-p", rows=4, vocab=3000, min_p=(0.0, 1.0, 0.1, 1e-6)),
    LogitsCase("ties", rows=6, vocab=3000, rounding=1.0, top_k=(5, 100, 0), top_p=(1.0, 0.9, 0.7)),
    LogitsCase("all-equal", rows=4, vocab=2500, spread=0.0, closeness=0.0, top_k=(0, 10, 0), top_p=(1.0, 1.0, 0.25)),
    LogitsCase("greedy", rows=6, vocab=2100, temperature=0.0, rounding=2.0),
    LogitsCase("temperatures", rows=6, vocab=2100, temperature=(1e-30, 1e-3, 0.2, 5.0, 1e4, 1e38)),
    LogitsCase("bias", rows=6, vocab=2100, bias=True, banned_share=0.6, **_FILTERS),
    LogitsCase("grammar", rows=6, vocab=5003, bias=True, banned_share=0.999, temperature=(0.0, 1.0)),
    LogitsCase("plausibility", rows=6, vocab=2100, plausibility=(0.1, 0.0, 1.0), **_FILTERS),
    LogitsCase("plausibility-1", rows=6, plausibility=0.05, plausibility_model=1, weights=((-1.0, 2.0), (1.0, 0.0))),
    LogitsCase("padded-vocabulary", rows=5, vocab=1900, padding=(136, 17), row_gap=3, **_FILTERS),
    LogitsCase("odd-stride", rows=5, vocab=2049, row_gap=5, temperature=(1.0, 0.0)),
    LogitsCase("shared-row", rows=5, vocab=1300, hidden_shared=True),
    LogitsCase("wide-position", rows=6, wide_position=True),
    LogitsCase("shifted", rows=8, vocab=2100, weights=_EXTREME, shift=(1e4, -1e4)),
    LogitsCase("close-models", rows=4, vocab=2100, closeness=1e-3),
    LogitsCase("equal-models", rows=4, vocab=2100, closeness=0.0),
    LogitsCase("peaked", rows=4, vocab=2100, spread=30.0),
    LogitsCase(
        "banned-by-one",
        rows=6,
        weights=((0.5, 0.5), (-1.0, 2.0), (2.0, -1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.2)),
        holes=((0, -1, 3, 500, -_INF), (1, -1, 400, 900, -_INF)),
    ),
    LogitsCase(
        "all-but-one", rows=3, vocab=1100, holes=((0, -1, 0, 1033, -_INF), (0, -1, 1034, 1100, -_INF)), **_FILTERS
    ),
    LogitsCase("all-banned", rows=4, vocab=1100, holes=((0, 1, 0, 600, -_INF), (1, 1, 600, 1100, -_INF))),
    LogitsCase("nan-row", rows=4, vocab=1100, holes=((1, 2, 1050, 1051, _NAN), (0, 0, 4, 5, _NAN))),
    LogitsCase("inf-row", rows=4, vocab=1100, holes=((1, 2, 1050, 1051, _INF), (0, 0, 4, 5, _INF))),
    LogitsCase(
        "nan-in-unused", rows=4, weights=((0.0, 1.0), (1.0, 0.0)), holes=((1, 1, 5, 6, _NAN), (0, 0, 5, 6, _INF))
    ),
    LogitsCase("no-weight", rows=4, weights=((0.0, 0.0), (0.5, 0.5))),
]
