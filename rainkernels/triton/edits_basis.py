"""Kernel for a shared basis: sixteen rows against all directions as two matrix products.

The norm of the fused form follows as a launch of the row kernel, so that its sums are those of rows without a table."""

from __future__ import annotations

import triton
import triton.language as tl

from rainkernels.triton.edits_maths import coefficient, rescale

ROWS: tl.constexpr = tl.constexpr(16)
# Triton decides at import whether functions are compiled or interpreted.
INTERPRETED: tl.constexpr = tl.constexpr(not isinstance(coefficient, triton.runtime.JITFunction))


@triton.jit
def _product(a, b, NARROW: tl.constexpr):
    """a @ b on tensor cores, as good as float32: three products of tf32 parts, or for a NARROW (bfloat16) b two products
    with bfloat16 parts of a, which leave 2^-17 of it out."""
    if NARROW:
        high = a.to(tl.bfloat16)
        low = (a - high.to(tl.float32)).to(tl.bfloat16)
        if INTERPRETED:  # it multiplies bfloat16 as if it were integers; the products are exact in float32
            high, low, b = high.to(tl.float32), low.to(tl.float32), b.to(tl.float32)
        return tl.dot(high, b, tl.dot(low, b))
    return tl.dot(a, b.to(tl.float32), input_precision="tf32x3")


@triton.jit
def _tile(x, residual, rows, offs, ok, x_stride, residual_stride, BLOCK_OUT: tl.constexpr):
    h = tl.load(x + rows[:, None] * x_stride + offs[None, :], mask=ok, other=0.0).to(tl.float32)
    if BLOCK_OUT:
        r = tl.load(residual + rows[:, None] * residual_stride + offs[None, :], mask=ok, other=0.0)
        h = r.to(tl.float32) + h
    return h


@triton.jit
def _directions(basis, lane, offs, num_directions, hidden):
    """[directions, block]"""
    inside = (lane[:, None] < num_directions) & (offs[None, :] < hidden)
    return tl.load(basis + lane[:, None].to(tl.int64) * hidden + offs[None, :], mask=inside, other=0.0)


@triton.jit
def _change(steps, basis, offs, num_directions, hidden, NARROW: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr):
    """steps @ directions, [rows, block]. Every warp holds all steps it multiplies by: 64 at a time, or they would spill."""
    CHUNK: tl.constexpr = min(ROOM, 64)
    lane = tl.arange(0, CHUNK)
    if ROOM <= CHUNK:
        return _product(steps, _directions(basis, lane, offs, num_directions, hidden), NARROW)
    change = tl.zeros([ROWS, BLOCK], tl.float32)
    chunks = tl.reshape(steps, [ROWS, ROOM // CHUNK, CHUNK])
    at = tl.arange(0, ROOM // CHUNK)[None, :, None] * CHUNK
    for j in range(0, num_directions, CHUNK):
        some = tl.sum(tl.where(at == j, chunks, 0.0), 1)
        change += _product(some, _directions(basis, j + lane, offs, num_directions, hidden), NARROW)
    return change


@triton.jit(do_not_specialize=["num_rows", "num_slots", "num_directions"])
def edit_basis_kernel(
    x, residual, slots, basis, scale, op, alpha, target, norm,
    x_stride, residual_stride, num_rows, num_slots, num_directions, hidden,
    FUSED: tl.constexpr, BLOCK_OUT: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = rows < num_rows
    lane = tl.arange(0, ROOM)
    slot = tl.load(slots + rows, mask=there, other=0)
    slot = tl.where((slot >= 0) & (slot < num_slots), slot, 0).to(tl.int64)
    at = slot[:, None] * num_directions + lane[None, :]
    use = (slot[:, None] > 0) & (lane[None, :] < num_directions)
    strength = tl.load(alpha + at, mask=use, other=0.0)
    live = tl.max((strength != 0.0).to(tl.int32), 1) > 0
    some = tl.max(live.to(tl.int32), 0) > 0
    steps = tl.zeros([ROWS, ROOM], tl.float32)
    factor = tl.full([ROWS], 1.0, tl.float32)
    if some:
        c = tl.zeros([ROWS, ROOM], tl.float32)
        old = tl.zeros([ROWS], tl.float32)
        for i in range(0, hidden, BLOCK):
            offs = i + tl.arange(0, BLOCK)
            ok = there[:, None] & (offs[None, :] < hidden)
            h = _tile(x, residual, rows, offs, ok, x_stride, residual_stride, BLOCK_OUT)
            old += tl.sum(h * h, 1)
            c += _product(h, tl.trans(_directions(basis, lane, offs, num_directions, hidden)), NARROW)
        s = tl.load(scale + lane, mask=lane < num_directions, other=0.0)[None, :]
        codes = tl.load(op + at, mask=use, other=0)
        steps = coefficient(codes, c * s, strength, tl.load(target + at, mask=use, other=0.0)) * s
        mode = tl.where(live, tl.load(norm + slot), 0)
        if tl.max((mode != 0).to(tl.int32), 0) > 0:
            new = tl.zeros([ROWS], tl.float32)
            for i in range(0, hidden, BLOCK):
                offs = i + tl.arange(0, BLOCK)
                ok = there[:, None] & (offs[None, :] < hidden)
                h = _tile(x, residual, rows, offs, ok, x_stride, residual_stride, BLOCK_OUT)
                h += _change(steps, basis, offs, num_directions, hidden, NARROW, BLOCK, ROOM)
                new += tl.sum(h * h, 1)
            factor = rescale(mode, old, new)
    if FUSED or some:
        for i in range(0, hidden, BLOCK):
            offs = i + tl.arange(0, BLOCK)
            ok = there[:, None] & (offs[None, :] < hidden)
            h = _tile(x, residual, rows, offs, ok, x_stride, residual_stride, BLOCK_OUT)
            if some:
                delta = _change(steps, basis, offs, num_directions, hidden, NARROW, BLOCK, ROOM)
                h = tl.where(live[:, None], (h + delta) * factor[:, None], h)
            if FUSED:
                into = residual + rows[:, None] * residual_stride + offs[None, :]
                if not BLOCK_OUT:
                    h = tl.load(into, mask=ok, other=0.0).to(tl.float32) + h
                tl.store(into, h.to(dtype), mask=ok)
            else:
                tl.store(x + rows[:, None] * x_stride + offs[None, :], h.to(dtype), mask=ok & live[:, None])
