"""ModelRunner: runs one transformers model over token batches, K/V in tree slots, hidden states kept per slot."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raindecode.engine import attention
from raindecode.engine.adapter import Adapter
from raindecode.engine.adapter_hooks import AdapterHooks
from raindecode.engine.attention import IMPLEMENTATION, AttentionOptions, KVPool, TreeContext
from raindecode.engine.batch import Part, TokenBatch, upload
from raindecode.engine.cuda_graph import CudaCapture, StepGraphs
from raindecode.engine.edit_hooks import EditHooks
from raindecode.engine.edits import EditBank, RowEdits, Tapped
from raindecode.engine.fused_model import FusedModel
from raindecode.engine.model_facts import context_length_of
from raindecode.errors import UnsupportedModelError
from raindecode.hidden_edits import Site
from rainkernels.ops.attention import AttentionBuffers
from rainkernels.ops.kv import kv_lane

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}
# State that runs along the sequence cannot follow a tree of branches packed into one row.
_STATEFUL_TYPES = {
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "jetmoe_hybrid",
    "lfm2",
    "lfm2_moe",
    "mamba",
    "mamba2",
    "minimax",
    "nemotron_h",
    "qwen3_5",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "zamba",
    "zamba2",
}


@dataclass
class _Member:
    """What one member remembers of the tokens it ran."""

    pool: KVPool
    hidden: Tensor | None = None  # [num_slots, hidden_size], final hidden state of the token in each slot


class ModelRunner:
    """One model behind the tree, with its adapters.

    Args:
        model: a decoder-only transformers model in eval mode. Its attention implementation is switched.
        num_slots: slots of the KV pool, the trash slot included; every adapter has a pool of as many.
        adapters: low-rank updates of the model. Each is a member of its own: rows of all members share a forward and the
            reading of the weights.

    Raises:
        UnsupportedModelError: the architecture cannot be served; the message names it and says why.
    """

    def __init__(self, model: PreTrainedModel, num_slots: int, adapters: Sequence[Adapter] = ()) -> None:
        check_architecture(model)
        self.model = model
        self.device = torch.device(model.device)
        self.adapters = tuple(adapters)
        self._members = [_Member(KVPool(num_slots, self.device)) for _ in range(self.num_members)]
        self._updates = [AdapterHooks(model, adapter) for adapter in self.adapters]
        self.edits = EditBank(self.hidden_size, self.device, model.dtype)
        self._edit_hooks = EditHooks(model)
        self.fused: FusedModel | None = None
        self.graphs: StepGraphs | None = None  # of `fused`
        self.layers: dict[int, AttentionOptions] = {}  # what each layer told its attention when last asked
        self._last_hidden: Tensor | None = None
        self._takes_index = "logits_to_keep" in inspect.signature(model.forward).parameters
        model.set_attn_implementation(IMPLEMENTATION)
        if model.config._attn_implementation != IMPLEMENTATION:
            raise UnsupportedModelError(
                f"{architecture(model)} does not go through transformers' attention interface, so its attention cannot "
                "be replaced: convert the model to an architecture that does (for example Llama, Qwen, Mistral or Gemma)"
            )

    @property
    def num_members(self) -> int:
        """The model and its adapters."""
        return 1 + len(self.adapters)

    @property
    def pool(self) -> KVPool:
        """K/V of the model without adapter."""
        return self._members[0].pool

    @pool.setter
    def pool(self, pool: KVPool) -> None:
        self._members[0].pool = pool

    @property
    def hidden(self) -> Tensor | None:
        """[num_slots, hidden_size], final hidden state of the model without adapter for the token in each slot."""
        return self._members[0].hidden

    @hidden.setter
    def hidden(self, states: Tensor | None) -> None:
        self._members[0].hidden = states

    def forward(self, batch: TokenBatch, wanted: Sequence[int]) -> Tensor:
        """Run the rows of a batch made on the host; logits `[len(wanted), vocabulary]` of the rows named.

        With no row named, what comes back means nothing.
        """
        return self.forward_parts([Part(0, batch)], [wanted])

    @torch.inference_mode()
    def forward_parts(
        self, parts: Sequence[Part], wanted: Sequence[Sequence[int]], tapped: Tapped | None = None
    ) -> Tensor:
        """Run batches of several members, made on the host, through the weights together, rows edited as they say.

        Args:
            wanted: rows of each part whose logits are wanted.
            tapped: hidden states wanted; they are left there.
        Returns:
            Logits `[n, vocabulary]`, one part's after the other's. With no row named, what comes back means nothing.
        """
        fused = self.fused if self.fused is not None and self.fused.is_current else None
        slots = self.edits.slots(parts)
        edits = None if slots is None else RowEdits(self.edits.sites, slots)
        if fused is not None:
            pools = [self._members[part.member].pool for part in parts]
            states = [self._states_pool(part.member, fused.weights.embedding) for part in parts]
            if self.graphs is not None and tapped is None:
                replayed = self.graphs.forward(parts, wanted, pools, states, edits)
                if replayed is not None:
                    return replayed
        edits = None if edits is None else edits.to(self.device)
        placed, rows, at = [], [], 0
        for part, mine in zip(parts, wanted, strict=True):
            batch, index = upload(part.batch, list(mine), self.device)
            placed.append(Part(part.member, batch))
            rows.append(index + at)
            at += batch.num_rows
        if tapped is not None:
            tapped.place([part.batch.num_rows for part in placed], self.hidden_size, self.device)
        index = rows[0] if len(rows) == 1 else torch.cat(rows)
        if not len(index):  # a model that is asked for no row gives those of all
            index = torch.zeros(1, dtype=torch.int64, device=self.device)
        contexts = [TreeContext(self._members[p.member].pool, p.batch.slot_mapping, p.batch.plan) for p in placed]
        if fused is not None:
            return fused.forward(placed, contexts, index, states, edits, tapped)
        contexts[0].more = tuple(contexts[1:])
        with self._edit_hooks.on(edits, tapped) if edits is not None or tapped is not None else nullcontext():
            final, logits = self._forward_stock(placed, contexts[0], index)
        if final is not None:
            for part, own in zip(placed, final.split([part.batch.num_rows for part in placed]), strict=True):
                self._states_pool(part.member, own).index_copy_(0, part.batch.slot_mapping.long(), own)
        return logits

    def _forward_stock(
        self, parts: Sequence[Part], context: TreeContext, index: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """transformers' own forward: final hidden states of all rows, logits of the rows of `index`."""
        options: dict[str, Any] = {"logits_to_keep": index} if self._takes_index else {}
        # Held for this call only: a hook that stays keeps this runner and its pools alive as long as the model.
        hook = self.model.base_model.register_forward_hook(self._catch_hidden)
        adapted = ExitStack()
        adapted.enter_context(attention.over_tree(context))
        try:
            for (member, batch), end in zip(parts, accumulate(part.batch.num_rows for part in parts), strict=True):
                if member:
                    adapted.enter_context(self._updates[member - 1].on(slice(end - batch.num_rows, end)))
            out = self.model(
                input_ids=torch.cat([part.batch.input_ids for part in parts], dim=1),
                position_ids=torch.cat([part.batch.position_ids for part in parts], dim=1),
                use_cache=False,
                tree=context,
                **options,
            )
        finally:
            adapted.close()
            hook.remove()
            states, self._last_hidden = self._last_hidden, None
        self._check_layers(context)
        self.layers = context.layers
        logits: Tensor = out.logits[0]
        return None if states is None else states[0], logits if self._takes_index else logits[index]

    def check_places(self, sites: Iterable[Site]) -> None:
        """Refuse places that a forward would not find: it would end all requests that are part of it.

        Raises:
            UnsupportedModelError: the architecture has no module of a place.
        """
        if self.fused is None or not self.fused.is_current:
            for site in sites:
                self._edit_hooks.module(site)

    def fuse(self) -> None:
        """Run from now on as a FusedModel, adapters included. The model must have run once.

        Raises:
            NotFusible: it is not of that form; nothing has changed.
        """
        self.fused = FusedModel(self.model, self.layers, self.adapters)
        self.graphs = None

    def use_graphs(self) -> str | None:
        """Run steps from CUDA graphs from now on. Where that is not possible nothing changes; why, or None."""
        obstacle = self.graphs_obstacle
        if obstacle is None:
            assert self.fused is not None
            self.graphs = StepGraphs(self.fused, CudaCapture(self.device))
        return obstacle

    @property
    def graphs_obstacle(self) -> str | None:
        """Why steps of this model cannot run from CUDA graphs; None where they can."""
        if self.device.type != "cuda":
            return f"the model is on {self.device}, and CUDA graphs need a CUDA device"
        if self.fused is None:
            return f"{architecture(self.model)} runs as transformers runs it, and only a FusedModel is captured"
        if not AttentionBuffers.usable(self.device):
            return "tree attention takes static memory on its Triton lane only, which is not in use here"
        if kv_lane(self.device) != "cuda":
            return "the compiled module has no CUDA lane, and writing K/V without it cannot be captured"
        return None

    @property
    def hidden_size(self) -> int:
        """Elements of a hidden state."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def context_length(self) -> int:
        """Positions the model was made for."""
        return context_length_of(self.model)

    @property
    def bytes_per_token(self) -> int:
        """Bytes one slot takes in the pools of all members; 0 before the first forward of the model as it is."""
        hidden = 0 if self.hidden is None else self.hidden.shape[1] * self.hidden.element_size()
        return (self.pool.bytes_per_token + hidden) * self.num_members

    def resize(self, num_slots: int) -> None:
        """Start over with empty pools of `num_slots` slots. Graphs read and write the old ones, so they go."""
        if self.graphs is not None:
            self.graphs.drop()
        self._members = [_Member(KVPool(num_slots, self.device)) for _ in self._members]
        if self.fused is not None:
            self.fused.drop_pools()

    def mean_hidden(self, slots: Tensor, starts: Sequence[int], member: int = 0) -> Tensor:
        """Means of the final hidden states from each of `starts` to the end of a path.

        Args:
            slots: [n] int64 slots of the path.
            starts: indices into the path, ascending.
        Returns:
            [len(starts), hidden_size] float32.
        """
        hidden = self._members[member].hidden
        assert hidden is not None
        states = hidden[slots].float()
        sums = torch.flip(torch.cumsum(torch.flip(states, (0,)), 0), (0,))
        lengths = torch.tensor([len(slots) - s for s in starts], dtype=torch.float32, device=self.device)
        return sums[list(starts)] / lengths[:, None]

    def make_pools(self, member: int = 0) -> bool:
        """Make a member's pools as its first forward would, where their form is known; whether they are there then."""
        mine = self._members[member]
        if not mine.pool.layers and self.fused is not None and self.fused.is_current:
            self.fused.make_pools(mine.pool)
            self._states_pool(member, self.fused.weights.embedding)
        return bool(mine.pool.layers)

    @torch.inference_mode()
    def rows(self, slots: Tensor, member: int = 0) -> dict[str, Tensor]:
        """Copies of everything remembered of the tokens in `slots` [n] int64: [n, ...] each, by a name for `put_rows`."""
        mine, slots = self._members[member], slots.to(self.device)
        found = {} if mine.hidden is None else {"hidden": mine.hidden[slots]}
        for index, (k, v) in mine.pool.layers.items():
            found |= {f"{index}.k": k[slots], f"{index}.v": v[slots]}
        return found

    @torch.inference_mode()
    def put_rows(self, slots: Tensor, rows: Mapping[str, Tensor], member: int = 0) -> None:
        """Remember what `rows` gave of other slots as that of `slots` [n] int64.

        Raises:
            ValueError: the rows are of another form than this model's.
        """
        mine, slots = self._members[member], slots.to(self.device)
        pools = {} if mine.hidden is None else {"hidden": mine.hidden}
        for index, (k, v) in mine.pool.layers.items():
            pools |= {f"{index}.k": k, f"{index}.v": v}
        theirs = {name: (t.shape[1:], t.dtype) for name, t in rows.items()}
        ours = {name: (pool.shape[1:], pool.dtype) for name, pool in pools.items()}
        if theirs != ours:
            raise ValueError(f"rows of {len(theirs)} tensors do not have the form of this model's {len(ours)}")
        first = int(slots[0])
        together = torch.equal(slots, torch.arange(first, first + len(slots), device=self.device))
        for name, pool in pools.items():
            if together:
                pool[first : first + len(slots)].copy_(rows[name])
            else:
                pool.index_copy_(0, slots, rows[name].to(self.device))

    def _catch_hidden(self, _module: object, _args: object, output: Any) -> None:
        self._last_hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]

    def _states_pool(self, member: int, like: Tensor) -> Tensor:
        """[num_slots, hidden_size] of a member, in the dtype of `like` [.., hidden_size]."""
        mine = self._members[member]
        if mine.hidden is None:
            mine.hidden = mine.pool.zeros(like)
        return mine.hidden

    def _check_layers(self, context: TreeContext) -> None:
        text = self.model.config.get_text_config()
        expected = getattr(text, "num_hidden_layers", None)
        if expected is not None and len(context.layers) != expected:
            raise UnsupportedModelError(
                f"{architecture(self.model)}: {len(context.layers)} of its {expected} layers use attention that reads "
                "the KV tree; a model with other kinds of layers cannot be served"
            )
        # A window that reaches attention only as a mask would be lost, and shows on paths longer than it only.
        kinds = getattr(text, "layer_types", None) or ()
        windowed = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
        if not kinds and hasattr(type(text), "sliding_window") and text.sliding_window:
            windowed = [0]
        if any(i not in context.layers or not context.layers[i].window for i in windowed):
            raise UnsupportedModelError(
                f"{architecture(self.model)} applies its sliding window as a mask and does not name it to the attention "
                "function, so it would be ignored: this architecture is refused"
            )


def architecture(model: PreTrainedModel) -> str:
    """Class and model type, for messages."""
    return f"{type(model).__name__} (model_type {model.config.model_type!r})"


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse what cannot be decoded over a tree.

    Raises:
        UnsupportedModelError: names the architecture and the reason.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{architecture(model)} is an encoder-decoder model; only decoder-only models are served"
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{architecture(model)} has no language-model head; only causal language models are served"
        )
    text = config.get_text_config()
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        raise UnsupportedModelError(
            f"{architecture(model)} attends within fixed chunks (chunked_attention), which the engine does not do: "
            "this architecture is refused"
        )
    stateful = sorted(set(getattr(text, "layer_types", None) or ()) - _ATTENTION_LAYERS)
    if stateful or text.model_type in _STATEFUL_TYPES:
        kinds = ", ".join(stateful) or "recurrent state"
        raise UnsupportedModelError(
            f"{architecture(model)} has layers of another kind than attention ({kinds}): their state runs along the sequence "
            "and would leak from branch to branch, so this architecture is refused"
        )
    if getattr(text, "is_decoder", True) is False and text.model_type in {"bert", "roberta", "xlm-roberta", "electra"}:
        raise UnsupportedModelError(
            f"{architecture(model)} attends in both directions; only decoder-only models are served"
        )
