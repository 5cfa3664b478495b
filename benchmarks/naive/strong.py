"""Baseline (b): the same RAIN as a competent user of transformers writes it.

- One DynamicCache holds the current token path with the hidden states beside it. Going to another leaf crops it to what
  both have in common and runs the rest in one forward; what earlier requests share (few-shot turns) stays.
- The chains of an expansion are one batch: the cache is copied once per row, all rows advance in lock-step.
- Both orders of an evaluation are one batch behind the cached beginning of the last evaluation prompt.
- Embeddings of all levels come from the cached hidden states; only the last rollout token is run for them.
- Logits and vectors are kept by token path, so an answer that is over is not run again when it is visited again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from naive.common import Path, Row, common_prefix, to_row
from naive.search import NaiveRain, Walker
from raindecode.engine.rng import name_draw


def copied(cache: DynamicCache, length: int, rows: int) -> DynamicCache:
    """A new cache with the first `length` positions of `cache`'s only row in each of `rows` rows."""
    new = DynamicCache()
    layers: Any = cache.layers if length else ()
    for index, layer in enumerate(layers):
        keys, values = (held[:1, :, :length].expand(rows, -1, -1, -1) for held in (layer.keys, layer.values))
        new.update(keys, values, index)
    return new


class _Trunk(Walker):
    """One token path in a cache, with the final hidden state of every token of it."""

    def __init__(self, search: Strong) -> None:
        self.search = search
        self.cache = DynamicCache()
        self.held: Path = ()  # tokens in the cache
        self.states: list[Tensor] = []
        self.path: Path = ()  # where the walk is

    def go(self, path: Path) -> Row:
        """Have `path` in the cache; logits after it."""
        keep = min(common_prefix(self.held, path), len(path) - 1)
        self._crop(keep)
        ids = torch.tensor([path[keep:]], device=self.search.model.device)
        out = self.search.meter.forward(
            self.search.model, ids, past_key_values=self.cache, use_cache=True, output_hidden_states=True, logits_to_keep=1
        )  # fmt: skip
        self.states += out.hidden_states[-1][0].float().unbind()
        self.held = path
        return to_row(out.logits[0, -1])

    def hold(self, path: Path) -> None:
        """Have `path` in the cache, no logits wanted; the cache may go on behind it."""
        if self.held[: len(path)] != path:
            self.go(path)

    def row(self) -> Row:
        rows = self.search.rows
        if self.path not in rows:
            rows[self.path] = self.go(self.path)
        return rows[self.path]

    def push(self, token: int) -> None:
        self.path = (*self.path, token)

    def _crop(self, length: int) -> None:
        if length < len(self.held):
            self.cache.crop(length - len(self.held))
            del self.states[length:]
            self.held = self.held[:length]


class Strong(NaiveRain):
    """See the module's text. Caches stay from request to request; counters are of what really ran."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.clear()

    def clear(self) -> None:
        """Drop what is kept from earlier requests."""
        self.trunk = _Trunk(self)
        self.judged: tuple[Sequence[int], DynamicCache] = ((), DynamicCache())

    def forget(self) -> None:
        self.rows: dict[Path, Row] = {}
        self.means: dict[tuple[Path, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

    def walk(self, path: Path) -> Walker:
        self.trunk.path = path
        return self.trunk

    def chains(
        self, path: Path, length: int, tries: Sequence[int], purpose: int, ends: Callable[[Path], bool]
    ) -> list[tuple[Path, float]]:
        rows: Sequence[Row] = [self.walk(path).row()] * len(tries)
        names = [self.name(path[len(self.prompt) :])] * len(tries)
        tokens: list[Path] = [()] * len(tries)
        joint = [1.0] * len(tries)
        active = list(range(len(tries)))
        cache: DynamicCache | None = None
        while True:
            drawn = self.oracle.draw(
                [name_draw(names[i], purpose, tries[i] + 1) for i in active],
                rows, self.set_filter(), self.request.seed, [tries[i] < 0 for i in active],
            )  # fmt: skip
            for i, one in zip(active, drawn, strict=True):
                tokens[i] = (*tokens[i], one.token)
                names[i] = name_draw(names[i], one.token)
                joint[i] *= one.prob
            going = [at for at, i in enumerate(active) if len(tokens[i]) < length and not ends(tokens[i])]
            if not going:
                return list(zip(tokens, joint, strict=True))
            if cache is None:
                self.trunk.hold(path)
                cache = copied(self.trunk.cache, len(path), len(going))
            elif len(going) < len(active):
                cache.batch_select_indices(torch.tensor(going, device=self.model.device))
            active = [active[at] for at in going]
            ids = torch.tensor([[tokens[i][-1]] for i in active], device=self.model.device)
            out = self.meter.forward(self.model, ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            rows = to_row(out.logits[:, -1])  # type: ignore[assignment]

    def last_rows(self, prompts: list[list[int]]) -> list[Row]:
        held, cache = self.judged
        shortest = min(map(len, prompts))
        keep = min(common_prefix(held, *prompts), shortest - 1)
        width = max(map(len, prompts)) - keep
        last = [len(ids) - keep - 1 for ids in prompts]
        ids = torch.tensor([(p + p[-1:] * width)[keep : keep + width] for p in prompts], device=self.model.device)
        ahead = copied(cache, keep, len(prompts))
        wanted = sorted(set(last))  # rows padded on the right: what comes behind a token does not change it
        out = self.meter.forward(
            self.model, ids, past_key_values=ahead, use_cache=True,
            logits_to_keep=torch.tensor(wanted, device=self.model.device),
        )  # fmt: skip
        self.judged = (prompts[0], copied(ahead, len(prompts[0]), 1))
        return [to_row(out.logits[i, wanted.index(at)]) for i, at in enumerate(last)]

    def mean_states(self, path: Path, starts: Sequence[int], center: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        key = (path, tuple(starts))
        if key in self.means:  # an answer that is over, visited again
            return self.means[key]
        self.trunk.hold(path)
        states = torch.stack(self.trunk.states[: len(path)])
        middle = torch.zeros(()) if center is None else states[slice(*center)].mean(0)
        self.means[key] = torch.stack([states[start:].mean(0) for start in starts]), middle
        return self.means[key]
