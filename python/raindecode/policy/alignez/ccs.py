"""Contrast-consistent search: a probe found from pairs alone, fitted with a hand-written gradient in the span of the data.

Source: Burns et al., Discovering Latent Knowledge, arXiv 2212.03827; AlignEZ v1 takes its direction and chooses layers by its loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from raindecode.errors import ConfigError
from raindecode.policy.alignez.matrices import (
    canonical_signs,
    check_pairs,
    has_contrast,
    layer,
    one_thread_each,
    thin_svd,
    unit,
)
from raindecode.settings import require_finite, require_whole

__all__ = ["PUBLISHED", "Moments", "Normalize", "Probe", "ccs", "ccs_loss"]

Normalize = Literal["joint", "per_side", "none"]
Moments = Literal["shared", "own"]
_CHOICES: Final = {"normalize": ("joint", "per_side", "none"), "moments": ("shared", "own")}
_BETAS: Final = (0.9, 0.999)
_EPS: Final = 1e-8
_TOGETHER_BYTES: Final = 1 << 27  # features of the layers that one thread trains side by side, in float64


class _Published(TypedDict):
    normalize: Normalize
    moments: Moments
    initial: float


PUBLISHED: Final[_Published] = {"normalize": "per_side", "moments": "own", "initial": 1.0}
"""Settings of the published code where they are not the defaults here: ccs(helpful, harmful, **PUBLISHED)."""


class Probe(NamedTuple):
    """p(φ) = sigmoid(<weight, φ> + bias) in every layer, with φ an activation as given.

    `direction` alone is oriented. The probe is kept as trained, since its loss changes when it is turned around: the confidence
    term is not symmetric in p and 1 - p.
    """

    direction: Tensor  # [L, d] float64 of length 1; zero in a layer whose pairs do not differ once normalised
    weight: Tensor  # [L, d] float64
    bias: Tensor  # [L, 2] float64: of a helpful and of a harmful φ; they differ under "per_side" only
    loss: Tensor  # [L] float64: the least of `losses`
    losses: Tensor  # [L, restarts] float64


def ccs_loss(plus: Tensor, minus: Tensor) -> Tensor:
    """Mean over pairs of L_consistency + L_confidence = (p+ - (1 - p-))^2 + min(p+, p-)^2.

    0 for p+ = 1, p- = 0; 0.25 where both are 0.5; 1 where both are 0. A probe that cannot tell the sides apart reaches 0.2.

    Args:
        plus, minus: [K, ...] probabilities of the helpful and the harmful sides.

    Returns:
        [...].
    """
    return ((plus + minus - 1).square() + torch.minimum(plus, minus).square()).mean(dim=0)


def ccs(
    helpful: Tensor,
    harmful: Tensor,
    *,
    restarts: int = 10,
    epochs: int = 1000,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    normalize: Normalize = "joint",
    moments: Moments = "shared",
    initial: float = 0.3,
    orient: bool = True,
    seed: int = 0,
) -> Probe:
    """Fit the CCS probe of each layer: AdamW on full batches, several initial values, the lowest loss is kept.

    `normalize` says what is subtracted. "joint", the default: the mean of both sides together, which keeps a constant shift
    between them. "per_side": each side's own mean, as published; since the helpful answer is always on the same side here, that
    removes exactly such a shift, the main signal of these pairs. "none": nothing. Published code leaves the scale alone;
    here the normalised rows are divided by one number per layer that makes their average length sqrt(dimensions), so that the
    rate and the initial values fit activations of any size. Weights are returned in the units of the activations.

    `moments` and `initial` decide how well the direction is found, not how low the loss gets. "own" is AdamW, whose steps are
    nearly the signs of the gradient, and the cosine between a random vector and its signs is sqrt(2 / pi) = 0.8. "shared" divides by
    one second moment for the whole probe, so that steps follow the gradient. Initial values of `initial` times torch's
    U(-1/sqrt(m), 1/sqrt(m)) stay in the weights, as noise. A planted shift of 8 in 64 dimensions with 32 pairs is found
    with |cos| 0.80 by "own", 0.88 by "shared" and 0.97 by "shared" with initial=0.3.

    The search runs in the span of the 2 K normalised rows, where the gradient always lies. Its coordinates are principal axes with
    signs that follow from the data, turned by a fixed random rotation: AdamW treats coordinates apart, and in a
    model's own no axis is a principal one. So the result turns with the activations. Every restart has initial
    values of its own; the same seed gives the same result.

    Only the search itself is in float32, a thread's layers side by side: it ends where the loss is flat, within 1e-5 of the losses of a
    search in float64. What is returned is judged in float64.

    Args:
        helpful, harmful: [L, K, d] floats; row i of both belongs to the same query.
        restarts, epochs, lr, weight_decay: the published values; `lr` and `weight_decay` in AdamW's sense.
        orient: turn `direction` so that mean p(φ+) >= mean p(φ-), from harmful to helpful; False leaves what the search found.

    Raises:
        ConfigError: a setting lies outside what is allowed.
        FitError: bad activations, or no contrast in any layer.
    """
    settings = _Settings(restarts, epochs, lr, weight_decay, normalize, moments, initial, orient, seed)
    check_pairs(helpful, harmful)
    num_layers = helpful.shape[0]
    with (
        one_thread_each() as threads,
        ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool,
    ):
        spans = list(pool.map(lambda i: _span(layer(helpful, i), layer(harmful, i), settings), range(num_layers)))
        together = min(
            -(-num_layers // threads), max(1, _TOGETHER_BYTES // max(span.features.nbytes for span in spans))
        )
        groups = [spans[at : at + together] for at in range(0, num_layers, together)]
        probes = [probe for group in pool.map(lambda group: _fit_layers(group, settings), groups) for probe in group]
    return Probe(*(torch.stack(parts) for parts in zip(*probes, strict=True)))


@dataclass(frozen=True)
class _Settings:
    """Arguments of `ccs`, checked."""

    restarts: int
    epochs: int
    lr: float
    weight_decay: float
    normalize: Normalize
    moments: Moments
    initial: float
    orient: bool
    seed: int

    def __post_init__(self) -> None:
        require_whole("restarts", self.restarts, 1)
        require_whole("epochs", self.epochs, 1)
        require_whole("seed", self.seed, 0)
        for name in ("lr", "weight_decay", "initial"):
            require_finite(name, getattr(self, name))
        for name in ("lr", "initial"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: above 0")
        if self.weight_decay < 0 or self.lr * self.weight_decay >= 1:
            raise ConfigError(f"weight_decay is {self.weight_decay!r}; allowed: 0 up to below 1 / lr")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")


class _Span(NamedTuple):
    """What the search in one layer is run on, all float64."""

    features: Tensor  # [2 K, m + 1]: rows in coordinates of their span, helpful ones first; then 1, for the bias
    start: Tensor  # [restarts, m + 1]
    basis: Tensor  # [m, d]
    scale: Tensor  # what rows were divided by
    centers: Tensor  # [2, d]
    contrast: bool


def _span(plus: Tensor, minus: Tensor, settings: _Settings) -> _Span:
    """Features of one layer's [K, d] float64."""
    centers = _centers(plus, minus, settings.normalize)
    rows = torch.cat([plus - centers[0], minus - centers[1]])
    basis, coordinates, scale = _coordinates(rows, plus - minus, settings.seed)
    features = torch.cat([coordinates, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    generator = torch.Generator().manual_seed(settings.seed)
    start = torch.rand(settings.restarts, features.shape[1], generator=generator, dtype=torch.float64) * 2 - 1
    start = start * (settings.initial / math.sqrt(features.shape[1]))
    return _Span(features, start, basis, scale, centers, has_contrast(rows[: len(plus)], rows[len(plus) :]))


def _fit_layers(spans: Sequence[_Span], settings: _Settings) -> list[Probe]:
    """Probes without their first dimension. All are trained side by side, narrower ones padded with zeros, which stay zeros."""
    widths = [span.features.shape[1] for span in spans]
    features, start = (_stacked(each).float() for each in ([s.features for s in spans], [s.start for s in spans]))
    found = train(
        features, start, settings.epochs,
        lr=settings.lr, weight_decay=settings.weight_decay, moments=settings.moments, widths=widths,
    ).double()  # fmt: skip
    return [
        _probe(span, weights[:, :width], settings) for span, weights, width in zip(spans, found, widths, strict=True)
    ]


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    """[L, rows, widest]; zeros where a matrix is narrower."""
    widest = max(each.shape[1] for each in matrices)
    return torch.stack([torch.nn.functional.pad(each, (0, widest - each.shape[1])) for each in matrices])


def _probe(span: _Span, found: Tensor, settings: _Settings) -> Probe:
    """The best of a layer's restarts [restarts, m + 1] float64, judged in float64."""
    p = torch.sigmoid(span.features @ found.T)
    plus, minus = p.chunk(2)
    losses = ccs_loss(plus, minus)
    best = int(losses.argmin())
    weight = found[best, :-1] @ span.basis / span.scale
    direction = unit(weight) if span.contrast else torch.zeros_like(weight)
    if settings.orient and plus[:, best].mean() < minus[:, best].mean():
        direction = -direction
    return Probe(direction, weight, found[best, -1] - span.centers @ weight, losses[best], losses)


def _centers(plus: Tensor, minus: Tensor, normalize: Normalize) -> Tensor:
    """[2, d]: what is subtracted from the helpful and from the harmful side."""
    means = torch.stack([plus.mean(dim=0), minus.mean(dim=0)])
    if normalize == "per_side":
        return means
    if normalize == "joint":
        return means.mean(dim=0, keepdim=True).expand(2, -1)
    return torch.zeros_like(means)


def _coordinates(rows: Tensor, differences: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal basis [m, d] of the rows' span, rows in it [n, m] of average length sqrt(m), and what they were divided by."""
    found = thin_svd(rows)
    rank = len(found.vectors)
    signs = canonical_signs(found.vectors, differences)
    generator = torch.Generator().manual_seed(seed + 1)
    rotation = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
    basis = rotation.T @ (found.vectors * signs[:, None])
    coordinates = (found.coefficients * (found.sigma[:rank] * signs)) @ rotation
    scale = torch.linalg.vector_norm(rows, dim=1).mean() / math.sqrt(max(rank, 1))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return basis, coordinates / scale, scale


def train(
    features: Tensor, start: Tensor, epochs: int, *, lr: float, weight_decay: float, moments: Moments,
    widths: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """AdamW (betas 0.9 and 0.999, eps 1e-8) on the CCS loss of all layers and restarts side by side.

    Args:
        features: [L, 2 K, m] floats: rows of the helpful sides, then of the harmful ones; a column is 1, for the bias.
        start: [L, restarts, m] of the same dtype.
        moments: a second moment for each coordinate, or one for all of a restart (the mean of theirs).
        widths: of each layer, how many coordinates the mean is over where the rest are zeros; None for m.

    Returns:
        [L, restarts, m], computed in the dtype of the features.
    """
    pairs = features.shape[1] // 2
    count = torch.tensor(widths or [features.shape[2]] * len(features), dtype=features.dtype)[:, None, None]
    columns = features.transpose(1, 2)
    weights = start.clone(memory_format=torch.contiguous_format)
    mean = torch.zeros_like(weights)
    square = torch.zeros_like(weights if moments == "own" else weights[..., :1])
    for epoch in range(1, epochs + 1):
        p = torch.bmm(weights, columns).sigmoid_()
        plus, minus = p[..., :pairs], p[..., pairs:]
        share = torch.sign(minus - plus).mul_(0.5).add_(0.5)  # of the minimum's slope that is plus's; half at a tie
        consistency = plus + minus - 1
        slope = torch.cat([consistency + share * plus, consistency + (1 - share) * minus], dim=-1).mul_(2 / pairs)
        gradient = torch.bmm(slope.mul_(p).mul_(1 - p), features)
        energy = gradient.square()
        if moments == "shared":
            energy = energy.sum(dim=-1, keepdim=True) / count
        mean.lerp_(gradient, 1 - _BETAS[0])
        square.lerp_(energy, 1 - _BETAS[1])
        spread = square.sqrt().div_(math.sqrt(1 - _BETAS[1] ** epoch)).add_(_EPS)
        weights.mul_(1 - lr * weight_decay).addcdiv_(mean, spread, value=-lr / (1 - _BETAS[0] ** epoch))
    return weights
