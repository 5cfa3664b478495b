"""Weights of a stack of decoder blocks, as rainkernels.ops.decoder takes them, and what must hold of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rainkernels._checks import check_int, check_real, check_tensor
from rainkernels.errors import DtypeError, RangeError, ShapeError

_CPU = torch.device("cpu")


class LinearWeight(NamedTuple):
    """weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None


class NormWeight(NamedTuple):
    """RMSNorm: weight [dim], eps."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class BlockWeights:
    """One decoder block.

    Shapes (D = head_dim, all float32):
        attention_norm, mlp_norm: [hidden]
        qkv: [(num_qo_heads + 2 num_kv_heads) D, hidden], rows of q, then k, then v
        q_norm, k_norm: [D], over each head before it is turned; both or neither
        out: [hidden, num_qo_heads D]
        gate_up: [2 intermediate, hidden], rows of the gate, then of up; down: [hidden, intermediate]
        softmax_scale, softcap, sliding_window, sinks: as in `tree_attention`
    """

    attention_norm: NormWeight
    qkv: LinearWeight
    out: LinearWeight
    mlp_norm: NormWeight
    gate_up: LinearWeight
    down: LinearWeight
    softmax_scale: float
    q_norm: NormWeight | None = None
    k_norm: NormWeight | None = None
    softcap: float = 0.0
    sliding_window: int = 0
    sinks: Tensor | None = None


@dataclass(frozen=True)
class StackWeights:
    """embedding [vocab, hidden], blocks, norm [hidden], head [vocab, hidden]; heads of head_dim, a multiple of 2."""

    embedding: Tensor
    blocks: tuple[BlockWeights, ...]
    norm: NormWeight
    head: LinearWeight
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int


class LowRank(NamedTuple):
    """A low-rank update of some outputs of a product: y[:, first : first + n] += scale (x down^T) up^T.

    Shapes (float32):
        down: [r, in], r >= 1
        up:   [n, r]
    first: the first output of the joined product that is updated; for k of `qkv` the number of q's rows.
    """

    down: Tensor
    up: Tensor
    first: int
    scale: float


@dataclass(frozen=True)
class BlockUpdate:
    """What an adapter adds to the products of one block. Parts of one product have no output in common."""

    qkv: tuple[LowRank, ...] = ()
    out: tuple[LowRank, ...] = ()
    gate_up: tuple[LowRank, ...] = ()
    down: tuple[LowRank, ...] = ()


UPDATED = ("qkv", "out", "gate_up", "down")


def check_adapters(w: StackWeights, adapters: Sequence[Sequence[BlockUpdate]]) -> None:
    """Raise a typed error that names the part unless every update fits its product."""
    for a, blocks in enumerate(adapters):
        if len(blocks) != len(w.blocks):
            raise ShapeError(
                f"adapters[{a}] has {len(blocks)} block updates, the stack {len(w.blocks)} blocks: give one each"
            )
        for i, (update, block) in enumerate(zip(blocks, w.blocks, strict=True)):
            if not isinstance(update, BlockUpdate):
                raise DtypeError(f"adapters[{a}].blocks[{i}] must be a BlockUpdate, got {type(update).__name__}")
            for product in UPDATED:
                linear: LinearWeight = getattr(block, product)
                _check_update(f"adapters[{a}].blocks[{i}].{product}", getattr(update, product), linear.weight)


def _check_update(name: str, parts: Sequence[LowRank], weight: Tensor) -> None:
    outputs, inputs = weight.shape
    taken: list[tuple[int, int, int]] = []  # first, end, index
    for index, part in enumerate(parts):
        at = f"{name}[{index}]"
        check_tensor(f"{at}.down", part.down, dtype=torch.float32, shape=(None, inputs), device=_CPU)
        rank = part.down.shape[0]
        if not rank:
            raise ShapeError(f"{at}.down has shape [0, {inputs}], expected a rank of 1 or more: leave the part out")
        check_tensor(f"{at}.up", part.up, dtype=torch.float32, shape=(None, rank), device=_CPU)
        size = part.up.shape[0]
        check_int(f"{at}.first", part.first, 0)
        if not 1 <= size <= outputs - part.first:
            raise ShapeError(
                f"{at}.up has {size} rows and begins at output {part.first}, the product has {outputs} outputs: give 1 row or "
                "more that fit in"
            )
        check_real(f"{at}.scale", part.scale, "it must be finite in float32", signed=True)
        taken.append((part.first, part.first + size, index))
    taken.sort()
    for (_, end, one), (first, _, other) in pairwise(taken):
        if first < end:
            raise RangeError(
                f"{name}[{one}] ends before output {end}, {name}[{other}] begins at {first}: parts must have no output in common"
            )


def check_stack(w: StackWeights) -> None:
    """Raise a typed error that names the weight unless a step can run on them."""
    check_int("num_kv_heads", w.num_kv_heads, 1)
    check_int("num_qo_heads", w.num_qo_heads, 1)
    check_int("head_dim", w.head_dim, 2)
    if w.num_qo_heads % w.num_kv_heads or w.head_dim % 2:
        raise ShapeError(
            f"{w.num_qo_heads} query heads, {w.num_kv_heads} KV heads of {w.head_dim}: the first must be a multiple of the "
            "second, the third even"
        )
    if not w.blocks:
        raise ShapeError("blocks is empty: a stack has at least one block")
    check_tensor("embedding", w.embedding, dtype=torch.float32, shape=(None, None), device=_CPU)
    vocab, hidden = w.embedding.shape
    _check_norm("norm", w.norm, hidden)
    _check_linear("head", w.head, vocab, hidden)
    queries, keys = w.num_qo_heads * w.head_dim, w.num_kv_heads * w.head_dim
    check_tensor("blocks[0].down.weight", w.blocks[0].down.weight, shape=(hidden, None))
    intermediate = w.blocks[0].down.weight.shape[1]
    for i, block in enumerate(w.blocks):
        name = f"blocks[{i}]."
        _check_norm(name + "attention_norm", block.attention_norm, hidden)
        _check_norm(name + "mlp_norm", block.mlp_norm, hidden)
        _check_linear(name + "qkv", block.qkv, queries + 2 * keys, hidden)
        _check_linear(name + "out", block.out, hidden, queries)
        _check_linear(name + "gate_up", block.gate_up, 2 * intermediate, hidden)
        _check_linear(name + "down", block.down, hidden, intermediate)
        check_real(name + "softmax_scale", block.softmax_scale, "it must be finite in float32 and > 0", positive=True)
        check_real(name + "softcap", block.softcap, "it must be finite in float32 and >= 0; 0 means none")
        check_int(name + "sliding_window", block.sliding_window, 0, hint="tokens, 0 means none")
        if block.sinks is not None:
            check_tensor(name + "sinks", block.sinks, dtype=torch.float32, shape=(w.num_qo_heads,), device=_CPU)
        if (block.q_norm is None) != (block.k_norm is None):
            raise ShapeError(f"{name}q_norm and k_norm belong together: give both, or None for both")
        if block.q_norm is not None and block.k_norm is not None:
            _check_norm(name + "q_norm", block.q_norm, w.head_dim)
            _check_norm(name + "k_norm", block.k_norm, w.head_dim)
            if block.q_norm.eps != block.k_norm.eps:
                raise RangeError(
                    f"{name}q_norm has eps {block.q_norm.eps}, k_norm {block.k_norm.eps}: they must be equal"
                )


def _check_norm(name: str, norm: NormWeight, dim: int) -> None:
    check_tensor(f"{name}.weight", norm.weight, dtype=torch.float32, shape=(dim,), device=_CPU)
    check_real(f"{name}.eps", norm.eps, "it must be finite in float32 and >= 0")


def _check_linear(name: str, linear: LinearWeight, rows: int, columns: int) -> None:
    check_tensor(f"{name}.weight", linear.weight, dtype=torch.float32, shape=(rows, columns), device=_CPU)
    if linear.bias is not None:
        check_tensor(f"{name}.bias", linear.bias, dtype=torch.float32, shape=(rows,), device=_CPU)
