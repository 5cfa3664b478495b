"""Kernels for private directions: one program per row, the row in registers or, when it is wide, block by block."""

from __future__ import annotations

import triton
import triton.language as tl

from rainkernels.triton.edits_maths import coefficient, live_directions, normalised, rescale


@triton.jit
def _add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _direction(directions, at, j, used, hidden, offs):
    """As stored: four of them wait in registers for their coefficients."""
    limit = tl.where(j < used, hidden, 0)
    return tl.load(directions + (at + j) * hidden + offs, mask=offs < limit, other=0.0)


@triton.jit
def _step(raw, correction, at, j, used, scale, op, alpha, target):
    """b of direction j, 0 past the last; and the factor that makes the stored direction unit length."""
    use = j < used
    s = tl.load(scale + at + j, mask=use, other=0.0)
    a = tl.load(alpha + at + j, mask=use, other=0.0)
    t = tl.load(target + at + j, mask=use, other=0.0)
    return coefficient(tl.load(op + at + j, mask=use, other=0), raw * s + correction, a, t), s


@triton.jit
def edited_row(h, offs, slot, used, directions, scale, gram, op, alpha, target, norm, num_directions, hidden):
    """Four directions at a time: one reduction for their components, the Gram matrix for what the earlier ones of the
    four change in the later, and each direction read once."""
    at = slot * num_directions
    mode = tl.load(norm + slot)
    old = 0.0
    if mode != 0:
        old = tl.sum(h * h, 0)
    for j in range(0, used, 4):
        u0 = _direction(directions, at, j, used, hidden, offs)
        u1 = _direction(directions, at, j + 1, used, hidden, offs)
        u2 = _direction(directions, at, j + 2, used, hidden, offs)
        u3 = _direction(directions, at, j + 3, used, hidden, offs)
        g1 = gram + (at + j + 1) * num_directions + j
        g2 = g1 + num_directions
        g3 = g2 + num_directions
        g10 = tl.load(g1, mask=j + 1 < used, other=0.0)
        g20 = tl.load(g2, mask=j + 2 < used, other=0.0)
        g21 = tl.load(g2 + 1, mask=j + 2 < used, other=0.0)
        g30 = tl.load(g3, mask=j + 3 < used, other=0.0)
        g31 = tl.load(g3 + 1, mask=j + 3 < used, other=0.0)
        g32 = tl.load(g3 + 2, mask=j + 3 < used, other=0.0)
        products = (h * u0.to(tl.float32), h * u1.to(tl.float32), h * u2.to(tl.float32), h * u3.to(tl.float32))
        c0, c1, c2, c3 = tl.reduce(products, 0, _add_four)
        b0, s0 = _step(c0, 0.0, at, j, used, scale, op, alpha, target)
        b1, s1 = _step(c1, b0 * g10, at, j + 1, used, scale, op, alpha, target)
        b2, s2 = _step(c2, b0 * g20 + b1 * g21, at, j + 2, used, scale, op, alpha, target)
        b3, s3 = _step(c3, b0 * g30 + b1 * g31 + b2 * g32, at, j + 3, used, scale, op, alpha, target)
        delta = (b0 * s0) * u0.to(tl.float32) + (b1 * s1) * u1.to(tl.float32)
        h += delta + (b2 * s2) * u2.to(tl.float32) + (b3 * s3) * u3.to(tl.float32)
    if mode != 0:
        h = h * rescale(mode, old, tl.sum(h * h, 0))
    return h


@triton.jit(do_not_specialize=["num_slots", "num_directions"])
def edit_row_kernel(
    x, residual, out, weight, slots, directions, scale, gram, op, alpha, target, count, norm,
    x_stride, residual_stride, out_stride, num_slots, num_directions, hidden, eps, offset,
    FUSED: tl.constexpr, ADD: tl.constexpr, EDITS: tl.constexpr, BLOCK_OUT: tl.constexpr, GEMMA: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ADD off: residual holds the sum already and is normalised only; BLOCK_OUT is off, too."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    inside = offs < hidden
    dtype: tl.constexpr = x.dtype.element_ty
    x_row = x + row * x_stride + offs
    h = tl.zeros([BLOCK], tl.float32)
    if ADD:
        h = tl.load(x_row, mask=inside, other=0.0).to(tl.float32)
    residual_row = residual + row * residual_stride + offs
    # Fetched beside x; in the widest rows after the edit, whose registers it would take.
    EARLY: tl.constexpr = BLOCK_OUT or BLOCK <= 4096
    if FUSED and EARLY:
        r = tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
        if BLOCK_OUT:
            h = r + h
    if EDITS:
        slot, used = live_directions(slots, alpha, count, row, num_slots, num_directions)
        if used > 0:
            h = edited_row(
                h, offs, slot, used, directions, scale, gram, op, alpha, target, norm, num_directions, hidden
            )  # fmt: skip
            if not FUSED:
                tl.store(x_row, h.to(dtype), mask=inside)
    if FUSED:
        if not EARLY:
            r = tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
        if not ADD:
            h = r
        elif not BLOCK_OUT:
            h = r + h
        summed = h.to(dtype)
        if ADD:
            tl.store(residual_row, summed, mask=inside)
        y = summed.to(tl.float32)
        w = tl.load(weight + offs, mask=inside, other=0.0).to(tl.float32)
        y = normalised(y, w, tl.sum(y * y, 0) / hidden, eps, offset, GEMMA, dtype)
        tl.store(out + row * out_stride + offs, y.to(dtype), mask=inside)


@triton.jit
def _piece(x_row, residual_row, i, hidden, BLOCK_OUT: tl.constexpr, BLOCK: tl.constexpr):
    offs = i + tl.arange(0, BLOCK)
    h = tl.load(x_row + offs, mask=offs < hidden, other=0.0).to(tl.float32)
    if BLOCK_OUT:
        h = tl.load(residual_row + offs, mask=offs < hidden, other=0.0).to(tl.float32) + h
    return h, offs


@triton.jit
def _moved(h, offs, steps, at, used, directions, hidden, ROOM: tl.constexpr):
    """h + sum of steps_j u_j over one block; steps [ROOM] lies in every warp, so picking one is a shuffle."""
    delta = tl.zeros_like(h)
    lane = tl.arange(0, ROOM)
    for j in range(0, used):
        b = tl.sum(tl.where(lane == j, steps, 0.0), 0)
        delta += b * tl.load(directions + (at + j) * hidden + offs, mask=offs < hidden, other=0.0).to(tl.float32)
    return h + delta


@triton.jit(do_not_specialize=["num_slots", "num_directions"])
def edit_wide_row_kernel(
    x, residual, out, weight, slots, directions, scale, gram, op, alpha, target, count, norm,
    x_stride, residual_stride, out_stride, num_slots, num_directions, hidden, eps, offset,
    FUSED: tl.constexpr, ADD: tl.constexpr, EDITS: tl.constexpr, BLOCK_OUT: tl.constexpr, GEMMA: tl.constexpr,
    BLOCK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """All components from the unedited row, then the Gram matrix, then the change: the row is read twice."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = x.dtype.element_ty
    x_row = x + row * x_stride
    residual_row = residual + row * residual_stride
    lane = tl.arange(0, ROOM)
    steps = tl.zeros([ROOM], tl.float32)
    used = 0
    at = row * 0
    factor = 1.0
    if EDITS:
        slot, used = live_directions(slots, alpha, count, row, num_slots, num_directions)
        at = slot * num_directions
        raw = tl.zeros([ROOM], tl.float32)
        for j in range(0, used):
            total = tl.zeros([BLOCK], tl.float32)
            for i in range(0, hidden, BLOCK):
                h, offs = _piece(x_row, residual_row, i, hidden, BLOCK_OUT, BLOCK)
                u = tl.load(directions + (at + j) * hidden + offs, mask=offs < hidden, other=0.0).to(tl.float32)
                total += h * u
            raw = tl.where(lane == j, tl.sum(total, 0), raw)
        b = tl.zeros([ROOM], tl.float32)
        s = tl.load(scale + at + lane, mask=lane < used, other=0.0)
        for j in range(0, used):
            g = tl.load(gram + (at + j) * num_directions + lane, mask=lane < j, other=0.0)
            c = tl.sum(tl.where(lane == j, raw * s, 0.0), 0) + tl.sum(b * g, 0)
            step = coefficient(tl.load(op + at + j), c, tl.load(alpha + at + j), tl.load(target + at + j))
            b = tl.where(lane == j, step, b)
        steps = b * s
        mode = tl.load(norm + slot)
        if (mode != 0) & (used > 0):
            old = tl.zeros([BLOCK], tl.float32)
            new = tl.zeros([BLOCK], tl.float32)
            for i in range(0, hidden, BLOCK):
                h, offs = _piece(x_row, residual_row, i, hidden, BLOCK_OUT, BLOCK)
                old += h * h
                h = _moved(h, offs, steps, at, used, directions, hidden, ROOM)
                new += h * h
            factor = rescale(mode, tl.sum(old, 0), tl.sum(new, 0))
    squares = tl.zeros([BLOCK], tl.float32)
    if FUSED or used > 0:
        for i in range(0, hidden, BLOCK):
            # Without ADD the block's output is the sum itself.
            h, offs = _piece(x_row if ADD else residual_row, residual_row, i, hidden, BLOCK_OUT, BLOCK)
            if EDITS and used > 0:
                h = _moved(h, offs, steps, at, used, directions, hidden, ROOM) * factor
            if FUSED:
                if ADD:
                    if not BLOCK_OUT:
                        h = tl.load(residual_row + offs, mask=offs < hidden, other=0.0).to(tl.float32) + h
                    tl.store(residual_row + offs, h.to(dtype), mask=offs < hidden)
                y = h.to(dtype).to(tl.float32)
                squares += y * y
            else:
                tl.store(x_row + offs, h.to(dtype), mask=offs < hidden)
    if FUSED:
        tl.debug_barrier()  # the blocks written above are read again
        mean = tl.sum(squares, 0) / hidden
        for i in range(0, hidden, BLOCK):
            offs = i + tl.arange(0, BLOCK)
            y = tl.load(residual_row + offs, mask=offs < hidden, other=0.0).to(tl.float32)
            w = tl.load(weight + offs, mask=offs < hidden, other=0.0).to(tl.float32)
            y = normalised(y, w, mean, eps, offset, GEMMA, dtype)
            tl.store(out + row * out_stride + offs, y.to(dtype), mask=offs < hidden)
