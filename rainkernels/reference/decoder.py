"""Plain PyTorch definition of the decoder family: one step of token rows through a stack of Llama-like blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from rainkernels._decoder_weights import BlockWeights, NormWeight, StackWeights

__all__ = ["step"]

# (query, k_pool, v_pool, block) -> [T, num_qo_heads, head_dim]: attention of a layer over the plan
Attend = Callable[[Tensor, Tensor, Tensor, BlockWeights], Tensor]


def step(
    stack: StackWeights, ids: Tensor, positions: Tensor, slots: Tensor, pools: list[tuple[Tensor, Tensor]], attend: Attend,
    cos: Tensor, sin: Tensor, wanted: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Final states [T, hidden] and logits [n, vocab]. Shapes and dtypes as in `rainkernels.ops.decoder.DecoderStack.step`."""
    x = stack.embedding[ids]
    turn = cos[positions][:, None], sin[positions][:, None]
    for block, (k_pool, v_pool) in zip(stack.blocks, pools, strict=True):
        heads = linear(_norm(x, block.attention_norm), *block.qkv).unflatten(1, (-1, stack.head_dim))
        q, k, v = heads.split([stack.num_qo_heads, stack.num_kv_heads, stack.num_kv_heads], dim=1)
        if block.q_norm is not None and block.k_norm is not None:
            q, k = _norm(q, block.q_norm), _norm(k, block.k_norm)
        k_pool[slots.long()], v_pool[slots.long()] = _turned(k, *turn), v
        x = x + linear(attend(_turned(q, *turn), k_pool, v_pool, block).flatten(1), *block.out)
        gate, up = linear(_norm(x, block.mlp_norm), *block.gate_up).chunk(2, dim=-1)
        x = x + linear(silu(gate) * up, *block.down)
    states = _norm(x, stack.norm)
    return states, linear(states[wanted], *stack.head)


def _norm(x: Tensor, norm: NormWeight) -> Tensor:
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin
