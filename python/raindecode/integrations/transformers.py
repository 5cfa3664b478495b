"""transformers: the methods as `custom_generate` functions, DeRa as a logits processor, and the tree attention by name.

    from raindecode.integrations.transformers import alignez, dera, rain, urial
    model.generate(**inputs, custom_generate=dera, reference=reference, dera_lambda=0.5)

Importing this module registers the attention "rain_tree" (`attn_implementation="rain_tree"`). docs/integrations/transformers.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from raindecode.decoder import Decoder
from raindecode.engine.attention import IMPLEMENTATION
from raindecode.errors import ConfigError, PromptError
from raindecode.integrations._decoders import borrowed, forget, tokenizer_of
from raindecode.integrations._dera_processor import DeRaLogitsProcessor
from raindecode.integrations._generate_call import Call, joined, of_generate, read_call, require_search
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.dera import DeRa
from raindecode.policy.policy import Policy
from raindecode.policy.prompt import ChatFormat
from raindecode.policy.urial import URIAL
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling
from raindecode.settings import require_whole
from raindecode.types import Completion, Request, TokenLogprob

__all__ = [
    "IMPLEMENTATION",
    "AlignedOutput",
    "DeRaLogitsProcessor",
    "align",
    "alignez",
    "dera",
    "forget",
    "rain",
    "urial",
]

_RAIN_ROOM = 12  # K/V of a search, in prompts with their answers; seen on the testbed: 9
_JUDGE_ROOM = 4096  # of its judge's prompts


@dataclass
class AlignedOutput(GenerateDecoderOnlyOutput):
    """What `return_dict_in_generate=True` gives.

    Attributes:
        completions: of every row, with text, counters, seed, and RAIN's value and tree.
    """

    completions: list[Completion] | None = None


def align(
    model: PreTrainedModel, input_ids: Tensor, *, logits_processor: Any = (), stopping_criteria: Any = (),
    generation_config: GenerationConfig, streamer: BaseStreamer | None = None, search: RAIN | str | None = None,
    policy: Policy | None = None, reference: PreTrainedModel | None = None,
    aligned: PreTrainedModel | str | Sequence[PreTrainedModel | str] = (), seed: int | Sequence[int] = 0,
    stop: Sequence[str] = (), asked: str | Sequence[str] | None = None, tokenizer: PreTrainedTokenizerBase | None = None,
    kv_tokens: int | None = None, **others: Any,
) -> Tensor | AlignedOutput:  # fmt: skip
    """Any search with any policy, as `custom_generate` of `model.generate`.

    What `generate` is asked for holds: lengths, do_sample, temperature, top_k, top_p, min_p, repetition_penalty, eos_token_id,
    pad_token_id, num_return_sequences, return_dict_in_generate, streamer, left padding. The tokens are those of Decoder.generate for
    the same settings and seed. What the engine cannot do (beams, other processors and criteria, scores) is refused.

    Args:
        model: the model `generate` was called on.
        input_ids: [batch, tokens], fed as they are unless the policy has a prompt of its own; then they are read as text.
        search: RAIN, or a preset's name; None samples.
        policy: how models are mixed, what is edited, how prompts are written.
        reference: the model that `model` is the aligned partner of.
        aligned: aligned partners of `model`: models, paths of LoRA adapters on it. Give this or `reference`.
        seed: of every row, or one each. Copies of a prompt (num_return_sequences) take seed, seed + 1, ...
        stop: strings that end an answer.
        asked: what RAIN's judge is told that the user said, one text or one per row; None tells it the decoded prompt.
        tokenizer: of the models; None takes the one saved where `model` was loaded from. transformers does not hand `tokenizer=` on
            to a function: use functools.partial(align, tokenizer=...).
        kv_tokens: room in the K/V pools; None takes what the call needs.
    Returns:
        [batch, tokens + longest answer] token ids, padded on the right; or an AlignedOutput.

    Raises:
        ConfigError, PromptError: something asked for is not allowed, or cannot be done.
        ModelError: a model cannot be served, or there is no tokenizer.
    """
    written = _Stream.of(streamer, input_ids)
    try:
        search = require_search(search)
        policy = Policy() if policy is None else policy
        _check(policy, kv_tokens)
        call = read_call(
            model, input_ids, generation_config, logits_processor, stopping_criteria, seed=seed, searching=search is not None,
            others=others,
        )  # fmt: skip
        first, partners = _pair(model, reference, aligned)
        words = tokenizer_of(model, tokenizer)
        needed = _room(call, search, policy, words) if kv_tokens is None else kv_tokens
        with borrowed(first, partners, words, needed) as decoder:
            requests = _requests(decoder, call, search, policy, stop, asked, words)
            completions = _answers(decoder, requests, search or call.sampling, written)
    finally:  # after an error, too: another thread may be waiting for the rest
        if written is not None:
            written.streamer.end()
    sequences = joined(input_ids, [one.token_ids for one in completions], call.pad_token_id)
    if not generation_config.return_dict_in_generate:
        return sequences
    return AlignedOutput(sequences=sequences, completions=completions)  # type: ignore[arg-type]


def dera(
    model: PreTrainedModel, input_ids: Tensor, *, logits_processor: Any = (), stopping_criteria: Any = (),
    generation_config: GenerationConfig, streamer: BaseStreamer | None = None, reference: PreTrainedModel | None = None,
    aligned: PreTrainedModel | str | Sequence[PreTrainedModel | str] = (), dera_lambda: float | Sequence[float] | DeRa = 1.0,
    search: RAIN | str | None = None, seed: int | Sequence[int] = 0, stop: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None, kv_tokens: int | None = None, **others: Any,
) -> Tensor | AlignedOutput:  # fmt: skip
    """DeRa: z = (1 - λ) h_reference + λ h_aligned at every token.

    Args:
        reference: the model that `model` is the aligned partner of; or leave it out and give
        aligned: the aligned partners of `model`.
        dera_lambda: λ, one per aligned model, or a DeRa with more settings.

    Other arguments, results and errors are those of `align`.
    """
    if reference is None and not isinstance(aligned, PreTrainedModel) and not aligned:
        raise ConfigError(
            "dera was given one model only; give reference=, the model that this one is aligned from, or aligned=, its aligned partners"
        )
    mixed = dera_lambda if isinstance(dera_lambda, DeRa) else DeRa(dera_lambda)
    return align(
        model, input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
        generation_config=generation_config, streamer=streamer, search=search, policy=Policy(dera=mixed), reference=reference,
        aligned=aligned, seed=seed, stop=stop, tokenizer=tokenizer, kv_tokens=kv_tokens, **others,
    )  # fmt: skip


def rain(
    model: PreTrainedModel, input_ids: Tensor, *, logits_processor: Any = (), stopping_criteria: Any = (),
    generation_config: GenerationConfig, streamer: BaseStreamer | None = None, search: RAIN | str = "hh",
    asked: str | Sequence[str] | None = None, seed: int | Sequence[int] = 0, stop: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None, kv_tokens: int | None = None, **others: Any,
) -> Tensor | AlignedOutput:  # fmt: skip
    """RAIN: a search that has the model judge what it would say, and rewinds.

    Args:
        search: RAIN, or the name of a preset.
        asked: what the judge is told that the user said, one text or one per row; None tells it the decoded prompt.

    Other arguments, results and errors are those of `align`.
    """
    return align(
        model, input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
        generation_config=generation_config, streamer=streamer, search=search, asked=asked, seed=seed, stop=stop,
        tokenizer=tokenizer, kv_tokens=kv_tokens, **others,
    )  # fmt: skip


def alignez(
    model: PreTrainedModel, input_ids: Tensor, *, logits_processor: Any = (), stopping_criteria: Any = (),
    generation_config: GenerationConfig, streamer: BaseStreamer | None = None,
    edits: AlignEZ | str | Path | Sequence[AlignEZ | str | Path] = (), strength: float = 1.0, search: RAIN | str | None = None,
    seed: int | Sequence[int] = 0, stop: Sequence[str] = (), tokenizer: PreTrainedTokenizerBase | None = None,
    kv_tokens: int | None = None, **others: Any,
) -> Tensor | AlignedOutput:  # fmt: skip
    """AlignEZ: hidden states edited along fitted directions.

    Args:
        edits: AlignEZ objects, or paths of files that they were saved to.
        strength: every strength is multiplied by it.

    Other arguments, results and errors are those of `align`.
    """
    given = [edits] if isinstance(edits, (AlignEZ, str, Path)) else list(edits)
    if not given:
        raise ConfigError("alignez was given no edits; give AlignEZ objects, or paths of files that they were saved to")
    loaded = [one if isinstance(one, AlignEZ) else AlignEZ.load(one) for one in given]
    scaled = loaded if strength == 1.0 else [one.scaled(strength) for one in loaded]
    return align(
        model, input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
        generation_config=generation_config, streamer=streamer, search=search, policy=Policy(edits=scaled), seed=seed, stop=stop,
        tokenizer=tokenizer, kv_tokens=kv_tokens, **others,
    )  # fmt: skip


def urial(
    model: PreTrainedModel, input_ids: Tensor, *, logits_processor: Any = (), stopping_criteria: Any = (),
    generation_config: GenerationConfig, streamer: BaseStreamer | None = None, prompt: ChatFormat | str | Path | None = None,
    search: RAIN | str | None = None, seed: int | Sequence[int] = 0, stop: Sequence[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None, kv_tokens: int | None = None, **others: Any,
) -> Tensor | AlignedOutput:  # fmt: skip
    """URIAL: the prompt's text behind a constant in-context prompt.

    `input_ids` should spell the user's words alone, no chat template. They come back in front of the answer; the constant prompt does
    not.

    Args:
        prompt: URIAL, another ChatFormat, or the path of a file in URIAL's form; None takes URIAL.default().

    Other arguments, results and errors are those of `align`.
    """
    format = URIAL.default() if prompt is None else prompt if isinstance(prompt, ChatFormat) else URIAL.load(prompt)
    return align(
        model, input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
        generation_config=generation_config, streamer=streamer, search=search, policy=Policy(prompt=format), seed=seed, stop=stop,
        tokenizer=tokenizer, kv_tokens=kv_tokens, **others,
    )  # fmt: skip


def _check(policy: object, kv_tokens: int | None) -> None:
    if not isinstance(policy, Policy):
        raise ConfigError(f"policy is a {type(policy).__name__}; give a Policy, or None")
    if kv_tokens is not None:
        require_whole("kv_tokens", kv_tokens, 1)
    if of_generate("assistant_model") is not None:
        raise ConfigError("assistant_model was given; allowed: None, the engine decodes without drafts")


@dataclass(frozen=True)
class _Stream:
    """A streamer of the call, which has seen the prompt."""

    streamer: BaseStreamer

    @classmethod
    def of(cls, given: BaseStreamer | None, input_ids: Tensor) -> _Stream | None:
        seen = of_generate("streamer")  # generate has put the prompt into this one
        streamer = seen if given is None else given
        if streamer is None:
            return None
        if len(input_ids) != 1:
            raise ConfigError(f"a streamer was given for {len(input_ids)} rows; allowed: one row, it shows one answer")
        if streamer is not seen:
            streamer.put(input_ids.cpu())
        return cls(streamer)


def _pair(
    model: PreTrainedModel, reference: PreTrainedModel | None, aligned: PreTrainedModel | str | Sequence[PreTrainedModel | str]
) -> tuple[PreTrainedModel, list[PreTrainedModel | str]]:  # fmt: skip
    """The reference model and its aligned partners."""
    partners = [aligned] if isinstance(aligned, (str, PreTrainedModel)) else list(aligned)
    if reference is None:
        return model, partners
    if partners:
        raise ConfigError(
            "both reference and aligned were given; give one: the model generate is called on is the other side"
        )
    return reference, [model]


def _room(call: Call, search: RAIN | None, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> int:
    """K/V tokens for all rows side by side."""
    constant = 0
    if policy.prompt is not None:
        constant = len(tokenizer(policy.prompt.render("x"), add_special_tokens=False)["input_ids"])
    longest = sum(len(row) + constant + call.max_new_tokens for row in call.rows)
    return longest + 64 if search is None else _RAIN_ROOM * longest + _JUDGE_ROOM


def _requests(
    decoder: Decoder, call: Call, search: RAIN | None, policy: Policy, stop: Sequence[str],
    asked: str | Sequence[str] | None, tokenizer: PreTrainedTokenizerBase,
) -> list[Request]:  # fmt: skip
    prompts: list[Any] = list(call.rows)
    if policy.prompt is not None:
        prompts = [tokenizer.decode(row, skip_special_tokens=True) for row in call.rows]
    requests = decoder.requests(
        prompts, search=search or call.sampling, policy=policy, max_new_tokens=call.max_new_tokens, seed=call.seeds,
        stop=[*call.stop, *stop],
    )  # fmt: skip
    requests = [replace(request, eos_token_ids=call.eos_token_ids) for request in requests]
    if asked is None:
        return requests
    said = [asked] * len(requests) if isinstance(asked, str) else list(asked)
    if len(said) != len(requests) or not all(isinstance(one, str) and one.strip() for one in said):
        raise PromptError(f"asked holds {len(said)} entries for {len(requests)} rows; give one text, or one per row")
    return [replace(request, prompt=one) for request, one in zip(requests, said, strict=True)]


def _answers(
    decoder: Decoder, requests: Sequence[Request], search: Sampling | RAIN, stream: _Stream | None
) -> list[Completion]:
    """A completion per request; the first error of any once all have ended."""

    def show(token: TokenLogprob, _: object) -> None:
        assert stream is not None
        stream.streamer.put(torch.tensor([token.token_id]))

    tasks = [decoder.task(request, search, on_token=None if stream is None else show) for request in requests]
    with closing(decoder.engine.run(tasks)) as ended:
        deque(ended, maxlen=0)
    for task in tasks:
        if task.error is not None:
            raise task.error
    return [task.result for task in tasks]
