"""Environment variables the package reads or sets, all in one place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from raindecode.errors import ConfigError


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of this CPU as Linux names them; empty where they cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def prepare_process() -> None:
    """Set what native libraries read once, before torch loads them. Whatever the user has set stays."""
    _request_reproducible_mkl()
    if "OMP_WAIT_POLICY" not in os.environ:
        # Idle OpenMP workers give their core back after a moment instead of spinning. Measured on two busy cores: a
        # decode step of 8 rows takes 8 ms instead of 88.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _request_reproducible_mkl() -> None:
    """Ask MKL for results that do not depend on the number of rows of a matrix product.

    Has to happen before the first MKL call of the process, so importing raindecode does it. Measured: costs up to 1.8x
    at one or two rows, nothing from four rows on.
    """
    if "MKL_CBWR" in os.environ:
        return
    flags = cpu_flags()
    if "avx512f" in flags:
        os.environ["MKL_CBWR"] = "AVX512,STRICT"
    elif "avx2" in flags:
        os.environ["MKL_CBWR"] = "AVX2,STRICT"


def kv_tokens() -> int | None:
    """RAINDECODE_KV_TOKENS: capacity of the KV pool in tokens, when set.

    Raises:
        ConfigError: it is no whole number above 0.
    """
    value = os.environ.get("RAINDECODE_KV_TOKENS")
    if value is None:
        return None
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"RAINDECODE_KV_TOKENS={value!r}: allowed is a whole number of tokens, 1 or more")
    return int(value)


def plug_in_settings(variable: Literal["RAINDECODE_VLLM", "RAINDECODE_SGLANG"]) -> dict[str, Any] | None:
    """A JSON object with the settings of the DeRa plug-in for vLLM or SGLang, when set.

    Raises:
        ConfigError: it is no JSON object.
    """
    value = os.environ.get(variable)
    if not value:
        return None
    try:
        given = json.loads(value)
    except ValueError as error:
        raise ConfigError(f"{variable}={value!r} is no JSON ({error}); give '{{\"reference\": PATH}}'") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{variable}={value!r}; give a JSON object such as '{{\"reference\": PATH}}'")
    return given


def vllm_edits() -> list[str]:
    """RAINDECODE_VLLM_EDITS: edits vLLM's model is steered by, FILE or FILE:STRENGTH, separated by commas; empty when unset."""
    return [part.strip() for part in os.environ.get("RAINDECODE_VLLM_EDITS", "").split(",") if part.strip()]
