// kv_write: scatter rows of K and V to their token slots.            Reference: rainkernels/reference/kv.py
// One block per token and side (K, V); threads walk the token's bytes in the widest unit that all addresses allow.
// Reads and writes num_heads * row_bytes per token and side: bandwidth-bound.
// Graph-safe: no allocation, no host read-back. A slot outside the pool skips its row.
#include <cuda_runtime.h>

#include "cuda/kv.h"

namespace rainkernels {
namespace {

constexpr int kThreads = 128;

template <class Unit>
__device__ void copy_token(const KvSide& side, int64_t token, int64_t slot, int64_t num_heads) {
  const int per_row = static_cast<int>(side.row_bytes / sizeof(Unit));
  const int total = per_row * static_cast<int>(num_heads);
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    const int head = i / per_row, at = i - head * per_row;
    reinterpret_cast<Unit*>(kv_target(side, slot, head, num_heads))[at] =
        reinterpret_cast<const Unit*>(kv_source(side, token, head))[at];
  }
}

__device__ bool allows(const KvSide& side, int unit) {
  const uint64_t all = reinterpret_cast<uint64_t>(side.rows) | reinterpret_cast<uint64_t>(side.pool) |
                       static_cast<uint64_t>(side.stride_token) | static_cast<uint64_t>(side.stride_head) |
                       static_cast<uint64_t>(side.row_bytes);
  return (all & (unit - 1)) == 0;
}

__global__ void __launch_bounds__(kThreads) kv_write_kernel(const __grid_constant__ KvWriteParams p) {
  const int64_t token = blockIdx.x;
  const KvSide& side = blockIdx.y == 0 ? p.k : p.v;
  const int32_t slot = p.slot_mapping[token];
  if (!slot_written(slot, p.num_slots)) return;
  if (allows(side, 16))
    copy_token<uint4>(side, token, slot, p.num_heads);
  else if (allows(side, 4))
    copy_token<uint32_t>(side, token, slot, p.num_heads);
  else
    copy_token<uint16_t>(side, token, slot, p.num_heads);
}

}  // namespace

int kv_write_cuda(const KvWriteParams& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(p.num_tokens), 2);
  kv_write_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace rainkernels
