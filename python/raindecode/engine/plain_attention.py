"""Ordinary causal attention, for a model whose attention is the engine's and that runs without an engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import sdpa_mask

_sdpa = AttentionInterface()["sdpa"]


def plain_mask(*args: Any, **options: Any) -> Tensor | None:
    """Boolean mask [batch, 1, queries, keys], True where a key is visible; None for the causal one. As transformers' "sdpa" has it."""
    mask: Tensor | None = sdpa_mask(*args, **options)
    return mask


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float | None,
    dropout: float, softcap: float | None, sinks: Tensor | None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' "sdpa"; what that leaves out, soft-capped logits and sinks, is computed by the definition.

    Args:
        query, key, value: [batch, heads, tokens, head_dim], key and value not repeated.
        mask: as `plain_mask` makes it.
    Returns:
        [batch, queries, num_qo_heads, head_dim of value], and None for the weights.
    """
    if softcap is None and sinks is None:
        out: Tensor = _sdpa(module, query, key, value, mask, scaling=scaling, dropout=dropout, **others)[0]
        return out, None
    queries, keys = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    else:  # a caller's own, which is added
        logits = logits + mask
    if sinks is not None:
        logits = torch.cat((logits, sinks.reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)), dim=-1)
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)[..., :keys]
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None
