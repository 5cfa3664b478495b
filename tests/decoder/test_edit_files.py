"""Edits on disk: what is written is what is read, what is damaged or foreign is refused, what is linear is baked."""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edit_oracle import unit
from models import logits_after, stock_copy, tiny_decoder
from test_edits_engine import EVERYWHERE, PROMPTS, answers, edit_of, told
from transformers import AutoModelForCausalLM

from raindecode import Decoder, Policy
from raindecode.errors import ConfigError, EditFileError, UnsupportedModelError
from raindecode.hidden_edits import Site, Stage
from raindecode.policy.alignez.edits import AlignEZ, Examples, Positions


@pytest.fixture
def decoder() -> Decoder:
    return tiny_decoder("llama")


def knn(decoder: Decoder) -> AlignEZ:
    made = torch.Generator().manual_seed(3)
    examples = Examples(*(torch.randn(5, 64, generator=made) for _ in range(3)))
    recipe: Any = (("harmful", "project", 1.0), ("helpful", "boost", 0.5))
    return AlignEZ(select="knn", neighbours=2, examples={Site(1, "mlp_out"): examples}, recipe=recipe)


# ---- round trip ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["plain", "norm", "cosine", "knn"])
def test_what_is_saved_is_loaded(decoder: Decoder, tmp_path: Path, kind: str) -> None:
    edit = {
        "plain": lambda: edit_of(decoder, k=3, positions=Positions("last", first=1, end=9)),
        "norm": lambda: edit_of(decoder, norm="preserve"),
        "cosine": lambda: AlignEZ(stages=edit_of(decoder, ["mlp_out"]).stages, select="cosine", threshold=0.1),
        "knn": lambda: knn(decoder),
    }[kind]()
    edit = replace(edit, model=decoder.identities[0], origin={"fitter": "test"})
    path = tmp_path / "edit.safetensors"
    edit.save(path)
    loaded = AlignEZ.load(path)
    assert loaded.name == edit.name
    assert (loaded.positions, loaded.model, loaded.origin) == (edit.positions, edit.model, edit.origin)
    assert told(answers(decoder, Policy(edits=loaded))) == told(answers(decoder, Policy(edits=edit)))
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first  # the same edit is the same file


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    stage = Stage(torch.eye(4)[:2], ("add", "set"), (np.float32(0.5), 1), (np.float64(0.25), 0))  # type: ignore[arg-type]
    AlignEZ(stages=((Site(0, "mlp_out"), stage),)).save(tmp_path / "edit.safetensors")
    ((_, loaded),) = AlignEZ.load(tmp_path / "edit.safetensors").stages
    assert (loaded.alphas, loaded.targets) == ((0.5, 1.0), (0.25, 0.0))


def test_strength_and_halves_are_the_users(decoder: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    edit_of(decoder).scaled(3.0).save(path)
    loaded = AlignEZ.load(path, strength=0.5, on="both", judge=True, force=True)
    assert (loaded.strength, loaded.on, loaded.judge, loaded.force) == (0.5, "both", True, True)
    with pytest.raises(ConfigError, match="allowed: 'reference'"):
        AlignEZ.load(path, on="harmful")  # type: ignore[arg-type]


def test_names_tell_edits_apart(decoder: Decoder) -> None:
    edit = edit_of(decoder)
    (site, stage), *rest = edit.stages
    nudged = stage.directions.clone()
    nudged[0, 0] = torch.nextafter(nudged[0, 0], torch.tensor(2.0))
    others = [
        replace(edit, stages=((site, replace(stage, directions=nudged)), *rest)),
        replace(edit, stages=((site, replace(stage, alphas=(1.0, 1.0))), *rest)),
        replace(edit, stages=((Site(1, "attn_out"), stage), *rest)),
        replace(edit, stages=(*rest, (site, stage))),
        replace(edit, select="cosine"),
    ]  # fmt: skip
    assert len({one.name for one in (edit, *others)}) == 6
    assert replace(edit, strength=0.5).name == edit.name  # strength enters the key of K/V with what it is applied to


# ---- damage -------------------------------------------------------------------------------------------------------------
def test_damaged_and_foreign_files_are_refused(decoder: Decoder, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    edit_of(decoder).save(good)
    whole = good.read_bytes()
    bad = {
        "missing": None, "empty": b"", "truncated": whole[:-5], "header cut": whole[:40],
        "huge header": struct.pack("<Q", 1 << 60) + whole[8:],
        "pickle": pickle.dumps({"a": 1}), "text": b"{}", "grown": whole + b"x",
    }  # fmt: skip
    for name, content in bad.items():
        path = tmp_path / f"{name}.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(EditFileError):
            AlignEZ.load(path)
    with pytest.raises(EditFileError):
        AlignEZ.load(tmp_path)


def test_every_lie_in_the_metadata_is_a_typed_error(decoder: Decoder, tmp_path: Path) -> None:
    from raindecode.policy.alignez.container import load_tensors, save_tensors

    path = tmp_path / "edit.safetensors"
    replace(edit_of(decoder), model=decoder.identities[0]).save(path)
    tensors, metadata = load_tensors(path)
    spec = json.loads(metadata["edit"])
    lies: list[Any] = [
        {"stages": "no list"}, {"stages": [{}]}, {"stages": spec["stages"] * 2}, {"select": "best"}, {"select": "knn"}, {"threshold": None},
        {"positions": {"prompt": "some"}}, {"positions": {"else": 1}}, {"recipe": [["helpful"]]},
        {"examples": [{"layer": 0, "tap": "mlp_out"}]},
        {"stages": [spec["stages"][0] | {"ops": ["erase", "erase"]}, *spec["stages"][1:]]},
        {"stages": [spec["stages"][0] | {"alphas": [float("nan"), 1.0]}, *spec["stages"][1:]]},
        {"stages": [spec["stages"][0] | {"layer": -1}, *spec["stages"][1:]]},
        {"stages": [spec["stages"][0] | {"tap": "q_proj"}, *spec["stages"][1:]]},
        {"stages": [spec["stages"][0] | {"norm": []}, *spec["stages"][1:]]},
        {"stages": [spec["stages"][0] | {"alphas": [10**400, 1.0]}, *spec["stages"][1:]]},
        {"stages": [spec["stages"][0] | {"alphas": "11"}, *spec["stages"][1:]]},
        {"threshold": 10**400}, {"recipe": [["helpful", "boost", 10**400]]},
    ]  # fmt: skip
    for lie in lies:
        save_tensors(path, tensors, metadata | {"edit": json.dumps(spec | lie)})
        with pytest.raises(EditFileError):
            AlignEZ.load(path)
    for change in (
        {"format": "lora"},
        {"version": "9"},
        {"edit": "{"},
        {"model": "[]"},
        {"model": '{"architecture": 1}'},
        {"origin": "3"},
    ):
        save_tensors(path, tensors, metadata | change)
        with pytest.raises(EditFileError):
            AlignEZ.load(path)
    for name in list(tensors)[:1]:
        save_tensors(path, tensors | {name: tensors[name].to(torch.int32)}, metadata)
        with pytest.raises(EditFileError):
            AlignEZ.load(path)
    save_tensors(path, tensors | {"more": torch.ones(2)}, metadata)
    with pytest.raises(EditFileError, match="does not name"):
        AlignEZ.load(path)


# ---- control vectors ------------------------------------------------------------------------------------------------------
def test_control_vectors_go_both_ways(decoder: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "vector.gguf"
    edit = AlignEZ.from_directions(
        {1: unit(2, 64, 1)},
        op="add",
        alpha=2.0,
        tap="block_out",
        positions=EVERYWHERE,
        model=decoder.identities[0],
    )
    edit.scaled(0.5).save(path)
    loaded = AlignEZ.load(path)
    assert loaded.origin["model_hint"] == "llama"
    ours, theirs = (logprobs(decoder, one) for one in (edit.scaled(0.5), loaded))
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)
    with pytest.raises(EditFileError, match="none for block 0"):
        AlignEZ.from_directions({0: unit(1, 64, 1)}, op="add", tap="block_out", positions=EVERYWHERE).save(path)
    for wrong in (edit_of(decoder), replace(edit, positions=Positions("last")), replace(edit, select="cosine")):
        with pytest.raises(ConfigError, match="control vector"):
            wrong.save(tmp_path / "wrong.gguf")
    assert not (tmp_path / "wrong.gguf").exists()


def logprobs(decoder: Decoder, edit: AlignEZ) -> list[float]:
    return [p.logprob for done in answers(decoder, Policy(edits=edit)) for p in done.logprobs or ()]


# ---- baking ---------------------------------------------------------------------------------------------------------------
def linear_edit(decoder: Decoder, ops: Any = ("project", "boost")) -> AlignEZ:
    taps: Any = ("attn_out", "mlp_out")
    stages = tuple(
        (Site(layer, tap), Stage(unit(2, 64, 7 * layer + i), ops, (1.0, 0.5), (0.3, 0.4)))
        for layer in (0, 1)
        for i, tap in enumerate(taps)
    )
    return AlignEZ(stages=stages, positions=EVERYWHERE, strength=0.8)


@pytest.mark.parametrize(
    ("family", "ops"), [("llama", ("project", "boost")), ("gpt2", ("set", "add")), ("gpt_neox", ("boost", "set"))]
)
def test_a_baked_model_is_the_edited_one(tmp_path: Path, family: str, ops: Any) -> None:
    decoder = tiny_decoder(family)
    edit = linear_edit(decoder, ops)
    before = {name: tensor.clone() for name, tensor in decoder.engine.runner.model.state_dict().items()}
    edit.bake(decoder, tmp_path / "baked")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    ids = decoder.codec.encode(PROMPTS[0])
    with torch.no_grad():
        expected = torch.log_softmax(stock_copy(baked)(torch.tensor([ids])).logits[0, -1], -1)
    (done,) = answers(decoder, Policy(edits=edit), PROMPTS[:1], max_new_tokens=1)
    assert done.logprobs is not None
    assert int(expected.argmax()) == done.token_ids[0]
    assert abs(float(expected.max()) - done.logprobs[0].logprob) < 1e-5
    after = decoder.engine.runner.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not np.allclose(logits_after(decoder.engine, [ids])[0], expected.numpy(), atol=1e-3)


def test_what_cannot_be_baked_is_refused(decoder: Decoder, tmp_path: Path) -> None:
    edit = linear_edit(decoder)
    bent = AlignEZ.from_directions({0: torch.ones(64)}, op="tanh", positions=EVERYWHERE)
    wrong: list[tuple[AlignEZ, str]] = [
        (bent, "not linear"), (edit_of(decoder, ["mlp_out"], norm="cap"), "not linear"), (knn(decoder), "selects by knn"),
        (AlignEZ.from_directions({0: torch.ones(64)}, op="project", tap="block_out", positions=EVERYWHERE), "block_out"),
        (replace(edit, positions=Positions("last")), "some positions only"), (replace(edit, on="both"), "on='reference'"),
        (linear_edit(decoder, ("set", "project")), "adds a constant"),
        (AlignEZ.from_directions({0: torch.ones(32)}, op="project", positions=EVERYWHERE), "hidden size"),
    ]  # fmt: skip
    for one, message in wrong:
        with pytest.raises(ConfigError, match=message):
            one.bake(decoder, tmp_path / "baked")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UnsupportedModelError, match="one plain product"):
        edit.bake(tiny_decoder("mixtral"), tmp_path / "baked")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("here")
    with pytest.raises(EditFileError, match="there already"):
        edit.bake(decoder, tmp_path / "full")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
