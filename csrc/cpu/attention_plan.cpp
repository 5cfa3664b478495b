// The attention planner: checks the segment forest, orders rows depth first, cuts them into blocks and lists, per block
// and chunk of positions, the runs of keys with the rows that see them. Runs once per forward and head-group size.
#include <algorithm>
#include <numeric>

#include "cpu/attention.h"

namespace rainkernels {
namespace {

// Rows x query heads per block: large enough to hide the packing of K, small enough for L2.
constexpr int kBlockHeads = 96;

int length_of(const PlanInputs& in, int s) {
  return in.indptr[s + 1] - in.indptr[s];
}

// Grows the entries of one block, chunk by chunk.
class BlockBuilder {
 public:
  BlockBuilder(const PlanInputs& in, std::vector<int32_t>& keys) : in_(in), keys_(keys) {}

  void begin() {
    for (int c = 0; c < used_; ++c) chunks_[c].clear();
    used_ = 0;
  }

  // Keys at positions < limit of segment s, for local rows [lo, hi).
  void add(int s, int limit, int lo, int hi) {
    for (int p = in_.start[s]; p < limit;) {
      const int c = p / kChunk, end = std::min(limit, (c + 1) * kChunk);
      if (c >= used_) {
        used_ = c + 1;
        if (used_ > static_cast<int>(chunks_.size())) chunks_.resize(used_);
      }
      append(chunks_[c], in_.indptr[s] + p - in_.start[s], p, end - p, lo, hi);
      p = end;
    }
  }

  int num_chunks() const { return used_; }
  const std::vector<PlanEntry>& chunk(int c) const { return chunks_[c]; }

 private:
  // A run that the same rows see next to the one before is joined to it: chains of short nodes become one entry.
  void append(std::vector<PlanEntry>& list, int offset, int p, int n, int lo, int hi) {
    if (!list.empty()) {
      PlanEntry& last = list.back();
      if (last.row_lo == lo && last.row_hi == hi && last.position + last.num_keys == p) {
        join(last, offset, n);
        return;
      }
    }
    list.push_back({offset, p, n, lo, hi, 0});
  }

  void join(PlanEntry& last, int offset, int n) {
    const bool adjacent = last.key_offset + last.num_keys == offset;
    if (!adjacent) {
      const bool at_end = last.key_offset + last.num_keys == static_cast<int>(keys_.size());
      if (!at_end || last.key_offset < in_.num_keys) {
        const int moved = static_cast<int>(keys_.size());
        keys_.reserve(keys_.size() + last.num_keys + n);
        for (int i = 0; i < last.num_keys; ++i) keys_.push_back(keys_[last.key_offset + i]);
        last.key_offset = moved;
      }
      for (int i = 0; i < n; ++i) keys_.push_back(in_.slots[offset + i]);
    }
    last.num_keys += n;
  }

  const PlanInputs& in_;
  std::vector<int32_t>& keys_;
  std::vector<std::vector<PlanEntry>> chunks_;
  int used_ = 0;
};

// Adds every segment that rows [row0, row1) pass through, depth first.
void add_block(const PlanInputs& in, const AttentionForest& f, int row0, int row1, std::vector<int32_t>& seen,
               int stamp, std::vector<int32_t>& ranks, BlockBuilder& builder) {
  ranks.clear();
  for (int i = row0; i < row1; ++i) {
    for (int s = in.row_segment[f.row_order[i]]; s >= 0 && seen[s] != stamp; s = in.parent[s]) {
      seen[s] = stamp;
      ranks.push_back(f.rank[s]);
    }
  }
  std::sort(ranks.begin(), ranks.end());
  builder.begin();
  for (int r : ranks) {
    const int s = f.segment_at[r];
    const int lo = std::max(f.row_lo[s], row0), hi = std::min(f.row_hi[s], row1);
    const int32_t last = f.row_order[hi - 1];
    // Own rows come first in the interval: when one is also last, no row below needs the segment's end.
    const int limit = in.row_segment[last] == s ? in.row_position[last] + 1 : in.start[s] + length_of(in, s);
    builder.add(s, limit, lo - row0, hi - row0);
  }
}

int32_t put(std::vector<int32_t>& out, const std::vector<int32_t>& values) {
  const int32_t offset = static_cast<int32_t>(out.size());
  out.insert(out.end(), values.begin(), values.end());
  return offset;
}

}  // namespace

AttentionForest order_forest(const PlanInputs& in) {
  const int n = in.num_segments;
  AttentionForest f;
  f.subtree.assign(n, 1);
  std::vector<int32_t> next(n);
  for (int s = n - 1; s >= 0; --s)
    if (in.parent[s] >= 0) f.subtree[in.parent[s]] += f.subtree[s];
  f.rank.resize(n);
  int roots = 0;
  for (int s = 0; s < n; ++s) {
    int& place = in.parent[s] < 0 ? roots : next[in.parent[s]];
    f.rank[s] = place;
    place += f.subtree[s];
    next[s] = f.rank[s] + 1;
  }
  f.segment_at.resize(n);
  for (int s = 0; s < n; ++s) f.segment_at[f.rank[s]] = s;

  f.row_order.resize(in.num_rows);
  std::iota(f.row_order.begin(), f.row_order.end(), 0);
  const auto key = [&](int32_t t) {
    const int s = in.row_segment[t];
    const uint64_t place = s < 0 ? static_cast<uint64_t>(n) : static_cast<uint64_t>(f.rank[s]);
    return place << 32 | static_cast<uint32_t>(s < 0 ? 0 : in.row_position[t]);
  };
  const auto before = [&](int32_t a, int32_t b) { return key(a) < key(b); };
  if (!std::is_sorted(f.row_order.begin(), f.row_order.end(), before)) {
    std::stable_sort(f.row_order.begin(), f.row_order.end(), before);
  }
  std::vector<int32_t> first(n + 1, 0);  // rows before each rank
  for (int t = 0; t < in.num_rows; ++t)
    if (in.row_segment[t] >= 0) ++first[f.rank[in.row_segment[t]] + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  f.row_lo.resize(n);
  f.row_hi.resize(n);
  for (int s = 0; s < n; ++s) {
    f.row_lo[s] = first[f.rank[s]];
    f.row_hi[s] = first[f.rank[s] + f.subtree[s]];
  }
  return f;
}

PlanCheck check_plan(const PlanInputs& in) {
  const auto fault = [](PlanRule rule, int64_t index) { return PlanCheck{rule, index, -1}; };
  if (in.indptr[0] != 0) return fault(PlanRule::indptr, 0);
  for (int s = 0; s < in.num_segments; ++s) {
    const int up = in.parent[s];
    if (up < -1 || up >= s) return fault(PlanRule::parent, s);
    if (in.indptr[s + 1] < in.indptr[s] || in.indptr[s + 1] > in.num_keys) return fault(PlanRule::indptr, s + 1);
    const int64_t begin = up < 0 ? 0 : int64_t{in.start[up]} + length_of(in, up);
    if (in.start[s] != begin) return fault(PlanRule::start, s);
  }
  if (in.indptr[in.num_segments] != in.num_keys) return fault(PlanRule::indptr, in.num_segments);
  int32_t highest = -1, lowest = 0;
  for (int64_t i = 0; i < in.num_keys; ++i) {
    highest = std::max(highest, in.slots[i]);
    lowest = std::min(lowest, in.slots[i]);
  }
  if (lowest < 0)
    return fault(PlanRule::slot,
                 std::find_if(in.slots, in.slots + in.num_keys, [](int32_t x) { return x < 0; }) - in.slots);
  for (int t = 0; t < in.num_rows; ++t) {
    const int s = in.row_segment[t];
    if (s < -1 || s >= in.num_segments) return fault(PlanRule::row_segment, t);
    if (s >= 0 && (in.row_position[t] < in.start[s] || in.row_position[t] >= in.start[s] + length_of(in, s))) {
      return fault(PlanRule::row_position, t);
    }
  }
  return {PlanRule::ok, 0, highest};
}

std::vector<int32_t> build_layout(const PlanInputs& in, int group) {
  const AttentionForest f = order_forest(in);
  LayoutHeader h{};
  h.num_rows = in.num_rows;
  h.group = group;
  const int most = std::max(1, kBlockHeads / group);
  h.num_blocks = (in.num_rows + most - 1) / most;

  std::vector<int32_t> keys(in.slots, in.slots + in.num_keys);
  std::vector<int32_t> block_row{0}, block_chunk{0}, block_part{0}, chunk_entry{0}, seen(in.num_segments, -1), ranks;
  std::vector<PlanEntry> entries;
  BlockBuilder builder(in, keys);
  int64_t work = 0;
  for (int b = 0; b < h.num_blocks; ++b) {
    const int row0 = block_row.back();
    const int row1 = static_cast<int>(int64_t{in.num_rows} * (b + 1) / h.num_blocks);
    add_block(in, f, row0, row1, seen, b, ranks, builder);
    for (int c = 0; c < builder.num_chunks(); ++c) {
      for (PlanEntry e : builder.chunk(c)) {
        e.contiguous = 1;
        for (int i = 1; i < e.num_keys; ++i) e.contiguous &= keys[e.key_offset + i] == keys[e.key_offset + i - 1] + 1;
        work += int64_t{e.num_keys} * (e.row_hi - e.row_lo);
        entries.push_back(e);
      }
      chunk_entry.push_back(static_cast<int32_t>(entries.size()));
    }
    block_row.push_back(row1);
    block_chunk.push_back(block_chunk.back() + builder.num_chunks());
    block_part.push_back(block_part.back() + builder.num_chunks() * (row1 - row0));
    h.max_block_rows = std::max(h.max_block_rows, row1 - row0);
    h.max_block_chunks = std::max(h.max_block_chunks, builder.num_chunks());
  }
  h.num_block_chunks = block_chunk.back();
  h.num_entries = static_cast<int32_t>(entries.size());
  h.num_keys = static_cast<int32_t>(keys.size());
  h.num_parts = block_part.back();
  h.work_lo = static_cast<int32_t>(work & 0xffffffff);
  h.work_hi = static_cast<int32_t>(work >> 32);

  std::vector<int32_t> positions(in.num_rows);
  for (int i = 0; i < in.num_rows; ++i) {
    const int32_t t = f.row_order[i];
    positions[i] = in.row_segment[t] < 0 ? -1 : in.row_position[t];
  }
  std::vector<int32_t> out(sizeof(LayoutHeader) / 4);
  h.row_order = put(out, f.row_order);
  h.row_position = put(out, positions);
  h.block_row = put(out, block_row);
  h.block_chunk = put(out, block_chunk);
  h.block_part = put(out, block_part);
  h.chunk_entry = put(out, chunk_entry);
  h.entries = static_cast<int32_t>(out.size());
  out.resize(out.size() + entries.size() * sizeof(PlanEntry) / 4);
  if (!entries.empty()) std::memcpy(out.data() + h.entries, entries.data(), entries.size() * sizeof(PlanEntry));
  h.keys = put(out, keys);
  std::memcpy(out.data(), &h, sizeof(h));
  return out;
}

}  // namespace rainkernels
