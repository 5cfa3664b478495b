// edits driver on the CPU: sorts rows by slot into blocks that read the same directions, and deals the blocks out.
// Reference: rainkernels/reference/edits.py
#include "cpu/edits.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu/isa.h"

namespace rainkernels {
namespace {

// Elements read and written below which waking a second thread costs more than it saves.
constexpr int64_t kSerialWork = 1 << 16;

const EditKernels& kernels() {
#if defined(RK_HAS_X86_ISAS)
  switch (detected_isa()) {
    case Isa::avx512:
      return avx512::edit_kernels;
    case Isa::avx2:
      return avx2::edit_kernels;
    default:
      break;
  }
#endif
  return baseline::edit_kernels;
}

struct Block {
  int32_t begin, rows;
  bool live;
};

// Kept between calls, so that a decode step allocates nothing.
struct Plan {
  std::vector<int64_t> keyed;  // directions' owner (0: no edit) and row, sorted
  std::vector<int32_t> rows;
  std::vector<Block> blocks;
};

// Owner of the directions a row reads; 0 where it has no edit.
int64_t owner(const EditParams& p, int64_t row) {
  if (p.slots == nullptr || !slot_edits(p.table, p.slots[row])) return 0;
  return p.table.slot_step == 0 ? 1 : p.slots[row];
}

int64_t build_plan(const EditParams& p, Plan& plan) {
  int64_t work = 0;
  plan.keyed.clear();
  plan.rows.clear();
  plan.blocks.clear();
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t key = owner(p, r);
    if (key == 0 && !p.fused) continue;
    plan.keyed.push_back(key << 32 | r);
    work += int64_t{p.hidden} * (key == 0 ? 2 : 2 + directions_in_use(p.table, p.slots[r]));
  }
  if (!std::is_sorted(plan.keyed.begin(), plan.keyed.end())) std::sort(plan.keyed.begin(), plan.keyed.end());
  for (const int64_t entry : plan.keyed) {
    const int64_t key = entry >> 32;
    const bool joins = !plan.blocks.empty() && plan.blocks.back().rows < kEditBlock &&
                       plan.keyed[plan.blocks.back().begin] >> 32 == key;
    if (joins)
      ++plan.blocks.back().rows;
    else
      plan.blocks.push_back({static_cast<int32_t>(plan.rows.size()), 1, key != 0});
    plan.rows.push_back(static_cast<int32_t>(entry));
  }
  return work;
}

}  // namespace

int64_t edits(const EditParams& p) {
  for (int64_t r = 0; p.slots != nullptr && r < p.rows; ++r)
    if (p.slots[r] < 0 || p.slots[r] >= p.table.num_slots) return r;
  thread_local Plan plan;
  const int threads = build_plan(p, plan) < kSerialWork ? 1 : p.num_threads;
  const EditKernels& k = kernels();
  const Block* const blocks = plan.blocks.data();
  const int32_t* const rows = plan.rows.data();
  const int num_blocks = static_cast<int>(plan.blocks.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int b = 0; b < num_blocks; ++b) {
    const int32_t* const mine = rows + blocks[b].begin;
    // What this thread most likely does next.
    const int later = b + threads;
    const int32_t next = later < num_blocks && blocks[later].live ? rows[blocks[later].begin] : -1;
    if (blocks[b].live)
      k.edited(p, mine, blocks[b].rows, next);
    else
      k.plain(p, mine, blocks[b].rows);
  }
  return -1;
}

}  // namespace rainkernels
