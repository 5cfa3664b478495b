"""What a decoder has to know of a transformers model: its context, vocabulary, ends of text, name, and place."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from raindecode.engine.parallel import whole
from raindecode.errors import ConfigError
from raindecode.hidden_edits import ModelIdentity

_FALLBACK_CONTEXT = 2048
_SAMPLES = 16  # elements of a parameter that enter a fingerprint


def vocabulary_of(model: PreTrainedModel) -> int:
    """Ids the model has an embedding for."""
    return int(model.config.get_text_config().vocab_size)


def name_of(model: PreTrainedModel) -> str:
    """What to call a model in messages."""
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def identity_of(model: PreTrainedModel) -> ModelIdentity:
    """What a model is recognised by: its form and a sample of every parameter, in bfloat16, so that a model is the same loaded in
    float32 or bfloat16. Not in float16, unless its file is: numbers rounded to that and then to bfloat16 may come out as
    others. An adapter of peft inside the model is part of it.
    """
    config = model.config.get_text_config()
    digest = hashlib.sha256(repr((config.model_type, config.num_hidden_layers, config.hidden_size)).encode())
    samples = []
    for name, held in sorted(model.named_parameters()):
        parameter = whole(held)
        digest.update(repr((name, tuple(parameter.shape))).encode())
        if not parameter.numel():
            continue
        at = torch.tensor(
            [i * (parameter.numel() - 1) // (_SAMPLES - 1) for i in range(_SAMPLES)], device=parameter.device
        )
        index = torch.unravel_index(at, parameter.shape)  # by row and column: parameters may be views of joined memory
        samples.append(parameter[index].reshape(-1).to(torch.bfloat16))
    digest.update(torch.cat(samples).cpu().view(torch.int16).numpy().tobytes())
    return ModelIdentity(str(config.model_type), config.num_hidden_layers, config.hidden_size, digest.hexdigest()[:32])


def eos_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every end-of-text id the model or its tokenizer names."""
    found: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        found |= set(value) if isinstance(value, (list, tuple)) else set() if value is None else {int(value)}
    return found


def context_length_of(model: PreTrainedModel) -> int:
    """Positions a request may use: see longest_context."""
    return longest_context(model.config)


def longest_context(given: PreTrainedConfig) -> int:
    """Positions a request may use.

    Longrope picks its frequencies by the longest row of a forward; past the original length a request would depend on
    its batch-mates, so it counts as the limit.
    """
    config = given.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or _FALLBACK_CONTEXT)
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") == "longrope":
            original = part.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            longest = min(longest, int(original or longest))
    return longest


def device_of(name: str | None) -> torch.device:
    """The device of that name; None takes the GPU when there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; allowed: cpu, cuda or cuda:N") from error
    if place.type not in {"cpu", "cuda"}:
        raise ConfigError(f"device is {name!r}; allowed: cpu, cuda or cuda:N")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device is {name!r}, but torch sees no GPU here: use device='cpu', or see `raindecode doctor`"
        )
    return place
