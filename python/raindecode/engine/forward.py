"""Forwards of a step: which rows run in which call of which model. Models that share weights share a call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from torch import Tensor

from raindecode.engine.batch import Part, TokenBatch, build_batches
from raindecode.engine.edits import Tapped
from raindecode.engine.kv_tree import Row
from raindecode.engine.model_runner import ModelRunner


@dataclass(frozen=True)
class Forward:
    """One call of `runner` over `parts`; `models` numbers each part's model as a Mix does."""

    runner: ModelRunner
    parts: Sequence[Part]
    models: Sequence[int]

    def run(self, wanted: Sequence[Sequence[int]], tapped: Tapped | None = None) -> Tensor:
        """Logits of the rows wanted of each part, one part's after the other's. Hidden states are left in `tapped`."""
        if tapped is not None:
            return self.runner.forward_parts(self.parts, wanted, tapped)
        if len(self.parts) == 1 and not self.parts[0].member:
            return self.runner.forward(self.parts[0].batch, wanted[0])
        return self.runner.forward_parts(self.parts, wanted)


def plan_forwards(
    models: Sequence[tuple[ModelRunner, int]], rows: Iterable[Row], max_rows: int, pad_rows: int
) -> Iterator[Forward]:
    """The forwards that run `rows`, each by the models its mask names.

    Rows of the members of one runner go through its weights together, up to `max_rows` of each. With `pad_rows` every
    member has forwards of its own: their number of rows has to be the same whatever else is asked.
    """
    planned = list(rows)
    if len(models) == 1:
        for batch in build_batches(planned, max_rows, pad_rows):
            yield Forward(models[0][0], [Part(0, batch)], [0])
        return
    known: dict[int, list[TokenBatch]] = {}  # by mask of the models with the same rows
    batches: list[list[TokenBatch]] = []
    masks = {row.pools for row in planned}
    for model in range(len(models)):
        same = sum(1 << m for m in range(len(models)) if all((k >> m & 1) == (k >> model & 1) for k in masks))
        if same not in known:
            mine = [row for row in planned if row.pools >> model & 1]
            known[same] = build_batches(mine, max_rows, pad_rows) if mine else []
        batches.append(known[same])
    for runner in dict.fromkeys(one for one, _ in models):
        members = [(i, member) for i, (one, member) in enumerate(models) if one is runner]
        if pad_rows:
            for i, member in members:
                for batch in batches[i]:
                    yield Forward(runner, [Part(member, batch)], [i])
            continue
        for together in zip_longest(*(batches[i] for i, _ in members)):
            there = [(i, Part(member, b)) for (i, member), b in zip(members, together, strict=True) if b is not None]
            yield Forward(runner, [part for _, part in there], [i for i, _ in there])
