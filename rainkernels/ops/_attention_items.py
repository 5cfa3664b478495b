"""Work items of the Triton lane: the C++ planner's table, where it lies on a device, and the bytes it makes a GPU move."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rainkernels._lanes import native
from rainkernels.errors import RangeError
from rainkernels.ops._attention_plan import AttentionPlan, check_unchanged, plan_addresses
from rainkernels.triton.attention_tiles import Tiles, choose_tiles

__all__ = [
    "HEADER", "ITEM", "LEVELS", "AttentionTraffic", "Chunk", "ItemTable", "Launch", "Places", "attention_traffic",
    "check_chunk", "item_table", "resolve_chunk", "stream_of",
]  # fmt: skip

Chunk = int | Literal["auto"]

# int32 of the table's header and of an item (csrc/cpu/attention_items.h).
HEADER, ITEM = 32, 8
LEVELS = 4
# Blocks of keys begin at multiples of it, chunks are multiples of it (kKeyTile).
_KEY_TILE = 64
_MAX_CHUNK = 1 << 20
# chunk="auto": programs that fill the GPU (SMs of an H100 or H200), fewest positions worth a partial, most partial bytes.
_FILL, _SHORTEST, _PARTIAL_BYTES = 132, 128, 16 << 20


class Launch(NamedTuple):
    """The items of one kernel launch: a level and a tile class."""

    level: int
    narrow: bool
    num_items: int


class Places(NamedTuple):
    """Where a table's sections begin, in int32."""

    items: int
    keys: int
    row_order: int
    row_position: int
    row_part: int


@dataclass(frozen=True, eq=False)
class ItemTable:
    """The planner's flat int32 table on the cpu, its counts, and its copies on devices."""

    table: Tensor
    num_rows: int
    num_items: int
    num_keys: int  # slots the items name, those of paths that were copied together included
    num_partials: int
    num_seen: int  # distinct keys that some row sees
    chunk: int
    launches: tuple[Launch, ...]  # in order; those without items left out
    places: Places
    _copies: dict[object, Tensor] = field(default_factory=dict, repr=False)

    @staticmethod
    def parse(table: Tensor) -> ItemTable:
        """Read the header."""
        h = table[:HEADER].tolist()
        counts = [(level, narrow, h[9 + 4 * level + 2 * narrow]) for level in range(LEVELS) for narrow in (0, 1)]
        launches = tuple(Launch(level, bool(narrow), count) for level, narrow, count in counts if count)
        return ItemTable(table, h[0], h[1], h[2], h[3], h[6], h[4], launches, Places(*h[24:29]))

    def on(self, device: torch.device, stream: int) -> Tensor:
        """The table on `device`, copied once per stream: what another stream copied might not have arrived."""
        copy = self._copies.get((device, stream))
        if copy is None:
            # Out of pinned memory, so that the host does not wait for what the stream has before the copy.
            host = self.table.pin_memory() if device.type == "cuda" else self.table
            copy = self._copies[device, stream] = host.to(device, non_blocking=True)
        return copy

    def items(self) -> Tensor:
        """[num_items, 8]: key_offset, position, num_keys, row0, num_rows, chunk, goes_on, unused; by launch."""
        return self.table[self.places.items : self.places.items + ITEM * self.num_items].view(-1, ITEM)

    def section(self, place: int, length: int) -> Tensor:
        """`length` int32 from `place` on."""
        return self.table[place : place + length]


def stream_of(device: torch.device) -> int:
    """The current stream's address; 0 on the cpu."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def check_chunk(chunk: Chunk) -> None:
    """RangeError unless `chunk` is "auto" or a multiple of 64 in 64..2**20."""
    if chunk == "auto":
        return
    if not isinstance(chunk, int) or chunk <= 0 or chunk % _KEY_TILE or chunk > _MAX_CHUNK:
        raise RangeError(f"chunk is {chunk!r}, it must be 'auto' or a multiple of {_KEY_TILE} in {_KEY_TILE}..2**20")


def resolve_chunk(
    chunk: Chunk, plan: AttentionPlan, tiles: Tiles, num_qo_heads: int, num_kv_heads: int, dim_v: int
) -> int:
    """The number of positions a partial spans; for "auto" few enough partials to merge and items enough to fill a GPU."""
    if chunk != "auto":
        return chunk
    longest = int(plan.row_position.max()) + 1 if plan.num_rows else 1
    programs = -(-plan.num_rows // tiles.rows(tiles.wide)) * num_kv_heads * tiles.splits
    splits = -(-_FILL // max(1, programs))
    split_bytes = plan.num_rows * num_qo_heads * (dim_v + 2) * 4
    splits = max(1, min(splits, _PARTIAL_BYTES // max(1, split_bytes)))
    span = max(_SHORTEST, -(-max(1, longest) // splits))
    return min(_MAX_CHUNK, -(-span // _KEY_TILE) * _KEY_TILE)


def item_table(plan: AttentionPlan, tiles: Tiles, chunk: int, levels: int = LEVELS) -> ItemTable:
    """The plan's items for these tiles, built once (csrc/cpu/attention_items.cpp).

    Raises:
        RangeError: the plan needs more than 2**31 - 1 items, keys or partials.
    """
    key = (tiles.group, tiles.rows(tiles.wide), tiles.rows(tiles.narrow), chunk, levels)
    table = plan._items.get(key)
    if table is None:
        check_unchanged(plan)
        try:
            raw = native().attention_items(*plan_addresses(plan), *key)
        except ValueError as error:
            raise RangeError(f"plan is too large for one call: {error}; attend in several") from error
        table = plan._items[key] = ItemTable.parse(torch.frombuffer(raw, dtype=torch.int32))
    assert isinstance(table, ItemTable)
    return table


class AttentionTraffic(NamedTuple):
    """Bytes one layer's tree_attention moves on the Triton lane, as its items ask for them, caches left out."""

    kv_bytes: int  # K and V read by the items; more than kv_floor where row tiles or branches read a key again
    kv_floor: int  # K and V of every key that some row sees, once
    partial_bytes: int  # accumulators, maxima and sums written, read by later levels and by the merge
    row_bytes: int  # q read by every item, out written
    num_items: int  # times num_kv_heads: programs
    num_launches: int  # merge included


def attention_traffic(
    plan: AttentionPlan,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    chunk: Chunk = 256,
) -> AttentionTraffic:
    """Count the bytes `tree_attention` moves for this plan and these head shapes on the Triton lane.

    Raises:
        RangeError: chunk.
    """
    check_chunk(chunk)
    dim_v = head_dim if head_dim_v is None else head_dim_v
    tiles = choose_tiles(dtype, head_dim, dim_v, num_qo_heads // num_kv_heads, plan.num_rows)
    size = resolve_chunk(chunk, plan, tiles, num_qo_heads, num_kv_heads, dim_v)
    table = item_table(plan, tiles, size)
    items = table.items().long()
    num_keys, rows, goes_on = items[:, 2], items[:, 4], items[:, 6]
    key_bytes = num_kv_heads * (head_dim + dim_v) * dtype.itemsize
    state_bytes = num_qo_heads * (dim_v + 2) * 4
    states = int((rows * (1 + goes_on)).sum()) + table.num_partials
    return AttentionTraffic(
        kv_bytes=int(num_keys.sum()) * tiles.splits * key_bytes,
        kv_floor=table.num_seen * key_bytes,
        partial_bytes=states * state_bytes,
        row_bytes=(int(rows.sum()) * head_dim + plan.num_rows * dim_v) * num_qo_heads * dtype.itemsize,
        num_items=table.num_items,
        num_launches=len(table.launches) + 1,
    )
