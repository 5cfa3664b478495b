"""ModelRunner: runs one transformers model over token batches, K/V in tree slots, hidden states kept per slot."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raindecode.engine import attention
from raindecode.engine.attention import IMPLEMENTATION, AttentionOptions, KVPool, TreeContext
from raindecode.engine.batch import TokenBatch, upload
from raindecode.engine.cuda_graph import CudaCapture, StepGraphs
from raindecode.engine.fused_model import FusedModel
from raindecode.errors import UnsupportedModelError
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


class ModelRunner:
    """One model behind the tree.

    Args:
        model: a decoder-only transformers model in eval mode. Its attention implementation is switched.
        num_slots: slots of the KV pool, the trash slot included.

    Raises:
        UnsupportedModelError: the architecture cannot be served; the message names it and says why.
    """

    def __init__(self, model: PreTrainedModel, num_slots: int) -> None:
        check_architecture(model)
        self.model = model
        self.device = torch.device(model.device)
        self.pool = KVPool(num_slots, self.device)
        self.hidden: Tensor | None = None  # [num_slots, hidden_size], final hidden state of the token in each slot
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

    @torch.inference_mode()
    def forward(self, batch: TokenBatch, wanted: Sequence[int]) -> Tensor:
        """Run the rows of a batch made on the host; logits `[len(wanted), vocabulary]` of the rows named.

        With no row named, what comes back means nothing.
        """
        wanted = list(wanted)
        fused = self.fused if self.fused is not None and self.fused.is_current else None
        if fused is not None and self.graphs is not None:
            logits = self.graphs.forward(batch, wanted, self.pool, self._states_pool(fused.weights.embedding))
            if logits is not None:
                return logits
        batch, index = upload(batch, wanted or [0], self.device)
        context = TreeContext(self.pool, batch.slot_mapping, batch.plan)
        if fused is not None:
            return fused.forward(batch, context, index, self._states_pool(fused.weights.embedding))
        states, logits = self._forward_stock(batch, context, index)
        if states is not None:
            self._states_pool(states).index_copy_(0, batch.slot_mapping.long(), states)
        return logits

    def _forward_stock(self, batch: TokenBatch, context: TreeContext, index: Tensor) -> tuple[Tensor | None, Tensor]:
        """transformers' own forward: final hidden states of all rows, logits of the rows of `index`."""
        options: dict[str, Any] = {"logits_to_keep": index} if self._takes_index else {}
        token = attention._current.set(context)
        # Held for this call only: a hook that stays keeps this runner and its pools alive as long as the model.
        hook = self.model.base_model.register_forward_hook(self._catch_hidden)
        try:
            out = self.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                tree=context,
                **options,
            )
        finally:
            hook.remove()
            attention._current.reset(token)
            states, self._last_hidden = self._last_hidden, None
        self._check_layers(context)
        self.layers = context.layers
        logits: Tensor = out.logits[0]
        return None if states is None else states[0], logits if self._takes_index else logits[index]

    def fuse(self) -> None:
        """Run from now on as a FusedModel. The model must have run once.

        Raises:
            NotFusible: it is not of that form; nothing has changed.
        """
        self.fused = FusedModel(self.model, self.layers)
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
    def bytes_per_token(self) -> int:
        """Bytes one slot takes in all pools; 0 before the first forward."""
        hidden = 0 if self.hidden is None else self.hidden.shape[1] * self.hidden.element_size()
        return self.pool.bytes_per_token + hidden

    def resize(self, num_slots: int) -> None:
        """Start over with empty pools of `num_slots` slots. Graphs read and write the old ones, so they go."""
        if self.graphs is not None:
            self.graphs.drop()
        self.pool = KVPool(num_slots, self.device)
        self.hidden = None
        if self.fused is not None:
            self.fused.drop_pools()

    def mean_hidden(self, slots: Tensor, starts: Sequence[int]) -> Tensor:
        """Means of the final hidden states from each of `starts` to the end of a path.

        Args:
            slots: [n] int64 slots of the path.
            starts: indices into the path, ascending.
        Returns:
            [len(starts), hidden_size] float32.
        """
        assert self.hidden is not None
        states = self.hidden[slots].float()
        sums = torch.flip(torch.cumsum(torch.flip(states, (0,)), 0), (0,))
        lengths = torch.tensor([len(slots) - s for s in starts], dtype=torch.float32, device=self.device)
        return sums[list(starts)] / lengths[:, None]

    def _catch_hidden(self, _module: object, _args: object, output: Any) -> None:
        self._last_hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]

    def _states_pool(self, like: Tensor) -> Tensor:
        """[num_slots, hidden_size], in the dtype of `like` [.., hidden_size]."""
        if self.hidden is None:
            self.hidden = self.pool.zeros(like)
        return self.hidden

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
