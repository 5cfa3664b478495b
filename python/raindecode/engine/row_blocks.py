"""RowBlocks: logits behind many tokens of one branch, as tensors that lie where the model left them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raindecode.engine.batch import TokenBatch
from raindecode.engine.types import Want

_SOURCE = 32  # a row's place is its forward's number above this bit, and its index in that forward's logits below


class RowBlocks:
    """What `Want.rows_from` of one step asks for. Arrays over slots, so that no Python object is made per row.

    Args:
        num_slots: of the KV tree, the trash slot not counted.
        num_models: of the engine.
    """

    def __init__(self, num_slots: int, num_models: int) -> None:
        self._num_slots = num_slots
        self._slots: dict[int, tuple[int, npt.NDArray[np.int32]]] = {}  # by want: models, and slots of its rows
        self._wanted: list[npt.NDArray[np.bool_] | None] = [None] * num_models  # by model: which slots
        self._places: list[npt.NDArray[np.int64] | None] = [None] * num_models  # by model: where each slot's row lies
        self._sources: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._slots)

    def add(self, want: Want, models: int, slots: array[int]) -> None:
        """Note a want of the rows in these slots, of every model of the mask."""
        mine = np.frombuffer(slots, dtype=np.int32)
        self._slots[id(want)] = models, mine
        for model in range(models.bit_length()):
            if models >> model & 1:
                mask = self._wanted[model]
                if mask is None:
                    mask = self._wanted[model] = np.zeros(self._num_slots + 1, dtype=np.bool_)
                    self._places[model] = np.zeros(self._num_slots + 1, dtype=np.int64)
                mask[mine] = True

    def rows_of(self, batch: TokenBatch, model: int, known: Sequence[int], first: int) -> list[int]:
        """The rows of a batch to run the head on, besides those `known` to be.

        Args:
            first: how many rows of the forward's logits come before those of this batch; `known` lead its own.
        """
        mask, places = self._wanted[model], self._places[model]
        if mask is None or places is None:
            return []
        slots = batch.slot_mapping.numpy()
        here = mask[slots]
        if known:
            here[list(known)] = False
        rows = np.flatnonzero(here)
        at = (len(self._sources) << _SOURCE) + first
        if known:
            places[slots[list(known)]] = np.arange(at, at + len(known))
        places[slots[rows]] = np.arange(at + len(known), at + len(known) + len(rows))
        found: list[int] = rows.tolist()
        return found

    def take(self, logits: Tensor) -> None:
        """The logits [n, vocabulary] of the forward that `rows_of` was asked about."""
        self._sources.append(logits)

    def blocks(self, want: Want) -> list[Tensor | None]:
        """[n, vocabulary] per model of the engine, None of one that does not run; a view where the rows lie together."""
        models, slots = self._slots[id(want)]
        found: list[Tensor | None] = []
        for model, places in enumerate(self._places):
            if not models >> model & 1 or places is None:
                found.append(None)
                continue
            mine = places[slots]
            if mine[-1] - mine[0] == len(mine) - 1 and bool((mine[1:] > mine[:-1]).all()):
                source, first = divmod(int(mine[0]), 1 << _SOURCE)
                found.append(self._sources[source][first : first + len(mine)])
                continue
            bounds = [0, *(np.flatnonzero(np.diff(mine) != 1) + 1).tolist(), len(mine)]
            parts = []
            for begin, end in pairwise(bounds):
                source, first = divmod(int(mine[begin]), 1 << _SOURCE)
                parts.append(self._sources[source][first : first + end - begin])
            found.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        return found
