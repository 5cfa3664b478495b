"""Exact mode: a row's numbers do not depend on what else is in the forward.

Matrix products keep their bits through MKL's strict mode (env.prepare_process); SiLU and GELU modules, whose
vector tails differ with width and thread count in PyTorch, are replaced by compositions of operations whose tails do
not; attention is anchored to absolute positions by the kernel. A probe at load decides whether it holds.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

ExactMode = Literal["rows", "padded", "off"]
PADDED_ROWS = 64  # the fixed row count of "padded" mode


class RowwiseSiLU(nn.Module):
    """x * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1.0 + torch.exp(-x))


class RowwiseGELU(nn.Module):
    """x * Phi(x), with the error function."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))


class RowwiseGELUTanh(nn.Module):
    """GELU in its tanh form."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))))


# Class names of torch and transformers, so that no private module has to be imported.
_REPLACEMENTS: dict[str, type[nn.Module]] = {
    "SiLU": RowwiseSiLU,
    "SiLUActivation": RowwiseSiLU,
    "GELUActivation": RowwiseGELU,
    "GELUTanh": RowwiseGELUTanh,
    "PytorchGELUTanh": RowwiseGELUTanh,
    "NewGELUActivation": RowwiseGELUTanh,
}


def use_rowwise_activations(model: nn.Module) -> int:
    """Replace activation modules by row-wise ones, in place; how many were replaced."""
    replaced = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            kind = _REPLACEMENTS.get(type(child).__name__)
            if isinstance(child, nn.GELU):
                kind = RowwiseGELUTanh if child.approximate == "tanh" else RowwiseGELU
            if kind is not None:
                setattr(module, name, kind())
                replaced += 1
    return replaced
