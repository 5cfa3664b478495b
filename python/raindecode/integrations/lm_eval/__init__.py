"""A model of lm-evaluation-harness whose scores and answers come from a Decoder.

Importing this registers it with the harness under the name "raindecode"; `python -m raindecode.integrations.lm_eval` is the
harness's own command line with that done. Needs lm_eval 0.4.10 or newer.
"""

try:
    import lm_eval as _  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"raindecode.integrations.lm_eval needs lm-evaluation-harness ({error}): pip install 'lm_eval[hf]>=0.4.10'",
        name=error.name,
    ) from error

from raindecode.integrations.lm_eval.model import RainDecodeLM

__all__ = ["RainDecodeLM"]
