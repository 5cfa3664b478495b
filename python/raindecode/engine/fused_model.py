"""FusedModel: the blocks of a Llama-like transformers model, run as few operations over a TokenBatch.

transformers stays the model library: weights, rotary tables and activations are its own, and its forward is what the fused
one is compared with when a model is loaded (probe.py). Here q, k and v (and gate and up) are one product each, residual adds
are fused with the norms, and nothing is dispatched through modules. On a small model or a fast GPU that is most of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel

from raindecode.engine.attention import AttentionOptions, TreeContext, attend
from raindecode.engine.batch import TokenBatch
from raindecode.engine.rotary import NotFusible, RotaryTable
from rainkernels.ops.edits import add_edit_rmsnorm

_BLOCK = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass(frozen=True)
class _Norm:
    """RMSNorm: weight times the normalised row."""

    weight: Tensor
    eps: float

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x; the norm of the sum."""
        return add_edit_rmsnorm(x, residual, self.weight, None, None, eps=self.eps).normed

    def heads(self, x: Tensor) -> Tensor:
        """The norm of every head's row of `x` [T, heads, head_dim]."""
        rows = x.reshape(-1, x.shape[-1])
        return self.add(rows, torch.zeros_like(rows)).view(x.shape)


@dataclass(frozen=True)
class _Product:
    """One or several nn.Linear over the same input as one product."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class _Block:
    index: int
    options: AttentionOptions
    attention_norm: _Norm
    qkv: _Product
    head_norms: tuple[_Norm, _Norm] | None
    out: _Product
    mlp_norm: _Norm
    gate_up: _Product
    act: nn.Module
    down: _Product


class FusedModel:
    """See the module's text.

    Raises:
        NotFusible: the model is not of this form; the message says where.
    """

    def __init__(self, model: PreTrainedModel, options: dict[int, AttentionOptions]) -> None:
        base = model.base_model
        config = model.config.get_text_config()
        _expect(base, {"embed_tokens", "layers", "norm", "rotary_emb"})
        self._base = base
        self.head_dim = int(base.layers[0].self_attn.head_dim)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.rotary = RotaryTable(base.rotary_emb, config, self.head_dim, model.dtype, model.device)
        _plain_linear(model.get_output_embeddings(), "its language-model head")
        if type(base.embed_tokens) is not nn.Embedding:
            raise NotFusible(f"its embedding is a {type(base.embed_tokens).__name__}")
        for index, layer in enumerate(base.layers):
            _check_block(layer, index, options, self.head_dim)
        self.norm = _norm(base.norm)
        self._head = model.get_output_embeddings()
        self.blocks = [_block(layer, index, options[index]) for index, layer in enumerate(base.layers)]
        self._modules = [(parent, name, child) for parent in base.modules() for name, child in parent.named_children()]

    @property
    def is_current(self) -> bool:
        """Whether the model is still made of the modules seen at the start, and nobody listens to them.

        An adapter put in or a hook registered since then is honoured by transformers' own forward only.
        """
        return not (self._base._forward_hooks or self._base._forward_pre_hooks) and all(
            parent._modules[name] is child and not child._forward_hooks and not child._forward_pre_hooks
            for parent, name, child in self._modules
        )

    def forward(self, batch: TokenBatch, context: TreeContext, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Run a batch.

        Args:
            wanted: [n] int64 rows whose logits are wanted.
        Returns:
            Final hidden states [T, hidden_size], after the last norm, and logits [n, vocabulary].
        """
        x = embedding(batch.input_ids[0], self._base.embed_tokens.weight)
        residual = torch.zeros_like(x)
        cos, sin = self.rotary.rows(batch.position_ids[0], batch.max_position)
        for block in self.blocks:
            normed = block.attention_norm.add(x, residual)
            normed = block.mlp_norm.add(self._attend(block, normed, cos, sin, context), residual)
            gate, up = block.gate_up(normed).chunk(2, dim=-1)
            x = block.down(block.act(gate).mul_(up))
        hidden = self.norm.add(x, residual)
        return hidden, self._head(hidden[wanted])

    def _attend(self, block: _Block, x: Tensor, cos: Tensor, sin: Tensor, context: TreeContext) -> Tensor:
        heads = block.qkv(x).view(len(x), -1, self.head_dim)
        keys = self.num_kv_heads
        qk, v = heads[:, :-keys], heads[:, -keys:]
        if block.head_norms is not None:
            q_norm, k_norm = block.head_norms
            qk = torch.cat((q_norm.heads(qk[:, :-keys]), k_norm.heads(qk[:, -keys:])), dim=1)
        qk = rotate(qk, cos, sin)
        q, k = qk[:, :-keys], qk[:, -keys:]
        mixed = attend(block.index, q, k, v, context, block.options)
        return block.out(mixed.view(len(x), -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [T, heads, head_dim]; cos, sin [T, 1, head_dim], the first half of sin negative."""
    half = x.shape[-1] // 2
    turned = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return (x * cos).add_(turned.mul_(sin))


def _expect(module: nn.Module, names: set[str], optional: frozenset[str] | set[str] = frozenset()) -> None:
    children = {name for name, _ in module.named_children()}
    if not names <= children <= names | optional:
        raise NotFusible(f"its {type(module).__name__} is made of {', '.join(sorted(children))}")


def _check_block(layer: nn.Module, index: int, options: dict[int, AttentionOptions], head_dim: int) -> None:
    """Everything is checked before any weight moves."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    _expect(layer, _BLOCK)
    _expect(attention, _ATTENTION, _HEAD_NORMS)
    _expect(mlp, _MLP)
    if index not in options:
        raise NotFusible(f"layer {index} was not seen to attend")
    for parent, names in ((attention, _ATTENTION), (mlp, _MLP - {"act_fn"})):
        for name in names:
            _plain_linear(getattr(parent, name), f"{name} of layer {index}")
    for group in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        if len({linear.bias is None for linear in group}) > 1:
            raise NotFusible(f"some of the products of layer {index} have a bias and some have none")
    if attention.v_proj.out_features != attention.k_proj.out_features or attention.head_dim != head_dim:
        raise NotFusible(f"the heads of layer {index} differ in width")
    if hasattr(attention, "q_norm") != hasattr(attention, "k_norm"):
        raise NotFusible(f"layer {index} norms only one of queries and keys")
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if hasattr(attention, "q_norm"):
        norms += [attention.q_norm, attention.k_norm]
        if any(norm.weight.shape != (head_dim,) for norm in norms[2:]):
            raise NotFusible(f"layer {index} norms queries over all heads")
    for norm in norms:
        _norm(norm)


def _plain_linear(module: Any, what: str) -> None:
    if type(module) is not nn.Linear or not module.weight.is_floating_point():
        raise NotFusible(f"{what} is a {type(module).__name__}")


def _norm(module: Any) -> _Norm:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or eps is None or weight is None or getattr(module, "bias", None) is not None:
        raise NotFusible(f"it has a {type(module).__name__}")
    return _Norm(weight.data, float(eps))


def _block(layer: Any, index: int, options: AttentionOptions) -> _Block:
    attention, mlp = layer.self_attn, layer.mlp
    head_norms = (_norm(attention.q_norm), _norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
    return _Block(
        index=index,
        options=options,
        attention_norm=_norm(layer.input_layernorm),
        qkv=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=head_norms,
        out=_joined(attention.o_proj),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=_joined(mlp.gate_proj, mlp.up_proj),
        act=mlp.act_fn,
        down=_joined(mlp.down_proj),
    )


def _joined(*parts: nn.Linear) -> _Product:
    """The products as one. The parameters become views of the joined memory, so nothing is held twice."""
    if len(parts) == 1:
        return _Product(parts[0].weight.data, None if parts[0].bias is None else parts[0].bias.data)
    weight = _merge([part.weight for part in parts])
    bias = None if parts[0].bias is None else _merge([part.bias for part in parts])
    return _Product(weight, bias)


def _merge(parts: list[nn.Parameter]) -> Tensor:
    if not _adjacent(parts):  # another Decoder may have joined them already
        joined = torch.cat([part.data for part in parts])
        for part, piece in zip(parts, joined.split([len(part) for part in parts]), strict=True):
            part.data = piece
    first = parts[0].data
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _adjacent(parts: list[nn.Parameter]) -> bool:
    """Whether the parameters lie one behind the other in one piece of memory."""
    storages = {part.untyped_storage().data_ptr() for part in parts}
    ends = [part.data_ptr() + part.numel() * part.element_size() for part in parts]
    follow = all(end == part.data_ptr() for end, part in zip(ends, parts[1:], strict=False))
    return len(storages) == 1 and follow and all(part.is_contiguous() for part in parts)
