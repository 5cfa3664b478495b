"""CCS and logistic probes: known losses, the optimiser against torch's, restarts, normalisations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from planted import cosines, plant, random_rotation
from torch import Tensor

from raindecode.errors import ConfigError
from raindecode.policy.alignez.ccs import PUBLISHED, Probe, ccs, ccs_loss, train
from raindecode.policy.alignez.logistic import logistic


@pytest.mark.parametrize(("plus", "minus", "loss"), [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.5, 0.5, 0.25), (0.0, 0.0, 1.0),
                                                     (1.0, 1.0, 2.0), (0.4, 0.4, 0.2), (0.9, 0.3, 0.13)])  # fmt: skip
def test_known_losses(plus: float, minus: float, loss: float) -> None:
    assert ccs_loss(torch.full((3,), plus), torch.full((3,), minus)).item() == pytest.approx(loss)


def test_the_loss_is_a_mean_over_pairs() -> None:
    plus, minus = torch.tensor([[1.0, 0.5], [0.0, 0.5]]), torch.tensor([[0.0, 0.5], [0.0, 0.5]])
    assert ccs_loss(plus, minus).tolist() == [0.5, 0.25]


def recomputed(probe: Probe, helpful: Tensor, harmful: Tensor) -> Tensor:
    logits = [torch.einsum("lkd,ld->kl", side, probe.weight) for side in (helpful, harmful)]
    return ccs_loss(torch.sigmoid(logits[0] + probe.bias[:, 0]), torch.sigmoid(logits[1] + probe.bias[:, 1]))


@pytest.mark.parametrize("normalize", ["joint", "per_side", "none"])
def test_weight_and_bias_take_activations_as_given(normalize: Any) -> None:
    helpful, harmful, _ = plant(2, 16, 24)
    probe = ccs(helpful, harmful, restarts=3, epochs=100, normalize=normalize)
    torch.testing.assert_close(recomputed(probe, helpful, harmful), probe.loss, rtol=1e-9, atol=1e-12)
    assert torch.equal(probe.loss, probe.losses.amin(dim=1))
    assert probe.losses.shape == (2, 3)
    torch.testing.assert_close(torch.linalg.vector_norm(probe.direction, dim=1), torch.ones(2, dtype=torch.float64))
    assert cosines(probe.direction, probe.weight).abs().min() > 1 - 1e-12
    same = (probe.bias[:, 0] - probe.bias[:, 1]).abs().max() < 1e-9
    assert bool(same) == (normalize != "per_side")


def test_steps_are_those_of_adamw_on_the_loss() -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(14, 5, generator=generator, dtype=torch.float64)
    features[:, -1] = 1
    start = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.02, weight_decay=0.3)
    for _ in range(40):
        p = torch.sigmoid(features @ parameter)
        optimizer.zero_grad()
        ccs_loss(p[:7], p[7:]).sum().backward()
        optimizer.step()
    found = train(features[None], start.T[None], 40, lr=0.02, weight_decay=0.3, moments="own")
    torch.testing.assert_close(found[0].T, parameter.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("moments", ["own", "shared"])
def test_layers_of_other_rank_are_trained_beside_each_other_as_alone(moments: Any) -> None:
    helpful, harmful, _ = plant(3, 16, 24)
    helpful[1, 5:], harmful[1, 5:] = helpful[1, :1], harmful[1, :1]  # 5 different pairs of 16: rank 10 at most
    settings: dict[str, Any] = {"restarts": 3, "epochs": 200, "moments": moments, "initial": 1.0}
    together = ccs(helpful, harmful, **settings)
    for i in range(3):
        alone = ccs(helpful[i : i + 1], harmful[i : i + 1], **settings)
        torch.testing.assert_close(together.losses[i], alone.losses[0], rtol=1e-4, atol=1e-7)
        assert cosines(together.direction[i : i + 1], alone.direction).item() > 1 - 1e-8


@pytest.mark.parametrize("moments", ["own", "shared"])
def test_float32_ends_where_float64_does(moments: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, 64, 63, generator=generator, dtype=torch.float64)
    features[..., -1] = 1
    start = torch.randn(2, 5, 63, generator=generator, dtype=torch.float64) / 8
    losses = []
    for dtype in (torch.float64, torch.float32):
        found = train(features.to(dtype), start.to(dtype), 1000, lr=1e-3, weight_decay=0.01, moments=moments).double()
        p = torch.sigmoid(features @ found.transpose(1, 2)).transpose(0, 1)
        losses.append(ccs_loss(p[:32], p[32:]))
    assert losses[0].max() < 0.1, "the search got somewhere"
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)


def test_shared_moments_follow_the_gradient_and_not_the_axes() -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(14, 5, generator=generator, dtype=torch.float64)
    start = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    rotation = random_rotation(5)
    for moments, turns in (("shared", True), ("own", False)):
        straight = train(features[None], start.T[None], 30, lr=0.02, weight_decay=0.3, moments=moments)[0]  # type: ignore[arg-type]
        turned = train(
            (features @ rotation)[None], (start.T @ rotation)[None], 30, lr=0.02, weight_decay=0.3, moments=moments  # type: ignore[arg-type]
        )[0]  # fmt: skip
        assert bool((turned @ rotation.T - straight).abs().max() < 1e-9) == turns


def test_shared_moments_and_small_initial_values_find_a_planted_shift_better() -> None:
    helpful, harmful, truth = plant(1, 32, 64, seed=2)
    settings: list[dict[str, Any]] = [{"moments": "own", "initial": 1.0}, {"initial": 1.0}, {}]
    own, shared, default = (float(cosines(ccs(helpful, harmful, **s).direction, truth)) for s in settings)
    assert own < 0.86 < shared < 0.93 < 0.95 < default


def test_restarts_differ_and_the_best_is_kept() -> None:
    helpful, harmful, _ = plant(1, 16, 24, shift=1.0)
    probe = ccs(helpful, harmful, restarts=6, epochs=60)
    assert len(set(probe.losses[0].tolist())) == 6
    one = ccs(helpful, harmful, restarts=1, epochs=60)
    longer = ccs(
        helpful, harmful, restarts=1, epochs=360
    )  # what six tries amount to when one probe is trained on and on
    assert one.losses[0, 0] != probe.losses[0, 1]
    assert longer.loss[0] not in probe.losses[0]
    assert probe.loss[0] == probe.losses[0].min()


def test_the_seed_decides() -> None:
    helpful, harmful, _ = plant(1, 12, 20)
    first, again, other = (ccs(helpful, harmful, restarts=2, epochs=50, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


def test_normalising_per_side_removes_a_constant_shift() -> None:
    helpful, harmful, truth = plant()
    per_side = ccs(helpful, harmful, normalize="per_side", restarts=3)
    published = ccs(helpful, harmful, restarts=3, **PUBLISHED)
    assert cosines(per_side.direction, truth).abs().max() < 0.4
    assert cosines(published.direction, truth).abs().max() < 0.4
    assert cosines(ccs(helpful, harmful, restarts=3).direction, truth).min() > 0.95
    shift = (helpful - harmful).mean(dim=1, keepdim=True)
    moved = ccs(helpful + 6 * shift, harmful, normalize="per_side", restarts=3)
    torch.testing.assert_close(moved.losses, per_side.losses, rtol=1e-6, atol=1e-9)


def test_a_shift_and_nothing_else_leaves_no_contrast_per_side() -> None:
    _, harmful, truth = plant(1, 12, 20)
    helpful = harmful + 3 * truth[:, None]
    probe = ccs(helpful, harmful, normalize="per_side", restarts=2)
    assert probe.direction.abs().max() == 0
    assert probe.loss.item() == pytest.approx(0.2, abs=0.02)  # what a probe reaches that cannot tell the sides apart
    assert cosines(ccs(helpful, harmful, restarts=2).direction, truth).min() > 0.5


def test_orientation_is_the_callers_choice() -> None:
    helpful, harmful, truth = plant(1, 16, 24)
    free = [ccs(helpful, harmful, restarts=1, epochs=300, seed=s, orient=False) for s in range(8)]
    signs = {math.copysign(1, float(cosines(probe.direction, truth))) for probe in free}
    assert signs == {1.0, -1.0}
    for seed, probe in enumerate(free):
        oriented = ccs(helpful, harmful, restarts=1, epochs=300, seed=seed)
        assert cosines(oriented.direction, truth) > 0
        assert torch.equal(oriented.direction.abs(), probe.direction.abs())
        assert torch.equal(oriented.weight, probe.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"restarts": 0}, "restarts is 0"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"lr": 0.0}, "lr is 0.0; allowed: above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"initial": -1.0}, "initial is -1.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"weight_decay": 1e4}, "below 1 / lr"),
        ({"normalize": "both"}, "normalize is 'both'; allowed: joint, per_side, none"),
        ({"moments": "none"}, "allowed: shared, own"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_outside_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    helpful, harmful, _ = plant(1, 4, 8)
    with pytest.raises(ConfigError, match=message):
        ccs(helpful, harmful, **settings)


@pytest.mark.parametrize(("pairs", "width"), [(10, 30), (40, 6)], ids=["wide", "tall"])
@pytest.mark.parametrize("l2", [1.0, 0.1, 1e-4])
def test_logistic_reaches_the_minimum_of_its_objective(pairs: int, width: int, l2: float) -> None:
    helpful, harmful, _ = plant(1, pairs, width, shift=1.0)
    probe = logistic(helpful, harmful, l2=l2)
    rows = torch.cat([helpful[0], harmful[0]])
    center = rows.mean(dim=0)
    scale = torch.linalg.vector_norm(rows - center, dim=1).mean()
    weight = (probe.weight[0] * scale).requires_grad_()
    bias = (probe.bias[0] + center @ probe.weight[0]).detach().requires_grad_()
    logits = (rows - center) / scale @ weight + bias
    labels = torch.tensor([1.0] * pairs + [0.0] * pairs, dtype=torch.float64)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels) + l2 / 2 * weight.square().sum()
    loss.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.grad.abs().max() < 1e-7
    assert bias.grad.abs() < 1e-7
    torch.testing.assert_close(torch.linalg.vector_norm(probe.direction), torch.tensor(1.0, dtype=torch.float64))


def test_a_strong_penalty_gives_the_mean_difference() -> None:
    helpful, harmful, _ = plant(1, 20, 30)
    difference = (helpful - harmful).mean(dim=1)
    assert cosines(logistic(helpful, harmful, l2=1e4).direction, difference).min() > 1 - 1e-6


def test_logistic_needs_a_penalty() -> None:
    helpful, harmful, _ = plant(1, 4, 8)
    for l2 in (0.0, -1.0, float("inf")):
        with pytest.raises(ConfigError, match="l2 is"):
            logistic(helpful, harmful, l2=l2)
