"""A model of lm-evaluation-harness whose scores and answers come from a Decoder.

Importing this registers it with the harness under the name "raindecode"; `python -m raindecode.integrations.lm_eval` is the
harness's own command line with that done. Needs lm_eval 0.4.10 or newer.
"""

from raindecode.integrations.lm_eval.model import RainDecodeLM

__all__ = ["RainDecodeLM"]
