"""Hidden states of texts, collected by the engine: prompts shared, batches filled, no hook on a fused model."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from raindecode.engine.branch import Ledger
from raindecode.engine.engine import Engine
from raindecode.engine.task import Task
from raindecode.engine.types import Want
from raindecode.errors import ConfigError, PromptError
from raindecode.hidden_edits import TAPS, Site
from raindecode.mixture import Mix
from raindecode.policy.prompt import ChatFormat
from raindecode.progress import ProgressDisplay
from raindecode.settings import is_whole
from raindecode.text import Codec

Pool = Literal["last", "mean"]
POOLS = ("last", "mean")


@dataclass(frozen=True)
class PassageMaker:
    """Turns prompts with answers into token ids.

    Attributes:
        context: tokens a passage may have.
    """

    codec: Codec
    format: ChatFormat | None
    context: int

    def make(self, passages: Sequence[tuple[str, str]], pool: Pool) -> list[tuple[list[int], int]]:
        """Ids of every passage, and from which on the mean is taken: the answer's, or of no answer the prompt's.

        Raises:
            PromptError: a passage is no pair of texts, empty, or too long.
        """
        if isinstance(passages, str) or not isinstance(passages, Iterable):
            raise PromptError(f"passages is {passages!r:.60}; give a list of pairs of texts: prompt and answer")
        return [self._one(passage, i, pool) for i, passage in enumerate(passages)]

    def _one(self, passage: object, index: int, pool: Pool) -> tuple[list[int], int]:
        if not (isinstance(passage, tuple) and len(passage) == 2 and all(isinstance(part, str) for part in passage)):
            raise PromptError(f"passage {index} is {passage!r:.80}; give a pair of texts: prompt and answer")
        prompt, answer = passage
        stem = prompt if self.format is None else self.format.render(prompt)
        ids = self.codec.encode(stem + answer)
        if not ids:
            raise PromptError(f"passage {index} is empty; give at least one character")
        if len(ids) > self.context:
            raise PromptError(
                f"passage {index} has {len(ids)} tokens, the context has {self.context}: shorten prompt or answer"
            )
        if pool == "last":
            return ids, len(ids) - 1
        first = 0
        if answer:  # tokens may span the seam: the answer begins where the passage leaves the prompt's own ids
            prompt_ids = self.codec.encode(stem)
            while first < min(len(prompt_ids), len(ids) - 1) and prompt_ids[first] == ids[first]:
                first += 1
        return ids, first


def sites_of(tap: str, layers: Sequence[int] | None, num_layers: int) -> list[Site]:
    """Places of one tap.

    Raises:
        ConfigError: there is no such tap or layer.
    """
    if tap not in TAPS:
        raise ConfigError(f"tap is {tap!r}; allowed: {', '.join(TAPS)}")
    if layers is not None and (isinstance(layers, str) or not isinstance(layers, Iterable)):
        raise ConfigError(f"layers is {layers!r}; allowed: a list of layers, or None for all")
    chosen = list(range(num_layers)) if layers is None else list(layers)
    if not chosen or any(not is_whole(layer) or not 0 <= layer < num_layers for layer in chosen):
        raise ConfigError(f"layers are {chosen}; allowed: one or more of 0 to {num_layers - 1}")
    return [Site(layer, tap) for layer in chosen]


def collect(
    engine: Engine, passages: Sequence[tuple[list[int], int]], sites: Sequence[Site], model: int, progress: bool | None
) -> Tensor:
    """Mean hidden states of one of the engine's models. [len(sites), len(passages), hidden_size] float32 on the cpu."""
    alone = Mix(tuple(float(i == model) for i in range(len(engine.models))))
    hidden_size = engine.models[model][0].hidden_size
    found = torch.zeros(len(sites), len(passages), hidden_size)

    def search(ledger: Ledger, ids: list[int], first: int) -> Generator[Any, Any, Tensor]:
        branch = engine.open(ledger, ids, alone)
        (answer,) = yield [Want(branch, taps=sites, taps_from=first)]
        states: Tensor | None = answer.tapped
        assert states is not None
        return states

    def task(index: int) -> Task:
        ledger = Ledger()
        return Task(search(ledger, *passages[index]), ledger, tag=index)

    with (
        ProgressDisplay.choose(progress, len(passages), searching=False) as display,
        closing(engine.run(map(task, range(len(passages))))) as ended,
    ):
        for done in ended:
            if done.error is not None:
                raise done.error
            found[:, done.tag] = done.result
            report = display.reporter(done.tag)
            if report is not None:
                report(len(passages[done.tag][0]), 0)
            display.finished(done.tag)
    return found
