"""The embedded testbed: a small town, an exact judge, and a model of a million parameters that ships with the package.

It is synthetic. It shows that the machinery works and what it costs, not how aligned a real model becomes.
Source: docs, design section 6. Rebuild with ``python -m raindecode.testbed.train``, measure with
``python -m raindecode.testbed.evaluate``. Generator and judge need no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from raindecode.testbed.forms import (
    ANSWER_CUE,
    CHARACTERISTIC_CUE,
    ELICITATION,
    EVALUATION_HEADER,
    INTRO,
    OPTIONS_A,
    OPTIONS_B,
    PERSONAS,
    STYLE_PROMPTS,
    ElicitationForm,
    Side,
    Style,
    evaluation_prompts,
)
from raindecode.testbed.judge import Verdict, judge, parse_request
from raindecode.testbed.world import Request, Split, format_prompt, sample_requests

WEIGHTS: Final = Path(__file__).parent / "weights" / "base"
"""Hugging Face folder of the base model and its tokenizer."""

ADAPTER: Final = Path(__file__).parent / "weights" / "adapter"
"""PEFT folder of the aligned LoRA adapter."""

MEASURED: Final = Path(__file__).parent / "weights" / "MEASURED.json"
"""What `evaluate` measured on the shipped weights."""

__all__ = [
    "ADAPTER",
    "ANSWER_CUE",
    "CHARACTERISTIC_CUE",
    "ELICITATION",
    "EVALUATION_HEADER",
    "INTRO",
    "MEASURED",
    "OPTIONS_A",
    "OPTIONS_B",
    "PERSONAS",
    "STYLE_PROMPTS",
    "WEIGHTS",
    "ElicitationForm",
    "Request",
    "Side",
    "Split",
    "Style",
    "Verdict",
    "evaluation_prompts",
    "format_prompt",
    "judge",
    "parse_request",
    "sample_requests",
]
