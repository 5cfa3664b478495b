// The ops of the `tree` family on one item: check() reads and reports, apply() writes and cannot fail. Callers run all
// checks before the first apply, and the items of one tree in the order given, so an op either happens wholly or not at
// all.
#pragma once

#include "rainkernels/tree_math.h"

namespace rainkernels::RK_ISA {

// The items that come before an item of the same tree, for checks that must see duplicates.
struct Peers {
  const int32_t* items;  // null: the identity
  int64_t count;
  RK_HOST_DEVICE int64_t at(int64_t i) const { return items ? items[i] : i; }
};

RK_HOST_DEVICE static inline bool bad_tree(const Forest& f, int32_t id) {
  return id < 0 || id >= f.dims.num_trees;
}

template <class Real>
RK_HOST_DEVICE static inline bool is_live(const Tree<Real>& t, const TreeDims& d, int32_t slot) {
  if (slot == t.header[kRoot]) return true;
  if (slot < 0 || slot >= d.rows * d.children) return false;
  const int32_t row = slot / d.children;
  return t.owner[row] >= 0 && slot - row * d.children < t.count[row];
}

// Slot of the parent of a live slot, kNone for the root.
template <class Real>
RK_HOST_DEVICE static inline int32_t parent_of(const Tree<Real>& t, const TreeDims& d, int32_t slot) {
  return slot == t.header[kRoot] ? kNone : t.owner[slot / d.children];
}

template <class Real>
RK_HOST_DEVICE static inline TreeError check_path(const Tree<Real>& t, const TreeDims& d, const int32_t* path,
                                                  int32_t depth) {
  if (depth < 0 || depth >= d.max_depth) return TreeError::depth;
  if (path[0] != t.header[kRoot]) return TreeError::path;
  for (int32_t j = 1; j <= depth; ++j) {
    if (!is_live(t, d, path[j]) || parent_of(t, d, path[j]) != path[j - 1]) return TreeError::path;
  }
  return TreeError::none;
}

template <class Real>
RK_HOST_DEVICE static inline void clear_slot(Tree<Real>& t, int32_t slot, Real prior) {
  t.visits[slot] = Real(0);
  t.values[slot] = Real(0);
  t.priors[slot] = prior;
  t.direct_visits[slot] = 0;
  t.in_flight[slot] = 0;
  t.child_row[slot] = kNone;
  t.embedding_of[slot] = kNone;
}

// checkadd of rain.md 1.4: should `row` get one more child? The cheap conditions come first.
template <class Real>
RK_HOST_DEVICE static inline bool wants_child(const Tree<Real>& t, const Forest& f, int32_t row) {
  const int32_t count = t.count[row], first = row * f.dims.children;
  if (count < 2 || count >= f.dims.children) return false;
  for (int32_t k = 0; k < count; ++k) {
    if (t.embedding_of[first + k] < 0 || !(t.values[first + k] < static_cast<Real>(f.params.dynamic_value)))
      return false;
  }
  const float norm = variance_norm(f.dims, t.means, t.embedding_of + first, count);
  return norm < static_cast<float>(f.params.dynamic_variance) * static_cast<float>(t.set_length[row]);
}

// A descent, cut into steps so that the CPU lane can interleave several and hide their cache misses.
template <class Real>
struct Select {
  using Args = SelectArgs;

  struct Cursor {
    Tree<Real> t;
    int32_t* path;
    int32_t skip, node, row, depth, status;
    bool ask;
  };

  RK_HOST_DEVICE static TreeError begin(const Forest& f, const Args& a, int64_t i, Cursor& c) {
    if (bad_tree(f, a.tree_ids[i])) return TreeError::tree_id;
    c.t = tree_at<Real>(f, a.tree_ids[i]);
    c.path = a.path + i * f.dims.max_depth;
    c.skip = a.skip_node ? a.skip_node[i] : kNone;
    c.ask = c.skip < 0;
    c.status = kLeaf;
    c.depth = 0;
    c.path[0] = c.node = c.t.header[kRoot];
    return TreeError::none;
  }

  // Finds the children of the node; false at a leaf.
  RK_HOST_DEVICE static bool open(Cursor& c) {
    c.row = c.t.child_row[c.node];
    return c.row >= 0;
  }

  // Goes to the best child; false where one more child is wanted first.
  RK_HOST_DEVICE static bool descend(const Forest& f, Cursor& c) {
    if (c.ask && f.params.dynamic_children && wants_child(c.t, f, c.row)) {
      c.status = kNeedChild;
      return false;
    }
    c.ask = c.ask || c.node == c.skip;
    const auto c_puct = static_cast<Real>(f.params.c_puct);
    c.node = pick_child(c.t, c.row * f.dims.children, c.t.count[c.row], c.node, c_puct);
    c.path[++c.depth] = c.node;  // expand keeps every node within max_depth
    return true;
  }

  RK_HOST_DEVICE static TreeError finish(const Forest& f, const Args& a, int64_t i, const Cursor& c) {
    for (int32_t j = c.depth + 1; j < f.dims.max_depth; ++j) c.path[j] = kNone;
    a.status[i] = c.status;
    a.node[i] = c.node;
    a.depth[i] = c.depth;
    return c.ask ? TreeError::none : TreeError::skip_node;
  }

  RK_HOST_DEVICE static TreeError run(const Forest& f, const Args& a, int64_t i) {
    Cursor c;
    const TreeError wrong = begin(f, a, i, c);
    if (wrong != TreeError::none) return wrong;
    while (open(c) && descend(f, c)) {
    }
    return finish(f, a, i, c);
  }
};

template <class Real>
struct Expand {
  using Args = ExpandArgs;

  RK_HOST_DEVICE static TreeError check(const Forest& f, const Args& a, int64_t i, Peers before) {
    if (bad_tree(f, a.tree_ids[i])) return TreeError::tree_id;
    const Tree<Real> t = tree_at<Real>(f, a.tree_ids[i]);
    if (!is_live(t, f.dims, a.nodes[i])) return TreeError::node;
    if (t.child_row[a.nodes[i]] >= 0) return TreeError::expanded;
    const int32_t count = a.num_children[i];
    if (count < 1 || count > f.dims.children || count > a.width) return TreeError::child_count;
    if (a.set_length[i] < 1) return TreeError::set_length;
    const Real* priors = static_cast<const Real*>(a.priors) + i * a.width;
    for (int32_t k = 0; k < count; ++k) {
      if (!is_finite(priors[k]) || priors[k] < Real(0)) return TreeError::prior;
    }
    for (int64_t p = 0; p < before.count; ++p) {
      const int64_t j = before.at(p);
      if (a.tree_ids[j] == a.tree_ids[i] && a.nodes[j] == a.nodes[i]) return TreeError::duplicate;
    }
    return TreeError::none;
  }

  RK_HOST_DEVICE static void apply(const Forest& f, const Args& a, int64_t i) {
    const TreeDims& d = f.dims;
    Tree<Real> t = tree_at<Real>(f, a.tree_ids[i]);
    const int32_t node = a.nodes[i], count = a.num_children[i];
    int32_t depth = 0;
    for (int32_t up = parent_of(t, d, node); up >= 0; up = parent_of(t, d, up)) ++depth;
    a.first_slot[i] = kNone;
    if (t.header[kNumFreeRows] == 0 || depth + 1 >= d.max_depth) return;
    const int32_t row = t.free_rows[--t.header[kNumFreeRows]], first = row * d.children;
    t.owner[row] = node;
    t.count[row] = count;
    t.set_length[row] = a.set_length[i];
    t.child_row[node] = row;
    const Real* priors = static_cast<const Real*>(a.priors) + i * a.width;
    const Real mix = node == t.header[kRoot] ? static_cast<Real>(f.params.root_prior_mix) : Real(0);
    for (int32_t k = 0; k < count; ++k) {
      const Real p = priors[k];
      clear_slot(t, first + k, mix > Real(0) ? (Real(1) - mix) * p + mix / static_cast<Real>(count) : p);
    }
    a.first_slot[i] = first;
  }
};

template <class Real>
struct AddChild {
  using Args = AddChildArgs;

  RK_HOST_DEVICE static TreeError check(const Forest& f, const Args& a, int64_t i, Peers) {
    if (bad_tree(f, a.tree_ids[i])) return TreeError::tree_id;
    const Tree<Real> t = tree_at<Real>(f, a.tree_ids[i]);
    if (!is_live(t, f.dims, a.nodes[i])) return TreeError::node;
    if (t.child_row[a.nodes[i]] < 0) return TreeError::not_expanded;
    const Real p = static_cast<const Real*>(a.prior)[i];
    return is_finite(p) && p >= Real(0) ? TreeError::none : TreeError::prior;
  }

  RK_HOST_DEVICE static void apply(const Forest& f, const Args& a, int64_t i) {
    const int32_t width = f.dims.children;
    Tree<Real> t = tree_at<Real>(f, a.tree_ids[i]);
    const int32_t row = t.child_row[a.nodes[i]];
    a.slot[i] = kNone;
    if (t.count[row] >= width) return;
    const Real mix = a.mix && a.nodes[i] == t.header[kRoot] ? static_cast<Real>(f.params.root_prior_mix) : Real(0);
    const Real p = static_cast<const Real*>(a.prior)[i];
    a.slot[i] = row * width + t.count[row]++;
    clear_slot(t, a.slot[i], mix > Real(0) ? (Real(1) - mix) * p + mix / static_cast<Real>(t.count[row]) : p);
  }
};

template <class Real>
struct Backup {
  using Args = BackupArgs;

  // All but the content of the embeddings.
  RK_HOST_DEVICE static TreeError check_arguments(const Forest& f, const Args& a, int64_t i) {
    const TreeDims& d = f.dims;
    if (bad_tree(f, a.tree_ids[i])) return TreeError::tree_id;
    const Tree<Real> t = tree_at<Real>(f, a.tree_ids[i]);
    const TreeError wrong = check_path(t, d, a.path + i * d.max_depth, a.depth[i]);
    if (wrong != TreeError::none) return wrong;
    if (!is_finite(static_cast<const Real*>(a.value)[i])) return TreeError::value;
    return a.embedding && a.depth[i] >= a.embedding_rows ? TreeError::embedding_rows : TreeError::none;
  }

  RK_HOST_DEVICE static const float* embedding_row(const Forest& f, const Args& a, int64_t i, int32_t level) {
    return a.embedding + (i * a.embedding_rows + level) * f.dims.dim;
  }

  RK_HOST_DEVICE static TreeError check(const Forest& f, const Args& a, int64_t i, Peers) {
    const TreeError wrong = check_arguments(f, a, i);
    if (wrong != TreeError::none || !a.embedding) return wrong;
    return all_finite(embedding_row(f, a, i, 1), a.depth[i] * f.dims.dim) ? TreeError::none : TreeError::embedding;
  }

  // Gives `node` a place in the pool if it has none. Returns whether it was there before; kNone: the pool is empty.
  RK_HOST_DEVICE static int32_t take_embedding(Tree<Real>& t, int32_t node) {
    if (t.embedding_of[node] >= 0) return 1;
    if (t.header[kNumFreeEmbeddings] == 0) return kNone;
    t.embedding_of[node] = t.free_embeddings[--t.header[kNumFreeEmbeddings]];
    return 0;
  }

  // Similarity credit of rain.md 1.4: visits and value only; direct visits, embedding and bounds stay.
  RK_HOST_DEVICE static void credit(Tree<Real>& t, const Forest& f, int32_t slot, float cosine, Real g) {
    const Real before = t.visits[slot];
    const Real weight = static_cast<Real>(f.params.similarity_weight) * static_cast<Real>(cosine);
    t.visits[slot] = before + weight;
    t.values[slot] = (t.values[slot] * before + weight * g) / t.visits[slot];
  }

  RK_HOST_DEVICE static void spread_to_siblings(Tree<Real>& t, const Forest& f, int32_t node, Real g) {
    const TreeDims& d = f.dims;
    const int32_t row = node / d.children, first = row * d.children, own = t.embedding_of[node];
    const float threshold = static_cast<float>(f.params.similarity_threshold);
    const float *mean = t.means + static_cast<int64_t>(own) * d.dim,
                *tails = t.tails + static_cast<int64_t>(own) * d.blocks;
    for (int32_t slot = first; slot < first + t.count[row]; ++slot) {
      const int32_t other = t.embedding_of[slot];
      if (slot == node || other < 0) continue;
      const float cosine = cosine_if_near(d, mean, tails, t.means + static_cast<int64_t>(other) * d.dim,
                                          t.tails + static_cast<int64_t>(other) * d.blocks, threshold);
      if (cosine >= threshold) credit(t, f, slot, cosine, g);
    }
  }

  RK_HOST_DEVICE static void count_visit(Tree<Real>& t, int32_t node, Real g) {
    t.visits[node] += Real(1);
    t.direct_visits[node] += 1;
    t.values[node] += (g - t.values[node]) / t.visits[node];
  }

  RK_HOST_DEVICE static void record_bounds(Tree<Real>& t, int32_t node) {
    if (t.values[node] < t.bounds[0]) t.bounds[0] = t.values[node];
    if (t.values[node] > t.bounds[1]) t.bounds[1] = t.values[node];
  }

  RK_HOST_DEVICE static void apply(const Forest& f, const Args& a, int64_t i) {
    const TreeDims& d = f.dims;
    Tree<Real> t = tree_at<Real>(f, a.tree_ids[i]);
    const int32_t* path = a.path + i * d.max_depth;
    const Real g = static_cast<const Real*>(a.value)[i];
    int32_t dropped = 0;
    for (int32_t j = a.depth[i]; j >= 0; --j) {
      count_visit(t, path[j], g);
      if (j > 0) record_bounds(t, path[j]);
      if (j == 0 || !a.embedding) continue;
      const int32_t known = take_embedding(t, path[j]);
      if (known < 0) {
        ++dropped;
        continue;
      }
      const int64_t own = t.embedding_of[path[j]];
      update_mean(d, t.means + own * d.dim, t.tails + own * d.blocks, embedding_row(f, a, i, j), known == 0,
                  t.direct_visits[path[j]]);
      if (f.params.similarity) spread_to_siblings(t, f, path[j], g);
    }
    a.dropped[i] = dropped;
  }
};

template <class Real>
struct BestChild {
  using Args = BestChildArgs;

  RK_HOST_DEVICE static TreeError run(const Forest& f, const Args& a, int64_t i) {
    if (bad_tree(f, a.tree_ids[i])) return TreeError::tree_id;
    const Tree<Real> t = tree_at<Real>(f, a.tree_ids[i]);
    const int32_t row = t.child_row[t.header[kRoot]];
    int32_t best = kNone;
    for (int32_t k = 0; row >= 0 && k < t.count[row]; ++k) {
      const int32_t s = row * f.dims.children + k;
      const bool better =
          best < 0 || t.visits[s] > t.visits[best] || (t.visits[s] == t.visits[best] && t.values[s] > t.values[best]);
      if (better) best = s;
    }
    a.slot[i] = best;
    static_cast<Real*>(a.visits)[i] = best < 0 ? Real(0) : t.visits[best];
    a.direct_visits[i] = best < 0 ? 0 : t.direct_visits[best];
    static_cast<Real*>(a.value)[i] = best < 0 ? Real(0) : t.values[best];
    return TreeError::none;
  }
};

}  // namespace rainkernels::RK_ISA
