"""What vLLM hands to a logits processor, in the shape its two model runners hand it, without vLLM."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

ONE_WAY, SWAP = SimpleNamespace(name="UNIDIRECTIONAL"), SimpleNamespace(name="SWAP")


def params(weight: object = None, **others: object) -> Any:
    """SamplingParams with this λ."""
    given = ({} if weight is None else {"dera_lambda": weight}) | others
    return SimpleNamespace(extra_args=given or None)


@dataclass
class Text:
    """A request: its prompt, what was written so far, and its λ."""

    prompt: list[int]
    weight: float | None
    output: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


class FirstRunner:
    """A persistent batch as V1 keeps it: the rows are requests; holes are filled from the end; rows may be swapped."""

    def __init__(self, processor: Any, rng: random.Random) -> None:
        self.processor, self.rng = processor, rng
        self.batch: list[Text] = []

    def step(self, coming: Sequence[Text], leaving: Sequence[int], width: int, *, swap: bool = False) -> Tensor:
        """One step; logits after the processor. Every request writes a token afterwards."""
        holes = sorted(leaving)
        removed = sorted(leaving, reverse=True)
        added, moved = [], []
        batch: list[Text | None] = [None if i in leaving else text for i, text in enumerate(self.batch)]
        for text in coming:
            if holes:
                index = holes.pop(0)
                batch[index] = text
            else:
                index = len(batch)
                batch.append(text)
            added.append((index, params(text.weight), text.prompt, text.output))
        while None in batch:
            if batch[-1] is None:
                batch.pop()
                continue
            hole = batch.index(None)
            moved.append((len(batch) - 1, hole, ONE_WAY))
            batch[hole] = batch.pop()
        self.batch = [text for text in batch if text is not None]
        if swap and len(self.batch) > 1:
            a, b = self.rng.sample(range(len(self.batch)), 2)
            self.batch[a], self.batch[b] = self.batch[b], self.batch[a]
            moved.append((a, b, SWAP))
        # As vLLM does: an index that a new request takes is not reported as removed any more.
        taken = {index for index, *_ in added}
        removed = [index for index in removed if index not in taken]
        update = None
        if removed or added or moved:
            update = SimpleNamespace(batch_size=len(self.batch), removed=removed, added=added, moved=moved)
        self.processor.update_state(update)
        return torch.randn(len(self.batch), width)


class SecondRunner:
    """Slots as Model Runner V2 keeps them: recycled without notice; rows in any order, several of a request with drafts."""

    def __init__(self, num_slots: int, longest: int, vocab_size: int) -> None:
        self.texts: dict[int, Text] = {}
        self.free = list(range(num_slots))
        self.table = torch.zeros(num_slots, longest, dtype=torch.int32)
        self.prefill = np.zeros(num_slots, dtype=np.int32)
        self.state = SimpleNamespace(
            device=torch.device("cpu"), max_num_reqs=num_slots, vocab_size=vocab_size,
            all_token_ids=SimpleNamespace(gpu=self.table), prefill_len=SimpleNamespace(np=self.prefill),
        )  # fmt: skip

    def add(self, processor: Any, text: Text) -> tuple[int, bool]:
        slot = self.free.pop(0)
        self.texts[slot] = text
        self.prefill[slot] = len(text.tokens)
        self.write(slot)
        return slot, processor.add_request(slot, params(text.weight))

    def remove(self, slot: int) -> None:
        """The runner tells nobody."""
        del self.texts[slot]
        self.free.insert(0, slot)

    def write(self, slot: int) -> None:
        tokens = self.texts[slot].tokens
        self.table[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)

    def context(self, rows: Sequence[tuple[int, int, int, int]]) -> Any:
        """A LogitsContext of rows (slot, local position, position, token)."""
        columns = [torch.tensor(list(column), dtype=torch.int64) for column in zip(*rows, strict=True)]
        slots = list(dict.fromkeys(slot for slot, *_ in rows))
        return SimpleNamespace(
            expanded_idx_mapping=columns[0], expanded_local_pos=columns[1], pos=columns[2], input_ids=columns[3],
            idx_mapping=torch.tensor(slots), idx_mapping_np=np.array(slots), seq_lens_upper_bound_np=None,
        )  # fmt: skip
