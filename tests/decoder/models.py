"""Tiny random models of every family, a byte-level tokenizer, and ways to ask an engine for logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from raindecode.decoder import Decoder
from raindecode.engine.branch import Branch, Ledger
from raindecode.engine.engine import Engine
from raindecode.engine.logit_rows import HostRow
from raindecode.engine.rng import name_draw
from raindecode.engine.sampler import Filter
from raindecode.engine.task import Task
from raindecode.engine.types import Draw, Search, Want

VOCABULARY = 160
CONTEXT = 1024
WINDOW = 5  # of the families with sliding windows; shorter than most test paths
PAD, BOS, EOS = 0, 1, 2

_WIDE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
    "initializer_range": 0.2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
# A window longer than the probe at load, so that only the model's own declaration can give it away.
_LONG = 100
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": CONTEXT // 32,
}  # fmt: skip

_FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, _GROUPED),
    "mistral": (tf.MistralConfig, {**_GROUPED, "sliding_window": WINDOW}),
    "qwen2": (tf.Qwen2Config, _GROUPED),
    "qwen3": (tf.Qwen3Config, {**_GROUPED, "head_dim": 32}),
    "gemma2": (
        tf.Gemma2Config,
        {**_GROUPED, "head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0},
    ),
    "phi3": (tf.Phi3Config, _GROUPED),
    "gpt_neox": (tf.GPTNeoXConfig, _WIDE),
    "gpt2": (tf.GPT2Config, _GPT),
    "olmo2": (tf.Olmo2Config, _GROUPED),
    "mixtral": (tf.MixtralConfig, {**_GROUPED, "num_local_experts": 4}),
    "gpt_oss": (
        tf.GptOssConfig,
        {
            **_GROUPED, "head_dim": 32, "num_local_experts": 4, "sliding_window": WINDOW, "rope_parameters": _YARN,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "t5": (tf.T5Config, {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}),
    "bart": (
        tf.BartConfig,
        {
            "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        },
    ),
    "bert": (tf.BertConfig, _WIDE),
    "mamba": (tf.MambaConfig, {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}),
    "qwen3_next": (
        tf.Qwen3NextConfig,
        {
            **_GROUPED, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "bloom": (tf.BloomConfig, {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 1, "n_head": 4}),
    "falcon": (tf.FalconConfig, {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}),
    "gptj": (tf.GPTJConfig, {**_GPT, "rotary_dim": 8}),
    "llama4_text": (
        tf.Llama4TextConfig,
        {**_GROUPED, "head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": _LONG},
    ),
    "phimoe": (tf.PhimoeConfig, {**_GROUPED, "num_local_experts": 2, "sliding_window": _LONG}),
    "qwen2_moe": (
        tf.Qwen2MoeConfig,
        {
            **_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16, "use_sliding_window": True, "sliding_window": _LONG, "max_window_layers": 2,
        },
    ),
    "doge": (tf.DogeConfig, {**_GROUPED, "keep_window_size": _LONG}),
}  # fmt: skip

SERVED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox", "gpt2", "olmo2", "mixtral", "gpt_oss")
EXACT = ("llama", "qwen3", "gemma2", "gpt_neox", "gpt2")


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model of a family, the same every time, in float32 and eval mode."""
    kind, settings = _FAMILIES[family]
    torch.manual_seed(0)
    config = kind(**{**settings, **changes})
    make: Callable[..., PreTrainedModel] = tf.AutoModelForCausalLM.from_config
    if getattr(config, "is_encoder_decoder", False):
        make = tf.AutoModelForSeq2SeqLM.from_config
    model = make(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, 0.0, 2.0)
    return model


def stock_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model as transformers defines it: eager attention. Taken before an engine switches that of the original."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def stock_row(model: PreTrainedModel, path: Sequence[int]) -> HostRow:
    """Plain transformers: logits after `path`, alone in its batch and without a cache."""
    with torch.inference_mode():
        row: HostRow = model(input_ids=torch.tensor([list(path)]), use_cache=False).logits[0, -1].float().numpy()
    return row


def random_tokens(count: int, seed: int) -> list[int]:
    """Ordinary token ids: none of the special ones."""
    tokens: list[int] = np.random.default_rng(seed).integers(EOS + 1, VOCABULARY, count).tolist()
    return tokens


def run_alone(engine: Engine, search: Callable[[Ledger], Generator[Any, Any, Any]]) -> Any:
    """Run one search by itself and return its result, or raise its error."""
    ledger = Ledger()
    (task,) = engine.run([Task(search(ledger), ledger)])
    if task.error is not None:
        raise task.error
    return task.result


def logits_after(engine: Engine, paths: Sequence[Sequence[int]]) -> list[HostRow]:
    """Logits after every path, all wanted in one step; the cache is left as it is."""

    def search(ledger: Ledger) -> Generator[Any, Any, list[HostRow]]:
        branches: list[Branch] = [engine.open(ledger, path) for path in paths]
        answers = yield [Want(branch, logits=True) for branch in branches]
        return [answer.logits for answer in answers]

    rows: list[HostRow] = run_alone(engine, search)
    return rows


def task(engine: Engine, search: Callable[[Ledger], Search], tag: Any = None) -> Task:
    """A task of `search`, with a ledger of its own."""
    ledger = Ledger()
    return Task(search(ledger), ledger, tag)


def writes(engine: Engine, prompt: Sequence[int], count: int, seed: int = 0) -> Callable[[Ledger], Search]:
    """A plain search: `count` sampled tokens after `prompt`."""

    def search(ledger: Ledger) -> Search:
        branch, tokens = engine.open(ledger, prompt), []
        for _ in range(count):
            (got,) = yield [Want(branch, draws=[Draw(Filter(), seed, name_draw(0, branch.length))])]
            tokens.append(got.drawn[0].token)
            branch.append(tokens[-1:])
        return tokens

    return search


_MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("Ġ", "a"), ("Ġ", "the"), ("o", "n"), ("Ã", "©")]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges: printable ASCII and the merges first, then every other byte.

    A model whose vocabulary ends at `READABLE` writes ASCII only.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    readable = [c for c in alphabet if c == "Ġ" or " " < c <= "~"]
    merged = ["".join(pair) for pair in _MERGES]
    rest = [c for c in alphabet if c not in readable]
    pieces = ["<pad>", "<s>", "</s>", *readable, *merged, *rest]
    core = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, _MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


READABLE = 3 + 95 + len(_MERGES) - 1  # the last merge is not ASCII
EVERY_BYTE = 3 + 256 + len(_MERGES)


def tiny_decoder(family: str = "llama", *, vocabulary: int = READABLE, **options: Any) -> Decoder:
    """A decoder over a random model and the byte-level tokenizer."""
    options.setdefault("kv_tokens", 4000)
    return Decoder(tiny_model(family, vocab_size=vocabulary), byte_tokenizer(), **options)
