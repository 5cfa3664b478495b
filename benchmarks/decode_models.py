"""Random-weight models, and the two ways to take a decode step of many branches over one prefix (decode_step.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kernel_bench.static import loaded_buffers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from raindecode.engine.attention import IMPLEMENTATION, TreeContext, over_tree
from raindecode.engine.batch import TokenBatch, upload
from raindecode.engine.model_runner import ModelRunner
from rainkernels.ops.attention import attention_plan
from rainkernels.testing.cases_attention import fan

SHAPES: dict[str, dict[str, Any]] = {
    "25m": {
        "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 32_000, "tie_word_embeddings": True,
    },
    "110m": {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 12, "vocab_size": 32_000, "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32_000, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 320, "tie_word_embeddings": True,
    },
}  # fmt: skip


def llama_config(name: str) -> LlamaConfig:
    """The configuration of one of SHAPES."""
    return LlamaConfig(max_position_embeddings=1 << 14, **SHAPES[name])


def weight_bytes(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Bytes of a model's parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(config).parameters()) * dtype.itemsize


def kv_bytes(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    head = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * dtype.itemsize


def build_model(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama of one of SHAPES, its weights drawn on the device."""
    config = llama_config(name)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(device).eval()  # no cast: rotary frequencies stay float32


class ForestStep:
    """This engine's forward: one row per branch, K/V of the prefix and of the branches in one pool of random numbers."""

    def __init__(self, model: PreTrainedModel, prefix: int, branches: int, own: int) -> None:
        self.model, self.prefix, self.branches, self.own = model, prefix, branches, own
        self.dtype = model.dtype
        config = model.config
        self.heads = config.num_key_value_heads
        self.dim = config.hidden_size // config.num_attention_heads
        self.layers = config.num_hidden_layers
        self.forest = fan(prefix, branches, own)
        num_slots = self.forest.num_keys() + 1
        self.runner = ModelRunner(model, num_slots)
        device = self.runner.device
        rng = torch.Generator(device).manual_seed(1)
        shape = (num_slots, self.heads, self.dim)
        for layer in range(self.layers):
            self.runner.pool.layers[layer] = tuple(  # type: ignore[assignment]
                torch.randn(shape, generator=rng, device=device, dtype=self.dtype) for _ in range(2)
            )
        self.slots = torch.arange(1, num_slots, dtype=torch.int32)
        self.last = self.slots[prefix:].view(branches, own)[:, -1].contiguous()  # slot of every row
        self.tokens = torch.randint(0, config.vocab_size, (1, branches), generator=rng, device=device)
        self.host_tokens = self.tokens.cpu()
        self.keep = torch.arange(branches, device=device)

    def select(self) -> None:
        """Make the model attend over the tree."""
        self.model.set_attn_implementation(IMPLEMENTATION)

    def new_batch(self) -> TokenBatch:
        """What the engine makes on the host for every step: a plan and the rows' places."""
        plan = attention_plan(**self.forest.plan_inputs(self.slots))
        last = self.prefix + self.own - 1
        rows = {int(slot): i for i, slot in enumerate(self.last.tolist())}
        return TokenBatch(
            self.host_tokens, torch.full((1, self.branches), last), self.last, plan, rows, max_position=last
        )

    def forward(self, batch: TokenBatch) -> Tensor:
        """Logits [branches, vocabulary] through the engine's runner."""
        return self.runner.forward(batch, range(self.branches))

    def fixed(self, batch: TokenBatch) -> Callable[[], Tensor]:
        """The same forward from tensors that stay where they are, the plan's tables too: what a CUDA graph can hold."""
        batch, _ = upload(batch, [], self.runner.device)
        buffers = loaded_buffers(batch.plan, self.model.config.num_attention_heads, *self.runner.pool.layers[0])
        context = TreeContext(self.runner.pool, batch.slot_mapping, batch.plan, buffers=buffers)

        def forward() -> Tensor:
            with over_tree(context):
                out = self.model(
                    input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, tree=context,
                    logits_to_keep=self.keep,
                )  # fmt: skip
            logits: Tensor = out.logits[0]
            return logits

        return forward


class StockStep:
    """transformers' own step: sdpa, the prefix once per branch. Its caches are filled from a ForestStep's pool."""

    def __init__(self, ours: ForestStep, *, static: bool) -> None:
        self.ours = ours
        self.length = ours.prefix + ours.own
        device = ours.runner.device
        own = ours.slots[ours.prefix :].view(ours.branches, ours.own)
        paths = torch.cat([ours.slots[: ours.prefix].expand(ours.branches, -1), own], 1)[:, :-1].to(device).long()
        config = ours.model.config
        self.cache = StaticCache(config=config, max_cache_len=self.length) if static else DynamicCache(config=config)
        self.static = static
        for layer, (k_pool, v_pool) in ours.runner.pool.layers.items():
            # [branches, length - 1, heads, dim] -> [branches, heads, length - 1, dim]
            k, v = (pool[paths].transpose(1, 2).contiguous() for pool in (k_pool, v_pool))
            self.cache.update(k, v, layer)
        self.position = torch.full((ours.branches, 1), self.length - 1, device=device)
        self.tokens = ours.tokens[0][:, None].contiguous()

    @staticmethod
    def bytes_needed(ours: ForestStep) -> float:
        """Memory of a cache per branch, and of one layer's copy while it is filled or grown."""
        each = ours.branches * (ours.prefix + ours.own) * 2 * ours.heads * ours.dim * ours.dtype.itemsize
        return float(each) * (ours.layers + 2)

    def before(self) -> None:
        """The state before the step: the last token not yet in the cache, the stock attention in the model."""
        self.ours.model.set_attn_implementation("sdpa")
        for layer in self.cache.layers:
            if self.static:
                layer.cumulative_length.fill_(self.length - 1)
            elif layer.get_seq_length() == self.length:
                layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]

    def forward(self) -> Tensor:
        """Logits [branches, vocabulary]."""
        out = self.ours.model(
            input_ids=self.tokens, position_ids=self.position, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        logits: Tensor = out.logits[:, 0]
        return logits


def floor_work(ours: ForestStep) -> tuple[float, float]:
    """Fewest bytes and operations of a step: weights and every distinct K/V once; products of all rows."""
    model = ours.model
    embedding = model.get_input_embeddings().weight.numel()
    tied = bool(model.config.tie_word_embeddings)
    weights = sum(p.numel() for p in model.parameters()) - (0 if tied else embedding)
    keys = ours.forest.num_keys()
    item = ours.dtype.itemsize
    num_bytes = weights * item + keys * ours.layers * 2 * ours.heads * ours.dim * item
    seen = ours.branches * (ours.prefix + ours.own)
    attention = 4.0 * seen * model.config.num_attention_heads * ours.dim * ours.layers
    return float(num_bytes), 2.0 * weights * ours.branches + attention
