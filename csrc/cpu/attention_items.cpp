// Plans the GPU's work: per chunk of absolute positions, rows whose paths agree read their keys together.
//
// A row's state over a chunk is one chain over key blocks in position order, whoever computes which part of it: items
// of level 0 begin the chain for all rows that share the chunk's first keys, up to the last multiple of kKeyTile before
// their first fork; items of the next level go on, in place, for the rows of one branch. So among equal tile shapes the
// value of a row does not depend on splits of nodes, on other branches or on what is folded.
//
// Folding: sharing n keys between k branches with r rows saves (k - 1) n (head_dim + head_dim_v) element reads per KV
// head and writes and reads r x group states of head_dim_v floats once more; in 2-byte elements it pays when n (k - 1)
// >= 2 group r. Otherwise, and beyond the last level, each branch reads the shared keys for itself. A level beyond the
// second costs two more launches in every layer, so it must also share at least kLongShare keys.
#include "cpu/attention_items.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace rainkernels {
namespace {

constexpr int kLongShare = 128;

// Rows [lo, hi) that agree up to the end of segment `tip`; their keys before `position` are done.
struct Group {
  int tip, position, lo, hi, level, goes_on;
};

class ItemBuilder {
 public:
  ItemBuilder(const PlanInputs& in, const ItemOptions& options)
      : in_(in), o_(options), f_(order_forest(in)), keys_(in.slots, in.slots + in.num_keys), own_end_(f_.row_lo) {
    for (int t = 0; t < in.num_rows; ++t)
      if (in.row_segment[t] >= 0) ++own_end_[in.row_segment[t]];
    position_.resize(in.num_rows);
    for (int i = 0; i < in.num_rows; ++i) {
      const int32_t t = f_.row_order[i];
      position_[i] = in.row_segment[t] < 0 ? -1 : in.row_position[t];
    }
  }

  std::vector<int32_t> build() {
    for (int rank = 0; rank < in_.num_segments; ++rank) {
      const int s = f_.segment_at[rank];
      if (f_.row_lo[s] == f_.row_hi[s]) continue;
      num_seen_ += std::min(end(s), last_position(s) + 1) - in_.start[s];
      // Every chunk that begins in this segment, with the rows that reach it.
      for (int p = (in_.start[s] + o_.chunk - 1) / o_.chunk * o_.chunk; p < end(s); p += o_.chunk) {
        const auto own = position_.begin();
        const int lo = static_cast<int>(std::lower_bound(own + f_.row_lo[s], own + own_end_[s], p) - own);
        if (lo == f_.row_hi[s]) break;
        stack_.push_back({s, p, lo, f_.row_hi[s], 0, 0});
        while (!stack_.empty()) {
          const Group g = stack_.back();
          stack_.pop_back();
          walk(g, p + o_.chunk);
        }
      }
    }
    return table();
  }

 private:
  int end(int s) const { return in_.start[s] + in_.indptr[s + 1] - in_.indptr[s]; }

  // The last row at or below s is its own when no row is below it.
  int last_position(int s) const { return own_end_[s] == f_.row_hi[s] ? position_[f_.row_hi[s] - 1] : end(s); }

  // Follows the group's path to its end, the chunk's end or the first fork, and hands the branches on.
  void walk(Group g, int chunk_end) {
    for (;;) {
      if (end(g.tip) >= chunk_end || own_end_[g.tip] == g.hi) {
        emit(g, std::min(chunk_end, last_position(g.tip) + 1));
        return;
      }
      branches_.clear();
      const int last = f_.rank[g.tip] + f_.subtree[g.tip];
      for (int at = f_.rank[g.tip] + 1; at < last; at += f_.subtree[f_.segment_at[at]]) {
        const int c = f_.segment_at[at];
        if (f_.row_lo[c] < f_.row_hi[c]) branches_.push_back(c);
      }
      if (branches_.size() > 1) break;
      g.tip = branches_[0];
    }
    const int fork = end(g.tip) / kKeyTile * kKeyTile;
    if (worth_sharing(g, fork - g.position)) {
      emit(g, fork);
      // Rows of the shared stretch itself that end before the fork are done.
      while (position_[g.lo] < fork) ++g.lo;
      g.position = fork;
      g.level += 1;
      g.goes_on = 1;
    }
    // Rows that end between `position` and the fork see what the first branch sees, as far as their own position.
    for (size_t i = branches_.size(); i-- > 0;) {
      const int c = branches_[i];
      stack_.push_back({c, g.position, i == 0 ? g.lo : f_.row_lo[c], f_.row_hi[c], g.level, g.goes_on});
    }
  }

  bool worth_sharing(const Group& g, int64_t keys) const {
    if (keys <= 0 || g.level + 1 >= o_.levels || (g.level > 0 && keys < kLongShare)) return false;
    return keys * (static_cast<int64_t>(branches_.size()) - 1) >= int64_t{2} * o_.group * (g.hi - g.lo);
  }

  // Keys [g.position, limit) for the group's rows, cut into tiles; a tile stops at its last row's position.
  void emit(const Group& g, int limit) {
    const int offset = gather(g.tip, g.position, limit);
    for (int row = g.lo; row < g.hi;) {
      const int left = g.hi - row;
      const bool narrow = left <= o_.rows_narrow;
      const int n = narrow ? left : std::min(left, o_.rows_wide);
      const int last = *std::max_element(position_.begin() + row, position_.begin() + row + n);
      launches_[g.level][narrow].push_back(
          {offset, g.position, std::min(limit, last + 1) - g.position, row, n, g.position / o_.chunk, g.goes_on, 0});
      row += n;
    }
  }

  // Where the slots of the path's positions [from, limit) lie side by side; copied together when they do not.
  int gather(int tip, int from, int limit) {
    pieces_.clear();
    for (int s = tip, hi = limit;; s = in_.parent[s]) {
      const int lo = std::max(from, in_.start[s]);
      if (lo < hi) pieces_.push_back({in_.indptr[s] + lo - in_.start[s], hi - lo});
      if (in_.start[s] <= from) break;
      hi = std::min(hi, in_.start[s]);
    }
    std::reverse(pieces_.begin(), pieces_.end());
    bool adjacent = true;
    for (size_t i = 1; i < pieces_.size(); ++i)
      adjacent &= pieces_[i - 1].first + pieces_[i - 1].second == pieces_[i].first;
    if (adjacent) return pieces_[0].first;
    const int offset = count(keys_.size());
    for (const auto& [first, n] : pieces_) keys_.insert(keys_.end(), in_.slots + first, in_.slots + first + n);
    return offset;
  }

  static int32_t count(int64_t n) {
    if (n > INT32_MAX) throw std::length_error("the plan needs more than 2**31 - 1 items, keys or partials");
    return static_cast<int32_t>(n);
  }

  std::vector<int32_t> table() const {
    ItemHeader h{};
    std::vector<int32_t> out(sizeof(h) / 4);
    const auto put = [&](const std::vector<int32_t>& values) {
      const int32_t at = count(out.size());
      out.insert(out.end(), values.begin(), values.end());
      return at;
    };
    h.num_rows = in_.num_rows;
    h.chunk = o_.chunk;
    h.num_seen = num_seen_;
    h.items_at = count(out.size());
    for (int level = 0; level < kItemLevels; ++level) {
      for (int narrow = 0; narrow < kItemClasses; ++narrow) {
        const auto& items = launches_[level][narrow];
        h.launches[level][narrow][0] = h.num_items;
        h.launches[level][narrow][1] = count(items.size());
        if (items.empty()) continue;
        h.levels = level + 1;
        h.num_items = count(int64_t{h.num_items} + static_cast<int64_t>(items.size()));
        const int32_t* raw = &items[0].key_offset;
        out.insert(out.end(), raw, raw + items.size() * (sizeof(AttentionItem) / 4));
      }
    }
    h.num_keys = count(keys_.size());
    h.keys_at = put(keys_);
    h.row_order_at = put(f_.row_order);
    h.row_position_at = put(position_);
    h.row_part_at = count(out.size());
    int64_t parts = 0;
    for (int i = 0; i < in_.num_rows; ++i) {
      out.push_back(count(parts));
      parts += (int64_t{position_[i]} + o_.chunk) / o_.chunk;  // a padding row, at -1, has none
    }
    out.push_back(count(parts));
    h.num_partials = out.back();
    std::memcpy(out.data(), &h, sizeof(h));
    return out;
  }

  const PlanInputs& in_;
  const ItemOptions& o_;
  const AttentionForest f_;
  std::vector<int32_t> keys_, own_end_, position_;  // own_end: first sorted row after a segment's own rows
  std::vector<AttentionItem> launches_[kItemLevels][kItemClasses];
  std::vector<Group> stack_;
  std::vector<int> branches_;
  std::vector<std::pair<int, int>> pieces_;  // offset in slots, keys
  int num_seen_ = 0;
};

}  // namespace

std::vector<int32_t> build_items(const PlanInputs& in, const ItemOptions& options) {
  return ItemBuilder(in, options).build();
}

}  // namespace rainkernels
