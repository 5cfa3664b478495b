"""Stateless layers for `kernelize`: each takes the place of a module's forward and reads that module's attributes."""

import torch
from torch import Tensor, nn

from ._ops import ops


class RMSNorm(nn.Module):
    """Root-mean-square norm in the form of Llama. The module has `weight` [hidden] and `variance_epsilon`."""

    has_backward: bool = False
    can_torch_compile: bool = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., hidden]; the same shape and dtype comes back."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        normed = ops.add_edit_rmsnorm(rows, torch.zeros_like(rows), self.weight, self.variance_epsilon)
        return normed.view(hidden_states.shape)


class DeRaSample(nn.Module):
    """One token per row from the logits of a reference and an aligned model, mixed by DeRa."""

    has_backward: bool = False
    can_torch_compile: bool = True

    def forward(
        self, reference: Tensor, aligned: Tensor, weight: Tensor, temperature: Tensor, seed: Tensor, position: Tensor
    ) -> Tensor:
        """Token ids [rows] int32.

        reference, aligned: [rows, vocabulary]; weight: [rows] float32, 0 for the reference and 1 for the aligned model;
        temperature: [rows] float32, 0 for the likeliest token; seed, position: [rows] int64, which name the random number.
        """
        weights = torch.stack((1.0 - weight, weight), dim=1)
        return ops.mix_sample([reference, aligned], weights, temperature, seed, position)[0]
