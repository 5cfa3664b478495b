"""Muon for the hidden matrices, AdamW for embeddings and norms.

Muon (K. Jordan and others, 2024): the momentum of every hidden matrix is replaced by its nearest semi-orthogonal matrix,
found by a quintic Newton-Schulz iteration. Here matrices of one shape are stacked, so each shape costs one batched
iteration; fp32 throughout, since bfloat16 products are slow on most CPUs.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(stack: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of each matrix U S V^T in `stack` [n, rows, columns]."""
    a, b, c = _QUINTIC
    tall = stack.size(1) > stack.size(2)
    x: Tensor = stack.mT if tall else stack
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Two optimizers behind one `step`: Muon on hidden matrices, AdamW on embeddings and norms."""

    def __init__(self, model: nn.Module, *, matrix_lr: float, other_lr: float, weight_decay: float = 0.02) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                shapes[parameter.shape].append(parameter)
            else:
                others.append(parameter)
        self._groups = list(shapes.values())
        self._momenta = [torch.zeros(len(group), *group[0].shape) for group in self._groups]
        self._matrix_lr, self._other_lr, self._decay = matrix_lr, other_lr, weight_decay
        self._adamw = torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with both learning rates multiplied by `scale`, then forget the gradients."""
        for group, momentum in zip(self._groups, self._momenta, strict=True):
            gradient = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in group])
            momentum.lerp_(gradient, 0.05)
            update = orthogonalize(gradient.lerp(momentum, 0.95))
            rows, columns = group[0].shape
            lr = self._matrix_lr * scale * max(1.0, rows / columns) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1.0 - self._matrix_lr * scale * self._decay).sub_(change, alpha=lr)
                parameter.grad = None
        for parameter_group in self._adamw.param_groups:
            parameter_group["lr"] = self._other_lr * scale
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
