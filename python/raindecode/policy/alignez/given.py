"""Directions and numbers of edits as a user gives them: checked, and made what edits are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raindecode.errors import ConfigError
from raindecode.settings import require_finite

_TOLERANCE = 1e-5
_MOST = torch.finfo(torch.float32).max


def each(name: str, value: object, k: int) -> tuple[object, ...]:
    given = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * k
    if len(given) != k:
        raise ConfigError(f"{name} has {len(given)} values for {k} directions; give one, or one per direction")
    if name == "op":
        return tuple(given)
    numbers = []
    for number in given:
        require_finite(name, number)
        numbers.append(float(number))  # type: ignore[arg-type]
    return tuple(numbers)


def is_plain(states: object) -> bool:
    """Whether it is a finite float32 matrix on the cpu that nothing is differentiated by."""
    if not isinstance(states, Tensor) or states.dtype != torch.float32 or states.dim() != 2:
        return False
    return states.device.type == "cpu" and not states.requires_grad and bool(torch.isfinite(states).all())


def require_float32(name: str, numbers: Sequence[float]) -> None:
    """Directions are added in float32, so strengths have to be numbers there."""
    for number in numbers:
        if not abs(number) <= _MOST:
            raise ConfigError(f"{name} is {number:g} with the edit's strength; allowed: up to {_MOST:.3g} in size")


def unit(given: Tensor, name: str, order: str) -> Tensor:
    """[k, d] float32 of length 1."""
    if not isinstance(given, Tensor) or not given.is_floating_point() or given.dim() not in (1, 2) or not given.numel():
        raise ConfigError(f"{name} is {_shape(given)}; give a float tensor [k, hidden_size] or [hidden_size]")
    vectors = given.detach().to("cpu", torch.float64).reshape(-1, given.shape[-1])
    lengths = vectors.norm(dim=-1, keepdim=True)
    if not bool(torch.isfinite(lengths).all()) or not bool((lengths > 0).all()):
        raise ConfigError(f"{name} holds a zero or non-finite vector; give directions with a length")
    vectors = vectors / lengths
    if order == "orthonormal":
        vectors = _orthonormal(vectors)
    elif order != "sequential":
        raise ConfigError(f"order is {order!r}; allowed: 'sequential', 'orthonormal'")
    unit: Tensor = vectors.float()
    return unit


def _orthonormal(vectors: Tensor) -> Tensor:
    """A basis of the span of unit vectors: each less what the earlier ones hold of it, where enough is left.

    Not by QR: behind a vector that adds nothing its columns are no longer those of the span.
    """
    basis = vectors[:0]
    for vector in vectors:
        for _ in range(2):  # the second time removes what rounding left
            vector = vector - (basis @ vector) @ basis
        length = vector.norm()
        if length > _TOLERANCE:
            basis = torch.cat([basis, vector[None] / length])
    return basis


def _shape(given: object) -> str:
    return f"a {given.dtype} tensor {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
