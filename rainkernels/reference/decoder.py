"""Plain PyTorch definition of the decoder family: one step of token rows through a stack of Llama-like blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from rainkernels._decoder_weights import BlockUpdate, BlockWeights, LinearWeight, LowRank, NormWeight, StackWeights
from rainkernels.reference.edits import edit

__all__ = ["PartRows", "RowEdits", "step"]

# (query, k_pool, v_pool, block) -> [T, num_qo_heads, head_dim]: attention of a layer over the plan
Attend = Callable[[Tensor, Tensor, Tensor, BlockWeights], Tensor]


class PartRows(NamedTuple):
    """Rows of one member: which, its K and V pools, what is added to its blocks (None: nothing), its attention."""

    rows: slice
    pools: Sequence[tuple[Tensor, Tensor]]
    adapter: Sequence[BlockUpdate] | None
    attend: Attend


class RowEdits(NamedTuple):
    """Edits at one place: each row's slot, and the table as keyword arguments of `rainkernels.reference.edits.edit`."""

    layer: int
    tap: str
    slots: Tensor
    table: dict[str, Tensor | None]


def step(
    stack: StackWeights, ids: Tensor, positions: Tensor, slots: Tensor, parts: Sequence[PartRows], cos: Tensor, sin: Tensor,
    wanted: Tensor, edits: Sequence[RowEdits] = (), captures: Sequence[tuple[int, str, Tensor, Tensor]] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Final states [T, hidden] and logits [n, vocab]. Shapes and dtypes as in `rainkernels.ops.decoder.DecoderStack.step`.

    captures: layer, tap, rows, and where they go
    """

    def edited(x: Tensor, index: int, tap: str) -> Tensor:
        here = (index, tap)
        for layer, at, rows, out in captures:
            if (layer, at) == here:
                out.copy_(x[rows])
        for layer, at, of_rows, table in edits:
            if (layer, at) == here:
                x = edit(x, of_rows, **table)  # type: ignore[arg-type]
        return x

    def product(x: Tensor, index: int, name: str) -> Tensor:
        weights: LinearWeight = getattr(stack.blocks[index], name)
        y = linear(x, *weights)
        for part in parts:
            if part.adapter is not None:
                _update(x[part.rows], y[part.rows], getattr(part.adapter[index], name))
        return y

    x = stack.embedding[ids]
    turn = cos[positions][:, None], sin[positions][:, None]
    for i, block in enumerate(stack.blocks):
        heads = product(_norm(x, block.attention_norm), i, "qkv").unflatten(1, (-1, stack.head_dim))
        q, k, v = heads.split([stack.num_qo_heads, stack.num_kv_heads, stack.num_kv_heads], dim=1)
        if block.q_norm is not None and block.k_norm is not None:
            q, k = _norm(q, block.q_norm), _norm(k, block.k_norm)
        q, k = _turned(q, *turn), _turned(k, *turn)
        for part in parts:  # all before any attends: parts of one member see each other
            at, (k_pool, v_pool) = slots[part.rows].long(), part.pools[i]
            k_pool[at], v_pool[at] = k[part.rows], v[part.rows]
        mixed = torch.empty_like(q)
        for part in parts:
            mixed[part.rows] = part.attend(q[part.rows], *part.pools[i], block)
        x = x + edited(product(mixed.flatten(1), i, "out"), i, "attn_out")
        gate, up = product(_norm(x, block.mlp_norm), i, "gate_up").chunk(2, dim=-1)
        x = edited(x + edited(product(silu(gate) * up, i, "down"), i, "mlp_out"), i, "block_out")
    states = _norm(x, stack.norm)
    return states, linear(states[wanted], *stack.head)


def _update(x: Tensor, y: Tensor, parts: Sequence[LowRank]) -> None:
    for part in parts:
        # float: a tensor takes no int of more than 64 bits.
        y[:, part.first : part.first + len(part.up)] += float(part.scale) * linear(linear(x, part.down), part.up)


def _norm(x: Tensor, norm: NormWeight) -> Tensor:
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + float(norm.eps)))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin
