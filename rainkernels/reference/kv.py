"""Plain PyTorch definition of the kv family: writes and copies of single token slots."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kv_copy", "kv_write"]


def kv_write(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slot_mapping: Tensor) -> None:
    """Row `t` of k and v goes to slot `slot_mapping[t]`; -1 skips the row; of rows that name one slot the last stays.

    Shapes and dtypes as in `rainkernels.ops.kv.kv_write`.
    """
    slots = slot_mapping.long()
    rows = torch.nonzero(slots >= 0).flatten()
    slots = slots[rows]
    # index_put leaves the order of duplicates open, so only the last row of each slot is written.
    last = torch.full((k_pool.shape[0],), -1, dtype=torch.long, device=k_pool.device)
    last = last.scatter_reduce(0, slots, rows, "amax")
    kept = last[slots] == rows
    k_pool[slots[kept]] = k[rows[kept]]
    v_pool[slots[kept]] = v[rows[kept]]


def kv_copy(k_pool: Tensor, v_pool: Tensor, src: Tensor, dst: Tensor) -> None:
    """Slot `src[i]` is copied to slot `dst[i]`, all sources being read before any slot is written.

    Shapes and dtypes as in `rainkernels.ops.kv.kv_copy`.
    """
    kv_write(k_pool[src.long()], v_pool[src.long()], k_pool, v_pool, dst)
