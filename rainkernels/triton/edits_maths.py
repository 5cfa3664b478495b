"""What the edits kernels share: codes, the step along a direction, norm options, the normalised row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # An odd polynomial near 0, 1 - 2 / (e^2|x| + 1) beyond; the cpu lane's coefficients.
    z = x * x
    p = tl.full(x.shape, -0.005717044696211815, tl.float32) * z + 0.020650586113333702
    p = p * z - 0.05374349653720856
    p = p * z + 0.13331490755081177
    p = p * z - 0.3333328366279602
    near = x + x * (p * z)
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(tl.where(size > 10.0, 10.0, size) * 2.8853900817779268) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def coefficient(op, c, alpha, target):
    """b = f(c), codes of rainkernels.reference.edits.OPS; 0 where alpha is 0 or op is no code."""
    b = tl.where(op == 0, -alpha * c, 0.0)
    b = tl.where(op == 1, alpha * c, b)
    b = tl.where(op == 2, alpha * (target - c), b)
    b = tl.where(op == 3, alpha, b)
    b = tl.where(op == 4, alpha * tanh(c), b)
    return tl.where(alpha == 0.0, 0.0, b)


@triton.jit
def rescale(norm, before, after):
    """What an edited row is multiplied by, from the sums of squares before and after."""
    wanted = (norm == 1) | ((norm == 2) & (after > before))
    fits = (after > before * 9.094947017729282e-13) & (after < float("inf")) & (before < float("inf"))
    return tl.where(wanted & fits, tl.sqrt(before / tl.where(fits, after, 1.0)), 1.0)


@triton.jit
def live_directions(slots, alpha, count, row, num_slots, num_directions):
    """Slot of a row and how many directions it applies; none for slot 0 and where every alpha is 0."""
    slot = tl.load(slots + row)
    # A slot outside the table counts as 0: there is nobody to tell.
    slot = tl.where((slot >= 0) & (slot < num_slots), slot, 0).to(tl.int64)
    used = tl.minimum(tl.maximum(tl.load(count + slot), 0), num_directions)
    used = tl.where(slot == 0, 0, used)
    lane = tl.arange(0, 32)
    live = 0
    for j in range(0, used, 32):
        a = tl.load(alpha + slot * num_directions + j + lane, mask=j + lane < used, other=0.0)
        live = tl.maximum(live, tl.max((a != 0.0).to(tl.int32), 0))
    return slot, used * live


@triton.jit
def normalised(y, w, mean_of_squares, eps, offset, GEMMA: tl.constexpr, dtype: tl.constexpr):
    """y / rms(y) * (offset + w) in float32; llama rounds to `dtype` before the weight, gemma does not."""
    y = y * (1.0 / tl.sqrt(mean_of_squares + eps))
    if not GEMMA:
        y = y.to(dtype).to(tl.float32)
    return y * (w + offset)
