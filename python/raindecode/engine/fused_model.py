"""FusedModel: the blocks of a Llama-like transformers model, run as few operations over a TokenBatch.

transformers stays the model library: weights, rotary tables and activations are its own, and its forward is what the fused
one is compared with when a model is loaded (probe.py). Here q, k and v (and gate and up) are one product each, residual adds
are fused with the norms, and nothing is dispatched through modules: in float32 on a CPU a forward is one native call
(rainkernels.ops.decoder). On a small model or a fast GPU that is most of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel

from raindecode.engine.adapter import Adapter
from raindecode.engine.attention import AttentionOptions, KVPool, TreeContext, attend
from raindecode.engine.batch import Part
from raindecode.engine.edits import RowEdits, SiteTable, Tapped
from raindecode.engine.fused_adapter import FusedAdapter
from raindecode.engine.fused_edits import Joining, add_norm
from raindecode.engine.parallel import processes_of
from raindecode.engine.rotary import NotFusible, RotaryTable
from raindecode.engine.snapshot import Snapshot
from rainkernels.ops.decoder import (
    BlockWeights,
    Capture,
    DecoderStack,
    EditSite,
    LinearWeight,
    NormWeight,
    StackWeights,
    StepPart,
    decoder_lane,
)

_BLOCK = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
AdaptedRows: TypeAlias = "tuple[slice, FusedAdapter]"
_SILU = {"SiLU", "SiLUActivation", "RowwiseSiLU"}


class FusedModel:
    """See the module's text.

    Args:
        options: what every layer tells its attention.
        adapters: of the model; rows of each may run beside those of the bare model.

    Raises:
        NotFusible: the model is not of this form; the message says where, and nothing has changed.
    """

    def __init__(
        self, model: PreTrainedModel, options: dict[int, AttentionOptions], adapters: Sequence[Adapter] = ()
    ) -> None:
        if processes_of(model) > 1:
            raise NotFusible("its weights are split over processes")
        base: Any = model.base_model
        head: Any = model.get_output_embeddings()
        if not Snapshot(model).is_plain:
            raise NotFusible("a hook listens to it, or a module has a forward of its own")
        head_dim = _check_model(base, head, options)
        final_norm = _norm(base.norm)
        self._adapters = [FusedAdapter(adapter, model, base.layers) for adapter in adapters]
        self.rotary = RotaryTable(base.rotary_emb, model.config.get_text_config(), head_dim, model.dtype, model.device)
        self._acts = [layer.mlp.act_fn for layer in base.layers]
        self.weights = StackWeights(
            embedding=base.embed_tokens.weight.data,
            blocks=tuple(_block(layer, options[index]) for index, layer in enumerate(base.layers)),
            norm=final_norm,
            head=_joined(head),
            num_qo_heads=base.layers[0].self_attn.q_proj.out_features // head_dim,
            num_kv_heads=base.layers[0].self_attn.k_proj.out_features // head_dim,
            head_dim=head_dim,
        )
        self.context_length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._stack: DecoderStack | None = None
        self._pools: dict[int, KVPool] = {}  # that the stack writes to, by member
        self._edited_by: Sequence[SiteTable] = ()  # that the stack edits with
        in_native = model.device.type == "cpu" and model.dtype == torch.float32 and decoder_lane() == "cpu"
        if in_native and all(type(act).__name__ in _SILU for act in self._acts):
            self._stack = DecoderStack(self.weights, [adapter.blocks for adapter in self._adapters])
        self._seen = Snapshot(model)  # after the parameters were joined

    @property
    def is_current(self) -> bool:
        """Whether the model is still what was fused.

        An adapter put in, a hook registered or a parameter replaced since then is honoured by transformers' own forward only.
        """
        return self._seen.holds

    def forward(
        self, parts: Sequence[Part], contexts: Sequence[TreeContext], wanted: Tensor, states: Sequence[Tensor],
        edits: RowEdits | None = None, tapped: Tapped | None = None,
    ) -> Tensor:  # fmt: skip
        """Run batches of several members together.

        Args:
            contexts: of each part.
            wanted: [n] int64 rows whose logits are wanted, over the rows of all parts.
            states: of each part [num_slots, hidden_size]; final states, after the last norm, are written to the rows' slots.
            edits: of the rows of all parts.
            tapped: hidden states wanted, with room made.
        Returns:
            Logits [n, vocabulary].
        """
        batches = [part.batch for part in parts]
        cos, sin = self.rotary.upto(max(batch.max_position for batch in batches))
        ids = _behind([batch.input_ids[0] for batch in batches])
        positions = _behind([batch.position_ids[0] for batch in batches])
        if self._stack is None:
            contexts[0].more = tuple(contexts[1:])
            sizes = [batch.num_rows for batch in batches]
            adapted = self.adapted_rows([part.member for part in parts], sizes)
            rows = self.final_states(ids, cos[positions], sin[positions], contexts[0], adapted, edits, tapped)
            for batch, pool, own in zip(batches, states, rows.split(sizes), strict=True):
                pool.index_copy_(0, batch.slot_mapping.long(), own)
            return self.logits(rows, wanted)
        for part, context in zip(parts, contexts, strict=True):
            if self._pools.get(part.member) is not context.pool:
                self._stack.set_pools(self.make_pools(context.pool), part.member)
                self._pools[part.member] = context.pool
        slots = _behind([batch.slot_mapping for batch in batches])
        steps = [
            StepPart(part.member, part.batch.num_rows, part.batch.plan, pool)
            for part, pool in zip(parts, states, strict=True)
        ]
        if edits is not None and self._edited_by is not edits.tables:
            self._stack.set_edits([EditSite(*site) for site in edits.tables])
            self._edited_by = edits.tables
        return self._stack.step(
            ids, positions, slots, steps, cos, sin, wanted, None if edits is None else edits.slots,
            () if tapped is None else [Capture(site.layer, site.tap, tapped.index, out) for site, out in tapped.places()],
        )  # fmt: skip

    def adapted_rows(self, members: Sequence[int], sizes: Sequence[int]) -> list[AdaptedRows]:
        """Where adapters apply, in rows of several members one behind the other."""
        return [
            (slice(end - size, end), self._adapters[member - 1])
            for member, size, end in zip(members, sizes, accumulate(sizes), strict=True)
            if member
        ]

    def drop_pools(self) -> None:
        """Let go of the K/V pools of the last forward."""
        self._pools.clear()
        if self._stack is not None:
            self._stack.drop_pools()

    def make_pools(self, pool: KVPool) -> list[tuple[Tensor, Tensor]]:
        """K and V pools of all layers, made now where no forward has made them yet."""
        heads = self.weights.embedding.new_empty(0, self.weights.num_kv_heads, self.weights.head_dim)
        return [pool.layer(i, heads, heads) for i in range(len(self._acts))]

    def final_states(
        self, ids: Tensor, cos: Tensor, sin: Tensor, context: TreeContext, adapted: Sequence[AdaptedRows] = (),
        edits: RowEdits | None = None, tapped: Tapped | None = None,
    ) -> Tensor:  # fmt: skip
        """The blocks in operations of PyTorch and rainkernels, for every device and dtype; K/V goes to the pools.

        On CUDA tensors the host never waits here and reads nothing back, so that it can be captured (cuda_graph.py).

        Args:
            ids: [T] token ids.
            cos, sin: [T, head_dim] of the rows' positions, from the RotaryTable.
            adapted: rows that an adapter applies to, with the adapter.
            edits, tapped: as in `forward`.
        Returns:
            [T, hidden_size], after the last norm.
        """
        join = Joining(edits, tapped)
        weights = self.weights
        cos, sin = cos[:, None], sin[:, None]
        x = embedding(ids, weights.embedding)
        residual = torch.zeros_like(x)
        for index, (block, act) in enumerate(zip(weights.blocks, self._acts, strict=True)):

            def product(x: Tensor, name: str, weight: LinearWeight, layer: int = index) -> Tensor:
                y = linear(x, *weight)
                for rows, adapter in adapted:
                    adapter.add_(layer, name, x[rows], y[rows])
                return y

            heads = product(join.block(index - 1, x, residual, block.attention_norm), "qkv", block.qkv)
            heads = heads.view(len(ids), -1, weights.head_dim)
            x = product(self._attend(index, block, heads, cos, sin, context), "out", block.out)
            normed = join.attention(index, x, residual, block.mlp_norm)
            gate, up = product(normed, "gate_up", block.gate_up).chunk(2, dim=-1)
            x = product(act(gate).mul_(up), "down", block.down)
        return join.block(len(weights.blocks) - 1, x, residual, weights.norm)

    def logits(self, states: Tensor, wanted: Tensor) -> Tensor:
        """[n, vocabulary] of the rows `wanted` [n] int64 of final states [T, hidden_size]."""
        return linear(states.index_select(0, wanted), *self.weights.head)

    def _attend(
        self, index: int, block: BlockWeights, heads: Tensor, cos: Tensor, sin: Tensor, context: TreeContext
    ) -> Tensor:
        """Attention of one layer; heads [T, num_qo_heads + 2 num_kv_heads, head_dim]."""
        keys = self.weights.num_kv_heads
        qk, v = heads[:, :-keys], heads[:, -keys:]
        if block.q_norm is not None and block.k_norm is not None:
            qk = torch.cat((_head_norm(qk[:, :-keys], block.q_norm), _head_norm(qk[:, -keys:], block.k_norm)), dim=1)
        half = qk.shape[-1] // 2
        qk = (qk * cos).add_(torch.cat((qk[..., half:], qk[..., :half]), dim=-1).mul_(sin))
        options = AttentionOptions(block.softmax_scale, block.softcap, block.sliding_window, block.sinks)
        return attend(index, qk[:, :-keys], qk[:, -keys:], v, context, options).flatten(1)


def _behind(parts: Sequence[Tensor]) -> Tensor:
    """One behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _head_norm(x: Tensor, norm: NormWeight) -> Tensor:
    """The norm of every head's row of `x` [T, heads, head_dim]."""
    rows = x.reshape(-1, x.shape[-1])
    return add_norm(rows, torch.zeros_like(rows), norm).view(x.shape)


def _expect(module: nn.Module, names: set[str], optional: frozenset[str] | set[str] = frozenset()) -> None:
    children = {name for name, _ in module.named_children()}
    if not names <= children <= names | optional:
        raise NotFusible(f"its {type(module).__name__} is made of {', '.join(sorted(children))}")
    if list(module.parameters(recurse=False)):
        raise NotFusible(f"its {type(module).__name__} has parameters of its own")


def _check_model(base: Any, head: Any, options: dict[int, AttentionOptions]) -> int:
    """The width of a head. Everything is checked before any weight moves."""
    _expect(base, {"embed_tokens", "layers", "norm", "rotary_emb"})
    if type(base.embed_tokens) is not nn.Embedding:
        raise NotFusible(f"its embedding is a {type(base.embed_tokens).__name__}")
    _plain_linear(head, "its language-model head")
    if head.weight.shape != base.embed_tokens.weight.shape:
        raise NotFusible("its language-model head has other rows than its embedding")
    if not len(base.layers):
        raise NotFusible("it has no layers")
    if len(list(base.named_parameters())) != len(list(base.named_parameters(remove_duplicate=False))):
        raise NotFusible("some of its modules share a parameter")
    for index, layer in enumerate(base.layers):
        _check_block(layer, index, options)
        shapes, first = ([(name, p.shape) for name, p in each.named_parameters()] for each in (layer, base.layers[0]))
        if shapes != first:
            raise NotFusible(f"layer {index} has other shapes than layer 0")
    parameters = [*base.parameters(), *head.parameters()]
    if len({(p.dtype, p.device) for p in parameters}) > 1:
        raise NotFusible("its parameters differ in dtype or device")
    if not all(p.is_contiguous() for p in parameters):
        raise NotFusible("some of its parameters have gaps or another order in memory")
    attention = base.layers[0].self_attn
    head_dim, queries, keys = attention.head_dim, attention.q_proj.out_features, attention.k_proj.out_features
    if any(layer.self_attn.head_dim != head_dim for layer in base.layers):
        raise NotFusible("its layers have heads of several widths")
    if head_dim < 2 or head_dim % 2 or queries % head_dim or keys % head_dim or queries % keys:
        raise NotFusible(f"heads of {head_dim} do not divide {queries} queries and {keys} keys")
    return int(head_dim)


def _check_block(layer: Any, index: int, options: dict[int, AttentionOptions]) -> None:
    _expect(layer, _BLOCK)
    attention, mlp = layer.self_attn, layer.mlp
    _expect(attention, _ATTENTION, _HEAD_NORMS)
    _expect(mlp, _MLP)
    if index not in options:
        raise NotFusible(f"layer {index} was not seen to attend")
    for parent, names in ((attention, _ATTENTION), (mlp, _MLP - {"act_fn"})):
        for name in names:
            _plain_linear(getattr(parent, name), f"{name} of layer {index}")
    for group in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        if len({part.bias is None for part in group}) > 1:
            raise NotFusible(f"some of the products of layer {index} have a bias and some have none")
    head_dim = getattr(attention, "head_dim", None)
    if not isinstance(head_dim, int) or attention.v_proj.out_features != attention.k_proj.out_features:
        raise NotFusible(f"the heads of layer {index} have no width in common")
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if hasattr(attention, "q_norm") or hasattr(attention, "k_norm"):
        head_norms = [getattr(attention, name, None) for name in sorted(_HEAD_NORMS)]
        if any(getattr(getattr(norm, "weight", None), "shape", None) != (head_dim,) for norm in head_norms):
            raise NotFusible(f"layer {index} norms queries and keys otherwise than head by head")
        if _norm(head_norms[0]).eps != _norm(head_norms[1]).eps:
            raise NotFusible(f"layer {index} norms queries and keys with an eps each")
        norms += head_norms
    for norm in norms:
        _norm(norm)


def _plain_linear(module: Any, what: str) -> None:
    if type(module) is not nn.Linear or not module.weight.is_floating_point():
        raise NotFusible(f"{what} is a {type(module).__name__}")


def _norm(module: Any) -> NormWeight:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or eps is None or weight is None or len(list(module.parameters())) != 1:
        raise NotFusible(f"it has a {type(module).__name__}")
    return NormWeight(weight.data, float(eps))


def _block(layer: Any, options: AttentionOptions) -> BlockWeights:
    attention, mlp = layer.self_attn, layer.mlp
    normed = hasattr(attention, "q_norm")
    return BlockWeights(
        attention_norm=_norm(layer.input_layernorm),
        qkv=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
        out=_joined(attention.o_proj),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=_joined(mlp.gate_proj, mlp.up_proj),
        down=_joined(mlp.down_proj),
        softmax_scale=options.scale,
        q_norm=_norm(attention.q_norm) if normed else None,
        k_norm=_norm(attention.k_norm) if normed else None,
        softcap=options.softcap,
        sliding_window=options.window,
        sinks=options.sinks,
    )


def _joined(*parts: nn.Linear) -> LinearWeight:
    """The products as one. The parameters become views of the joined memory, so nothing is held twice."""
    if len(parts) == 1:
        return LinearWeight(parts[0].weight.data, None if parts[0].bias is None else parts[0].bias.data)
    weight = _merge([part.weight for part in parts])
    biases = [part.bias for part in parts if part.bias is not None]
    return LinearWeight(weight, _merge(biases) if biases else None)


def _merge(parts: Sequence[Tensor]) -> Tensor:
    if not _adjacent(parts):  # another Decoder may have joined them already
        with torch.inference_mode(
            parts[0].is_inference()
        ):  # whatever mode the caller is in, parameters stay of their kind
            joined = torch.cat([part.data for part in parts])
            for part, piece in zip(parts, joined.split([len(part) for part in parts]), strict=True):
                part.data = piece
    first = parts[0].data
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether the parameters lie one behind the other in one piece of memory."""
    storages = {part.untyped_storage().data_ptr() for part in parts}
    ends = [part.data_ptr() + part.numel() * part.element_size() for part in parts]
    follow = all(end == part.data_ptr() for end, part in zip(ends, parts[1:], strict=False))
    return len(storages) == 1 and follow and all(part.is_contiguous() for part in parts)
