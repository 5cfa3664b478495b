"""Directions between helpful and harmful activations by linear algebra, and how a query chooses among them.

Activations are [L, K, d] of any float dtype and device: layers, pairs, width. Row i of both sides belongs to the same query.
All arithmetic is float64 on the cpu, layer by layer.

Source: AlignEZ, arXiv 2406.03642, v1 (`svd_group`, with `ccs` in ccs.py), the ICLR 2025 submission 3246 (`nearest`) and v2
(`svd_diff`, `cosine_filter`); CAA, arXiv 2312.06681 (`mean_difference`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raindecode.errors import ConfigError, FitError
from raindecode.policy.alignez.matrices import canonical_signs, check_pairs, check_rows, has_contrast, layer, thin_svd
from raindecode.settings import require_finite, require_whole

__all__ = ["GroupDirections", "PairDirections", "cosine_filter", "mean_difference", "nearest", "svd_diff", "svd_group"]


class GroupDirections(NamedTuple):
    """What `svd_group` finds."""

    vectors: Tensor  # [L, rank, d] float64, orthonormal rows
    singular_values: Tensor  # [L, min(K, d)] float64, descending


class PairDirections(NamedTuple):
    """What `svd_diff` finds; a layer whose pairs do not differ has no directions."""

    vectors: list[Tensor]  # per layer [r, d] float64, orthonormal rows
    singular_values: Tensor  # [L, min(K, d)] float64, descending


def svd_group(rows: Tensor, *, rank: int = 1, center: bool = False) -> GroupDirections:
    """First right singular vectors of one side's activations (AlignEZ v1: θ_help from H_help, θ_harm from H_harm).

    Without centring, the first direction is nearly the mean that both sides share, not what tells them apart: compare
    cos(θ_help, θ_harm). That is the published method; `svd_diff` is the one that sees the contrast. Signs are such that
    mean_i <rows_i, θ> >= 0.

    Args:
        rows: [L, K, d] floats.
        rank: directions per layer, 1 or more.
        center: subtract the mean row first.

    Raises:
        ConfigError: rank is no whole number above 0.
        FitError: bad activations, or a layer has fewer independent rows than `rank`.
    """
    require_whole("rank", rank, 1)
    check_rows("these", rows)
    _check_rank(rank, rows, center=center)
    vectors, values = [], []
    for index in range(rows.shape[0]):
        here = layer(rows, index)
        found = thin_svd(here - here.mean(dim=0) if center else here)
        if len(found.vectors) < rank:
            raise FitError(
                f"the {rows.shape[1]} activations of layer {index} span {len(found.vectors)} directions, {rank} were asked for: "
                "ask for fewer, leave the layer out, or give activations that differ"
            )
        chosen = found.vectors[:rank]
        vectors.append(chosen * canonical_signs(chosen, here)[:, None])
        values.append(found.sigma)
    return GroupDirections(torch.stack(vectors), torch.stack(values))


def svd_diff(helpful: Tensor, harmful: Tensor, *, rank: int | None = None, center: bool = False) -> PairDirections:
    """Right singular vectors of H_align = H_help - H_harm (AlignEZ v2), strongest first.

    The sign of a singular vector is free, and v2's cosine filter depends on it. Here it is canonical: mean_i <H_align_i, θ> >= 0,
    so θ points to the helpful side; where that mean is 0, the first component of the largest size is positive.

    With `center` the mean difference is subtracted first, as scikit-learn's PCA does. That removes a constant shift between the
    sides, which is most of what such pairs hold: a planted shift is found with |cos| 0.87 without centring and 0.02 with it
    (d = 4096, K = 64). It is there to compare with. Signs still go by the differences as given.

    Args:
        helpful, harmful: [L, K, d] floats.
        rank: at most so many per layer; None for all.

    Returns:
        Per layer at most min(K, d) directions; those that rounding alone would give are left out (`matrices.thin_svd`).

    Raises:
        ConfigError: rank is no whole number above 0.
        FitError: bad activations, no contrast in any layer, or fewer pairs than `rank`.
    """
    if rank is not None:
        require_whole("rank", rank, 1)
    check_pairs(helpful, harmful)
    if rank is not None:
        _check_rank(rank, helpful, center=center)
    vectors, values = [], []
    for index in range(helpful.shape[0]):
        plus, minus = layer(helpful, index), layer(harmful, index)
        align = plus - minus
        found = thin_svd(align - align.mean(dim=0) if center else align)
        # Differences at the level of rounding have a full-rank SVD, too.
        chosen = found.vectors[:rank] if has_contrast(plus, minus) else found.vectors[:0]
        vectors.append(chosen * canonical_signs(chosen, align)[:, None])
        values.append(found.sigma)
    return PairDirections(vectors, torch.stack(values))


def mean_difference(helpful: Tensor, harmful: Tensor) -> Tensor:
    """mean(H_help) - mean(H_harm), not normalised: the vector that CAA adds.

    Returns:
        [L, d] float64.

    Raises:
        FitError: bad activations, or no contrast in any layer.
    """
    check_pairs(helpful, harmful)
    return torch.stack([(layer(helpful, i) - layer(harmful, i)).mean(dim=0) for i in range(helpful.shape[0])])


def cosine_filter(query: Tensor, directions: Tensor, *, threshold: float = 0.0) -> Tensor:
    """Which directions a query keeps (AlignEZ v2): those with cos(query, θ) <= threshold, which it does not have already.

    Args:
        query: [d] floats, the query's own activation. A zero query has cosine 0 with everything.
        directions: [r, d] floats of any length but 0; r may be 0.
        threshold: in cosines; 0 is the paper's.

    Returns:
        [r] bool.

    Raises:
        ConfigError: threshold is not finite.
        FitError: shapes do not match, values are not finite, or a direction is zero.
    """
    require_finite("threshold", threshold)
    return _cosines(query, directions, "directions") <= threshold


def nearest(query: Tensor, queries: Tensor, n: int) -> Tensor:
    """The n queries nearest to this one by cosine (the ICLR submission's subset for each query), nearest first.

    Args:
        query: [d] floats.
        queries: [K, d] floats. Of equally near ones the first comes first.

    Returns:
        [n] int64 indices into queries.

    Raises:
        ConfigError: n is no whole number from 1 to K.
        FitError: shapes do not match, values are not finite, or one of `queries` is zero.
    """
    cosines = _cosines(query, queries, "queries")
    require_whole("n", n, 1)
    if n > len(cosines):
        raise ConfigError(f"the {n} nearest queries were asked for and there are {len(cosines)}: ask for fewer")
    return torch.argsort(cosines, descending=True, stable=True)[:n]


def _cosines(query: Tensor, others: Tensor, name: str) -> Tensor:
    for what, value, rank in (("query", query, 1), (name, others, 2)):
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != rank:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise FitError(f"{what}: {shape}; allowed: a tensor of floats {['[width]', '[rows, width]'][rank - 1]}")
        if not torch.isfinite(value).all():
            raise FitError(f"{what}: holds NaN or inf; allowed: finite numbers")
    if query.shape[0] != others.shape[1]:
        raise FitError(
            f"the query has width {query.shape[0]} and {name} have width {others.shape[1]}; they must be alike"
        )
    query, others = query.detach().to("cpu", torch.float64), others.detach().to("cpu", torch.float64)
    lengths = torch.linalg.vector_norm(others, dim=1)
    if not lengths.all():
        raise FitError(f"{name}: row {int((lengths == 0).nonzero()[0])} is zero and has no direction: leave it out")
    length = torch.linalg.vector_norm(query)
    cosines: Tensor = others @ query / (lengths * torch.where(length > 0, length, torch.ones_like(length)))
    return cosines


def _check_rank(rank: int, rows: Tensor, *, center: bool) -> None:
    _, pairs, width = rows.shape
    most = min(pairs - 1 if center else pairs, width)
    if rank > most:
        centred = " centred" if center else ""
        raise FitError(
            f"{rank} directions were asked for, and {pairs}{centred} rows of width {width} have at most {most}: ask for fewer, or "
            "give more pairs"
        )
