"""Tables of edits at fixed addresses: what each slot does to a hidden state. Slot 0 edits nothing, always."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from rainkernels._checks import FLOATS, check_choice, check_int, check_real, check_tensor
from rainkernels.errors import DtypeError, RangeError, ShapeError
from rainkernels.reference.edits import NORMS, OPS

__all__ = ["MAX_DIRECTIONS", "BasisTable", "EditTable", "Norm", "Op"]

Op = Literal["project", "boost", "set", "add", "tanh"]
Norm = Literal["none", "preserve", "cap"]
# The cpu lane keeps a row's coefficients on its stack.
MAX_DIRECTIONS = 256
_PerDirection = float | Sequence[float] | Tensor


@dataclass(frozen=True, eq=False)
class EditTable:
    """Private directions of every slot; an edit runs them one after the other, each on what the ones before left.

    With unit directions u_j = scale_j * directions_j and c_j = <h, u_j> of the row as edited so far, h += b_j u_j where

        project  b = -alpha c             1 removes the component, 2 mirrors it
        boost    b =  alpha c             1 doubles it
        set      b =  alpha (target - c)
        add      b =  alpha
        tanh     b =  alpha tanh(c)

    Slots are written by `set_slot`, in stream order on cuda, into the same memory: a captured CUDA graph sees the change.
    Do not rewrite a slot that a running request uses. Kernels clamp `count` and take an unknown code as no edit, so no
    content of these tensors leads out of them.

    Tensors, all contiguous on one device (S slots, k = max_directions, d = hidden_size):
        directions [S, k, d] float32 | bfloat16 | float16;  scale [S, k] float32, 1 / length of the stored direction
        gram       [S, k, k] float32, <u_i, u_j>;  op [S, k] int32;  alpha, target [S, k] float32
        count      [S] int32, directions in use;  norm [S] int32
    Raises:
        DeviceError, DtypeError, ShapeError, StrideError: naming the tensor.
    """

    directions: Tensor
    scale: Tensor
    gram: Tensor
    op: Tensor
    alpha: Tensor
    target: Tensor
    count: Tensor
    norm: Tensor
    _calls: dict[object, tuple[int, int, int]] = field(default_factory=dict, repr=False)  # signatures of checked calls

    def __post_init__(self) -> None:
        check_tensor("directions", self.directions, dtype=FLOATS, shape=(None, None, None))
        s, k, _ = self.directions.shape
        _check_sizes("directions", self.directions, s, k)
        _check_table(self, {"scale": (s, k), "gram": (s, k, k), "op": (s, k), "alpha": (s, k), "target": (s, k)})
        _check_table(self, {"count": (s,), "norm": (s,)})
        object.__setattr__(self, "_calls", {})

    @classmethod
    def create(
        cls,
        num_slots: int,
        max_directions: int,
        hidden_size: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> EditTable:
        """An empty table. `num_slots` counts slot 0; `dtype` is that of the stored directions.

        Raises:
            RangeError: a size is not positive, or max_directions is above MAX_DIRECTIONS.
            DtypeError: a size is no int, or dtype is not float32, bfloat16 or float16.
        """
        for name, size in (("num_slots", num_slots), ("max_directions", max_directions), ("hidden_size", hidden_size)):
            check_int(name, size, 1, MAX_DIRECTIONS if name == "max_directions" else (1 << 31) - 1)
        _check_float("dtype", dtype)
        pairs = (num_slots, max_directions)
        with torch.inference_mode(False):  # a table made inside inference mode can be changed outside it
            return cls(
                directions=torch.zeros((*pairs, hidden_size), dtype=dtype, device=device),
                scale=torch.zeros(pairs, dtype=torch.float32, device=device),
                gram=torch.zeros((*pairs, max_directions), dtype=torch.float32, device=device),
                op=torch.zeros(pairs, dtype=torch.int32, device=device),
                alpha=torch.zeros(pairs, dtype=torch.float32, device=device),
                target=torch.zeros(pairs, dtype=torch.float32, device=device),
                count=torch.zeros(num_slots, dtype=torch.int32, device=device),
                norm=torch.zeros(num_slots, dtype=torch.int32, device=device),
            )

    @property
    def num_slots(self) -> int:
        """Slots, slot 0 included."""
        return self.directions.shape[0]

    @property
    def max_directions(self) -> int:
        """Directions a slot can hold."""
        return self.directions.shape[1]

    @property
    def hidden_size(self) -> int:
        """Elements of a row."""
        return self.directions.shape[2]

    def set_slot(
        self,
        slot: int,
        directions: Tensor,
        *,
        op: Op | Sequence[Op],
        alpha: _PerDirection,
        target: _PerDirection = 0.0,
        order: Literal["sequential", "orthonormal"] = "sequential",
        norm: Norm = "none",
        tolerance: float = 1e-5,
    ) -> int:
        """Fill a slot and return how many directions it has now.

        Args:
            directions: [k, d] any float dtype and device; made unit length, rounded to the table's dtype
            op, alpha, target: one for all, or one per direction; alpha 0 makes a direction do nothing
            order: "orthonormal" replaces the directions by an orthonormal basis of their span (each less what the earlier
                ones hold of it) and drops those that leave less than `tolerance` of their length, zero vectors included
            norm: "preserve" rescales an edited row to its old length, "cap" only where it grew
        Raises:
            DtypeError, ShapeError, RangeError: naming the argument. A zero vector is refused in sequential order, anything
            infinite or NaN always. Nothing is written then.
        """
        slot = _check_slot(slot, self.num_slots)
        vectors = _vectors("directions", directions, self.hidden_size)
        k = vectors.shape[0]
        check_choice("order", order, ("sequential", "orthonormal"))
        check_real("tolerance", tolerance, "it must be in [0, 1): a share of a direction's length", signed=True)
        if not 0 <= tolerance < 1:
            raise RangeError(f"tolerance is {tolerance}, it must be in [0, 1): a share of a direction's length")
        codes, strengths, targets, mode = _rule(op, alpha, target, norm, k)
        if order == "orthonormal":
            vectors, kept = _orthonormal(vectors, float(tolerance))
            codes, strengths, targets = codes[kept], strengths[kept], targets[kept]
            k = vectors.shape[0]
        if k > self.max_directions:
            raise ShapeError(f"directions has {k} vectors, the table holds {self.max_directions} per slot")
        stored, scale = _stored("directions", vectors, self.directions.dtype)
        unit = stored.double() * scale[:, None]
        # Nothing is live while it is written: a kernel queued in between on another stream sees no edit, not half of one.
        self.count[slot] = 0
        for tensor, value in (
            (self.directions, stored), (self.scale, scale), (self.op, codes), (self.alpha, strengths), (self.target, targets),
        ):  # fmt: skip
            tensor[slot, :k].copy_(value)
        self.gram[slot, :k, :k].copy_(unit @ unit.T)
        self.norm[slot] = mode
        self.count[slot] = k
        return k

    def clear_slot(self, slot: int) -> None:
        """Make the slot edit nothing. RangeError: no such slot, or slot 0."""
        self.count[_check_slot(slot, self.num_slots)] = 0

    def reference_arguments(self) -> dict[str, Tensor | None]:
        """Keyword arguments of `rainkernels.reference.edits.edit`."""
        names = ("directions", "scale", "op", "alpha", "target", "norm", "count")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, eq=False)
class BasisTable:
    """One basis for all slots and a strength per slot and direction; alpha 0 leaves a direction out.

    One shot: every component c_j is taken from the unedited row, h' = h + sum_j f_j(c_j) u_j. For an orthonormal basis
    this is the sequential edit exactly; for any other basis it is not (overlapping projections remove too much).
    Ops, norm and the rules for changing a slot are those of EditTable.

    Tensors, all contiguous on one device (S slots, r directions, d = hidden_size):
        basis [r, d] float32 | bfloat16 | float16;  scale [r] float32, 1 / length of the stored direction
        op [S, r] int32;  alpha, target [S, r] float32, all 0 in slot 0;  norm [S] int32
    Raises:
        DeviceError, DtypeError, ShapeError, StrideError: naming the tensor.
    """

    basis: Tensor
    scale: Tensor
    op: Tensor
    alpha: Tensor
    target: Tensor
    norm: Tensor
    _calls: dict[object, tuple[int, int, int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_tensor("basis", self.basis, dtype=FLOATS, shape=(None, None))
        check_tensor("alpha", self.alpha, dtype=torch.float32, shape=(None, None), device=self.basis.device)
        s, r = self.alpha.shape[0], self.basis.shape[0]
        _check_sizes("basis", self.basis, s, r)
        _check_table(self, {"scale": (r,), "op": (s, r), "alpha": (s, r), "target": (s, r), "norm": (s,)})
        object.__setattr__(self, "_calls", {})

    @classmethod
    def create(
        cls,
        num_slots: int,
        basis: Tensor,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> BasisTable:
        """A table without edits over `basis` [r, d] (any float dtype; made unit length, rounded to `dtype`).

        Raises:
            DtypeError, ShapeError, RangeError: naming the argument; zero and non-finite vectors are refused.
        """
        check_int("num_slots", num_slots, 1)
        _check_float("dtype", dtype)
        with torch.inference_mode(False):
            stored, scale = _stored("basis", _vectors("basis", basis, None), dtype)
            pairs = (num_slots, stored.shape[0])
            return cls(
                basis=stored.to(device),
                scale=scale.to(device, torch.float32),
                op=torch.zeros(pairs, dtype=torch.int32, device=device),
                alpha=torch.zeros(pairs, dtype=torch.float32, device=device),
                target=torch.zeros(pairs, dtype=torch.float32, device=device),
                norm=torch.zeros(num_slots, dtype=torch.int32, device=device),
            )

    @property
    def num_slots(self) -> int:
        """Slots, slot 0 included."""
        return self.alpha.shape[0]

    @property
    def max_directions(self) -> int:
        """Directions of the basis."""
        return self.basis.shape[0]

    @property
    def hidden_size(self) -> int:
        """Elements of a row."""
        return self.basis.shape[1]

    def set_slot(
        self,
        slot: int,
        *,
        alpha: _PerDirection,
        op: Op | Sequence[Op] = "tanh",
        target: _PerDirection = 0.0,
        norm: Norm = "none",
    ) -> None:
        """Fill a slot; `op`, `alpha` and `target` are one for all or one per direction of the basis.

        Raises:
            DtypeError, ShapeError, RangeError: naming the argument. Nothing is written then.
        """
        slot, r = _check_slot(slot, self.num_slots), self.max_directions
        codes, strengths, targets, mode = _rule(op, alpha, target, norm, r)
        self.alpha[slot] = 0
        self.op[slot].copy_(codes)
        self.target[slot].copy_(targets)
        self.norm[slot] = mode
        self.alpha[slot].copy_(strengths)

    def clear_slot(self, slot: int) -> None:
        """Make the slot edit nothing. RangeError: no such slot, or slot 0."""
        self.alpha[_check_slot(slot, self.num_slots)] = 0

    def reference_arguments(self) -> dict[str, Tensor | None]:
        """Keyword arguments of `rainkernels.reference.edits.edit`."""
        names = ("scale", "op", "alpha", "target", "norm")
        return {"directions": self.basis, "count": None} | {name: getattr(self, name) for name in names}


def _check_table(table: EditTable | BasisTable, shapes: dict[str, tuple[int, ...]]) -> None:
    device = getattr(table, fields(table)[0].name).device
    for name, shape in shapes.items():
        dtype = torch.int32 if name in ("op", "count", "norm") else torch.float32
        check_tensor(name, getattr(table, name), dtype=dtype, shape=shape, device=device)


def _check_sizes(name: str, t: Tensor, num_slots: int, directions: int) -> None:
    if not (1 <= directions <= MAX_DIRECTIONS and num_slots >= 1 and t.shape[-1] >= 1):
        raise ShapeError(
            f"{name} has shape {list(t.shape)}: a table needs 1 slot or more, 1..{MAX_DIRECTIONS} directions and a row size"
        )


def _check_float(name: str, dtype: object) -> None:
    if dtype not in FLOATS:
        raise DtypeError(f"{name} is {dtype}, allowed: {', '.join(map(str, FLOATS))}")


def _check_slot(slot: int, num_slots: int) -> int:
    check_int("slot", slot, 1, num_slots - 1, "slot 0 edits nothing, always")
    return slot


def _vectors(name: str, t: Tensor, hidden_size: int | None) -> Tensor:
    """float64 on the cpu, finite."""
    if not isinstance(t, Tensor) or not t.dtype.is_floating_point:
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise DtypeError(f"{name} must be a float tensor [k, d], got {got}")
    check_tensor(name, t.resolve_neg(), contiguous=False)
    if t.dim() != 2 or t.shape[1] == 0 or (hidden_size is not None and t.shape[1] != hidden_size):
        raise ShapeError(f"{name} has shape {list(t.shape)}, expected [k, {hidden_size or 'hidden_size'}]")
    vectors = t.detach().to("cpu", torch.float64)
    wrong = ~torch.isfinite(vectors)
    if bool(wrong.any()):
        raise RangeError(f"{name}[{int(wrong.nonzero()[0, 0])}] holds an infinity or NaN")
    return vectors


def _stored(name: str, vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit vectors rounded to `dtype`, and the float64 factors that make what was stored unit length again."""
    # Divided by the largest entry first: the squares of subnormal or huge vectors would leave the range.
    largest = vectors.abs().amax(-1, keepdim=True) if vectors.numel() else vectors.new_zeros((vectors.shape[0], 1))
    if not bool((largest > 0).all()):
        at = int((largest[:, 0] == 0).nonzero()[0])
        raise RangeError(f"{name}[{at}] is the zero vector, which is no direction: leave it out")
    vectors = (vectors / largest).contiguous()  # columns of a transposed matrix may have been given
    stored = (vectors / vectors.norm(dim=-1, keepdim=True)).to(torch.float32).to(dtype)
    # Rounded to float32 here, so that the Gram matrix belongs to the very factors the kernels use.
    return stored, (1.0 / stored.double().norm(dim=-1)).to(torch.float32).double()


def _orthonormal(vectors: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Gram-Schmidt, twice per vector (enough for float64), and the indices of the vectors that were kept."""
    basis: list[Tensor] = []
    kept: list[int] = []
    for j, v in enumerate(vectors):
        largest = v.abs().max()
        if largest == 0:
            continue
        left = v / largest
        left = left / left.norm()
        if basis:
            q = torch.stack(basis)
            left = left - q.T @ (q @ left)
            if left.norm() <= tolerance:
                continue
            left = left - q.T @ (q @ left)
        basis.append(left / left.norm())
        kept.append(j)
    empty = vectors.new_zeros((0, vectors.shape[1]))
    return (torch.stack(basis) if basis else empty), torch.tensor(kept, dtype=torch.long)


def _rule(
    op: Op | Sequence[Op], alpha: _PerDirection, target: _PerDirection, norm: object, k: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Codes, strengths, targets [k] and the norm's code."""
    names = [op] * k if isinstance(op, str) else list(op) if isinstance(op, Sequence) else [op]
    for name in names:
        if not isinstance(name, str):
            raise DtypeError(f"op must be a name or a list of names, got {type(name).__name__}")
    if len(names) != k:
        raise ShapeError(f"op has {len(names)} names for {k} directions: give one, or one per direction")
    for name in names:
        check_choice("op", name, OPS)
    check_choice("norm", norm, NORMS)
    codes = torch.tensor([OPS.index(name) for name in names], dtype=torch.int32)
    return codes, _per_direction("alpha", alpha, k), _per_direction("target", target, k), NORMS.index(str(norm))


def _per_direction(name: str, value: _PerDirection, k: int) -> Tensor:
    """[k] float32 on the cpu."""
    try:
        t = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        t = t.to_dense() if t.layout != torch.strided else t
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise DtypeError(f"{name} must be a number or one number per direction, got {type(value).__name__}") from error
    if t.dim() > 1 or (t.dim() == 1 and t.shape[0] != k):
        raise ShapeError(f"{name} has shape {list(t.shape)} for {k} directions: give one number, or one per direction")
    t = t.detach().expand(k).to(torch.float32)
    if not all(math.isfinite(v) for v in t.tolist()):
        raise RangeError(f"{name} is {value!r}, every number must be finite in float32")
    return t
