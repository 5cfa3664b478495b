"""DeRa as a logits processor, for callers that cannot leave transformers' own decoding loop."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from raindecode.errors import ConfigError, ModelError, PromptError
from raindecode.policy.dera import DeRa

_NORMALISED = 1e-3  # a row of log-probabilities sums to 1 this closely, logits do not


class DeRaLogitsProcessor(LogitsProcessor):
    """Mixes the logits of a second model into those of the model that generates: z = (1 - λ) h_reference + λ h_aligned.

    The second model runs beside the first, with K/V of its own; a new `generate` call begins anew. It reads the scores as they
    come, so it belongs before any other processor: generate puts repetition_penalty and the like first, and then `custom_generate=dera`
    is the way.

    Args:
        model: the second model, on any device, with the same tokens.
        weight: λ, 0 is the reference and 1 the aligned model.
        role: what the second model is; the one that generates is the other.
        pad_token_id: at the start of a row this id is padding; None takes the second model's, where it has one.
        allow_negative: accept λ < 0.

    Raises:
        ConfigError: a value lies outside what is allowed; in a call: beams.
        ModelError: `model` is no model.
    """

    def __init__(
        self, model: PreTrainedModel, weight: float, *, role: Literal["reference", "aligned"] = "reference",
        pad_token_id: int | None = None, allow_negative: bool = False,
    ) -> None:  # fmt: skip
        if not isinstance(model, PreTrainedModel):
            raise ModelError(f"model is a {type(model).__name__}; give a transformers PreTrainedModel")
        if role not in ("reference", "aligned"):
            raise ConfigError(f"role is {role!r}; allowed: 'reference' and 'aligned'")
        DeRa([weight], allow_negative=allow_negative)
        self.model = model
        self.weight = float(weight)
        self.role = role
        own = model.generation_config.pad_token_id if model.generation_config is not None else None
        self.pad_token_id = own if pad_token_id is None else pad_token_id
        self._weights: list[tuple[int, int]] = []
        self._takes = inspect.signature(model.forward).parameters
        self.reset()

    def reset(self) -> None:
        """Forget the text so far and its K/V."""
        self._seen: Tensor | None = None  # [rows, tokens] the cache holds
        self._mask: Tensor | None = None
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Args:
            input_ids: [rows, tokens] so far, padded on the left.
            scores: [rows, vocabulary] logits of the model that generates.
        Returns:
            [rows, vocabulary] mixed logits; ids that one of the models does not have are -inf.
        """
        if bool((scores.float().logsumexp(dim=-1).abs() < _NORMALISED).all()):
            raise ConfigError(
                "the scores are log-probabilities, as beam search gives them; allowed: logits, with num_beams=1"
            )
        other = self._logits(input_ids.to(self.model.device)).to(scores.device, scores.dtype)
        shared = min(scores.shape[-1], other.shape[-1])
        mine, other = scores[:, :shared], other[:, :shared]
        reference, aligned = (other, mine) if self.role == "reference" else (mine, other)
        mixed = torch.full_like(scores, -torch.inf)
        mixed[:, :shared] = (1.0 - self.weight) * reference + self.weight * aligned
        return mixed

    def _logits(self, ids: Tensor) -> Tensor:
        """[rows, vocabulary] of the second model behind `ids`."""
        if not self._continues(ids):
            self.reset()
            self._mask = self._shown(ids)
        assert self._mask is not None
        new = ids if self._seen is None else ids[:, -1:]
        if self._seen is not None:
            self._mask = torch.cat((self._mask, torch.ones_like(new)), dim=1)
        options: dict[str, Any] = {}
        if "position_ids" in self._takes:
            options["position_ids"] = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -new.shape[1] :]
        if "logits_to_keep" in self._takes:
            options["logits_to_keep"] = 1
        out = self.model(
            input_ids=new, attention_mask=self._mask, past_key_values=self._cache, use_cache=True, **options
        )
        self._seen, self._cache = ids, out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits

    def _continues(self, ids: Tensor) -> bool:
        """Whether these rows are those seen and one token more, and the model is the one that read them."""
        seen, weights = self._seen, self._weights
        self._weights = self._versions()
        return (
            seen is not None
            and ids.shape == (seen.shape[0], seen.shape[1] + 1)
            and torch.equal(ids[:, :-1], seen)
            and weights == self._weights
        )

    def _versions(self) -> list[tuple[int, int]]:
        """Where the second model's weights lie, and how often each was written to."""
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.model.parameters()]

    def _shown(self, ids: Tensor) -> Tensor:
        """[rows, tokens] int64, 0 for the padding a row begins with."""
        if self.pad_token_id is None:
            return torch.ones_like(ids)
        mask = (ids != self.pad_token_id).long().cumsum(dim=1).clamp(max=1)
        if not bool(mask[:, -1].all()):
            raise PromptError("a prompt is nothing but padding; give at least one token")
        return mask
