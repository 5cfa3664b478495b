"""raindecode: aligns frozen language models while they decode."""

from __future__ import annotations

from raindecode import env

env.prepare_process()  # before torch is imported

from raindecode.decoder import Decoder  # noqa: E402
from raindecode.errors import (  # noqa: E402
    CapacityError,
    ConfigError,
    EvaluatorError,
    ModelError,
    PromptError,
    RainDecodeError,
    RequestCancelled,
    UnsupportedModelError,
)
from raindecode.policy.policy import Policy  # noqa: E402
from raindecode.policy.prompt import ChatFormat  # noqa: E402
from raindecode.search.evaluator import ClassifierEvaluator, JudgeTemplate, SelfEvaluation  # noqa: E402
from raindecode.search.rain import RAIN  # noqa: E402
from raindecode.search.sampling import Sampling  # noqa: E402
from raindecode.types import Completion, Stats  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "RAIN",
    "CapacityError",
    "ChatFormat",
    "ClassifierEvaluator",
    "Completion",
    "ConfigError",
    "Decoder",
    "EvaluatorError",
    "JudgeTemplate",
    "ModelError",
    "Policy",
    "PromptError",
    "RainDecodeError",
    "RequestCancelled",
    "Sampling",
    "SelfEvaluation",
    "Stats",
    "UnsupportedModelError",
    "__version__",
]
