"""Rows of logits of a step: where the model left them, read back once and only when the host asks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raindecode.engine.sampler import rows_to_host

_KEPT_BYTES = 256 * 2**20  # rows held for Want.keep

HostRow = npt.NDArray[np.float32]


class Logits:
    """What one forward gave, [n, vocabulary], on the device, the host, or both."""

    __slots__ = ("_host", "_there")

    def __init__(self, there: Tensor | None, host: npt.NDArray[np.float32] | None = None) -> None:
        self._there = there
        self._host = host

    @property
    def there(self) -> Tensor:
        """Where the model left them; on the host where they were kept."""
        if self._there is None:
            assert self._host is not None
            self._there = torch.from_numpy(self._host)
        return self._there

    @property
    def host(self) -> npt.NDArray[np.float32]:
        """The same on the host, float32."""
        if self._host is None:
            self._host = rows_to_host(self.there)
        return self._host


class LogitRow:
    """One row of Logits."""

    __slots__ = ("index", "source")

    def __init__(self, source: Logits, index: int) -> None:
        self.source = source
        self.index = index

    @property
    def host(self) -> HostRow:
        """[vocabulary] float32 on the host."""
        row: HostRow = self.source.host[self.index]
        return row

    @classmethod
    def of(cls, row: HostRow) -> LogitRow:
        """A row that lies on the host."""
        return cls(Logits(None, row[None]), 0)


def stacked(rows: Sequence[LogitRow], device: torch.device, width: int) -> Tensor:
    """[n, width] of rows on `device`, their first columns; nothing is copied where they lie like that already."""
    source, first = rows[0].source, rows[0].index
    if source.there.device == device and all(
        row.source is source and row.index == first + i for i, row in enumerate(rows)
    ):
        return source.there[first : first + len(rows), :width]
    parts = [row.source.there[row.index, :width].to(device) for row in rows]
    if len({part.dtype for part in parts}) > 1:  # a kept row is float32
        parts = [part.float() for part in parts]
    return torch.stack(parts)


class KeptRows:
    """Rows of logits by path and model, so that a token need not be run again for them. The oldest go first.

    Args:
        num_slots: of the KV pool; a row whose tokens were evicted is of no use, so few are held where it is small.
    """

    _SHARE = 4  # one row for so many slots

    def __init__(self, num_slots: int) -> None:
        self._rows: OrderedDict[tuple[int, int], HostRow] = OrderedDict()
        self._bytes = 0
        self._most = max(1, num_slots // self._SHARE)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        return self._bytes

    def get(self, path_hash: int, model: int) -> LogitRow | None:
        row = self._rows.get((path_hash, model))
        return None if row is None else LogitRow.of(row)

    def add(self, path_hash: int, model: int, row: LogitRow) -> None:
        """Keep a copy of a row, where none is kept."""
        name = path_hash, model
        if name in self._rows:
            self._rows.move_to_end(name)
            return
        mine = self._rows[name] = row.host.copy()
        self._bytes += mine.nbytes
        while len(self._rows) > self._most or (self._bytes > _KEPT_BYTES and len(self._rows) > 1):
            _, old = self._rows.popitem(last=False)
            self._bytes -= old.nbytes
