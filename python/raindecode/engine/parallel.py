"""Models whose weights are split over processes: tensor parallel, as transformers' DistributedConfig loads them.

Every process runs the same engine on the same requests. Attention sees its own heads, with K/V pools of as many; logits come out
whole and alike everywhere, and so do all decisions that are made from them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from raindecode.errors import ConfigError

# The sum of two numbers does not depend on who begins. With more processes the order may depend on where an element lies in the
# message, and so on the number of rows.
MAX_EXACT = 2


def is_split(parameter: Any) -> bool:
    """Whether a process holds a part of it only: it is a DTensor."""
    return getattr(parameter, "device_mesh", None) is not None


def processes_of(model: nn.Module) -> int:
    """Processes its weights are split over; 1 where they are whole."""
    parameters: Iterable[Any] = model.parameters()
    return max((int(p.device_mesh.size()) for p in parameters if is_split(p)), default=1)


def whole(parameter: Any) -> Tensor:
    """All of a parameter, its parts gathered from every process, which all have to ask."""
    held = parameter.detach()
    all_of_it: Tensor = held.full_tensor() if is_split(held) else held
    return all_of_it


def least(value: int, models: Iterable[PreTrainedModel]) -> int:
    """The smallest value of any process that shares one of the models."""
    for model in models:
        split: Any = next((p for p in model.parameters() if is_split(p)), None)
        if split is not None:
            one = torch.tensor(value, dtype=torch.int64, device=model.device)
            torch.distributed.all_reduce(one, torch.distributed.ReduceOp.MIN, split.device_mesh.get_group())
            value = int(one)
    return value


def check_processes(wanted: int) -> None:
    """Whether this is one of so many processes.

    Raises:
        ConfigError: it is not; the message says how to start them.
    """
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal():
        raise ConfigError(f"WORLD_SIZE is {given!r:.40}; allowed: the number of processes, as torchrun sets it")
    there = int(given)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        there = torch.distributed.get_world_size()
    if there != wanted:
        raise ConfigError(
            f"tensor_parallel is {wanted}, and this is one of {there} process{'es' if there > 1 else ''}; start {wanted} with "
            f"torchrun --nproc-per-node {wanted}, or leave it out"
        )


def check_heads(config: PretrainedConfig, processes: int) -> None:
    """Whether every process gets as many heads.

    Raises:
        ConfigError: they do not divide.
    """
    text: Any = config.get_text_config()
    heads = int(text.num_attention_heads)
    keys = int(getattr(text, "num_key_value_heads", None) or heads)
    if heads % processes or keys % processes:
        raise ConfigError(
            f"tensor_parallel is {processes}, and the model has {heads} heads of queries and {keys} of keys; allowed: a number that "
            "divides both"
        )
