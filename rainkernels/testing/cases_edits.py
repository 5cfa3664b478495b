"""Named cases of the edits family: tables, rows and slots, shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rainkernels.ops.edits import BasisTable, EditTable
from rainkernels.ops.edits_tables import Norm, Op

__all__ = ["CASES", "EditCase", "EditInputs"]


@dataclass(frozen=True)
class EditInputs:
    """Tensors of one case: what both ops take."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    table: EditTable | BasisTable
    slots: Tensor

    def copy(self) -> EditInputs:
        """The same with rows of its own."""
        return EditInputs(self.x.clone(), self.residual.clone(), self.weight, self.table, self.slots)


@dataclass(frozen=True)
class EditCase:
    """Sizes, what the slots do, and how the rows lie in memory."""

    id: str
    rows: int
    hidden: int
    num_slots: int = 4
    directions: int = 4  # most a slot holds; slot s holds 1 + (s - 1) % directions of them
    ops: Sequence[Op] = ("project",)  # direction j of slot s takes ops[(s + j) % len]
    alpha: float = 1.0
    target: float = 0.0
    order: Literal["sequential", "orthonormal"] = "sequential"
    overlap: float = 0.0  # cosine between the directions before any orthonormalising
    norm: Norm = "none"
    shared: bool = False  # a BasisTable, every other direction masked out in odd slots
    table_dtype: torch.dtype | None = None  # None: that of the rows
    spare: int = 0  # directions of room that no slot uses
    magnitude: float = 1.0
    massive: bool = False  # a few very large coordinates, as real models have
    strided: bool = False  # rows are slices of wider rows
    plain_rows: bool = True  # slots are drawn from 0 on; False: from 1 on
    tap: Literal["mlp_out", "block_out"] = "mlp_out"
    cast: Literal["llama", "gemma"] = "llama"
    weight_offset: float = 0.0

    def __str__(self) -> str:
        return self.id

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> EditInputs:
        """Inputs drawn from a seeded normal distribution."""
        g = torch.Generator().manual_seed(seed)
        low = 0 if self.plain_rows else min(1, self.num_slots - 1)
        slots = torch.randint(low, self.num_slots, (self.rows,), generator=g, dtype=torch.int32)
        weight = (1.0 - self.weight_offset + 0.1 * torch.randn(self.hidden, generator=g)).to(device, dtype)
        table = self._table(self.table_dtype or dtype, device, g)
        return EditInputs(self._rows(g, dtype, device), self._rows(g, dtype, device), weight, table, slots.to(device))

    def vectors(self, g: torch.Generator, count: int) -> Tensor:
        """`count` random directions, pairwise cosine about `overlap`, lengths far from 1."""
        common = torch.randn(1, self.hidden, generator=g)
        own = torch.randn(count, self.hidden, generator=g)
        vectors: Tensor = 3.0 * (self.overlap**0.5 * common + (1.0 - self.overlap) ** 0.5 * own)
        return vectors

    def _rows(self, g: torch.Generator, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        rows = self.magnitude * torch.randn(self.rows, self.hidden, generator=g)
        if self.massive:
            for at, value in ((1, 300.0), (self.hidden // 2, -120.0), (self.hidden - 1, 80.0)):
                rows[:, at] = value
        if not self.strided:
            return rows.to(device, dtype)
        wide = torch.zeros(self.rows, self.hidden + 24, dtype=dtype, device=device)
        wide[:, 8 : 8 + self.hidden] = rows.to(device, dtype)
        return wide[:, 8 : 8 + self.hidden]

    def _table(self, dtype: torch.dtype, device: torch.device | str, g: torch.Generator) -> EditTable | BasisTable:
        if self.shared:
            basis = self.vectors(g, self.directions)
            if self.order == "orthonormal":
                basis = torch.linalg.qr(basis.double().T).Q.T
            shared = BasisTable.create(self.num_slots, basis, device=device, dtype=dtype)
            for s in range(1, self.num_slots):
                alpha = [self.alpha if s % 2 == 0 or j % 2 == 0 else 0.0 for j in range(self.directions)]
                shared.set_slot(s, alpha=alpha, op=self._ops(s, self.directions), target=self.target, norm=self.norm)
            return shared
        room = self.directions + self.spare
        table = EditTable.create(self.num_slots, room, self.hidden, device=device, dtype=dtype)
        for s in range(1, self.num_slots):
            k = 1 + (s - 1) % self.directions
            table.set_slot(
                s, self.vectors(g, k), op=self._ops(s, k), alpha=self.alpha, target=self.target, order=self.order, norm=self.norm
            )  # fmt: skip
        return table

    def _ops(self, slot: int, k: int) -> list[Op]:
        return [self.ops[(slot + j) % len(self.ops)] for j in range(k)]


_ALL: tuple[Op, ...] = ("project", "boost", "set", "add", "tanh")

CASES: tuple[EditCase, ...] = (
    EditCase("one-row-one-element", 1, 1, num_slots=2, directions=1, plain_rows=False),
    EditCase("project", 33, 256, num_slots=5),
    EditCase("overlapping", 12, 128, num_slots=7, directions=6, overlap=0.7, alpha=0.8, plain_rows=False),
    EditCase("orthonormal", 9, 96, num_slots=5, overlap=0.9, order="orthonormal", tap="block_out"),
    EditCase("all-ops", 40, 72, num_slots=9, directions=8, ops=_ALL, alpha=0.6, target=2.5, spare=5, overlap=0.3),
    EditCase("all-ops-block", 40, 72, num_slots=9, directions=8, ops=_ALL, alpha=-0.6, target=-1.5, tap="block_out"),
    EditCase("odd-width", 17, 77, num_slots=6, directions=5, ops=("tanh", "project"), cast="gemma", weight_offset=1.0),
    EditCase("strided", 21, 48, strided=True, ops=("boost", "set"), target=1.0, cast="gemma"),
    EditCase("massive", 8, 512, massive=True, overlap=0.3, alpha=1.0, tap="block_out"),
    EditCase("large", 6, 80, magnitude=200.0, ops=("project", "boost"), alpha=0.5, norm="cap"),
    EditCase("preserve", 14, 64, num_slots=6, directions=3, ops=_ALL, alpha=0.9, target=3.0, norm="preserve"),
    EditCase("cap", 14, 64, num_slots=6, directions=3, ops=_ALL, alpha=0.9, norm="cap", tap="block_out"),
    EditCase("float-table", 10, 160, table_dtype=torch.float32, overlap=0.5),
    EditCase("basis", 35, 128, directions=16, shared=True, ops=("tanh",), order="orthonormal", magnitude=3.0),
    EditCase("basis-many", 18, 96, num_slots=6, directions=64, shared=True, ops=_ALL, alpha=0.4, order="orthonormal"),
    EditCase(
        "basis-skew", 5, 50, directions=3, shared=True, ops=("project",), overlap=0.5, norm="preserve", tap="block_out"
    ),
)
