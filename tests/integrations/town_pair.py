"""The embedded pair as two plain checkpoints, and greedy decoding from their mixture by transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raindecode import testbed
from raindecode.engine.adapter import load_adapter


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(testbed.WEIGHTS)


def write_aligned(folder: Path) -> Path:
    """The aligned model with its adapter in the weights."""
    model = load(testbed.WEIGHTS)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, update in load_adapter(str(testbed.ADAPTER), model).updates.items():
            modules[name].weight += update.scale * (update.up @ update.down)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def mixed_greedy(reference: Any, aligned: Any, prompt: Sequence[int], weight: float, count: int) -> list[int]:
    """Tokens of the largest z_ref + λ (z_al - z_ref), every forward from the first token, computed in double."""
    path = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.tensor([path])
            ref, al = (model(ids, use_cache=False).logits[0, -1].double() for model in (reference, aligned))
            path.append(int((ref + weight * (al - ref)).argmax()))
            if path[-1] == reference.config.eos_token_id:
                break
    return path[len(prompt) :]
