"""A LoRA adapter in PEFT's file format, made, stored and merged without the `peft` package."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from raindecode.errors import ModelError

TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PREFIX: Final = "base_model.model."


class LowRank(nn.Module):
    """Parametrization W -> W + (alpha / rank) B A with trainable A [rank, in] and B [out, rank]; B starts at zero."""

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, same shape as `weight`."""
        return weight + self.scale * (self.lora_B @ self.lora_A)


def target_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer that the adapter touches, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS
    }


def attach_adapter(model: nn.Module, *, rank: int, alpha: float) -> dict[str, LowRank]:
    """Freeze `model` and put a fresh low-rank update on every target; returns the updates by module name."""
    model.requires_grad_(False)
    updates: dict[str, LowRank] = {}
    for name, linear in target_modules(model).items():
        updates[name] = LowRank(linear, rank=rank, alpha=alpha)
        parametrize.register_parametrization(linear, "weight", updates[name])
    return updates


def save_adapter(updates: dict[str, LowRank], folder: Path, *, rank: int, alpha: float) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = update.lora_A.detach().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = update.lora_B.detach().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)
    config = {
        "base_model_name_or_path": "testbed",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def merge_adapter(model: nn.Module, folder: Path) -> None:
    """Add the adapter's update to the weights of `model` in place.

    Raises:
        ModelError: a target of the adapter is not a linear layer of `model`, or the shapes do not fit.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    linears = target_modules(model)
    for key, down in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        up = tensors[key.replace(".lora_A.", ".lora_B.")]
        if name not in linears or linears[name].weight.shape != (up.size(0), down.size(1)):
            raise ModelError(
                f"adapter target {name!r} of shape {(up.size(0), down.size(1))} does not fit the model; "
                f"use the base it was trained on"
            )
        linears[name].weight += scale * (up @ down)
