"""Baseline of AlignEZ on plain transformers: edits by forward hooks, and hidden states collected by forward hooks.

Written as well as plain torch allows. A layer's k edits, one after the other, cost two matrix products and not 2k passes over
the rows: the linear ones (project, boost, set, add) are folded into one map when they are attached, tanh along orthonormal
directions needs no order. Requests with directions of their own go through a batched product. Nothing of raindecode is behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

Tap = Literal["attn_out", "mlp_out", "block_out"]
Prompt = Literal["all", "last", "none"]
_LINEAR = {"project": -1.0, "boost": 1.0}  # b = sign * alpha * c


@dataclass(frozen=True)
class Edit:
    """h' = h + sum_j b_j u_j, one direction after the other, with c_j = <h so far, u_j>.

    project: b = -alpha c. boost: alpha c. set: alpha (target - c). add: alpha. tanh: alpha tanh(c).

    Attributes:
        directions: u, of any length (made 1): [k, d] for all rows of a batch, or [B, k, d].
        ops: k names.
        alphas, targets: one number for all, or [k] or [B, k]. alpha 0 leaves a row of the batch as it is.
    """

    directions: Tensor
    ops: Sequence[str]
    alphas: Tensor | float = 1.0
    targets: Tensor | float = 0.0


class Folded:
    """An edit ready to be applied in `dtype` on `device`. Its tables are [B, k, d], B = 1 where all rows share them."""

    def __init__(self, edit: Edit, dtype: torch.dtype, device: torch.device) -> None:
        u = edit.directions.detach().cpu().double()
        u = u if u.dim() == 3 else u[None]
        self.u = u / u.norm(dim=-1, keepdim=True)
        k = u.size(1)
        if len(edit.ops) != k:
            raise ValueError(f"{len(edit.ops)} operations were given for {k} directions")
        unknown = [op for op in edit.ops if op not in (*_LINEAR, "set", "add", "tanh")]
        if unknown:
            raise ValueError(f"there is no operation {unknown[0]!r}")
        alphas, targets = (_per_row(value, k) for value in (edit.alphas, edit.targets))
        self.rows = max(len(self.u), len(alphas), len(targets))
        self.gram = self.u @ self.u.transpose(1, 2)
        self.ops = tuple(edit.ops)
        self.tanh = "tanh" in self.ops
        orthonormal = bool((self.gram - torch.eye(k)).abs().max() < 1e-6)
        self.joint = self.tanh and set(self.ops) == {"tanh"} and orthonormal
        place = {"dtype": dtype, "device": device}
        if self.tanh:
            self.down = self.u.transpose(1, 2).contiguous().to(**place)  # [B, d, k]
            self.alphas, self.targets, self.gram = alphas.to(**place), targets.to(**place), self.gram.to(**place)
        else:
            fold, offset = self._folded(alphas, targets)
            self.down = (self.u.transpose(1, 2) @ fold.transpose(1, 2)).contiguous().to(**place)
            self.offset = offset.to(**place)[:, None]  # [B, 1, k]
        self.u = self.u.to(**place)

    def _folded(self, alphas: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """M [B, k, k] and m [B, k] with b = M c + m, where c_j = <h, u_j> before any edit."""
        k = len(self.ops)
        slopes, constants = (torch.zeros(self.rows, k, dtype=torch.float64) for _ in range(2))
        for j, op in enumerate(self.ops):
            alpha, target = alphas[:, j], targets[:, j]
            slopes[:, j] = _LINEAR[op] * alpha if op in _LINEAR else -alpha if op == "set" else 0.0
            constants[:, j] = alpha * target if op == "set" else alpha if op == "add" else 0.0
        fold, offset = torch.zeros(self.rows, k, k, dtype=torch.float64), torch.zeros(self.rows, k, dtype=torch.float64)
        for j in range(k):  # b_j = s_j (c_j + sum_{i<j} G_ij b_i) + t_j
            earlier = self.gram[:, :j, j].expand(self.rows, j)
            fold[:, j] = torch.einsum("bi,bik->bk", earlier, fold[:, :j])
            fold[:, j, j] += 1.0
            fold[:, j] *= slopes[:, j, None]
            offset[:, j] = slopes[:, j] * (earlier * offset[:, :j]).sum(-1) + constants[:, j]
        return fold, offset

    def apply(self, hidden: Tensor) -> Tensor:
        """[B, T, d] to [B, T, d], computed in the tables' dtype and rounded once to that of `hidden`."""
        if self.rows > 1 and len(hidden) != self.rows:
            raise ValueError(f"the edit is for a batch of {self.rows}, this one has {len(hidden)} rows")
        h = hidden.to(self.u.dtype)
        c = _product(h, self.down)
        if not self.tanh:
            b = c + self.offset
        elif self.joint:
            b = torch.tanh(c) * self.alphas[:, None]
        else:
            b = self._in_turn(c)
        if len(self.u) > 1:
            return torch.baddbmm(h, b, self.u).to(hidden.dtype)
        return torch.addmm(h.flatten(0, 1), b.flatten(0, 1), self.u[0]).view_as(h).to(hidden.dtype)

    def _in_turn(self, c: Tensor) -> Tensor:
        steps: list[Tensor] = []
        for j, op in enumerate(self.ops):
            now = c[..., j]
            for i, b in enumerate(steps):
                now = now + b * self.gram[:, i, j, None]
            alpha, target = self.alphas[:, j, None], self.targets[:, j, None]
            if op == "tanh":
                step = alpha * torch.tanh(now)
            elif op == "set":
                step = alpha * (target - now)
            else:
                step = alpha.expand_as(now) if op == "add" else _LINEAR[op] * alpha * now
            steps.append(step)
        return torch.stack(steps, dim=-1)


def _per_row(value: Tensor | float, k: int) -> Tensor:
    """[B, k] or [1, k] float64 on the cpu."""
    numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    return numbers if numbers.dim() == 2 else numbers.expand(1, k)


def _product(rows: Tensor, table: Tensor) -> Tensor:
    return rows @ table[0] if len(table) == 1 else torch.bmm(rows, table)


def module_at(model: Any, layer: int, tap: Tap) -> Any:
    """The module whose output a tap names, in models of Llama's form."""
    block = model.model.layers[layer]
    return {"attn_out": block.self_attn, "mlp_out": block.mlp, "block_out": block}[tap]


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class HookedEdits:
    """Edits of a model's hidden states while it is attached, in a `with` block or between `attach` and `remove`.

    A forward of more than one column counts as the prompt's, padded on the left; one column is a generated token.

    Args:
        edits: by layer.
        prompt: which rows of a prompt are edited; "last" is the one that the first new token is drawn from.
        dtype: of the arithmetic; None takes the model's.
    """

    def __init__(
        self, model: Any, edits: Mapping[int, Edit], tap: Tap = "mlp_out", *, prompt: Prompt = "last",
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.prompt = prompt
        self._places = [
            (module_at(model, layer, tap), Folded(edit, dtype or model.dtype, model.device))
            for layer, edit in edits.items()
        ]
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Begin to edit."""
        if self._handles:
            raise RuntimeError("these edits are attached already; remove them first, or they would act twice")
        self._handles = [module.register_forward_hook(self._hook(folded)) for module, folded in self._places]

    def remove(self) -> None:
        """The model is as it was."""
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, folded: Folded) -> Any:
        def edit(_module: Any, _args: Any, output: Any) -> Any:
            hidden = _hidden(output)
            if hidden.size(1) == 1 or self.prompt == "all":
                edited = folded.apply(hidden)
            elif self.prompt == "last":
                edited = torch.cat([hidden[:, :-1], folded.apply(hidden[:, -1:])], dim=1)
            else:
                return None
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return edit

    def __enter__(self) -> HookedEdits:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


@torch.inference_mode()
def collect(
    model: Any, input_ids: Tensor, attention_mask: Tensor, pooled: Tensor, *, layers: Sequence[int], tap: Tap,
    pool: Literal["last", "mean"] = "last",
) -> Tensor:  # fmt: skip
    """Hidden states of a padded batch of texts. The output head is not run, and no state outlives its layer.

    Args:
        input_ids, attention_mask: [B, T], padded on either side.
        pooled: [B, T] bool, the columns that are taken: an answer's tokens. At least one per row.

    Returns:
        [len(layers), B, hidden_size] float32.
    """
    positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    columns = torch.arange(pooled.size(1), device=pooled.device)
    last = torch.where(pooled, columns, -1).amax(-1)
    shares = pooled / pooled.sum(-1, keepdim=True)
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            hidden = _hidden(output)
            if pool == "last":
                found[layer] = hidden[torch.arange(len(hidden), device=hidden.device), last].float()
            else:
                found[layer] = torch.bmm(shares[:, None].float(), hidden.float())[:, 0]

        return hook

    handles = [module_at(model, layer, tap).register_forward_hook(keep(layer)) for layer in layers]
    try:
        model.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([found[layer] for layer in layers])
