"""Logistic regression between the two sides, as probing baselines use it (ITI, arXiv 2306.03341, takes its normal)."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from raindecode.errors import ConfigError, FitError
from raindecode.policy.alignez.matrices import check_pairs, layer, thin_svd, unit
from raindecode.settings import require_finite

__all__ = ["LogisticProbe", "logistic"]

_STEPS: Final = 100
_DONE: Final = 1e-10  # largest gradient component


class LogisticProbe(NamedTuple):
    """p(helpful | φ) = sigmoid(<weight, φ> + bias) in every layer."""

    direction: Tensor  # [L, d] float64 of length 1, from harmful to helpful; zero where the sides' means are alike
    weight: Tensor  # [L, d] float64
    bias: Tensor  # [L] float64


def logistic(helpful: Tensor, harmful: Tensor, *, l2: float = 0.1) -> LogisticProbe:
    """Fit helpful against harmful activations: mean log loss + l2 / 2 |w|^2, by Newton's method; the bias is not penalised.

    Rows are centred by the mean of both sides and divided by their average length, so that `l2` means the same in every layer
    and model. The larger it is, the nearer the direction comes to the mean difference. The minimum is unique, and found in
    the span of the rows, where it lies: nothing depends on a seed or on the axes.

    Args:
        helpful, harmful: [L, K, d] floats.

    Raises:
        ConfigError: l2 is not above 0; without it two sides that a plane divides have no minimum.
        FitError: bad activations, no contrast in any layer, or l2 is so small that the minimum was not reached.
    """
    require_finite("l2", l2)
    if l2 <= 0:
        raise ConfigError(f"l2 is {l2!r}; allowed: above 0")
    check_pairs(helpful, harmful)
    found = [_fit_layer(layer(helpful, i), layer(harmful, i), l2, i) for i in range(helpful.shape[0])]
    weights, biases = (torch.stack(parts) for parts in zip(*found, strict=True))
    return LogisticProbe(unit(weights), weights, biases)


def _fit_layer(plus: Tensor, minus: Tensor, l2: float, index: int) -> tuple[Tensor, Tensor]:
    center = (plus.mean(dim=0) + minus.mean(dim=0)) / 2
    rows = torch.cat([plus, minus]) - center
    found = thin_svd(rows)
    rank = len(found.vectors)
    scale = torch.linalg.vector_norm(rows, dim=1).mean()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    coordinates = found.coefficients * (found.sigma[:rank] / scale)
    features = torch.cat([coordinates, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    signs = torch.ones(len(rows), dtype=torch.float64)
    signs[len(plus) :] = -1
    solution = _newton(features * signs[:, None], l2, index)
    weight = solution[:-1] @ found.vectors / scale
    return weight, solution[-1] - center @ weight


def _newton(signed: Tensor, l2: float, index: int) -> Tensor:
    """argmin_w mean_i log(1 + exp(-<signed_i, w>)) + l2 / 2 |w without its last|^2, steps halved until they descend."""
    penalty = torch.full((signed.shape[1],), l2, dtype=torch.float64)
    penalty[-1] = 0

    def objective(w: Tensor) -> float:
        margins = signed @ w
        return float(torch.nn.functional.softplus(-margins).mean() + (penalty * w.square()).sum() / 2)

    w = torch.zeros_like(penalty)
    for _ in range(_STEPS):
        wrong = torch.sigmoid(-(signed @ w))
        gradient = penalty * w - signed.T @ wrong / len(signed)
        if gradient.abs().max() <= _DONE:
            return w
        curvature = (wrong * (1 - wrong) / len(signed)).clamp_min(1e-15)
        hessian = signed.T @ (curvature[:, None] * signed) + torch.diag(penalty)
        step = torch.linalg.solve(hessian, gradient)
        before, size, drop = objective(w), 1.0, float(gradient @ step)
        while objective(w - size * step) > before - 1e-4 * size * drop and size > 1e-6:
            size /= 2
        w = w - size * step
    worst = float(gradient.abs().max())
    if math.isfinite(worst) and worst <= math.sqrt(_DONE):
        return w
    raise FitError(f"logistic regression of layer {index} did not settle with l2={l2:g}: give a larger l2")
