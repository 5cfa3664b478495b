"""Baseline (c): cached sampling, what `generate` of transformers does less its options: prefill, then a token a forward."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from naive.common import Meter, Result, to_row
from naive.oracle import Oracle
from raindecode.engine.rng import name_draw
from raindecode.engine.sampler import Filter
from raindecode.text import Codec, TextStream, find_stop
from raindecode.types import Request

_SAMPLING = 0  # the purpose in raindecode's names of these draws


class Vanilla:
    """Sampling at one temperature, with the stop rules of raindecode's Sampling."""

    def __init__(
        self, model: PreTrainedModel, codec: Codec, *, temperature: float = 1.0, oracle: Oracle | None = None
    ) -> None:
        self.model, self.codec = model, codec
        self.shape = Filter(temperature)
        self.oracle = Oracle() if oracle is None else oracle

    @torch.inference_mode()
    def answer(self, request: Request, *, num_tokens: int | None = None) -> Result:
        """Answer one request; with `num_tokens` exactly so many tokens, whatever they are (comparisons of length)."""
        meter, cache = Meter(), DynamicCache()
        stream = TextStream(self.codec, request.prompt_ids)
        fresh = list(request.prompt_ids)
        tokens: list[int] = []
        reason: str | None = None
        with meter.phase("generate"):
            while reason is None:
                ids = torch.tensor([fresh], device=self.model.device)
                out = meter.forward(self.model, ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                name = name_draw(0, len(request.prompt_ids) + len(tokens), _SAMPLING)
                (drawn,) = self.oracle.draw([name], [to_row(out.logits[0, -1])], self.shape, request.seed, [False])
                tokens.append(drawn.token)
                fresh = [drawn.token]
                stream.push(drawn.token)
                if num_tokens is None:
                    reason = self._ended(tokens, stream, request)
                elif len(tokens) == num_tokens:
                    reason = "length"
        meter.stop()
        stream.finish()
        at = find_stop(stream.text, request.stop) if num_tokens is None else -1
        return Result(stream.text if at < 0 else stream.text[:at], tokens, reason, meter)

    def _ended(self, tokens: list[int], stream: TextStream, request: Request) -> str | None:
        if tokens[-1] in self.codec.eos_token_ids:
            return "eos"
        if tokens[-1] in request.stop_token_ids or find_stop(stream.text, request.stop) >= 0:
            return "stop"
        return "length" if len(tokens) >= request.max_new_tokens else None
