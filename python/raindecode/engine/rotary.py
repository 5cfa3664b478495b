"""RotaryTable: cosines and sines of rotary position embedding by position, computed once by the model's own module."""

from __future__ import annotations

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

    @torch.inference_mode()
    def _grow(self, max_position: int) -> None:
        blocks = [(self._cos, self._sin)]
        for first in range(len(self._cos), max_position + 1, _BLOCK):
            blocks.append(self._block(first))
        self._cos, self._sin = (torch.cat(parts) for parts in zip(*blocks, strict=True))

    def _block(self, first: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [_BLOCK, head_dim] from position `first` on."""
        head_dim = self._cos.shape[1]
        positions = torch.arange(first, first + _BLOCK, device=self._like.device)[None]
        try:
            cos, sin = (part[0] for part in self._module(self._like, positions))
        except (TypeError, ValueError, IndexError) as error:
            raise NotFusible(f"its rotary module takes other arguments ({error})") from error
        if cos.shape[1] != head_dim:
            raise NotFusible(f"it turns {cos.shape[1]} of the {head_dim} dimensions of a head")
        return cos, torch.cat((-sin[..., : head_dim // 2], sin[..., head_dim // 2 :]), dim=-1)
