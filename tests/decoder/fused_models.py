"""What the tests of FusedModel share."""

from __future__ import annotations

from typing import Any

import numpy as np
from models import logits_after, random_tokens, stock_row
from torch import Tensor, nn
from transformers import PreTrainedModel

from raindecode.engine.engine import Engine
from raindecode.engine.fused_model import FusedModel

TOLERANCE = 1e-5  # relative to the largest logit
PATHS = [random_tokens(300, 1), random_tokens(9, 2), random_tokens(1, 3)]


def fused(engine: Engine) -> FusedModel:
    model = engine.runner.fused
    assert model is not None
    assert model.is_current
    return model


def error(got: Any, expected: Any) -> float:
    return float(np.abs(got - expected).max() / max(1.0, np.abs(expected).max()))


def assert_equals_stock(engine: Engine, stock: PreTrainedModel, paths: list[list[int]] = PATHS) -> None:
    for path, row in zip(paths, logits_after(engine, paths), strict=True):
        assert error(row, stock_row(stock, path)) <= TOLERANCE, len(path)


def part(model: PreTrainedModel, layer: int = 0) -> Any:
    return model.base_model.layers[layer]


class Tripled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 3.0 * weight


def triple_forward(module: nn.Module) -> None:
    plain = module.forward
    module.forward = lambda *args: 3.0 * plain(*args)  # type: ignore[method-assign]
