// Loops over items and trees; compiled once per instruction set (RK_ISA). No standard library here: an inline function
// of it could be kept from the widest build and run on a machine that lacks those instructions.
#include "cpu/tree.h"
#include "rainkernels/tree_ops.h"
#include "rainkernels/tree_reroot.h"

namespace rainkernels::RK_ISA {
namespace {

int64_t error_word(int64_t item, TreeError error) {
  return error == TreeError::none ? kNoError : item * kErrorStride + static_cast<int64_t>(error);
}

constexpr int64_t kTogether = 16;  // trees whose cache misses overlap

int64_t num_tiles(int64_t n) {
  return (n + kTogether - 1) / kTogether;
}

void prefetch(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

// The statistics that scoring the children in `row` reads.
template <class Real>
void prefetch_row(const Tree<Real>& t, const TreeDims& d, int32_t row) {
  const int64_t first = static_cast<int64_t>(row) * d.children, bytes = d.children * sizeof(Real);
  prefetch(t.visits + first, bytes);
  prefetch(t.values + first, bytes);
  prefetch(t.priors + first, bytes);
  prefetch(t.embedding_of + first, d.children * sizeof(int32_t));
  __builtin_prefetch(t.count + row);
}

// Descends a tile of trees in step: while one waits for its row, the others go on.
template <class Real>
int64_t select_tile(const Forest& f, const SelectArgs& a, int64_t begin, int64_t end) {
  using Op = Select<Real>;
  typename Op::Cursor cursors[kTogether];
  int64_t active[kTogether], num_active = 0, worst = kNoError;
  for (int64_t i = begin; i < end; ++i) {
    const TreeError wrong = Op::begin(f, a, i, cursors[i - begin]);
    if (wrong == TreeError::none) {
      active[num_active++] = i;
      __builtin_prefetch(cursors[i - begin].t.child_row + cursors[i - begin].node);
      __builtin_prefetch(cursors[i - begin].t.bounds);
    } else if (worst == kNoError) {
      worst = error_word(i, wrong);
    }
  }
  while (num_active > 0) {
    int64_t kept = 0;
    for (int64_t p = 0; p < num_active; ++p) {
      auto& c = cursors[active[p] - begin];
      if (!Op::open(c)) continue;
      prefetch_row(c.t, f.dims, c.row);
      active[kept++] = active[p];
    }
    num_active = kept;
    kept = 0;
    for (int64_t p = 0; p < num_active; ++p) {
      auto& c = cursors[active[p] - begin];
      if (!Op::descend(f, c)) continue;
      __builtin_prefetch(c.t.child_row + c.node);
      active[kept++] = active[p];
    }
    num_active = kept;
  }
  for (int64_t i = begin; i < end && worst == kNoError; ++i)
    worst = error_word(i, Op::finish(f, a, i, cursors[i - begin]));
  return worst;
}

// For ops that only read the forest: items are independent.
template <class Op>
int64_t read_tile(const Forest& f, const typename Op::Args& a, int64_t begin, int64_t end) {
  int64_t worst = kNoError;
  for (int64_t i = begin; i < end && worst == kNoError; ++i) worst = error_word(i, Op::run(f, a, i));
  return worst;
}

template <class Args>
int64_t read_all(const Forest& f, const Args& a, int threads,
                 int64_t (*tile)(const Forest&, const Args&, int64_t, int64_t)) {
  int64_t worst = kNoError;
#pragma omp parallel for num_threads(threads) reduction(min : worst) if (a.n > kTogether && threads > 1)
  for (int64_t t = 0; t < num_tiles(a.n); ++t) {
    const int64_t end = (t + 1) * kTogether, word = tile(f, a, t * kTogether, end < a.n ? end : a.n);
    worst = word < worst ? word : worst;
  }
  return worst;
}

// What a later item of a write will touch; only backup touches enough to be worth it.
template <class Op>
struct Ahead {
  static void rows(const Forest&, const typename Op::Args&, int64_t) {}
  static void embeddings(const Forest&, const typename Op::Args&, int64_t) {}
};

template <class Real>
struct Ahead<Backup<Real>> {
  static void rows(const Forest& f, const BackupArgs& a, int64_t i) {
    const TreeDims& d = f.dims;
    const Tree<Real> t = tree_at<Real>(f, a.tree_ids[i]);
    for (int32_t j = 0; j <= a.depth[i]; ++j) {
      const int32_t slot = a.path[i * d.max_depth + j], row = slot / d.children;
      const int64_t first = static_cast<int64_t>(row) * d.children;
      prefetch(t.visits + first, d.children * sizeof(Real));
      prefetch(t.values + first, d.children * sizeof(Real));
      prefetch(t.embedding_of + first, d.children * sizeof(int32_t));
      __builtin_prefetch(t.direct_visits + slot);
    }
  }

  // The node's own mean, and of each sibling what the first bound reads.
  static void embeddings(const Forest& f, const BackupArgs& a, int64_t i) {
    const TreeDims& d = f.dims;
    const Tree<Real> t = tree_at<Real>(f, a.tree_ids[i]);
    for (int32_t j = 1; j <= a.depth[i] && a.embedding; ++j) {
      const int32_t slot = a.path[i * d.max_depth + j], row = slot / d.children;
      for (int32_t s = row * d.children; s < row * d.children + t.count[row]; ++s) {
        const int64_t at = t.embedding_of[s];
        if (at < 0) continue;
        prefetch(t.means + at * d.dim, (s == slot ? d.dim : kBlock) * sizeof(float));
        __builtin_prefetch(t.tails + at * d.blocks);
      }
    }
  }
};

// All checks, then all trees at once, each tree serially. A tile of trees belongs to one thread, which may look ahead
// in it.
template <class Op>
int64_t write_all(const Forest& f, const typename Op::Args& a, const TreeGroups& g, int threads) {
  int64_t worst = kNoError;
#pragma omp parallel for num_threads(threads) reduction(min : worst) if (g.num_groups > kTogether && threads > 1)
  for (int64_t group = 0; group < g.num_groups; ++group) {
    const int32_t* items = g.items + g.starts[group];
    const int64_t size = g.starts[group + 1] - g.starts[group];
    for (int64_t p = 0; p < size; ++p) {
      const int64_t word = error_word(items[p], Op::check(f, a, items[p], Peers{items, p}));
      worst = word < worst ? word : worst;
    }
  }
  if (worst != kNoError) return worst;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (g.num_groups > kTogether && threads > 1)
  for (int64_t tile = 0; tile < num_tiles(g.num_groups); ++tile) {
    const int64_t last = (tile + 1) * kTogether < g.num_groups ? (tile + 1) * kTogether : g.num_groups;
    const int32_t begin = g.starts[tile * kTogether], end = g.starts[last];
    for (int32_t p = begin; p < end; ++p) {
      if (p == begin) Ahead<Op>::rows(f, a, g.items[p]);
      if (p + 2 < end) Ahead<Op>::rows(f, a, g.items[p + 2]);
      if (p + 1 < end) Ahead<Op>::embeddings(f, a, g.items[p + 1]);
      Op::apply(f, a, g.items[p]);
    }
  }
  return kNoError;
}

}  // namespace

#define RK_READ(name, Args, float_tile, double_tile)                                    \
  int64_t tree_##name(const Forest& f, const Args& a, const TreeGroups&, int threads) { \
    return read_all<Args>(f, a, threads, f.is_double ? &double_tile : &float_tile);     \
  }
#define RK_WRITE(name, Op)                                                                                 \
  int64_t tree_##name(const Forest& f, const Op<float>::Args& a, const TreeGroups& g, int threads) {       \
    return f.is_double ? write_all<Op<double>>(f, a, g, threads) : write_all<Op<float>>(f, a, g, threads); \
  }

RK_READ(select, SelectArgs, select_tile<float>, select_tile<double>)
RK_READ(best_child, BestChildArgs, read_tile<BestChild<float>>, read_tile<BestChild<double>>)
RK_WRITE(expand, Expand)
RK_WRITE(add_child, AddChild)
RK_WRITE(backup, Backup)
RK_WRITE(reroot, Reroot)
RK_WRITE(mark, Mark)

}  // namespace rainkernels::RK_ISA
