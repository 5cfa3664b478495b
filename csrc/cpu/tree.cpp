// Picks the instruction set and groups items by tree: trees run in parallel, the leaves of one tree in the order given.
#include "cpu/tree.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/isa.h"

namespace rainkernels {
namespace {

struct Grouping {
  std::vector<int32_t> items, starts;

  Grouping(const int32_t* tree_ids, int64_t n) : items(n) {
    std::iota(items.begin(), items.end(), 0);
    const auto by_tree = [tree_ids](int32_t a, int32_t b) { return tree_ids[a] < tree_ids[b]; };
    if (!std::is_sorted(tree_ids, tree_ids + n)) std::stable_sort(items.begin(), items.end(), by_tree);
    starts.reserve(n + 1);
    for (int64_t i = 0; i < n; ++i) {
      if (i == 0 || tree_ids[items[i]] != tree_ids[items[i - 1]]) starts.push_back(static_cast<int32_t>(i));
    }
    starts.push_back(static_cast<int32_t>(n));
  }

  TreeGroups view() const { return {items.data(), starts.data(), static_cast<int64_t>(starts.size()) - 1}; }
};

}  // namespace

#if defined(RK_HAS_X86_ISAS)
#define RK_DISPATCH(name)                                           \
  switch (detected_isa()) {                                         \
    case Isa::avx512:                                               \
      return avx512::tree_##name(f, a, grouping.view(), threads);   \
    case Isa::avx2:                                                 \
      return avx2::tree_##name(f, a, grouping.view(), threads);     \
    default:                                                        \
      return baseline::tree_##name(f, a, grouping.view(), threads); \
  }
#else
#define RK_DISPATCH(name) return baseline::tree_##name(f, a, grouping.view(), threads);
#endif

#define RK_DEFINE(name, Args)                                        \
  int64_t tree_##name(const Forest& f, const Args& a, int threads) { \
    const Grouping grouping(a.tree_ids, a.n);                        \
    RK_DISPATCH(name)                                                \
  }
RK_TREE_OPS(RK_DEFINE)

}  // namespace rainkernels
