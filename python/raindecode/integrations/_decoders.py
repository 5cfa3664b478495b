"""Decoders behind models that belong to someone else: made once, kept with the model, and out of its way between calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any, NamedTuple
from weakref import WeakSet

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from raindecode.decoder import Decoder
from raindecode.engine.attention import IMPLEMENTATION
from raindecode.errors import ModelError

_ATTRIBUTE = "_raindecode"
_MOST = 4  # decoders kept with one model
_SMALLEST = 4096  # tokens of a pool
_turn = RLock()  # an engine serves one caller at a time


class _Swap(NamedTuple):
    """A module that a Decoder put in another's place."""

    parent: nn.Module
    name: str
    own: nn.Module
    ours: nn.Module


class _Held(NamedTuple):
    decoder: Decoder
    models: tuple[PreTrainedModel, ...]
    swaps: tuple[_Swap, ...]
    kv_tokens: int


class _Kept:
    """What is kept with a model. A copy of the model, or what is pickled of it, has nothing of it."""

    def __init__(self) -> None:
        self.held: dict[tuple[Any, ...], _Held] = {}
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.references: WeakSet[PreTrainedModel] = WeakSet()  # that decoders with this model are kept with

    def __deepcopy__(self, memo: object) -> _Kept:
        return _Kept()

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def _kept(model: PreTrainedModel) -> _Kept:
    kept: _Kept = model.__dict__.setdefault(_ATTRIBUTE, _Kept())
    return kept


def forget(model: PreTrainedModel) -> None:
    """Drop what is kept with a model, and with the references it was mixed with: decoders, their K/V pools, and the hold they have
    on each other's models."""
    with _turn:
        kept: _Kept | None = model.__dict__.pop(_ATTRIBUTE, None)
        for reference in () if kept is None else kept.references:
            held = _kept(reference).held
            for key in [key for key, one in held.items() if any(mixed is model for mixed in one.models)]:
                del held[key]


def tokenizer_of(model: PreTrainedModel, given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the one saved where the model was loaded from.

    Raises:
        ModelError: there is none.
    """
    if given is not None:
        if not hasattr(given, "get_vocab"):
            raise ModelError(f"tokenizer is a {type(given).__name__}; give the model's tokenizer")
        return given
    kept = _kept(model)
    if kept.tokenizer is None:
        try:
            kept.tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        except Exception as error:  # tokenizers raise many kinds, some bare Exception
            raise ModelError(
                f"no tokenizer was found at the model's name {model.name_or_path!r}; give it with the function: "
                "custom_generate=functools.partial(dera, tokenizer=tokenizer)"
            ) from error
    return kept.tokenizer


@contextmanager
def borrowed(
    model: PreTrainedModel, aligned: Sequence[PreTrainedModel | str], tokenizer: PreTrainedTokenizerBase, kv_tokens: int
) -> Iterator[Decoder]:
    """A Decoder of `model` and its aligned partners, for one caller at a time.

    Behind it the models are what they were: their attention, their activations. No K/V outlives it, so weights may change
    between calls.

    Args:
        aligned: whole models, and paths of LoRA adapters on `model`.
        kv_tokens: that the pools must have room for.
    """
    models = (model, *(one for one in aligned if not isinstance(one, str)))
    for one in models:
        if not isinstance(one, PreTrainedModel):
            raise ModelError(f"a model is a {type(one).__name__}; give a transformers PreTrainedModel")
    with _turn:
        before = [(one, _attention_of(one)) for one in models]
        swapped: list[_Swap] = []
        try:
            held = _held(model, models, aligned, tokenizer, kv_tokens)
            for one in models:
                one.set_attn_implementation(IMPLEMENTATION)
            for swap in held.swaps:
                swapped += [swap] * _put(swap.parent, swap.name, swap.own, swap.ours)
            try:
                yield held.decoder
            finally:
                held.decoder.engine.forget()
        finally:
            for swap in swapped:
                _put(swap.parent, swap.name, swap.ours, swap.own)
            for one, attention in before:
                one.set_attn_implementation(attention)


def _held(
    model: PreTrainedModel, models: tuple[PreTrainedModel, ...], aligned: Sequence[PreTrainedModel | str],
    tokenizer: PreTrainedTokenizerBase, kv_tokens: int,
) -> _Held:  # fmt: skip
    kept = _kept(model).held
    names = tuple(one if isinstance(one, str) else id(one) for one in aligned)
    key = (names, id(tokenizer), *((one.dtype, one.device) for one in models))
    held = kept.pop(key, None)
    if held is None or held.kv_tokens < kv_tokens:
        room = max(_SMALLEST, 1 << (kv_tokens - 1).bit_length())
        held = None  # the smaller pools go first
        held = _made(models, [one for one in aligned if isinstance(one, str)], tokenizer, room)
    kept[key] = held  # the last one used stands last
    for one in models[1:]:
        _kept(one).references.add(model)
    while len(kept) > _MOST:
        del kept[next(iter(kept))]
    return held


def _made(
    models: tuple[PreTrainedModel, ...], adapters: Sequence[str], tokenizer: PreTrainedTokenizerBase, kv_tokens: int
) -> _Held:
    parents = list(dict.fromkeys(module for one in models for module in one.modules()))
    own = [dict(parent.named_children()) for parent in parents]
    swaps: list[_Swap] = []
    try:
        decoder = Decoder(
            models[0], tokenizer, adapters=adapters, aligned=[(one, _partner(one, tokenizer)) for one in models[1:]],
            name=str(models[0].name_or_path or "model"), kv_tokens=kv_tokens,
        )  # fmt: skip
    finally:
        for parent, children in zip(parents, own, strict=True):
            now = dict(parent.named_children())
            swaps += [
                _Swap(parent, name, child, now[name]) for name, child in children.items() if now[name] is not child
            ]
        for swap in swaps:
            _put(swap.parent, swap.name, swap.ours, swap.own)
    return _Held(decoder, models, tuple(swaps), kv_tokens)


def _partner(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer of another model, to be compared; where none is saved with it, the one in use."""
    try:
        return tokenizer_of(model, None)
    except ModelError:
        return tokenizer


def _put(parent: nn.Module, name: str, there: nn.Module, instead: nn.Module) -> bool:
    """Put one module in another's place, if that is still there."""
    if getattr(parent, name, None) is not there:
        return False
    setattr(parent, name, instead)
    return True


def _attention_of(model: PreTrainedModel) -> Any:
    """What `set_attn_implementation` takes to make a model's attention what it is now."""
    own = model.config._attn_implementation
    parts: dict[str, Any] = {name: getattr(model.config, name, None) for name in model.config.sub_configs}
    if not parts:
        return own
    return {"": own, **{name: part._attn_implementation for name, part in parts.items() if part is not None}}
