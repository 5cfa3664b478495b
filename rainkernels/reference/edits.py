"""Plain PyTorch definition of the edits family: literal loops, float32 arithmetic (float64 for float64 inputs)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NORMS", "OPS", "TINY_SHARE", "add_edit_rmsnorm", "coefficient", "edit"]

# Codes in the tables' `op` and `norm`; order shared with csrc/include/rainkernels/edits.h and rainkernels/triton/edits.py.
OPS = ("project", "boost", "set", "add", "tanh")
NORMS = ("none", "preserve", "cap")
# Below this share of ||h||^2 what an edit left over is rounding noise, and stretching it to ||h|| would invent a direction.
TINY_SHARE = 2.0**-40


def coefficient(c: Tensor, op: Tensor, alpha: Tensor, target: Tensor) -> Tensor:
    """b = f(c): the step along a unit direction whose component is c. 0 where alpha is 0 or op is no code."""
    b = torch.zeros_like(c)
    values = (-alpha * c, alpha * c, alpha * (target - c), alpha, alpha * torch.tanh(c))
    for code, value in enumerate(values):
        b = torch.where(op == code, value, b)
    return torch.where(alpha == 0, torch.zeros_like(b), b)


def edit(
    x: Tensor,
    slots: Tensor,
    *,
    directions: Tensor,
    scale: Tensor,
    op: Tensor,
    alpha: Tensor,
    target: Tensor,
    norm: Tensor,
    count: Tensor | None = None,
) -> Tensor:
    """Edited copy of x, rounded once to x's dtype. Tables as in `rainkernels.ops.edits_tables`.

    Shapes:
        x [T, d];  slots [T] int32, outside the table counts as 0;  op, alpha, target [S, k];  norm [S]
        directions [S, k, d] with count [S] and scale [S, k]: one direction after the other, each sees the edits before it
        directions [k, d] with count None and scale [k]: a shared basis, all components from the unedited row
    Edge cases:
        Rows of slot 0, of an empty slot, or with every alpha 0 are copied bit for bit.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    h, live = _edited(x.to(work), slots, directions, scale, op, alpha, target, norm, count)
    return torch.where(live[:, None], h.to(x.dtype), x)


def _edited(
    h: Tensor,
    slots: Tensor,
    directions: Tensor,
    scale: Tensor,
    op: Tensor,
    alpha: Tensor,
    target: Tensor,
    norm: Tensor,
    count: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Edited rows in h's dtype, and which rows have an edit at all."""
    num_slots, k = alpha.shape
    at = torch.where((slots >= 0) & (slots < num_slots), slots, torch.zeros_like(slots)).long()
    used = torch.full_like(at, k) if count is None else count[at].long().clamp(0, k)
    a = torch.where(torch.arange(k, device=h.device) < used[:, None], alpha[at].to(h.dtype), 0.0)
    live = (at > 0) & (a != 0).any(-1)
    start, codes, t = h, op[at], target[at].to(h.dtype)
    if count is None:
        s = scale.to(h.dtype)
        b = coefficient((start @ directions.to(h.dtype).T) * s, codes, a, t)
        h = start + (b * s) @ directions.to(h.dtype)
    else:
        for j in range(k):
            u, s = directions[at, j].to(h.dtype), scale[at, j].to(h.dtype)
            b = coefficient((h * u).sum(-1) * s, codes[:, j], a[:, j], t[:, j])
            h = torch.where((j < used)[:, None], h + (b * s)[:, None] * u, h)
    return torch.where(live[:, None], _rescaled(start, h, norm[at]), start), live


def _rescaled(before: Tensor, after: Tensor, norm: Tensor) -> Tensor:
    """preserve: the row keeps its length. cap: it may only become shorter. A row that all but vanished stays as it is."""
    old, new = before.square().sum(-1), after.square().sum(-1)
    fits = torch.isfinite(old) & torch.isfinite(new) & (new > old * TINY_SHARE)
    wanted = (norm == 1) | ((norm == 2) & (new > old))
    ratio = torch.sqrt(old / torch.where(fits, new, torch.ones_like(new)))
    return torch.where((fits & wanted)[:, None], after * ratio[:, None], after)


def add_edit_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    slots: Tensor | None,
    table: dict[str, Tensor | None] | None,
    *,
    eps: float,
    tap: str = "mlp_out",
    weight_offset: float = 0.0,
    cast: str = "llama",
) -> tuple[Tensor, Tensor]:
    """Residual add with the edit inside, rounded once, then RMSNorm of the rounded sum.

    Shapes:
        x, residual [T, d];  weight [d];  table: the keyword arguments of `edit`, or None
    Returns:
        normed [T, d], and the new residual [T, d]; both in x's dtype, nothing is written in place
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    h, r = x.to(work), residual.to(work)
    if table is not None and slots is not None:
        if tap == "mlp_out":
            h = r + _edited(h, slots, **table)[0]  # type: ignore[arg-type]
        else:
            h = _edited(r + h, slots, **table)[0]  # type: ignore[arg-type]
    else:
        h = r + h
    summed = h.to(x.dtype)
    h = summed.to(work)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    w = weight.to(work) if weight_offset == 0.0 else weight.to(work) + weight_offset
    normed = (w * h) if cast == "gemma" else (w * h.to(x.dtype).to(work))
    return normed.to(x.dtype), summed
