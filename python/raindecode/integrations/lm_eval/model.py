"""RainDecodeLM: the harness's Hugging Face model class, with every score and answer made by a Decoder."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

import raindecode
from raindecode.decoder import Decoder
from raindecode.errors import ConfigError
from raindecode.integrations.lm_eval.settings import (
    Method,
    edits_of,
    format_of,
    load_decoder,
    mixture,
    searching,
)
from raindecode.policy.policy import Policy
from raindecode.policy.prompt import Conversation
from raindecode.search.sampling import Sampling
from raindecode.settings import require_whole
from raindecode.text import common_length
from raindecode.types import Completion

_log = logging.getLogger(__name__)
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
_ONE = ("num_beams", "num_return_sequences")  # settings of transformers that mean what we do when they are 1
_OWN = ("until", "max_gen_toks", "do_sample", "temperature", "seed")

Scored = tuple[tuple[str, str], list[int], list[int]]  # the texts, the context's ids and the continuation's


class RainDecodeLM(HFLM):  # type: ignore[misc]
    """A model of lm-evaluation-harness behind our engine.

    Log-likelihoods are those of the policy: the model, the mixture of models, the edited model, behind the constant prompt where
    there is one. Answers are chosen by the search, from the same policy. For one model and raw prompts both are those of the
    harness's own "hf".

    Args:
        pretrained: "testbed", a folder, a hub id, or a Decoder.
        adapter, aligned: aligned models, as in Decoder.from_pretrained.
        dera: weight of the aligned model, or one each; an aligned model without it counts in full (1).
        target_kl: instead: the divergence the weight is solved for at every token, in nats.
        allow_negative: accept weights below 0.
        edits: FILE or FILE:STRENGTH, or several, in their order.
        edit_on, edit_judge, force_edit: see AlignEZ: on, judge, force.
        prompt: how the harness's contexts are written for the model: "raw" as they are, "format" as the decoder or RAIN writes prompts,
            "urial" behind the default constant prompt, or the file of one. All but "raw" also say how `--apply_chat_template` writes
            conversations; "raw" leaves that to the tokenizer.
        search: "sampling", greedy unless a task says otherwise, or "rain". What tasks say of temperature and the like is for the former.
        rain_preset: "hh", "adv", "truth", "sentiment" or "town".
        rain: settings of RAIN in the preset's place, by name.
        policy: in the place of dera, edits and prompt, for a Decoder.
        seed: of sampled answers; the k-th sample of one prompt has `seed` + k.
        max_length: tokens of context and answer; None takes the models'.
        max_concurrent: requests under way together. The harness's batch_size means nothing: requests join and leave at every step.
        dtype, trust_remote_code, kv_tokens, exact, cuda_graphs, device: as in Decoder.from_pretrained. A GPU that is not there
            becomes the CPU.
        add_bos_token, prefix_token_id: as in HFLM.

    Raises:
        ConfigError, ModelError, EditFileError, PromptFileError: an argument is not allowed, or something cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str | Decoder = "testbed",
        *,
        adapter: str | Sequence[str] = (),
        aligned: str | Sequence[str] = (),
        dera: float | Sequence[float] | None = None,
        target_kl: float | None = None,
        allow_negative: bool = False,
        edits: str | Sequence[str] = (),
        edit_on: str = "reference",
        edit_judge: bool = False,
        force_edit: bool = False,
        prompt: str | None = None,
        search: str = "sampling",
        rain_preset: str | None = None,
        rain: Mapping[str, Any] | None = None,
        policy: Policy | None = None,
        seed: int = 0,
        max_length: int | None = None,
        max_concurrent: int | None = None,
        dtype: str | None = None,
        trust_remote_code: bool | None = None,
        kv_tokens: int | None = None,
        exact: bool | None = None,
        cuda_graphs: bool | None = None,
        device: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        require_whole("seed", seed, 0)
        if max_length is not None:
            require_whole("max_length", max_length, 2)
        name = pretrained if isinstance(pretrained, str) else getattr(pretrained, "name", "")
        chosen = searching(search, rain_preset, rain, name)
        made = edits_of(edits, on=edit_on, judge=edit_judge, force=force_edit)
        self.decoder = load_decoder(
            pretrained, device=device, dtype=dtype, adapter=adapter, aligned=aligned, max_concurrent=max_concurrent,
            trust_remote_code=trust_remote_code, kv_tokens=kv_tokens, exact=exact, cuda_graphs=cuda_graphs,
        )  # fmt: skip
        format = format_of(prompt, self.decoder, chosen)
        if policy is None:
            mixed = mixture(dera, target_kl, self.decoder.num_models - 1, allow_negative=allow_negative)
            policy = Policy(dera=mixed, edits=made)
        elif made or dera is not None or target_kl is not None or format is not None:
            raise ConfigError("policy excludes dera, target_kl, edits and prompt: put them into it")
        else:
            format, policy = policy.prompt, Policy(dera=policy.dera, edits=policy.edits)
        self.method = Method(policy, format, chosen)
        self.seed = seed
        self._written: dict[str, list[dict[str, str]]] = {}  # conversations that are texts now
        super().__init__(
            pretrained=self.decoder.engine.runner.model,
            tokenizer=copy.deepcopy(self.decoder.codec.tokenizer),  # the harness gives it a padding token
            backend="causal",
            max_length=min(max_length or self.decoder.context_length, self.decoder.context_length),
            batch_size=self.decoder.engine.max_tasks,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
        )
        if chosen is not None:
            _log.warning("RAIN takes part in generate_until only: log-likelihoods are those of the policy it searches")

    # ---- log-likelihoods -------------------------------------------------------------------------------------------------
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is what greedy decoding would say) of continuations behind contexts."""
        if self.method.format is None:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]
        pairs = [request.args for request in requests]
        return self._loglikelihood_tokens([(pair, *self._encode_pair(*pair)) for pair in pairs], disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows as large as the context.

        Raises:
            ConfigError: there is a prompt format, in which a text is no answer to anything.
        """
        if self.method.format is not None:
            raise ConfigError(
                "the perplexity of a text is asked for, but prompt= says how a user's words are written, and there are none: leave "
                "prompt out for this task"
            )
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of context and continuation. In a format they part where the tokens of both together leave those of the prompt alone."""
        if self.method.format is None:
            ids: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return ids
        codec, text = self.decoder.codec, self._in_format(context)
        if not continuation:
            raise ConfigError("an empty continuation is to be scored; allowed: at least one token")
        whole = codec.encode(text + continuation)
        border = min(common_length(whole, codec.encode(text)), len(whole) - 1)
        return whole[:border], whole[border:]

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """As `loglikelihood`, of token ids; texts that do not fit are cut from the left, as in HFLM."""
        texts: list[list[int]] = []
        starts: list[int] = []
        for _, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ConfigError(
                    f"a context of {len(context)} tokens and a continuation of {len(continuation)} are to be scored; allowed: at least one "
                    f"each, and at most {self.max_length} of the continuation (max_length)"
                )
            whole = [*context, *continuation]
            if len(whole) > self.max_length + 1:
                _log.warning(
                    "%d tokens are cut from the left of a text of %d", len(whole) - self.max_length - 1, len(whole)
                )
            texts.append(whole[-(self.max_length + 1) :])
            starts.append(len(texts[-1]) - len(continuation))
        quiet = False if disable_tqdm else None
        scored = self.decoder.score(texts, policy=self.method.policy, starts=starts, top=1, progress=quiet)
        answers = []
        for (said, _, _), start, one in zip(requests, starts, scored, strict=True):
            places = range(start, len(one.token_ids))
            total = sum(one.logprobs[i].logprob for i in places)
            greedy = all(one.top_logprobs[i][0].token_id == one.token_ids[i] for i in places)
            answers.append((total, greedy))
            if said is not None:  # the windows of a text have no name of their own
                self.cache_hook.add_partial("loglikelihood", said, answers[-1])
        return answers

    def _model_call(self, *_: Any, **__: Any) -> Any:
        """HFLM's way to logits, which would be those of the reference model whatever the policy.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("raindecode gives no logits to the harness: use loglikelihood, or the model 'hf'")

    def _model_generate(self, *_: Any, **__: Any) -> Any:
        """HFLM's way to answers; as `_model_call`."""
        raise ConfigError("raindecode generates through its decoder: use generate_until, or the model 'hf'")

    # ---- answers ---------------------------------------------------------------------------------------------------------
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to contexts, up to the first of the task's stop texts.

        Raises:
            ConfigError: a task asks for a way of generating that there is not.
        """
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        for members in groups.values():
            contexts = [requests[i].args[0] for i in members]
            asked = requests[members[0]].args[1]
            for place, text in self._answers(contexts, asked, disable_tqdm):
                found[members[place]] = text
                self.cache_hook.add_partial("generate_until", (contexts[place], asked), text)
        return [found[i] for i in range(len(requests))]

    def _answers(self, contexts: Sequence[str], asked: Mapping[str, Any], quiet: bool) -> Any:
        """(index, answer) as they finish, of contexts with the same settings."""
        kwargs = dict(normalize_gen_kwargs(dict(asked), self.max_gen_toks))
        stops = [stop for stop in kwargs["until"] if stop]
        limit = kwargs["max_gen_toks"]
        if not 0 < limit < self.max_length:
            raise ConfigError(f"a task asks for {limit} new tokens; allowed: 1 to {self.max_length - 1} (max_length)")
        sampling = self._sampling(kwargs)
        search = sampling if self.method.rain is None else self.method.rain
        samples: dict[str, int] = {}
        seeds = []
        for context in contexts:
            samples[context] = samples.get(context, -1) + 1
            seeds.append(int(kwargs.get("seed", self.seed)) + samples[context])
        prompts: list[Any] = [self._prompt(context, limit) for context in contexts]
        made = self.decoder.requests(
            prompts, search=search, policy=self.method.answering, max_new_tokens=limit, seed=seeds, stop=stops
        )
        for index, outcome in self.decoder.stream(made, search=search, progress=False if quiet else None):
            if not isinstance(outcome, Completion):
                raise outcome
            yield index, postprocess_generated_text(outcome.text, stops, None)

    def _prompt(self, context: str, limit: int) -> Any:
        """What the decoder is given: token ids of a context as it stands, its beginning cut off where the answer would not fit; in
        a format the user's words or the conversation, which a search judges answers by."""
        if self.method.format is None:
            ids = self.tok_encode(context, left_truncate_len=self.max_length - limit)
            return ids or [self.prefix_token_id]
        if self._written.get(context):
            return self._written[context]
        text = self._in_format(context)
        return context if text != context and context.strip() else self.decoder.codec.encode(text)

    def _sampling(self, kwargs: Mapping[str, Any]) -> Sampling:
        """Plain sampling as a task asks for it."""
        unknown = [name for name in kwargs if name not in (*_OWN, *_SAMPLING) and not _is_one(name, kwargs[name])]
        if unknown:
            raise ConfigError(
                f"a task's generation_kwargs hold {', '.join(f'{name}={kwargs[name]!r}' for name in unknown)}; allowed: "
                f"{', '.join((*_OWN, *_SAMPLING))}, and {', '.join(_ONE)} of 1"
            )
        if not kwargs["do_sample"]:
            return Sampling.greedy(
                **({"repetition_penalty": kwargs["repetition_penalty"]} if "repetition_penalty" in kwargs else {})
            )
        given = {name: kwargs[name] for name in _SAMPLING if kwargs.get(name) is not None}
        return Sampling(temperature=float(kwargs.get("temperature", 1.0)), **given)

    # ---- prompts ---------------------------------------------------------------------------------------------------------
    def _in_format(self, context: str) -> str:
        """A context as the user's words, unless `apply_chat_template` has written it that way."""
        format = self.method.format
        assert format is not None
        if context in self._written or (
            format.prefix and context.startswith(format.prefix)
        ):  # the latter from the harness's cache
            return context
        return format.render(context)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text: in the prompt format where there is one, else in the tokenizer's template."""
        format = self.method.format
        if format is None:
            return str(super().apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt))
        history, begun = list(chat_history), ""
        if not add_generation_prompt and history and history[-1]["role"] == "assistant":
            begun = format.reply.partition("{reply}")[0] + history.pop()["content"]
        text = format.render(Conversation.of(history)) + begun
        self._written[text] = [] if begun else history
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What stands in the results for how conversations are written."""
        format = self.method.format
        if format is None:
            found: str | None = super().chat_template(chat_template)
            return found
        return format.prefix + format.turn if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """What the harness notes of the model; nothing is asked of the hub."""
        method = self.method
        assert isinstance(method.policy.edits, tuple)
        return {
            "model_num_parameters": sum(p.numel() for runner in self.decoder.engine.runners for p in runner.model.parameters()),
            "model_dtype": self.decoder.dtype,
            "model_revision": self.revision,
            "model_sha": "",
            "raindecode": raindecode.__version__,
            "raindecode_exact": self.decoder.exact,
            "raindecode_search": "sampling" if method.rain is None else "rain",
            "raindecode_dera": None if method.policy.dera is None else method.policy.dera.label,
            "raindecode_edits": [{"name": edit.name, "strength": edit.strength, "on": edit.on} for edit in method.policy.edits],
            "raindecode_prompt": None if method.format is None else method.format.prefix + method.format.turn,
        }  # fmt: skip


def _is_one(name: str, value: object) -> bool:
    return name in _ONE and value == 1


if "raindecode" not in model_registry:  # an entry point has put it there already in later releases
    model_registry.register("raindecode")(RainDecodeLM)
