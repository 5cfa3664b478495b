"""The planner of the Triton lane's work items: every key once per row, aligned, in order, shared where it pays."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rainkernels.errors import DtypeError, LaneError, RangeError
from rainkernels.ops._attention_items import ITEM, ItemTable, item_table, resolve_chunk
from rainkernels.ops.attention import (
    AttentionBuffers,
    AttentionPlan,
    attention_plan,
    attention_traffic,
    tree_attention,
)
from rainkernels.reference import attention as reference
from rainkernels.testing.cases_attention import (
    CASES,
    AttentionCase,
    AttentionInputs,
    Forest,
    chain,
    fan,
    split_everywhere,
    tiles_of_rows,
)
from rainkernels.triton.attention_tiles import Tiles, choose_tiles, pieces

BLOCK = 64


def plan_of(forest: Forest) -> AttentionPlan:
    """Slots that tell positions and segments apart: 7 apart, not consecutive."""
    return attention_plan(**forest.plan_inputs(7 * torch.arange(forest.num_keys(), dtype=torch.int32)))


def tiles_for(rows_wide: int, rows_narrow: int, group: int = 1) -> Tiles:
    tiles = choose_tiles(torch.bfloat16, 64, 64, group, 1)
    assert tiles.narrow is not None
    return tiles._replace(
        wide=tiles.wide._replace(row_heads=rows_wide * group),
        narrow=tiles.narrow._replace(row_heads=rows_narrow * group) if rows_narrow else None,
    )


def check_table(forest: Forest, table: ItemTable, tiles: Tiles, levels: int) -> None:
    """Every promise the kernels rest on, key by key."""
    p = plan_of(forest)
    index, length = reference.path_slots(
        p.segment_parent, p.segment_slots_indptr, p.slots, p.row_segment, p.row_position
    )
    rows, at = table.num_rows, table.places
    order = table.section(at.row_order, rows).tolist()
    position = table.section(at.row_position, rows).tolist()
    part = table.section(at.row_part, rows + 1).tolist()
    keys = table.section(at.keys, table.num_keys).tolist()
    assert sorted(order) == list(range(rows))
    assert position == [int(length[t]) - 1 for t in order]
    assert [b - a for a, b in pairwise(part)] == [-(-(q + 1) // table.chunk) for q in position]
    assert part[-1:] == [table.num_partials]

    done: dict[tuple[int, int], int] = {}  # (sorted row, chunk) -> positions covered so far
    items, first = table.items().tolist(), 0
    for level, narrow, count in table.launches:
        assert level < levels
        seen_at_level = set()
        for key0, pos0, num_keys, row0, num_rows, chunk, goes_on, _ in items[first : first + count]:
            assert num_keys > 0
            assert 0 < num_rows <= tiles.rows(tiles.narrow if narrow else tiles.wide)
            assert pos0 % BLOCK == 0
            assert chunk == pos0 // table.chunk == (pos0 + num_keys - 1) // table.chunk
            assert max(position[row0 : row0 + num_rows]) >= pos0 + num_keys - 1, "keys that no row sees"
            for r in range(row0, row0 + num_rows):
                assert (r, chunk) not in seen_at_level
                seen_at_level.add((r, chunk))
                assert goes_on == ((r, chunk) in done)
                assert done.get((r, chunk), chunk * table.chunk) == pos0
                end = min(pos0 + num_keys, position[r] + 1)
                assert end > pos0
                wanted = index[order[r], pos0:end].tolist()
                assert keys[key0 : key0 + end - pos0] == wanted
                done[r, chunk] = end
        first += count
    assert first == table.num_items == len(items)
    for r, q in enumerate(position):
        for chunk in range(-(-(q + 1) // table.chunk)):
            assert done.pop((r, chunk)) == min(q + 1, (chunk + 1) * table.chunk)
    assert not done
    seen = {int(s) for t in range(rows) for s in index[t, : int(length[t])]}
    assert table.num_seen == len(seen)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("chunk", "levels"), [(64, 1), (256, 2), (1024, 4)])
def test_named_cases(case: AttentionCase, chunk: int, levels: int) -> None:
    tiles = choose_tiles(torch.bfloat16, case.head_dim, case.head_dim, case.num_qo_heads // case.num_kv_heads, 1000)
    check_table(case.forest, item_table(plan_of(case.forest), tiles, chunk, levels), tiles, levels)


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    segments: list[tuple[int, int]] = []
    for s in range(draw(st.integers(1, 14))):
        up = draw(st.integers(-1, s - 1))
        segments.append((up, draw(st.integers(0, 9) | st.sampled_from([63, 64, 65, 128]) | st.integers(100, 270))))
    filled = [s for s, (_, length) in enumerate(segments) if length]
    rows: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(0, 40))):
        s = draw(st.sampled_from([-1, *filled]))
        rows.append((s, draw(st.integers(0, segments[s][1] - 1)) if s >= 0 else 0))
    return Forest(tuple(segments), tuple(rows))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    forest=forests(),
    shape=st.sampled_from([(1, 0, 1), (4, 1, 1), (32, 4, 4), (16, 2, 8), (64, 16, 1)]),
    chunk=st.sampled_from([64, 128, 256, 512]),
    levels=st.integers(1, 4),
)
@example(Forest((), ((-1, 0),)), (4, 1, 1), 64, 2)
@example(Forest(((-1, 0), (0, 0), (1, 3)), ((2, 1),)), (4, 1, 1), 64, 2)
def test_random_forests(forest: Forest, shape: tuple[int, int, int], chunk: int, levels: int) -> None:
    tiles = tiles_for(*shape)
    table = item_table(plan_of(forest), tiles, chunk, levels)
    check_table(forest, table, tiles, levels)
    cut = item_table(plan_of(split_everywhere(forest, 5)), tiles, chunk, levels)
    # The cut forest's slots are numbered the same way, so only where keys were copied together may differ.
    assert torch.equal(cut.items()[:, 1:], table.items()[:, 1:])


def rows_of(i: AttentionInputs, forest: Forest, rows: list[int]) -> AttentionInputs:
    some = Forest(forest.segments, tuple(forest.rows[r] for r in rows))
    return replace(i, q=i.q[rows], plan_inputs=some.plan_inputs(i.plan_inputs["slots"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_of_a_row_do_not_depend_on_splits_or_order(case: AttentionCase, dtype: torch.dtype) -> None:
    """So its bits on a GPU do not either."""
    i = case.make(dtype)
    tiles, slots = tiles_of_rows(i), i.plan_inputs["slots"]
    segment, position = i.plan_inputs["row_segment"].tolist(), i.plan_inputs["row_position"].tolist()
    assert [len(each) for each in tiles] == [
        p // 64 + 1 if s >= 0 else 0 for s, p in zip(segment, position, strict=True)
    ]
    for step in (1, 5, 100):
        cut = split_everywhere(case.forest, step)
        assert tiles_of_rows(replace(i, plan_inputs=cut.plan_inputs(slots))) == tiles
    order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(1)).tolist()
    assert tiles_of_rows(rows_of(i, case.forest, order)) == [tiles[r] for r in order]


def test_other_rows_choose_the_tiles_a_row_lands_in() -> None:
    """Why bits may change with the batch: 40 rows of 4 heads fill a tile of 128 over the prefix, one row one of 16."""
    case = AttentionCase("fan", fan(1000, 40, 32), 32, 8, 128)
    i = case.make(torch.bfloat16)
    heights = [{tile.row_heads for tile in tiles} for tiles in tiles_of_rows(i)]
    assert heights[0] == {128, 16}  # the prefix with 31 others, its own tokens alone
    assert heights[39] == {128, 16}  # with 7 others
    assert [tile.row_heads for tile in tiles_of_rows(rows_of(i, case.forest, [0]))[0]] == [16] * 17
    few = tiles_of_rows(rows_of(i, case.forest, list(range(16))))[0]
    assert {tile.row_heads for tile in few} == {64, 16}


def test_a_shared_prefix_is_read_once() -> None:
    tiles = tiles_for(40, 0)
    table = item_table(plan_of(fan(1000, 40, 8)), tiles, 256)
    shared = [item for item in table.items().tolist() if item[4] == 40]
    assert [(item[1], item[2]) for item in shared] == [(0, 256), (256, 256), (512, 256), (768, 192)]
    # What is left of the prefix after its last whole block goes to the branches, with their own keys.
    private = [item for item in table.items().tolist() if item[4] == 1]
    assert [(item[1], item[2], item[6]) for item in private] == [(960, 48, 1)] * 40


def test_short_shared_runs_are_folded() -> None:
    """Two branches of many rows each: to share 64 keys saves less than passing 80 x 8 states on costs."""
    tiles = tiles_for(80, 0, group=8)
    few = item_table(plan_of(fan(100, 2, 40, rows=40)), tiles, 256)
    assert [item[1] for item in few.items().tolist()] == [0, 0]
    many = item_table(plan_of(fan(100, 80, 1)), tiles, 256)
    assert many.items()[0, 1:3].tolist() == [0, 64]
    assert many.num_items == 81


def test_sharing_may_nest() -> None:
    """prefix -> branch -> leaves inside one chunk: the branch's stretch is shared on a level of its own."""
    forest = Forest(
        ((-1, 200), (0, 400), (0, 400), *((1 + b % 2, 9) for b in range(16))), tuple((3 + b, 8) for b in range(16))
    )
    two, four = (item_table(plan_of(forest), tiles_for(16, 0), 1024, levels) for levels in (2, 4))
    assert [level for level, _, _ in two.launches] == [0, 1]
    assert [level for level, _, _ in four.launches] == [0, 1, 2]
    assert four.items()[:, 2].sum() < two.items()[:, 2].sum()


def test_a_prefill_stops_each_tile_at_its_last_row() -> None:
    table = item_table(plan_of(chain(256, 256)), tiles_for(64, 0), 256)
    assert [item[2] for item in table.items().tolist()] == [64, 128, 192, 256]


def test_a_deep_tree_does_not_overflow_anything() -> None:
    deep = 3000
    segments = [(-1, 1)]
    for s in range(deep):
        segments += [(2 * s, 0), (2 * s, s % 2)]  # a fork at every node, half of the nodes empty
    rows = [(s, 0) for s, (_, length) in enumerate(segments) if length]
    table = item_table(plan_of(Forest(tuple(segments), tuple(rows))), tiles_for(16, 4), 256)
    assert table.num_partials == sum(-(-(i + 1) // 256) for i in range(len(rows)))


def test_table_layout() -> None:
    table = item_table(plan_of(fan(300, 3, 2)), tiles_for(8, 2), 256)
    at = table.places
    assert at.keys == at.items + ITEM * table.num_items
    assert table.on(torch.device("cpu"), 0) is table.on(torch.device("cpu"), 0)
    assert table.table.numel() == at.row_part + table.num_rows + 1


def test_auto_chunk_follows_the_batch() -> None:
    one, many = plan_of(chain(16384, 1)), plan_of(chain(16384, 4096))
    tiles = choose_tiles(torch.bfloat16, 128, 128, 4, 1)
    assert resolve_chunk(512, one, tiles, 32, 8, 128) == 512
    assert resolve_chunk("auto", one, tiles, 32, 8, 128) == 1024  # 132 programs / 8 heads: 17 splits
    assert resolve_chunk("auto", many, tiles._replace(wide=tiles.wide), 32, 8, 128) == 16384
    assert resolve_chunk("auto", plan_of(chain(10, 1)), tiles, 32, 8, 128) == 128
    assert resolve_chunk("auto", plan_of(Forest((), ())), tiles, 32, 8, 128) == 128


@pytest.mark.parametrize("chunk", [0, -64, 100, 1 << 21, "big", 64.0, True, np.int64(64)])
def test_bad_chunk_is_refused(chunk: object) -> None:
    inputs = CASES[0].make(torch.float32)
    with pytest.raises(RangeError if type(chunk) in (int, str) else DtypeError, match="chunk"):
        tree_attention(inputs.q, inputs.k_pool, inputs.v_pool, inputs.plan(), chunk=chunk, **inputs.options)  # type: ignore[call-overload]


def test_buffers_need_the_triton_lane() -> None:
    with pytest.raises(LaneError, match="triton lane"):
        AttentionBuffers.create(
            max_rows=4, max_items=8, max_keys=64, max_partials=8, num_slots=9, num_qo_heads=2, num_kv_heads=1,
            head_dim=16, dtype=torch.float32, device="cpu",
        )  # fmt: skip


def test_pieces() -> None:
    assert [pieces(d) for d in (1, 16, 24, 33, 64, 80, 96, 112, 128, 160, 256)] == [
        (16, 0), (16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 32), (128, 0), (128, 0), (128, 32), (256, 0)
    ]  # fmt: skip
    assert pieces(80, 32) == (64, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 16, 33, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 16, 17, 71, 128, 321])
def test_tiles_hold_every_head(dtype: torch.dtype, dim: int, group: int) -> None:
    for rows in (1, 1000):
        t = choose_tiles(dtype, dim, dim, group, rows)
        assert t.rows(t.wide) >= 1
        assert t.narrow is None or t.rows(t.narrow) >= 1
        assert (t.splits - 1) * t.group < group <= t.splits * t.group
        for tile in (t.wide, *([t.narrow] if t.narrow else [])):
            assert tile.keys == t.wide.keys
            assert BLOCK % tile.keys == 0
            assert sum(tile.k_pieces) >= dim


def test_traffic_counts_bytes() -> None:
    plan = plan_of(fan(512, 10, 4))
    traffic = attention_traffic(plan, num_qo_heads=8, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    key_bytes = 2 * (64 + 64) * 2
    assert traffic.kv_floor == (512 + 10 * 4) * key_bytes
    assert traffic.kv_bytes == traffic.kv_floor  # one wide tile, forks at a chunk's end: nothing is read twice
    # 10 rows x (2 shared chunks + 1 own), written once and merged once.
    assert traffic.partial_bytes == 2 * 30 * 8 * (64 + 2) * 4
    assert traffic.row_bytes == (30 * 64 + 10 * 64) * 8 * 2
    assert (traffic.num_items, traffic.num_launches) == (12, 3)
