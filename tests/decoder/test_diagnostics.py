"""Diagnostics of activations: each number against its definition, held-out pairs really held out, the figure."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from planted import Planted, plant

from raindecode.errors import ConfigError, FitError
from raindecode.policy.alignez import diagnostics
from raindecode.policy.alignez.ccs import ccs
from raindecode.policy.alignez.diagnostics import (
    COLUMNS,
    METHODS,
    Diagnostics,
    choose_layers,
    diagnose,
    held_out_accuracy,
)
from raindecode.policy.alignez.figure import save_diagnostics

QUICK = {"restarts": 2, "epochs": 150}


def mixed(seed: int = 0) -> Planted:
    """Layer 0 holds a strong contrast, layer 1 nothing but noise, layer 2 no difference at all."""
    strong, noise = plant(3, 24, 16, seed=seed), plant(3, 24, 16, shift=0.0, noise=1.0, seed=seed + 1)
    helpful = torch.stack([strong.helpful[0], noise.helpful[1], strong.harmful[2]])
    harmful = torch.stack([strong.harmful[0], noise.harmful[1], strong.harmful[2]])
    return Planted(helpful, harmful, strong.truth)


@pytest.fixture(scope="module")
def found() -> Diagnostics:
    one, other = mixed(), plant(3, 24, 32, seed=7)
    pairs = {"mlp_out": (one.helpful, one.harmful), "block_out": (other.helpful.float(), other.harmful.float())}
    return diagnose(pairs, [4, 8, 12], folds=4, top=3, **QUICK)


def test_each_number_is_what_it_says(found: Diagnostics) -> None:
    helpful, harmful, _ = mixed()
    assert [(one.tap, one.layer) for one in found.layers[:4]] == [
        ("mlp_out", 4), ("mlp_out", 8), ("mlp_out", 12), ("block_out", 4)]  # fmt: skip
    losses = ccs(helpful, harmful, **QUICK).loss  # type: ignore[arg-type]
    for i, one in enumerate(found.at("mlp_out")):
        for values, rows in (
            (one.sigma_diff, helpful[i] - harmful[i]),
            (one.sigma_helpful, helpful[i]),
            (one.sigma_harmful, harmful[i]),
        ):
            assert list(values) == pytest.approx(torch.linalg.svdvals(rows)[:3].tolist(), rel=1e-9, abs=1e-9)
        tops = [torch.linalg.svd(side[i], full_matrices=False).Vh[0] for side in (helpful, harmful)]
        assert abs(one.cosine) == pytest.approx(abs(float(tops[0] @ tops[1])), abs=1e-9)
        assert one.cosine > 0.85  # both sides' first direction is their common mean
        assert one.ccs_loss == pytest.approx(float(losses[i]))
    assert 2 * found.at("mlp_out")[0].ccs_loss < found.at("mlp_out")[1].ccs_loss < found.at("mlp_out")[2].ccs_loss


def test_accuracy_tells_contrast_from_noise_and_nothing(found: Diagnostics) -> None:
    strong, noise, nothing = found.at("mlp_out")
    assert strong.accuracy == dict.fromkeys(METHODS, 1.0)
    assert all(0.1 <= noise.accuracy[method] <= 0.9 for method in METHODS)
    assert nothing.accuracy == dict.fromkeys(METHODS, 0.5)


def test_held_out_pairs_are_held_out() -> None:
    """Pairs each with a difference of its own: what is fitted to some says nothing about the others, yet separates itself."""
    width = 600
    harmful = torch.zeros(1, 60, width, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    helpful = torch.randn(1, 60, width, generator=generator, dtype=torch.float64)
    inside = (helpful - harmful)[0] @ (helpful - harmful)[0].mean(dim=0)
    assert (inside > 0).double().mean() > 0.95
    accuracy = held_out_accuracy(helpful, harmful, folds=5, **QUICK)  # type: ignore[arg-type]
    assert all(0.25 <= float(accuracy[method]) <= 0.75 for method in METHODS)


def test_folds_are_fitted_to_the_others_and_cover_every_pair_once(monkeypatch: pytest.MonkeyPatch) -> None:
    helpful, harmful, _ = plant(1, 11, 8)
    seen = []

    def fit(plus: torch.Tensor, minus: torch.Tensor, **_: int) -> dict[str, torch.Tensor]:
        assert torch.equal(minus, harmful[:, [i for i in range(11) if (helpful[0, i] == plus[0]).all(dim=1).any()]])
        seen.append({i for i in range(11) if (helpful[0, i] == plus[0]).all(dim=1).any()})
        return dict.fromkeys(METHODS, (helpful - harmful)[:, 0] * (1 if len(seen) == 1 else -1))

    monkeypatch.setattr(diagnostics, "_fit", fit)
    accuracy = held_out_accuracy(helpful, harmful, folds=3)
    left = [set(range(11)) - inside for inside in seen]
    assert left == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10}]
    assert accuracy["ccs"].tolist() == [
        pytest.approx(4 / 11)
    ]  # the first fold's four are right, the others turned around


def test_folds_there_are_too_few_pairs_for() -> None:
    helpful, harmful, _ = plant(1, 4, 8)
    with pytest.raises(FitError, match="4 pairs cannot be divided into 5 folds"):
        held_out_accuracy(helpful, harmful, folds=5)
    with pytest.raises(FitError, match="leave one pair to fit"):
        held_out_accuracy(helpful[:, :3], harmful[:, :3], folds=2)
    with pytest.raises(ConfigError, match="folds is 1"):
        held_out_accuracy(helpful, harmful, folds=1)


def test_a_fold_whose_others_do_not_differ_is_a_tie() -> None:
    helpful, harmful, _ = plant(1, 6, 8)
    helpful[:, 1:] = harmful[:, 1:]
    accuracy = held_out_accuracy(helpful, harmful, folds=6, **QUICK)  # type: ignore[arg-type]
    assert accuracy["mean_difference"].tolist() == [0.5]


def test_one_number_per_layer() -> None:
    helpful, harmful, _ = plant(2, 8, 8)
    with pytest.raises(FitError, match="'mlp_out' have 2 layers and 3 layer numbers"):
        diagnose({"mlp_out": (helpful, harmful)}, [0, 1, 2])
    with pytest.raises(FitError, match=r"different numbers of pairs, \{'mlp_out': 8, 'block_out': 7\}"):
        diagnose({"mlp_out": (helpful, harmful), "block_out": (helpful[:, 1:], harmful[:, 1:])}, [0, 1])
    with pytest.raises(ConfigError, match="one tap or more"):
        diagnose({}, [0])
    with pytest.raises(ConfigError, match="top is 0"):
        diagnose({"mlp_out": (helpful, harmful)}, [0, 1], top=0)


def test_table_and_json(found: Diagnostics) -> None:
    rows = found.rows()
    assert len(rows) == 6
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert rows[0][:2] == ("mlp_out", "4")
    assert rows[0][-3:] == ("100.0%", "100.0%", "100.0%")
    data = json.loads(json.dumps(found.to_json()))
    assert (data["pairs"], data["folds"]) == (24, 4)
    assert data["layers"][2]["accuracy"] == dict.fromkeys(METHODS, 0.5)
    assert data["layers"][3]["sigma_diff"] == list(found.layers[3].sigma_diff)


def test_layers_of_the_lowest_loss() -> None:
    assert choose_layers([0.3, 0.1, 0.2, 0.1], 1) == (1,)
    assert choose_layers([0.3, 0.1, 0.2, 0.1], 2) == (1, 3)
    assert choose_layers(torch.tensor([0.1, 0.3, 0.05, 0.2]), 3) == (0, 2, 3)
    with pytest.raises(ConfigError, match="5 layers are to be chosen from 4"):
        choose_layers([0.3, 0.1, 0.2, 0.1], 5)
    with pytest.raises(ConfigError, match="count is 0"):
        choose_layers([0.3], 0)
    with pytest.raises(ConfigError, match="CCS losses"):
        choose_layers([0.3, float("nan")], 1)


def test_the_figure(found: Diagnostics, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "layers.png"
    save_diagnostics(path, found)
    drawn = path.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert struct.unpack(">II", drawn[16:24]) == (2400, 992)  # two taps, one below the other


def test_a_figure_that_cannot_be_drawn(found: Diagnostics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.png, \.svg, \.pdf"):
        save_diagnostics(tmp_path / "layers.jpg", found)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'rainkernels\[bench\]'"):
        save_diagnostics(tmp_path / "layers.png", found)
    assert not list(tmp_path.iterdir())
