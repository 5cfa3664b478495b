"""The hook baseline of AlignEZ: the formulas, one direction after the other in float64, and the states it reads."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "decoder")]

from fake_lm import random_llama  # noqa: E402
from naive.alignez import Edit, Folded, HookedEdits, Tap, collect, module_at  # noqa: E402
from transformers import DynamicCache  # noqa: E402

CPU = torch.device("cpu")
TAPS: tuple[Tap, ...] = ("attn_out", "mlp_out", "block_out")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal(hidden: Tensor, edit: Edit) -> Tensor:
    """Row by row, direction by direction, by the book."""
    rows, k = len(hidden), len(edit.ops)
    u = edit.directions.expand(rows, k, -1) if edit.directions.dim() == 2 else edit.directions
    alphas, targets = (torch.as_tensor(v, dtype=torch.float64).expand(rows, k) for v in (edit.alphas, edit.targets))
    out = hidden.clone()
    for b in range(rows):
        for t in range(hidden.size(1)):
            for j, op in enumerate(edit.ops):
                unit = u[b, j] / math.sqrt(float(u[b, j] @ u[b, j]))
                c, a = float(out[b, t] @ unit), float(alphas[b, j])
                step = {
                    "project": -a * c,
                    "boost": a * c,
                    "set": a * (float(targets[b, j]) - c),
                    "add": a,
                    "tanh": a * math.tanh(c),
                }[op]
                out[b, t] += step * unit
    return out


def skewed(*shape: int, cosine: float = 0.7) -> Tensor:
    """Directions with about this cosine between any two."""
    return normal(*shape) / math.sqrt(shape[-1]) * math.sqrt(1 - cosine) + normal(shape[-1], seed=1) / math.sqrt(
        shape[-1]
    ) * math.sqrt(cosine)


OPS = ["project", "boost", "set", "add", "tanh"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("own", [False, True])
def test_each_operation(op: str, own: bool) -> None:
    shape = (3, 4, 16) if own else (4, 16)
    alphas = normal(3, 4, seed=2) if own else torch.tensor([1.0, 0.5, 0.0, 2.0])
    edit = Edit(skewed(*shape), [op] * 4, alphas, 0.3)
    hidden = normal(3, 2, 16, seed=3)
    found = Folded(edit, torch.float64, CPU).apply(hidden)
    assert (found - literal(hidden, edit)).abs().max() < 1e-12
    assert (found - hidden).abs().max() > 1e-2


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("ops", [OPS, ["set", "project", "boost", "add"], ["tanh", "project"], ["add", "set"]])
def test_mixed_operations_run_in_turn(ops: list[str], own: bool) -> None:
    edit = Edit(skewed(*((3,) if own else ()), len(ops), 16), ops, 0.9, torch.linspace(-1, 1, len(ops)))
    hidden = normal(3, 2, 16, seed=3)
    found = Folded(edit, torch.float64, CPU).apply(hidden)
    assert (found - literal(hidden, edit)).abs().max() < 1e-12
    turned = Edit(edit.directions.flip(-2), ops[::-1], 0.9, torch.linspace(1, -1, len(ops)))
    assert (found - literal(hidden, turned)).abs().max() > 1e-2  # the order is part of it


def test_orthonormal_tanh_takes_the_short_way() -> None:
    basis = torch.linalg.qr(normal(16, 6))[0].T
    edit = Edit(basis, ["tanh"] * 6, torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, 1.0]))
    folded = Folded(edit, torch.float64, CPU)
    assert folded.joint
    assert not Folded(Edit(skewed(6, 16), ["tanh"] * 6), torch.float64, CPU).joint
    hidden = normal(2, 3, 16, seed=4)
    assert (folded.apply(hidden) - literal(hidden, edit)).abs().max() < 1e-12


def test_alpha_0_leaves_a_row_of_the_batch() -> None:
    alphas = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    hidden = normal(2, 3, 16, seed=4)
    found = Folded(Edit(skewed(2, 16), ["project", "set"], alphas, 1.0), torch.float64, CPU).apply(hidden)
    assert torch.equal(found[1], hidden[1])
    assert (found[0] - hidden[0]).abs().max() > 1e-2


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="1 operations were given for 2 directions"):
        Folded(Edit(normal(2, 4), ["add"]), torch.float64, CPU)
    with pytest.raises(ValueError, match="no operation 'erase'"):
        Folded(Edit(normal(1, 4), ["erase"]), torch.float64, CPU)
    folded = Folded(Edit(normal(2, 1, 4), ["add"]), torch.float64, CPU)
    with pytest.raises(ValueError, match="for a batch of 2, this one has 3"):
        folded.apply(normal(3, 1, 4))


# ---- on a model -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model() -> Any:
    return random_llama().double().train(False)


def ids_of(rows: int, columns: int) -> Tensor:
    return torch.randint(3, 20, (rows, columns), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def states(model: Any, ids: Tensor, layer: int, tap: Tap) -> Tensor:
    """[B, T, d] at a place, hooks attached before seen."""
    seen: list[Tensor] = []
    handle = module_at(model, layer, tap).register_forward_hook(
        lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("tap", TAPS)
def test_the_right_place_is_edited(model: Any, tap: Tap) -> None:
    ids = ids_of(3, 5)
    layer = model.config.num_hidden_layers - 1
    edit = Edit(skewed(3, 2, model.config.hidden_size), ["project", "set"], 0.8, 2.0)
    before = {at: states(model, ids, layer, at) for at in TAPS}
    with HookedEdits(model, {layer: edit}, tap, prompt="all"):
        assert (states(model, ids, layer, tap) - literal(before[tap], edit)).abs().max() < 1e-10
        for earlier in TAPS[: TAPS.index(tap)]:
            assert torch.equal(states(model, ids, layer, earlier), before[earlier])
    assert torch.equal(states(model, ids, layer, tap), before[tap])


@pytest.mark.parametrize("prompt", ["last", "none"])
def test_rows_of_a_prompt(model: Any, prompt: Any) -> None:
    ids = ids_of(2, 5)
    edit = Edit(skewed(1, model.config.hidden_size), ["project"])
    before = states(model, ids, 0, "mlp_out")
    with HookedEdits(model, {0: edit}, prompt=prompt):
        after = states(model, ids, 0, "mlp_out")
    assert torch.equal(after[:, :-1], before[:, :-1])
    expected = literal(before[:, -1:], edit) if prompt == "last" else before[:, -1:]
    assert (after[:, -1:] - expected).abs().max() < 1e-12


@torch.inference_mode()
def test_decoding_with_a_cache_is_one_long_forward(model: Any) -> None:
    ids = ids_of(2, 6)
    edits = {layer: Edit(skewed(2, 2, model.config.hidden_size), ["project", "tanh"]) for layer in range(2)}
    with HookedEdits(model, edits, prompt="all"):
        whole = model(input_ids=ids, use_cache=False).logits
        cache = DynamicCache()
        parts = [model(input_ids=ids[:, :4], past_key_values=cache).logits]
        parts += [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in (4, 5)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-10
    plain = model(input_ids=ids, use_cache=False).logits
    assert (plain - whole).abs().max() > 1e-3


def test_attached_once_and_removed(model: Any) -> None:
    edits = HookedEdits(model, {0: Edit(normal(1, model.config.hidden_size), ["add"])})
    edits.attach()
    with pytest.raises(RuntimeError, match="attached already"):
        edits.attach()
    edits.remove()
    assert not module_at(model, 0, "mlp_out")._forward_hooks
    with edits:
        pass
    assert not module_at(model, 0, "mlp_out")._forward_hooks


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tap", TAPS)
def test_collected_states_are_those_of_texts_alone(model: Any, tap: Tap, side: str) -> None:
    ids, lengths, prompts = ids_of(3, 7), [7, 4, 5], [3, 2, 4]
    rows, mask, pooled = (torch.zeros(3, 7, dtype=torch.long) for _ in range(3))
    for i, (n, p) in enumerate(zip(lengths, prompts, strict=True)):
        first = 7 - n if side == "left" else 0
        rows[i, first : first + n], mask[i, first : first + n], pooled[i, first + p : first + n] = ids[i, :n], 1, 1
    layers = [1, 0]
    last = collect(model, rows, mask, pooled.bool(), layers=layers, tap=tap)
    mean = collect(model, rows, mask, pooled.bool(), layers=layers, tap=tap, pool="mean")
    for at, layer in enumerate(layers):
        for i, (n, p) in enumerate(zip(lengths, prompts, strict=True)):
            alone = states(model, ids[i : i + 1, :n], layer, tap)[0]
            assert (last[at, i] - alone[-1]).abs().max() < 1e-5
            assert (mean[at, i] - alone[p:].mean(0)).abs().max() < 1e-5
