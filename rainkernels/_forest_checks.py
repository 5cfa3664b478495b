"""Checks of a forest's contents, for tensors that come from outside: the kernels follow these indices unasked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rainkernels.errors import RangeError


def check_contents(
    fields: Mapping[str, Tensor],
    *,
    max_rows: int,
    max_children: int,
    max_embeddings: int,
    max_depth: int,
    none: int,
    pinned: int,
) -> None:
    """Raise RangeError, naming the field, unless every index and counter leads inside the tensors.

    First each value by itself, then what the ops rely on together: a node and its row name each other, no path is longer
    than max_depth, and the stacks of free ids have room for all ids in use.
    """
    num_rows = max_rows + 1
    num_slots = num_rows * max_children
    header = fields["header"]
    largest = torch.iinfo(torch.int32).max
    ranges: tuple[tuple[str, Tensor, int, int], ...] = (
        ("child_row", fields["child_row"], none, num_rows - 1),
        ("embedding_of", fields["embedding_of"], none, max_embeddings - 1),
        ("owner", fields["owner"], pinned, num_slots - 1),
        ("count", fields["count"], 0, max_children),
        ("free_rows", fields["free_rows"], 1, num_rows - 1),
        ("free_embeddings", fields["free_embeddings"], 0, max_embeddings - 1),
        ("header root", header[:, 0], 0, num_slots - 1),
        ("header free rows", header[:, 1], 0, max_rows),
        ("header free embeddings", header[:, 2], 0, max_embeddings),
        ("header in_flight", header[:, 3], 0, largest),
        ("direct_visits", fields["direct_visits"], 0, largest),
        ("in_flight", fields["in_flight"], 0, largest),
        ("set_length", fields["set_length"], 0, largest),
    )
    for name, tensor, low, high in ranges:
        if tensor.numel() == 0:
            continue
        least, most = (int(x) for x in torch.aminmax(tensor))
        if least < low or most > high:
            given = least if least < low else most
            raise RangeError(
                f"forest field {name} holds {given}, allowed: {low} to {high}; pass a forest's own tensors"
            )
    _check_links(fields, max_children, max_depth)
    _check_stacks(fields, max_embeddings, none)


def _check_links(fields: Mapping[str, Tensor], max_children: int, max_depth: int) -> None:
    child_row, owner, count = fields["child_row"].long(), fields["owner"].long(), fields["count"].long()
    root = fields["header"][:, :1].long()
    slots = torch.arange(child_row.shape[1], device=child_row.device).expand_as(child_row)
    rows = slots // max_children
    live = (owner.gather(1, rows) >= 0) & (slots % max_children < count.gather(1, rows)) | (slots == root)
    below = child_row.clamp_min(0)
    inner = live & (child_row >= 0)
    _refuse(inner & (owner.gather(1, below) != slots), "child_row names a row that another node owns")
    _refuse(inner & (count.gather(1, below) == 0), "count is 0 for the row of an inner node")
    up = owner
    for _ in range(max_depth - 2):
        climbing = (up >= 0) & (up != root)
        if not bool(climbing.any()):
            break
        up = torch.where(climbing, owner.gather(1, up.clamp_min(0) // max_children), -1)
    _refuse(
        (up >= 0) & (up != root) if max_depth > 1 else up >= 0, "owner gives a path longer than max_depth, or a ring"
    )


def _check_stacks(fields: Mapping[str, Tensor], max_embeddings: int, none: int) -> None:
    owner, stack, top = fields["owner"], fields["free_rows"].long(), fields["header"][:, 1:2]
    free = torch.arange(stack.shape[1], device=stack.device) < top
    uses = (owner != none).to(torch.int32)
    uses[:, 0] = 0
    uses.scatter_add_(1, stack, free.to(torch.int32))
    _refuse(uses > 1, "free_rows holds a row that is in use or free already")
    held = (fields["embedding_of"] >= 0).sum(1) + fields["header"][:, 2]
    _refuse(held > max_embeddings, "embedding_of and free_embeddings hold more ids than max_embeddings")


def _refuse(wrong: Tensor, reason: str) -> None:
    if bool(wrong.any()):
        tree = int(wrong.reshape(wrong.shape[0], -1).any(1).nonzero()[0])
        raise RangeError(f"forest field {reason} (tree {tree}): pass a forest's own tensors, all of one moment")
