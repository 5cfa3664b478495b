"""Named cases of the decoder family, shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from rainkernels.ops.attention import AttentionPlan, attention_plan
from rainkernels.ops.decoder import (
    BlockUpdate,
    BlockWeights,
    Capture,
    DecoderStack,
    LinearWeight,
    LowRank,
    NormWeight,
    StackWeights,
    StepPart,
)

__all__ = ["CASES", "DecoderCase", "StepInputs", "branches", "merged", "rotary", "together"]


class StepInputs(NamedTuple):
    """Arguments of `DecoderStack.step` in their order."""

    ids: Tensor
    positions: Tensor
    slots: Tensor
    parts: tuple[StepPart, ...]
    cos: Tensor
    sin: Tensor
    wanted: Tensor
    edit_slots: Tensor | None = None
    captures: tuple[Capture, ...] = ()


@dataclass(frozen=True)
class DecoderCase:
    """One stack: its sizes, and what its blocks have besides the products."""

    id: str
    num_qo_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 48
    intermediate: int = 80
    vocab: int = 61
    num_blocks: int = 2
    bias: bool = False
    head_bias: bool = False
    head_norms: bool = False
    sinks: bool = False
    softcap: float = 0.0
    windows: tuple[int, ...] = ()  # of the blocks in turn, 0 for none
    tied: bool = False
    eps: float = 1e-6

    def __str__(self) -> str:
        return self.id

    def make(self, seed: int = 0) -> StackWeights:
        """Random weights."""
        g = torch.Generator().manual_seed(seed)
        embedding = torch.randn(self.vocab, self.hidden, generator=g)
        head = LinearWeight(embedding, None) if self.tied else _linear(self.vocab, self.hidden, self.head_bias, g)
        return StackWeights(
            embedding=embedding,
            blocks=tuple(self._block(i, g) for i in range(self.num_blocks)),
            norm=self._norm(self.hidden, g),
            head=head,
            num_qo_heads=self.num_qo_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
        )

    def adapter(self, seed: int = 0) -> tuple[BlockUpdate, ...]:
        """Random updates of several ranks; none of k, nor of anything but `down` in every third block."""
        g = torch.Generator().manual_seed(1000 + seed)
        queries, keys = self.num_qo_heads * self.head_dim, self.num_kv_heads * self.head_dim
        made = []
        for i in range(self.num_blocks):
            down = (_low_rank(self.intermediate, 0, self.hidden, 4 + seed, g),)
            q = _low_rank(self.hidden, 0, queries, 3, g)
            v = _low_rank(self.hidden, queries + keys, keys, 17, g)
            out = (_low_rank(queries, 0, self.hidden, 1, g),)
            gate, up = (_low_rank(self.hidden, n * self.intermediate, self.intermediate, 8, g) for n in range(2))
            made.append(BlockUpdate((v, q), out, (gate, up), down) if i % 3 != 2 else BlockUpdate(down=down))
        return tuple(made)

    def stack(self, num_slots: int, seed: int = 0, adapters: Sequence[Sequence[BlockUpdate]] = ()) -> DecoderStack:
        """A stack with pools of zeros for every member."""
        stack = DecoderStack(self.make(seed), adapters)
        shape = (num_slots, self.num_kv_heads, self.head_dim)
        for member in range(stack.num_members):
            stack.set_pools([(torch.zeros(shape), torch.zeros(shape)) for _ in range(self.num_blocks)], member)
        return stack

    def inputs(self, lengths: tuple[int, ...], seed: int = 0, member: int = 0) -> StepInputs:
        """A step of `branches(lengths)` from slot 1 on, the logits of the last row of each run wanted."""
        g = torch.Generator().manual_seed(seed)
        plan, positions = branches(lengths)
        rows = len(positions)
        cos, sin = rotary(int(positions.max()) + 1 if rows else 1, self.head_dim)
        return StepInputs(
            ids=torch.randint(self.vocab, (rows,), generator=g),
            positions=positions,
            slots=torch.arange(1, rows + 1, dtype=torch.int32),
            parts=(StepPart(member, rows, plan),),
            cos=cos,
            sin=sin,
            wanted=torch.tensor(lengths, dtype=torch.int64).cumsum(0) - 1,
        )

    def _block(self, index: int, g: torch.Generator) -> BlockWeights:
        queries, keys = self.num_qo_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return BlockWeights(
            attention_norm=self._norm(self.hidden, g),
            qkv=_linear(queries + 2 * keys, self.hidden, self.bias, g),
            out=_linear(self.hidden, queries, self.bias, g),
            mlp_norm=self._norm(self.hidden, g),
            gate_up=_linear(2 * self.intermediate, self.hidden, self.bias, g),
            down=_linear(self.hidden, self.intermediate, self.bias, g),
            softmax_scale=self.head_dim**-0.5,
            q_norm=self._norm(self.head_dim, g) if self.head_norms else None,
            k_norm=self._norm(self.head_dim, g) if self.head_norms else None,
            softcap=self.softcap,
            sliding_window=self.windows[index % len(self.windows)] if self.windows else 0,
            sinks=torch.randn(self.num_qo_heads, generator=g) if self.sinks else None,
        )

    def _norm(self, dim: int, g: torch.Generator) -> NormWeight:
        return NormWeight(1.0 + 0.2 * torch.randn(dim, generator=g), self.eps)


def together(*steps: StepInputs) -> StepInputs:
    """The rows of several steps in one; slots may meet where the members differ. Steps without edits get slots of 0."""
    firsts = list(accumulate((len(step.ids) for step in steps[:-1]), initial=0))
    longest = max(steps, key=lambda step: len(step.cos))
    columns = max((len(step.edit_slots) for step in steps if step.edit_slots is not None), default=0)
    none = [torch.zeros(columns, len(step.ids), dtype=torch.int32) for step in steps]
    slots = [n if step.edit_slots is None else step.edit_slots for step, n in zip(steps, none, strict=True)]
    return StepInputs(
        ids=torch.cat([step.ids for step in steps]),
        positions=torch.cat([step.positions for step in steps]),
        slots=torch.cat([step.slots for step in steps]),
        parts=tuple(part for step in steps for part in step.parts),
        cos=longest.cos,
        sin=longest.sin,
        wanted=torch.cat([step.wanted + first for step, first in zip(steps, firsts, strict=True)]),
        edit_slots=torch.cat(slots, dim=1) if columns else None,
        captures=tuple(
            c._replace(rows=c.rows + first) for step, first in zip(steps, firsts, strict=True) for c in step.captures
        ),
    )


def merged(weights: StackWeights, adapter: Sequence[BlockUpdate]) -> StackWeights:
    """The weights with an adapter's updates added to them, in float64 and rounded once."""

    def add(linear: LinearWeight, parts: Sequence[LowRank]) -> LinearWeight:
        weight = linear.weight.double()
        for part in parts:
            weight[part.first : part.first + len(part.up)] += part.scale * (part.up.double() @ part.down.double())
        return LinearWeight(weight.float(), linear.bias)

    blocks = (
        replace(
            block, qkv=add(block.qkv, update.qkv), out=add(block.out, update.out),
            gate_up=add(block.gate_up, update.gate_up), down=add(block.down, update.down),
        )
        for block, update in zip(weights.blocks, adapter, strict=True)
    )  # fmt: skip
    return replace(weights, blocks=tuple(blocks))


def branches(lengths: tuple[int, ...]) -> tuple[AttentionPlan, Tensor]:
    """A stem of `lengths[0]` tokens and runs that fork at its end; plan and positions of all, their slots from 1 on."""
    stem = lengths[0] if lengths else 0
    starts = [0] + [stem] * (len(lengths) - 1)
    positions = [s + i for s, n in zip(starts, lengths, strict=False) for i in range(n)]
    plan = attention_plan(
        segment_parent=_ints([-1] + [0] * (len(lengths) - 1) if lengths else []),
        segment_start=_ints(starts if lengths else []),
        segment_slots_indptr=_ints([sum(lengths[:i]) for i in range(len(lengths) + 1)]),
        slots=_ints(range(1, len(positions) + 1)),
        row_segment=_ints([i for i, n in enumerate(lengths) for _ in range(n)]),
        row_position=_ints(positions),
    )
    return plan, torch.tensor(positions, dtype=torch.int64)


def rotary(num_positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines as `DecoderStack.step` takes them."""
    turns = torch.arange(num_positions)[:, None] * 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    return torch.cat([turns.cos()] * 2, dim=1), torch.cat([-turns.sin(), turns.sin()], dim=1)


def _linear(rows: int, columns: int, bias: bool, g: torch.Generator) -> LinearWeight:
    weight = torch.randn(rows, columns, generator=g) * max(columns, 1) ** -0.5
    return LinearWeight(weight, torch.randn(rows, generator=g) if bias else None)


def _low_rank(inputs: int, first: int, outputs: int, rank: int, g: torch.Generator) -> LowRank:
    down = torch.randn(rank, inputs, generator=g) * inputs**-0.5
    return LowRank(down, torch.randn(outputs, rank, generator=g) * rank**-0.5, first, 0.5)


def _ints(values: list[int] | range) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


CASES = [
    DecoderCase("llama"),
    DecoderCase("one-block-one-head", num_qo_heads=1, num_kv_heads=1, num_blocks=1),
    DecoderCase("multi-query-tied", num_qo_heads=6, num_kv_heads=1, tied=True),
    DecoderCase("biases", bias=True, head_bias=True),
    DecoderCase("head-norms", head_norms=True, head_dim=40, hidden=64),
    DecoderCase("wide-heads", head_dim=96, hidden=32, intermediate=33),
    DecoderCase("narrow-heads", num_qo_heads=3, num_kv_heads=3, head_dim=2, hidden=7, intermediate=5, vocab=3),
    DecoderCase("windows", windows=(5, 0), head_dim=24),
    DecoderCase("sinks-softcap", sinks=True, softcap=3.0, head_dim=8),
    # Longer than a piece of a product, and enough work for a second thread; sizes that no tile divides.
    DecoderCase(
        "large-products",
        num_qo_heads=8,
        num_kv_heads=2,
        head_dim=66,
        hidden=1035,
        intermediate=517,
        vocab=1031,
        num_blocks=1,
    ),
    DecoderCase("no-eps", eps=0.0, head_norms=True),
]
