"""Pairs of small models for the tests of mixtures: an aligned partner, an adapter on disk, and both by plain transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import EVERY_BYTE, byte_tokenizer, stock_copy, tiny_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from raindecode.decoder import Decoder
from raindecode.policy.dera import DeRa
from raindecode.policy.policy import Policy

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TARGETS = {
    "llama": LINEAR, "qwen3": LINEAR, "gemma2": LINEAR, "gpt2": ("c_attn", "c_proj", "c_fc"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
}  # fmt: skip


def reference_model(family: str = "llama", **changes: Any) -> PreTrainedModel:
    return tiny_model(family, vocab_size=EVERY_BYTE, **changes)


def aligned_model(reference: PreTrainedModel, seed: int = 1, size: float = 0.3) -> PreTrainedModel:
    """A model some way from `reference`: every matrix moved by a share of its own size."""
    other = stock_copy(reference)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() == 2:
                step = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += size * parameter.std() * step
    return other


def write_adapter(
    folder: Path, model: PreTrainedModel, *, rank: int = 4, seed: int = 1, size: float = 0.6, targets: Iterable[str] | None = None
) -> str:  # fmt: skip
    """A PEFT folder with a random update of every linear layer of the blocks, or those that end in `targets`."""
    wanted = tuple(_TARGETS[model.config.model_type] if targets is None else targets)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] not in wanted:
            continue
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        outputs, inputs = weight.shape if isinstance(module, torch.nn.Linear) else weight.shape[::-1]
        down, up = (torch.randn(s, generator=generator) for s in ((rank, inputs), (outputs, rank)))
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up * size * weight.std() / rank**0.5 / 2
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(wanted), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


def merged(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """A copy of `model` with the adapter's update in its weights."""
    from raindecode.engine.adapter import load_adapter

    twin = copy.deepcopy(model)
    modules = dict(twin.named_modules())
    with torch.no_grad():
        for name, update in load_adapter(folder, model).updates.items():
            module: Any = modules[name]
            change = update.scale * (update.up @ update.down)
            module.weight += change if isinstance(module, torch.nn.Linear) else change.T
    return stock_copy(twin)


def pair(reference: PreTrainedModel, *others: PreTrainedModel, **options: Any) -> Decoder:
    """A decoder of whole models; copies, so that each can be used by itself as well."""
    options.setdefault("kv_tokens", 3000)
    tokenizer = byte_tokenizer()
    aligned = [(copy.deepcopy(other), tokenizer) for other in others]
    return Decoder(copy.deepcopy(reference), tokenizer, aligned=aligned, **options)


def dera(*weights: float, **options: Any) -> Policy:
    return Policy(dera=DeRa(weights, **options))


def stock_logits(models: Sequence[PreTrainedModel], path: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[models, vocabulary] of each model by itself, float64."""
    with torch.inference_mode():
        rows = [m(input_ids=torch.tensor([list(path)]), use_cache=False).logits[0, -1].double().numpy() for m in models]
    return np.stack(rows)


def mixed_logits(models: Sequence[PreTrainedModel], weights: Sequence[float], path: Sequence[int]) -> Any:
    """[vocabulary] (1 - sum w) h_ref + sum w_i h_i, float64."""
    rows = stock_logits(models, path)
    return rows[0] + sum(w * (row - rows[0]) for w, row in zip(weights, rows[1:], strict=True))


def greedy_by_hand(
    models: Sequence[PreTrainedModel], weights: Sequence[float], prompt: Sequence[int], count: int, ends: Iterable[int] = ()
) -> list[int]:  # fmt: skip
    """Greedy decoding from mixed logits with plain transformers, every forward from the first token."""
    path, written = list(prompt), []
    stops = set(ends)
    for _ in range(count):
        written.append(int(mixed_logits(models, weights, [*path, *written]).argmax()))
        if written[-1] in stops:
            break
    return written
