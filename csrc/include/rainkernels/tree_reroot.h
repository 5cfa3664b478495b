// Re-rooting and in-flight counts: the ops of the `tree` family that no descent runs. Form as in tree_ops.h.
#pragma once

#include "rainkernels/tree_ops.h"

namespace rainkernels::RK_ISA {

template <class Real>
struct Reroot {
  using Args = RerootArgs;

  RK_HOST_DEVICE static TreeError check(const Forest& f, const Args& a, int64_t i, Peers before) {
    if (bad_tree(f, a.tree_ids[i])) return TreeError::tree_id;
    const Tree<Real> t = tree_at<Real>(f, a.tree_ids[i]);
    if (!is_live(t, f.dims, a.slots[i])) return TreeError::node;
    if (a.slots[i] == t.header[kRoot]) return TreeError::is_root;
    if (t.header[kInFlight] > 0) return TreeError::in_flight;
    for (int64_t p = 0; p < before.count; ++p) {
      if (a.tree_ids[before.at(p)] == a.tree_ids[i]) return TreeError::duplicate;
    }
    return TreeError::none;
  }

  // Marks the rows below `root` by a negative count. The queue lives in the unused part of the free-row stack, which
  // has exactly one entry per row in use.
  RK_HOST_DEVICE static void mark_rows_below(Tree<Real>& t, const TreeDims& d, int32_t root) {
    if (t.child_row[root] < 0) return;
    int32_t* queue = t.free_rows + t.header[kNumFreeRows];
    int32_t tail = 0;
    queue[tail++] = t.child_row[root];
    for (int32_t head = 0; head < tail; ++head) {
      const int32_t row = queue[head];
      for (int32_t k = 0; k < t.count[row]; ++k) {
        const int32_t below = t.child_row[row * d.children + k];
        if (below >= 0) queue[tail++] = below;
      }
      t.count[row] = -t.count[row];
    }
  }

  RK_HOST_DEVICE static void drop_slot(Tree<Real>& t, uint8_t* freed, int32_t slot) {
    freed[slot] = 1;
    if (t.embedding_of[slot] >= 0) t.free_embeddings[t.header[kNumFreeEmbeddings]++] = t.embedding_of[slot];
    t.embedding_of[slot] = kNone;
  }

  RK_HOST_DEVICE static void mix_priors(Tree<Real>& t, const Forest& f, int32_t root) {
    const int32_t row = t.child_row[root];
    const Real mix = static_cast<Real>(f.params.root_prior_mix);
    if (row < 0 || !(mix > Real(0))) return;
    Real* priors = t.priors + row * f.dims.children;
    const int32_t count = t.count[row];
    Real sum = Real(0);
    for (int32_t k = 0; k < count; ++k) {
      priors[k] = (Real(1) - mix) * priors[k] + mix / static_cast<Real>(count);
      sum += priors[k];
    }
    for (int32_t k = 0; k < count; ++k) priors[k] /= sum;
  }

  RK_HOST_DEVICE static void apply(const Forest& f, const Args& a, int64_t i) {
    const TreeDims& d = f.dims;
    Tree<Real> t = tree_at<Real>(f, a.tree_ids[i]);
    const int32_t root = a.slots[i], old_root = t.header[kRoot], home = root / d.children;
    uint8_t* freed = a.freed + i * d.rows * d.children;
    mark_rows_below(t, d, root);
    drop_slot(t, freed, old_root);
    for (int32_t row = d.rows - 1; row > 0; --row) {
      if (t.count[row] < 0) {
        t.count[row] = -t.count[row];
        continue;
      }
      if (t.owner[row] == kNone) continue;
      for (int32_t k = 0; k < t.count[row]; ++k) {
        if (row * d.children + k != root) drop_slot(t, freed, row * d.children + k);
      }
      t.count[row] = 0;
      t.owner[row] = row == home ? kPinnedRow : kNone;
      if (row != home) t.free_rows[t.header[kNumFreeRows]++] = row;
    }
    t.header[kRoot] = root;
    mix_priors(t, f, root);
  }
};

template <class Real>
struct Mark {
  using Args = MarkArgs;

  RK_HOST_DEVICE static TreeError check(const Forest& f, const Args& a, int64_t i, Peers before) {
    if (bad_tree(f, a.tree_ids[i])) return TreeError::tree_id;
    const Tree<Real> t = tree_at<Real>(f, a.tree_ids[i]);
    const int32_t* path = a.path + i * f.dims.max_depth;
    const TreeError wrong = check_path(t, f.dims, path, a.depth[i]);
    if (wrong != TreeError::none || a.delta > 0) return wrong;
    bool marked = true;
    for (int32_t level = 0; level <= a.depth[i]; ++level) {
      marked = marked && t.in_flight[path[level]] > taken_before(f, a, i, level, before);
    }
    return marked ? TreeError::none : TreeError::mark;
  }

  // Earlier items that take a mark off the same node. A node has one depth, so it can only stand at this level.
  RK_HOST_DEVICE static int32_t taken_before(const Forest& f, const Args& a, int64_t i, int32_t level, Peers before) {
    const int32_t slot = a.path[i * f.dims.max_depth + level];
    int32_t taken = 0;
    for (int64_t p = 0; p < before.count; ++p) {
      const int64_t j = before.at(p);
      const bool same = a.tree_ids[j] == a.tree_ids[i] && a.depth[j] >= level;
      taken += same && a.path[j * f.dims.max_depth + level] == slot;
    }
    return taken;
  }

  RK_HOST_DEVICE static void apply(const Forest& f, const Args& a, int64_t i) {
    Tree<Real> t = tree_at<Real>(f, a.tree_ids[i]);
    for (int32_t j = 0; j <= a.depth[i]; ++j) t.in_flight[a.path[i * f.dims.max_depth + j]] += a.delta;
    t.header[kInFlight] += a.delta;
  }
};

}  // namespace rainkernels::RK_ISA
