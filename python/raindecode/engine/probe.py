"""Probes run once when a model is loaded: does the engine compute what the stock model does, and row by row alike?"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from raindecode.engine.branch import Ledger
from raindecode.engine.engine import Engine, LogitsRow, Task
from raindecode.engine.model_runner import architecture
from raindecode.engine.rotary import NotFusible
from raindecode.engine.types import Want
from raindecode.errors import UnsupportedModelError

_log = logging.getLogger("raindecode")
_STEM, _TAILS = 7, (3, 2)  # a prefix and two branches of unequal length
_ROW_COUNTS = (1, 2, 3, 5, 8, 13, 33, 64)


def stock_logits(model: PreTrainedModel) -> list[LogitsRow]:
    """Logits of the unmodified model after the probe's sequences, computed before its attention is switched.

    Eager attention is the definition: other implementations leave out what they cannot do, such as the soft-cap of Gemma 2
    under scaled_dot_product_attention (seen with transformers 5.17).
    """
    with suppress(ValueError, NotImplementedError, ImportError):  # a model without it keeps its own
        model.set_attn_implementation("eager")
    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([sequence], device=model.device), use_cache=False)
            .logits[0, -1]
            .float()
            .cpu()
            .numpy()
            for sequence in _sequences(model)
        ]


def check_against_stock(engine: Engine, expected: Sequence[LogitsRow]) -> None:
    """Compare two branches over a shared stem, run in one forward, with the stock model.

    Raises:
        UnsupportedModelError: they differ, so that something in the architecture is lost over a tree; or it does not run.
    """
    model = engine.runner.model
    try:
        got = _logits(engine, _sequences(model))
    except UnsupportedModelError:
        raise
    except Exception as cause:
        raise UnsupportedModelError(f"{architecture(model)} does not run over a KV tree: {cause}") from cause
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    for ours, stock in zip(got, expected, strict=True):
        error = _difference(ours, stock)
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"{architecture(model)}: logits over a branching KV tree differ from the stock model by {error:.1e} (relative): "
                "it keeps state, a mask or a bias that the engine does not carry, and is refused"
            )


def fuse_if_equal(engine: Engine) -> None:
    """Let the engine's model run as a FusedModel where it is of that form and gives the same logits, up to rounding."""
    runner = engine.runner
    sequences = _sequences(runner.model)
    expected = _logits(engine, sequences)
    try:
        runner.fuse()
    except NotFusible as reason:
        _log.debug("%s runs as transformers runs it: %s", architecture(runner.model), reason)
        return
    got = _logits(engine, sequences)
    tolerance = 1e-4 if runner.model.dtype == torch.float32 else 0.05
    error = max(_difference(*pair) for pair in zip(got, expected, strict=True))
    if not error <= tolerance:
        runner.fused = None
        _log.debug("%s runs as transformers runs it: fused it differs by %.1e", architecture(runner.model), error)


def _difference(got: LogitsRow, expected: LogitsRow) -> float:
    """Largest difference, relative to the largest number."""
    return float(np.abs(got - expected).max()) / max(1.0, float(np.abs(expected).max()))


def rows_are_invariant(engine: Engine) -> bool:
    """True when rows keep their bits whatever the number of rows in the forward."""
    model = engine.runner.model
    vocabulary = model.config.get_text_config().vocab_size
    stem = _tokens(_STEM, vocabulary, 1)
    paths = [[*stem, int(t)] for t in _tokens(max(_ROW_COUNTS), vocabulary, 2)]
    whole = _logits(engine, paths)
    for count in _ROW_COUNTS:
        for first in range(0, len(paths), max(count, len(paths) // 2)):
            part = _logits(engine, paths[first : first + count])
            if any(not np.array_equal(a, b) for a, b in zip(part, whole[first:], strict=False)):
                return False
    return True


def _sequences(model: PreTrainedModel) -> list[list[int]]:
    vocabulary = model.config.get_text_config().vocab_size
    stem = _tokens(_STEM, vocabulary, 1)
    return [stem + _tokens(n, vocabulary, 3 + n) for n in _TAILS]


def _tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, vocabulary, count).tolist()
    return tokens


def _logits(engine: Engine, paths: Sequence[Sequence[int]]) -> list[LogitsRow]:
    """Logits after each path, all run in one step; nothing stays cached."""

    def search() -> Generator[Any, Any, list[LogitsRow]]:
        answers = yield [Want(engine.open(ledger, path), logits=True) for path in paths]
        return [answer.logits for answer in answers]

    ledger = Ledger()
    (task,) = engine.run([Task(search(), ledger)])
    engine.tree.clear()
    if task.error is not None:
        raise task.error
    result: list[LogitsRow] = task.result
    return result
