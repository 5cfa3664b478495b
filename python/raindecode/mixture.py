"""Mix: which of a decoder's models a request's next-token distribution is made of. Plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Mix:
    """Logits z = sum_i weights_i h_i over the models of a decoder, the reference first.

    Attributes:
        weights: one per model, summing to 1. A model of weight 0 is not run unless something else here asks for it.
        stats: measure every draw: log-probabilities under each model, divergences, normaliser.
        target_kl: with two models, the weight of the second is solved for at every token so that
            KL(mixture || reference) has this value in nats, instead of taking it from `weights`; None: not.
        max_weight: the largest weight `target_kl` may choose.
        plausibility: keep tokens at least this share as likely as the likeliest under model `plausibility_model`; 0 keeps all.
    """

    weights: tuple[float, ...] = (1.0,)
    stats: bool = False
    target_kl: float | None = None
    max_weight: float = 1.0
    plausibility: float = 0.0
    plausibility_model: int = 0

    @cached_property
    def single(self) -> int | None:
        """The one model this is, None for a true mixture."""
        if self.target_kl is not None or self.plausibility:
            return None
        return self.speakers[0] if len(self.speakers) == 1 else None

    @cached_property
    def models(self) -> int:
        """Bit mask of the models that have to run."""
        if self.stats or self.target_kl is not None:
            return (1 << len(self.weights)) - 1
        mask = sum(1 << i for i, w in enumerate(self.weights) if w)
        return mask | (1 << self.plausibility_model if self.plausibility else 0)

    @cached_property
    def speakers(self) -> tuple[int, ...]:
        """The models whose logits are mixed. More may run, to be measured or to judge."""
        if self.target_kl is not None:
            return tuple(range(len(self.weights)))
        return tuple(i for i, w in enumerate(self.weights) if w)

    @cached_property
    def first(self) -> int:
        """The first model that takes part: it judges and embeds, where one model is enough."""
        return self.speakers[0]

    @property
    def only_first(self) -> Mix:
        """The first model that takes part, alone."""
        return Mix(tuple(float(i == self.first) for i in range(len(self.weights))))


SINGLE = Mix()


@dataclass(frozen=True, slots=True)
class Measured:
    """A mixture at one token, over the full vocabulary, before temperature and filters; natural logarithms.

    Attributes:
        weights: of the models, the reference first; where a divergence was aimed at, those it led to.
        logprob_models: of the token under each model.
        log_z: log sum_v prod_i p_i(v)^w_i, by which the mixture was normalised.
        entropy: of the mixture.
        kl_models: KL(mixture || model), per model.
    """

    weights: tuple[float, ...]
    logprob_models: tuple[float, ...]
    log_z: float
    entropy: float
    kl_models: tuple[float, ...]


@dataclass(frozen=True)
class MeasuredAnswer:
    """The mixture along an answer.

    Attributes:
        tokens: at each token.
        log_weight: sum over tokens of sum_i w_i log p_i(token) - log q(token), q the probability it was drawn with. With it
            answers are importance-weighted to the mixture of whole sequences, prod_i p_i(answer)^w_i, of which drawing token by
            token is an approximation; drawn at temperature 1 without filters it is the sum of log_z. None for greedy answers.
    """

    tokens: list[Measured]
    log_weight: float | None

    @property
    def kl_reference(self) -> float:
        """Sum over the tokens of KL(mixture || reference): an estimate of the divergence between sequences."""
        return math.fsum(token.kl_models[0] for token in self.tokens)
