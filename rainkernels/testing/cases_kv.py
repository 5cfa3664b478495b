"""Named cases of the kv family, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CASES", "KvCase"]


@dataclass(frozen=True)
class KvCase:
    """One write: sizes, and how the rows lie in memory."""

    id: str
    num_tokens: int
    num_kv_heads: int = 2
    head_dim: int = 32
    head_dim_v: int = 32
    num_slots: int = 64
    layout: str = "contiguous"  # "heads_first": transposed [heads, tokens, dim]; "fused": a slice of a QKV row
    skipped: int = 0  # rows with slot -1
    repeated: bool = False  # several rows name one slot

    def __str__(self) -> str:
        return self.id

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """Arguments of `kv_write` by name."""
        g = torch.Generator().manual_seed(seed)
        slots = torch.randperm(self.num_slots, generator=g)[: self.num_tokens].to(torch.int32)
        if self.repeated:
            slots[:] = slots[torch.arange(self.num_tokens) // 3]
        slots[torch.randperm(self.num_tokens, generator=g)[: self.skipped]] = -1
        made = {
            "k": self._rows(self.head_dim, g),
            "v": self._rows(self.head_dim_v, g),
            "k_pool": torch.randn(self.num_slots, self.num_kv_heads, self.head_dim, generator=g),
            "v_pool": torch.randn(self.num_slots, self.num_kv_heads, self.head_dim_v, generator=g),
        }
        return {name: _keep_strides(t, dtype, device) for name, t in made.items()} | {"slot_mapping": slots.to(device)}

    def _rows(self, dim: int, g: torch.Generator) -> Tensor:
        if self.layout == "heads_first":
            return torch.randn(self.num_kv_heads, self.num_tokens, dim, generator=g).transpose(0, 1)
        if self.layout == "fused":
            return torch.randn(self.num_tokens, 3, self.num_kv_heads, dim, generator=g)[:, 1]
        return torch.randn(self.num_tokens, self.num_kv_heads, dim, generator=g)


def _keep_strides(t: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=device).copy_(t)


CASES: tuple[KvCase, ...] = (
    KvCase("one-token", 1),
    KvCase("no-token", 0),
    KvCase("prefill", 40),
    KvCase("transposed", 17, num_kv_heads=4, layout="heads_first"),
    KvCase("fused-qkv", 11, layout="fused"),
    KvCase("values-narrower", 9, head_dim=24, head_dim_v=16),
    KvCase("odd-dims", 5, num_kv_heads=3, head_dim=7, head_dim_v=1, layout="heads_first"),
    KvCase("padding", 12, skipped=5),
    KvCase("all-padding", 4, skipped=4),
    KvCase("repeated-slots", 12, repeated=True, skipped=1),
    KvCase(
        "threaded", 600, num_kv_heads=4, head_dim=64, head_dim_v=64, num_slots=700, repeated=True, layout="heads_first"
    ),
)
