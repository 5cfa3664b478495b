"""Steering of a model made like vLLM's, without vLLM: which rows, which places, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raindecode import AlignEZ, Positions
from raindecode.errors import ConfigError, EditFileError, UnsupportedModelError
from raindecode.hidden_edits import ModelIdentity
from raindecode.integrations.vllm_steering import (
    Steering,
    cache_salt,
    edited_rows,
    load_edits,
    register_steering,
    steer,
)
from rainkernels.ops.edits_tables import EditTable
from rainkernels.reference import edits as reference

HIDDEN, LAYERS = 8, 3


class Part(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(seed)) / 3)

    def forward(self, states: Tensor) -> Tensor:
        return states @ self.weight


class Layer(nn.Module):
    """Returns what is still to be added, and the stream before it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Part(seed), Part(seed + 100)

    def forward(self, states: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        stream = states if stream is None else stream + states
        stream = stream + self.self_attn(stream)
        return self.mlp(stream), stream


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i) for i in range(LAYERS))

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        states, stream = torch.stack([input_ids.float() + i for i in range(HIDDEN)], dim=1), None
        for layer in self.layers:
            states, stream = layer(states, stream)
        assert stream is not None
        return states + stream


def runner(**changes: Any) -> Any:
    """One of vLLM's first model runners, with the attributes that steering reads."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=True), compilation_config=SimpleNamespace(mode=0),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1), cache_config=SimpleNamespace(enable_prefix_caching=False),
        kv_transfer_config=None,
    )  # fmt: skip
    for path, value in changes.items():
        part, _, name = path.partition("__")
        setattr(getattr(config, part) if name else config, name or part, value)
    text = SimpleNamespace(hidden_size=HIDDEN, num_hidden_layers=LAYERS, model_type="llama")
    model = Model()
    return SimpleNamespace(
        vllm_config=config, model_config=SimpleNamespace(hf_text_config=text, dtype=torch.float32), get_model=lambda: model,
        input_batch=SimpleNamespace(num_reqs=0, num_prompt_tokens=np.zeros(8, dtype=np.int32)),
        query_start_loc=SimpleNamespace(np=np.zeros(9, dtype=np.int32)),
    )  # fmt: skip


def edit(positions: str = "all", layer: int = 1, tap: str = "mlp_out", size: float = 2.0, **changes: Any) -> AlignEZ:
    directions = {layer: torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(layer))}
    return AlignEZ.from_directions(
        directions, op=["add", "project"], alpha=[size, 0.7], tap=tap, positions=Positions.parse(positions), **changes
    )


def by_hand(model: Model, ids: Tensor, edits: list[tuple[AlignEZ, list[bool]]]) -> Tensor:
    """The model written out, with edits at the rows given."""

    def edited(states: Tensor, layer: int, tap: str) -> Tensor:
        for one, rows in edits:
            for site, stage in one.resolve():
                if (site.layer, site.tap) == (layer, tap):
                    table = EditTable.create(2, len(stage.ops), HIDDEN)
                    table.set_slot(
                        1, stage.directions, op=stage.ops, alpha=stage.alphas, target=stage.targets, norm=stage.norm
                    )
                    slots = torch.tensor(rows).to(torch.int32)
                    states = reference.edit(states, slots, **table.reference_arguments())
        return states

    stream = torch.stack([ids.float() + i for i in range(HIDDEN)], dim=1)
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        stream = stream + edited(stream @ layer.self_attn.weight, i, "attn_out")
        stream = edited(stream + edited(stream @ layer.mlp.weight, i, "mlp_out"), i, "block_out")
    return stream


@torch.no_grad()
@pytest.mark.parametrize("tap", ["attn_out", "mlp_out", "block_out"])
def test_edits_are_made_at_their_places_and_taken_away_again(tap: str) -> None:
    one = runner()
    model, ids = one.get_model(), torch.arange(5)
    plain = model(ids, ids)
    edits = [edit(tap=tap), edit(tap=tap, layer=1, size=-1.0), edit(tap=tap, layer=2)]
    assert steer(one, edits) == cache_salt(edits)
    torch.testing.assert_close(
        model(ids, ids), by_hand(model, ids, [(e, [True] * 5) for e in edits]), rtol=1e-5, atol=1e-4
    )
    assert not torch.allclose(model(ids, ids), plain)
    steer(one, edits[2:])
    torch.testing.assert_close(model(ids, ids), by_hand(model, ids, [(edits[2], [True] * 5)]), rtol=1e-5, atol=1e-4)
    assert steer(one, []) == ""
    assert torch.equal(model(ids, ids), plain)


@torch.no_grad()
def test_rows_of_several_requests_in_one_forward() -> None:
    """Three requests: the end of a prompt of 4, a whole prompt of 2, and the second token written behind a prompt of 3."""
    one = runner()
    model = one.get_model()
    steer(one, [edit("last:0-1"), edit("all")])
    one.input_batch.num_reqs = 3
    one.input_batch.num_prompt_tokens[:3] = [4, 2, 3]
    one.query_start_loc.np[:4] = [0, 2, 4, 5]
    positions, ids = torch.tensor([2, 3, 0, 1, 4, 0]), torch.arange(6)  # the last row is padding
    first = [False, True, False, True, False, False]
    expected = by_hand(model, ids, [(edit("last:0-1"), first), (edit("all"), [True] * 6)])
    torch.testing.assert_close(model(input_ids=ids, positions=positions), expected, rtol=1e-5, atol=1e-4)
    one.input_batch.num_reqs = 0  # as vLLM warms up: only what is everywhere is edited
    expected = by_hand(model, ids, [(edit("all"), [True] * 6)])
    torch.testing.assert_close(model(input_ids=ids, positions=positions), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("text", ["all", "last", "none", "all:0-0", "last:1-3", "none:2-", "none:0-2", "last:0-1"])
@pytest.mark.parametrize("length", [1, 4])
def test_edited_rows_are_those_of_the_positions(text: str, length: int) -> None:
    positions, place = Positions.parse(text), np.arange(10)
    expected = np.zeros(10, dtype=bool)
    for begin, end in positions.spans(length):
        expected[begin:end] = True
    assert edited_rows(positions, place, np.full(10, length)).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"model_config__enforce_eager": False}, edit(), "--enforce-eager"),
        ({"compilation_config__mode": 3}, edit(), "--enforce-eager"),
        ({"parallel_config__pipeline_parallel_size": 2}, edit(), "spread over 2 stages"),
        ({"cache_config__enable_prefix_caching": True}, edit("last"), "--no-enable-prefix-caching"),
        ({}, edit(layer=3), "layers 0 to 2"),
        ({}, AlignEZ.from_directions({0: torch.ones(4)}, op="add"), "hidden size of 4, the model has 8"),
        ({}, edit(model=ModelIdentity("qwen3", LAYERS, HIDDEN, "x")), "fitted on qwen3 with 3 layers"),
    ],
)
def test_what_is_refused_leaves_things_as_they_are(changes: dict[str, Any], given: AlignEZ, message: str) -> None:
    one = runner(**changes)
    model, ids = one.get_model(), torch.arange(3)
    plain = model(ids, ids)
    with pytest.raises(ConfigError, match=message):
        steer(one, [given])
    assert torch.equal(model(ids, ids), plain)
    assert steer(one, [given.scaled(0.0)]) == ""  # an edit of strength 0 does nothing anywhere


def test_an_edit_that_the_prompt_decides_is_refused() -> None:
    chosen = dataclasses.replace(edit(), select="cosine", threshold=0.5)
    with pytest.raises(ConfigError, match="select 'cosine' is decided by the prompt"):
        steer(runner(), [chosen])


def test_the_second_runner_is_refused() -> None:
    kind = type("GPUModelRunner", (), {"__module__": "vllm.v1.worker.gpu.model_runner"})
    one = kind()
    vars(one).update(vars(runner()))
    with pytest.raises(ConfigError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        steer(one, [edit()])


def test_a_layer_of_another_kind_is_refused() -> None:
    one = runner()
    one.get_model().layers[1].forward = lambda states, stream: (states, states, states)
    steer(one, [edit(tap="block_out")])
    with pytest.raises(UnsupportedModelError, match="edit mlp_out"):
        one.get_model()(torch.arange(2), torch.arange(2))
    del one.get_model().layers[1].mlp
    with pytest.raises(UnsupportedModelError, match=r"no mlp_out.*use block_out"):
        steer(one, [edit()])


# ---- files, salts, workers --------------------------------------------------------------------------------------------
def saved(folder: Path, name: str = "one", **options: Any) -> str:
    edit(**options).save(path := folder / f"{name}.safetensors")
    return str(path)


def test_a_salt_names_a_configuration(tmp_path: Path) -> None:
    one, other = saved(tmp_path), saved(tmp_path, "other", size=3.0)
    kinds = [[one], [f"{one}:0.5"], [other], [one, other], [other, one], [saved(tmp_path, "last", positions="last")]]
    assert len({cache_salt(edits) for edits in kinds}) == len(kinds)
    assert all(cache_salt(edits).startswith("raindecode-") for edits in kinds)
    assert cache_salt([one]) == cache_salt([AlignEZ.load(one)]) == cache_salt([one, f"{other}:0"])
    assert cache_salt([]) == cache_salt([f"{one}:0"]) == ""


def test_names_of_files_and_strengths(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert [one.strength for one in load_edits([path, f"{path}:0.5", f"{path}:-2"])] == [1.0, 0.5, -2.0]
    with pytest.raises(EditFileError, match="nowhere"):
        load_edits(["nowhere.safetensors:1"])
    with pytest.raises(ConfigError, match="give a list of FILE"):
        load_edits(path)


def test_a_worker_steers_by_remote_call(tmp_path: Path) -> None:
    worker = Steering()
    worker.model_runner = runner()
    path = saved(tmp_path)
    assert worker.raindecode_steer([path]) == cache_salt([path])
    assert worker.raindecode_steer([]) == ""


@torch.no_grad()
def test_workers_steer_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class WorkerWrapperBase:
        """Passes calls on to its worker, as vLLM's does."""

        def __init__(self, given: Any) -> None:
            self.worker = SimpleNamespace(load_model=lambda: "loaded", model_runner=given)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.worker, name)

    module = ModuleType("vllm.v1.worker.worker_base")
    module.WorkerWrapperBase = WorkerWrapperBase  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.v1", "vllm.v1.worker"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    monkeypatch.delenv("RAINDECODE_VLLM_EDITS", raising=False)
    register_steering()
    assert "load_model" not in vars(WorkerWrapperBase)
    path = saved(tmp_path)
    monkeypatch.setenv("RAINDECODE_VLLM_EDITS", f"{path}:0.5, ")
    register_steering()
    register_steering()
    one = runner()
    assert WorkerWrapperBase(one).load_model() == "loaded"
    ids = torch.arange(3)
    expected = by_hand(one.get_model(), ids, [(edit().scaled(0.5), [True] * 3)])
    torch.testing.assert_close(one.get_model()(ids, ids), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ConfigError, match="--kv-transfer-config"):
        WorkerWrapperBase(runner(kv_transfer_config=object())).load_model()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_the_plug_in_imports_vllm_and_nothing_else_of_ours_does() -> None:
    with pytest.raises(ModuleNotFoundError, match="vllm"):
        importlib.import_module("raindecode.integrations.vllm")
