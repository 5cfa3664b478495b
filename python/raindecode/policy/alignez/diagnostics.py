"""What the activations of pairs say layer by layer before anything is edited, and which layers to edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from raindecode.errors import ConfigError, FitError
from raindecode.policy.alignez.ccs import ccs
from raindecode.policy.alignez.directions import mean_difference, svd_diff, svd_group
from raindecode.policy.alignez.matrices import check_pairs, has_contrast, layer
from raindecode.settings import is_whole, require_whole

__all__ = ["COLUMNS", "METHODS", "Diagnostics", "LayerDiagnostics", "choose_layers", "diagnose", "held_out_accuracy"]

METHODS: Final = ("mean_difference", "svd_diff", "ccs")
COLUMNS: Final = ("tap", "layer", "σ of differences", "σ helpful", "σ harmful", "cos", "CCS loss", *METHODS)


@dataclass(frozen=True)
class LayerDiagnostics:
    """One layer at one tap.

    Attributes:
        tap: where the activations were taken, such as "mlp_out" or "block_out".
        layer: the model's number of the layer.
        sigma_diff, sigma_helpful, sigma_harmful: largest singular values of H_help - H_harm, H_help and H_harm, none centred.
        cosine: cos(θ_help, θ_harm) of the first right singular vectors of both sides. Near 1, AlignEZ v1's two edits cancel.
        ccs_loss: least loss of a CCS probe, to compare layers by. 0.2 is what a blind probe reaches; with fewer pairs than
            dimensions noise alone comes out lower, so it takes `accuracy` to say that a layer holds a contrast.
        accuracy: per method of METHODS, the share of held-out pairs with <h_help, θ> > <h_harm, θ>; 0.5 is chance.
    """

    tap: str
    layer: int
    sigma_diff: tuple[float, ...]
    sigma_helpful: tuple[float, ...]
    sigma_harmful: tuple[float, ...]
    cosine: float
    ccs_loss: float
    accuracy: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        return {
            "tap": self.tap,
            "layer": self.layer,
            "sigma_diff": list(self.sigma_diff),
            "sigma_helpful": list(self.sigma_helpful),
            "sigma_harmful": list(self.sigma_harmful),
            "cosine": self.cosine,
            "ccs_loss": self.ccs_loss,
            "accuracy": dict(self.accuracy),
        }

    def row(self) -> tuple[str, ...]:
        """Texts for a table with the columns COLUMNS."""
        sigmas = (" ".join(f"{s:.3g}" for s in v) for v in (self.sigma_diff, self.sigma_helpful, self.sigma_harmful))
        shares = (f"{self.accuracy[method]:.1%}" for method in METHODS)
        return (self.tap, str(self.layer), *sigmas, f"{self.cosine:.3f}", f"{self.ccs_loss:.4f}", *shares)


@dataclass(frozen=True)
class Diagnostics:
    """Every tap's layers, in the order they were given.

    Attributes:
        pairs: how many pairs were looked at.
        folds: parts they were divided into for the held-out accuracies.
    """

    layers: tuple[LayerDiagnostics, ...]
    pairs: int
    folds: int

    def at(self, tap: str) -> tuple[LayerDiagnostics, ...]:
        """The layers of one tap."""
        return tuple(one for one in self.layers if one.tap == tap)

    def taps(self) -> tuple[str, ...]:
        """The taps, each once."""
        return tuple(dict.fromkeys(one.tap for one in self.layers))

    def rows(self) -> list[tuple[str, ...]]:
        """A table's rows under COLUMNS."""
        return [one.row() for one in self.layers]

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        return {"pairs": self.pairs, "folds": self.folds, "layers": [one.to_json() for one in self.layers]}


def diagnose(
    activations: Mapping[str, tuple[Tensor, Tensor]],
    layers: Sequence[int],
    *,
    folds: int = 5,
    top: int = 4,
    restarts: int = 3,
    epochs: int = 1000,
    seed: int = 0,
) -> Diagnostics:
    """Measure every layer at every tap.

    Args:
        activations: per tap the helpful and harmful sides, [L, K, d] floats each; row i of both belongs to the same query.
        layers: the model's numbers of the L layers.
        folds: for the held-out accuracies; see `held_out_accuracy`.
        top: singular values reported.
        restarts, epochs, seed: of CCS, which is fitted folds + 1 times per layer. `ccs` itself makes 10 restarts by default.

    Raises:
        ConfigError: a setting lies outside what is allowed.
        FitError: bad activations, or no contrast in any layer.
    """
    require_whole("top", top, 1)
    if not activations or not all(is_whole(index) for index in layers):
        raise ConfigError("give the activations of one tap or more, and the number of every layer")
    reports: list[LayerDiagnostics] = []
    sizes = {tap: helpful.shape[1] for tap, (helpful, _) in activations.items() if helpful.ndim == 3}
    if len(set(sizes.values())) > 1:
        raise FitError(f"the taps have different numbers of pairs, {sizes}; give the same pairs at every tap")
    for tap, (helpful, harmful) in activations.items():
        check_pairs(helpful, harmful)
        if helpful.shape[0] != len(layers):
            raise FitError(
                f"the activations at {tap!r} have {helpful.shape[0]} layers and {len(layers)} layer numbers were given; "
                "give one number per layer"
            )
        accuracy = held_out_accuracy(helpful, harmful, folds=folds, restarts=restarts, epochs=epochs, seed=seed)
        losses = ccs(helpful, harmful, restarts=restarts, epochs=epochs, seed=seed).loss
        groups = svd_group(helpful), svd_group(harmful)
        cosines = (groups[0].vectors[:, 0] * groups[1].vectors[:, 0]).sum(dim=1)
        difference = svd_diff(helpful, harmful, rank=1).singular_values
        for i, index in enumerate(layers):
            reports.append(
                LayerDiagnostics(
                    tap=tap,
                    layer=int(index),
                    sigma_diff=_first(difference[i], top),
                    sigma_helpful=_first(groups[0].singular_values[i], top),
                    sigma_harmful=_first(groups[1].singular_values[i], top),
                    cosine=float(cosines[i]),
                    ccs_loss=float(losses[i]),
                    accuracy={method: float(values[i]) for method, values in accuracy.items()},
                )
            )
    return Diagnostics(tuple(reports), max(sizes.values()), folds)


def _first(values: Tensor, count: int) -> tuple[float, ...]:
    return tuple(float(value) for value in values[:count])


def held_out_accuracy(
    helpful: Tensor, harmful: Tensor, *, folds: int = 5, restarts: int = 3, epochs: int = 1000, seed: int = 0
) -> dict[str, Tensor]:
    """Share of pairs with <h_help, θ> > <h_harm, θ> for θ fitted to the other folds; a tie counts one half.

    Folds are runs of neighbouring pairs, so that several pairs of one query, which stand side by side, are mostly held out together.

    Args:
        helpful, harmful: [L, K, d] floats.
        folds: 2 to K; every fold's fit needs 2 pairs, so K >= 3 at least.

    Returns:
        Per method of METHODS [L] float64; svd_diff stands for its first direction.

    Raises:
        ConfigError: folds is no whole number from 2 to K.
        FitError: bad activations, no contrast in any layer, or too few pairs.
    """
    check_pairs(helpful, harmful)
    count, pairs = helpful.shape[:2]
    require_whole("folds", folds, 2)
    if folds > pairs or pairs < 3:
        raise FitError(
            f"{pairs} pairs cannot be divided into {folds} folds that leave two pairs to fit: give more pairs"
        )
    right = {method: torch.zeros(count, dtype=torch.float64) for method in METHODS}
    for fold in torch.arange(pairs).tensor_split(folds):
        others = torch.ones(pairs, dtype=torch.bool)
        others[fold] = False
        if int(others.sum()) < 2:
            raise FitError(f"{pairs} pairs in {folds} folds leave one pair to fit: give more pairs or more folds")
        others = others.to(helpful.device)
        fitted = _fit(helpful[:, others], harmful[:, others], restarts=restarts, epochs=epochs, seed=seed)
        for index in range(count):
            ahead = layer(helpful, index)[fold] - layer(harmful, index)[fold]
            for method, directions in fitted.items():
                margin = ahead @ directions[index]
                right[method][index] += ((margin > 0).double() + (margin == 0).double() / 2).sum()
    return {method: total / pairs for method, total in right.items()}


def _fit(helpful: Tensor, harmful: Tensor, *, restarts: int, epochs: int, seed: int) -> dict[str, Tensor]:
    """[L, d] per method; zero in layers, and for pairs, without contrast."""
    count, _, width = helpful.shape
    if not any(has_contrast(layer(helpful, i), layer(harmful, i)) for i in range(count)):
        return {method: torch.zeros(count, width, dtype=torch.float64) for method in METHODS}
    none = torch.zeros(1, width, dtype=torch.float64)
    strongest = [torch.cat([vectors, none])[0] for vectors in svd_diff(helpful, harmful, rank=1).vectors]
    probe = ccs(helpful, harmful, restarts=restarts, epochs=epochs, seed=seed)
    return {
        "mean_difference": mean_difference(helpful, harmful),
        "svd_diff": torch.stack(strongest),
        "ccs": probe.direction,
    }


def choose_layers(ccs_loss: Tensor | Sequence[float], count: int) -> tuple[int, ...]:
    """Positions of the `count` lowest losses, in increasing order (AlignEZ v1's choice); of equal losses the first is taken.

    Args:
        ccs_loss: [L], such as Probe.loss.

    Raises:
        ConfigError: count is no whole number from 1 to L, or a loss is NaN.
    """
    losses = torch.as_tensor(ccs_loss, dtype=torch.float64)
    require_whole("count", count, 1)
    if losses.ndim != 1 or torch.isnan(losses).any():
        raise ConfigError(f"CCS losses are {losses.tolist()}; allowed: one number per layer")
    if count > len(losses):
        raise ConfigError(f"{count} layers are to be chosen from {len(losses)}: choose fewer")
    return tuple(sorted(torch.argsort(losses, stable=True)[:count].tolist()))
