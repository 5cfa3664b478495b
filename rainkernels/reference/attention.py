"""Plain PyTorch definition of the attention family: gather every row's path, mask, softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PlanFault", "merge_state", "path_slots", "plan_fault", "tree_attention"]

# Largest gathered K block, in elements: bounds the memory of long prefills.
_GATHER_ELEMENTS = 1 << 24


class PlanFault(NamedTuple):
    """First broken rule of a plan's inputs: which one, and at which segment, slot entry or row."""

    rule: str
    at: int


def plan_fault(
    segment_parent: Tensor,
    segment_start: Tensor,
    segment_slots_indptr: Tensor,
    slots: Tensor,
    row_segment: Tensor,
    row_position: Tensor,
) -> PlanFault | None:
    """The first rule the segments or rows break, or None. Rules as in `rainkernels.ops.attention.attention_plan`."""
    parent, start, indptr = segment_parent.tolist(), segment_start.tolist(), segment_slots_indptr.tolist()
    if indptr[0] != 0:
        return PlanFault("indptr", 0)
    for s, up in enumerate(parent):
        if not -1 <= up < s:
            return PlanFault("parent", s)
        if indptr[s + 1] < indptr[s] or indptr[s + 1] > slots.numel():
            return PlanFault("indptr", s + 1)
        if start[s] != (0 if up < 0 else start[up] + indptr[up + 1] - indptr[up]):
            return PlanFault("start", s)
    if indptr[-1] != slots.numel():
        return PlanFault("indptr", len(parent))
    for i, slot in enumerate(slots.tolist()):
        if slot < 0:
            return PlanFault("slot", i)
    for t, (s, p) in enumerate(zip(row_segment.tolist(), row_position.tolist(), strict=True)):
        if not -1 <= s < len(parent):
            return PlanFault("row_segment", t)
        if s >= 0 and not start[s] <= p < start[s] + indptr[s + 1] - indptr[s]:
            return PlanFault("row_position", t)
    return None


def path_slots(
    segment_parent: Tensor, segment_slots_indptr: Tensor, slots: Tensor, row_segment: Tensor, row_position: Tensor
) -> tuple[Tensor, Tensor]:
    """Slots of every row's keys in position order.

    Returns:
        index:  [num_rows, longest] int64, 0 past a row's end;  length: [num_rows] int64, keys at positions <= the row's
    """
    indptr, parent = segment_slots_indptr.tolist(), segment_parent.tolist()
    paths: dict[int, list[int]] = {-1: []}
    pool = slots.tolist()

    def path(s: int) -> list[int]:
        chain = []
        while s not in paths:
            chain.append(s)
            s = parent[s]
        for s in reversed(chain):
            paths[s] = paths[parent[s]] + pool[indptr[s] : indptr[s + 1]]
        return paths[chain[0] if chain else s]

    at = zip(row_segment.tolist(), row_position.tolist(), strict=True)
    rows = [path(s)[: p + 1] if s >= 0 else [] for s, p in at]
    longest = max((len(r) for r in rows), default=0)
    index = torch.zeros((len(rows), longest), dtype=torch.long)
    for t, row in enumerate(rows):
        index[t, : len(row)] = torch.tensor(row, dtype=torch.long)
    return index, torch.tensor([len(r) for r in rows], dtype=torch.long)


def tree_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    index: Tensor,
    length: Tensor,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    sliding_window: int = 0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Masked softmax over gathered keys, in float64 for float64 inputs and in float32 for all others.

    Shapes:
        q [T, Hq, D];  k_pool [S, Hkv, D];  v_pool [S, Hkv, Dv];  index, length: from `path_slots`;  sinks [Hq]
    Returns:
        out [T, Hq, Dv] in q's dtype;  lse [T, Hq], natural log, sink included, -inf where no key is visible
    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros((q.shape[0], q.shape[1], v_pool.shape[2]), dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=work, device=q.device)
    width = max(1, index.shape[1] * k_pool.shape[1] * max(k_pool.shape[2], v_pool.shape[2]))
    step = max(1, _GATHER_ELEMENTS // width)
    for r in range(0, q.shape[0], step):
        rows = slice(r, r + step)
        # Sorted callers put short rows together, so each block gathers only as far as its longest row.
        longest = int(length[rows].max())
        at = index[rows, :longest].to(q.device)
        out[rows], lse[rows] = _attend(
            q[rows].to(work), k_pool[at].to(work), v_pool[at].to(work), length[rows].to(q.device),
            softmax_scale, softcap, sliding_window, None if sinks is None else sinks.to(work),
        )  # fmt: skip
    return out, lse


def _attend(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, scale: float, softcap: float, window: int, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D], k [T, L, Hkv, D], v [T, L, Hkv, Dv], length [T] -> out [T, Hq, Dv], lse [T, Hq]."""
    num_kv_heads = k.shape[2]
    grouped = q.reshape(q.shape[0], num_kv_heads, q.shape[1] // num_kv_heads, q.shape[2])
    scores = torch.einsum("thgd,tlhd->thgl", grouped, k).flatten(1, 2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(k.shape[1], device=q.device)
    visible = position < length[:, None]
    if window > 0:
        visible &= position >= length[:, None] - window
    scores = scores.masked_fill(~visible[:, None, :], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1) if k.shape[1] else torch.full_like(q[..., 0], float("-inf"))
    empty = length[:, None] == 0
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks).masked_fill(empty, float("-inf"))
    weights = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None])
    out = torch.einsum("thgl,tlhd->thgd", weights.view(*grouped.shape[:3], -1), v).flatten(1, 2)
    return out, lse


def merge_state(v_a: Tensor, lse_a: Tensor, v_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partials over disjoint key sets, with the edge cases of `rainkernels.ops.attention.merge_state`."""
    work = torch.float64 if v_a.dtype == torch.float64 else torch.float32
    lse = torch.logaddexp(lse_a, lse_b)
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    # An empty side counts as zero whatever its v holds.
    parts = [
        torch.where((part == float("-inf"))[..., None], 0.0, torch.exp(part - shift)[..., None] * v.to(work))
        for v, part in ((v_a, lse_a), (v_b, lse_b))
    ]
    return (parts[0] + parts[1]).to(v_a.dtype), lse
