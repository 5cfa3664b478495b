"""raindecode: aligns frozen language models while they decode."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from raindecode import env

env.prepare_process()  # before torch is imported

if TYPE_CHECKING:
    from raindecode.decoder import Decoder
    from raindecode.errors import (
        AdapterError,
        CapacityError,
        ConfigError,
        EvaluatorError,
        ModelError,
        NumericError,
        PromptError,
        RainDecodeError,
        RequestCancelled,
        UnsupportedModelError,
        VocabularyError,
    )
    from raindecode.policy.dera import DeRa
    from raindecode.policy.policy import Policy
    from raindecode.policy.prompt import ChatFormat
    from raindecode.search.embedder import HiddenStates, TextEmbedder
    from raindecode.search.evaluator import CallableEvaluator, ClassifierEvaluator, JudgeTemplate, SelfEvaluation
    from raindecode.search.rain import RAIN
    from raindecode.search.sampling import Sampling
    from raindecode.sweep import SweepPoint, SweepResult
    from raindecode.types import Completion, Stats

__version__ = "0.1.0"

_ERRORS = (
    "AdapterError", "CapacityError", "ConfigError", "EvaluatorError", "ModelError", "NumericError", "PromptError",
    "RainDecodeError", "RequestCancelled", "UnsupportedModelError", "VocabularyError",
)  # fmt: skip
# Loaded when first asked for: importing torch and transformers takes seconds, `raindecode --help` should not.
_HOME = {
    "Decoder": "decoder",
    "DeRa": "policy.dera",
    "Policy": "policy.policy",
    "ChatFormat": "policy.prompt",
    "HiddenStates": "search.embedder",
    "TextEmbedder": "search.embedder",
    "CallableEvaluator": "search.evaluator",
    "ClassifierEvaluator": "search.evaluator",
    "JudgeTemplate": "search.evaluator",
    "SelfEvaluation": "search.evaluator",
    "RAIN": "search.rain",
    "Sampling": "search.sampling",
    "SweepPoint": "sweep",
    "SweepResult": "sweep",
    "Completion": "types",
    "Stats": "types",
    **dict.fromkeys(_ERRORS, "errors"),
}

__all__ = [
    "RAIN",
    "AdapterError",
    "CallableEvaluator",
    "CapacityError",
    "ChatFormat",
    "ClassifierEvaluator",
    "Completion",
    "ConfigError",
    "DeRa",
    "Decoder",
    "EvaluatorError",
    "HiddenStates",
    "JudgeTemplate",
    "ModelError",
    "NumericError",
    "Policy",
    "PromptError",
    "RainDecodeError",
    "RequestCancelled",
    "Sampling",
    "SelfEvaluation",
    "Stats",
    "SweepPoint",
    "SweepResult",
    "TextEmbedder",
    "UnsupportedModelError",
    "VocabularyError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'raindecode' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"raindecode.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
