"""Probes run once when a model is loaded: does the engine compute what the stock model does, and row by row alike?"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from raindecode.engine.batch import TokenBatch
from raindecode.engine.branch import Ledger
from raindecode.engine.engine import Engine
from raindecode.engine.logit_rows import HostRow
from raindecode.engine.model_runner import ModelRunner, architecture
from raindecode.engine.rotary import NotFusible
from raindecode.engine.task import Task
from raindecode.engine.types import Search, Want
from raindecode.errors import UnsupportedModelError
from raindecode.mixture import Mix
from rainkernels.ops.attention import attention_plan

_log = logging.getLogger("raindecode")
_STEM, _TAILS = 7, (3, 2)  # a prefix and two branches of unequal length
_FAR, _FAR_ROWS = 4096, 24  # positions where a config names no context; rows spread over them
_ROW_COUNTS = (1, 2, 3, 5, 8, 13, 33, 64)


def stock_logits(model: PreTrainedModel) -> list[HostRow]:
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


def check_against_stock(engine: Engine, expected: Sequence[HostRow]) -> None:
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
    """Let the engine's model run as a FusedModel where it is of that form and gives the same logits, up to rounding.

    Every adapter is compared as well.
    """
    runner = engine.runner
    sequences = _sequences(runner.model)
    members = range(runner.num_members)
    expected = [row for member in members for row in _logits(engine, sequences, member)]
    try:
        runner.fuse()
    except NotFusible as reason:
        _log.debug("%s runs as transformers runs it: %s", architecture(runner.model), reason)
        return
    fused, runner.fused = runner.fused, None
    expected += _far_logits(runner)
    runner.fused = fused
    got = [row for member in members for row in _logits(engine, sequences, member)] + _far_logits(runner)
    tolerance = 1e-4 if runner.model.dtype == torch.float32 else 0.05
    errors = [_difference(*pair) for pair in zip(got, expected, strict=True)]
    error = float(np.max(errors))  # NaN stays NaN
    if not error <= tolerance:
        runner.fused = None
        _log.debug("%s runs as transformers runs it: fused it differs by %.1e", architecture(runner.model), error)


def _far_logits(runner: ModelRunner) -> list[HostRow]:
    """Logits of a short path whose position ids are spread up to the model's context.

    Some models scale attention by the position, from some position on (Ministral 3); a short path does not show it.
    """
    context = int(getattr(runner.model.config.get_text_config(), "max_position_embeddings", 0) or _FAR)
    spread = sorted({int(p) for p in np.geomspace(1, max(context - 1, 1), _FAR_ROWS)})
    rows = len(spread)
    ids = torch.tensor([_tokens(rows, runner.model.config.get_text_config().vocab_size, 4)], device=runner.device)
    slots = torch.arange(1, rows + 1, dtype=torch.int32)
    plan = attention_plan(
        segment_parent=torch.tensor([-1], dtype=torch.int32),
        segment_start=torch.tensor([0], dtype=torch.int32),
        segment_slots_indptr=torch.tensor([0, rows], dtype=torch.int32),
        slots=slots,
        row_segment=torch.zeros(rows, dtype=torch.int32),
        row_position=torch.arange(rows, dtype=torch.int32),
    )
    positions = torch.tensor(spread, device=runner.device)
    fused = runner.fused
    if fused is not None:  # its table need not reach that far for a few rows
        table, fused.rotary = fused.rotary, fused.rotary.renumbered(positions)
        positions = torch.arange(rows, device=runner.device)
    batch = TokenBatch(ids, positions[None], slots.to(runner.device), plan, {}, int(positions.max()))
    try:
        return list(runner.forward(batch, range(rows)).float().cpu().numpy())
    finally:
        if fused is not None:
            fused.rotary = table


def _difference(got: HostRow, expected: HostRow) -> float:
    """Largest difference, relative to the largest number."""
    return float(np.abs(got - expected).max()) / max(1.0, float(np.abs(expected).max()))


def rows_are_invariant(engine: Engine) -> bool:
    """True when rows keep their bits whatever the number of rows in the forward, of every adapter too and beside its base."""
    vocabulary = engine.runner.model.config.get_text_config().vocab_size
    stem, tokens = _tokens(_STEM, vocabulary, 1), _tokens(max(_ROW_COUNTS), vocabulary, 2)
    everyone = range(engine.runner.num_members)
    companies = [[member] for member in everyone] + [list(everyone)] * (len(everyone) > 1)
    whole = {member: _after_stem(engine, stem, tokens, [member])[0] for member in everyone}
    for count in _ROW_COUNTS:
        for first in range(0, len(tokens), max(count, len(tokens) // 2)):
            for members in companies:
                parts = _after_stem(engine, stem, tokens[first : first + count], members)
                for member, rows in zip(members, parts, strict=True):
                    if any(not np.array_equal(a, b) for a, b in zip(rows, whole[member][first:], strict=False)):
                        return False
    return True


def _after_stem(
    engine: Engine, stem: Sequence[int], tokens: Sequence[int], members: Sequence[int]
) -> list[list[HostRow]]:
    """Logits after `stem` and each of `tokens`, by member; the stem has run before, so the last forward has their rows only."""

    def search() -> Generator[Any, Any, list[list[HostRow]]]:
        stems = [engine.open(ledger, stem, _alone(engine, member)) for member in members]
        yield [Want(branch, top=1) for branch in stems]
        tips = [branch.fork() for branch in stems for _ in tokens]
        for tip, token in zip(tips, list(tokens) * len(stems), strict=True):
            tip.append([token])
        answers = yield [Want(tip, logits=True) for tip in tips]
        rows = [answer.logits for answer in answers]
        return [rows[i : i + len(tokens)] for i in range(0, len(rows), len(tokens))]

    ledger = Ledger()
    result: list[list[HostRow]] = _result(engine, search(), ledger)
    return result


def _sequences(model: PreTrainedModel) -> list[list[int]]:
    vocabulary = model.config.get_text_config().vocab_size
    stem = _tokens(_STEM, vocabulary, 1)
    return [stem + _tokens(n, vocabulary, 3 + n) for n in _TAILS]


def _tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, vocabulary, count).tolist()
    return tokens


def _logits(engine: Engine, paths: Sequence[Sequence[int]], model: int = 0) -> list[HostRow]:
    """Logits of one of the engine's models after each path, all run in one step; nothing stays cached."""

    def search() -> Generator[Any, Any, list[HostRow]]:
        answers = yield [Want(engine.open(ledger, path, _alone(engine, model)), logits=True) for path in paths]
        return [answer.logits for answer in answers]

    ledger = Ledger()
    result: list[HostRow] = _result(engine, search(), ledger)
    return result


def _alone(engine: Engine, model: int) -> Mix:
    return Mix(tuple(float(i == model) for i in range(len(engine.models))))


def _result(engine: Engine, search: Search, ledger: Ledger) -> Any:
    """What a search returns; nothing stays cached."""
    (task,) = engine.run([Task(search, ledger)])
    engine.tree.clear()
    if task.error is not None:
        raise task.error
    return task.result
