"""Edits of hidden states as the engine takes them: where, what, and from which position on. Plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias

from torch import Tensor

Tap = Literal["attn_out", "mlp_out", "block_out"]
Op = Literal["project", "boost", "set", "add", "tanh"]
Norm = Literal["none", "preserve", "cap"]
TAPS: Final[tuple[Tap, ...]] = ("attn_out", "mlp_out", "block_out")
"""Output of a layer's attention, of its feed-forward part, and the residual stream behind the layer, in running order."""
OPS: Final[tuple[Op, ...]] = ("project", "boost", "set", "add", "tanh")
NORMS: Final[tuple[Norm, ...]] = ("none", "preserve", "cap")


class Site(NamedTuple):
    """A place in a model; `layer` counts from 0."""

    layer: int
    tap: Tap


@dataclass(frozen=True, eq=False)
class Stage:
    """One operation h' = h + sum_j b_j u_j at a site (see rainkernels' EditTable for b_j).

    Attributes:
        directions: [k, hidden_size] float32 on the cpu, of length 1.
        ops, alphas, targets: one per direction.
        norm: what becomes of the length of the row once all directions are done.
        basis: name of the directions where many requests use the same orthonormal ones with strengths of their own; they are
            held once then. "" for directions of this stage alone.
    """

    directions: Tensor
    ops: tuple[Op, ...]
    alphas: tuple[float, ...]
    targets: tuple[float, ...]
    norm: Norm = "none"
    basis: str = ""


@dataclass(frozen=True, eq=False)
class RowEdit:
    """Everything that is done to one token row.

    Attributes:
        name: a fingerprint: equal names mean equal edits, in every process.
        stages: by model of the decoder (0 for the reference), in the order they run at each site.
    """

    name: str
    stages: Mapping[int, Sequence[tuple[Site, Stage]]]


Schedule: TypeAlias = "tuple[tuple[int, RowEdit | None], ...]"
"""Positions, ascending, from each of which on rows are edited like that; rows before the first are not edited."""


class EditPlan(Protocol):
    """What one request asks to be edited."""

    @property
    def queries(self) -> Mapping[int, Sequence[Site]]:
        """Places at which the last hidden state of the unedited prompt decides what is edited, by model."""
        ...

    def schedule(self, prompt_length: int, states: Mapping[int, Mapping[Site, Tensor]]) -> tuple[Schedule, Schedule]:
        """Edits of the request's rows, and those of the rows of a model that judges its answers.

        Args:
            states: for every query [hidden_size] float32.
        """
        ...


@dataclass(frozen=True)
class ModelIdentity:
    """What a model is recognised by, loaded in float32 or in bfloat16.

    Attributes:
        architecture: transformers' model type.
        num_layers, hidden_size: its form.
        fingerprint: hash of a sample of every parameter.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    fingerprint: str
