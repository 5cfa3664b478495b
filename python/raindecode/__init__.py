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
        EditFileError,
        EvaluatorError,
        FitError,
        JudgeError,
        JudgeUnavailableError,
        ModelError,
        NumericError,
        PrefixFileError,
        PromptError,
        PromptFileError,
        RainDecodeError,
        RequestCancelled,
        UnsupportedModelError,
        VocabularyError,
    )
    from raindecode.policy.alignez.edits import AlignEZ
    from raindecode.policy.alignez.elicitation import Elicitation
    from raindecode.policy.alignez.pairs import Pair, read_pairs
    from raindecode.policy.alignez.positions import Positions
    from raindecode.policy.dera import DeRa
    from raindecode.policy.policy import Policy
    from raindecode.policy.prompt import ChatFormat, Conversation
    from raindecode.policy.urial import URIAL
    from raindecode.search.embedder import HiddenStates, TextEmbedder
    from raindecode.search.evaluator import CallableEvaluator, ClassifierEvaluator, JudgeTemplate, SelfEvaluation
    from raindecode.search.rain import RAIN
    from raindecode.search.sampling import Sampling
    from raindecode.sweep import SweepPoint, SweepResult
    from raindecode.token_shift import ShiftedAnswer, TokenShift
    from raindecode.types import Completion, Stats

__version__ = "0.1.0"

_ERRORS = (
    "AdapterError", "CapacityError", "ConfigError", "EditFileError", "EvaluatorError", "FitError", "JudgeError",
    "JudgeUnavailableError", "ModelError", "NumericError",
    "PrefixFileError", "PromptError", "PromptFileError", "RainDecodeError", "RequestCancelled", "UnsupportedModelError", "VocabularyError",
)  # fmt: skip
# Loaded when first asked for: importing torch and transformers takes seconds, `raindecode --help` should not.
_HOME = {
    "Decoder": "decoder",
    "AlignEZ": "policy.alignez.edits",
    "Positions": "policy.alignez.positions",
    "Elicitation": "policy.alignez.elicitation",
    "Pair": "policy.alignez.pairs",
    "read_pairs": "policy.alignez.pairs",
    "DeRa": "policy.dera",
    "Policy": "policy.policy",
    "ChatFormat": "policy.prompt",
    "Conversation": "policy.prompt",
    "URIAL": "policy.urial",
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
    "ShiftedAnswer": "token_shift",
    "TokenShift": "token_shift",
    "Completion": "types",
    "Stats": "types",
    **dict.fromkeys(_ERRORS, "errors"),
}

__all__ = [
    "RAIN",
    "URIAL",
    "AdapterError",
    "AlignEZ",
    "CallableEvaluator",
    "CapacityError",
    "ChatFormat",
    "ClassifierEvaluator",
    "Completion",
    "ConfigError",
    "Conversation",
    "DeRa",
    "Decoder",
    "EditFileError",
    "Elicitation",
    "EvaluatorError",
    "FitError",
    "HiddenStates",
    "JudgeError",
    "JudgeTemplate",
    "JudgeUnavailableError",
    "ModelError",
    "NumericError",
    "Pair",
    "Policy",
    "Positions",
    "PrefixFileError",
    "PromptError",
    "PromptFileError",
    "RainDecodeError",
    "RequestCancelled",
    "Sampling",
    "SelfEvaluation",
    "ShiftedAnswer",
    "Stats",
    "SweepPoint",
    "SweepResult",
    "TextEmbedder",
    "TokenShift",
    "UnsupportedModelError",
    "VocabularyError",
    "__version__",
    "read_pairs",
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
