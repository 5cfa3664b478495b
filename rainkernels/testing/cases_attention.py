"""Named cases of the attention family: segment trees, rows and head shapes, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from rainkernels.ops._attention_items import item_table
from rainkernels.ops.attention import AttentionPlan, attention_plan
from rainkernels.triton.attention_tiles import Tile, choose_tiles

__all__ = [
    "CASES",
    "AttentionCase",
    "AttentionInputs",
    "AttentionOptions",
    "Forest",
    "chain",
    "fan",
    "split_everywhere",
    "tiles_of_rows",
]


@dataclass(frozen=True)
class Forest:
    """Segments as (parent, length) and rows as (segment, offset inside it); segment -1 is a padding row."""

    segments: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, int], ...]

    def starts(self) -> list[int]:
        """Position of each segment's first token."""
        begin: list[int] = []
        for up, _ in self.segments:
            begin.append(0 if up < 0 else begin[up] + self.segments[up][1])
        return begin

    def num_keys(self) -> int:
        """Tokens in all segments."""
        return sum(length for _, length in self.segments)

    def plan_inputs(self, slots: Tensor) -> dict[str, Tensor]:
        """Arguments of `attention_plan`; `slots` [num_keys] int32 in segment order."""
        begin = self.starts()
        indptr = torch.zeros(len(self.segments) + 1, dtype=torch.int32)
        indptr[1:] = torch.tensor([length for _, length in self.segments], dtype=torch.int32).cumsum(0)
        return {
            "segment_parent": torch.tensor([up for up, _ in self.segments], dtype=torch.int32),
            "segment_start": torch.tensor(begin, dtype=torch.int32),
            "segment_slots_indptr": indptr,
            "slots": slots,
            "row_segment": torch.tensor([s for s, _ in self.rows], dtype=torch.int32),
            "row_position": torch.tensor([begin[s] + at if s >= 0 else 0 for s, at in self.rows], dtype=torch.int32),
        }


def chain(length: int, rows: int) -> Forest:
    """One segment; its last `rows` tokens are the rows."""
    return Forest(((-1, length),), tuple((0, length - rows + i) for i in range(rows)))


def fan(prefix: int, branches: int, length: int, rows: int = 1) -> Forest:
    """`branches` segments of `length` tokens under one prefix; the last `rows` tokens of each are rows."""
    return Forest(
        ((-1, prefix), *((0, length) for _ in range(branches))),
        tuple((1 + b, length - rows + i) for b in range(branches) for i in range(rows)),
    )


def split_everywhere(forest: Forest, step: int) -> Forest:
    """The same paths with every segment cut into pieces of `step` tokens."""
    segments: list[tuple[int, int]] = []
    pieces: list[list[int]] = []
    for up, length in forest.segments:
        above = pieces[up][-1] if up >= 0 else -1
        mine: list[int] = []
        for at in range(0, max(length, 1), step):
            segments.append((above, min(step, length - at)))
            above = len(segments) - 1
            mine.append(above)
        pieces.append(mine)
    rows = tuple((pieces[s][at // step], at % step) if s >= 0 else (s, at) for s, at in forest.rows)
    return Forest(tuple(segments), rows)


class AttentionOptions(TypedDict):
    """Keyword arguments of `tree_attention`."""

    softmax_scale: float
    softcap: float
    sliding_window: int


@dataclass(frozen=True)
class AttentionInputs:
    """Tensors of one case: everything `tree_attention` takes, and the plan's arguments for the reference."""

    q: Tensor
    k_pool: Tensor
    v_pool: Tensor
    plan_inputs: dict[str, Tensor]
    options: AttentionOptions
    sinks: Tensor | None = None

    def plan(self) -> AttentionPlan:
        """A fresh plan."""
        return attention_plan(**self.plan_inputs)


@dataclass(frozen=True)
class AttentionCase:
    """A forest with head shapes and options."""

    id: str
    forest: Forest
    num_qo_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None
    softcap: float = 0.0
    sliding_window: int = 0
    sinks: bool = False
    scattered: bool = True  # slots in random order, as after many rewinds
    strided_q: bool = False
    sharpness: float = 1.0  # multiplies softmax_scale: large values approach an argmax

    def __str__(self) -> str:
        return self.id

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> AttentionInputs:
        """Inputs drawn from a seeded normal distribution; the plan's tensors stay on the cpu."""
        g = torch.Generator().manual_seed(seed)
        keys, rows, dim_v = self.forest.num_keys(), len(self.forest.rows), self.head_dim_v or self.head_dim
        order = torch.randperm(keys, generator=g) if self.scattered else torch.arange(keys)
        q = torch.randn(rows, self.num_qo_heads, self.head_dim, generator=g).to(device, dtype)
        if self.strided_q:
            q = q.transpose(0, 1).contiguous().transpose(0, 1)
        return AttentionInputs(
            q=q,
            k_pool=torch.randn(keys + 1, self.num_kv_heads, self.head_dim, generator=g).to(device, dtype),
            v_pool=torch.randn(keys + 1, self.num_kv_heads, dim_v, generator=g).to(device, dtype),
            plan_inputs=self.forest.plan_inputs(order.to(torch.int32) + 1),
            options={
                "softmax_scale": self.sharpness * self.head_dim**-0.5,
                "softcap": self.softcap,
                "sliding_window": self.sliding_window,
            },
            sinks=torch.randn(self.num_qo_heads, generator=g).to(device) if self.sinks else None,
        )


def tiles_of_rows(i: AttentionInputs, chunk: int = 256) -> list[tuple[Tile, ...]]:
    """The tiles in which the Triton lane meets each row's keys, by block of 64 positions: what a row's bits depend on."""
    plan, (_, num_kv_heads, dim_v) = i.plan(), i.v_pool.shape
    tiles = choose_tiles(i.q.dtype, i.q.shape[2], dim_v, i.q.shape[1] // num_kv_heads, plan.num_rows)
    table = item_table(plan, tiles, chunk)
    order = table.section(table.places.row_order, plan.num_rows).tolist()
    position = table.section(table.places.row_position, plan.num_rows).tolist()
    found: list[dict[int, Tile]] = [{} for _ in order]
    items = iter(table.items().tolist())
    for _, narrow, count in table.launches:
        tile = tiles.narrow if narrow else tiles.wide
        assert tile is not None
        for _, (_, begin, num_keys, row0, num_rows, *_) in zip(range(count), items, strict=False):
            for r in range(row0, row0 + num_rows):
                end = min(begin + num_keys, position[r] + 1)
                found[order[r]] |= dict.fromkeys(range(begin // 64, -(-end // 64)), tile)
    return [tuple(tile for _, tile in sorted(blocks.items())) for blocks in found]


# A step of a real search in one batch: prefill of a new request, decode rows, a speculated chain, an empty node, padding.
_STEP = Forest(
    ((-1, 300), (0, 7), (0, 1), (1, 3), (1, 90), (4, 0), (5, 2), (-1, 37), (2, 260)),
    (
        *((7, i) for i in range(37)),
        (3, 2), (-1, 0), (4, 89), (6, 0), (6, 1), (2, 0), (8, 259), (8, 3), (1, 6), (0, 299),
    ),
)  # fmt: skip
# RAIN's shape: short nodes that diverge at every token.
_COMB = Forest(
    ((-1, 250), *((2 * (i // 2), 1 + i % 4) for i in range(24))),
    tuple((s, 0) for s in range(1, 25)),
)

CASES: tuple[AttentionCase, ...] = (
    AttentionCase("one-row-one-token", chain(1, 1), 1, 1, 16),
    AttentionCase("decode-long", chain(700, 1), 8, 2, 64),
    AttentionCase("prefill", chain(270, 270), 4, 1, 32, scattered=False),
    AttentionCase("fan-mha", fan(256, 40, 5), 2, 2, 64, scattered=False),
    AttentionCase("fan-gqa8", fan(130, 13, 9, rows=2), 8, 1, 128),
    AttentionCase("step", _STEP, 4, 2, 80, strided_q=True),
    AttentionCase("comb", _COMB, 4, 2, 96),
    AttentionCase("wide-heads", fan(70, 3, 4), 2, 1, 256),
    AttentionCase("values-narrower", _STEP, 6, 3, 24, head_dim_v=16),
    AttentionCase("odd-dims", _STEP, 3, 1, 33, head_dim_v=5),
    AttentionCase("softcap", _STEP, 4, 2, 64, softcap=5.0, sharpness=8.0),
    AttentionCase("window", _STEP, 4, 2, 32, sliding_window=33),
    AttentionCase("window-one", _STEP, 2, 2, 16, sliding_window=1),
    AttentionCase("sinks-window", _STEP, 4, 2, 64, sinks=True, sliding_window=128),
    AttentionCase("sharp", fan(300, 6, 20), 4, 4, 64, sharpness=60.0),
)
