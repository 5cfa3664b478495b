"""AlignEZ: edits of hidden states along directions found in what the model itself says.

Source: Adila et al., Is Free Self-Alignment Possible?, 2024 (arXiv 2406.03642), and Alignment, Simplified: Steering LLMs
with Self-Generated Preferences, 2025. What the paper leaves open and what is chosen here: docs/methods/alignez.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from raindecode.errors import ConfigError
from raindecode.hidden_edits import NORMS, OPS, TAPS, ModelIdentity, Site, Stage
from raindecode.policy.alignez.directions import cosine_filter, nearest, svd_group
from raindecode.policy.alignez.positions import Positions as Positions
from raindecode.settings import is_whole, require_finite

if TYPE_CHECKING:
    from raindecode.policy.alignez.pairs import PairSet

Selection = Literal["none", "cosine", "knn"]
Half = Literal["reference", "aligned", "both"]
Group = Literal["helpful", "harmful"]
MAX_DIRECTIONS = 256  # of one site, as the kernels' tables
_SHARED_FROM = 8  # directions from which on orthonormal ones are held once for all requests
_ORTHONORMAL = 1e-4


class Examples(NamedTuple):
    """Hidden states that "knn" finds neighbours among: of queries, helpful and harmful answers, [K, hidden_size] each."""

    queries: Tensor
    helpful: Tensor
    harmful: Tensor


@dataclass(frozen=True, eq=False)
class AlignEZ:
    """What one file of edits does to a model: fitted, loaded or made from directions of your own.

    Attributes:
        stages: operations with their sites, those of one site in the order they run.
        select: what each request takes of it, decided once by its prompt's last hidden state: "none" everything; "cosine" the
            directions whose cosine with that state is at most `threshold` (AlignEZ of 2025); "knn" directions of its own, found
            from the `neighbours` most similar `examples` (AlignEZ at ICLR 2025).
        recipe: for "knn", the group each direction is found from, with its operation and strength, in running order.
        positions: which rows are edited.
        model: the model it was fitted on; None: not known, so that nothing but its form is checked.
        origin: how it came to be, as text.
        strength: every operation's strength is multiplied by it; 0 does nothing at all.
        on: the models of a DeRa mixture that are edited.
        judge: whether the model of RAIN's self-evaluation is edited too, in all its rows.
        force: use it on another model of the same form.

    Raises:
        ConfigError: a value is not allowed, or the parts do not fit each other.
    """

    stages: tuple[tuple[Site, Stage], ...] = ()
    select: Selection = "none"
    threshold: float = 0.0
    neighbours: int = 0
    examples: Mapping[Site, Examples] = field(default_factory=dict)
    recipe: tuple[tuple[Group, str, float], ...] = ()
    positions: Positions = field(default_factory=Positions)
    model: ModelIdentity | None = None
    origin: Mapping[str, str] = field(default_factory=dict)
    strength: float = 1.0
    on: Half = "reference"
    judge: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        require_finite("strength", self.strength)
        if self.on not in ("reference", "aligned", "both"):
            raise ConfigError(f"on is {self.on!r}; allowed: 'reference', 'aligned', 'both'")
        if self.select not in ("none", "cosine", "knn"):
            raise ConfigError(f"select is {self.select!r}; allowed: 'none', 'cosine', 'knn'")
        if not isinstance(self.positions, Positions):
            raise ConfigError(f"positions is a {type(self.positions).__name__}; give Positions(...)")
        require_finite("threshold", self.threshold)
        self._check_stages()
        self._check_examples()

    @classmethod
    def from_directions(
        cls,
        directions: Mapping[int, Tensor],
        *,
        op: str | Sequence[str],
        alpha: float | Sequence[float] = 1.0,
        target: float | Sequence[float] = 0.0,
        tap: str = "mlp_out",
        norm: str = "none",
        order: Literal["sequential", "orthonormal"] = "sequential",
        positions: Positions | None = None,
        model: ModelIdentity | None = None,
    ) -> AlignEZ:
        """One operation along directions of your own.

        Args:
            directions: by layer, counted from 0: [k, hidden_size] or [hidden_size], any float dtype; made unit length.
            op, alpha, target: one for all directions of a layer, or one each: "project" takes the share alpha of the component
                away, "boost" adds it again, "set" moves it to target, "add" adds alpha, "tanh" adds alpha tanh(component).
            norm: "none", "preserve" (an edited row keeps its length) or "cap" (it does not grow).
            order: "orthonormal" replaces a layer's directions by an orthonormal basis of their span.

        Raises:
            ConfigError: as the class.
        """
        stages = []
        for layer, given in sorted(directions.items()):
            vectors = _unit(given, f"directions[{layer}]", order)
            k = len(vectors)
            stage = Stage(
                vectors, _each("op", op, k), _each("alpha", alpha, k), _each("target", target, k), norm  # type: ignore[arg-type]
            )  # fmt: skip
            stages.append((Site(layer, tap), stage))  # type: ignore[arg-type]
        return cls(stages=tuple(stages), positions=positions or Positions(), model=model)

    # ---- made, kept and put elsewhere: imported when called, since these modules are built on this one ------------------
    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        strength: float = 1.0,
        on: Half = "reference",
        judge: bool = False,
        force: bool = False,
    ) -> AlignEZ:
        """Read a file of `save` or `raindecode fit-edit`, or a GGUF control vector. Arguments: see the class.

        Raises:
            EditFileError: there is no such file, or it is damaged or of another kind.
            ConfigError: an argument is not allowed.
        """
        from raindecode.policy.alignez.files import load_edit

        return replace(load_edit(path), strength=strength, on=on, judge=judge, force=force)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, or a GGUF control vector where the name ends in .gguf.

        Raises:
            EditFileError: it cannot be written. ConfigError: a control vector cannot say what this edit does.
        """
        from raindecode.policy.alignez.files import export_control_vector, save_edit

        if Path(path).suffix == ".gguf":
            export_control_vector(self, path)
        else:
            save_edit(self, path)

    @classmethod
    def fit(
        cls, decoder: Any, pairs: Sequence[Any], preset: str = "svd", *, progress: bool | None = None, **settings: Any
    ) -> AlignEZ:
        """Find directions in what the decoder's reference model makes of pairs of answers.

        Args:
            pairs: of `generate_pairs` or `read_pairs`.
            preset: "svd", "ccs", "svd-knn", "svd-diff" (the published variants), "mean-diff" or "logistic" (baselines).
            settings: of FitSettings, in the place of the preset's: tap, pool, layers, alpha, positions and more.

        Raises:
            FitError: the pairs give no directions. ConfigError: a setting is outside what is allowed.
        """
        from raindecode.policy.alignez.fit import fit, from_mapping
        from raindecode.policy.alignez.presets import preset as named

        return fit(decoder, pairs, from_mapping(named(preset), settings), progress)

    @staticmethod
    def generate_pairs(decoder: Any, questions: Sequence[str], **options: Any) -> PairSet:
        """Have the model say what helpful and harmful answers are like, and give both. Options: see generate.generate_pairs."""
        from raindecode.policy.alignez.generate import generate_pairs

        return generate_pairs(decoder, questions, **options)

    def bake(self, decoder: Any, folder: str | Path) -> Path:
        """Write the decoder's reference model with a linear edit in its weights, as a plain transformers checkpoint.

        Raises: see bake.bake.
        """
        from raindecode.policy.alignez.bake import bake

        return bake(self, decoder.engine.runner.model, folder, decoder.codec.tokenizer)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Places that are edited."""
        return tuple(dict.fromkeys([*(site for site, _ in self.stages), *self.examples]))

    @property
    def hidden_size(self) -> int:
        """Elements of a hidden state."""
        return self.stages[0][1].directions.shape[1] if self.stages else next(iter(self.examples.values()))[0].shape[1]

    @property
    def needs_query(self) -> bool:
        """Whether what is done depends on the prompt."""
        return self.select != "none"

    @property
    def is_linear(self) -> bool:
        """Whether every edit is an affine function of the hidden state, the same for all requests."""
        return self.select == "none" and all(
            stage.norm == "none" and "tanh" not in stage.ops for _, stage in self.stages
        )

    def scaled(self, strength: float) -> AlignEZ:
        """The same with its strength multiplied."""
        return replace(self, strength=self.strength * strength)

    @cached_property
    def name(self) -> str:
        """A fingerprint of everything that decides what is done to a row; equal edits have equal names in every process."""
        digest = hashlib.sha256(repr((self.select, self.threshold, self.neighbours, self.recipe)).encode())
        for site, stage in self.stages:
            digest.update(repr((*site, stage.ops, stage.alphas, stage.targets, stage.norm)).encode())
            digest.update(stage.directions.numpy().tobytes())
        for site, examples in self.examples.items():
            digest.update(repr(site).encode())
            for states in examples:
                digest.update(states.contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def resolve(self, query: Mapping[Site, Tensor] | None = None) -> list[tuple[Site, Stage]]:
        """What one request does, strength included; operations of strength 0 are left out.

        Args:
            query: the prompt's last hidden state at every site [hidden_size], where `needs_query`.
        """
        if not self.strength:
            return []
        made = [(site, self._resolved(site, stage, query)) for site, stage in self.stages]
        if self.select == "knn":
            assert query is not None
            made = [(site, stage) for site in self.examples for stage in self._neighbourly(site, query[site])]
        return [(site, stage) for site, stage in made if any(stage.alphas)]

    def _resolved(self, site: Site, stage: Stage, query: Mapping[Site, Tensor] | None) -> Stage:
        alphas = tuple(self.strength * alpha for alpha in stage.alphas)
        if self.select == "cosine":
            assert query is not None
            keep = cosine_filter(query[site], stage.directions, threshold=self.threshold).tolist()
            alphas = tuple(alpha if kept else 0.0 for alpha, kept in zip(alphas, keep, strict=True))
        basis = self.name if self._shares(site) else ""
        return replace(stage, alphas=alphas, basis=basis)

    def _neighbourly(self, site: Site, query: Tensor) -> list[Stage]:
        examples = self.examples[site]
        near = nearest(query, examples.queries, self.neighbours)
        stages = []
        for group, op, alpha in self.recipe:
            rows = getattr(examples, group)[near]
            direction = svd_group(rows[None]).vectors[0].float()
            stages.append(Stage(direction, (op,), (self.strength * alpha,), (0.0,)))  # type: ignore[arg-type]
        return stages

    def _shares(self, site: Site) -> bool:
        """Whether the directions of a site are held once for all requests: many, orthonormal, and one operation only."""
        return self._shared[site]

    @cached_property
    def _shared(self) -> dict[Site, bool]:
        shared: dict[Site, bool] = {}
        for site, stage in self.stages:
            u = stage.directions.double()
            many = len(u) >= _SHARED_FROM and site not in shared
            shared[site] = many and bool(((u @ u.T) - torch.eye(len(u))).abs().max() < _ORTHONORMAL)
        return shared

    def _check_stages(self) -> None:
        sizes = {stage.directions.shape[-1] for _, stage in self.stages}
        sizes |= {states.shape[-1] for examples in self.examples.values() for states in examples}
        if len(sizes) != 1:
            given = f"hidden sizes {sorted(sizes)}" if sizes else "no directions"
            raise ConfigError(f"an edit was made of {given}; give directions of one hidden size")
        for site, stage in self.stages:
            where = f"layer {site.layer}"
            if site.tap not in TAPS or not is_whole(site.layer) or site.layer < 0:
                raise ConfigError(f"an edit names {site.tap!r} of {where}; allowed: {', '.join(TAPS)}; layers from 0")
            u = stage.directions
            if u.dtype != torch.float32 or u.dim() != 2 or not bool(torch.isfinite(u).all()):
                raise ConfigError(f"the directions of {where} must be finite float32 [k, hidden_size]")
            if not 1 <= len(u) <= MAX_DIRECTIONS:
                raise ConfigError(f"{where} has {len(u)} directions; allowed: 1 to {MAX_DIRECTIONS}")
            if not len(u) == len(stage.ops) == len(stage.alphas) == len(stage.targets):
                raise ConfigError(f"{where} has {len(u)} directions and another number of operations: give one each")
            if any(op not in OPS for op in stage.ops) or stage.norm not in NORMS:
                raise ConfigError(
                    f"{where} has operations {stage.ops}, norm {stage.norm!r}; allowed: {', '.join(OPS)}; {', '.join(NORMS)}"
                )
            for number in (*stage.alphas, *stage.targets):
                require_finite(f"a strength or target of {where}", number)

    def _check_examples(self) -> None:
        if (self.select == "knn") != bool(self.examples) or bool(self.examples) != bool(self.recipe):
            raise ConfigError("examples and a recipe belong to select='knn', and to nothing else")
        if self.select != "knn":
            return
        fewest = min(len(examples.queries) for examples in self.examples.values())
        if not is_whole(self.neighbours) or not 1 <= self.neighbours <= fewest:
            raise ConfigError(f"neighbours is {self.neighbours}; allowed: 1 to {fewest}, the number of examples")
        for group, op, alpha in self.recipe:
            if group not in ("helpful", "harmful") or op not in OPS:
                raise ConfigError(f"the recipe names {op!r} of {group!r}; allowed: {', '.join(OPS)}; helpful, harmful")
            require_finite("a strength of the recipe", alpha)


def _each(name: str, value: object, k: int) -> tuple[object, ...]:
    given = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * k
    if len(given) != k:
        raise ConfigError(f"{name} has {len(given)} values for {k} directions; give one, or one per direction")
    return tuple(float(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in given)


def _unit(given: Tensor, name: str, order: str) -> Tensor:
    """[k, d] float32 of length 1."""
    if not isinstance(given, Tensor) or not given.is_floating_point() or given.dim() not in (1, 2) or not given.numel():
        raise ConfigError(f"{name} is {_shape(given)}; give a float tensor [k, hidden_size] or [hidden_size]")
    vectors = given.detach().to("cpu", torch.float64).reshape(-1, given.shape[-1])
    lengths = vectors.norm(dim=-1, keepdim=True)
    if not bool(torch.isfinite(lengths).all()) or not bool((lengths > 0).all()):
        raise ConfigError(f"{name} holds a zero or non-finite vector; give directions with a length")
    vectors = vectors / lengths
    if order == "orthonormal":
        q, r = torch.linalg.qr(vectors.T)
        kept = r.diagonal().abs() > 1e-5
        vectors = (q * r.diagonal().sign()).T[kept].contiguous()
    elif order != "sequential":
        raise ConfigError(f"order is {order!r}; allowed: 'sequential', 'orthonormal'")
    unit: Tensor = vectors.float()
    return unit


def _shape(given: object) -> str:
    return f"a {given.dtype} tensor {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
