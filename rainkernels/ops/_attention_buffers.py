"""Static memory for tree attention under CUDA graphs: tables and partials of fixed capacity, filled with one plan at a time."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rainkernels._checks import FLOATS, check_int
from rainkernels._lanes import choose_lane
from rainkernels.errors import DtypeError, LaneError, RangeError, ShapeError
from rainkernels.ops._attention_items import (
    HEADER,
    ITEM,
    LEVELS,
    Chunk,
    ItemTable,
    Places,
    item_table,
    resolve_chunk,
)
from rainkernels.ops._attention_items import check_chunk as check_chunk_value
from rainkernels.ops._attention_plan import AttentionPlan
from rainkernels.triton.attention_tiles import MAX_HEAD_DIM, Tiles, choose_tiles

__all__ = ["AttentionBuffers", "check_chunk", "check_heads"]

# Programs per launch: two for each SM of an H100 or H200. They loop when there are more items, and an idle one costs
# about a nanosecond.
_PROGRAMS = 2 * 132


def check_chunk(chunk: Chunk) -> None:
    """Raise a typed error unless `chunk` is "auto" or a multiple of 64 in 64..2**20."""
    if not isinstance(chunk, str):
        check_int("chunk", chunk, 1, hint="a multiple of 64, or 'auto'")
    check_chunk_value(chunk)


def check_heads(num_qo_heads: int, num_kv_heads: int, head_dim: int, head_dim_v: int, dtype: torch.dtype) -> None:
    """Raise a typed error unless the Triton lane takes heads of these numbers and sizes."""
    if dtype not in FLOATS:
        raise DtypeError(f"dtype is {dtype}, allowed: {', '.join(map(str, FLOATS))}")
    sizes = {"head_dim": head_dim, "head_dim_v": head_dim_v, "num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads}
    for name, size in sizes.items():
        check_int(name, size, 1, MAX_HEAD_DIM if "dim" in name else 65535)
    if num_qo_heads % num_kv_heads:
        raise ShapeError(f"num_qo_heads is {num_qo_heads}, it must be a multiple of num_kv_heads, {num_kv_heads}")


@dataclass(eq=False)
class AttentionBuffers:
    """Everything `tree_attention` reads besides q and the pools, at fixed addresses. Made by `create`.

    A captured call with `buffers` replays with whatever plan was loaded last: `load` copies its table into the static
    tensor on the current stream, without waiting for the device. Layers of one model share the buffers; two streams must
    not.
    """

    max_rows: int
    max_items: int
    max_keys: int
    max_partials: int
    num_slots: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    chunk: Chunk
    levels: int
    tiles: Tiles
    places: Places
    table: Tensor  # [size] int32, on the device
    state: tuple[Tensor, Tensor, Tensor]  # acc, maxima, sums of max_partials
    launches: tuple[tuple[int, bool, int], ...]  # level, narrow, programs
    plan: AttentionPlan | None = None  # the plan loaded last
    _staging: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32), repr=False)
    _copied: torch.cuda.Event | None = field(default=None, repr=False)

    @staticmethod
    def create(
        *,
        max_rows: int,
        max_items: int,
        max_keys: int,
        max_partials: int,
        num_slots: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
        chunk: Chunk = 256,
        levels: int = 2,
    ) -> AttentionBuffers:
        """Allocate for plans of up to these sizes.

        Args:
            max_rows: rows of q in every call; a plan with fewer leaves the rest zero.
            max_items, max_keys, max_partials: capacities; `load` says what a plan needs. A guide: max_partials = the sum
                over rows of ceil(path length / chunk), max_keys = all keys of the tree + rows x chunk.
            num_slots: slots of the pools; plans that name others are refused.
            chunk: positions per partial, as in `tree_attention`.
            levels: 1..4, how often sharing may nest within a chunk; each costs two launches per layer.
        Raises:
            LaneError: the device has no Triton lane. DtypeError, ShapeError, RangeError: naming the argument.
        """
        dim_v = head_dim if head_dim_v is None else head_dim_v
        check_heads(num_qo_heads, num_kv_heads, head_dim, dim_v, dtype)
        sizes = {
            "max_rows": max_rows, "max_items": max_items, "max_keys": max_keys, "max_partials": max_partials,
            "num_slots": num_slots,
        }  # fmt: skip
        for name, size in sizes.items():
            check_int(name, size, 1)
        check_int("levels", levels, 1, LEVELS)
        check_chunk(chunk)
        where = torch.device(device)
        if where.type == "cuda" and where.index is None:
            where = torch.device("cuda", torch.cuda.current_device())
        if choose_lane("attention", where) != "triton":
            raise LaneError(
                f"AttentionBuffers are for the triton lane, which {where} tensors do not take here: use device='cuda', or "
                "RAINKERNELS_LANE=triton with TRITON_INTERPRET=1 on a cpu"
            )
        # Rows first: the keys come last, so that a short plan copies little.
        order = HEADER
        position = order + max_rows
        part = position + max_rows
        items = -(-(part + max_rows + 1) // ITEM) * ITEM
        keys = items + ITEM * max_items
        if keys + max_keys >= 1 << 31:
            raise RangeError(f"max_items {max_items} and max_keys {max_keys} together exceed 2**31 - 1 table entries")
        tiles = choose_tiles(dtype, head_dim, dim_v, num_qo_heads // num_kv_heads, max_rows)
        programs = min(max_items, -(-_PROGRAMS // (num_kv_heads * tiles.splits)))
        classes = (False,) if tiles.narrow is None else (False, True)
        heads = max_partials * num_qo_heads
        maxima, sums = torch.empty(2, heads, dtype=torch.float32, device=where)
        buffers = AttentionBuffers(
            max_rows, max_items, max_keys, max_partials, num_slots,
            num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, head_dim_v=dim_v, dtype=dtype,
            chunk=chunk, levels=levels, tiles=tiles, places=Places(items, keys, order, position, part),
            table=torch.zeros(keys + max_keys, dtype=torch.int32, device=where),
            state=(torch.empty(heads * dim_v, dtype=torch.float32, device=where), maxima, sums),
            launches=tuple((level, narrow, programs) for level in range(levels) for narrow in classes),
        )  # fmt: skip
        with buffers._place():
            buffers._staging = torch.zeros(keys + max_keys, dtype=torch.int32, pin_memory=where.type == "cuda")
            buffers._copied = torch.cuda.Event() if where.type == "cuda" else None
            # No plan yet: every row is padding.
            buffers._staging[order:position] = torch.arange(max_rows, dtype=torch.int32)
            buffers.table.copy_(buffers._staging)
        return buffers

    @staticmethod
    def usable(device: torch.device) -> bool:
        """Whether `tree_attention` takes buffers for tensors on `device`: on the triton lane alone."""
        return choose_lane("attention", device) == "triton"

    @property
    def device(self) -> torch.device:
        """Where the static tensors lie."""
        return self.table.device

    def _place(self) -> contextlib.AbstractContextManager[object]:
        """Their device made the current one: an event is recorded on the current device's stream, whoever copied."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def planned(self, plan: AttentionPlan) -> ItemTable:
        """The plan's items as these buffers would hold them: its counts tell which capacities it needs."""
        chunk = resolve_chunk(self.chunk, plan, self.tiles, self.num_qo_heads, self.num_kv_heads, self.head_dim_v)
        return item_table(plan, self.tiles, chunk, self.levels)

    def load(self, plan: AttentionPlan) -> None:
        """Put `plan` into the static memory, for the next call or replay on the current stream.

        Raises:
            DtypeError: plan is none. RangeError: naming the capacity that is too small, or a slot outside the pools; the
            plan loaded before stays.
        """
        if not isinstance(plan, AttentionPlan):
            raise DtypeError(f"plan must come from attention_plan(), got {type(plan).__name__}")
        if plan.max_slot >= self.num_slots:
            raise RangeError(f"plan names slot {plan.max_slot}, num_slots is {self.num_slots}")
        if plan.num_rows > self.max_rows:
            raise RangeError(f"plan needs max_rows >= {plan.num_rows}, the buffers have {self.max_rows}")
        new = self.planned(plan)
        for name, need in (("items", new.num_items), ("keys", new.num_keys), ("partials", new.num_partials)):
            if need > getattr(self, f"max_{name}"):
                raise RangeError(
                    f"plan needs max_{name} >= {need}, the buffers have {getattr(self, f'max_{name}')}: create larger "
                    "buffers, or call tree_attention without buffers"
                )
        if self._copied is not None:
            self._copied.synchronize()  # the copy before, not the kernels after it
        used = self._fill(new)
        with self._place():
            self.table[:used].copy_(self._staging[:used], non_blocking=True)
            if self._copied is not None:
                self._copied.record()
        self.plan = plan

    def _fill(self, new: ItemTable) -> int:
        """Lay the sections out in the staging buffer; the number of int32 up to the last key."""
        host, at, rows = self._staging, self.places, new.num_rows
        host[:HEADER] = new.table[:HEADER]
        host[at.items : at.items + ITEM * new.num_items] = new.section(new.places.items, ITEM * new.num_items)
        host[at.keys : at.keys + new.num_keys] = new.section(new.places.keys, new.num_keys)
        host[at.row_order : at.row_order + rows] = new.section(new.places.row_order, rows)
        host[at.row_position : at.row_position + rows] = new.section(new.places.row_position, rows)
        host[at.row_part : at.row_part + rows + 1] = new.section(new.places.row_part, rows + 1)
        # Rows past the plan's are padding: themselves, without partials.
        host[at.row_order + rows : at.row_order + self.max_rows] = torch.arange(rows, self.max_rows, dtype=torch.int32)
        host[at.row_position + rows : at.row_position + self.max_rows] = -1
        host[at.row_part + rows + 1 : at.row_part + self.max_rows + 1] = new.num_partials
        return at.keys + new.num_keys
