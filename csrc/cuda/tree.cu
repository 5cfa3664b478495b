// CUDA lane of the `tree` family. Ops on statistics run one thread per tree through the header the CPU lane uses;
// backup runs one block per tree and one warp per path level, which is legal because no path node is a sibling of
// another one.
#include <cuda_runtime.h>

#include "cuda/tree.h"
#include "rainkernels/tree_ops.h"
#include "rainkernels/tree_reroot.h"

namespace rainkernels {
namespace {

using namespace RK_ISA;

constexpr int kThreads = 64;
constexpr int kWarp = 32;
constexpr int kBackupThreads = 4 * kWarp;
constexpr unsigned kFullMask = 0xffffffffu;

__device__ void report(int64_t* word, int64_t item, TreeError error) {
  if (error == TreeError::none) return;
  const auto mine = static_cast<unsigned long long>(item * kErrorStride + static_cast<int64_t>(error));
  atomicMin(reinterpret_cast<unsigned long long*>(word), mine);
}

__device__ bool is_first_of_tree(const int32_t* tree_ids, int64_t item) {
  for (int64_t j = 0; j < item; ++j) {
    if (tree_ids[j] == tree_ids[item]) return false;
  }
  return true;
}

// The next item of the same tree, or n.
__device__ int64_t next_of_tree(const int32_t* tree_ids, int64_t n, int64_t item) {
  const int32_t id = tree_ids[item];
  do {
    ++item;
  } while (item < n && tree_ids[item] != id);
  return item;
}

// One thread per item: ops that only read the forest.
template <class Op>
__global__ void __launch_bounds__(kThreads) read_kernel(Forest f, typename Op::Args a, int64_t* error) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < a.n) report(error, i, Op::run(f, a, i));
}

template <class Op>
__global__ void __launch_bounds__(kThreads) check_kernel(Forest f, typename Op::Args a, int64_t* error) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i < a.n) report(error, i, Op::check(f, a, i, Peers{nullptr, i}));
}

// One thread per tree (that of its first item) does the items of the tree in order.
template <class Op>
__global__ void __launch_bounds__(kThreads) apply_kernel(Forest f, typename Op::Args a, const int64_t* error) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= a.n || *error != kNoError || !is_first_of_tree(a.tree_ids, i)) return;
  for (int64_t j = i; j < a.n; j = next_of_tree(a.tree_ids, a.n, j)) Op::apply(f, a, j);
}

// One warp per item.
template <class Real>
__global__ void __launch_bounds__(kWarp) check_backup_kernel(Forest f, BackupArgs a, int64_t* error) {
  const int64_t i = blockIdx.x;
  const TreeError wrong = Backup<Real>::check_arguments(f, a, i);
  bool finite = true;
  if (wrong == TreeError::none && a.embedding) {
    const float* x = Backup<Real>::embedding_row(f, a, i, 1);
    for (int64_t k = threadIdx.x; k < static_cast<int64_t>(a.depth[i]) * f.dims.dim; k += kWarp)
      finite &= is_finite(x[k]);
  }
  finite = __all_sync(kFullMask, finite);
  if (threadIdx.x == 0) report(error, i, wrong != TreeError::none || finite ? wrong : TreeError::embedding);
}

// Sum over the 16 lanes of each half warp, in the order of fold().
__device__ float fold_half(float x) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

// update_mean() by one warp: each half warp takes every other block of 64 dims. Loops here and below have the same trip
// count in all lanes: nested divergent ones would spill their convergence barriers.
__device__ void warp_update_mean(const TreeDims& d, float* mean, float* tails, const float* x, bool first,
                                 int32_t visits) {
  const int lane = threadIdx.x % kLanes, half = threadIdx.x % kWarp / kLanes;
  const float rate = 1.0f / static_cast<float>(visits);
  for (int32_t base = 0; base < d.blocks; base += 2) {
    const int32_t c = base + half;
    float squares = 0.0f;
    for (int32_t k = 0; k < kBlock; k += kLanes) {
      const int32_t i = c * kBlock + k + lane;
      if (i < d.dim) {
        const float e = first ? x[i] : mean[i] + (x[i] - mean[i]) * rate;
        mean[i] = e;
        squares += e * e;
      }
    }
    squares = fold_half(squares);
    if (c < d.blocks && lane == 0) tails[c] = squares;
  }
  __syncwarp();
  float sum = 0.0f;
  for (int32_t c = d.blocks - 1; c >= 0; --c) {
    sum += tails[c];
    __syncwarp();
    if (threadIdx.x % kWarp == 0) tails[c] = root_of(sum);
  }
  __syncwarp();
}

// spread_to_siblings() by one warp: each half warp takes every other sibling. Reads whole means; the bound only saves
// time.
template <class Real>
__device__ void warp_spread(Tree<Real>& t, const Forest& f, int32_t node, Real g) {
  const TreeDims& d = f.dims;
  const int lane = threadIdx.x % kLanes, half = threadIdx.x % kWarp / kLanes;
  const int32_t row = node / d.children, first = row * d.children, own = t.embedding_of[node];
  const float* mean = t.means + static_cast<int64_t>(own) * d.dim;
  const float norm = fmaxf(t.tails[static_cast<int64_t>(own) * d.blocks], kNormFloor);
  const int32_t count = t.count[row];
#pragma unroll 1
  for (int32_t base = 0; base < count; base += 2) {
    const int32_t slot = first + base + half;
    const int32_t other = base + half < count && slot != node ? t.embedding_of[slot] : kNone;
    float dot = 0.0f;
    const float* other_mean = t.means + static_cast<int64_t>(other) * d.dim;
#pragma unroll 1
    for (int32_t k = 0; k < d.dim; k += kLanes) {
      if (other >= 0 && k + lane < d.dim) dot += mean[k + lane] * other_mean[k + lane];
    }
    dot = fold_half(dot);
    const float theirs = other >= 0 ? t.tails[static_cast<int64_t>(other) * d.blocks] : kNormFloor;
    const float cosine = dot / (norm * fmaxf(theirs, kNormFloor));
    const bool near = other >= 0 && lane == 0 && cosine >= static_cast<float>(f.params.similarity_threshold);
    if (near) Backup<Real>::credit(t, f, slot, cosine, g);
  }
}

// Embedding and similarity of the node at `level` >= 1 by one warp.
template <class Real>
__device__ void backup_level(Tree<Real>& t, const Forest& f, const BackupArgs& a, int64_t i, int32_t level) {
  const TreeDims& d = f.dims;
  const int32_t node = a.path[i * d.max_depth + level];
  const int64_t own = t.embedding_of[node];
  if (own < 0) return;  // the same in all lanes
  float* tails = t.tails + own * d.blocks;
  const bool is_new = tails[0] < 0.0f;
  __syncwarp();
  warp_update_mean(d, t.means + own * d.dim, tails, Backup<Real>::embedding_row(f, a, i, level), is_new,
                   t.direct_visits[node]);
  if (f.params.similarity) warp_spread(t, f, node, static_cast<const Real*>(a.value)[i]);
}

// One block per tree. Pool places are handed out leaf to root by one thread first, as on the CPU.
template <class Real>
__global__ void __launch_bounds__(kBackupThreads) backup_kernel(Forest f, BackupArgs a, const int64_t* error) {
  const int64_t i = blockIdx.x;
  if (*error != kNoError) return;
  int earlier = 0;
  for (int64_t j = threadIdx.x; j < i; j += kBackupThreads) earlier |= a.tree_ids[j] == a.tree_ids[i];
  if (__syncthreads_or(earlier)) return;
  Tree<Real> t = tree_at<Real>(f, a.tree_ids[i]);
  for (int64_t item = i; item < a.n; item = next_of_tree(a.tree_ids, a.n, item)) {
    const int32_t *path = a.path + item * f.dims.max_depth, depth = a.depth[item];
    const int32_t lowest = a.embedding ? depth : 0;
    for (int32_t level = threadIdx.x; level <= depth; level += kBackupThreads) {
      Backup<Real>::count_visit(t, path[level], static_cast<const Real*>(a.value)[item]);
    }
    // A node is new to the pool exactly if its place is handed out here: remembered in the sign of its first norm.
    if (threadIdx.x == 0) {
      int32_t dropped = 0;
      for (int32_t level = lowest; level > 0; --level) {
        const int32_t known = Backup<Real>::take_embedding(t, path[level]);
        dropped += known < 0;
        if (known == 0) t.tails[static_cast<int64_t>(t.embedding_of[path[level]]) * f.dims.blocks] = -1.0f;
      }
      a.dropped[item] = dropped;
    }
    __syncthreads();
    for (int32_t level = lowest - static_cast<int32_t>(threadIdx.x) / kWarp; level > 0;
         level -= kBackupThreads / kWarp) {
      backup_level(t, f, a, item, level);
    }
    if (threadIdx.x == 0) {
      for (int32_t level = depth; level > 0; --level) Backup<Real>::record_bounds(t, path[level]);
    }
    __syncthreads();
  }
}

unsigned blocks_for(int64_t n) {
  return static_cast<unsigned>((n + kThreads - 1) / kThreads);
}

template <class Op>
int launch_read(const Forest& f, const typename Op::Args& a, int64_t* error, void* stream) {
  read_kernel<Op><<<blocks_for(a.n), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(f, a, error);
  return cudaGetLastError();
}

template <class Op>
int launch_write(const Forest& f, const typename Op::Args& a, int64_t* error, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  check_kernel<Op><<<blocks_for(a.n), kThreads, 0, s>>>(f, a, error);
  apply_kernel<Op><<<blocks_for(a.n), kThreads, 0, s>>>(f, a, error);
  return cudaGetLastError();
}

template <class Real>
int launch_backup(const Forest& f, const BackupArgs& a, int64_t* error, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  check_backup_kernel<Real><<<static_cast<unsigned>(a.n), kWarp, 0, s>>>(f, a, error);
  backup_kernel<Real><<<static_cast<unsigned>(a.n), kBackupThreads, 0, s>>>(f, a, error);
  return cudaGetLastError();
}

}  // namespace

#define RK_DEFINE(name, Args, launch, Op)                                                                  \
  int tree_##name##_cuda(const Forest& f, const Args& a, int64_t* error, void* stream) {                   \
    return f.is_double ? launch<Op<double>>(f, a, error, stream) : launch<Op<float>>(f, a, error, stream); \
  }

RK_DEFINE(select, SelectArgs, launch_read, Select)
RK_DEFINE(best_child, BestChildArgs, launch_read, BestChild)
RK_DEFINE(expand, ExpandArgs, launch_write, Expand)
RK_DEFINE(add_child, AddChildArgs, launch_write, AddChild)
RK_DEFINE(reroot, RerootArgs, launch_write, Reroot)
RK_DEFINE(mark, MarkArgs, launch_write, Mark)

int tree_backup_cuda(const Forest& f, const BackupArgs& a, int64_t* error, void* stream) {
  return f.is_double ? launch_backup<double>(f, a, error, stream) : launch_backup<float>(f, a, error, stream);
}

}  // namespace rainkernels
