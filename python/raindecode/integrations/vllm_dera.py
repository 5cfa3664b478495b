"""DeRa in vLLM: which row belongs to which request, for both of its model runners. Imports nothing of vLLM.

`raindecode.integrations.vllm.DeRa` is this class under vLLM's base classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raindecode import env
from raindecode.errors import ConfigError, RainDecodeError
from raindecode.integrations.dera_params import lambda_of
from raindecode.integrations.second_model import Follower, SecondModel, SecondSettings, mix_rows


@dataclass(eq=False)
class _Request:
    """A request that is mixed.

    Attributes:
        weight: its λ.
        follower: the second model's side of it.
        tokens: its prompt and a list that vLLM appends to (first runner); of the second runner empty.
    """

    weight: float
    follower: Follower
    tokens: tuple[Sequence[int], Sequence[int]] = ((), ())

    def catch_up(self) -> None:
        """Give the follower what vLLM has appended meanwhile."""
        prompt, output = self.tokens
        at = self.follower.length
        new = [*prompt[at:], *output[max(0, at - len(prompt)) :]]
        if any(token < 0 for token in new):
            raise RainDecodeError(
                "vLLM holds a token that it has not sampled yet (-1) in a request with dera_lambda; its logits would be those of "
                "another text. Report this with vLLM's version; --no-async-scheduling avoids it"
            )
        self.follower.extend(new)


class _Visit(NamedTuple):
    """What one step wants of a request: its rows of logits, and of V2 its slot, its first row's position and token, and drafts."""

    request: _Request
    rows: list[int]
    drafts: Sequence[int] = ()
    slot: int = -1
    first: int = -1
    token: int = -1


class DeRaProcessor:
    """A logits processor of vLLM's two model runners; which one runs is seen by what the constructor is given.

    Args:
        vllm_config: of vLLM.
        where: the device (first runner, V1), or the runner's request state (Model Runner V2).
        is_pin_memory: given by the first runner, None by V2.
        second: the other model of the pair; None loads what `additional_config["raindecode"]` or RAINDECODE_VLLM names.

    Raises:
        ConfigError and ModelError of every kind: see SecondSettings, SecondModel.load; and where vLLM's settings let in
            requests that no other model could follow.
    """

    def __init__(
        self, vllm_config: Any, where: Any, is_pin_memory: bool | None = None, *, second: SecondModel | None = None
    ) -> None:
        self._state = where if is_pin_memory is None else None
        self._device = torch.device(where if self._state is None else self._state.device)
        self._requests: dict[int, _Request] = {}  # by index in the batch (V1), by slot (V2)
        self._second = _load(vllm_config, self._device) if second is None else second

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request whose `extra_args` (`vllm_xargs` over HTTP) hold a λ that is not allowed.

        Raises:
            ConfigError: a ValueError, which vLLM answers with HTTP 400.
        """
        lambda_of(sampling_params.extra_args)

    # ---- first runner -------------------------------------------------------------------------------------------------
    def is_argmax_invariant(self) -> bool:
        """Mixing changes which token is the likeliest."""
        return False

    def update_state(self, batch_update: Any | None) -> None:
        """Requests that left, came and moved, in this order."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._end(index)
        for index, params, prompt, output in batch_update.added:
            self._end(index)
            if (weight := self._weight(params)) is None:
                continue
            if prompt is None:
                raise RainDecodeError("a request with dera_lambda has no prompt tokens: embeddings cannot be mixed")
            self._requests[index] = _Request(weight, self._second.follow(), (prompt, output))
        for a, b, direction in batch_update.moved:
            moving, there = self._requests.pop(a, None), self._requests.pop(b, None)
            if getattr(direction, "name", direction) == "SWAP":
                if there is not None:
                    self._requests[a] = there
            elif there is not None:
                self._second.drop(there.follower)
            if moving is not None:
                self._requests[b] = moving

    # ---- Model Runner V2 ----------------------------------------------------------------------------------------------
    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """A request takes a slot, whoever had it before; whether its logits are changed."""
        self._end(req_idx)
        weight = self._weight(sampling_params)
        if weight is not None:
            self._requests[req_idx] = _Request(weight, self._second.follow())
        return weight is not None

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    # ---- both ---------------------------------------------------------------------------------------------------------
    def apply(self, logits: Tensor, ctx: Any | None = None) -> Tensor:
        """Mix the rows of requests with λ, in place; no other row is touched.

        Args:
            logits: [rows, vocabulary] float32.
            ctx: V2's LogitsContext; None: row i is request i.
        """
        if not self._requests:
            return logits
        visits = self._rows_by_request(len(logits)) if ctx is None else self._rows_by_slot(ctx)
        if not visits:
            return logits
        other = self._second.logits([(visit.request.follower, visit.drafts) for visit in visits])
        place = logits.device
        rows = torch.tensor([row for visit in visits for row in visit.rows], device=place)
        weights = torch.tensor(
            [visit.request.weight for visit in visits for _ in visit.rows], dtype=torch.float32, device=place
        )
        logits[rows] = mix_rows(
            logits[rows], other.to(place), weights, role=self._second.role, vocab_size=self._second.vocab_size
        )
        return logits

    def close(self) -> None:
        """Forget every request."""
        for index in list(self._requests):
            self._end(index)

    def _weight(self, params: Any) -> float | None:
        """λ of a request; None where the model that is served answers alone."""
        weight = lambda_of(params.extra_args)
        return None if weight == (1.0 if self._second.role == "reference" else 0.0) else weight

    def _end(self, index: int) -> None:
        if (request := self._requests.pop(index, None)) is not None:
            self._second.drop(request.follower)

    def _rows_by_request(self, rows: int) -> list[_Visit]:
        """V1: row i is request i."""
        visits = []
        for index, request in sorted(self._requests.items()):
            if index < rows:
                request.catch_up()
                visits.append(_Visit(request, [index]))
        return visits

    def _rows_by_slot(self, ctx: Any) -> list[_Visit]:
        """V2: rows in any order, several of a request where there are draft tokens; the inside of a prompt is not sampled from."""
        assert self._state is not None
        if not any(int(slot) in self._requests for slot in ctx.idx_mapping_np):
            return []
        columns = (ctx.expanded_idx_mapping, ctx.expanded_local_pos, ctx.pos, ctx.input_ids)
        mine: dict[int, list[tuple[int, int, int, int]]] = {}
        for row, (slot, local, position, token) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            if slot in self._requests:
                mine.setdefault(slot, []).append((local, position, token, row))
        visits: list[_Visit] = []
        for slot, own in mine.items():
            own.sort()
            _, first, token, _ = own[0]
            if first + 1 < int(self._state.prefill_len.np[slot]):
                continue
            request = self._requests[slot]
            if request.follower.length > first + 1:  # its text got shorter: begin anew
                self._second.drop(request.follower)
                request.follower = self._second.follow()
            visits.append(_Visit(request, [row for *_, row in own], [t for _, _, t, _ in own[1:]], slot, first, token))
        for visit, tokens in zip(visits, self._committed(visits), strict=True):
            if visit.request.follower.length <= visit.first:
                visit.request.follower.extend([*tokens, visit.token])
        return visits

    def _committed(self, visits: Sequence[_Visit]) -> list[list[int]]:
        """The tokens before its first row that each request's follower lacks, read from the device at once."""
        assert self._state is not None
        spans = [range(visit.request.follower.length, visit.first) for visit in visits]
        slots = [visit.slot for visit, span in zip(visits, spans, strict=True) for _ in span]
        if not slots:
            return [[] for _ in spans]
        table: Tensor = self._state.all_token_ids.gpu
        places = [place for span in spans for place in span]
        tokens = iter(
            table[torch.tensor(slots, device=table.device), torch.tensor(places, device=table.device)].tolist()
        )
        return [[next(tokens) for _ in span] for span in spans]


def _load(vllm_config: Any, device: torch.device) -> SecondModel:
    """The other model of the pair, checked against what vLLM serves."""
    model = vllm_config.model_config
    if model.is_multimodal_model:
        raise ConfigError(f"{model.model} reads more than text, which a second model cannot follow: serve a text model")
    if model.enable_prompt_embeds:
        raise ConfigError(
            "prompts of embeddings have no tokens a second model could read: leave out --enable-prompt-embeds"
        )
    settings = SecondSettings.parse(_given(vllm_config))
    tokenizer = None
    if not model.skip_tokenizer_init:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
        )
    drafts = getattr(vllm_config.speculative_config, "num_speculative_tokens", 0) or 0
    return SecondModel.load(
        settings,
        served_tokenizer=tokenizer,
        served_width=model.get_vocab_size(),
        served_name=str(model.model),
        longest=model.max_model_len + drafts,
        most_requests=vllm_config.scheduler_config.max_num_seqs,
        device=device,
        dtype=model.dtype,
    )


def _given(vllm_config: Any) -> Any:
    """The settings: vLLM's --additional-config first, then the environment."""
    additional = vllm_config.additional_config
    if isinstance(additional, Mapping) and "raindecode" in additional:
        return additional["raindecode"]
    given = env.plug_in_settings("RAINDECODE_VLLM")
    if given is None:
        raise ConfigError(
            'the DeRa plug-in is not told which model to mix with: give vLLM --additional-config \'{"raindecode": {"reference": '
            "PATH}}', or set RAINDECODE_VLLM='{\"reference\": PATH}'; 'aligned' in the place of 'reference' when the reference is served"
        )
    return given
