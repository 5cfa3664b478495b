// Stands in for the CUDA header of this name, so that g++ can compile csrc/cuda/*.cu and run the kernels on the CPU.
//
// A block runs as one fiber per CUDA thread on one OS thread, blocks one after the other. A fiber runs until it waits
// at a barrier or a warp exchange; these complete when every thread they name is there, exactly as the CUDA programming
// guide asks, and an exchange that can never complete, or that reads a lane which is not in it, ends the launch with an
// error. set_order() chooses which fiber and which block goes first, so a result that depends on the order is found by
// running several.
//
// What it cannot find: races between two accesses without a barrier between them, where one order of whole fibers hides
// them; anything about memory ordering, caches or alignment; atomics are plain operations; shared memory is not
// poisoned between blocks. Only what the kernels of this project use is here: anything else fails to compile.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

namespace cuda_emulator {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;

enum class Wait { nothing, warp, shuffle, vote, block, block_or };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  int linear = 0;
  bool done = false;
  Wait wait = Wait::nothing;
  unsigned mask = 0;   // lanes of the exchange
  int source = 0;      // lane to read in a shuffle
  uint64_t value = 0;  // brought to an exchange, then its result
};

struct Machine {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  std::function<void()> kernel;
  dim3 block_index, block_size, grid_size;
  uint64_t order = 0;
  cudaError_t last_error = cudaSuccess;
};

inline Machine machine;

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("cuda_emulator: " + what + " (block " + std::to_string(machine.block_index.x) + ")");
}

// 0: first to last; 1: last to first; anything else: shuffled by that seed.
inline void set_order(uint64_t order) {
  machine.order = order;
}

inline std::vector<int> ordered(int size, uint64_t salt) {
  std::vector<int> at(size);
  std::iota(at.begin(), at.end(), 0);
  if (machine.order == 1) std::reverse(at.begin(), at.end());
  uint64_t state = machine.order + salt * 0x9e3779b97f4a7c15u;
  for (int i = size - 1; i > 0 && machine.order > 1; --i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    std::swap(at[i], at[(state >> 33) % static_cast<uint64_t>(i + 1)]);
  }
  return at;
}

inline const char* name_of(Wait wait) {
  static const char* const names[] = {"nothing", "__syncwarp",    "a shuffle",
                                      "a vote",  "__syncthreads", "__syncthreads_or"};
  return names[static_cast<int>(wait)];
}

// Called by a fiber: wait for an exchange and return what came of it.
inline uint64_t exchange(Wait wait, unsigned mask, uint64_t value, int source = 0) {
  Fiber& me = *machine.running;
  me.wait = wait;
  me.mask = mask;
  me.value = value;
  me.source = source;
  swapcontext(&me.context, &machine.scheduler);
  return machine.running->value;
}

inline void fiber_main() {
  machine.kernel();
  machine.running->done = true;
  swapcontext(&machine.running->context, &machine.scheduler);
}

inline void start(Fiber& fiber, int linear) {
  const dim3 size = machine.block_size;
  if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
  fiber.linear = linear;
  fiber.index = dim3(linear % size.x, linear / size.x % size.y, linear / (size.x * size.y));
  fiber.done = false;
  fiber.wait = Wait::nothing;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &fiber_main, 0);
}

// Completes the exchange of the warp that begins at `first` if all its lanes are there. Lanes that have returned from
// the kernel are not waited for, but must not be read.
inline bool complete_warp_exchange(int first, int lane, int block_threads) {
  Fiber* const lanes = &machine.fibers[first];
  const int present = std::min(kWarpSize, block_threads - first);
  const Wait wait = lanes[lane].wait;
  const unsigned mask = lanes[lane].mask;
  if (!(mask >> lane & 1u)) fail(std::string(name_of(wait)) + " by a lane that is not in its own mask");
  unsigned waiting = 0;
  for (int i = 0; i < present; ++i) {
    if (!(mask >> i & 1u) || lanes[i].done) continue;
    if (lanes[i].wait == Wait::nothing) return false;
    if (lanes[i].wait != wait || lanes[i].mask != mask) {
      fail("lanes of one warp wait at " + std::string(name_of(wait)) + " and at " + name_of(lanes[i].wait) +
           ", or with different masks");
    }
    waiting |= 1u << i;
  }
  uint64_t values[kWarpSize] = {}, votes = 0;
  for (int i = 0; i < present; ++i) {
    values[i] = lanes[i].value;
    if ((waiting >> i & 1u) && lanes[i].value) votes |= uint64_t{1} << i;
  }
  for (int i = 0; i < present; ++i) {
    if (!(waiting >> i & 1u)) continue;
    if (wait == Wait::shuffle) {
      if (!(waiting >> lanes[i].source & 1u)) fail("a shuffle reads a lane that takes no part in it");
      lanes[i].value = values[lanes[i].source];
    } else {
      lanes[i].value = votes;
    }
  }
  for (int i = 0; i < present; ++i) {
    if (waiting >> i & 1u) lanes[i].wait = Wait::nothing;
  }
  return true;
}

inline bool complete_block_exchange(int block_threads) {
  Wait wait = Wait::nothing;
  uint64_t any = 0;
  for (int i = 0; i < block_threads; ++i) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.done) continue;
    if (fiber.wait != Wait::block && fiber.wait != Wait::block_or) return false;
    if (wait != Wait::nothing && wait != fiber.wait) fail("threads of one block wait at different block barriers");
    wait = fiber.wait;
    any |= fiber.value;
  }
  for (int i = 0; i < block_threads; ++i) {
    machine.fibers[i].wait = Wait::nothing;
    machine.fibers[i].value = any;
  }
  return wait != Wait::nothing;
}

inline void run_block(int block_threads, uint64_t salt) {
  const std::vector<int> order = ordered(block_threads, salt);
  for (int i = 0; i < block_threads; ++i) start(machine.fibers[i], i);
  for (;;) {
    bool moved = false, left = false;
    for (const int i : order) {
      Fiber& fiber = machine.fibers[i];
      if (fiber.done || fiber.wait != Wait::nothing) continue;
      machine.running = &fiber;
      swapcontext(&machine.scheduler, &fiber.context);
      moved = true;
    }
    for (int i = 0; i < block_threads; ++i) {
      const Fiber& fiber = machine.fibers[i];
      left |= !fiber.done;
      const bool in_warp = fiber.wait == Wait::warp || fiber.wait == Wait::shuffle || fiber.wait == Wait::vote;
      if (!fiber.done && in_warp) {
        const int first = i / kWarpSize * kWarpSize;
        moved |= complete_warp_exchange(first, i - first, block_threads);
      }
    }
    if (!left) return;
    moved |= complete_block_exchange(block_threads);
    if (!moved) fail("deadlock: some threads wait at a barrier that the others never reach");
  }
}

template <class Kernel>
void launch(dim3 grid, dim3 block, size_t shared, cudaStream_t, Kernel kernel) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool possible = grid.x && grid.y && grid.z && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 &&
                        threads && threads <= 1024 && block.z <= 64 && shared == 0;
  if (!possible) {
    machine.last_error = cudaErrorInvalidConfiguration;
    return;
  }
  machine.kernel = kernel;
  machine.grid_size = grid;
  machine.block_size = block;
  if (machine.fibers.size() < threads) machine.fibers.resize(threads);
  const int blocks = static_cast<int>(grid.x * grid.y * grid.z);
  for (const int b : ordered(blocks, 0)) {
    machine.block_index = dim3(b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y));
    run_block(static_cast<int>(threads), b + 1);
  }
}

inline int lane() {
  return machine.running->linear % kWarpSize;
}

template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(Wait::shuffle, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_emulator

#define threadIdx (cuda_emulator::machine.running->index)
#define blockIdx (cuda_emulator::machine.block_index)
#define blockDim (cuda_emulator::machine.block_size)
#define gridDim (cuda_emulator::machine.grid_size)

inline void __syncthreads() {
  cuda_emulator::exchange(cuda_emulator::Wait::block, 0, 0);
}
inline int __syncthreads_or(int predicate) {
  return cuda_emulator::exchange(cuda_emulator::Wait::block_or, 0, predicate != 0) != 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_emulator::exchange(cuda_emulator::Wait::warp, mask, 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(cuda_emulator::exchange(cuda_emulator::Wait::vote, mask, predicate != 0));
}
inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, !predicate) == 0;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return cuda_emulator::shuffle(mask, value, source % cuda_emulator::kWarpSize);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cuda_emulator::shuffle(mask, value, cuda_emulator::lane() ^ bits);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int source = cuda_emulator::lane() + static_cast<int>(delta);
  return cuda_emulator::shuffle(mask, value, source < cuda_emulator::kWarpSize ? source : cuda_emulator::lane());
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <class T>
T atomicMin(T* at, T value) {
  const T old = *at;
  *at = std::min(old, value);
  return old;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_emulator::machine.last_error;
  cuda_emulator::machine.last_error = cudaSuccess;
  return error;
}
