"""Edits by plain transformers: a float64 forward with hooks that do the literal loop, row by row."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from models import stock_copy
from torch import Tensor, nn
from transformers import PreTrainedModel

from raindecode.hidden_edits import Site, Stage

Stages = Sequence[tuple[Site, Stage]]


def literal(h: Tensor, stage: Stage) -> Tensor:
    """One row [d] float64 after a stage, direction by direction, as the formulas say."""
    before = h.norm()
    for u32, op, alpha, target in zip(stage.directions, stage.ops, stage.alphas, stage.targets, strict=True):
        u = u32.double() / u32.double().norm()
        c = h @ u
        step = {
            "project": -alpha * c, "boost": alpha * c, "set": alpha * (target - c), "add": torch.tensor(alpha).double(),
            "tanh": alpha * torch.tanh(c),
        }[op]  # fmt: skip
        h = h + step * u
    if stage.norm == "preserve" or (stage.norm == "cap" and h.norm() > before):
        h = h * (before / h.norm())
    return h


def module_of(model: PreTrainedModel, site: Site) -> nn.Module:
    base: Any = model.base_model
    layer = (base.layers if hasattr(base, "layers") else base.h)[site.layer]
    names = {"attn_out": ("self_attn", "attn", "attention"), "mlp_out": ("mlp",), "block_out": ()}[site.tap]
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), layer)


def edited_logits(model: PreTrainedModel, ids: Sequence[int], stages: Stages, positions: Sequence[int]) -> Tensor:
    """Logits [len(ids), vocabulary] float64, the rows at `positions` edited."""
    twin = copy.deepcopy(stock_copy(model)).double()

    def hook(stage: Stage) -> Any:
        def edit(_module: nn.Module, _args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            for at in positions:
                states[0, at] = literal(states[0, at], stage)

        return edit

    for site, stage in stages:
        module_of(twin, site).register_forward_hook(hook(stage))
    with torch.no_grad():
        logits: Tensor = twin(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits


def unit(k: int, d: int, seed: int) -> Tensor:
    vectors = torch.randn(k, d, generator=torch.Generator().manual_seed(seed))
    return vectors / vectors.norm(dim=-1, keepdim=True)
