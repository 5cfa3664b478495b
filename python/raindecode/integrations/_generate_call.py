"""What one call of transformers' `generate` asks for, in the terms of a Decoder; what a Decoder cannot do is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitNormalization,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from raindecode.errors import ConfigError, PromptError
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling
from raindecode.settings import is_whole

# Processors a draw applies itself, by the field of Sampling and in the order it applies them.
_SHAPING: dict[type[Any], tuple[str, str]] = {
    RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
}
_NEUTRAL = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
_DEFAULT_TOP_K = 50  # transformers' own, where nobody says
_SPARE = {"past_key_values", "use_cache", "logits_to_keep", "cache_position"}  # of its forwards; the engine has its own
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class Call:
    """One call of `generate`.

    Attributes:
        rows: token ids of every prompt, without padding.
        sampling: how tokens are drawn; without meaning where RAIN searches.
        max_new_tokens: of every answer.
        eos_token_ids: that end an answer.
        stop: strings that end it.
        seeds: of every row.
        pad_token_id: None where there is none.
    """

    rows: list[list[int]]
    sampling: Sampling
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    stop: tuple[str, ...]
    seeds: list[int]
    pad_token_id: int | None


def read_call(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, processors: Iterable[Any], criteria: Iterable[Any],
    *, seed: int | Sequence[int], searching: bool, others: Mapping[str, Any],
) -> Call:  # fmt: skip
    """What `generate` handed to a `custom_generate` callable.

    Args:
        input_ids: [batch, tokens].
        processors, criteria: the lists that `generate` has made of its settings and what the user gave.
        searching: whether RAIN chooses the tokens.
        others: the remaining keywords.

    Raises:
        ConfigError, PromptError: something was asked for that a Decoder does not do, or nothing is left of a prompt.
    """
    _check_mode(config)
    _check_keywords(others)
    rows = _rows(input_ids, others.get("attention_mask"))
    _check_positions(rows, others.get("position_ids"), input_ids.shape[1])
    shaping = _shaping(processors)
    if searching:
        _check_search(shaping, model.generation_config)
        shaping = {}
    elif not config.do_sample:
        shaping = {"repetition_penalty": shaping.get("repetition_penalty", 1.0), "temperature": 0.0}
    ends, stop = _ends(criteria)
    return Call(
        rows, Sampling(**shaping), _limit(config, input_ids), ends, stop, _seeds(seed, len(rows), config), _pad(config, ends)
    )  # fmt: skip


def _check_mode(config: GenerationConfig) -> None:
    if (config.num_beams or 1) > 1:
        raise ConfigError(f"num_beams is {config.num_beams}; allowed: 1, the engine decodes without beams")
    for name in _OUTPUTS:
        if getattr(config, name, False):
            raise ConfigError(
                f"{name}=True was given; allowed: False, the engine does not keep them (return_dict_in_generate=True "
                "returns completions with their counters)"
            )
    for name in ("prompt_lookup_num_tokens", "dola_layers", "penalty_alpha", "assistant_early_exit", "use_mtp"):
        if getattr(config, name, None):
            raise ConfigError(
                f"{name} is {getattr(config, name)!r}; allowed: None, it belongs to another way of decoding"
            )


def _check_keywords(others: Mapping[str, Any]) -> None:
    cache: Any = others.get("past_key_values")
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    if length:
        raise ConfigError(
            f"past_key_values holds {length} tokens; allowed: none, the engine keeps K/V of its own: give the whole prompt"
        )
    for name, value in others.items():
        if value is not None and name not in _SPARE and name not in {"attention_mask", "position_ids"}:
            raise ConfigError(
                f"{name} was given to generate; allowed: input_ids and attention_mask, the engine runs text only"
            )


def _rows(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The prompts without padding."""
    if input_ids.dim() != 2:
        raise PromptError(f"input_ids has {input_ids.dim()} dimensions; give [batch, tokens]")
    given = input_ids.tolist()
    if mask is None:
        return [list(row) for row in given]
    rows = []
    for i, (row, shown) in enumerate(zip(given, mask.bool().tolist(), strict=True)):
        first = shown.index(True) if True in shown else len(row)
        if not all(shown[first:]):
            raise PromptError(
                f"the attention mask of prompt {i} hides tokens behind its first; pad prompts on the left (padding_side='left')"
            )
        rows.append(row[first:])
    return rows


def _check_positions(rows: Sequence[Sequence[int]], positions: Tensor | None, width: int) -> None:
    if positions is None:
        return
    for i, row in enumerate(rows):
        mine = positions[min(i, len(positions) - 1)].tolist()
        if mine[width - len(row) :] != list(range(len(row))):
            raise ConfigError(
                f"position_ids of prompt {i} do not count its tokens from 0; leave them out, the engine numbers them itself"
            )


def _shaping(processors: Iterable[Any]) -> dict[str, Any]:
    """Fields of Sampling that come to the same as these processors."""
    order = list(_SHAPING)
    found: dict[str, Any] = {}
    last = -1
    for one in processors:
        if type(one) is LogitNormalization:  # no draw depends on it
            continue
        if type(one) not in _SHAPING:
            raise ConfigError(
                f"the logits processor {type(one).__name__} cannot be applied by the engine; allowed: those of temperature, top_k, "
                "top_p, min_p and repetition_penalty"
            )
        field, attribute = _SHAPING[type(one)]
        place = order.index(type(one))
        if place <= last:
            raise ConfigError(
                f"the logits processor {type(one).__name__} comes behind {order[last].__name__} or twice; allowed: once each, in the "
                f"order {', '.join(kind.__name__ for kind in order)}"
            )
        if getattr(one, "min_tokens_to_keep", 1) != 1:
            raise ConfigError(f"{type(one).__name__} has min_tokens_to_keep {one.min_tokens_to_keep}; allowed: 1")
        last, found[field] = place, getattr(one, attribute)
    return found


def _check_search(shaping: Mapping[str, Any], checkpoint: GenerationConfig) -> None:
    """RAIN draws by its own settings. What a checkpoint ships as its defaults is passed over, what the caller adds is not."""
    for field, value in shaping.items():
        shipped = getattr(checkpoint, field, None)
        usual = _DEFAULT_TOP_K if field == "top_k" else _NEUTRAL[field]
        if value not in (shipped, usual, _NEUTRAL[field]):
            raise ConfigError(
                f"{field} is {value}; allowed with RAIN: nothing, it draws by settings of its own: RAIN(expansion_temperature=..., "
                "top_k=...)"
            )


def _ends(criteria: Iterable[Any]) -> tuple[frozenset[int], tuple[str, ...]]:
    """Token ids and strings that end an answer."""
    ids: set[int] = set()
    stop: tuple[str, ...] = ()
    for one in criteria:
        if isinstance(one, EosTokenCriteria):
            ids |= set(one.eos_token_id.reshape(-1).tolist())
        elif isinstance(one, StopStringCriteria):
            stop += tuple(one.stop_strings)
        elif not isinstance(one, MaxLengthCriteria):
            raise ConfigError(
                f"the stopping criterion {type(one).__name__} cannot be asked by the engine; allowed: lengths, end-of-text ids and stop "
                "strings"
            )
    return frozenset(ids), stop


def _limit(config: GenerationConfig, input_ids: Tensor) -> int:
    limit = config.max_new_tokens
    if config.max_length is not None:  # generate has worked max_new_tokens into it
        limit = config.max_length - input_ids.shape[1]
    if limit is None or limit < 1:
        raise ConfigError(f"there is room for {limit} new tokens; give max_new_tokens of 1 or more")
    return int(limit)


def _seeds(seed: int | Sequence[int], rows: int, config: GenerationConfig) -> list[int]:
    if isinstance(seed, Sequence):
        if len(seed) != rows:
            raise ConfigError(f"{len(seed)} seeds were given for {rows} rows; give one seed, or one per row")
        return list(seed)
    if not is_whole(seed):
        raise ConfigError(f"seed is {seed!r}; allowed: a whole number, or one per row")
    copies = config.num_return_sequences or 1  # generate has repeated every prompt so often
    return [seed + row % copies for row in range(rows)]


def _pad(config: GenerationConfig, ends: frozenset[int]) -> int | None:
    pad = config.pad_token_id
    if pad is None and isinstance(config.eos_token_id, (list, tuple)):
        pad = config.eos_token_id[0]
    elif pad is None:
        pad = config.eos_token_id
    return min(ends, default=None) if pad is None else int(pad)


def of_generate(name: str) -> Any:
    """An argument of the `generate` call under way that transformers does not hand on to a callable; None without such a call.

    transformers 5.23 reads `streamer` and `assistant_model` itself and drops them when `custom_generate` is a function: a streamer
    would never end, and whoever reads from it would wait for ever.
    """
    wanted = inspect.unwrap(GenerationMixin.generate).__code__
    frame: FrameType | None = inspect.currentframe()
    try:
        while frame is not None and frame.f_code is not wanted:
            frame = frame.f_back
        return None if frame is None else frame.f_locals.get(name)
    finally:
        del frame


def joined(input_ids: Tensor, answers: Sequence[Sequence[int]], pad: int | None) -> Tensor:
    """[batch, prompt + longest answer]: what `generate` returns; shorter answers are padded on the right.

    Raises:
        ConfigError: they differ in length, and there is no padding id.
    """
    longest = max(map(len, answers), default=0)
    if pad is None and any(len(answer) < longest for answer in answers):
        raise ConfigError("answers differ in length and there is no id to pad them with; give pad_token_id")
    rows = [[*answer, *[pad or 0] * (longest - len(answer))] for answer in answers]
    return torch.cat((input_ids, torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)), dim=1)


def require_search(search: object) -> RAIN | None:
    """RAIN, by itself or by the name of a preset; None samples.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(search, str):
        return RAIN.preset(search)  # type: ignore[arg-type]
    if search is not None and not isinstance(search, RAIN):
        raise ConfigError(
            f"search is a {type(search).__name__}; give RAIN, the name of one of its presets, or None, which samples as generate's "
            "own arguments say"
        )
    return search
