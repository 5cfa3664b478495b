"""PrefixStore: constant beginnings of prompts, computed ahead, written to a file, and read back from it.

K/V belong to what computed them, so a file names its models, adapters, number type, edits and token ids, and is refused where
one of them differs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raindecode.engine.branch import Ledger
from raindecode.engine.edit_path import EditPath
from raindecode.engine.engine import Engine
from raindecode.engine.task import Task
from raindecode.engine.types import Want
from raindecode.errors import CapacityError, ConfigError, PrefixFileError, PromptError
from raindecode.hidden_edits import ModelIdentity, Schedule
from raindecode.mixture import Mix
from raindecode.prefix_file import PrefixRecord, read_prefixes, write_prefixes

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Of the last row's K/V, made anew by a forward of one row, against the file's: what rounding in another batch may change."""


@dataclass(frozen=True)
class Constant:
    """A constant beginning of prompts.

    Attributes:
        what: what to call it in messages.
        ids: its token ids.
        mix: names the models that run it.
        schedule: edits of its rows.
    """

    what: str
    ids: tuple[int, ...]
    mix: Mix
    schedule: Schedule = ()

    @property
    def edits(self) -> list[tuple[int, str]]:
        """From which row on which edit is in force, by its fingerprint."""
        return [(start, "" if edit is None else edit.name) for start, edit in self.schedule if start < len(self.ids)]


class PrefixStore:
    """See the module's text.

    Args:
        engine: that the requests run on.
        identities: of every model of the engine.
    """

    def __init__(self, engine: Engine, identities: Callable[[], Sequence[ModelIdentity]]) -> None:
        self._engine = engine
        self._identities = identities

    def save(self, path: str | Path, constants: Sequence[Constant]) -> int:
        """Write K/V of constant beginnings, computed now where they are not there; how many tokens.

        Raises:
            PrefixFileError: the file cannot be written.
            PromptError, CapacityError: a beginning does not fit the context or the KV pool.
        """
        self._check(constants)
        records = []
        for constant, slots in zip(constants, self._hold(constants), strict=True):
            tensors = {
                f"{model}.{name}": rows
                for model in _models(constant.mix)
                for name, rows in self._runner(model).rows(slots, self._engine.models[model][1]).items()
            }
            records.append(self._record(constant)._replace(tensors=tensors))
        write_prefixes(path, records)
        return sum(len(constant.ids) for constant in constants)

    def load(self, path: str | Path, constants: Sequence[Constant]) -> int:
        """Put K/V of a file where requests find them; how many tokens.

        The last row of each is computed and compared: a model that the file's names fit and that gives something else is noticed.

        Raises:
            PrefixFileError: it cannot be read, is damaged, or was made by another model, number type or policy, or of other tokens.
            PromptError, CapacityError: a beginning does not fit the context or the KV pool.
        """
        self._check(constants)
        records = read_prefixes(path, [self._record(constant) for constant in constants])
        self._run(replace(constant, ids=constant.ids[:1]) for constant in constants if not self._has_pools(constant))
        for constant, record in zip(constants, records, strict=True):
            self._put(constant, record.tensors, str(path))
        return sum(len(constant.ids) for constant in constants)

    def _check(self, constants: Sequence[Constant]) -> None:
        if not constants:
            raise ConfigError(
                "there is no constant prompt to keep: give a policy whose prompt has one, such as Policy(prompt=URIAL.default()), "
                "a system text, or a search with a judge's template"
            )
        for constant in constants:
            room = min(self._runner(model).context_length for model in _models(constant.mix)) - 1
            if len(constant.ids) > room:
                raise PromptError(
                    f"{constant.what} has {len(constant.ids)} constant tokens, more than the model's context leaves for them ({room}): "
                    "use a shorter prompt"
                )
        total = sum(len(constant.ids) for constant in constants)
        if total > self._engine.pins.most:
            names = " and ".join(constant.what for constant in constants)
            raise CapacityError(
                f"{names} {'have' if len(constants) > 1 else 'has'} {total} constant tokens, and this KV pool keeps "
                f"{self._engine.pins.most} at the most: raise kv_tokens (Decoder.from_pretrained(..., kv_tokens=N) or --kv-tokens N)"
            )

    def _record(self, constant: Constant) -> PrefixRecord:
        identities = self._identities()
        models = []
        for model in _models(constant.mix):
            runner, member = self._engine.models[model]
            one = identities[model]
            adapter = runner.adapters[member - 1].fingerprint if member else ""
            models.append({"model": model, "architecture": one.architecture, "fingerprint": one.fingerprint, "adapter": adapter,
                           "dtype": str(runner.model.dtype).removeprefix("torch.")})  # fmt: skip
        return PrefixRecord(constant.what, constant.ids, models, constant.edits, {})

    def _runner(self, model: int) -> Any:
        return self._engine.models[model][0]

    def _has_pools(self, constant: Constant) -> bool:
        """Whether its models have K/V pools, which a first forward makes where they cannot be made without one."""
        members = [self._engine.models[model] for model in _models(constant.mix)]
        return all(runner.make_pools(member) for runner, member in members)

    def _path(self, constant: Constant) -> EditPath | None:
        return self._engine.edit_path(constant.schedule)

    def _hold(self, constants: Sequence[Constant]) -> list[Tensor]:
        """Have the K/V computed and pinned; the slots of each."""
        self._run(constants)
        return [self._pinned(constant) for constant in constants]

    def _run(self, constants: Iterable[Constant], *, logits: bool = False) -> None:
        """Have the K/V computed; with `logits` the last row, whether it was there or not."""

        def search(ledger: Ledger, constant: Constant) -> Generator[Any, Any, None]:
            edits = self._engine.hold(ledger, constant.schedule)
            yield [Want(self._engine.open(ledger, constant.ids, constant.mix, edits), logits=logits)]

        def task(constant: Constant) -> Task:
            ledger = Ledger()
            return Task(search(ledger, constant), ledger)

        with closing(self._engine.run(map(task, constants))) as ended:
            for done in ended:
                if done.error is not None:
                    raise done.error

    def _pinned(self, constant: Constant) -> Tensor:
        keys = self._engine.keys(constant.ids, self._path(constant))
        slots = self._engine.pins.pin(keys, constant.mix.models, least=1)
        if slots is None:
            raise CapacityError(
                f"the KV pool holds {self._engine.tree.num_slots} tokens, too few to keep {constant.what} ({len(constant.ids)} tokens): "
                "raise kv_tokens"
            )
        return torch.tensor(slots, dtype=torch.int64)

    def _put(self, constant: Constant, tensors: dict[str, Tensor], path: str) -> None:
        engine, keys = self._engine, self._engine.keys(constant.ids, self._path(constant))

        def fill(model: int, rows: Sequence[int], slots: Sequence[int]) -> None:
            runner, member = engine.models[model]
            together = rows[-1] - rows[0] == len(rows) - 1
            which = slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows, dtype=torch.int64)
            mine = {name.partition(".")[2]: t[which] for name, t in tensors.items() if name.startswith(f"{model}.")}
            runner.put_rows(torch.tensor(slots, dtype=torch.int64), mine, member)

        try:
            engine.insert(keys, constant.mix.models, fill)
        except ValueError as error:
            raise PrefixFileError(
                f"the K/V of {constant.what} in {path!r} do not fit this model ({error}): write it again (Decoder.save_prefix)"
            ) from error
        slots = self._pinned(constant)
        if not self._is_reproduced(constant, tensors, slots[-1:]):
            engine.forget()
            raise PrefixFileError(
                f"the K/V of {constant.what} in {path!r} are not what this model computes: it was changed after the file was written; "
                "write it again (Decoder.save_prefix)"
            )

    def _is_reproduced(self, constant: Constant, tensors: dict[str, Tensor], slot: Tensor) -> bool:
        """Compute the last row and compare it with the file's."""
        engine = self._engine
        self._run([constant], logits=True)
        for model in _models(constant.mix):
            runner, member = engine.models[model]
            for name, made in runner.rows(slot, member).items():
                read = tensors[f"{model}.{name}"][-1:].to(made)
                error = (read.float() - made.float()).norm()
                if not error <= _TOLERANCE.get(made.dtype, 1e-1) * made.float().norm():
                    return False
        return True


def _models(mix: Mix) -> list[int]:
    return [model for model in range(mix.models.bit_length()) if mix.models >> model & 1]
