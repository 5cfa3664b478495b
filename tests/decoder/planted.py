"""Synthetic activations of pairs with a direction planted between their sides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Planted(NamedTuple):
    helpful: Tensor  # [L, K, d] float64
    harmful: Tensor  # [L, K, d] float64
    truth: Tensor  # [L, d] unit, from harmful to helpful


def plant(
    layers: int = 2,
    pairs: int = 48,
    width: int = 64,
    *,
    shift: float = 8.0,
    mean: float = 3.0,
    spread: float = 0.3,
    noise: float = 0.5,
    seed: int = 0,
) -> Planted:
    """mean + query_i ± shift / 2 truth + noise: the mean is shared by all, the query by both sides of a pair."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth = torch.nn.functional.normalize(normal(layers, 1, width), dim=-1)
    shared = mean * normal(layers, 1, width) + spread * normal(layers, pairs, width)
    helpful = shared + shift / 2 * truth + noise * normal(layers, pairs, width)
    harmful = shared - shift / 2 * truth + noise * normal(layers, pairs, width)
    return Planted(helpful, harmful, truth[:, 0])


def cosines(found: Tensor, truth: Tensor) -> Tensor:
    return torch.cosine_similarity(found, truth, dim=-1)


def random_rotation(width: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
