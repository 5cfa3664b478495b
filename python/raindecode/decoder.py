"""Decoder: the public face. Loads a model and answers prompts with any search and policy."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raindecode import testbed
from raindecode.activations import POOLS, PassageMaker, Pool, collect, sites_of
from raindecode.engine.adapter import load_adapter
from raindecode.engine.branch import Ledger
from raindecode.engine.engine import Engine
from raindecode.engine.exact import ExactMode
from raindecode.engine.loader import build_engine, load_pretrained
from raindecode.engine.model_facts import context_length_of, device_of, eos_ids_of, identity_of, name_of, vocabulary_of
from raindecode.engine.parallel import processes_of
from raindecode.engine.task import Task
from raindecode.engine.vocabulary import check_same_tokenizer, shared_vocab_size, token_count
from raindecode.errors import ConfigError, ModelError, PromptError
from raindecode.hidden_edits import ModelIdentity, Tap
from raindecode.policy.policy import Policy
from raindecode.policy.prompt import ChatFormat
from raindecode.prefix_store import Constant, PrefixStore
from raindecode.progress import ProgressDisplay
from raindecode.prompt_ids import PromptIds
from raindecode.requests import Prompt, RequestMaker, parted
from raindecode.search.context import SearchContext
from raindecode.search.edited import Searches, search_edited
from raindecode.search.evaluator import Evaluator, JudgeTemplate, ScoreFunction
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling
from raindecode.search.scored import Scored
from raindecode.search.scoring import Scoring
from raindecode.settings import as_strings, is_whole, require_whole
from raindecode.shift_sides import Answer, Side, as_policy, check_difference, forced_answers, given_answers, label_of
from raindecode.sweep import Lambda, Sweep, SweepResult
from raindecode.teacher_forcing import force
from raindecode.text import Codec
from raindecode.token_shift import ShiftedAnswer, TokenShift
from raindecode.types import Completion, Request, TokenLogprob
from rainkernels.ops.logits import MAX_MODELS

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Decoder:
    """A frozen language model behind the tree engine.

    Args:
        model: a decoder-only transformers model in eval mode; its attention implementation is switched.
        tokenizer: its tokenizer.
        adapters: aligned models that are LoRA adapters on `model`: PEFT folders or hub ids. They share its weights.
        aligned: aligned models that are whole models, each with its tokenizer, which must be the same as `tokenizer`.
            Policy(dera=DeRa(...)) mixes them with `model`: adapters first, then these; without it `model` answers alone.
        name: what to call it in reports.
        format: how plain prompts are written for it when neither policy nor search says; None feeds them as they are.
        kv_tokens: capacity of the KV pool in tokens; None sizes it from memory.
        exact: None turns exact mode on where it holds (float32 on a CPU), True insists on it, False leaves it off.
        max_concurrent: requests advanced together.
        cuda_graphs: None runs steps from CUDA graphs where that is possible (a model of Llama's form on a CUDA device), True
            insists on it, False leaves it off.

    Raises:
        UnsupportedModelError: the architecture cannot be served; the message names it and the reason.
        AdapterError: an adapter is of a kind that cannot be served, or for another base.
        VocabularyError: an aligned model has other tokens.
        ConfigError: a setting lies outside what is allowed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        adapters: Sequence[str] = (),
        aligned: Sequence[tuple[PreTrainedModel, PreTrainedTokenizerBase]] = (),
        name: str = "model",
        format: ChatFormat | None = None,
        kv_tokens: int | None = None,
        exact: bool | None = None,
        max_concurrent: int = 32,
        cuda_graphs: bool | None = None,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ModelError(f"model is a {type(model).__name__}; give a transformers PreTrainedModel")
        require_whole("max_concurrent", max_concurrent, 1)
        if format is not None and not isinstance(format, ChatFormat):
            raise ConfigError(f"format is a {type(format).__name__}; give a ChatFormat or None")
        if kv_tokens is not None:
            require_whole("kv_tokens", kv_tokens, 1)
        self.name = name
        self.format = format
        self.engine: Engine
        self.exact: ExactMode
        adapters = as_strings("adapters", adapters)
        if not isinstance(aligned, Sequence):
            raise ModelError(
                f"aligned is a {type(aligned).__name__}; give a list of pairs of a model and its tokenizer"
            )
        if len(adapters) + len(aligned) >= MAX_MODELS:
            raise ConfigError(
                f"{len(adapters) + len(aligned)} aligned models were given; allowed: up to {MAX_MODELS - 1} beside the reference"
            )
        for one in aligned:
            if (
                not isinstance(one, tuple)
                or len(one) != 2
                or not isinstance(one[0], PreTrainedModel)
                or not hasattr(one[1], "get_vocab")
            ):
                raise ModelError(
                    f"aligned holds a {type(one).__name__}; give pairs of a transformers PreTrainedModel and its tokenizer"
                )
        for other, other_tokenizer in aligned:
            if other.device != model.device:
                raise ModelError(
                    f"the aligned model is on {other.device}, the reference on {model.device}: use one device"
                )
            check_same_tokenizer(tokenizer, other_tokenizer, name=name_of(other))
        everyone = [model, *(other for other, _ in aligned)]
        shared: int | None = None
        if aligned:
            widths = [vocabulary_of(one) for one in everyone]
            shared = shared_vocab_size(tokenizer, widths, [name_of(one) for one in everyone])
        elif adapters:  # one head, so all that can differ is padding that no tokenizer speaks of
            shared = min(token_count(tokenizer), vocabulary_of(model))
        self.engine, self.exact = build_engine(
            model, adapters=[load_adapter(path, model) for path in adapters], aligned=everyone[1:],
            vocab_size=shared,
            kv_tokens=kv_tokens, exact=exact, max_tasks=max_concurrent, cuda_graphs=cuda_graphs,
        )  # fmt: skip
        ends = frozenset(eos_ids_of(model, tokenizer))
        self._ends = [ends] * (1 + len(adapters)) + [frozenset(eos_ids_of(*one)) for one in aligned]
        self.codec = Codec(tokenizer, ends)
        self._prompt_ids = PromptIds(self.codec, name)

    @classmethod
    def from_pretrained(
        cls,
        model: str = "testbed",
        *,
        adapter: str | Sequence[str] = (),
        aligned: str | Sequence[str] = (),
        device: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        trust_remote_code: bool = False,
        tensor_parallel: int = 1,
        **options: Any,
    ) -> Decoder:
        """Load "testbed" (the embedded model), a local folder, or a hub id.

        Args:
            adapter: aligned models that are LoRA adapters on `model`: "testbed", PEFT folders, or hub ids.
            aligned: aligned models that are whole models: folders or hub ids.
            device: "cpu", "cuda", "cuda:1"; None takes the GPU when there is one.
            dtype: None takes float32 on a CPU and bfloat16 on a GPU.
            tensor_parallel: processes to split every model over, those that torchrun has started; each takes its GPU by LOCAL_RANK
                and has to make the same calls. No adapters and no prefix files then.
            options: passed to the constructor.

        Raises:
            ModelError, UnsupportedModelError, ConfigError: as the constructor, and when nothing can be loaded.
        """
        if not isinstance(model, str):
            raise ModelError(
                f"model is {model!r}; give 'testbed', a folder, or a hub id; for a loaded model use Decoder(model, tokenizer)"
            )
        require_whole("tensor_parallel", tensor_parallel, 1)
        place = device_of(device)
        if tensor_parallel > 1 and device not in (None, device_of(None).type):
            raise ConfigError(
                f"device is {device!r}; allowed with tensor_parallel: None, every process takes a device of its own"
            )
        if dtype is not None and dtype not in _DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; allowed: {', '.join(_DTYPES)}")
        number_type = _DTYPES[dtype] if dtype else (torch.float32 if place.type == "cpu" else torch.bfloat16)

        def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
            path = str(testbed.WEIGHTS) if name == "testbed" else name
            return load_pretrained(
                path, device=place, dtype=number_type, trust_remote_code=trust_remote_code,
                tensor_parallel=tensor_parallel,
            )  # fmt: skip

        names = as_strings("adapter", [adapter] if isinstance(adapter, str) else adapter)
        adapters = [str(testbed.ADAPTER) if path == "testbed" else path for path in names]
        loaded, tokenizer = load(model)
        others = [load(name) for name in as_strings("aligned", [aligned] if isinstance(aligned, str) else aligned)]
        if model == "testbed":
            options.setdefault("format", RAIN.preset("town").format)
        return cls(loaded, tokenizer, name=model, adapters=adapters, aligned=others, **options)

    @property
    def context_length(self) -> int:
        """Tokens every model was made for, prompt and answer together."""
        return min(context_length_of(runner.model) for runner in self.engine.runners)

    @property
    def num_models(self) -> int:
        """The reference and its aligned models."""
        return len(self.engine.models)

    @cached_property
    def identities(self) -> list[ModelIdentity]:
        """What every model is recognised by, the reference first; models that are adapters on it are known as it is."""
        known = {id(runner): identity_of(runner.model) for runner in self.engine.runners}
        return [known[id(runner)] for runner, _ in self.engine.models]

    @property
    def dtype(self) -> str:
        """Number type of the weights, such as "float32"."""
        return str(self.engine.runner.model.dtype).removeprefix("torch.")

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        search: Sampling | RAIN | None = None,
        policy: Policy | Sequence[Policy] | None = None,
        max_new_tokens: int = 256,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        on_text: Callable[[int, str], None] | None = None,
        on_progress: Callable[[int, int, int], None] | None = None,
        progress: bool | None = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[Any]:
        """Answer prompts together. The answers come in the order of the prompts.

        Args:
            prompts: one prompt or many; text, token ids fed as they are, or a conversation: chat messages, {"role": "system" | "user" |
                "assistant", "content": ...}, ending with the user's. A search judges answers by the user's last words.
            search: Sampling() by default, or RAIN.
            policy: of every prompt, or one each: the prompt's format, and how the decoder's models are mixed.
            max_new_tokens: limit of each answer.
            seed: of every prompt, or one each. An answer depends on its own prompt and seed only (exact mode), so give
                different seeds to sample one prompt several times.
            stop, stop_token_ids: end the answer, besides what the search and the model end on.
            on_text: called with (index, piece) as text becomes final.
            on_progress: called with (index, tokens, iterations) after every token of plain sampling and every iteration of
                RAIN. What either function raises ends that request, with this as its error, and leaves the others alone: to
                cancel a request, raise RequestCancelled.
            progress: show on stderr how far the work is, as a bar on a terminal and a line every ten seconds elsewhere; None
                shows it on a terminal for work of some length.
            errors: "raise" raises the first request's error after all others have finished; "return" puts errors in place.

        Returns:
            A Completion per prompt.

        Raises:
            PromptError: a prompt is empty, not text, or too long; nothing has run.
            ConfigError: a setting is outside what is allowed; nothing has run.
            CapacityError: the KV pool is too small for a request even alone.
        """
        if errors not in ("raise", "return"):
            raise ConfigError(f"errors is {errors!r}; allowed: 'raise' and 'return'")
        requests = self.requests(
            prompts, search=search, policy=policy, max_new_tokens=max_new_tokens, seed=seed, stop=stop,
            stop_token_ids=stop_token_ids,
        )  # fmt: skip
        results: list[Any] = [None] * len(requests)
        for index, outcome in self.stream(
            requests, search=search, on_text=on_text, on_progress=on_progress, progress=progress
        ):
            results[index] = outcome
        failed = [r for r in results if isinstance(r, BaseException)]
        if failed and errors == "raise":
            raise failed[0]
        return results

    def requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        search: Sampling | RAIN | None = None,
        policy: Policy | Sequence[Policy] | None = None,
        max_new_tokens: int = 256,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
    ) -> list[Request]:
        """Check prompts and settings and make requests of them. Raises as `generate`."""
        return self._maker.make(
            prompts, search=search, policy=policy, max_new_tokens=max_new_tokens, seed=seed, stop=stop,
            stop_token_ids=stop_token_ids,
        )  # fmt: skip

    @property
    def _maker(self) -> RequestMaker:
        return self._request_maker(self._prompt_ids)

    def request_maker(self) -> RequestMaker:
        """What `requests` works with, as a copy that another thread may use while this decoder is busy."""
        self.identities  # noqa: B018  worked out by the thread that owns the models
        codec = Codec(copy.deepcopy(self.codec.tokenizer), self.codec.eos_token_ids)
        return self._request_maker(PromptIds(codec, self.name))

    def _request_maker(self, ids: PromptIds) -> RequestMaker:
        contexts = [context_length_of(runner.model) for runner, _ in self.engine.models]
        return RequestMaker(
            ids, self.name, self.format, contexts, self._ends, self._vocabulary, lambda: self.identities
        )

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        policy: Policy | Sequence[Policy] | None = None,
        starts: Sequence[int] | None = None,
        top: int = 0,
        progress: bool | None = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[Any]:
        """Log-probabilities of the prompts' own tokens, each behind those before it; nothing is generated.

        Args:
            prompts, policy, progress, errors: as in `generate`. Token ids are scored as they are; of text and conversations what the
                policy's prompt format makes of them. A prompt may be one token longer than the context: its last is not run.
            starts: per prompt, how many of its tokens are a context: those behind it are scored alone, as an answer to it. Edits,
                which may differ between a prompt and its answer, are made as in `generate`. None scores whole prompts.
            top: how many of the likeliest tokens to report at every place.

        Returns:
            A PromptLogprobs per prompt.

        Raises:
            As `generate`; ConfigError too for a mixture with a plausibility filter.
        """
        if errors not in ("raise", "return"):
            raise ConfigError(f"errors is {errors!r}; allowed: 'raise' and 'return'")
        requests = self._maker.make(
            prompts, search=None, policy=policy, max_new_tokens=0, seed=0, stop=(), stop_token_ids=(), least=0
        )
        if starts is not None:
            requests = parted(requests, starts)
        found = dict(self.stream(requests, search=Scoring(top), progress=progress))
        failed = [one for _, one in sorted(found.items()) if isinstance(one, BaseException)]
        if failed and errors == "raise":
            raise failed[0]
        return [found[i] for i in range(len(requests))]

    def sweep(
        self,
        prompts: Prompt | Sequence[Prompt],
        lambdas: Sequence[Lambda],
        *,
        evaluator: Evaluator | ScoreFunction | JudgeTemplate | None = None,
        search: Sampling | None = None,
        policy: Policy | None = None,
        num_samples: int = 1,
        max_new_tokens: int = 256,
        seed: int = 0,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        progress: bool | None = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> SweepResult:
        """Answer prompts under several mixtures at once and measure reward and divergence, to choose a weight by.

        All λ of all prompts are under way together, and scoring shares their forwards. Sample k of prompt i has the seed
        `seed` + i num_samples + k under every λ.

        Args:
            lambdas: weights of the aligned model, vectors of weights for several, or DeRa objects such as
                DeRa.target_kl(0.1). What they say about `stats` is overruled: everything is measured.
            evaluator: scores answers from -1 to 1, as that of RAIN; None measures divergences only. A JudgeTemplate is always
                answered by the reference model.
            policy: one for all prompts: their format and edits; its dera stays None.
            num_samples: answers per prompt and λ.
            seed: one whole number, see above.
            search, max_new_tokens, stop, stop_token_ids, progress: as in `generate`; the search is plain sampling.
            errors: "raise" raises the first request's error after all others have finished, and the answers are lost; "return"
                leaves failed answers out: each point says how many, and the result's `errors` says why.

        Raises:
            As `generate`; ConfigError too when the search is RAIN or a λ is given twice.
        """
        if errors not in ("raise", "return"):
            raise ConfigError(f"errors is {errors!r}; allowed: 'raise' and 'return'")
        if policy is not None and not isinstance(policy, Policy):
            raise ConfigError(
                f"the policy of a sweep is a {type(policy).__name__}; give one Policy for all prompts, or None"
            )
        if policy is not None and policy.dera is not None:
            raise ConfigError("the policy of a sweep holds a dera, but its lambdas say what is mixed: leave dera out")
        require_whole("seed", seed, 0)
        plan = Sweep(lambdas, num_models=self.num_models, sampling=search, num_samples=num_samples, evaluator=evaluator)
        given = [
            self.requests(
                prompts, search=search, policy=one, max_new_tokens=max_new_tokens, seed=seed, stop=stop,
                stop_token_ids=stop_token_ids,
            )
            for one in plan.policies(Policy() if policy is None else policy)
        ]  # fmt: skip
        if not given[0]:
            raise PromptError("there is no prompt: give at least one")
        requests = plan.requests(given, seed)
        steps, started = self.engine.model_steps, time.perf_counter()
        outcomes = dict(self.stream(requests, search=plan.search, progress=progress))
        result = plan.result(
            [outcomes[i] for i in range(len(requests))],
            model_steps=self.engine.model_steps - steps,
            seconds=time.perf_counter() - started,
        )
        if result.errors and errors == "raise":
            raise result.errors[0]
        return result

    def token_shift(
        self,
        base: Side,
        aligned: Side,
        prompts: Prompt | Sequence[Prompt],
        *,
        answers: Sequence[Answer] | None = None,
        max_new_tokens: int = 256,
        top: int = 5,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        progress: bool | None = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> TokenShift:
        """Which tokens of the aligned side's answers the base side would not have written (docs/methods/token_shift.md).

        The aligned side answers greedily, then both read the answers, and every token gets its rank in the base's order.

        Args:
            base, aligned: what each side's next-token distribution is: a Policy, or what it would hold: a DeRa or its weight λ, an
                AlignEZ, a ChatFormat; None is the reference model alone. Their prompts may differ, the answers' tokens do not.
            answers: one per prompt, text or token ids, to read instead of the aligned side's; then `max_new_tokens` and
                stops mean nothing.
            top: the base's candidates to note per token.
            max_new_tokens, stop, stop_token_ids, progress: as in `generate`. Tokens that a stop string cuts off an answer, and its
                end-of-text token, are read like the others.
            errors: "raise" raises the first error after all other prompts have finished; "return" leaves what failed out: the
                result says how many and why.

        Raises:
            As `generate`; ConfigError too when both sides are the same, PromptError when an answer does not fit.
        """
        if errors not in ("raise", "return"):
            raise ConfigError(f"errors is {errors!r}; allowed: 'raise' and 'return'")
        require_whole("max_new_tokens", max_new_tokens, 1)
        require_whole("top", top, 1)
        policies = as_policy("base", base), as_policy("aligned", aligned)
        greedy, limit = Sampling.greedy(), max_new_tokens if answers is None else 1 << 31  # as long as there is room
        maker = self._maker
        left, right = (
            maker.make(
                prompts,
                search=greedy,
                policy=policy,
                max_new_tokens=limit,
                seed=0,
                stop=stop,
                stop_token_ids=stop_token_ids,
            )
            for policy in policies
        )
        if not left:
            raise PromptError("there is no prompt: give at least one")
        check_difference(left, right)
        steps, started = self.engine.model_steps, time.perf_counter()
        outcomes: dict[int, Any] = {}
        if answers is None:
            fitting = [
                replace(r, max_new_tokens=min(r.max_new_tokens, o.max_new_tokens))
                for r, o in zip(right, left, strict=True)
            ]
            outcomes = dict(self.stream(fitting, search=greedy, progress=progress))
            written = (one if isinstance(one, Completion) else None for _, one in sorted(outcomes.items()))
            forced = forced_answers(left, right, written)
        else:
            forced = given_answers(left, right, answers, self.codec, self.engine.vocab_size)
        outcomes |= force(self.engine, self.codec, forced, top=top, progress=progress)
        failed = [one for _, one in sorted(outcomes.items()) if isinstance(one, BaseException)]
        if failed and errors == "raise":
            raise failed[0]
        base_label, aligned_label = (label_of(policy, self.name) for policy in policies)
        return TokenShift(
            base_label, aligned_label,
            answers=[one for _, one in sorted(outcomes.items()) if isinstance(one, ShiftedAnswer)],
            codec=self.codec, errors=tuple(failed), model_steps=self.engine.model_steps - steps,
            seconds=time.perf_counter() - started,
        )  # fmt: skip

    def activations(
        self,
        passages: Sequence[tuple[str, str]],
        *,
        layers: Sequence[int] | None = None,
        tap: Tap = "mlp_out",
        pool: Pool = "last",
        model: int = 0,
        policy: Policy | None = None,
        progress: bool | None = None,
    ) -> Tensor:
        """Hidden states of texts, to fit edits on.

        Args:
            passages: pairs of a prompt and an answer to it; an empty answer stands for the prompt alone.
            layers: counted from 0; None for all.
            tap: "attn_out", "mlp_out" (output of the layer's attention or feed-forward part, before it is added to the
                residual stream) or "block_out" (the stream behind the layer).
            pool: "last", the last token's state, or "mean", over the answer's tokens (of an empty answer the prompt's).
            model: 0 for the reference, i for the i-th aligned model. Nothing is edited.
            policy: its prompt says how prompts are written; None takes the decoder's format.
            progress: as in `generate`.
        Returns:
            [len(layers), len(passages), hidden_size] float32 on the cpu.

        Raises:
            PromptError: a passage is empty or too long.
            ConfigError: a setting is outside what is allowed.
            UnsupportedModelError: the architecture has no such place.
        """
        if pool not in POOLS:
            raise ConfigError(f"pool is {pool!r}; allowed: {', '.join(POOLS)}")
        if not is_whole(model) or not 0 <= model < self.num_models:
            raise ConfigError(f"model is {model!r}; allowed: 0 to {self.num_models - 1}")
        if policy is not None and not isinstance(policy, Policy):
            raise ConfigError(f"the policy of activations is a {type(policy).__name__}; give a Policy, or None")
        if policy is not None and (policy.dera is not None or policy.edits):
            raise ConfigError("the policy of activations holds dera or edits; give its prompt only")
        runner = self.engine.models[model][0]
        format = self.format if policy is None or policy.prompt is None else policy.prompt
        made = PassageMaker(self.codec, format, context_length_of(runner.model)).make(passages, pool)
        sites = sites_of(tap, layers, self.identities[model].num_layers)
        return collect(self.engine, made, sites, model, progress)

    def save_prefix(
        self, path: str | Path, *, policy: Policy | None = None, search: Sampling | RAIN | None = None, system: str = ""
    ) -> int:
        """Write the K/V of what every prompt of a policy begins with to a file, computed now where they are not there yet.

        That is the prompt format's constant part (a URIAL prompt, a few-shot prefix) with the system text behind it, as the models of
        the policy run it under its edits; and of RAIN the constant part of its judge's prompts.

        Args:
            path: a safetensors file.
            policy, search: as in `generate`.
            system: instructions that every conversation begins with.
        Returns:
            How many tokens it holds.

        Raises:
            ConfigError: nothing is constant, or edits are decided prompt by prompt.
            PrefixFileError: the file cannot be written.
            PromptError, CapacityError: it does not fit the context or the KV pool.
        """
        return self._prefixes.save(path, self._constants(policy, search, system))

    def load_prefix(
        self, path: str | Path, *, policy: Policy | None = None, search: Sampling | RAIN | None = None, system: str = ""
    ) -> int:
        """Read what `save_prefix` wrote, so that no request has to compute it; arguments and result as there.

        Raises:
            PrefixFileError: the file is missing or damaged, or belongs to another model, adapter, number type, prompt or edit.
            ConfigError, PromptError, CapacityError: as save_prefix.
        """
        return self._prefixes.load(path, self._constants(policy, search, system))

    @cached_property
    def _prefixes(self) -> PrefixStore:
        return PrefixStore(self.engine, lambda: self.identities)

    def _constants(self, policy: Policy | None, search: Sampling | RAIN | None, system: str) -> list[Constant]:
        """What every request of a policy and search begins with."""
        if any(processes_of(runner.model) > 1 for runner in self.engine.runners):
            raise ConfigError(
                "prefix files hold the K/V of all heads, and this model's are split over processes; leave them out"
            )
        return self._maker.constants(Policy() if policy is None else policy, search, system)

    def stream(
        self,
        requests: Sequence[Request],
        *,
        search: Sampling | RAIN | Scored | Scoring | None = None,
        on_text: Callable[[int, str], None] | None = None,
        on_progress: Callable[[int, int, int], None] | None = None,
        progress: bool | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """Run requests and yield (index, Completion or error) as each finishes.

        At most `max_concurrent` are under way at a time; another begins when one ends. Closing the iterator cancels those that
        are left. Arguments as in `generate`.
        """
        if on_text is not None and not callable(on_text):
            raise ConfigError(f"on_text is a {type(on_text).__name__}; give a function of (index, text)")
        if on_progress is not None and not callable(on_progress):
            raise ConfigError(
                f"on_progress is a {type(on_progress).__name__}; give a function of (index, tokens, iterations)"
            )
        chosen = Sampling() if search is None else search
        with ProgressDisplay.choose(progress, len(requests), searching=isinstance(chosen, RAIN)) as display:
            tasks = (
                self._task(i, request, chosen, on_text, _both(i, on_progress, display.reporter(i)))
                for i, request in enumerate(requests)
            )
            with closing(self.engine.run(tasks)) as ended:
                for task in ended:
                    display.finished(task.tag)
                    yield task.tag, task.result if task.error is None else task.error

    def _task(
        self,
        index: int,
        request: Request,
        search: Searches,
        on_text: Callable[[int, str], None] | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> Task:
        piece = None if on_text is None else lambda piece: on_text(index, piece)
        return self.task(request, search, tag=index, on_text=piece, on_progress=on_progress)

    def task(
        self,
        request: Request,
        search: Searches,
        *,
        tag: Any = None,
        on_text: Callable[[str], None] | None = None,
        on_token: Callable[[TokenLogprob, list[TokenLogprob]], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Task:
        """One request as a task for `engine.submit`, for servers that step the engine themselves; see SearchContext."""
        ledger = Ledger()
        context = SearchContext(
            engine=self.engine, codec=self.codec, ledger=ledger, request=request, on_text=on_text, on_token=on_token,
            on_progress=on_progress,
        )  # fmt: skip
        return Task(search_edited(context, search), ledger, tag=tag)

    @property
    def _vocabulary(self) -> int:
        """Ids that every model has an embedding for."""
        return min(vocabulary_of(runner.model) for runner in self.engine.runners)


def _both(
    index: int, given: Callable[[int, int, int], None] | None, shown: Callable[[int, int], None] | None
) -> Callable[[int, int], None] | None:
    """What one request calls as it advances: the display's function and the caller's."""
    if given is None:
        return shown

    def report(tokens: int, iterations: int) -> None:
        if shown is not None:
            shown(tokens, iterations)
        given(index, tokens, iterations)

    return report
