"""A model after it was fused: what is put in later is honoured, memory is held once, copies and files are what they were."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fused_models import PATHS, TOLERANCE, Tripled, assert_equals_stock, error, fused, part, triple_forward
from models import VOCABULARY, byte_tokenizer, logits_after, stock_row, tiny_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from raindecode.decoder import Decoder
from raindecode.engine.loader import build_engine
from raindecode.search.rain import RAIN

AFTERWARDS: dict[str, Callable[[Any], Any]] = {
    "hook on a module": lambda m: part(m).mlp.register_forward_hook(lambda _m, _a, out: 2.0 * out),
    "hook before a module": lambda m: part(m).register_forward_pre_hook(lambda _m, args: (2.0 * args[0], *args[1:])),
    "hook on the head": lambda m: m.lm_head.register_forward_hook(lambda _m, _a, out: 2.0 * out),
    "forward replaced": lambda m: triple_forward(part(m).mlp),
    "module replaced": lambda m: setattr(part(m).mlp, "up_proj", nn.Linear(64, 112)),
    "head replaced": lambda m: setattr(m, "lm_head", nn.Linear(64, VOCABULARY)),
    "layer taken out": lambda m: m.base_model.layers.__delitem__(1),
    "parametrized": lambda m: parametrize.register_parametrization(part(m).self_attn.o_proj, "weight", Tripled()),
    "parameter replaced": lambda m: setattr(part(m).mlp.down_proj, "weight", nn.Parameter(torch.randn(64, 112))),
    "data replaced": lambda m: setattr(part(m).mlp.down_proj.weight, "data", torch.randn(64, 112)),
    "bias added": lambda m: setattr(part(m).mlp.down_proj, "bias", nn.Parameter(torch.randn(64))),
    "loaded by assignment": lambda m: m.load_state_dict(
        {name: 1.5 * weight for name, weight in m.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("name", AFTERWARDS)
def test_what_is_put_in_later_is_honoured(name: str) -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    engine, _ = build_engine(model, kv_tokens=400)
    old = logits_after(engine, PATHS)
    seen = fused(engine)
    engine.tree.clear()
    if name == "layer taken out":
        model.config.num_hidden_layers = 1
    torch.manual_seed(2)
    AFTERWARDS[name](model)
    assert not seen.is_current
    new = logits_after(engine, PATHS)
    model.set_attn_implementation("eager")
    expected = [stock_row(model, path) for path in PATHS]
    for row, before, other in zip(new, old, expected, strict=True):
        assert error(row, other) <= TOLERANCE
        assert error(row, before) > 1e-2


def test_hooks_may_go_again_and_the_idle_ones_of_transformers_may_stay() -> None:
    model = tiny_model("llama")
    engine, _ = build_engine(model, kv_tokens=400)
    expected = logits_after(engine, PATHS)
    engine.tree.clear()
    calls: list[int] = []
    hook = part(model).mlp.register_forward_hook(lambda *_: calls.append(1))
    logits_after(engine, PATHS)
    assert len(calls) == 1
    hook.remove()
    engine.tree.clear()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    assert not engine.runner.fused.is_current  # type: ignore[union-attr]
    everywhere.remove()
    model.set_attn_implementation("eager")
    model(input_ids=torch.tensor([PATHS[1]]), output_hidden_states=True)  # leaves hooks behind
    model.set_attn_implementation("rain_tree")
    assert any(module._forward_hooks for module in model.modules())
    fused(engine)
    assert all(map(np.array_equal, logits_after(engine, PATHS), expected))
    second, _ = build_engine(model, kv_tokens=400)
    fused(second)


def test_numbers_changed_in_place_are_seen() -> None:
    model = tiny_model("qwen3")
    engine, _ = build_engine(model, kv_tokens=400)
    logits_after(engine, PATHS)
    engine.tree.clear()
    for parameter in model.parameters():
        parameter.data.mul_(1.3)
    fused(engine)
    new = logits_after(engine, PATHS)
    model.set_attn_implementation("eager")
    assert all(error(row, stock_row(model, path)) <= TOLERANCE for row, path in zip(new, PATHS, strict=True))


def storages(model: nn.Module) -> dict[int, int]:
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}


def test_memory_is_held_once_and_shared_by_decoders() -> None:
    model = tiny_model("llama")
    before = sum(storages(model).values())
    first = Decoder(model, byte_tokenizer(), kv_tokens=100)
    held = storages(model)
    assert sum(held.values()) == before
    second = Decoder(model, byte_tokenizer(), kv_tokens=100)
    assert storages(model) == held
    ours = [fused(d.engine).weights for d in (first, second)]
    for block, other in zip(ours[0].blocks, ours[1].blocks, strict=True):
        for mine, theirs in ((block.qkv, other.qkv), (block.gate_up, other.gate_up), (block.down, other.down)):
            assert mine.weight.data_ptr() == theirs.weight.data_ptr()
            assert mine.weight.untyped_storage().data_ptr() in held


def test_a_model_does_not_keep_what_it_was_fused_for() -> None:
    model = tiny_model("llama")
    engine, _ = build_engine(model, kv_tokens=100)
    kept = weakref.ref(fused(engine))
    del engine
    gc.collect()
    assert kept() is None
    assert not any(module._forward_hooks for module in model.modules())


def test_saved_copied_and_pickled_models_are_what_they_were(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    build_engine(model, kv_tokens=100)
    model.save_pretrained(tmp_path / "saved")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    twin = copy.deepcopy(model)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    for found in (read, torch.load(tmp_path / "weights.pt"), twin.state_dict()):
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    size = sum(weight.nbytes for weight in weights.values())
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size < 1.1 * size
    assert (tmp_path / "weights.pt").stat().st_size < 1.2 * size
    twin.base_model.layers[0].self_attn.q_proj.weight.data.zero_()
    assert torch.equal(
        model.state_dict()["model.layers.0.self_attn.q_proj.weight"], read["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_of_the_caller(made_inside: bool) -> None:
    with torch.inference_mode(made_inside):
        model = tiny_model("llama")
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("eager")
    with torch.inference_mode():
        engine, _ = build_engine(model, kv_tokens=400)
    fused(engine)
    assert {p.is_inference() for p in model.parameters()} == {made_inside}
    assert_equals_stock(engine, stock)
    model.set_attn_implementation("eager")
    assert error(stock_row(model, PATHS[1]), stock_row(stock, PATHS[1])) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    """transformers sets it for the whole process while it loads a model, perhaps in another thread."""
    decoder = Decoder.from_pretrained("testbed", device="cpu")
    rain = RAIN.preset("town")
    asked = {"search": rain, "max_new_tokens": 8, "seed": 3, "progress": False}
    (expected,) = decoder.generate("How do I paint a fence?", **asked)
    decoder.engine.tree.clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        (found,) = Decoder.from_pretrained("testbed", device="cpu").generate("How do I paint a fence?", **asked)
        (again,) = decoder.generate("How do I paint a fence?", **asked)
    finally:
        torch.set_default_dtype(before)
    assert found.token_ids == again.token_ids == expected.token_ids
    assert found.stats.iterations == expected.stats.iterations
