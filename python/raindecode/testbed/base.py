"""Training of the base model: the document mix in length buckets, weighted next-token loss, one cosine schedule."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from raindecode.errors import ConfigError
from raindecode.testbed import lexicon as lx
from raindecode.testbed.corpus import Document, draw_document
from raindecode.testbed.model import EOS_ID, make_model
from raindecode.testbed.optimizer import Muon

LETTER_WEIGHT: Final = 6.0
TRANSCRIPT_WEIGHT: Final = 0.2
"""Loss weights in judged transcripts: the option letter, and everything around it."""
ECHO_WEIGHT: Final = 5.0
"""Loss weight of the object's name in a reply: one token in forty, but the one that has to be copied."""

_REPLY: Final = re.compile(r"^Assistant:.*$", re.MULTILINE)
_OBJECT: Final = re.compile(rf"\b(?:{'|'.join(lx.OBJECTS)})\b")


@dataclass(frozen=True)
class BaseSettings:
    """What a run depends on; the same settings give the same documents in the same order."""

    steps: int = 3000
    tokens_per_batch: int = 4096
    matrix_lr: float = 0.02
    other_lr: float = 3e-3
    warmup: int = 100
    evaluation_share: float = 0.38
    documents_per_block: int = 800
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.tokens_per_batch < 512:
            raise ConfigError(
                f"steps must be at least 1 and tokens_per_batch at least 512, got {self.steps} and {self.tokens_per_batch}"
            )


@dataclass(frozen=True)
class Batch:
    """Right-padded rows: token ids and loss weights, both [rows, length]; weight 0 marks padding."""

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class StepReport:
    """Progress of one step: mean loss, and how often option letters and echoed objects were right (None: none there)."""

    step: int
    loss: float
    letters_right: float | None
    echoes_right: float | None


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, documents: list[Document]
) -> list[tuple[list[int], list[float]]]:
    """Token ids with ``<bos>`` and ``<eos>``, and a loss weight per token."""
    encoded = tokenizer([document.text for document in documents])
    rows: list[tuple[list[int], list[float]]] = []
    for index, document in enumerate(documents):
        ids = [*encoded["input_ids"][index], EOS_ID]
        judged = document.letter_offset is not None
        weights = [TRANSCRIPT_WEIGHT if judged else 1.0] * len(ids)
        for offset in echo_offsets(document.text):
            weights[encoded.char_to_token(index, offset)] = ECHO_WEIGHT * weights[0]
        if document.letter_offset is not None:
            weights[encoded.char_to_token(index, document.letter_offset)] = LETTER_WEIGHT
        rows.append((ids, weights))
    return rows


def echo_offsets(text: str) -> list[int]:
    """Character positions of object names in the assistant's lines."""
    return [
        match.start() for reply in _REPLY.finditer(text) for match in _OBJECT.finditer(text, reply.start(), reply.end())
    ]


def draw_batches(tokenizer: PreTrainedTokenizerBase, settings: BaseSettings) -> Iterator[Batch]:
    """Endless batches of about `tokens_per_batch` padded tokens, documents of like length together."""
    rng = random.Random(f"base/{settings.seed}")
    while True:
        documents = [
            draw_document(rng, evaluation_share=settings.evaluation_share) for _ in range(settings.documents_per_block)
        ]
        rows = sorted(encode_documents(tokenizer, documents), key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for row in rows:
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > settings.tokens_per_batch:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        yield from map(_pad, groups)


def _pad(rows: list[tuple[list[int], list[float]]]) -> Batch:
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for index, (row, weight) in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        weights[index, : len(row)] = torch.tensor(weight)
    return Batch(ids, weights)


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean cross entropy of the next token, and which targets were the model's first choice [rows, length - 1]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets, weight = ids[:, 1:], weights[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    right = logits.detach().argmax(-1) == targets
    return (losses * weight.flatten()).sum() / weight.sum(), right


def _share(right: Tensor, chosen: Tensor) -> float | None:
    return right[chosen].float().mean().item() if bool(chosen.any()) else None


def learning_rate_scale(step: int, settings: BaseSettings) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    warm = min(1.0, (step + 1) / settings.warmup)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))


def train_base(
    tokenizer: PreTrainedTokenizerBase,
    settings: BaseSettings,
    *,
    compiled: bool = True,
    report: Callable[[StepReport], None] | None = None,
) -> LlamaForCausalLM:
    """Train a fresh model on the document mix; `compiled` uses torch.compile (a C++ compiler is needed, 1.7x faster)."""
    model = make_model(len(tokenizer), seed=settings.seed)
    model.train()
    loss_function = torch.compile(weighted_loss, dynamic=True) if compiled else weighted_loss
    optimizer = Muon(model, matrix_lr=settings.matrix_lr, other_lr=settings.other_lr)
    batches = draw_batches(tokenizer, settings)
    for step in range(settings.steps):
        batch = next(batches)
        loss, right = loss_function(model, batch.ids, batch.weights)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(learning_rate_scale(step, settings))
        if report is not None:
            letters = _share(right, batch.weights[:, 1:] == LETTER_WEIGHT)
            report(StepReport(step, loss.item(), letters, _share(right, batch.weights[:, 1:] == ECHO_WEIGHT)))
    model.train(False)
    return model
