"""Schemas of the tree ops for torch's dispatcher, with the functions that tell it their output shapes.

A forest is passed as its tensors and its constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rainkernels._forest import TreeConfig

__all__ = ["SCHEMAS"]


def _fake_ints(fields: Sequence[Tensor], config: Sequence[float], tree_ids: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(tree_ids)


def _fake_select(
    fields: Sequence[Tensor], config: Sequence[float], tree_ids: Tensor, skip_node: Tensor | None = None
) -> tuple[Tensor, ...]:
    path = tree_ids.new_empty((tree_ids.shape[0], TreeConfig.from_floats(config).max_depth))
    return torch.empty_like(tree_ids), torch.empty_like(tree_ids), path, torch.empty_like(tree_ids)


def _fake_best_child(fields: Sequence[Tensor], config: Sequence[float], tree_ids: Tensor) -> tuple[Tensor, ...]:
    real = fields[0].new_empty(tree_ids.shape)
    return torch.empty_like(tree_ids), real, torch.empty_like(tree_ids), torch.empty_like(real)


def _fake_reroot(fields: Sequence[Tensor], config: Sequence[float], tree_ids: Tensor, slots: Tensor) -> Tensor:
    shape = (tree_ids.shape[0], TreeConfig.from_floats(config).num_slots)
    return tree_ids.new_empty(shape, dtype=torch.bool)


def _fake_nothing(fields: Sequence[Tensor], config: Sequence[float], *_: Any) -> None:
    return None


SCHEMAS: dict[str, tuple[str, Callable[..., Any]]] = {
    "tree_select": ("(Tensor[] fields, float[] config, Tensor tree_ids, Tensor? skip_node=None)"
                    " -> (Tensor, Tensor, Tensor, Tensor)", _fake_select),
    "tree_expand": ("(Tensor(a!)[] fields, float[] config, Tensor tree_ids, Tensor nodes, Tensor priors,"
                    " Tensor num_children, Tensor set_length) -> Tensor", _fake_ints),
    "tree_add_child": ("(Tensor(a!)[] fields, float[] config, Tensor tree_ids, Tensor nodes, Tensor prior,"
                       " *, bool mix=False) -> Tensor", _fake_ints),
    "tree_backup": ("(Tensor(a!)[] fields, float[] config, Tensor tree_ids, Tensor path, Tensor depth, Tensor value,"
                    " Tensor? embedding=None) -> Tensor", _fake_ints),
    "tree_best_child": ("(Tensor[] fields, float[] config, Tensor tree_ids) -> (Tensor, Tensor, Tensor, Tensor)", _fake_best_child),
    "tree_reroot": ("(Tensor(a!)[] fields, float[] config, Tensor tree_ids, Tensor slots) -> Tensor", _fake_reroot),
    "tree_mark_in_flight": ("(Tensor(a!)[] fields, float[] config, Tensor tree_ids, Tensor path, Tensor depth) -> ()", _fake_nothing),
    "tree_unmark_in_flight": ("(Tensor(a!)[] fields, float[] config, Tensor tree_ids, Tensor path, Tensor depth) -> ()", _fake_nothing),
}  # fmt: skip
