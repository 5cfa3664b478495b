"""RotaryTable: cosines and sines of rotary position embedding by position, computed once by the model's own module."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

# Whose frequencies depend on the position alone; "dynamic" and "longrope" change with the length of a forward.
_STATIC_TYPES = {"default", "linear", "llama3", "yarn"}
_BLOCK = (
    1024  # positions computed at once: always the same, so that a position has the same bits whenever it is first met
)


class NotFusible(Exception):
    """The model is not of the form FusedModel runs; transformers' own forward does."""


class RotaryTable:
    """Grows with the longest path seen.

    Args:
        module: rotary module of a transformers model: (x, position_ids [1, n]) -> cos, sin [1, n, head_dim].
        config: its text config.
        head_dim: width of a head, all of it turned.

    Raises:
        NotFusible: positions are embedded in another way.
    """

    def __init__(self, module: Any, config: Any, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") not in _STATIC_TYPES:
            raise NotFusible(f"its rotary embedding is {rope.get('rope_type')!r}")
        self._module = module
        self._like = torch.empty(1, dtype=dtype, device=device)
        self._cos = self._sin = torch.empty(0, head_dim, dtype=dtype, device=device)
        self._grow(0)

    def upto(self, max_position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [n, head_dim] of the positions from 0, n > `max_position`; the first half of a row of sines negative."""
        if max_position >= len(self._cos):
            self._grow(max_position)
        return self._cos, self._sin

    def reserve(self, count: int) -> tuple[Tensor, Tensor]:
        """`upto` of `count` positions, and the table never moves for any of them: what a CUDA graph reads stays in place."""
        return self.upto(count - 1)

    def renumbered(self, positions: Tensor) -> RotaryTable:
        """A table whose position i is `positions[i]` of this one; for looking at far positions without all before them."""
        other = copy(self)
        other._cos, other._sin = self._turns(positions)
        return other

    def _grow(self, max_position: int) -> None:
        blocks = [(self._cos, self._sin)]
        for first in range(len(self._cos), max_position + 1, _BLOCK):
            blocks.append(self._turns(torch.arange(first, first + _BLOCK, device=self._like.device)))
        self._cos, self._sin = (torch.cat(parts) for parts in zip(*blocks, strict=True))

    @torch.inference_mode()
    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `positions`, as `upto` returns them."""
        try:
            cos, sin = (part[0] for part in self._module(self._like, positions[None]))
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise NotFusible(f"its rotary module takes other arguments ({error})") from error
        head_dim = self._cos.shape[1]
        if cos.shape != (len(positions), head_dim) or sin.shape != cos.shape or cos.dtype != self._like.dtype:
            raise NotFusible(f"it turns heads of {head_dim} by {list(cos.shape)} {cos.dtype}")
        return cos, torch.cat((-sin[..., : head_dim // 2], sin[..., head_dim // 2 :]), dim=-1)
