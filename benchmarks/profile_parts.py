"""The parts of an engine's step, measured while it runs: used by profile_step.py, which says what they are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raindecode import Decoder
from raindecode.engine.batch import TokenBatch
from raindecode.errors import ConfigError
from rainkernels.ops.attention import tree_attention
from rainkernels.ops.decoder import decoder_lane, linear_rows

Row = dict[str, Any]
PARTS = ("products", "attention", "kernels", "batch", "plan", "sample", "search")
_HOST = PARTS[3:]  # outside the forward


class Alone:
    """The products and the attention of a forward, run by themselves.

    Raises:
        ConfigError: the model does not run as one native call here, so its products are not known.
    """

    def __init__(self, decoder: Decoder) -> None:
        fused = decoder.engine.runner.fused
        if fused is None or decoder_lane() != "cpu":
            raise ConfigError(
                f"{decoder.name} does not run as one native call here; allowed: a model of Llama's form and the compiled extension"
            )
        self.weights = fused.weights
        self._from, self._to = torch.empty(0), torch.empty(0)  # memory that stays, as the engine's own does

    def products(self, rows: int, wanted: int) -> float:
        """Seconds of all matrix products of a forward of `rows` rows, `wanted` of them with logits."""
        w = self.weights
        linears = [(part, rows) for b in w.blocks for part in (b.qkv, b.out, b.gate_up, b.down)] + [(w.head, wanted)]
        spent = 0.0
        for linear, count in linears:
            out, of = linear.weight.shape
            self._grow(count * of, count * out)
            x, y = self._from[: count * of].view(count, of), self._to[: count * out].view(count, out)
            began = time.perf_counter()
            linear_rows(x, linear, y)
            spent += time.perf_counter() - began
        return spent

    def attention(self, batch: TokenBatch, pools: dict[int, tuple[Tensor, Tensor]]) -> float:
        """Seconds of attention of all layers, over the keys and values the forward has left."""
        w, rows = self.weights, batch.num_rows
        heads, out_size = w.num_qo_heads + 2 * w.num_kv_heads, w.num_qo_heads * w.head_dim
        self._grow(rows * heads * w.head_dim, rows * out_size)
        q = self._from[: rows * heads * w.head_dim].view(rows, heads, w.head_dim)[:, : w.num_qo_heads]
        out = self._to[: rows * out_size].view(rows, w.num_qo_heads, w.head_dim)
        spent = 0.0
        for index, block in enumerate((w.blocks[0], *w.blocks)):  # the first call checks the plan: not counted
            began = time.perf_counter()
            tree_attention(
                q, *pools[max(0, index - 1)], batch.plan, softmax_scale=block.softmax_scale, softcap=block.softcap,
                sliding_window=block.sliding_window, sinks=block.sinks, out=out,
            )  # fmt: skip
            spent += time.perf_counter() - began if index else 0.0
        return spent

    def _grow(self, of: int, to: int) -> None:
        if len(self._from) < of:
            self._from = torch.randn(of)
        if len(self._to) < to:
            self._to = torch.randn(to)  # touched, or the first product would pay for the pages


@dataclass
class Step:
    """Rows of a step, those with logits, and seconds: of all of it and of its parts."""

    rows: int = 0
    wanted: int = 0
    seconds: float = 0.0
    forward: float = 0.0
    products: float = 0.0
    attention: float = 0.0
    plan: float = 0.0
    model: float = 0.0
    sample: float = 0.0
    aside: float = 0.0  # measuring, part of nothing

    def parts(self) -> dict[str, float]:
        """Seconds by PARTS."""
        return {
            "products": self.products, "attention": self.attention,
            "kernels": self.forward - self.products - self.attention, "batch": self.model - self.forward,
            "plan": self.plan, "sample": self.sample, "search": self.seconds - self.plan - self.model - self.sample,
        }  # fmt: skip


@contextmanager
def watched(decoder: Decoder) -> Iterator[list[Step]]:
    """Measure the steps of a decoder; the list grows by each step that runs a forward.

    Raises:
        ConfigError: as Alone.
    """
    engine: Any = decoder.engine
    runner, alone = engine.runner, Alone(decoder)
    steps: list[Step] = []
    now = Step()
    forward, step, book = runner.forward, engine.step, engine._book

    def watched_forward(batch: TokenBatch, wanted: Sequence[int]) -> Tensor:
        began = time.perf_counter()
        logits: Tensor = forward(batch, wanted)
        done = time.perf_counter()
        now.forward += done - began
        with torch.inference_mode():
            now.products += alone.products(batch.num_rows, max(1, len(wanted)))
            now.attention += alone.attention(batch, runner.pool.layers)
        now.rows += batch.num_rows
        now.wanted += len(wanted)
        now.aside += time.perf_counter() - done
        return logits

    def watched_book(plan: Any, seconds: dict[str, float]) -> None:
        now.plan, now.model, now.sample = seconds["plan"], seconds["model"] - now.aside, seconds["sample"]
        book(plan, seconds)

    def watched_step() -> Any:
        nonlocal now
        now = Step()
        began = time.perf_counter()
        ended = step()
        now.seconds = time.perf_counter() - began - now.aside
        if now.rows:
            steps.append(now)
        return ended

    runner.forward, engine.step, engine._book = watched_forward, watched_step, watched_book
    try:
        yield steps
    finally:
        del runner.forward, engine.step, engine._book  # what is left are the methods


def medians(steps: Sequence[Step]) -> Row:
    """Alike steps as one: the median step, and medians of the parts' shares, which noise slower than a step leaves alone."""
    each = [(step.parts(), step.seconds) for step in steps]
    shares = {name: statistics.median(parts[name] / seconds for parts, seconds in each) for name in PARTS}
    return _case(steps, statistics.median(step.seconds for step in steps), shares)


def sums(steps: Sequence[Step]) -> Row:
    """A run's steps as one: the mean step, and the parts' shares of all seconds."""
    each, total = [step.parts() for step in steps], sum(step.seconds for step in steps)
    shares = {name: sum(parts[name] for parts in each) / total for name in PARTS}
    return _case(steps, total / len(steps), shares)


def _case(steps: Sequence[Step], seconds: float, shares: dict[str, float]) -> Row:
    return {
        "steps": len(steps), "rows": round(statistics.fmean(step.rows for step in steps), 1),
        "wanted": round(statistics.fmean(step.wanted for step in steps), 1), "step_ms": round(seconds * 1e3, 4),
        "shares": {name: round(share, 4) for name, share in shares.items()},
        "overhead": round(1 - shares["products"], 4), "host": round(sum(shares[name] for name in _HOST), 4),
    }  # fmt: skip
