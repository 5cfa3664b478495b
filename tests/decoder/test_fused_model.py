"""FusedModel: equal to stock transformers over long paths, refused where a model only looks alike, current only while it is so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from fused_models import PATHS, TOLERANCE, Tripled, assert_equals_stock, error, fused, part, triple_forward
from models import CONTEXT, VOCABULARY, logits_after, random_tokens, stock_copy, tiny_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, PreTrainedModel

from raindecode.engine.loader import build_engine
from raindecode.engine.rotary import NotFusible, RotaryTable
from rainkernels.ops.decoder import decoder_lane

BLOCK = 1024  # positions per block of the rotary table
needs_native = pytest.mark.skipif(decoder_lane() != "cpu", reason="there is no native step here")


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """With norms and biases that are neither one nor zero."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


ROPE = {"rope_theta": 10_000.0}
LLAMA3 = {
    **ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
    "llama-narrow": ("llama", {"head_dim": 8, "num_hidden_layers": 1}),
    "llama-wide": ("llama", {"head_dim": 40}),
    "llama-linear": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0,
                                                  "original_max_position_embeddings": CONTEXT // 4}}),
    "mistral-window": ("mistral", {}),
    "qwen2-biases": ("qwen2", {}),
    "qwen2-window-of-some": ("qwen2", {"use_sliding_window": True, "sliding_window": 37, "max_window_layers": 1}),
    "qwen3-head-norms": ("qwen3", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_equal_to_stock_over_long_paths(name: str) -> None:
    family, changes = FUSED[name]
    model = shaken(tiny_model(family, **changes))
    stock = stock_copy(model)
    engine, mode = build_engine(model, kv_tokens=700)
    assert (fused(engine)._stack is not None) == (decoder_lane() == "cpu")
    assert mode == "rows"
    assert_equals_stock(engine, stock)


@pytest.mark.parametrize("kind", [tf.SeedOssConfig, tf.GraniteConfig, tf.SmolLM3Config], ids=lambda k: k.model_type)
def test_other_families_of_the_form(kind: type[tf.PretrainedConfig]) -> None:
    model = shaken(AutoModelForCausalLM.from_config(config_of(kind)).eval())
    stock = stock_copy(model)
    engine, _ = build_engine(model, kv_tokens=700)
    fused(engine)
    assert_equals_stock(engine, stock)


def test_positions_beyond_a_block_of_the_rotary_table() -> None:
    model = tiny_model("llama", max_position_embeddings=4 * BLOCK, num_hidden_layers=1)
    stock = stock_copy(model)
    engine, _ = build_engine(model, kv_tokens=2 * BLOCK + 50)
    long = random_tokens(2 * BLOCK + 30, 4)
    logits_after(engine, [long[: BLOCK - 3]])
    assert len(fused(engine).rotary.upto(0)[0]) == BLOCK
    assert_equals_stock(engine, stock, [long[: BLOCK + 5], long])
    assert len(fused(engine).rotary.upto(0)[0]) == 3 * BLOCK


def test_plain_pytorch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU, bfloat16 or another activation runs: the lane named reference has no native step."""
    expected = logits_after(build_engine(tiny_model("qwen3"), kv_tokens=700)[0], PATHS)
    monkeypatch.setenv("RAINKERNELS_LANE", "reference")
    engine, _ = build_engine(tiny_model("qwen3"), kv_tokens=700)
    assert fused(engine)._stack is None
    for row, other in zip(logits_after(engine, PATHS), expected, strict=True):
        assert error(row, other) <= TOLERANCE


def test_bfloat16_and_other_activations_take_plain_pytorch() -> None:
    engine, _ = build_engine(tiny_model("llama").to(torch.bfloat16), kv_tokens=100)
    assert fused(engine)._stack is None
    model = tiny_model("llama", hidden_act="gelu")
    stock = stock_copy(model)
    engine, _ = build_engine(model, kv_tokens=700)
    assert fused(engine)._stack is None
    assert_equals_stock(engine, stock)


# Models that only look alike


def config_of(kind: type[tf.PretrainedConfig], **changes: Any) -> tf.PretrainedConfig:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return kind(**{**sizes, **changes})


# Ministral 3 scales queries from original_max_position_embeddings on: nothing shows before.
LATE = {**ROPE, "rope_type": "default", "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 200}
ALIKE: list[tuple[str, tf.PretrainedConfig, str]] = [
    ("scaled by far positions", config_of(tf.Ministral3Config, rope_parameters=LATE), "differs by"),
    ("no rotary in a layer", config_of(tf.SmolLM3Config, num_hidden_layers=4), "differs by"),
    ("residuals multiplied", config_of(tf.GraniteConfig, residual_multiplier=0.2), "differs by"),
    ("logits divided", config_of(tf.GraniteConfig, logits_scaling=4.0), "differs by"),
    ("halves interleaved", config_of(tf.Ernie4_5Config), "differs by"),
    ("embedding scaled", config_of(tf.GemmaConfig), "its embedding is"),
    ("norms after", config_of(tf.Olmo2Config), "is made of"),
    ("one norm", config_of(tf.CohereConfig), "is made of"),
    ("gate and up joined", config_of(tf.GlmConfig), "is made of"),
    ("no weight in norms", config_of(tf.OlmoConfig), "it has a OlmoLayerNorm"),
    ("rope by length", config_of(tf.LlamaConfig, rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2.0}), "dynamic"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "reason"), [a[1:] for a in ALIKE], ids=[a[0] for a in ALIKE])
def test_models_that_look_alike_run_as_transformers_runs_them(
    config: tf.PretrainedConfig, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    stock = stock_copy(model)
    with caplog.at_level(logging.DEBUG, "raindecode"):
        engine, _ = build_engine(model, kv_tokens=700)
    assert engine.runner.fused is None
    assert reason in caplog.text
    assert "runs as transformers runs it" in caplog.text
    assert_equals_stock(engine, stock)


def strided(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.t().contiguous().t()


def shorter_mlp(model: Any) -> None:
    part(model, 1).mlp.gate_proj = nn.Linear(64, 80, bias=False)
    part(model, 1).mlp.up_proj = nn.Linear(64, 80, bias=False)
    part(model, 1).mlp.down_proj = nn.Linear(80, 64, bias=False)


def more_heads(model: Any) -> None:
    part(model, 1).self_attn.k_proj = nn.Linear(64, 64, bias=False)
    part(model, 1).self_attn.v_proj = nn.Linear(64, 64, bias=False)
    part(model, 1).self_attn.num_key_value_groups = 1


def no_layers(model: Any) -> None:
    model.base_model.layers = nn.ModuleList()
    model.config.num_hidden_layers = 0


CHANGED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "strided head": ("another order in memory", lambda m: strided(m.lm_head.weight)),
    "strided product": ("another order in memory", lambda m: strided(part(m).self_attn.q_proj.weight)),
    "one mlp narrower": ("other shapes than layer 0", shorter_mlp),
    "one layer with more heads": ("other shapes than layer 0", more_heads),
    "longer head": ("other rows than its embedding", lambda m: setattr(m, "lm_head", nn.Linear(64, 200, bias=False))),
    "k is v": ("share a parameter", lambda m: setattr(part(m).self_attn.v_proj, "weight", part(m).self_attn.k_proj.weight)),
    "q of two layers": (
        "share a parameter", lambda m: setattr(part(m, 1).self_attn.q_proj, "weight", part(m).self_attn.q_proj.weight),
    ),
    "bias of k alone": (
        "have a bias and some have none",
        lambda m: setattr(part(m).self_attn.k_proj, "bias", nn.Parameter(torch.randn(32))),
    ),
    "hook": ("a hook listens", lambda m: part(m).mlp.register_forward_hook(lambda _m, _a, out: 2.0 * out)),
    "forward of its own": ("a forward of its own", lambda m: triple_forward(part(m).mlp)),
    "parametrized": (
        "Parametrized", lambda m: parametrize.register_parametrization(part(m).self_attn.o_proj, "weight", Tripled()),
    ),
    "parameter of its own": (
        "parameters of its own",
        lambda m: part(m).self_attn.register_parameter("temperature", nn.Parameter(torch.ones(1))),
    ),
    "no layers": ("it has no layers", no_layers),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_changed_models_run_as_transformers_runs_them(name: str, caplog: pytest.LogCaptureFixture) -> None:
    reason, change = CHANGED[name]
    model = tiny_model("llama")
    change(model)
    stock = stock_copy(model)
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    with caplog.at_level(logging.DEBUG, "raindecode"):
        engine, _ = build_engine(model, kv_tokens=400)
    assert engine.runner.fused is None
    assert reason in caplog.text
    assert [p.untyped_storage().data_ptr() for p in model.parameters()] == storages  # nothing was joined
    assert_equals_stock(engine, stock)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (lambda x, p: (torch.ones(1, p.shape[1], 8), torch.ones(1, p.shape[1], 8)), "turns heads of 16 by"),
        (lambda x, p: (torch.ones(1, p.shape[1], 16).half(),) * 2, "torch.float16"),
        (lambda x, p: torch.ones(1, p.shape[1], 16), "takes other arguments"),
        (lambda x, p, layer_type: (x, x), "takes other arguments"),
    ],
    ids=["partial", "dtype", "complex", "by layer"],
)
def test_rotary_modules_of_another_kind_are_refused(module: Any, text: str) -> None:
    config = tiny_model("llama").config
    with pytest.raises(NotFusible, match=text):
        RotaryTable(module, config, 16, torch.float32, torch.device("cpu"))


@needs_native
def test_logits_are_the_same_bits_alone_and_in_company() -> None:
    engine, mode = build_engine(tiny_model("qwen3"), kv_tokens=1500)
    assert mode == "rows"
    fused(engine)
    paths = [PATHS[0][:n] for n in (1, 7, 40, 280)] + [random_tokens(n, n) for n in range(2, 30)]
    together = logits_after(engine, paths)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for path, row in zip(paths[::5], together[::5], strict=True):
                engine.tree.clear()
                assert np.array_equal(logits_after(engine, [path])[0], row)
    finally:
        torch.set_num_threads(before)
