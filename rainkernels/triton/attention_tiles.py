"""Tile shapes of the Triton tree attention: chosen by dtype and head sizes, compiled ahead of time in tests.

Imports no Triton: the planner, traffic counts and tests need the shapes on machines without it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["MAX_HEAD_DIM", "Tile", "Tiles", "choose_tiles", "pieces"]

MAX_HEAD_DIM = 256


class Tile(NamedTuple):
    """One compiled shape: row_heads x keys, the padded pieces of head_dim and head_dim_v, warps and stages."""

    row_heads: int
    keys: int
    num_warps: int
    num_stages: int
    k_pieces: tuple[int, int]
    v_pieces: tuple[int, int]


class Tiles(NamedTuple):
    """The wide and narrow tile of a call. A tile holds whole rows of `group` query heads of one KV head."""

    wide: Tile
    narrow: Tile | None
    group: int
    splits: int  # programs that share a KV head's query heads

    def rows(self, tile: Tile | None) -> int:
        """Rows of a tile; 0 where there is none."""
        return 0 if tile is None else tile.row_heads // self.group


def pieces(dim: int, smallest: int = 16) -> tuple[int, int]:
    """`dim` padded to a power of two, or to a sum of two when that is less: 80 -> (64, 16), 96 -> (64, 32)."""
    whole = max(16, 1 << (dim - 1).bit_length())
    first = whole // 2
    second = max(smallest, 1 << max(0, dim - first - 1).bit_length())
    return (whole, 0) if first < 16 or first + second >= whole else (first, second)


def halves(parts: tuple[int, int]) -> tuple[int, int]:
    """One piece of 256 as two of 128."""
    return (128, 128) if parts == (256, 0) else parts


def choose_tiles(dtype: torch.dtype, head_dim: int, head_dim_v: int, group: int, num_rows: int) -> Tiles:
    """Tiles for `group` query heads per KV head and at most `num_rows` rows.

    The keys of a block are the same for both tiles: blocks are part of what fixes a row's bits. Found by compiling for
    sm_80 and sm_90 under Triton 3.6 and 3.9: the largest shapes that spill nothing (docs/log.md).
    """
    k, v = pieces(head_dim), pieces(head_dim_v)
    large = max(sum(k), sum(v)) > 128
    if dtype == torch.float32:
        narrow = Tile(16, 32, 8 if large else 4, 2, k, v)
        wide = narrow if large else Tile(32, 32, 8, 3, k, v)
    else:
        # A last piece of 16 columns cannot be dealt out to the four warps of a 16-row tile.
        k_narrow, v_narrow = pieces(head_dim, 32), pieces(head_dim_v, 32)
        if large:
            # In halves: 256 columns at once leave too few registers for 64 rows.
            k, v, k_narrow, v_narrow = (halves(parts) for parts in (k, v, k_narrow, v_narrow))
        narrow = Tile(16, 32 if large else 64, 4, 3, k_narrow, v_narrow)
        if large:
            wide = Tile(64, 32, 8, 2, k, v)
        elif num_rows * group <= 64:
            wide = Tile(64, 64, 8 if max(sum(k), sum(v)) > 96 else 4, 2, k, v)
        else:
            wide = Tile(128, 64, 8, 3, k, v)
    splits = -(-group // wide.row_heads)
    in_tile = -(-group // splits)
    return Tiles(wide, narrow if in_tile <= narrow.row_heads and narrow is not wide else None, in_tile, splits)
