"""Drive any engine through recorded searches: every forward, draw, evaluation and embedding runs at full cost, its numbers do
not count.

`Script` is the tables of recorded requests. `ScriptedOracle` plays them to the baselines. `Driven` is a RAIN that raindecode's
Decoder takes: it stands between search and engine, where a search says what it wants and is sent the answers, so that the engine
runs as it is. Leaves that raindecode works on ahead and never uses need not be in a recording; they get what was recorded under
another name, chosen by the name asked for. No search uses it: answers and counters are compared with the recorded ones.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from naive.common import Path, Row, path_hash
from naive.oracle import Oracle
from naive.search import DYNAMIC, EXPAND, ROLLOUT
from torch import Tensor
from workload import SCALE, RecordedRequest, Sets

from raindecode.engine.rng import name_draw
from raindecode.engine.sampler import Drawn, Filter
from raindecode.engine.types import Got, HostCall, Search, Want
from raindecode.errors import ConfigError
from raindecode.policy.prompt import ChatFormat
from raindecode.search.context import SearchContext
from raindecode.search.embedder import Embedder, Paths, unit_rows
from raindecode.search.evaluator import Evaluator
from raindecode.search.rain import RAIN


def rounded(rows: Tensor) -> np.ndarray[Any, np.dtype[np.int8]]:
    """Unit vectors as a workload stores them."""
    return np.rint(rows.numpy() * SCALE).astype(np.int8)


def unrounded(rows: np.ndarray[Any, np.dtype[np.int8]]) -> Tensor:
    """Unit vectors of stored ones."""
    return unit_rows(torch.from_numpy(rows.astype(np.float32)))


class Driver(Protocol):
    """Stands between a search and what the model says."""

    def dimension(self, size: int) -> int:
        """Length of the vectors, where the model's own have `size` numbers."""
        ...

    def change(self, want: Want, got: Got) -> None:
        """See or change the answer to `want` before the search gets it."""
        ...

    def judged(self, prompt: str, text: str, score: float) -> float:
        """The verdict on an answer so far that the model scored."""
        ...

    def embedded(self, paths: Paths, rows: Tensor) -> Tensor:
        """The unit vectors of `paths`, which the model says are `rows`."""
        ...


class Script:
    """What was recorded, by the names under which engines ask for it.

    Attributes:
        size: of the vectors.
        unrecorded: how often something was asked for that no request holds.
    """

    def __init__(self, requests: Iterable[RecordedRequest]) -> None:
        self.drawn: dict[tuple[int, int], Drawn] = {}  # by seed and name
        self.tops: dict[tuple[int, int], tuple[list[int], list[float]]] = {}  # by path and number
        self.verdicts: dict[tuple[str, str], float] = {}  # by prompt and text
        self.vectors: dict[tuple[int, int], Tensor] = {}  # by path and length of the suffix
        self.unrecorded = 0
        self._others: dict[int, list[Drawn]] = defaultdict(list)
        for request in requests:
            self._add(request)
        self._scores = list(self.verdicts.values())
        self._rows = list(self.vectors.values())
        self.size = len(self._rows[0]) if self._rows else 1

    def draw(self, seed: int, name: int) -> Drawn:
        """The recorded draw."""
        found = self.drawn.get((seed, name))
        if found is None:
            self.unrecorded += 1
            others = self._others[seed]
            found = others[name % len(others)]
        return found

    def top(self, path: int, count: int) -> tuple[list[int], list[float]]:
        """The recorded likeliest tokens.

        Raises:
            ConfigError: there are none; nothing is worked on ahead that asks for them.
        """
        if (path, count) not in self.tops:
            raise ConfigError(_off(f"the {count} most likely tokens"))
        return self.tops[path, count]

    def verdict(self, prompt: str, text: str) -> float:
        """The recorded verdict."""
        found = self.verdicts.get((prompt, text))
        if found is None:
            self.unrecorded += 1
            found = self._scores[zlib.crc32(text.encode()) % len(self._scores)]
        return found

    def vector(self, path: int, length: int) -> Tensor:
        """The recorded vector of the last `length` tokens of a path."""
        found = self.vectors.get((path, length))
        if found is None:
            self.unrecorded += 1
            found = self._rows[name_draw(path, length) % len(self._rows)]
        return found

    # ---- raindecode's search --------------------------------------------------------------------------------------
    def dimension(self, size: int) -> int:
        return self.size

    def change(self, want: Want, got: Got) -> None:
        if want.draws:
            got.drawn = [self.draw(draw.key, draw.counter) for draw in want.draws]
        if want.top:
            got.top_ids, got.top_probs = self.top(want.branch.hash, want.top)

    def judged(self, prompt: str, text: str, score: float) -> float:
        return self.verdict(prompt, text)

    def embedded(self, paths: Paths, rows: Tensor) -> Tensor:
        branch = paths.branch
        return torch.stack([self.vector(branch.hash, branch.length - start) for start in paths.starts])

    # ---- tables ---------------------------------------------------------------------------------------------------
    def _add(self, request: RecordedRequest) -> None:
        prompt = path_hash(request.prompt_ids)
        self.tops |= {(prompt, count): found for count, found in request.tops.items()}
        self.verdicts |= {(request.prompt, text): score for text, score in request.verdicts.items()}
        rows = iter(unrounded(request.vectors))
        before = len(self.drawn)
        for leaf in request.leaves:
            at = path_hash(leaf.at, prompt)
            for place, token in enumerate(leaf.rollout):
                self.drawn[request.seed, name_draw(at, ROLLOUT, 0, place)] = Drawn(token, 1.0, 0.0)
            if leaf.sets is not None:
                self._add_sets(request.seed, at, EXPAND, leaf.sets)
            for fired, sets in leaf.more.items():
                self._add_sets(request.seed, at, name_draw(DYNAMIC, fired), sets)
            end, length = path_hash(leaf.rollout, at), len(leaf.at) + len(leaf.rollout)
            for start in leaf.starts:
                self.vectors[end, length - start] = next(rows)
        self._others[request.seed] += list(self.drawn.values())[before:]

    def _add_sets(self, seed: int, at: int, purpose: int, sets: Sets) -> None:
        """Every draw of the chains. Only products of probabilities are used: the first draw carries the joint one."""
        for attempt, index in enumerate(sets.tries):
            if index is None:
                continue
            state, prob = at, sets.probs[index]
            for token in sets.tokens[index]:
                self.drawn[seed, name_draw(state, purpose, attempt)] = Drawn(token, prob, 0.0)
                state, prob = name_draw(state, token), 1.0


class ScriptedOracle(Oracle):
    """Plays a script to a baseline.

    Raises:
        ConfigError: (its methods) the search asks for what was not recorded: it is not the recorded one.
    """

    def __init__(self, script: Script) -> None:
        self.script = script

    def draw(
        self, names: Sequence[int], rows: Sequence[Row], shape: Filter, seed: int, greedy: Sequence[bool]
    ) -> list[Drawn]:
        super().draw(names, rows, shape, seed, greedy)
        if any((seed, name) not in self.script.drawn for name in names):
            raise ConfigError(_off("a draw"))
        return [self.script.draw(seed, name) for name in names]

    def top(self, name: int, row: Row, count: int) -> tuple[list[int], list[float]]:
        super().top(name, row, count)
        return self.script.top(name, count)

    def verdict(self, prompt: str, text: str, score: float) -> float:
        if (prompt, text) not in self.script.verdicts:
            raise ConfigError(_off(f"a verdict on {text!r}"))
        return self.script.verdict(prompt, text)

    def vectors(self, name: int, suffixes: Sequence[Path], rows: Tensor) -> Tensor:
        if any((name, len(suffix)) not in self.script.vectors for suffix in suffixes):
            raise ConfigError(_off("a vector"))
        return torch.stack([self.script.vector(name, len(suffix)) for suffix in suffixes])


@dataclass(frozen=True)
class Driven(RAIN):
    """RAIN with a driver between search and engine. `Driven.by` makes one of plain settings."""

    driver: Any = None  # a Driver; Any, since fields of RAIN before it have defaults

    @classmethod
    def by(cls, driver: Driver, rain: RAIN, **changes: Any) -> Driven:
        """`rain`, driven."""
        plain = {f.name: getattr(rain, f.name) for f in fields(RAIN)} | changes
        plain["evaluator"] = _DrivenEvaluator(plain["evaluator"], driver)
        if plain["embedder"] is not None:
            plain["embedder"] = _DrivenEmbedder(plain["embedder"], driver)
        return cls(**plain, driver=driver)

    def search(self, context: SearchContext) -> Generator[Any, Any, Any]:
        return _driven(super().search(context), self.driver)


def _driven(search: Search, driver: Driver) -> Generator[Any, Any, Any]:
    """A search whose answers pass the driver on their way from the engine."""
    answer: Any = None
    failure: Exception | None = None
    try:
        while True:
            wanted = search.send(answer) if failure is None else search.throw(failure)
            failure = None
            try:
                answer = yield wanted
            except Exception as error:
                failure = error
                continue
            if not isinstance(wanted, HostCall):
                for want, got in zip(wanted, answer, strict=True):
                    driver.change(want, got)
    except StopIteration as stop:
        return stop.value
    finally:
        search.close()


@dataclass(frozen=True)
class _DrivenEvaluator:
    evaluator: Evaluator
    driver: Driver

    def evaluate(self, context: SearchContext, prompt: str, response: str) -> Generator[Any, Any, float]:
        score = yield from self.evaluator.evaluate(context, prompt, response)
        return self.driver.judged(prompt, response, score)


@dataclass(frozen=True)
class _DrivenEmbedder:
    embedder: Embedder
    driver: Driver

    def dimension(self, context: SearchContext) -> int:
        return self.driver.dimension(self.embedder.dimension(context))

    def embed(self, context: SearchContext, paths: Paths) -> Generator[Any, Any, Tensor]:
        rows = yield from self.embedder.embed(context, paths)
        return self.driver.embedded(paths, rows)


def format_of(rain: RAIN, request: RecordedRequest) -> ChatFormat:
    """How the request's prompt is written."""
    assert rain.format is not None
    return replace(rain.format, prefix=request.prefix)


def _off(what: str) -> str:
    return (
        f"the workload does not hold {what} that the search asks for: this search is not the recorded one; "
        "record the workloads anew with `python benchmarks/record_workload.py --regime NAME`"
    )
