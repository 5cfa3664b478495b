"""Edits of hidden states behind the engine: numbers for K/V keys, tables for the kernels, slots for rows.

A row's edit is part of its K/V: keys of the KV tree are token ids with the edit's number above them. So rows that are not
edited are shared with every request, whatever happens behind them, and rows of one edit with all requests that use it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raindecode.engine.batch import Part
from raindecode.engine.edit_path import EditPath
from raindecode.hidden_edits import RowEdit, Schedule, Site, Stage, Tap
from rainkernels.ops.edits import BasisTable, EditTable

Table: TypeAlias = "EditTable | BasisTable"
_FIRST_SLOTS, _FIRST_DIRECTIONS = 8, 2
_MANY_COLUMNS = 8


class SiteTable(NamedTuple):
    """A table that edits the rows at one place; `column` of the row slots says which of its slots each row has."""

    layer: int
    tap: Tap
    table: Table
    column: int


class EditNumbers:
    """Numbers of row edits. None is ever used again, so K/V made under a number stays what it is.

    Names not seen for long are forgotten: where they come again they get another number, and their K/V is computed anew.
    """

    _MOST = 1 << 16

    def __init__(self) -> None:
        self._numbers: OrderedDict[str, int] = OrderedDict()
        self._given = 0

    def of(self, edit: RowEdit | None) -> int:
        """The same for edits of the same name; 0 for none."""
        if edit is None:
            return 0
        if edit.name not in self._numbers:
            self._given += 1
            self._numbers[edit.name] = self._given
            if len(self._numbers) > self._MOST:
                self._numbers.popitem(last=False)
        self._numbers.move_to_end(edit.name)
        return self._numbers[edit.name]

    def path(self, schedule: Schedule) -> EditPath:
        """The schedule in numbers."""
        starts = tuple(start for start, _ in schedule)
        text = repr([(start, None if edit is None else edit.name) for start, edit in schedule])
        salt = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return EditPath(starts, tuple(self.of(edit) for _, edit in schedule), salt)


class EditBank:
    """Tables of one runner's edits. Every live edit has a slot in the tables it needs; slots of ended requests are reused.

    Args:
        hidden_size: of the model.
        device, dtype: of the model; directions are rounded to that dtype.
    """

    def __init__(self, hidden_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self._hidden_size = hidden_size
        self._device = device
        self._dtype = dtype
        self._columns: list[_Column] = []
        self._sites: list[SiteTable] = []
        self._seen = (0, 0)  # tables ever made, and columns, when `_sites` was
        self._gone = 0  # tables of columns that are gone

    @property
    def num_columns(self) -> int:
        """Rows of what `slots` returns."""
        return len(self._columns)

    @property
    def sites(self) -> list[SiteTable]:
        """Every table, those of one place in the order they run; the same list until something changes."""
        made = self._gone + sum(column.tables_made for column in self._columns), len(self._columns)
        if self._seen != made:
            self._sites = [
                SiteTable(site.layer, site.tap, table, i)
                for i, column in enumerate(self._columns)
                for site, table in column.tables.items()
            ]
            self._seen = made
        return self._sites

    def hold(self, number: int, stages: Mapping[int, Sequence[tuple[Site, Stage]]]) -> None:
        """Give the edit `number` slots, filled with what each member of the runner does. Balanced by `drop`.

        Raises:
            rainkernels.errors.RainKernelsError: a stage does not fit the model; the edit has no slots then.
        """
        self._forget_idle()
        for member, mine in stages.items():
            key = number, member
            held: list[_Column] = []
            try:
                placed = self._placed(mine)
                for column in self._columns:
                    if all(column is not used for used, _ in placed):
                        column.forget(key)  # where the edit lay once, when there were other columns
                for column, group in placed:
                    column.hold(key, group)
                    held.append(column)
            except Exception:
                for column in held:
                    column.drop(key)
                raise

    def drop(self, number: int, members: Iterable[int]) -> None:
        """A request that held the edit has ended."""
        for member in members:
            for column in self._columns:
                column.drop((number, member))

    def slots(self, parts: Sequence[Part]) -> Tensor | None:
        """[num_columns, rows of all parts] int32 on the host; None where no row is edited."""
        if not self._columns or all(part.batch.edits is None for part in parts):
            return None
        rows = sum(part.batch.num_rows for part in parts)
        found = np.zeros((len(self._columns), rows), dtype=np.int32)
        at, edited = 0, False
        for member, batch in parts:
            if batch.edits is not None:
                numbers, which = np.unique(batch.edits, return_inverse=True)
                for c, column in enumerate(self._columns):
                    own: npt.NDArray[np.int32] = np.array(
                        [column.slot((int(number), member)) for number in numbers], dtype=np.int32
                    )
                    if own.any():
                        edited = True
                        found[c, at : at + len(which)] = own[which]
            at += batch.num_rows
        return torch.from_numpy(found) if edited else None

    def _forget_idle(self) -> None:
        """Where there are many columns, let go of those that no request uses: every column is looked at in every forward."""
        if len(self._columns) >= _MANY_COLUMNS:
            self._gone += sum(column.tables_made for column in self._columns if not column.is_held)
            self._columns = [column for column in self._columns if column.is_held]

    def _placed(self, stages: Sequence[tuple[Site, Stage]]) -> list[tuple[_Column, dict[Site, list[Stage]]]]:
        """Stages by the column that runs them, so that those of one site keep their order."""
        by_site: dict[Site, list[Stage]] = {}
        for site, stage in stages:
            by_site.setdefault(site, []).append(stage)
        placed: dict[int, dict[Site, list[Stage]]] = {}
        for site, own in by_site.items():
            at = -1
            for group in _merged(own):
                at = self._column_after(at, group[0].basis)
                placed.setdefault(at, {})[site] = group
        return [(self._columns[i], placed[i]) for i in sorted(placed)]

    def _column_after(self, at: int, basis: str) -> int:
        for i in range(at + 1, len(self._columns)):
            if self._columns[i].basis == basis:
                return i
        self._columns.append(_Column(basis, self._hidden_size, self._device, self._dtype))
        return len(self._columns) - 1


def _merged(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Stages of one site that one table slot can hold: private ones, up to the first that touches the row's length."""
    groups: list[list[Stage]] = []
    for plain, run in groupby(stages, key=lambda stage: not stage.basis and stage.norm == "none"):
        own = list(run)
        groups += [own] if plain else [[stage] for stage in own]
    return groups


class _Column:
    """Tables of all sites with the same slots: private directions, or one basis that all slots share."""

    def __init__(self, basis: str, hidden_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.basis = basis
        self.tables_made = 0
        self.tables: dict[Site, Table] = {}
        self._hidden_size = hidden_size
        self._device = device
        self._dtype = dtype
        self._num_slots = _FIRST_SLOTS
        self._slots: dict[tuple[int, int], int] = {}
        self._held: dict[tuple[int, int], int] = {}  # how many requests hold it
        self._idle: OrderedDict[tuple[int, int], None] = OrderedDict()  # filled and held by nobody, oldest first
        self._free = list(range(_FIRST_SLOTS - 1, 0, -1))
        self._content: dict[int, dict[Site, list[Stage]]] = {}  # by slot, to fill larger tables from

    @property
    def is_held(self) -> bool:
        """Whether a request uses it."""
        return bool(self._held)

    def slot(self, key: tuple[int, int]) -> int:
        """The slot of an edit of a member; 0 where it does nothing here."""
        return self._slots.get(key, 0)

    def hold(self, key: tuple[int, int], stages: dict[Site, list[Stage]]) -> None:
        if key in self._slots:
            self._held[key] = self._held.get(key, 0) + 1
            self._idle.pop(key, None)
            return
        slot = self._take()
        try:
            for site, group in stages.items():
                self._fill(slot, site, group)
        except Exception:
            self._clear(slot)
            self._free.append(slot)
            raise
        self._slots[key], self._held[key], self._content[slot] = slot, 1, stages

    def drop(self, key: tuple[int, int]) -> None:
        if key not in self._held:
            return
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]
            self._idle[key] = None

    def forget(self, key: tuple[int, int]) -> None:
        """Give back the slot of an edit that nobody holds."""
        if key in self._idle:
            del self._idle[key]
            self._give_back(key)

    def _give_back(self, key: tuple[int, int]) -> None:
        slot = self._slots.pop(key)
        self._clear(slot)
        self._free.append(slot)

    def _take(self) -> int:
        if not self._free and self._idle:
            self._give_back(self._idle.popitem(last=False)[0])
        if self._free:
            return self._free.pop()
        old, self._num_slots = self._num_slots, 2 * self._num_slots
        self._free = list(range(self._num_slots - 1, old - 1, -1))
        for site in list(self.tables):
            self._remake(site)
        return self._free.pop()

    def _clear(self, slot: int) -> None:
        for table in self.tables.values():
            table.clear_slot(slot)
        self._content.pop(slot, None)

    def _fill(self, slot: int, site: Site, stages: Sequence[Stage]) -> None:
        directions = sum(len(stage.ops) for stage in stages)
        table = self.tables.get(site)
        if table is None or (isinstance(table, EditTable) and table.max_directions < directions):
            table = self._remake(site, stages, directions)
        _write(table, slot, stages)

    def _remake(self, site: Site, stages: Sequence[Stage] = (), directions: int = _FIRST_DIRECTIONS) -> Table:
        """A larger table in the place of the one there is, with the same content."""
        old = self.tables.get(site)
        table: Table
        if self.basis:
            basis = old.basis if isinstance(old, BasisTable) else stages[0].directions
            table = BasisTable.create(self._num_slots, basis, device=self._device, dtype=self._dtype)
        else:
            most = max(directions, old.max_directions if old is not None else _FIRST_DIRECTIONS)
            table = EditTable.create(self._num_slots, most, self._hidden_size, device=self._device, dtype=self._dtype)
        for slot, content in self._content.items():
            if site in content:
                _write(table, slot, content[site])
        self.tables[site] = table
        self.tables_made += 1
        return table


def _write(table: Table, slot: int, stages: Sequence[Stage]) -> None:
    if isinstance(table, BasisTable):
        (stage,) = stages
        table.set_slot(slot, alpha=stage.alphas, op=stage.ops, target=stage.targets, norm=stage.norm)
        return
    table.set_slot(
        slot,
        torch.cat([stage.directions for stage in stages]),
        op=[op for stage in stages for op in stage.ops],
        alpha=[alpha for stage in stages for alpha in stage.alphas],
        target=[target for stage in stages for target in stage.targets],
        norm=stages[-1].norm,
    )


class RowEdits:
    """Edits of one forward, at hand for modules and operations that run it.

    Args:
        tables: all of a bank.
        slots: [num_columns, T] int32 on the tables' device.
    """

    def __init__(self, tables: Sequence[SiteTable], slots: Tensor) -> None:
        self.tables = tables
        self.slots = slots
        self._at: dict[Site, list[tuple[Table, Tensor]]] = {}
        for layer, tap, table, column in tables:
            self._at.setdefault(Site(layer, tap), []).append((table, slots[column]))

    def to(self, device: torch.device) -> RowEdits:
        """With the slots on another device."""
        return self if self.slots.device == device else RowEdits(self.tables, self.slots.to(device))

    @property
    def sites(self) -> list[Site]:
        """Places that have tables."""
        return list(self._at)

    def at(self, site: Site) -> Sequence[tuple[Table, Tensor]]:
        """Tables of a place in the order they run, with the slot of every row."""
        return self._at.get(site, ())


class Tapped:
    """Hidden states wanted from one forward, before the edits of their own place.

    Args:
        sites: places.
        rows: wanted rows of each part.
    Attributes:
        states: [len(sites), rows wanted of all parts, hidden_size] float32, once the forward has run.
        index: [n] int64, the wanted rows over all parts.
    """

    def __init__(self, sites: Sequence[Site], rows: Sequence[Sequence[int]]) -> None:
        self.sites = tuple(dict.fromkeys(sites))
        self.rows = [list(own) for own in rows]
        self.states: Tensor | None = None
        self.index = torch.empty(0, dtype=torch.int64)

    def place(self, sizes: Sequence[int], hidden_size: int, device: torch.device) -> None:
        """Make room for parts of so many rows."""
        at, index = 0, []
        for own, size in zip(self.rows, sizes, strict=True):
            index += [at + row for row in own]
            at += size
        self.index = torch.tensor(index, dtype=torch.int64, device=device)
        self.states = torch.zeros(len(self.sites), len(index), hidden_size, device=device)

    def places(self) -> list[tuple[Site, Tensor]]:
        """Every place with where its states go."""
        assert self.states is not None
        return list(zip(self.sites, self.states, strict=True))

    def wants(self, site: Site) -> bool:
        """Whether `put` is of use there."""
        return site in self.sites

    def put(self, site: Site, rows: Tensor) -> None:
        """Take what is wanted from all rows [T, hidden_size] of a place."""
        assert self.states is not None
        self.states[self.sites.index(site)].copy_(rows.index_select(0, self.index))
