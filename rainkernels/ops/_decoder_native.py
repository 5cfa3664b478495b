"""What a DecoderStack hands to its native half: addresses, sizes and numbers, in the order of csrc/bindings/decoder.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rainkernels._decoder_weights import UPDATED, BlockUpdate, LowRank, StackWeights
from rainkernels._lanes import native
from rainkernels.ops._decoder_edits import TAPS, Capture, EditSite
from rainkernels.ops.edits import table_arguments


def native_stack(w: StackWeights, adapters: Sequence[Sequence[BlockUpdate]]) -> tuple[Any, list[Tensor]]:
    """The native stack, and the tensors that were made for it."""
    intermediate = w.blocks[0].down.weight.shape[1]
    vocab, hidden = w.embedding.shape
    shape = [hidden, intermediate, w.num_qo_heads, w.num_kv_heads, w.head_dim, vocab]
    stack = native().DecoderStack(
        shape, w.embedding.data_ptr(), w.norm.weight.data_ptr(), w.norm.eps, w.head.weight.data_ptr(),
        address(w.head.bias),
    )  # fmt: skip
    for block in w.blocks:
        q_norm, k_norm = (None if n is None else n.weight for n in (block.q_norm, block.k_norm))
        tensors = (
            block.attention_norm.weight, *block.qkv, q_norm, k_norm, *block.out, block.mlp_norm.weight, *block.gate_up,
            *block.down, block.sinks,
        )  # fmt: skip
        head_eps = 0.0 if block.q_norm is None else block.q_norm.eps
        numbers = (block.attention_norm.eps, head_eps, block.mlp_norm.eps, block.softmax_scale, block.softcap)
        stack.add_block([address(t) for t in tensors], numbers, block.sliding_window)
    kept: list[Tensor] = []
    for blocks in adapters:
        stack.add_adapter([[_native_update(getattr(update, name), kept) for name in UPDATED] for update in blocks])
    return stack, kept


def _native_update(parts: Sequence[LowRank], kept: list[Tensor]) -> tuple[int, list[tuple[int, int, int, int, float]]]:
    """Address of the joined `down`s; of each part address of `up` [ceil(n / 16), r, 16], first, n, r, scale."""
    if not parts:
        return 0, []
    kept.append(torch.cat([part.down for part in parts]))
    down, made = kept[-1].data_ptr(), []
    for part in parts:
        size, rank = part.up.shape
        up = torch.nn.functional.pad(part.up, (0, 0, 0, -size % 16)).view(-1, 16, rank).transpose(1, 2)
        kept.append(up.clone(memory_format=torch.contiguous_format))
        made.append((kept[-1].data_ptr(), part.first, size, rank, part.scale))
    return down, made


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def native_sites(sites: Sequence[EditSite]) -> list[tuple[int, int, tuple[int, ...], int]]:
    """Layer, tap, table, column."""
    return [(site.layer, TAPS.index(site.tap), table_arguments(site.table), site.column) for site in sites]


def native_captures(captures: Sequence[Capture]) -> list[tuple[int, int, int, int, int]]:
    """Layer, tap, address and number of the rows, address of the output."""
    return [(c.layer, TAPS.index(c.tap), c.rows.data_ptr(), len(c.rows), c.out.data_ptr()) for c in captures]
