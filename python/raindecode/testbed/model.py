"""The testbed's architecture: an ordinary Llama of about 0.9 million parameters, and its stored form."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

HIDDEN: Final = 128
LAYERS: Final = 4
CONTEXT: Final = 1024
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2


def make_config(vocab_size: int) -> LlamaConfig:
    """Widths are multiples of 16 and head_dim is 32, as the kernels' exact mode likes them (design.md section 4)."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        attention_dropout=0.0,
    )


def make_model(vocab_size: int, *, seed: int) -> LlamaForCausalLM:
    """A fresh model in fp32; residual outputs start smaller, so that four layers add up to unit scale."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(make_config(vocab_size))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            small = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, 0.0, 0.02 if "embed" in name else 0.03 if small else 0.06)
    return model


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config, generation config and fp32 safetensors into `folder`, beside the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    make_generation_config: Any = GenerationConfig  # untyped in transformers
    model.generation_config = make_generation_config(
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
