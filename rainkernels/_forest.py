"""Storage of batched search trees: configuration, fields, growth. The ops on them are in `rainkernels.ops.tree`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rainkernels._checks import check_int, check_real, check_tensor
from rainkernels._forest_checks import check_contents
from rainkernels._lanes import native
from rainkernels.errors import DtypeError, RangeError, ShapeError

LEAF = 0
NEED_CHILD = 1
OVERFLOW = -1
NONE = -1
PINNED_ROW = -2
MAX_CHILDREN = 32
BLOCK = 64
HEADER_SIZE = 4
HEADER_ROOT, HEADER_FREE_ROWS, HEADER_FREE_EMBEDDINGS, HEADER_IN_FLIGHT = range(HEADER_SIZE)

# Name and kind of each field, in the order of TreeField in csrc/include/rainkernels/tree.h.
FIELDS: tuple[tuple[str, str], ...] = (
    ("visits", "slot real"),
    ("values", "slot real"),
    ("priors", "slot real"),
    ("direct_visits", "slot int"),
    ("in_flight", "slot int"),
    ("child_row", "slot int"),
    ("embedding_of", "slot int"),
    ("owner", "row int"),
    ("count", "row int"),
    ("set_length", "row int"),
    ("free_rows", "free row int"),
    ("free_embeddings", "embedding int"),
    ("bounds", "bounds real"),
    ("header", "header int"),
    ("means", "mean float"),
    ("tails", "tail float"),
)


class Selection(NamedTuple):
    """Where each descent ended. `path[i, :depth[i] + 1]` are the slots from the root to `node[i]`, then -1."""

    status: Tensor  # [n] int32, LEAF | NEED_CHILD
    node: Tensor  # [n] int32, slot
    path: Tensor  # [n, max_depth] int32
    depth: Tensor  # [n] int32, edges from the root


class BestChild(NamedTuple):
    """The most visited child of each root; slot -1 and zeros where the root has no children."""

    slot: Tensor  # [n] int32
    visits: Tensor  # [n] forest dtype
    direct_visits: Tensor  # [n] int32
    value: Tensor  # [n] forest dtype


class NodeStats(NamedTuple):
    """Statistics of some slots of one tree."""

    slots: Tensor  # [m] int32
    visits: Tensor  # [m] forest dtype, direct visits plus similarity credit
    direct_visits: Tensor  # [m] int32
    values: Tensor  # [m] forest dtype
    priors: Tensor  # [m] forest dtype


@dataclass(frozen=True)
class TreeConfig:
    """Sizes and constants of a forest. The defaults are RAIN's (HH preset of the official code).

    Raises:
        DtypeError, RangeError: a field of the wrong type or outside its range; the message names it.
    """

    max_rows: int = 128  # expansions alive in one tree
    max_children: int = 20  # slots per expansion, at most 32; also the cap of dynamic children
    max_embeddings: int = 128  # visited nodes alive in one tree
    embedding_dim: int = 384
    max_depth: int = 64  # slots on the longest path, root included
    c_puct: float = 2.0
    similarity_weight: float = 0.2
    similarity_threshold: float = 0.95
    root_prior_mix: float = 0.25  # p -> (1 - mix) p + mix / k at the root
    dynamic_variance: float = 0.03  # times the token-set length of the first child
    dynamic_value: float = 0.0
    dynamic_children: bool = True
    similarity: bool = True

    def __post_init__(self) -> None:
        sizes = {
            "max_rows": (1, 2**24), "max_children": (1, MAX_CHILDREN), "max_embeddings": (0, 2**24),
            "embedding_dim": (1, 2**16), "max_depth": (1, 2**16),
        }  # fmt: skip
        constants = {
            "c_puct": (0.0, 1e6), "similarity_weight": (0.0, 1e6), "similarity_threshold": (-1.0, 1.0),
            "root_prior_mix": (0.0, 1.0), "dynamic_variance": (0.0, 1e6), "dynamic_value": (-1e6, 1e6),
        }  # fmt: skip
        for name, (least, most) in sizes.items():
            check_int(f"TreeConfig.{name}", getattr(self, name), least, most)
        for name, (low, high) in constants.items():
            value, allowed = getattr(self, name), f"allowed: {low} to {high}"
            check_real(f"TreeConfig.{name}", value, allowed, signed=True)
            if not low <= value <= high:
                raise RangeError(f"TreeConfig.{name} is {value}, {allowed}")
        for name in ("dynamic_children", "similarity"):
            if not isinstance(getattr(self, name), bool):
                raise DtypeError(f"TreeConfig.{name} must be True or False, got {type(getattr(self, name)).__name__}")

    @property
    def num_rows(self) -> int:
        """Rows per tree, with row 0 that only holds the first root."""
        return self.max_rows + 1

    @property
    def num_slots(self) -> int:
        """Slots per tree; slot = row * max_children + k."""
        return self.num_rows * self.max_children

    @property
    def num_blocks(self) -> int:
        """Blocks of 64 dims in an embedding."""
        return -(-self.embedding_dim // BLOCK)

    def as_floats(self) -> list[float]:
        """All fields in order, for the schema of the registered ops."""
        return [float(v) for v in astuple(self)]

    @classmethod
    def from_floats(cls, values: Sequence[float]) -> TreeConfig:
        """Inverse of `as_floats`. ShapeError: not one number per field; DtypeError, RangeError: as TreeConfig."""
        names = fields(cls)
        if len(values) != len(names):
            raise ShapeError(f"config has {len(values)} numbers, a TreeConfig has {len(names)} fields")
        named: dict[str, Any] = {}
        for f, v in zip(names, values, strict=True):
            # What is no whole number stays as it is, for the checks to refuse.
            whole = isinstance(v, float) and v.is_integer()
            named[f.name] = (
                int(v) if whole and f.type == "int" else v == 1.0 if v in (0.0, 1.0) and f.type == "bool" else v
            )
        return cls(**named)

    def field_shape(self, kind: str) -> tuple[int, ...]:
        """Shape of one tree's part of a field of this kind."""
        return {
            "slot": (self.num_slots,),
            "row": (self.num_rows,),
            "free row": (self.max_rows,),
            "embedding": (self.max_embeddings,),
            "bounds": (2,),
            "header": (HEADER_SIZE,),
            "mean": (self.max_embeddings, self.embedding_dim),
            "tail": (self.max_embeddings, self.num_blocks),
        }[kind]


class Forest:
    """`num_trees` search trees as a struct of arrays, one contiguous tensor `[num_trees, ...]` per field.

    Each expansion owns a row of `max_children` slots; a node is named by its slot, `row * max_children + k`. A new tree's
    root is slot 0. Slots stay valid across re-rooting and growing, so they can key caches kept elsewhere.

    Forest(config, tensors) takes over tensors of another forest of that config and checks their contents (on cuda this
    waits for the stream, and is left out during stream capture); `create`, `clone` and `grown` need no such check.

    Raises:
        DeviceError, DtypeError, ShapeError, StrideError, RangeError: naming the field.
    """

    def __init__(self, config: TreeConfig, tensors: Sequence[Tensor]) -> None:
        self._adopt(config, tensors)
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        check_contents(
            {name: t for (name, _), t in zip(FIELDS, self.tensors, strict=True)},
            max_rows=config.max_rows,
            max_children=config.max_children,
            max_embeddings=config.max_embeddings,
            max_depth=config.max_depth,
            none=NONE,
            pinned=PINNED_ROW,
        )

    @classmethod
    def _trusted(cls, config: TreeConfig, tensors: Sequence[Tensor]) -> Forest:
        """A forest of tensors this class has made itself, whose contents need no check."""
        forest = cls.__new__(cls)
        forest._adopt(config, tensors)
        return forest

    def _adopt(self, config: TreeConfig, tensors: Sequence[Tensor]) -> None:
        if not isinstance(tensors, list | tuple):
            raise DtypeError(f"a forest's fields must be a list of tensors, got {type(tensors).__name__}")
        if len(tensors) != len(FIELDS):
            raise ShapeError(f"a forest has {len(FIELDS)} fields, got {len(tensors)}")
        self.config = config
        self.tensors: tuple[Tensor, ...] = tuple(tensors)
        visits = self.tensors[0]
        check_tensor(FIELDS[0][0], visits, shape=(None, config.num_slots))
        if visits.dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"a forest holds float32 or float64 values, got {visits.dtype}")
        self.num_trees = visits.shape[0]
        self.device = visits.device
        self.dtype = visits.dtype
        dtypes = {"real": self.dtype, "int": torch.int32, "float": torch.float32}
        for (name, kind), tensor in zip(FIELDS, self.tensors, strict=True):
            shape, dtype = kind.rsplit(" ", 1)
            full = (self.num_trees, *config.field_shape(shape))
            check_tensor(name, tensor, device=self.device, dtype=dtypes[dtype], shape=full)
        self._view: Any = None

    @classmethod
    def create(
        cls,
        num_trees: int,
        config: TreeConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Forest:
        """`num_trees` empty trees: a bare root each, visits 0, value 0.

        Raises:
            RangeError: `num_trees` < 1.
            DtypeError: `num_trees` is no int, `config` no TreeConfig, or `dtype` neither float32 nor float64.
        """
        check_int("num_trees", num_trees, 1)
        if not isinstance(config, TreeConfig):
            raise DtypeError(f"config must be a TreeConfig, got {type(config).__name__}")
        if dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"a forest holds float32 or float64 values, got {dtype}")
        dtypes = {"real": dtype, "int": torch.int32, "float": torch.float32}
        tensors = []
        for _, kind in FIELDS:
            shape, name = kind.rsplit(" ", 1)
            tensors.append(torch.zeros((num_trees, *config.field_shape(shape)), dtype=dtypes[name], device=device))
        forest = cls._trusted(config, tensors)
        forest._clear(torch.arange(num_trees, device=forest.device))
        return forest

    def field(self, name: str) -> Tensor:
        """The tensor of a field, `[num_trees, ...]`; see FIELDS. For reading: the ops alone may write.

        The ops follow the indices in it without looking, so what they do after a write through it is undefined.
        """
        names = [n for n, _ in FIELDS]
        if name not in names:
            raise RangeError(f"name is {name!r}, a forest's fields are {', '.join(names)}")
        return self.tensors[names.index(name)]

    def reset(self, tree_ids: Tensor) -> None:
        """Make trees `tree_ids` ([n] int32) empty again."""
        check_tensor("tree_ids", tree_ids, device=self.device, dtype=torch.int32, shape=(None,))
        if tree_ids.numel() and not (int(tree_ids.min()) >= 0 and int(tree_ids.max()) < self.num_trees):
            raise RangeError(f"tree_ids holds {tree_ids.tolist()}, allowed: 0 to {self.num_trees - 1}")
        self._clear(tree_ids.long())

    def free_rows(self) -> Tensor:
        """`[num_trees]` int32, how many more expansions fit."""
        return self.field("header")[:, HEADER_FREE_ROWS].clone()

    def free_embeddings(self) -> Tensor:
        """`[num_trees]` int32, how many more visited nodes fit."""
        return self.field("header")[:, HEADER_FREE_EMBEDDINGS].clone()

    def roots(self) -> Tensor:
        """`[num_trees]` int32, slot of each root."""
        return self.field("header")[:, HEADER_ROOT].clone()

    def clone(self) -> Forest:
        """An independent copy."""
        other = Forest.__new__(Forest)
        other.__dict__.update(self.__dict__, tensors=tuple(t.clone() for t in self.tensors), _view=None)
        return other

    def grown(
        self,
        *,
        num_trees: int | None = None,
        max_rows: int | None = None,
        max_embeddings: int | None = None,
        max_depth: int | None = None,
    ) -> Forest:
        """A bigger forest with the same contents and the same slots. It behaves as one created at that size.

        Raises:
            DtypeError: a size that is no int. RangeError: one smaller than the present one, or above TreeConfig's range.
        """
        now = self.config
        given = {"num_trees": num_trees, "max_rows": max_rows, "max_embeddings": max_embeddings, "max_depth": max_depth}
        sizes: dict[str, Any] = {name: size for name, size in given.items() if size is not None}
        for name, size in sizes.items():
            present = self.num_trees if name == "num_trees" else getattr(now, name)
            check_int(name, size, present, hint="a forest only grows")
        trees = sizes.pop("num_trees", self.num_trees)
        config = replace(now, **sizes)
        other = Forest.create(trees, config, device=self.device, dtype=self.dtype)
        for (name, _), old, new in zip(FIELDS, self.tensors, other.tensors, strict=True):
            # New ids go under the old stack, which keeps its order: free ids are used as if the size had always been this.
            added = new.shape[1] - old.shape[1] if name in ("free_rows", "free_embeddings") else 0
            new[(slice(0, self.num_trees), *(slice(added, added + s) for s in old.shape[1:]))] = old
        header = other.field("header")[: self.num_trees]
        header[:, HEADER_FREE_ROWS] += config.max_rows - now.max_rows
        header[:, HEADER_FREE_EMBEDDINGS] += config.max_embeddings - now.max_embeddings
        return other

    def native_view(self) -> Any:
        """The `_C.TreeForest` of these tensors, built once: the tensors never change their place."""
        if self._view is None:
            c = self.config
            self._view = native().TreeForest(
                [t.data_ptr() for t in self.tensors],
                [
                    self.num_trees,
                    c.num_rows,
                    c.max_children,
                    c.max_embeddings,
                    c.embedding_dim,
                    c.num_blocks,
                    c.max_depth,
                ],
                [
                    c.c_puct,
                    c.similarity_weight,
                    c.similarity_threshold,
                    c.root_prior_mix,
                    c.dynamic_variance,
                    c.dynamic_value,
                ],
                c.dynamic_children,
                c.similarity,
                self.dtype == torch.float64,
            )
        return self._view

    def _clear(self, ids: Tensor) -> None:
        c = self.config
        for name, value in (
            ("visits", 0), ("values", 0), ("priors", 0), ("direct_visits", 0), ("in_flight", 0), ("child_row", NONE),
            ("embedding_of", NONE), ("owner", NONE), ("count", 0), ("set_length", 0),
        ):  # fmt: skip
            self.field(name)[ids] = value
        self.field("owner")[ids, 0] = PINNED_ROW
        down = torch.arange(c.max_rows, 0, -1, dtype=torch.int32, device=self.device)
        self.field("free_rows")[ids] = down
        down = torch.arange(c.max_embeddings - 1, -1, -1, dtype=torch.int32, device=self.device)
        self.field("free_embeddings")[ids] = down
        self.field("bounds")[ids] = torch.tensor([-1.0, 1.0], dtype=self.dtype, device=self.device)
        header = [0, c.max_rows, c.max_embeddings, 0]
        self.field("header")[ids] = torch.tensor(header, dtype=torch.int32, device=self.device)
