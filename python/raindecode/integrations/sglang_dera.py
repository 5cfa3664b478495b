"""DeRa in SGLang: which row belongs to which request, and what becomes of requests that cannot be mixed. Imports nothing of SGLang."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raindecode import env
from raindecode.errors import ConfigError, RainDecodeError
from raindecode.integrations.dera_params import lambda_of
from raindecode.integrations.second_model import Follower, SecondModel, SecondSettings, mix_rows

REQUEST = "__req__"
"""Where SGLang puts a weak reference to its request among the custom parameters."""


@dataclass(frozen=True)
class Served:
    """What is known of the server.

    Attributes:
        model, tokenizer: paths.
        trust_remote_code: for both.
        context: tokens of the longest request; None: what the model's config says.
        most_requests: requests that run at a time; None: not limited.
        overlap: whether a step begins before the tokens of the one before are known.
    """

    model: str
    tokenizer: str
    trust_remote_code: bool = False
    context: int | None = None
    most_requests: int | None = None
    overlap: bool = False


class DeRaRows:
    """Mixes the rows of SGLang's batches. One per process: SGLang makes its processors anew for every batch.

    Args:
        served: asked once, when the first request is to be mixed.
        refuse: called with a request and the reason why it cannot be mixed; it must end that request with an error.
        second: the other model of the pair; None loads what RAINDECODE_SGLANG names, at the first request.
    """

    def __init__(
        self, served: Callable[[], Served], refuse: Callable[[Any, str], None], second: SecondModel | None = None
    ) -> None:
        self._served = served
        self._refuse = refuse
        self._second: SecondModel | RainDecodeError | None = second
        self._followers: dict[str, tuple[Any, Follower]] = {}  # by request id

    def apply(self, logits: Tensor, params: Sequence[Mapping[str, Any] | None] | None) -> Tensor:
        """Mix the rows whose parameters hold `dera_lambda`, in place. A request that cannot be mixed is refused, its row untouched.

        Args:
            logits: [rows, vocabulary] any float dtype.
            params: of each row; `__req__` is SGLang's request, with `rid`, `origin_input_ids`, `output_ids`, `finished()`.
        """
        self._sweep()
        given = list(params or ())
        times = Counter(one[REQUEST].rid for one in given if one and REQUEST in one)
        rows, weights, followers = [], [], []
        for row, one in enumerate(given):
            try:
                weight = lambda_of(one)
                if one is None or weight is None:
                    continue
                if REQUEST not in one:
                    raise RainDecodeError(
                        f"this SGLang does not hand requests to its processors ({REQUEST}): update it"
                    )
                if times[one[REQUEST].rid] > 1:
                    raise ConfigError("DeRa does not see draft tokens in SGLang: start it without speculative decoding")
                second = self._loaded(logits)
                if weight == (1.0 if second.role == "reference" else 0.0):
                    continue
                followers.append(self._follow(second, one[REQUEST]))
            except RainDecodeError as error:
                if one is None or REQUEST not in one:
                    raise
                self._refuse(one[REQUEST], str(error))
                continue
            rows.append(row)
            weights.append(weight)
        if rows:
            assert isinstance(self._second, SecondModel)
            other = self._second.logits([(follower, ()) for follower in followers]).to(logits.device)
            lambdas = torch.tensor(weights, dtype=torch.float32, device=logits.device)
            mixed = mix_rows(
                logits[rows].float(), other, lambdas, role=self._second.role, vocab_size=self._second.vocab_size
            )
            logits[rows] = mixed.to(logits.dtype)
        return logits

    def close(self) -> None:
        """Forget every request."""
        if isinstance(self._second, SecondModel):
            self._second.close()
        self._followers.clear()

    def _sweep(self) -> None:
        """Let go of requests that have ended; SGLang does not say so."""
        for rid, (request, follower) in list(self._followers.items()):
            try:
                ended = request.finished()
            except ReferenceError:  # it is gone
                ended = True
            if ended:
                assert isinstance(self._second, SecondModel)
                self._second.drop(follower)
                del self._followers[rid]

    def _follow(self, second: SecondModel, request: Any) -> Follower:
        prompt, output = request.origin_input_ids, request.output_ids
        _, follower = self._followers.get(request.rid, (None, None))
        if follower is not None and follower.length > len(prompt) + len(output):  # another text of this name
            second.drop(follower)
            follower = None
        if follower is None:
            follower = second.follow()
            self._followers[request.rid] = (request, follower)
        at = follower.length
        follower.extend([int(token) for token in (*prompt[at:], *output[max(0, at - len(prompt)) :])])
        return follower

    def _loaded(self, logits: Tensor) -> SecondModel:
        """The other model. What kept it from loading is said to every request."""
        if self._second is None:
            try:
                self._second = _load(self._served(), logits)
            except RainDecodeError as error:
                self._second = error
        if isinstance(self._second, RainDecodeError):
            raise self._second
        return self._second


def _load(served: Served, logits: Tensor) -> SecondModel:
    given = env.plug_in_settings("RAINDECODE_SGLANG")
    if given is None:
        raise ConfigError(
            "the DeRa plug-in is not told which model to mix with: start SGLang with RAINDECODE_SGLANG='{\"reference\": PATH}', or "
            "'aligned' in the place of 'reference' when the reference is served"
        )
    if served.overlap:
        raise ConfigError(
            "SGLang begins a step before the tokens of the one before are known, so a second model cannot follow: start it with "
            "--disable-overlap-schedule"
        )
    from transformers import AutoConfig, AutoTokenizer

    from raindecode.engine.model_facts import longest_context

    context = served.context
    if context is None:
        context = longest_context(AutoConfig.from_pretrained(served.model, trust_remote_code=served.trust_remote_code))
    return SecondModel.load(
        SecondSettings.parse(given),
        served_tokenizer=AutoTokenizer.from_pretrained(served.tokenizer, trust_remote_code=served.trust_remote_code),
        served_width=logits.shape[-1],
        served_name=served.model,
        longest=context,
        most_requests=served.most_requests or _MOST_REQUESTS,
        device=logits.device,
    )


_MOST_REQUESTS = 64
