"""The attention function the engine registers with transformers: write new K/V to slots, attend over the tree.

Outside an engine's forward the name stands for ordinary causal attention, so that a model that a Decoder holds, or one loaded with
`attn_implementation="rain_tree"`, runs in plain transformers code as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from raindecode.engine.plain_attention import plain_attention, plain_mask
from raindecode.errors import CapacityError
from rainkernels.ops.attention import AttentionBuffers, AttentionPlan, tree_attention
from rainkernels.ops.kv import kv_write

# transformers treats names with "flash", "sdpa", "flex_attention", "paged|" or "a/b" in a special way; this is none.
IMPLEMENTATION = "rain_tree"


class KVPool:
    """K and V of every layer, `[num_slots, num_kv_heads, head_dim]` each, made when a layer first writes.

    Layers may differ in heads and widths, so shapes are taken from the first forward, not guessed from a config.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.device = device
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Pools of layer `index`; `key` and `value` `[T, num_kv_heads, head_dim]` give shape and dtype at first use."""
        pools = self.layers.get(index)
        if pools is None:
            pools = self.layers[index] = (self.zeros(key), self.zeros(value))
        return pools

    def zeros(self, like: Tensor) -> Tensor:
        """[num_slots, ...] zeros in the dtype and the row shape of `like`.

        Raises:
            CapacityError: they do not fit in memory.
        """
        try:
            return torch.zeros(self.num_slots, *like.shape[1:], dtype=like.dtype, device=self.device)
        except RuntimeError as error:  # covers torch.OutOfMemoryError
            raise CapacityError(
                f"a KV pool of {self.num_slots - 1} tokens does not fit in memory: lower kv_tokens (--kv-tokens)"
            ) from error

    @property
    def bytes_per_token(self) -> int:
        return sum(t[0].numel() * t.element_size() for pair in self.layers.values() for t in pair)


@dataclass(frozen=True)
class AttentionOptions:
    """What a layer told its attention. window: sliding window in tokens, 0 for none; sinks: [num_qo_heads] or None."""

    scale: float
    softcap: float
    window: int
    sinks: Tensor | None


@dataclass
class TreeContext:
    """What travels through `model(tree=...)` to the attention of every layer.

    Rows of several members of one model (the bare model, an adapter on it) follow each other in a forward, each attending
    over its own pool: `more` holds the contexts of the members behind the first.
    """

    pool: KVPool
    slot_mapping: Tensor  # [T] int32
    plan: AttentionPlan
    layers: dict[int, AttentionOptions] = field(default_factory=dict)  # of every layer that came by
    buffers: AttentionBuffers | None = None  # that hold `plan`, where the forward is captured
    more: tuple[TreeContext, ...] = ()


# For mask functions, which see no keyword arguments, and the few model files that drop unknown ones on their way down.
_current: ContextVar[TreeContext | None] = ContextVar("raindecode_tree", default=None)


@contextmanager
def over_tree(context: TreeContext) -> Iterator[None]:
    """A forward of a transformers model over a tree: no mask is built for it. Its call gets `tree=context` as well."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def rain_tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    tree: TreeContext | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over the KV tree; ordinary attention where no engine is at work.

    Args:
        query: [1, num_qo_heads, T, head_dim], rotary applied.
        key, value: [1, num_kv_heads, T, head_dim], not repeated.
        sliding_window: a key is visible when its distance along the path is smaller.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2).
        s_aux: [num_qo_heads] sinks (gpt-oss).
    Returns:
        [1, T, num_qo_heads, head_dim of value], and None for the weights.
    """
    context = tree if tree is not None else _current.get()
    if context is None:
        return plain_attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, softcap=softcap, sinks=s_aux,
            sliding_window=sliding_window, **others,
        )  # fmt: skip
    if attention_mask is not None:
        raise RuntimeError("the model gives its attention a mask of its own, which a KV tree cannot apply")
    index = int(module.layer_idx)  # type: ignore[arg-type]
    options = context.layers[index] = AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=0.0 if softcap is None else float(softcap),
        window=0 if sliding_window is None else int(sliding_window),
        sinks=s_aux,
    )
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    return attend(index, q, k, v, context, options).unsqueeze(0), None


def attend(index: int, q: Tensor, k: Tensor, v: Tensor, context: TreeContext, options: AttentionOptions) -> Tensor:
    """Write the K/V of a step to layer `index` of the pool and attend over the tree: [T, heads, head_dim] in and out."""
    if not context.more:
        return _attend_part(index, q, k, v, context, options)
    parts = (context, *context.more)
    sizes = [len(part.slot_mapping) for part in parts]
    rows = zip(parts, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    return torch.cat([_attend_part(index, q_, k_, v_, part, options) for part, q_, k_, v_ in rows])


def _attend_part(
    index: int, q: Tensor, k: Tensor, v: Tensor, context: TreeContext, options: AttentionOptions
) -> Tensor:
    k_pool, v_pool = context.pool.layer(index, k, v)
    kv_write(k, v, k_pool, v_pool, context.slot_mapping)
    return tree_attention(
        q, k_pool, v_pool, context.plan, softmax_scale=options.scale, softcap=options.softcap,
        sliding_window=options.window, sinks=options.sinks, buffers=context.buffers,
    )  # fmt: skip


def rain_tree_mask(*args: Any, **options: Any) -> Tensor | None:
    """No mask in an engine's forward, which the tree stands for; the one of ordinary attention elsewhere."""
    return None if _current.get() is not None else plain_mask(*args, **options)


AttentionInterface.register(IMPLEMENTATION, rain_tree_attention)
AttentionMaskInterface.register(IMPLEMENTATION, rain_tree_mask)
