"""Kernels the ahead-of-time gate must judge rightly: one that is fine and one for each way to fail."""

from __future__ import annotations

import triton
import triton.language as tl

from rainkernels.triton.aot import AotKernel


@triton.jit
def double_kernel(X, OUT, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(OUT + i, 2 * tl.load(X + i, mask=i < N, other=0.0), mask=i < N)


@triton.jit
def greedy_kernel(X, OUT, N, BLOCK: tl.constexpr):
    """One warp holds all of a large block, sorted and unsorted: far more than 255 registers a thread."""
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < N, other=0.0)
    y = tl.load(X + N + i, mask=i < N, other=0.0)
    s = tl.sum(x)
    tl.debug_barrier()
    t = tl.sum(y * x)
    tl.store(OUT + i, x * s + y * t, mask=i < N)


@triton.jit
def wide_kernel(X, OUT, N, BLOCK: tl.constexpr):
    """The operands of one product fill shared memory several times over."""
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, N):
        acc = tl.dot(tl.load(X + k * BLOCK * BLOCK + at), tl.load(X + (k + 1) * BLOCK * BLOCK + at), acc)
    tl.store(OUT + at, acc)


@triton.jit
def broken_kernel(X, OUT, N, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 7, "this kernel is never right")
    tl.store(OUT, tl.load(X))


def aot_kernels() -> list[AotKernel]:
    plain = {"X": "*fp32", "OUT": "*fp32", "N": "i32"}
    half = {"X": "*bf16", "OUT": "*fp32", "N": "i32"}
    return [
        AotKernel("fine", double_kernel, plain, {"BLOCK": 256}, 4, 2, aligned=("X", "OUT")),
        AotKernel("spills", greedy_kernel, plain, {"BLOCK": 8192}, 1, 1, aligned=("X", "OUT")),
        AotKernel("too-much-shared", wide_kernel, half, {"BLOCK": 128}, 8, 6, aligned=("X", "OUT")),
        AotKernel("broken", broken_kernel, plain, {"BLOCK": 8}, 4, 2),
    ]
