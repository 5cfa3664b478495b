// CPU lane of the `tree` family. Every function returns kNoError or the smallest error word, and then has changed
// nothing.
#pragma once

#include "rainkernels/tree.h"

namespace rainkernels {

// Items grouped by tree: items[starts[g]:starts[g + 1]] belong to one tree, in the order given.
struct TreeGroups {
  const int32_t* items;
  const int32_t* starts;
  int64_t num_groups;
};

#define RK_TREE_OPS(X)  \
  X(select, SelectArgs) \
  X(expand, ExpandArgs) \
  X(add_child, AddChildArgs) X(backup, BackupArgs) X(best_child, BestChildArgs) X(reroot, RerootArgs) X(mark, MarkArgs)

#define RK_DECLARE(name, Args) int64_t tree_##name(const Forest& f, const Args& a, int threads);
RK_TREE_OPS(RK_DECLARE)
#undef RK_DECLARE

// The same ops compiled per instruction set, items already grouped.
#define RK_DECLARE(name, Args) int64_t tree_##name(const Forest& f, const Args& a, const TreeGroups& g, int threads);
namespace baseline {
RK_TREE_OPS(RK_DECLARE)
}
namespace avx2 {
RK_TREE_OPS(RK_DECLARE)
}
namespace avx512 {
RK_TREE_OPS(RK_DECLARE)
}
#undef RK_DECLARE

}  // namespace rainkernels
