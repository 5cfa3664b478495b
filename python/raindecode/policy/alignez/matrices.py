"""What every fitter needs: checks of paired activations, a thin SVD in float64, and the sign of a direction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch
from torch import Tensor

from raindecode.errors import FitError

# Activations come from float32 arithmetic at best: a singular value below K times this share of the largest is rounding.
_EPSILON: Final = float(torch.finfo(torch.float32).eps)
_NO_CONTRAST: Final = 1e-6  # share of the activations' own size below which differences are rounding
_TIE: Final = 1e-9


class Svd(NamedTuple):
    """rows = coefficients @ diag(sigma[:r]) @ vectors, up to rounding; r is the numerical rank."""

    coefficients: Tensor  # [K, r] float64, orthonormal columns
    sigma: Tensor  # [min(K, d)] float64, descending, those below the tolerance included
    vectors: Tensor  # [r, d] float64, orthonormal rows


def check_rows(name: str, rows: Tensor, least: int = 2) -> None:
    """Refuse what is not [L, K, d] finite floats with K >= `least`.

    Raises:
        FitError: the message names the first layer and row at fault.
    """
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        kind = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise FitError(f"{name} activations are {kind}; allowed: a tensor of floats [layers, pairs, width]")
    if rows.ndim != 3 or rows.shape[0] < 1 or rows.shape[2] < 1:
        raise FitError(f"{name} activations have shape {list(rows.shape)}; allowed: [layers, pairs, width]")
    if rows.shape[1] < least:
        raise FitError(
            f"{rows.shape[1]} {name} activations were given; a fit needs {least} or more: generate more pairs"
        )
    finite = torch.isfinite(rows).all(dim=2)
    if not finite.all():
        layer, pair = (int(i) for i in (~finite).nonzero()[0])
        raise FitError(
            f"{name} activations hold NaN or inf, first in layer {layer}, pair {pair} (counted from 0): leave that pair out, or "
            "run the model in a wider dtype"
        )


def check_pairs(helpful: Tensor, harmful: Tensor) -> None:
    """Refuse pairs that no direction can be fitted to.

    Raises:
        FitError: shapes differ, values are not finite, fewer than two pairs, or the pairs do not differ in any layer.
    """
    check_rows("helpful", helpful)
    check_rows("harmful", harmful)
    if helpful.shape != harmful.shape:
        raise FitError(
            f"helpful activations have shape {list(helpful.shape)} and harmful ones {list(harmful.shape)}; they must be alike: "
            "row i of both belongs to the same query"
        )
    if not any(has_contrast(layer(helpful, i), layer(harmful, i)) for i in range(helpful.shape[0])):
        raise FitError(
            f"none of the {helpful.shape[1]} pairs differs between its helpful and its harmful side in any of "
            f"{helpful.shape[0]} layers: check that both answers were generated from different instructions"
        )


def layer(rows: Tensor, index: int) -> Tensor:
    """[K, d] of one layer, float64 on the cpu."""
    return rows[index].detach().to("cpu", torch.float64)


def has_contrast(helpful: Tensor, harmful: Tensor) -> bool:
    """Whether [K, d] of both sides differ by more than rounding."""
    size = torch.linalg.vector_norm(helpful) + torch.linalg.vector_norm(harmful)
    return bool(torch.linalg.vector_norm(helpful - harmful) > _NO_CONTRAST * size)


def thin_svd(rows: Tensor) -> Svd:
    """SVD of [K, d] float64 without the directions that rounding alone would give.

    A QR of the longer side first, so that the SVD is of min(K, d) squared and, unlike through a Gram matrix, keeps the condition
    number of the rows. Directions whose sigma is at most K eps sigma_1 (eps of float32) are left out: they are arbitrary.
    """
    if rows.shape[0] <= rows.shape[1]:
        q, r = torch.linalg.qr(rows.T)
        coefficients, sigma, small = torch.linalg.svd(r.T)
        vectors = small @ q.T
    else:
        q, r = torch.linalg.qr(rows)
        small, sigma, vectors = torch.linalg.svd(r)
        coefficients = q @ small
    rank = int((sigma > sigma[0] * rows.shape[0] * _EPSILON).sum())
    return Svd(coefficients[:, :rank], sigma, vectors[:rank])


def canonical_signs(vectors: Tensor, rows: Tensor) -> Tensor:
    """±1 for each of [r, d] that makes mean_i <rows_i, θ> >= 0.

    Where that mean is 0 up to rounding, the first component of θ of the largest size is made positive.

    Args:
        rows: [K, d] what the sign goes by.

    Returns:
        [r] float64.
    """
    means = vectors @ rows.mean(dim=0)
    size = torch.linalg.vector_norm(rows) / rows.shape[0] ** 0.5
    largest = vectors.abs().amax(dim=1, keepdim=True)
    first = (vectors.abs() >= (1 - 1e-6) * largest).to(torch.int8).argmax(dim=1, keepdim=True)
    component = vectors.gather(1, first).squeeze(1)
    return torch.where(means.abs() <= _TIE * size, component, means).sign()


def unit(vectors: Tensor) -> Tensor:
    """[..., d] divided by its length; zero stays zero."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(length > 0, length, torch.ones_like(length))


@contextmanager
def one_thread_each() -> Iterator[int]:
    """torch stays in the thread that calls it; how many may work side by side.

    Products and decompositions of small matrices, shared out among threads, spend their time waiting for them, and on a busy
    machine far more than that (measured: 59 s instead of 1 s for a search of CCS, 6 s instead of 0.5 s for twelve SVDs).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
