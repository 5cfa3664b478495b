"""Hidden states collected by the engine, against a float64 forward of transformers with hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from edit_oracle import module_of
from models import READABLE, stock_copy, tiny_decoder, tiny_model
from static_steps import in_operations
from torch import Tensor

from raindecode import DeRa, Policy
from raindecode.errors import ConfigError, PromptError
from raindecode.hidden_edits import TAPS, Site

PROMPTS = ["the inner", "on a", "a"]


@pytest.mark.parametrize("lane", ["native", "operations", "modules"])
@pytest.mark.parametrize("max_rows", [3, 1024])
def test_activations_equal_a_float64_forward(lane: str, max_rows: int) -> None:
    """Of any tap, last or mean, whatever is cached and however the step is cut."""
    model, decoder = tiny_model("llama", vocab_size=READABLE), tiny_decoder("llama")
    decoder.engine.max_rows = max_rows
    if lane == "operations":
        in_operations(decoder.engine)
    elif lane == "modules":
        decoder.engine.runner.fused = None
    passages = [("the inner", " on a"), ("the inner", " on it"), ("the inner", ""), ("a", "a")]
    twin = copy.deepcopy(stock_copy(model)).double()
    for tap in TAPS:
        seen: dict[int, Tensor] = {}
        hooks = [module_of(twin, Site(layer, tap)).register_forward_hook(keep(seen, layer)) for layer in (0, 1)]
        for pool in ("last", "mean"):
            got = decoder.activations(passages, tap=tap, pool=pool)  # type: ignore[arg-type]
            for i, (prompt, answer) in enumerate(passages):
                ids, head = decoder.codec.encode(prompt + answer), decoder.codec.encode(prompt)
                with torch.no_grad():
                    twin(torch.tensor([ids]), use_cache=False)
                first = len(ids) - 1 if pool == "last" else len(head) if answer else 0
                expected = torch.stack([seen[layer][first:].mean(0) for layer in (0, 1)])
                torch.testing.assert_close(got[:, i].double(), expected, rtol=1e-5, atol=1e-5)
        for hook in hooks:
            hook.remove()


def keep(seen: dict[int, Tensor], layer: int) -> Any:
    def hook(_module: Any, _args: Any, output: Any) -> None:
        seen[layer] = (output[0] if isinstance(output, tuple) else output)[0]

    return hook


def test_activations_are_those_of_company_or_alone() -> None:
    decoder = tiny_decoder("llama")
    passages = [(prompt, " and more" * n) for prompt in PROMPTS for n in range(3)]
    together = decoder.activations(passages, pool="mean")
    decoder.engine.tree.clear()
    alone = torch.cat([decoder.activations([passage], pool="mean") for passage in passages], dim=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tap": "q_proj"}, "tap is 'q_proj'; allowed"), ({"layers": [2]}, r"layers are \[2\]; allowed"), ({"layers": []}, "one or more"),
        ({"pool": "max"}, "pool is 'max'; allowed"), ({"model": 1}, "model is 1; allowed: 0 to 0"),
        ({"passages": ["a"]}, "a pair of texts"), ({"passages": "a"}, "a list of pairs"), ({"passages": None}, "a list of pairs"),
        ({"layers": 1}, "layers is 1; allowed"), ({"policy": "a"}, "policy of activations is a str"),
        ({"passages": [("a" * 3000, "")]}, "the context has"), ({"policy": Policy(dera=DeRa(0.0))}, "give its prompt only"),
    ],
)  # fmt: skip
def test_bad_activations_are_refused(arguments: dict[str, Any], message: str) -> None:
    decoder = tiny_decoder("llama")
    with pytest.raises((ConfigError, PromptError), match=message):
        decoder.activations(**({"passages": [("a", "b")]} | arguments))
    assert decoder.engine.model_steps == 0 or decoder.engine.num_running == 0
