"""LoRA adapters: what real peft computes is what is read; everything else is refused by name."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_tokens, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import raindecode
from raindecode import testbed
from raindecode.engine.adapter import Adapter, load_adapter
from raindecode.errors import AdapterError, ModelError
from raindecode.testbed.lora import merge_adapter

QUERY = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
PREFIX = "base_model.model."
RANK = 4

Tensors = dict[str, Tensor]


def config(**changes: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "bias": "none", **changes}


def tensors(model: PreTrainedModel, *names: str, rank: int = RANK) -> Tensors:
    """A random update of every module named, in PEFT's keys."""
    torch.manual_seed(1)
    made = {}
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        made[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, weight.shape[1])
        made[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(weight.shape[0], rank)
    return made


def write(folder: Path, settings: Any, weights: Tensors | None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if weights is not None:
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@torch.no_grad()
def merged(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    twin = copy.deepcopy(model)
    for name, update in adapter.updates.items():
        module = twin.get_submodule(name)
        delta = update.scale * (update.up @ update.down)
        assert isinstance(module.weight, Tensor)
        module.weight += delta.T if isinstance(module, Conv1D) else delta
    return twin


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(input_ids=torch.tensor([random_tokens(20, 3)])).logits
    return result


PEFT_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "every-linear": ("llama", {"target_modules": "all-linear", "r": 4, "lora_alpha": 8}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 16,
            # The first pattern that fits decides; one without a dot fits the last part of a name only.
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"^model\.layers\.0\.mlp\.down_proj": 3, "proj": 7, "v_proj": 6},
            "alpha_pattern": {r"model\.layers\.\d\.mlp\.down_proj": 5, "q_proj": 3},
        },
    ),
    "rslora-and-patterns": (
        "llama",
        {"target_modules": ["k_proj", "gate_proj"], "r": 8, "use_rslora": True, "rank_pattern": {"k_proj": 3},
         "alpha_pattern": {"gate_proj": 2}},
    ),
    "one-layer": ("llama", {"target_modules": ["o_proj", "up_proj"], "layers_to_transform": [1], "r": 2}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "r": 3, "lora_alpha": 6, "fan_in_fan_out": True}),
    "conv1d-undeclared": ("gpt2", {"target_modules": ["c_attn"], "r": 3}),
}  # fmt: skip


@pytest.mark.parametrize("case", PEFT_CASES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*Rank-Stabilized", "ignore:.*rank_pattern")
def test_what_peft_computes_is_what_is_read(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    family, settings = PEFT_CASES[case]
    model = tiny_model(family)
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    wrapped.save_pretrained(tmp_path)
    adapter = load_adapter(str(tmp_path), model)
    expected = logits(wrapped)
    assert (expected - logits(model)).abs().max() > 0.1, "the adapter changes nothing"
    # peft adds the update's product to the layer's, `merged` adds it to the weight: they round differently.
    assert (logits(merged(model, adapter)) - expected).abs().max() <= 1e-5 * expected.abs().max()
    layers = {
        name.removeprefix(PREFIX): module.scaling["default"]
        for name, module in wrapped.named_modules()
        if hasattr(module, "lora_A")
    }
    assert {name: update.scale for name, update in adapter.updates.items()} == layers


def test_the_testbeds_adapter_fits_its_base() -> None:
    model = AutoModelForCausalLM.from_pretrained(testbed.WEIGHTS, dtype=torch.float32).eval()
    adapter = load_adapter(str(testbed.ADAPTER), model)
    assert adapter.name == str(testbed.ADAPTER)
    assert len(adapter.updates) == 7 * model.config.num_hidden_layers
    ours = merged(model, adapter)
    merge_adapter(model, testbed.ADAPTER)  # the testbed's own reader
    for (name, got), (_, expected) in zip(ours.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(got, expected, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tensors_take_the_models_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("llama").to(dtype)
    weights = tensors(model, QUERY)
    adapter = load_adapter(write(tmp_path, config(), weights), model)
    update = adapter.updates[QUERY]
    assert (update.down.dtype, update.up.dtype) == (dtype, dtype)
    assert torch.equal(update.down, weights[f"{PREFIX}{QUERY}.lora_A.weight"].to(dtype))
    assert update.down.device == model.device


def test_a_bin_file_and_old_keys_are_read(llama: PreTrainedModel, tmp_path: Path) -> None:
    weights = {k.replace(".weight", ".default.weight"): v for k, v in tensors(llama, QUERY, DOWN).items()}
    path = write(tmp_path, config(use_rslora=True), None)
    torch.save(weights, tmp_path / "adapter_model.bin")
    adapter = load_adapter(path, llama)
    assert list(adapter.updates) == [QUERY, DOWN]
    assert torch.equal(adapter.updates[DOWN].up, weights[f"{PREFIX}{DOWN}.lora_B.default.weight"])
    assert adapter.updates[QUERY].scale == 8 / math.sqrt(RANK)


def test_safetensors_are_preferred_to_a_bin_file(llama: PreTrainedModel, tmp_path: Path) -> None:
    path = write(tmp_path, config(), tensors(llama, QUERY))
    (tmp_path / "adapter_model.bin").write_bytes(b"not a pickle")
    assert list(load_adapter(path, llama).updates) == [QUERY]


def test_another_name_of_the_base_is_logged_only(
    llama: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, config(base_model_name_or_path="someone/else"), tensors(llama, QUERY))
    with caplog.at_level(logging.INFO, "raindecode"):
        assert load_adapter(path, llama).updates
    assert "someone/else" in caplog.text


def test_settings_that_change_nothing_are_accepted(llama: PreTrainedModel, tmp_path: Path) -> None:
    harmless = config(
        use_dora=False, modules_to_save=None, target_parameters=[], megatron_core="megatron.core", init_lora_weights="gaussian",
        lora_dropout=0.5, bias="all", target_modules=["v_proj"], inference_mode=False, a_setting_of_tomorrow=None,
    )  # fmt: skip
    # bias="all" of a model without biases stores none; the tensors say what is changed, not target_modules.
    assert list(load_adapter(write(tmp_path, harmless, tensors(llama, QUERY)), llama).updates) == [QUERY]


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"}, {"peft_type": None}, {"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]}, {"target_parameters": ["experts.down_proj"]}, {"layer_replication": [[0, 2]]},
        {"alora_invocation_tokens": [5]}, {"megatron_config": {"a": 1}}, {"use_qalora": True}, {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {"top_k": 1}}, {"kasa_config": {"beta": 1}}, {"monteclora_config": {"num_samples": 1}},
        {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"}, {"init_lora_weights": "loftq"},
    ],
    ids=str,
)  # fmt: skip
def test_variants_are_refused_by_name(changes: dict[str, Any], llama: PreTrainedModel, tmp_path: Path) -> None:
    path = write(tmp_path, config(**changes), tensors(llama, QUERY))
    ((setting, value),) = changes.items()
    with pytest.raises(AdapterError, match=setting) as caught:
        load_adapter(path, llama)
    assert "allowed" in str(caught.value)
    if isinstance(value, str):
        assert repr(value) in str(caught.value)


Change = Callable[[Tensors], Any]
KEY_A, KEY_B = f"{PREFIX}{QUERY}.lora_A.weight", f"{PREFIX}{QUERY}.lora_B.weight"
FAULTS: dict[str, tuple[Change, str]] = {
    "dora": (lambda t: t.update({f"{PREFIX}{QUERY}.lora_magnitude_vector": torch.ones(64)}), "DoRA's magnitudes"),
    "embedding": (
        lambda t: t.update({f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, 160)}),
        "LoRA on an embedding.*embed_tokens",
    ),
    "lora-bias": (lambda t: t.update({f"{PREFIX}{QUERY}.lora_B.bias": torch.ones(64)}), "bias of LoRA's own"),
    "bias": (
        lambda t: t.update({f"{PREFIX}{QUERY}.base_layer.bias": torch.ones(64)}),
        r"biases of the base \(bias='none'\)",
    ),
    "whole-module": (
        lambda t: t.update({f"{PREFIX}lm_head.weight": torch.ones(160, 64)}),
        r"no part of LoRA: 'base_model.model.lm_head.weight'",
    ),
    "no-prefix": (lambda t: t.update({f"{QUERY}.lora_A.weight": t[KEY_A]}), "do not begin with 'base_model.model.'"),
    "only-no-prefix": (
        lambda t: t.update({k[17:]: t.pop(k) for k in list(t)}),
        "do not begin with 'base_model.model.'",
    ),
    "twice": (lambda t: t.update({KEY_A.replace(".weight", ".default.weight"): t[KEY_A]}), "lora_A of .* twice"),
    "no-tensors": (lambda t: t.clear(), "holds no tensors"),
    "a-without-b": (lambda t: t.pop(KEY_B), "has lora_A of 'model.layers.0.self_attn.q_proj' but no lora_B"),
    "b-without-a": (lambda t: t.pop(KEY_A), "has lora_B of .* but no lora_A"),
    "missing-module": (
        lambda t: t.update({k.replace("layers.0", f"layers.{i}"): t[k] for k in list(t) for i in range(2, 9)}),
        "another base: this LlamaForCausalLM has no 'model.layers.2.self_attn.q_proj', .* and 2 more",
    ),
    "shape": (
        lambda t: t.update({KEY_A: torch.ones(RANK, 48)}),
        r"another base: its update of .*q_proj' is 64 x 48 \(out x in\), the module is 64 x 64",
    ),
    "ranks": (lambda t: t.update({KEY_A: torch.ones(3, 64)}), "ranks .* disagree: lora_A has 3, lora_B 4, .* says 4"),
    "rank-of-config": (
        lambda t: t.update({KEY_A: torch.ones(3, 64), KEY_B: torch.ones(64, 3)}),
        "lora_A has 3, lora_B 3, the configuration says 4",
    ),
    "nan": (lambda t: t[KEY_A][0].fill_(math.nan), "lora_A of .* holds NaN or infinity; allowed"),
    "inf": (lambda t: t[KEY_B][0].fill_(math.inf), "lora_B of .* holds NaN or infinity; allowed"),
    "vector": (lambda t: t.update({KEY_A: torch.ones(64)}), r"lora_A of .* is torch.float32 of shape \(64,\)"),
    "whole-numbers": (lambda t: t.update({KEY_A: torch.ones(4, 64, dtype=torch.int8)}), "is torch.int8 of shape"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_are_not_plain_lora_are_refused(fault: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    weights = tensors(llama, QUERY)
    change(weights)
    with pytest.raises(AdapterError, match=message):
        load_adapter(write(tmp_path, config(), {k: v.clone() for k, v in weights.items()}), llama)


@pytest.mark.parametrize(
    ("family", "changes", "name", "message"),
    [
        ("llama", {}, "lm_head", "output layer 'lm_head'"),
        ("llama", {"tie_word_embeddings": True}, "lm_head", "output layer 'lm_head'"),
        ("llama", {"tie_word_embeddings": True}, "model.embed_tokens", "output layer 'model.embed_tokens'"),
        ("llama", {}, "model.embed_tokens", "'model.embed_tokens', a Embedding"),
        ("llama", {}, "model.norm", "'model.norm', a LlamaRMSNorm"),
        ("llama", {}, "model.layers.0.mlp", "'model.layers.0.mlp', a LlamaMLP"),
        ("gpt2", {}, "lm_head", "output layer 'lm_head'"),
        ("mixtral", {}, "model.layers.0.mlp.experts", "experts of a mixture"),
        ("mixtral", {}, "model.layers.1.block_sparse_moe.experts.3.w1", "experts of a mixture"),
        ("mixtral", {}, "model.layers.0.mlp.gate", "'model.layers.0.mlp.gate', a MixtralTopKRouter"),
    ],
)
def test_other_modules_are_refused(
    family: str, changes: dict[str, Any], name: str, message: str, tmp_path: Path
) -> None:
    weights = {
        f"{PREFIX}{name}.lora_A.weight": torch.ones(RANK, 64),
        f"{PREFIX}{name}.lora_B.weight": torch.ones(160, RANK),
    }
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(write(tmp_path, config(), weights), tiny_model(family, **changes))
    assert "allowed" in str(caught.value)


def test_attention_of_a_mixture_of_experts_is_served(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    assert list(load_adapter(write(tmp_path, config(), tensors(model, QUERY)), model).updates) == [QUERY]


def test_an_experts_linear_layers_are_refused_wherever_they_are(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[0].experts = torch.nn.ModuleList([torch.nn.Linear(64, 64)])
    path = write(tmp_path, config(), tensors(model, "model.layers.0.experts.0"))
    with pytest.raises(AdapterError, match=r"experts of a mixture: 'model\.layers\.0\.experts\.0'"):
        load_adapter(path, model)


def test_a_quantized_layer_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = write(tmp_path, config(), tensors(model, QUERY))
    layer: Any = model.get_submodule(QUERY)
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"q_proj', whose weight is torch.int8"):
        load_adapter(path, model)


def test_numbers_too_large_for_the_models_dtype_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    weights = tensors(model, QUERY)
    weights[KEY_B][0, 0] = 1e6
    with pytest.raises(AdapterError, match=r"lora_B of .* holds NaN or infinity once it is torch.float16"):
        load_adapter(write(tmp_path, config(), weights), model.half())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "rank 0; allowed: a whole number"),
        ({"r": "4"}, "rank '4'"),
        ({"r": None}, "rank None"),
        ({"lora_alpha": None}, "alpha None; allowed: a finite number"),
        ({"lora_alpha": math.inf}, "alpha inf"),
        ({"rank_pattern": [1]}, r"rank_pattern \[1\]"),
        ({"rank_pattern": {"q_proj": True}}, "rank True"),
        ({"alpha_pattern": {"(": 1}}, r"'\(' in alpha_pattern is no regular expression"),
    ],
)
def test_ranks_and_alphas_are_checked(
    changes: dict[str, Any], message: str, llama: PreTrainedModel, tmp_path: Path
) -> None:
    path = write(tmp_path, config(**changes), tensors(llama, QUERY))
    with pytest.raises(AdapterError, match=message):
        load_adapter(path, llama)


def test_folders_that_are_none_are_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(AdapterError, match="there is no folder"):
        load_adapter(str(folder), llama)
    folder.mkdir()
    with pytest.raises(AdapterError, match=r"has no adapter_config.json: give a folder saved by peft"):
        load_adapter(str(folder), llama)
    write(folder, config(), None)
    with pytest.raises(AdapterError, match=r"has neither adapter_model.safetensors nor adapter_model.bin"):
        load_adapter(str(folder), llama)
    with pytest.raises(AdapterError, match="is a file"):
        load_adapter(str(folder / "adapter_config.json"), llama)
    with pytest.raises(AdapterError, match="is a PosixPath; give the path"):
        load_adapter(folder, llama)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="there is no folder ''"):
        load_adapter("", llama)


def test_a_hub_id_that_is_not_to_be_had_is_refused(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match=r"nobody/nothing"):
        load_adapter("nobody/nothing", llama)


def test_a_hub_id_is_read_from_the_cache(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--someone--adapter" / "snapshots" / ("0" * 40)
    write(snapshot, config(), tensors(llama, QUERY))
    refs = tmp_path / "models--someone--adapter" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    adapter = load_adapter("someone/adapter", llama)
    assert (adapter.name, list(adapter.updates)) == ("someone/adapter", [QUERY])


def test_broken_files_are_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    path = write(tmp_path, config(), tensors(llama, QUERY))
    file = tmp_path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors of adapter .* could not be read"):
        load_adapter(path, llama)
    file.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"nonsense")
    with pytest.raises(AdapterError, match=r"adapter_model.bin of adapter .* does not load as plain tensors"):
        load_adapter(path, llama)
    torch.save([1, 2], tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="is no dictionary of tensors"):
        load_adapter(path, llama)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="holds a list"):
        load_adapter(path, llama)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOR')
    with pytest.raises(AdapterError, match=r"adapter_config.json of adapter .* could not be read"):
        load_adapter(path, llama)


def test_a_bin_file_runs_no_code(llama: PreTrainedModel, tmp_path: Path) -> None:
    path = write(tmp_path, config(), None)
    witness = tmp_path / "witness"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (witness,)

    torch.save({KEY_A: Trap()}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="does not load as plain tensors"):
        load_adapter(path, llama)
    assert not witness.exists()


def test_the_file_is_left_as_it_was(llama: PreTrainedModel, tmp_path: Path) -> None:
    weights = tensors(llama, QUERY)
    adapter = load_adapter(write(tmp_path, config(), weights), llama)
    adapter.updates[QUERY].down.zero_()
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")[KEY_A], weights[KEY_A])


def test_the_error_is_public() -> None:
    assert raindecode.AdapterError is AdapterError
    assert issubclass(AdapterError, ModelError)
