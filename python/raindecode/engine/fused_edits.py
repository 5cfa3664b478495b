"""Joining: residual add, edits of hidden states and the norm behind them, in operations of rainkernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raindecode.engine.edits import RowEdits, Table, Tapped
from raindecode.hidden_edits import Site
from rainkernels.ops.decoder import NormWeight
from rainkernels.ops.edits import add_edit_rmsnorm, edit_


def add_norm(x: Tensor, residual: Tensor, norm: NormWeight) -> Tensor:
    """residual += x; the norm of the sum."""
    return add_edit_rmsnorm(x, residual, norm.weight, None, None, eps=norm.eps).normed


class Joining:
    """What happens between the blocks of one forward. The last edit of a place is fused with the add and the norm."""

    def __init__(self, edits: RowEdits | None, tapped: Tapped | None) -> None:
        self._edits = edits
        self._tapped = tapped
        self._plain = edits is None and tapped is None

    def attention(self, layer: int, x: Tensor, residual: Tensor, norm: NormWeight) -> Tensor:
        """residual += edited attn_out x; the norm of the sum."""
        return add_norm(x, residual, norm) if self._plain else self._part(Site(layer, "attn_out"), x, residual, norm)

    def block(self, layer: int, x: Tensor, residual: Tensor, norm: NormWeight) -> Tensor:
        """residual = edited (residual + edited mlp_out x) behind `layer`; its norm. Layer -1 is the embedding."""
        if self._plain or layer < 0:
            return add_norm(x, residual, norm)
        mlp, block = Site(layer, "mlp_out"), Site(layer, "block_out")
        tables = self._at(block)
        tapped = self._tapped if self._tapped is not None and self._tapped.wants(block) else None
        if not tables and tapped is None:
            return self._part(mlp, x, residual, norm)
        self._tap(mlp, x)
        for table, slots in self._at(mlp):
            edit_(x, table, slots)
        if tapped is None and len(tables) == 1:
            return _fused(x, residual, norm, tables[0], "block_out")
        residual.add_(x)
        if tapped is not None:
            tapped.put(block, residual)
        for table, slots in tables:
            edit_(residual, table, slots)
        return add_norm(torch.zeros_like(x), residual, norm)

    def _part(self, site: Site, x: Tensor, residual: Tensor, norm: NormWeight) -> Tensor:
        self._tap(site, x)
        tables = self._at(site)
        if not tables:
            return add_norm(x, residual, norm)
        for table, slots in tables[:-1]:
            edit_(x, table, slots)
        return _fused(x, residual, norm, tables[-1], "mlp_out")

    def _at(self, site: Site) -> Sequence[tuple[Table, Tensor]]:
        return () if self._edits is None else self._edits.at(site)

    def _tap(self, site: Site, x: Tensor) -> None:
        if self._tapped is not None and self._tapped.wants(site):
            self._tapped.put(site, x)


def _fused(x: Tensor, residual: Tensor, norm: NormWeight, edit: tuple[Table, Tensor], tap: str) -> Tensor:
    table, slots = edit
    return add_edit_rmsnorm(x, residual, norm.weight, table, slots, eps=norm.eps, tap=tap).normed  # type: ignore[arg-type]
