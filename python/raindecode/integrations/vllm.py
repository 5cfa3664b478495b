"""vLLM: DeRa as a logits processor, and edits of hidden states as a plug-in (docs/integrations/vllm.md).

    vllm serve ALIGNED --logits-processors raindecode.integrations.vllm:DeRa --additional-config '{"raindecode": {"reference": "BASE"}}'

    RAINDECODE_VLLM_EDITS=helpful.safetensors:0.5 \\
        vllm serve MODEL --enforce-eager --worker-extension-cls raindecode.integrations.vllm.Steering

Nothing is registered as an entry point of vLLM's group of logits processors: what is, is started in every server of the environment.
"""

from __future__ import annotations

try:
    from vllm.v1.sample.logits_processor import LogitsProcessor as _FirstRunner
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"raindecode.integrations.vllm is for vLLM's environment ({error}): install rainkernels there", name=error.name
    ) from error

from raindecode.integrations.vllm_dera import DeRaProcessor
from raindecode.integrations.vllm_steering import Steering, cache_salt, register_steering

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as _SecondRunner
except ImportError:  # a vLLM without Model Runner V2, or one that takes no processors there

    class _SecondRunner:  # type: ignore[no-redef]
        """Stands in for a base class this vLLM does not have."""


class DeRa(DeRaProcessor, _FirstRunner, _SecondRunner):  # type: ignore[misc]
    """Mixes the served model's logits with those of the other model of its pair, for requests that carry `dera_lambda`.

    See DeRaProcessor. Both runners take it, under speculative decoding Model Runner V2 only.
    """


register_steering()  # nothing happens unless RAINDECODE_VLLM_EDITS is set

__all__ = ["DeRa", "Steering", "cache_salt", "register_steering"]
