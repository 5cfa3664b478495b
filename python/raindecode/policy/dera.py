"""DeRa: decoding-time realignment, mixing a reference model's logits with those of aligned models.

Source: Liu et al., Decoding-time Realignment of Language Models, ICML 2024 (arXiv 2402.02992).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from raindecode.errors import ConfigError
from raindecode.mixture import Mix
from raindecode.settings import is_whole
from rainkernels.ops.logits import MAX_MODELS

LARGEST = 1000.0  # of a weight's size: float32 keeps logits of any size apart up to here
_NOTHING = 1e-12  # a reference weight below this is what rounding left of 0


@dataclass(frozen=True)
class DeRa:
    """Weights of the aligned models: z = (1 - sum λ_i) h_ref + sum λ_i h_i, token by token.

    0 is the reference and 1 the aligned model; between them the alignment is weaker than trained, above 1 stronger. A model
    of weight 0 is not run. The mixture is normalised token by token, which only approximates the realigned model; what corrects
    it is measured with `stats` (Completion.mixture.log_weight).

    Attributes:
        weights: λ of the one aligned model, or one λ per aligned model in the order they were loaded.
        allow_negative: accept λ < 0, which turns the alignment into its opposite.
        stats: measure every token of plain sampling (Completion.mixture); all models run then, whatever their weights.
        plausibility: keep tokens at least this share as likely as the likeliest one under model `plausibility_model`, which
            bounds what large λ can do in the tail; 0 keeps all. 0.1 is contrastive decoding's value (Li et al., 2023).
        plausibility_model: 0 for the reference, i for the i-th aligned model.
        kl: see `target_kl`.
        max_weight: see `target_kl`.

    Raises:
        ConfigError: a value lies outside what is allowed.
    """

    weights: float | Sequence[float] = 1.0
    allow_negative: bool = False
    stats: bool = False
    plausibility: float = 0.0
    plausibility_model: int = 1
    kl: float | None = None
    max_weight: float = 2.0

    def __post_init__(self) -> None:
        given = self.weights if isinstance(self.weights, Sequence) else [self.weights]
        if isinstance(given, str) or not given or not all(_is_weight(w) for w in given):
            raise ConfigError(
                f"the DeRa weight is {self.weights!r}; allowed: a number from -{LARGEST:g} to {LARGEST:g}, or one per aligned model"
            )
        weights = tuple(float(w) for w in given)
        if not self.allow_negative and min(weights) < 0:
            raise ConfigError(
                f"the DeRa weight {min(weights):g} is negative, which reverses the alignment; allowed: 0 or more, or any with "
                "allow_negative=True (--allow-negative)"
            )
        if len(weights) >= MAX_MODELS:
            raise ConfigError(f"{len(weights)} DeRa weights were given; allowed: up to {MAX_MODELS - 1} aligned models")
        object.__setattr__(self, "weights", weights)
        if not (_is_number(self.plausibility) and 0 <= self.plausibility <= 1):
            raise ConfigError(f"DeRa plausibility is {self.plausibility!r}; allowed: 0 (off) to 1")
        if not is_whole(self.plausibility_model) or self.plausibility_model < 0:
            raise ConfigError(
                f"DeRa plausibility_model is {self.plausibility_model!r}; allowed: 0 for the reference, i for the i-th aligned model"
            )
        if self.kl is not None and weights != (1.0,):
            raise ConfigError(
                f"DeRa was given the weight {', '.join(f'{w:g}' for w in weights)} and a KL to solve it for; give one of them"
            )
        if self.kl is not None and not (_is_number(self.kl) and self.kl > 0):
            raise ConfigError(f"the DeRa target is a KL of {self.kl!r}; allowed: a finite number of nats above 0")
        if not (_is_number(self.max_weight) and 0 < self.max_weight <= LARGEST):
            raise ConfigError(f"DeRa max_weight is {self.max_weight!r}; allowed: above 0, up to {LARGEST:g}")

    @classmethod
    def target_kl(
        cls, kl: float, *, max_weight: float = 2.0, plausibility: float = 0.0, plausibility_model: int = 1
    ) -> DeRa:
        """λ solved for at every token so that KL(mixture || reference) is `kl` nats, at most `max_weight`.

        For a decoder with one aligned model. What was chosen and reached is in Completion.mixture.
        """
        return cls(kl=kl, max_weight=max_weight, plausibility=plausibility, plausibility_model=plausibility_model)

    @property
    def label(self) -> str:
        """Short text for tables: the weights, or the target."""
        if self.kl is not None:
            return f"KL {self.kl:g}"
        assert isinstance(self.weights, tuple)
        return ", ".join(f"{w:g}" for w in self.weights)

    def mix(self, num_models: int) -> Mix:
        """The mixture over a decoder's models, the reference counted.

        Raises:
            ConfigError: the decoder has not as many aligned models as there are weights.
        """
        assert isinstance(self.weights, tuple)
        aligned = num_models - 1
        if not aligned:
            raise ConfigError(
                "this decoder holds one model only, so there is nothing to mix: load it with adapter= or aligned= "
                "(--adapter, --aligned), or leave dera out"
            )
        if self.kl is not None and aligned != 1:
            raise ConfigError(f"a KL target needs one aligned model, this decoder has {aligned}: give weights instead")
        if len(self.weights) != aligned:
            raise ConfigError(
                f"{len(self.weights)} DeRa weights were given for {aligned} aligned models: give one per model, in the order they "
                "were loaded"
            )
        if self.plausibility and self.plausibility_model >= num_models:
            raise ConfigError(
                f"DeRa plausibility_model is {self.plausibility_model}; allowed: 0 to {aligned}, the models of this decoder"
            )
        reference = 1.0 - math.fsum(self.weights)
        return Mix(
            weights=(0.0 if abs(reference) < _NOTHING else reference, *self.weights),
            stats=self.stats or self.kl is not None,
            target_kl=self.kl,
            max_weight=self.max_weight,
            plausibility=self.plausibility,
            plausibility_model=self.plausibility_model if self.plausibility else 0,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_weight(value: object) -> bool:
    return _is_number(value) and abs(float(value)) <= LARGEST  # type: ignore[arg-type]
