"""Projection edits fused with residual add and RMSNorm, and in place, against the same lane without edits and plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernel_bench.bench import OURS, Bench, Settings, Verdict, compiled, dtype_name, num_input_sets
from kernel_bench.machine import l2_bytes
from kernel_bench.measure import Run, Runs
from rainkernels._lanes import choose_lane
from rainkernels.ops.edits import EditTable, add_edit_rmsnorm, edit_

ALONE = "add + RMSNorm alone, same lane"
_EPS = 1e-5
_ATOL = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Shape:
    """Rows with k projections each; all rows in one slot, or every row in its own."""

    own_slots: bool
    directions: torch.dtype
    fused: bool = True
    rows: int = 256
    hidden: int = 4096
    k: int = 4

    def __str__(self) -> str:
        where = "own slot each" if self.own_slots else "one slot"
        form = "fused" if self.fused else "in place"
        return f"{form}, {self.rows} x {self.hidden}, k = {self.k}, {where}, {dtype_name(self.directions)} directions"


_F32, _BF16 = torch.float32, torch.bfloat16
SHAPES = tuple(Shape(own, dtype) for dtype in (_F32, _BF16) for own in (False, True))
UNFUSED = tuple(Shape(own, _F32, fused=False) for own in (False, True))
DECODE = tuple(Shape(own, _BF16, fused, rows=40) for fused in (True, False) for own in (False, True))


def makers(settings: Settings) -> list[tuple[str, Callable[[], Bench]]]:
    """Names of the cases, and what makes each."""
    on_gpu = settings.device.type == "cuda"
    shapes = (*SHAPES, *UNFUSED, *(DECODE if on_gpu else ()))
    if settings.quick:
        small = {} if on_gpu else {"rows": 5, "hidden": 64}
        shapes = tuple(Shape(True, _F32, fused, **small) for fused in (True, False))
    return [(str(shape), partial(make, shape, _BF16 if on_gpu else _F32, settings)) for shape in shapes]


@dataclass(frozen=True)
class Inputs:
    """What one call takes; `residual` (`x` where nothing is fused) is written."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    table: EditTable
    slots: Tensor  # [rows] int32
    out: Tensor

    def copied(self) -> Inputs:
        """The same numbers in other memory."""
        names = [f.name for f in fields(self.table) if not f.name.startswith("_")]
        table = EditTable(**{name: getattr(self.table, name).clone() for name in names})
        tensors = (self.x, self.residual, self.weight, self.slots, self.out)
        x, residual, weight, slots, out = (t.clone() for t in tensors)
        return Inputs(x, residual, weight, table, slots, out)

    def unit(self, dtype: torch.dtype) -> Tensor:
        """Every row's directions at unit length, [rows, k, hidden]."""
        u = self.table.directions[self.slots.long()].double()
        return (u / u.norm(dim=-1, keepdim=True)).to(dtype)


def draw_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    rng = torch.Generator().manual_seed(0)
    slots = shape.rows if shape.own_slots else 1
    table = EditTable.create(slots + 1, shape.k, shape.hidden, device=device, dtype=shape.directions)
    for slot in range(1, slots + 1):
        table.set_slot(slot, torch.randn(shape.k, shape.hidden, generator=rng), op="project", alpha=1.0)

    def rows() -> Tensor:
        return torch.randn(shape.rows, shape.hidden, generator=rng).to(device, dtype)

    x = rows()
    at = torch.arange(1, shape.rows + 1) if shape.own_slots else torch.ones(shape.rows)
    weight = torch.rand(shape.hidden, generator=rng).to(device, dtype) + 0.5
    return Inputs(x, rows(), weight, table, at.to(device, torch.int32), torch.empty_like(x))


def make(shape: Shape, dtype: torch.dtype, settings: Settings) -> Bench:
    """The op, what it costs without an edit, and the same work in PyTorch."""
    item, row_bytes = dtype.itemsize, shape.rows * shape.hidden
    slots = shape.rows if shape.own_slots else 1
    num_bytes = (4.0 if shape.fused else 2.0) * row_bytes * item
    num_bytes += float(slots * shape.k * shape.hidden * shape.directions.itemsize)
    on_gpu = settings.device.type == "cuda"
    count = num_input_sets(settings, num_bytes, l2_bytes(settings.device) if on_gpu else 0)
    first = draw_inputs(shape, dtype, settings.device)
    sets = [first, *(first.copied() for _ in range(count - 1))]

    def eager(function: Callable[..., object], *, edited: bool = True) -> Callable[[], Runs]:
        """PyTorch's contenders get directions already gathered by row and at unit length."""
        return lambda: [partial(function, i.x, i.residual, i.weight, i.unit(dtype) if edited else None) for i in sets]

    builders: dict[str, Callable[[], Runs]] = {OURS: lambda: [ours(shape, i) for i in sets]}
    if shape.fused:
        builders[ALONE] = lambda: [partial(_alone, i) for i in sets]
        builders["PyTorch eager"] = eager(_eager_fused)
        builders["PyTorch eager, no edit"] = eager(_eager_fused, edited=False)
        if settings.compile and shape == SHAPES[0]:
            builders["torch.compile"] = lambda: eager(compiled(_eager_fused))()
    else:
        builders["PyTorch eager"] = eager(_eager_edit)
        if settings.compile and shape == UNFUSED[0]:
            builders["torch.compile"] = lambda: eager(compiled(_eager_edit))()
    lane = choose_lane("edits", settings.device)
    notes = {"input_sets": count, "rows": shape.rows, "fused": shape.fused, "own_slots": shape.own_slots}
    return Bench("edits", str(shape), dtype, builders, Exact(shape, sets[0]), num_bytes, 0.0, lane, notes)


def ours(shape: Shape, i: Inputs) -> Run:
    if not shape.fused:
        return lambda: edit_(i.x, i.table, i.slots)
    return lambda: add_edit_rmsnorm(i.x, i.residual, i.weight, i.table, i.slots, eps=_EPS, out=i.out)


def _alone(i: Inputs) -> object:
    return add_edit_rmsnorm(i.x, i.residual, i.weight, None, None, eps=_EPS, out=i.out)


def _edited(x: Tensor, units: Tensor | None) -> Tensor:
    """One projection after the other, as hooks do it."""
    for j in range(0 if units is None else units.shape[1]):
        assert units is not None
        u = units[:, j]
        x = x - (x * u).sum(-1, keepdim=True) * u
    return x


def _eager_edit(x: Tensor, residual: Tensor, weight: Tensor, units: Tensor) -> Tensor:
    return x.copy_(_edited(x, units))


def _eager_fused(x: Tensor, residual: Tensor, weight: Tensor, units: Tensor | None) -> tuple[Tensor, Tensor]:
    residual.add_(_edited(x, units))
    wide = residual.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPS)
    return weight * wide.to(x.dtype), residual


class Exact:
    """One call on fresh inputs against float64; twice plain PyTorch's error in the same dtype is allowed."""

    def __init__(self, shape: Shape, i: Inputs) -> None:
        self.shape, self.i = shape, i
        self.x, self.residual = i.x.clone(), i.residual.clone()
        self.exact = self._wanted(torch.float64, i.unit(torch.float64))
        self.bare = self._wanted(torch.float64, None)
        plain = self._wanted(i.x.dtype, i.unit(i.x.dtype))
        self.allowed = 2 * _largest(plain, self.exact) + _ATOL[i.x.dtype]

    def _wanted(self, dtype: torch.dtype, units: Tensor | None) -> tuple[Tensor, ...]:
        x, residual, weight = self.x.to(dtype), self.residual.to(dtype).clone(), self.i.weight.to(dtype)
        if not self.shape.fused:
            return (_edited(x, units),)
        if dtype != torch.float64:
            return _eager_fused(x, residual, weight, units)
        residual = residual + _edited(x, units)
        # The norm is of the stored residual, which is rounded once.
        stored = residual.to(self.i.x.dtype).double()
        return weight * stored * torch.rsqrt(stored.pow(2).mean(-1, keepdim=True) + _EPS), residual

    def __call__(self, label: str, run: Run) -> Verdict:
        self.i.x.copy_(self.x)
        self.i.residual.copy_(self.residual)
        got: Any = run()
        got = (got,) if isinstance(got, Tensor) else tuple(got)
        wanted = self.bare if label in (ALONE, "PyTorch eager, no edit") else self.exact
        verdict = Verdict(_largest(got, wanted), self.allowed)
        self.i.x.copy_(self.x)
        self.i.residual.copy_(self.residual)
        return verdict


def _largest(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    return max(float((a.double() - b).abs().max()) for a, b in zip(got, wanted, strict=True))
