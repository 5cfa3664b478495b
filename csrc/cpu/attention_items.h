// Work items of tree attention on a GPU: which keys which rows read together.   Kernels:
// rainkernels/triton/attention.py
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/attention.h"

namespace rainkernels {

constexpr int kItemLevels = 4;
constexpr int kItemClasses = 2;  // wide and narrow tiles

struct ItemOptions {
  int group;                   // query heads of a tile row
  int rows_wide, rows_narrow;  // rows of a tile; 0 narrow rows: no narrow tiles
  int chunk;                   // positions, a multiple of kKeyTile
  int levels;                  // 1..kItemLevels
};

// Keys at positions [position, position + num_keys) of one chunk, seen by sorted rows [row0, row0 + num_rows) as far as
// each row's own position. Positions begin at a multiple of kKeyTile.
struct AttentionItem {
  int32_t key_offset, position, num_keys, row0, num_rows;
  int32_t chunk;    // position / options.chunk: the partial of row r is row_part[r] + chunk
  int32_t goes_on;  // 1: the rows' partials of this chunk already hold its keys before `position`
  int32_t reserved;
};

// Header of the flat int32 table; *_at count int32 from its beginning. The kernels read `launches` by place.
struct ItemHeader {
  int32_t num_rows, num_items, num_keys, num_partials, chunk, levels, num_seen, reserved;
  int32_t launches[kItemLevels][kItemClasses][2];  // first item, number of items
  int32_t items_at, keys_at, row_order_at, row_position_at, row_part_at, reserved2[3];
};
static_assert(sizeof(ItemHeader) == 32 * 4 && sizeof(AttentionItem) == 8 * 4, "the kernels index these by int32");

// Header, items by launch, keys (slots), row_order [rows], row_position [rows], row_part [rows + 1].
// Throws std::length_error where a count does not fit int32.
std::vector<int32_t> build_items(const PlanInputs& in, const ItemOptions& options);

}  // namespace rainkernels
