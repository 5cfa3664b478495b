"""LoRA adapters in PEFT's format, read without the peft package and checked against the model they are for.

A module W x becomes W x + scale * up (down x). What cannot be served as exactly that is refused by name: a variant of LoRA
that was read as plain LoRA would answer, and answer wrongly.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raindecode.engine.adapter_file import read_adapter
from raindecode.engine.parallel import is_split
from raindecode.errors import AdapterError
from raindecode.settings import is_whole

_log = logging.getLogger("raindecode")
_SHOWN = 5  # names listed in a message before "and n more"

# `.default` is how early versions of PEFT wrote the adapter's name into the keys.
_KEY: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<side>lora_A|lora_B)(?:\.default)?\.weight")

# Settings of LoraConfig under which the update is not W + scale * up @ down of single linear layers, and nothing else.
_REFUSED: Final = {
    "use_dora": "DoRA also scales every row of the weights",
    "lora_bias": "it adds a bias of its own",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it replaces rows of the embedding",
    "target_parameters": "it changes parameters that are no linear layers, such as the fused experts of a mixture",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "aLoRA is active on a part of the text only",
    "megatron_config": "it is for Megatron's parallel layers",
    "use_qalora": "QALoRA pools the inputs of quantized layers",
    "use_bdlora": "BD-LoRA stores block-diagonal factors in another form",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA also truncates the base's weights",
    "monteclora_config": "MonteCLoRA samples its weights",
}
# These initializations take what the factors held at first out of the base's weights, which then are not the base's any more.
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Marks of a variant among the tensors' names, for files whose configuration does not own up to it.
_OTHER_TENSORS: Final = {
    "lora_magnitude_vector": "DoRA's magnitudes",
    "lora_embedding_": "LoRA on an embedding",
    "lora_B.bias": "a bias of LoRA's own (lora_bias)",
    "lora_diag": "KaSA's singular values",
    "trainable_tokens": "trained token embeddings",
}


@dataclass(frozen=True)
class LowRankUpdate:
    """What an adapter adds to one linear layer: scale * up @ down, in the layout [out, in] for GPT-2's Conv1D as well."""

    down: Tensor  # [r, in]
    up: Tensor  # [out, r]
    scale: float


@dataclass(frozen=True)
class Adapter:
    """The updates of an adapter by full module name, such as "model.layers.0.self_attn.q_proj".

    Tensors have the dtype of the module's weight and lie on its device.
    """

    name: str
    updates: dict[str, LowRankUpdate]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all it adds."""
        digest = hashlib.sha256()
        for name, update in sorted(self.updates.items()):
            digest.update(repr((name, update.scale)).encode())
            for factor in (update.down, update.up):
                digest.update(repr((tuple(factor.shape), factor.dtype)).encode())
                digest.update(factor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]


def load_adapter(path: str, model: PreTrainedModel) -> Adapter:
    """Read a LoRA adapter and check that it fits `model`.

    The tensors in the file say which modules it changes, not `target_modules`. scale is alpha / r, or alpha / sqrt(r) with
    `use_rslora`; `rank_pattern` and `alpha_pattern` hold as in PEFT.

    Args:
        path: a folder saved by peft, or a hub id.
        model: the loaded base model.

    Raises:
        AdapterError: nothing readable is there, the adapter is of a kind that cannot be served, or it is for another base;
            the message names what.
    """
    if not isinstance(path, str):
        raise AdapterError(f"adapter is a {type(path).__name__}; give the path of a PEFT folder, or a hub id")
    config, tensors = read_adapter(path)
    _check_kind(path, config)
    pairs = _pair(path, tensors, str(config.get("bias", "none")))
    modules = _targets(path, pairs, model)
    base = config.get("base_model_name_or_path")
    if base and base != model.name_or_path:
        _log.info(
            "adapter %r was trained on %r and is put on %r", path, base, model.name_or_path or "a model of no name"
        )
    updates = {name: _update(path, name, pair, modules[name], config) for name, pair in pairs.items()}
    return Adapter(path, updates)


def _check_kind(path: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"adapter {path!r} has peft_type {kind!r}; allowed: 'LORA'; merge it into a copy of the base instead"
        )
    for setting, reason in _REFUSED.items():
        if config.get(setting):
            raise AdapterError(
                f"adapter {path!r} sets {setting} ({reason}), which cannot be served; allowed: plain LoRA on linear layers; "
                "merge it into a copy of the base (peft's merge_and_unload) and give that as a second model"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"adapter {path!r} has init_lora_weights {start!r}, which changes the base's weights too; allowed: plain LoRA; "
            "save it again with peft's save_pretrained(path_initial_model_for_weight_conversion=...), or merge it"
        )


def _pair(path: str, tensors: Mapping[str, Tensor], bias: str) -> dict[str, tuple[Tensor, Tensor]]:
    """(lora_A, lora_B) by module name. Every tensor of the file is accounted for."""
    sides: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            unknown.append(key)
            continue
        pair = sides.setdefault(match["module"], {})
        if match["side"] in pair:
            raise AdapterError(f"adapter {path!r} holds {match['side']} of {match['module']!r} twice; save it again")
        pair[match["side"]] = tensor
    if unknown:
        raise AdapterError(f"adapter {path!r} holds {_explain(unknown, bias)}; allowed: lora_A and lora_B of linear layers; "
                           "merge it into a copy of the base (peft's merge_and_unload) and give that as a second model")  # fmt: skip
    if not sides:
        raise AdapterError(f"adapter {path!r} holds no tensors; save it again with peft's save_pretrained")
    for module, pair in sides.items():
        if len(pair) == 1:
            (there,) = pair
            other = "lora_B" if there == "lora_A" else "lora_A"
            raise AdapterError(f"adapter {path!r} has {there} of {module!r} but no {other}; save or fetch it again")
    return {module: (pair["lora_A"], pair["lora_B"]) for module, pair in sides.items()}


def _explain(unknown: list[str], bias: str) -> str:
    for mark, meaning in _OTHER_TENSORS.items():
        found = [key for key in unknown if mark in key]
        if found:
            return f"{meaning}: {_some(found)}"
    if all(key.endswith(".bias") for key in unknown):
        return f"biases of the base (bias={bias!r}): {_some(unknown)}"
    if not any(key.startswith("base_model.model.") for key in unknown):
        return f"tensors whose names do not begin with 'base_model.model.' as PEFT's do: {_some(unknown)}"
    return f"tensors that are no part of LoRA: {_some(unknown)}"


def _targets(path: str, names: Collection[str], model: PreTrainedModel) -> dict[str, nn.Module]:
    """The module of every name; each is one that an update can be added to."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    head: Any = model.get_output_embeddings()
    expert = [name for name in names if _in_experts(name, modules)]
    if expert:
        raise AdapterError(
            f"adapter {path!r} changes experts of a mixture: {_some(expert)}; allowed: linear layers outside the experts"
        )
    missing = [name for name in names if name not in modules]
    if missing:
        raise AdapterError(
            f"adapter {path!r} is for another base: this {type(model).__name__} has no {_some(missing)}; "
            "give the base the adapter was trained on"
        )
    for name in names:
        module: Any = modules[name]
        if head is not None and (module is head or getattr(module, "weight", None) is head.weight):
            raise AdapterError(
                f"adapter {path!r} changes the output layer {name!r}, which base and adapter must share; "
                "allowed: linear layers inside the blocks"
            )
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise AdapterError(
                f"adapter {path!r} changes {name!r}, a {type(module).__name__}; allowed: nn.Linear and transformers' Conv1D"
            )
        if is_split(module.weight):
            raise AdapterError(
                f"adapter {path!r} changes {name!r}, whose weight is split over processes; allowed with tensor_parallel: whole models: "
                "merge it into a copy of the base (peft's merge_and_unload) and give that as aligned"
            )
        if not module.weight.is_floating_point():
            raise AdapterError(
                f"adapter {path!r} changes {name!r}, whose weight is {module.weight.dtype}; "
                "allowed: weights of a floating-point type, not quantized ones"
            )
    return {name: modules[name] for name in names}


def _in_experts(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the name lies in a container of routed experts. Shared experts always run: they are ordinary layers."""
    parts = name.split(".")
    if "experts" in parts:
        return True
    prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return any(type(modules[prefix]).__name__.endswith("Experts") for prefix in prefixes if prefix in modules)


def _update(path: str, name: str, pair: tuple[Tensor, Tensor], module: Any, config: Mapping[str, Any]) -> LowRankUpdate:
    down, up = pair
    weight: Tensor = module.weight
    for side, tensor in (("lora_A", down), ("lora_B", up)):
        if tensor.dim() != 2 or not tensor.numel() or not tensor.is_floating_point():
            raise AdapterError(
                f"adapter {path!r}: {side} of {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                "allowed: a floating-point matrix that is not empty"
            )
    r = _pattern_value(path, "rank_pattern", name, config, config.get("r"))
    if not is_whole(r) or r < 1:
        raise AdapterError(f"adapter {path!r} gives {name!r} rank {r!r}; allowed: a whole number from 1")
    if (len(down), up.shape[1]) != (r, r):
        raise AdapterError(
            f"adapter {path!r}: ranks of {name!r} disagree: lora_A has {len(down)}, lora_B {up.shape[1]}, "
            f"the configuration says {r}; fetch or save the adapter again"
        )
    shape = tuple(weight.T.shape if isinstance(module, Conv1D) else weight.shape)
    if shape != (len(up), down.shape[1]):
        raise AdapterError(
            f"adapter {path!r} is for another base: its update of {name!r} is {len(up)} x {down.shape[1]} (out x in), "
            f"the module is {shape[0]} x {shape[1]}; give the base the adapter was trained on"
        )
    alpha = _pattern_value(path, "alpha_pattern", name, config, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise AdapterError(f"adapter {path!r} gives {name!r} alpha {alpha!r}; allowed: a finite number")
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return LowRankUpdate(
        down=_placed(path, f"lora_A of {name!r}", down, weight),
        up=_placed(path, f"lora_B of {name!r}", up, weight),
        scale=scale,
    )


def _placed(path: str, what: str, tensor: Tensor, weight: Tensor) -> Tensor:
    """The tensor with the weight's dtype and on its device."""
    placed = tensor.to(weight.device, weight.dtype).contiguous()
    if not bool(torch.isfinite(placed).all()):
        cause = "" if not bool(torch.isfinite(tensor).all()) else f" once it is {weight.dtype}"
        raise AdapterError(f"adapter {path!r}: {what} holds NaN or infinity{cause}; allowed: finite numbers")
    return placed


def _pattern_value(path: str, setting: str, name: str, config: Mapping[str, Any], default: Any) -> Any:
    """The value of the first pattern that the module's name, or its end after a dot, matches."""
    patterns = config.get(setting) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"adapter {path!r} has {setting} {patterns!r}; allowed: values by pattern")
    for pattern, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise AdapterError(
                f"adapter {path!r}: {pattern!r} in {setting} is no regular expression ({error})"
            ) from error
        if found:
            return value
    return default


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {rest} more" if rest > 0 else "")
