"""Fitting: from pairs of answers to an edit, by the published presets or with every choice of your own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Literal, Protocol, get_args

from torch import Tensor

from raindecode.errors import ConfigError, FitError
from raindecode.hidden_edits import TAPS, ModelIdentity, Op, Site, Stage, Tap
from raindecode.policy.alignez.ccs import Normalize, Probe, ccs
from raindecode.policy.alignez.diagnostics import Diagnostics, choose_layers, diagnose
from raindecode.policy.alignez.directions import mean_difference, svd_diff, svd_group
from raindecode.policy.alignez.edits import MAX_DIRECTIONS, AlignEZ, Examples, Group, Positions
from raindecode.policy.alignez.logistic import logistic
from raindecode.policy.alignez.matrices import one_thread_each
from raindecode.policy.alignez.pairs import Pair
from raindecode.policy.policy import Policy
from raindecode.policy.prompt import ChatFormat
from raindecode.settings import is_whole, require_finite, require_whole

Kind = Literal["svd", "ccs", "svd-knn", "svd-diff", "mean-diff", "logistic"]
Context = Literal["question", "elicited"]
FitPool = Literal["last", "mean", "prompt"]
_FOLDS: Final = 5  # of the held-out accuracies, where there are as many pairs


class Activates(Protocol):
    """A decoder, as far as fitting goes."""

    @property
    def identities(self) -> Sequence[ModelIdentity]: ...

    def activations(self, passages: Sequence[tuple[str, str]], **options: Any) -> Tensor: ...


@dataclass(frozen=True)
class FitSettings:
    """Every choice of a fit. What the paper leaves open is marked (open).

    Attributes:
        kind: which directions, and what is done along them: "svd" rejects the harmful group's first singular vector and boosts
            the helpful group's; "ccs" rejects the CCS direction instead; "svd-knn" as "svd" with directions of each request's
            own; "svd-diff" bends all singular vectors of the differences by tanh, those the prompt does not have already;
            "mean-diff" adds the mean difference (CAA); "logistic" adds the probe's normal (as ITI).
        tap: (open for "svd-diff") where.
        pool: (open) the state of an answer: that of its "last" token, the "mean" over it, or that of the last token of its
            "prompt", which only differs between the sides in the "elicited" context.
        context: (open) what stands before an answer: the "question" alone, or the text it was "elicited" by.
        layers: given ones; or how many, or (a share below 1) which part of all, those of the least CCS loss; None for all.
        normalize: of CCS, where it chooses layers or gives the direction: "per_side" (published), "joint" or "none".
        alpha: strength of every operation; of "mean-diff" and "logistic" a share of the mean difference's length.
        rank: of "svd-diff", at most so many directions; None for all.
        neighbours: of "svd-knn".
        positions: (open) which rows are edited.
    """

    kind: Kind = "svd-diff"
    tap: Tap = "mlp_out"
    pool: FitPool = "last"
    context: Context = "question"
    layers: int | float | tuple[int, ...] | None = None
    normalize: Normalize = "per_side"
    alpha: float = 1.0
    rank: int | None = None
    neighbours: int = 16
    positions: Positions = field(default_factory=Positions)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, (*_STAGES, "svd-knn")), ("tap", self.tap, TAPS),
            ("pool", self.pool, ("last", "mean", "prompt")), ("context", self.context, ("question", "elicited")),
            ("normalize", self.normalize, get_args(Normalize)),
        ):  # fmt: skip
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        if self.pool == "prompt" and self.context == "question":
            raise ConfigError(
                "pool 'prompt' reads the state before an answer, which is the same for both sides of a question: use "
                "context='elicited', or pool 'last' or 'mean'"
            )
        if is_whole(self.layers):
            require_whole("layers", self.layers, 1)
        elif isinstance(self.layers, float):
            if not 0 < self.layers <= 1:
                raise ConfigError(f"layers is {self.layers!r}; allowed: a share above 0, up to 1.0 of all layers")
        elif self.layers is not None:
            if isinstance(self.layers, str) or not isinstance(self.layers, Sequence):
                raise ConfigError(
                    f"layers is {self.layers!r}; allowed: a list of layers, how many, a share of all, or None"
                )
            object.__setattr__(self, "layers", tuple(self.layers))
        require_finite("alpha", self.alpha)
        if self.rank is not None:
            require_whole("rank", self.rank, 1)
        require_whole("neighbours", self.neighbours, 1)
        require_whole("seed", self.seed, 0)


@dataclass(frozen=True)
class _Data:
    """Hidden states of the chosen layers, [L, K, d] float32, and their CCS probe where one was wanted."""

    helpful: Tensor
    harmful: Tensor
    probe: Probe | None


def fit(decoder: Activates, pairs: Sequence[Pair], settings: FitSettings, progress: bool | None = None) -> AlignEZ:
    """Fit an edit of the decoder's reference model.

    Raises:
        FitError: the pairs give no directions: too few, no contrast, or not finite.
        ConfigError: a setting is outside what is allowed.
    """
    identity = decoder.identities[0]
    layers = given_layers(settings, identity.num_layers)
    helpful, harmful = collect_sides(decoder, pairs, settings, layers, settings.tap, progress)
    count = _count(settings, len(layers))
    probe: Probe | None = None
    if settings.kind == "ccs" or count is not None:
        probe = ccs(helpful, harmful, normalize=settings.normalize, seed=settings.seed)
    if probe is not None and count is not None:
        kept = list(choose_layers(probe.loss, count))
        helpful, harmful, layers = helpful[kept], harmful[kept], [layers[i] for i in kept]
        probe = Probe(*(part[kept] for part in probe))
    common: dict[str, Any] = {
        "positions": settings.positions,
        "model": identity,
        "origin": _origin(settings, pairs, layers),
    }
    if settings.kind == "svd-knn":
        queries = decoder.activations(
            [(pair.prompt, "") for pair in pairs], layers=layers, tap=settings.tap, pool="last", progress=progress
        )
        examples = {
            Site(layer, settings.tap): Examples(queries[i], helpful[i], harmful[i]) for i, layer in enumerate(layers)
        }
        recipe: tuple[tuple[Group, str, float], ...]
        recipe = (("harmful", "project", settings.alpha), ("helpful", "boost", settings.alpha))
        return AlignEZ(
            select="knn", neighbours=min(settings.neighbours, len(pairs)), examples=examples, recipe=recipe, **common
        )  # fmt: skip
    with one_thread_each():
        stages = _STAGES[settings.kind](_Data(helpful, harmful, probe), settings)
    sites = tuple(
        (Site(layer, settings.tap), stage) for layer, own in zip(layers, stages, strict=True) for stage in own
    )
    return AlignEZ(stages=sites, select="cosine" if settings.kind == "svd-diff" else "none", **common)


def collect_sides(
    decoder: Activates, pairs: Sequence[Pair], settings: FitSettings, layers: Sequence[int], tap: Tap,
    progress: bool | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Hidden states of the helpful and of the harmful answers, [len(layers), len(pairs), hidden_size] float32 each."""
    if not isinstance(pairs, Sequence) or not all(isinstance(pair, Pair) for pair in pairs):
        raise ConfigError("pairs are no list of Pair objects; give those of generate_pairs or read_pairs")
    if len(pairs) < 2:
        raise FitError(f"{len(pairs)} pairs were given; give at least two, and more than the directions you ask for")
    check_context(pairs, settings)
    passages: list[tuple[str, str]] = []
    for pair in pairs:
        for prompt, answer in ((pair.chosen_prompt, pair.chosen), (pair.rejected_prompt, pair.rejected)):
            stem = prompt if settings.context == "elicited" else pair.prompt
            passages.append((stem or "", "" if settings.pool == "prompt" else answer))
    options: dict[str, Any] = (
        {"policy": Policy(prompt=ChatFormat("{prompt}"))} if settings.context == "elicited" else {}
    )
    pool = "last" if settings.pool == "prompt" else settings.pool
    states = decoder.activations(passages, layers=layers, tap=tap, pool=pool, progress=progress, **options)
    return states[:, 0::2], states[:, 1::2]


def check_context(pairs: Sequence[Pair], settings: FitSettings) -> None:
    """Raise ConfigError where pairs do not say what the settings need."""
    if settings.context != "elicited":
        return
    for i, pair in enumerate(pairs):
        if not pair.chosen_prompt or not pair.rejected_prompt:
            raise ConfigError(
                f"pair {i} does not say what its answers were elicited by, which context 'elicited' needs: use pairs that the model "
                "made (AlignEZ.generate_pairs), or context='question' with pool='last' or 'mean' (--context question --pool last)"
            )


def diagnose_pairs(
    decoder: Activates,
    pairs: Sequence[Pair],
    settings: FitSettings,
    *,
    taps: Sequence[Tap] = TAPS,
    progress: bool | None = None,
) -> Diagnostics:
    """What every layer at every tap says of the pairs, before anything is edited."""
    layers = list(range(decoder.identities[0].num_layers))
    sides: dict[str, tuple[Tensor, Tensor]] = {
        tap: collect_sides(decoder, pairs, settings, layers, tap, progress) for tap in taps
    }
    return diagnose(sides, layers, folds=max(2, min(_FOLDS, len(pairs))), seed=settings.seed)


def _count(settings: FitSettings, num_layers: int) -> int | None:
    """How many layers CCS chooses; None where it does not."""
    if isinstance(settings.layers, float):
        return max(1, round(settings.layers * num_layers))
    return min(settings.layers, num_layers) if isinstance(settings.layers, int) else None


def given_layers(settings: FitSettings, num_layers: int) -> list[int]:
    """Layers that are looked at, of which a count or a share chooses some.

    Raises:
        ConfigError: a model of so many layers has no such layer.
    """
    if settings.layers is None or isinstance(settings.layers, (int, float)):
        return list(range(num_layers))
    chosen = list(settings.layers)
    if not chosen or any(not is_whole(layer) or not 0 <= layer < num_layers for layer in chosen):
        raise ConfigError(f"layers are {chosen}; allowed: one or more of 0 to {num_layers - 1}, or how many to choose")
    return sorted(set(chosen))


# ---- directions and what is done along them -------------------------------------------------------------------------------
def _svd(data: _Data, settings: FitSettings) -> list[list[Stage]]:
    return _reject_and_boost(svd_group(data.harmful).vectors, svd_group(data.helpful).vectors, settings)


def _ccs(data: _Data, settings: FitSettings) -> list[list[Stage]]:
    assert data.probe is not None
    return _reject_and_boost(data.probe.direction[:, None], svd_group(data.helpful).vectors, settings)


def _reject_and_boost(harmful: Tensor, helpful: Tensor, settings: FitSettings) -> list[list[Stage]]:
    return [
        [_stage(bad, "project", settings.alpha), _stage(good, "boost", settings.alpha)]
        for bad, good in zip(harmful, helpful, strict=True)
    ]


def _svd_diff(data: _Data, settings: FitSettings) -> list[list[Stage]]:
    most = MAX_DIRECTIONS if settings.rank is None else settings.rank
    found = svd_diff(data.helpful, data.harmful, rank=settings.rank).vectors
    return [[_stage(basis[:most], "tanh", settings.alpha)] if len(basis) else [] for basis in found]


def _mean_diff(data: _Data, settings: FitSettings) -> list[list[Stage]]:
    shifts = mean_difference(data.helpful, data.harmful)
    return [[_stage(v[None] / v.norm(), "add", settings.alpha * float(v.norm()))] if v.norm() else [] for v in shifts]


def _logistic(data: _Data, settings: FitSettings) -> list[list[Stage]]:
    shifts = mean_difference(data.helpful, data.harmful)
    normals = logistic(data.helpful, data.harmful).direction
    return [
        [_stage(u[None], "add", settings.alpha * float(v.norm()))] if u.norm() else []
        for v, u in zip(shifts, normals, strict=True)
    ]


_STAGES: Final = {"svd": _svd, "ccs": _ccs, "svd-diff": _svd_diff, "mean-diff": _mean_diff, "logistic": _logistic}


def _stage(directions: Tensor, op: Op, alpha: float) -> Stage:
    k = len(directions)
    return Stage(directions.float().contiguous(), (op,) * k, (alpha,) * k, (0.0,) * k)


def _origin(settings: FitSettings, pairs: Sequence[Pair], layers: Sequence[int]) -> dict[str, str]:
    data = json.dumps([asdict(pair) for pair in pairs], sort_keys=True)
    chosen = replace(settings, layers=tuple(layers))
    try:
        program = version("rainkernels")
    except PackageNotFoundError:
        program = "unknown"
    return {
        "fitter": settings.kind,
        "settings": json.dumps(asdict(chosen)),
        "pairs": str(len(pairs)),
        "data_sha256": hashlib.sha256(data.encode()).hexdigest(),
        "rainkernels": program,
    }


def from_mapping(preset: FitSettings, overrides: Mapping[str, Any]) -> FitSettings:
    """A preset with some settings replaced.

    Raises:
        ConfigError: there is no such setting.
    """
    unknown = sorted(set(overrides) - set(asdict(preset)))
    if unknown:
        raise ConfigError(f"a fit has no setting {unknown[0]!r}; allowed: {', '.join(asdict(preset))}")
    return replace(preset, **overrides)
