"""Directions by linear algebra: a planted contrast is found, signs are canonical, and bad activations are refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from planted import cosines, plant, random_rotation
from torch import Tensor

from raindecode.errors import ConfigError, FitError
from raindecode.policy.alignez.ccs import ccs
from raindecode.policy.alignez.directions import cosine_filter, mean_difference, nearest, svd_diff, svd_group
from raindecode.policy.alignez.logistic import logistic
from raindecode.policy.alignez.matrices import canonical_signs, thin_svd


def first(helpful: Tensor, harmful: Tensor) -> Tensor:
    """[L, d]: the strongest direction of svd_diff in every layer."""
    return torch.stack([vectors[0] for vectors in svd_diff(helpful, harmful).vectors])


def quick_ccs(helpful: Tensor, harmful: Tensor) -> Tensor:
    return ccs(helpful, harmful, restarts=2, epochs=200).direction


FITTERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "svd_diff": first,
    "mean_difference": mean_difference,
    "logistic": lambda helpful, harmful: logistic(helpful, harmful).direction,
    "ccs": quick_ccs,
}
every_fitter = pytest.mark.parametrize("fit", FITTERS.values(), ids=FITTERS)


@every_fitter
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_planted_direction_is_found_and_points_to_the_helpful_side(
    fit: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    helpful, harmful, truth = plant()
    found = fit(helpful.to(dtype), harmful.to(dtype))
    assert found.dtype == torch.float64
    assert cosines(found, truth).min() >= 0.95


def test_svd_of_one_group_finds_the_mean_and_not_the_contrast() -> None:
    helpful, harmful, truth = plant()
    help_, harm = svd_group(helpful).vectors[:, 0], svd_group(harmful).vectors[:, 0]
    assert cosines(help_, helpful.mean(dim=1)).min() > 0.999
    assert cosines(help_, truth).abs().max() < 0.3
    assert cosines(help_, harm).min() > 0.9


def test_centring_the_differences_removes_a_constant_shift() -> None:
    helpful, harmful, truth = plant()
    centred = torch.stack([vectors[0] for vectors in svd_diff(helpful, harmful, center=True).vectors])
    assert cosines(centred, truth).abs().max() < 0.3
    assert cosines(first(helpful, harmful), truth).min() > 0.95


def test_mean_difference_is_the_unnormalised_mean() -> None:
    helpful, harmful, _ = plant()
    expected = helpful.mean(dim=1) - harmful.mean(dim=1)
    torch.testing.assert_close(mean_difference(helpful, harmful), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("pairs", "width"), [(5, 12), (12, 5), (6, 6)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("center", [False, True])
def test_svd_diff_gives_the_right_singular_vectors(pairs: int, width: int, center: bool) -> None:
    helpful, harmful, _ = plant(1, pairs, width)
    found = svd_diff(helpful, harmful, center=center)
    align = helpful[0] - harmful[0]
    rows = align - align.mean(dim=0) if center else align
    vectors = found.vectors[0]
    assert len(vectors) == min(pairs - 1 if center else pairs, width)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors), dtype=torch.float64), rtol=0, atol=1e-12)
    sigma = torch.linalg.svdvals(rows)
    torch.testing.assert_close(found.singular_values[0], sigma, rtol=1e-10, atol=1e-10 * float(sigma[0]))
    lengths = torch.linalg.vector_norm(rows @ vectors.T, dim=0)
    torch.testing.assert_close(lengths, sigma[: len(vectors)], rtol=1e-10, atol=0)
    torch.testing.assert_close(rows @ vectors.T @ vectors, rows, rtol=0, atol=1e-10)
    assert ((vectors @ align.mean(dim=0)) >= -1e-9).all()


def test_rank_cuts_and_repeated_pairs_give_no_more_directions() -> None:
    helpful, harmful, _ = plant(1, 6, 32)
    whole = svd_diff(helpful, harmful).vectors[0]
    torch.testing.assert_close(svd_diff(helpful, harmful, rank=2).vectors[0], whole[:2])
    twice = svd_diff(torch.cat([helpful, helpful], dim=1), torch.cat([harmful, harmful], dim=1)).vectors[0]
    assert len(twice) == 6
    torch.testing.assert_close(twice.T @ twice, whole.T @ whole, rtol=0, atol=1e-10)


def test_a_layer_without_contrast_has_no_directions() -> None:
    helpful, harmful, truth = plant(3)
    noise = 1e-9 * torch.randn(helpful[1].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    helpful[1] = harmful[1] + noise
    found = svd_diff(helpful, harmful)
    assert [len(v) for v in found.vectors] == [48, 0, 48]
    assert found.vectors[1].shape == (0, 64)
    assert cosines(found.vectors[2][0], truth[2]) > 0.95


def test_signs_do_not_depend_on_the_svd_or_on_the_order_of_pairs() -> None:
    helpful, harmful, _ = plant(1, 10, 24)
    align = helpful[0] - harmful[0]
    vectors = svd_diff(helpful, harmful).vectors[0]
    flips = torch.tensor([1.0, -1.0] * 5, dtype=torch.float64)
    flipped = vectors * flips[:, None]
    torch.testing.assert_close(flipped * canonical_signs(flipped, align)[:, None], vectors, rtol=0, atol=0)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    permuted = svd_diff(helpful[:, order], harmful[:, order]).vectors[0]
    torch.testing.assert_close(permuted, vectors, rtol=0, atol=1e-9)
    turned = svd_diff(harmful, helpful).vectors[0]  # the other way round: every direction points the other way
    torch.testing.assert_close(turned, -vectors, rtol=0, atol=1e-9)


def test_a_direction_with_no_mean_projection_has_its_first_largest_component_positive() -> None:
    rows = torch.tensor([[0.0, 3.0, -3.0], [0.0, -3.0, 3.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    vectors = torch.tensor([[0.0, -(0.5**0.5), 0.5**0.5], [-1.0, 0.0, 0.0]], dtype=torch.float64)
    assert canonical_signs(vectors, rows).tolist() == [-1.0, -1.0]
    assert canonical_signs(-vectors, rows).tolist() == [1.0, 1.0]
    assert canonical_signs(vectors[:0], rows).shape == (0,)


def test_degenerate_singular_values_turn_the_basis_and_not_the_projector() -> None:
    axes = random_rotation(16)[:4]
    sigma = torch.tensor([5.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    helpful = torch.zeros(1, 4, 16, dtype=torch.float64)
    harmful = torch.ones(1, 4, 16, dtype=torch.float64)
    projectors = []
    for seed in (1, 2):
        left = torch.eye(4, dtype=torch.float64)
        left[1:, 1:] = random_rotation(3, seed)
        helpful[0] = harmful[0] + left @ torch.diag(sigma) @ (left.T @ axes)
        vectors = svd_diff(helpful, harmful).vectors[0]
        projectors.append((vectors[:1].T @ vectors[:1], vectors[1:].T @ vectors[1:]))
    for one, other in zip(*projectors, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@every_fitter
def test_directions_turn_with_the_activations(fit: Callable[[Tensor, Tensor], Tensor]) -> None:
    helpful, harmful, _ = plant(2, 12, 40)
    rotation = random_rotation(40)
    torch.testing.assert_close(
        fit(helpful @ rotation, harmful @ rotation), fit(helpful, harmful) @ rotation, rtol=0, atol=1e-6
    )


@every_fitter
def test_a_shared_offset_changes_nothing(fit: Callable[[Tensor, Tensor], Tensor]) -> None:
    helpful, harmful, _ = plant(1, 12, 24)
    offset = 5 * torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(fit(helpful + offset, harmful + offset), fit(helpful, harmful), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["svd_diff", "logistic", "ccs"])
def test_directions_do_not_depend_on_the_scale(name: str) -> None:
    helpful, harmful, _ = plant(1, 12, 24)
    fit = FITTERS[name]
    for scale in (1e-3, 1e3):
        torch.testing.assert_close(fit(scale * helpful, scale * harmful), fit(helpful, harmful), rtol=0, atol=1e-6)


@every_fitter
def test_a_layer_is_fitted_as_it_would_be_alone(fit: Callable[[Tensor, Tensor], Tensor]) -> None:
    helpful, harmful, _ = plant(3, 8, 20)
    assert torch.equal(fit(helpful, harmful)[1:2], fit(helpful[1:2], harmful[1:2]))


def test_cosine_filter_keeps_what_the_query_does_not_have() -> None:
    query = torch.tensor([3.0, 0.0, 4.0])
    directions = torch.tensor([[1.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    assert cosine_filter(query, directions).tolist() == [False, True, True, False]
    assert cosine_filter(query, directions, threshold=0.7).tolist() == [True, True, True, False]
    assert cosine_filter(query, directions, threshold=-0.5).tolist() == [False, True, False, False]
    assert cosine_filter(torch.zeros(3), directions).all()
    assert cosine_filter(query, directions[:0]).shape == (0,)
    assert torch.equal(cosine_filter(query, -directions), torch.tensor([True, False, True, True]))


def test_nearest_goes_by_the_angle_and_takes_the_first_of_equals() -> None:
    queries = torch.tensor([[0.0, 9.0], [1.0, 1.0], [100.0, 1.0], [2.0, 2.0], [-1.0, 0.0]])
    query = torch.tensor([1.0, 0.0])
    assert nearest(query, queries, 5).tolist() == [2, 1, 3, 0, 4]
    assert nearest(query, queries, 2).tolist() == [2, 1]
    with pytest.raises(ConfigError, match="6 nearest"):
        nearest(query, queries, 6)
    with pytest.raises(ConfigError, match="n is 0"):
        nearest(query, queries, 0)
    with pytest.raises(FitError, match="row 1 is zero"):
        nearest(query, queries * torch.tensor([[1.0], [0.0], [1.0], [1.0], [1.0]]), 1)
    with pytest.raises(FitError, match="width 3"):
        nearest(torch.ones(3), queries, 1)
    with pytest.raises(FitError, match="NaN"):
        cosine_filter(query * float("nan"), queries)


@every_fitter
def test_activations_no_direction_can_come_from(fit: Callable[[Tensor, Tensor], Tensor]) -> None:
    helpful, harmful, _ = plant(3, 6, 8)
    with pytest.raises(FitError, match="none of the 6 pairs differs"):
        fit(helpful, helpful.clone())
    with pytest.raises(FitError, match=r"\[3, 6, 8\].*\[3, 5, 8\]"):
        fit(helpful, harmful[:, :5])
    with pytest.raises(FitError, match="1 helpful activations"):
        fit(helpful[:, :1], harmful[:, :1])
    with pytest.raises(FitError, match=r"shape \[6, 8\]"):
        fit(helpful[0], harmful[0])
    with pytest.raises(FitError, match="int64"):
        fit(helpful.long(), harmful)
    for bad in (float("nan"), float("inf")):
        broken = harmful.clone()
        broken[2, 4, 1] = bad
        with pytest.raises(FitError, match="harmful activations hold NaN or inf, first in layer 2, pair 4"):
            fit(helpful, broken)


def test_more_directions_than_there_are() -> None:
    helpful, harmful, _ = plant(1, 4, 8)
    assert len(svd_diff(helpful, harmful, rank=4).vectors[0]) == 4
    with pytest.raises(FitError, match="5 directions were asked for, and 4 rows"):
        svd_diff(helpful, harmful, rank=5)
    with pytest.raises(FitError, match="4 directions were asked for, and 4 centred rows of width 8 have at most 3"):
        svd_diff(helpful, harmful, rank=4, center=True)
    with pytest.raises(FitError, match="9 directions"):
        svd_group(torch.cat([helpful] * 3, dim=1), rank=9)
    with pytest.raises(FitError, match="layer 0 span 4 directions, 5 were asked for"):
        svd_group(torch.cat([helpful] * 3, dim=1), rank=5)
    with pytest.raises(ConfigError, match="rank is 0"):
        svd_diff(helpful, harmful, rank=0)


def test_svd_group_with_centring_is_principal_components() -> None:
    helpful, _, _ = plant(2, 12, 20)
    found = svd_group(helpful, rank=3, center=True)
    rows = helpful - helpful.mean(dim=1, keepdim=True)
    expected = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(found.singular_values[:, :11], expected.S[:, :11], rtol=1e-10, atol=0)
    assert (found.vectors * expected.Vh[:, :3]).sum(dim=-1).abs().min() > 1 - 1e-9
    assert (found.vectors * helpful.mean(dim=1, keepdim=True)).sum(dim=-1).min() >= 0


def test_thin_svd_of_zeros_has_no_direction() -> None:
    found = thin_svd(torch.zeros(3, 5, dtype=torch.float64))
    assert found.vectors.shape == (0, 5)
    assert found.coefficients.shape == (3, 0)
    assert found.sigma.tolist() == [0.0, 0.0, 0.0]
