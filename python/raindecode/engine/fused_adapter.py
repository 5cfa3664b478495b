"""FusedAdapter: a low-rank adapter in the form of a FusedModel's joined products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raindecode.engine.adapter import Adapter
from raindecode.engine.rotary import NotFusible
from rainkernels.ops.decoder import BlockUpdate, LowRank

# Joined products of a block, and their parts in the order of their outputs.
PRODUCTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "out": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "down": ("mlp", ("down_proj",)),
}


class _Joined(NamedTuple):
    """All updates of one product as one: y += scale (x down^T) up^T, zeros where a part has none."""

    down: Tensor  # [sum of ranks, in]
    up: Tensor  # [out, sum of ranks]
    scale: float


class FusedAdapter:
    """One adapter over the blocks of a model.

    Attributes:
        blocks: the updates as rainkernels.ops.decoder takes them.

    Raises:
        NotFusible: it updates a module that is no part of the blocks' products.
    """

    def __init__(self, adapter: Adapter, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        left = set(adapter.updates)
        blocks = []
        for layer in layers:
            updates: dict[str, tuple[LowRank, ...]] = {}
            for product, (parent, parts) in PRODUCTS.items():
                found, first = [], 0
                for part in parts:
                    module = getattr(getattr(layer, parent), part)
                    name = names[id(module)]
                    update = adapter.updates.get(name)
                    if update is not None:
                        left.discard(name)
                        found.append(LowRank(update.down, update.up, first, update.scale))
                    first += module.out_features
                updates[product] = tuple(found)
            blocks.append(BlockUpdate(**updates))
        if left:
            raise NotFusible(f"its adapter {adapter.name} updates {sorted(left)[0]}")
        self.blocks: tuple[BlockUpdate, ...] = tuple(blocks)
        self._joined: dict[
            tuple[int, str], _Joined | None
        ] = {}  # made when first asked for: the native step needs none

    def add_(self, layer: int, product: str, x: Tensor, y: Tensor) -> None:
        """Update the outputs y [n, out] of the rows x [n, in] in place."""
        if (layer, product) not in self._joined:
            parts: tuple[LowRank, ...] = getattr(self.blocks[layer], product)
            self._joined[layer, product] = _join(parts, y.shape[-1]) if parts else None
        update = self._joined[layer, product]
        if update is not None:
            y.addmm_(x @ update.down.t(), update.up.t(), alpha=update.scale)


def _join(parts: Sequence[LowRank], outputs: int) -> _Joined:
    scales = {part.scale for part in parts}
    scale = scales.pop() if len(scales) == 1 else 1.0
    down = torch.cat([part.down for part in parts])
    up = down.new_zeros(outputs, len(down))
    at = 0
    for part in parts:
        rank = len(part.down)
        own = part.up if part.scale == scale else (part.up.float() * part.scale).to(part.up.dtype)
        up[part.first : part.first + len(part.up), at : at + rank] = own
        at += rank
    return _Joined(down, up, scale)
