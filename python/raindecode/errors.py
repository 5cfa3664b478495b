"""Errors of the decoder. Each says what was given, what is allowed and what to do; the CLI turns them into exit code 2."""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "CapacityError",
    "ConfigError",
    "EditFileError",
    "EvaluatorError",
    "FitError",
    "JudgeError",
    "JudgeUnavailableError",
    "ModelError",
    "NumericError",
    "PrefixFileError",
    "PromptError",
    "PromptFileError",
    "RainDecodeError",
    "RequestCancelled",
    "UnsupportedModelError",
    "VocabularyError",
]


class RainDecodeError(Exception):
    """Base of every error of this package."""


class ConfigError(RainDecodeError, ValueError):
    """A setting lies outside what is allowed."""


class PromptError(RainDecodeError, ValueError):
    """A prompt is empty, too long for the context, or not text."""


class PromptFileError(PromptError):
    """A file of a constant prompt cannot be read, or is not of the form it should be."""


class PrefixFileError(RainDecodeError, ValueError):
    """A file of a prompt's K/V cannot be read or written, is damaged, or was made by another model or policy."""


class ModelError(RainDecodeError, ValueError):
    """A model or tokenizer could not be found or loaded."""


class UnsupportedModelError(ModelError):
    """The model loads, but the engine cannot serve its architecture; the message names it and the reason."""


class AdapterError(ModelError):
    """A LoRA adapter cannot be read, is of a kind that cannot be served, or is for another base model."""


class VocabularyError(ModelError):
    """Two models that decode together do not number the same tokens the same way."""


class EditFileError(ModelError):
    """A file of edit directions cannot be read or written: it is missing, damaged, of another format, or holds what no edit takes."""


class FitError(RainDecodeError, ValueError):
    """Activations do not give the directions asked for: too few pairs, no contrast, shapes that do not match, or NaN."""


class NumericError(RainDecodeError, FloatingPointError):
    """The model produced NaN, +inf, or nothing but -inf."""


class CapacityError(RainDecodeError, RuntimeError):
    """The KV pool is too small for one request, even alone."""


class EvaluatorError(RainDecodeError, RuntimeError):
    """An evaluator or embedder raised, or returned something that is not a score per item."""


class JudgeError(RainDecodeError, RuntimeError):
    """A judge of answers gave no verdict that can be used: nonsense, a missing aspect, a score out of range, no answer in time."""


class JudgeUnavailableError(JudgeError):
    """A judge cannot be asked at all: nobody listens at its address, it refuses the key, or a judge's function is broken."""


class RequestCancelled(RainDecodeError):
    """The request was cancelled before it finished."""
