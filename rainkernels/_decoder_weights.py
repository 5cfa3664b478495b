"""Weights of a stack of decoder blocks, as rainkernels.ops.decoder takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


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
