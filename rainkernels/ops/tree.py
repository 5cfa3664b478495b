"""Batched PUCT trees for RAIN: select, expand, add_child, backup, best_child, reroot, on a `Forest`.

Item i of a call works on tree `tree_ids[i]`. A call checks every item before it changes anything, so it happens wholly or
not at all. Items of one tree are done in the order given; trees are independent. All floats that enter must be finite.
On cuda the checks run on the device and the error is fetched after the call; during stream capture it is not fetched, and a
call with a bad item then changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rainkernels._checks import check_tensor
from rainkernels._forest import (
    HEADER_ROOT,
    LEAF,
    NEED_CHILD,
    OVERFLOW,
    BestChild,
    Forest,
    NodeStats,
    Selection,
    TreeConfig,
)
from rainkernels._lanes import Lane, choose_lane, native
from rainkernels._tree_errors import ERROR_STRIDE, NO_ERROR, error_of_word
from rainkernels.errors import DtypeError, LaneError, RangeError
from rainkernels.reference import tree as reference

__all__ = [
    "LEAF",
    "NEED_CHILD",
    "OVERFLOW",
    "BestChild",
    "Forest",
    "NodeStats",
    "Selection",
    "TreeConfig",
    "add_child",
    "backup",
    "best_child",
    "children",
    "expand",
    "mark_in_flight",
    "node_stats",
    "reroot",
    "select",
    "unmark_in_flight",
]


def select(forest: Forest, tree_ids: Tensor, skip_node: Tensor | None = None) -> Selection:
    """Descend each tree by PUCT to a leaf, or to a node that should get one more child first. Changes nothing.

    At each inner node (RAIN's checkadd, before choosing among its children): if it has 2 to max_children - 1 children,
    all have an embedding, all values are below dynamic_value and the norm of the unbiased variance of their embeddings is
    below dynamic_variance * set_length, the descent stops with NEED_CHILD. Add the child with `add_child`, or not, and
    call again with `skip_node` = that node: the descent is repeated without asking at it or above it, and goes on below.

    score = qh + c_puct * p * sqrt(n_parent + O_parent) / (1 + n + O); qh = (q - min) / (max - min + 1e-5), 0 if n = 0;
    O = leaves in flight (`mark_in_flight`). The first child with the greatest score is taken.

    Shapes:
        tree_ids:  [n] int32
        skip_node: [n] int32 or None; -1 = ask everywhere
    Returns: Selection; `depth` counts edges (0 = the root), so `path[i, depth[i]] == node[i]`.
    Raises: DeviceError, DtypeError, ShapeError, StrideError; RangeError for an item's tree or skip_node.
    Source: RAIN, official procedure (docs/methods/rain.md); in-flight counts: WU-UCT.
    """
    n = _check_items(forest, tree_ids) if skip_node is None else _check_items(forest, tree_ids, skip_node=skip_node)
    lane = choose_lane("tree", forest.device)
    if lane == "reference":
        return reference.select(forest, tree_ids, skip_node)
    status, node, depth = torch.empty_like(tree_ids), torch.empty_like(tree_ids), torch.empty_like(tree_ids)
    path = tree_ids.new_empty((n, forest.config.max_depth))
    _run(lane, "select", forest, tree_ids, skip_node, status, node, path, depth)
    return Selection(status, node, path, depth)


def expand(
    forest: Forest, tree_ids: Tensor, nodes: Tensor, priors: Tensor, num_children: Tensor, set_length: Tensor
) -> Tensor:
    """Give leaves their children. Child k of item i becomes slot `first_slot[i] + k`.

    Priors are taken as given (normalise them), except that at a root p becomes (1 - mix) p + mix / num_children with
    mix = root_prior_mix.

    Shapes:
        tree_ids, nodes: [n] int32
        priors:          [n, width] forest dtype, >= 0; columns from num_children[i] on are ignored
        num_children:    [n] int32, 1 to min(max_children, width)
        set_length:      [n] int32, tokens in the first child, >= 1
    Returns: first_slot [n] int32; OVERFLOW (-1) where the tree has no free row or the children would lie deeper than
        max_depth: then nothing was expanded, and the leaf can still be evaluated and backed up.
    Raises: DeviceError, DtypeError, ShapeError, StrideError, RangeError.
    """
    n = _check_items(forest, tree_ids, nodes=nodes, num_children=num_children, set_length=set_length)
    check_tensor("priors", priors, device=forest.device, dtype=forest.dtype, shape=(n, None))
    lane = choose_lane("tree", forest.device)
    if lane == "reference":
        return reference.expand(forest, tree_ids, nodes, priors, num_children, set_length)
    first_slot = torch.empty_like(tree_ids)
    _run(lane, "expand", forest, tree_ids, nodes, priors, priors.shape[1], num_children, set_length, first_slot)
    return first_slot


def add_child(forest: Forest, tree_ids: Tensor, nodes: Tensor, prior: Tensor, *, mix: bool = False) -> Tensor:
    """Give expanded nodes one more child; the priors of the others stay.

    With `mix`, the prior of a child of the root becomes (1 - root_prior_mix) p + root_prior_mix / k, k counting the new
    child; without it the caller has mixed already.

    Shapes:
        tree_ids, nodes: [n] int32
        prior:           [n] forest dtype, >= 0
    Returns: slot [n] int32; OVERFLOW (-1) where the node has max_children children.
    Raises: DeviceError, DtypeError, ShapeError, StrideError, RangeError.
    """
    n = _check_items(forest, tree_ids, nodes=nodes)
    check_tensor("prior", prior, device=forest.device, dtype=forest.dtype, shape=(n,))
    if not isinstance(mix, bool):
        raise DtypeError(f"mix must be True or False, got {type(mix).__name__}")
    lane = choose_lane("tree", forest.device)
    if lane == "reference":
        return reference.add_child(forest, tree_ids, nodes, prior, mix=mix)
    slot = torch.empty_like(tree_ids)
    _run(lane, "add_child", forest, tree_ids, nodes, prior, mix, slot)
    return slot


def backup(
    forest: Forest, tree_ids: Tensor, path: Tensor, depth: Tensor, value: Tensor, embedding: Tensor | None = None
) -> Tensor:
    """Add one evaluated leaf per item to the statistics of its path.

    Every node of the path: n += 1, fn += 1, q += (value - q) / n. Below the root, with embeddings: the node's mean
    embedding e += (x - e) / fn (e = x at first), then each sibling that has an embedding and whose mean has cosine c with e
    of at least similarity_threshold gets credit w = similarity_weight * c: q := (q n + w value) / (n + w), n += w.

    Shapes:
        tree_ids:  [n] int32; a tree named more than once is backed up in the order given
        path:      [n, max_depth] int32, depth: [n] int32, as `select` returns them
        value:     [n] forest dtype
        embedding: [n, rows, embedding_dim] float32 or None; row j belongs to path[j], rows 0 and depth + 1 on are not read
    Returns: dropped [n] int32, path nodes that got no embedding because max_embeddings are in use. They keep their other
        statistics, take no part in similarity, and take the next embedding as their first. Grow the forest to avoid it.
    Raises: DeviceError, DtypeError, ShapeError, StrideError, RangeError.
    """
    n = _check_items(forest, tree_ids, depth=depth)
    _check_path(forest, path, n)
    check_tensor("value", value, device=forest.device, dtype=forest.dtype, shape=(n,))
    rows = 0
    if embedding is not None:
        shape = (n, None, forest.config.embedding_dim)
        check_tensor("embedding", embedding, device=forest.device, dtype=torch.float32, shape=shape)
        rows = embedding.shape[1]
    lane = choose_lane("tree", forest.device)
    if lane == "reference":
        return reference.backup(forest, tree_ids, path, depth, value, embedding)
    dropped = torch.empty_like(tree_ids)
    _run(lane, "backup", forest, tree_ids, path, depth, value, embedding if rows else None, rows, dropped)
    return dropped


def best_child(forest: Forest, tree_ids: Tensor) -> BestChild:
    """The child of each root with the most visits; of equals the one with the greater value, then the first.

    Shapes:
        tree_ids: [n] int32
    Returns: BestChild; slot -1 where the root is a leaf.
    Raises: DeviceError, DtypeError, ShapeError, StrideError, RangeError.
    """
    n = _check_items(forest, tree_ids)
    lane = choose_lane("tree", forest.device)
    if lane == "reference":
        return reference.best_child(forest, tree_ids)
    slot, direct = torch.empty_like(tree_ids), torch.empty_like(tree_ids)
    visits = torch.empty(n, dtype=forest.dtype, device=forest.device)
    value = torch.empty_like(visits)
    _run(lane, "best_child", forest, tree_ids, slot, visits, direct, value)
    return BestChild(slot, visits, direct, value)


def reroot(forest: Forest, tree_ids: Tensor, slots: Tensor) -> Tensor:
    """Make a node of each tree its root; what does not lie below it is freed.

    The new root keeps its slot, n, fn, q and embedding; the priors of its children become (1 - mix) p + mix / k,
    normalised. The min/max record stays.

    Shapes:
        tree_ids, slots: [n] int32; each tree once, no leaf in flight
    Returns: freed [n, num_slots] bool, the slots that stopped being nodes (the old root included).
    Raises: DeviceError, DtypeError, ShapeError, StrideError, RangeError.
    """
    n = _check_items(forest, tree_ids, slots=slots)
    lane = choose_lane("tree", forest.device)
    if lane == "reference":
        return reference.reroot(forest, tree_ids, slots)
    freed = torch.zeros((n, forest.config.num_slots), dtype=torch.bool, device=forest.device)
    _run(lane, "reroot", forest, tree_ids, slots, freed)
    return freed


def mark_in_flight(forest: Forest, tree_ids: Tensor, path: Tensor, depth: Tensor) -> None:
    """Count the paths of leaves under evaluation: O += 1 on every node, so that `select` looks elsewhere (WU-UCT).

    Shapes and errors as in `backup`. Take each mark off with `unmark_in_flight` before its backup.
    """
    _mark(forest, tree_ids, path, depth, 1)


def unmark_in_flight(forest: Forest, tree_ids: Tensor, path: Tensor, depth: Tensor) -> None:
    """Undo `mark_in_flight` for the same paths.

    Raises: as `backup`; RangeError where a node of the path is not marked.
    """
    _mark(forest, tree_ids, path, depth, -1)


def children(forest: Forest, tree_id: int, node: int) -> NodeStats:
    """Statistics of the children of `node`, in insertion order; empty for a leaf.

    Raises:
        DtypeError: one of them is no int.
        RangeError: `tree_id` or `node` does not exist.
    """
    _check_node(forest, tree_id, node)
    row = int(forest.field("child_row")[tree_id, node])
    first = row * forest.config.max_children
    size = int(forest.field("count")[tree_id, row]) if row >= 0 else 0
    return _stats(forest, tree_id, list(range(first, first + size)))


def node_stats(forest: Forest, tree_id: int, nodes: list[int] | tuple[int, ...]) -> NodeStats:
    """Statistics of some nodes of one tree.

    Raises:
        DtypeError: `nodes` is no list, or it or `tree_id` is not of ints.
        RangeError: `tree_id` or a node does not exist.
    """
    _check_forest(forest)
    if not isinstance(nodes, list | tuple):
        raise DtypeError(f"nodes must be a list of ints, got {type(nodes).__name__}")
    for node in nodes:
        _check_node(forest, tree_id, node)
    return _stats(forest, tree_id, list(nodes))


def _stats(forest: Forest, tree_id: int, slots: list[int]) -> NodeStats:
    at = torch.tensor(slots, dtype=torch.int64, device=forest.device)
    visits, direct, values, priors = (
        forest.field(f)[tree_id][at] for f in ("visits", "direct_visits", "values", "priors")
    )
    return NodeStats(at.to(torch.int32), visits, direct, values, priors)


def _mark(forest: Forest, tree_ids: Tensor, path: Tensor, depth: Tensor, delta: int) -> None:
    n = _check_items(forest, tree_ids, depth=depth)
    _check_path(forest, path, n)
    lane = choose_lane("tree", forest.device)
    if lane == "reference":
        reference.mark(forest, tree_ids, path, depth, delta)
        return
    _run(lane, "mark", forest, tree_ids, path, depth, delta)


def _check_forest(forest: object) -> None:
    if not isinstance(forest, Forest):
        raise DtypeError(f"forest must be a Forest, got {type(forest).__name__}: make one with Forest.create()")


def _check_items(forest: Forest, tree_ids: Tensor, **per_item: Tensor) -> int:
    _check_forest(forest)
    check_tensor("tree_ids", tree_ids, device=forest.device, dtype=torch.int32, shape=(None,))
    n = tree_ids.shape[0]
    for name, tensor in per_item.items():
        check_tensor(name, tensor, device=forest.device, dtype=torch.int32, shape=(n,))
    return n


def _check_path(forest: Forest, path: Tensor, n: int) -> None:
    check_tensor("path", path, device=forest.device, dtype=torch.int32, shape=(n, forest.config.max_depth))


def _check_node(forest: Forest, tree_id: int, node: int) -> None:
    _check_forest(forest)
    for name, value in (("tree_id", tree_id), ("node", node)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise DtypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 0 <= tree_id < forest.num_trees:
        raise RangeError(f"tree_id is {tree_id}, allowed: 0 to {forest.num_trees - 1}")
    if not reference.is_live(forest, tree_id, node):
        root = int(forest.field("header")[tree_id, HEADER_ROOT])
        raise RangeError(
            f"node is slot {node}, which is no node of tree {tree_id} (its root is {root}): it was never made or was freed"
        )


def _run(lane: Lane, op: str, forest: Forest, tree_ids: Tensor, *arguments: Tensor | int | None) -> None:
    """Call `_C.tree_<op>` and raise what it reports."""
    n = tree_ids.shape[0]
    if n == 0:
        return
    passed = [0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    if lane == "cpu":
        run = getattr(native(), f"tree_{op}")
        word = run(forest.native_view(), tree_ids.data_ptr(), n, *passed, torch.get_num_threads())
    else:
        word = _run_cuda(op, forest, tree_ids, passed)
    if word != NO_ERROR:
        item = word // ERROR_STRIDE
        shown = [f"tree {int(tree_ids[item])}"]
        inputs = () if op == "best_child" else arguments[:1]  # of best_child all are outputs, not written yet
        shown += [str(a[item].tolist()) for a in inputs if isinstance(a, Tensor)]
        raise error_of_word(op, word, ", ".join(shown))


def _run_cuda(op: str, forest: Forest, tree_ids: Tensor, passed: list[int]) -> int:
    with torch.cuda.device(forest.device):
        error = torch.full((1,), NO_ERROR, dtype=torch.int64, device=forest.device)
        run = getattr(native(), f"tree_{op}_cuda")
        stream = torch.cuda.current_stream().cuda_stream
        status = run(forest.native_view(), tree_ids.data_ptr(), tree_ids.shape[0], *passed, error.data_ptr(), stream)
        if status:
            raise LaneError(f"{op}: the CUDA launch failed with {native().cuda_error_name(status)}")
        return NO_ERROR if torch.cuda.is_current_stream_capturing() else int(error.item())


# The same functions as torch ops, for torch.compile and CUDA graphs: a forest is passed as its tensors and its constants.


def _with_forest(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(fields: Sequence[Tensor], config: Sequence[float], *args: Any, **kwargs: Any) -> Any:
        out = op(Forest(TreeConfig.from_floats(config), fields), *args, **kwargs)
        return tuple(out) if isinstance(out, Selection | BestChild) else out

    return run


def _fake_ints(fields: Sequence[Tensor], config: Sequence[float], tree_ids: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(tree_ids)


def _fake_select(
    fields: Sequence[Tensor], config: Sequence[float], tree_ids: Tensor, skip_node: Tensor | None = None
) -> tuple[Tensor, ...]:
    path = tree_ids.new_empty((tree_ids.shape[0], TreeConfig.from_floats(config).max_depth))
    return torch.empty_like(tree_ids), torch.empty_like(tree_ids), path, torch.empty_like(tree_ids)


def _fake_best_child(fields: Sequence[Tensor], config: Sequence[float], tree_ids: Tensor) -> tuple[Tensor, ...]:
    real = fields[0].new_empty(tree_ids.shape)
    return torch.empty_like(tree_ids), real, torch.empty_like(tree_ids), torch.empty_like(real)


def _fake_reroot(fields: Sequence[Tensor], config: Sequence[float], tree_ids: Tensor, slots: Tensor) -> Tensor:
    shape = (tree_ids.shape[0], TreeConfig.from_floats(config).num_slots)
    return tree_ids.new_empty(shape, dtype=torch.bool)


def _fake_nothing(fields: Sequence[Tensor], config: Sequence[float], *_: Any) -> None:
    return None


_SCHEMAS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "tree_select": ("(Tensor[] fields, float[] config, Tensor tree_ids, Tensor? skip_node=None)"
                    " -> (Tensor, Tensor, Tensor, Tensor)", select, _fake_select),
    "tree_expand": ("(Tensor(a!)[] fields, float[] config, Tensor tree_ids, Tensor nodes, Tensor priors,"
                    " Tensor num_children, Tensor set_length) -> Tensor", expand, _fake_ints),
    "tree_add_child": ("(Tensor(a!)[] fields, float[] config, Tensor tree_ids, Tensor nodes, Tensor prior,"
                       " *, bool mix=False) -> Tensor", add_child, _fake_ints),
    "tree_backup": ("(Tensor(a!)[] fields, float[] config, Tensor tree_ids, Tensor path, Tensor depth, Tensor value,"
                    " Tensor? embedding=None) -> Tensor", backup, _fake_ints),
    "tree_best_child": ("(Tensor[] fields, float[] config, Tensor tree_ids) -> (Tensor, Tensor, Tensor, Tensor)",
                        best_child, _fake_best_child),
    "tree_reroot": ("(Tensor(a!)[] fields, float[] config, Tensor tree_ids, Tensor slots) -> Tensor",
                    reroot, _fake_reroot),
    "tree_mark_in_flight": ("(Tensor(a!)[] fields, float[] config, Tensor tree_ids, Tensor path, Tensor depth) -> ()",
                            mark_in_flight, _fake_nothing),
    "tree_unmark_in_flight": ("(Tensor(a!)[] fields, float[] config, Tensor tree_ids, Tensor path, Tensor depth) -> ()",
                              unmark_in_flight, _fake_nothing),
}  # fmt: skip
_LIBRARY = torch.library.Library("rainkernels", "FRAGMENT")
for _name, (_schema, _op, _fake) in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _with_forest(_op), _key)
    torch.library.register_fake(f"rainkernels::{_name}", _fake, lib=_LIBRARY)
