"""Batched PUCT trees for RAIN: select, expand, add_child, backup, best_child, reroot, on a `Forest`.

Item i of a call works on tree `tree_ids[i]`. A call checks every item before it changes anything, so it happens wholly or
not at all. Items of one tree are done in the order given; trees are independent. All floats that enter must be finite.
On cuda the checks run on the device and the error is fetched after the call, which waits for the GPU. With `error`, an
`error_word`, nothing is fetched (nor during stream capture): the first bad call leaves its error there, it and every later call
with that word change nothing, and `raise_error` raises it. With `out` and `error` a call neither
allocates nor waits. On a cpu errors are raised at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rainkernels._checks import check_outputs, check_tensor
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
from rainkernels._tree_schemas import SCHEMAS
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
    "error_word",
    "expand",
    "mark_in_flight",
    "node_stats",
    "raise_error",
    "reroot",
    "select",
    "unmark_in_flight",
]

Result = TypeVar("Result", Tensor, Selection, BestChild)


def error_word(forest: Forest) -> Tensor:
    """[1] int64 on the forest's device, for the `error` of calls that must not wait for the GPU; 2**63 - 1 while all is well."""
    _check_forest(forest)
    return torch.full((1,), NO_ERROR, dtype=torch.int64, device=forest.device)


def raise_error(error: Tensor) -> None:
    """Raise what the calls with this word left in it, if anything, and reset it. Waits for the GPU.

    Raises:
        RangeError, ShapeError: the smallest bad item of the first bad call, and what is wrong with it.
    """
    check_tensor("error", error, dtype=torch.int64, shape=(1,))
    word = int(error.item())
    error.fill_(NO_ERROR)
    if word != NO_ERROR:
        raise error_of_word("tree", word)


def select(
    forest: Forest, tree_ids: Tensor, skip_node: Tensor | None = None, *, out: Selection | None = None,
    error: Tensor | None = None,
) -> Selection:  # fmt: skip
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
        out:       a Selection to write to;  error: [1] int64, see above
    Returns: Selection; `depth` counts edges (0 = the root), so `path[i, depth[i]] == node[i]`.
    Raises: DeviceError, DtypeError, ShapeError, StrideError; RangeError for an item's tree or skip_node.
    Source: RAIN, official procedure (docs/methods/rain.md); in-flight counts: WU-UCT.
    """
    n = _check_items(forest, tree_ids) if skip_node is None else _check_items(forest, tree_ids, skip_node=skip_node)
    lane = choose_lane("tree", forest.device)
    if out is not None:
        check_outputs("out", out, Selection._fields)
        for name, tensor in zip(Selection._fields, out, strict=True):
            shape = (n, forest.config.max_depth) if name == "path" else (n,)
            check_tensor(f"out.{name}", tensor, device=forest.device, dtype=torch.int32, shape=shape)
    if lane == "reference":
        return _into(out, reference.select(forest, tree_ids, skip_node))
    if out is None:
        path = tree_ids.new_empty((n, forest.config.max_depth))
        out = Selection(torch.empty_like(tree_ids), torch.empty_like(tree_ids), path, torch.empty_like(tree_ids))
    _run(lane, "select", forest, tree_ids, skip_node, *out, error=error)
    return out


def expand(
    forest: Forest, tree_ids: Tensor, nodes: Tensor, priors: Tensor, num_children: Tensor, set_length: Tensor, *,
    out: Tensor | None = None, error: Tensor | None = None,
) -> Tensor:  # fmt: skip
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
    _check_out(forest, out, n)
    if lane == "reference":
        return _into(out, reference.expand(forest, tree_ids, nodes, priors, num_children, set_length))
    first = torch.empty_like(tree_ids) if out is None else out
    _run(lane, "expand", forest, tree_ids, nodes, priors, priors.shape[1], num_children, set_length, first, error=error)
    return first


def add_child(
    forest: Forest, tree_ids: Tensor, nodes: Tensor, prior: Tensor, *, mix: bool = False, out: Tensor | None = None,
    error: Tensor | None = None,
) -> Tensor:  # fmt: skip
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
    _check_out(forest, out, n)
    if lane == "reference":
        return _into(out, reference.add_child(forest, tree_ids, nodes, prior, mix=mix))
    slot = torch.empty_like(tree_ids) if out is None else out
    _run(lane, "add_child", forest, tree_ids, nodes, prior, mix, slot, error=error)
    return slot


def backup(
    forest: Forest, tree_ids: Tensor, path: Tensor, depth: Tensor, value: Tensor, embedding: Tensor | None = None, *,
    out: Tensor | None = None, error: Tensor | None = None,
) -> Tensor:  # fmt: skip
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
    Edge cases: a finite value may be too large to work with: in a float32 forest, values beyond about 1e38 may overflow a
        mean or the min/max span to infinity.
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
    _check_out(forest, out, n)
    if lane == "reference":
        return _into(out, reference.backup(forest, tree_ids, path, depth, value, embedding))
    dropped = torch.empty_like(tree_ids) if out is None else out
    given = embedding if rows else None
    _run(lane, "backup", forest, tree_ids, path, depth, value, given, rows, dropped, error=error)
    return dropped


def best_child(
    forest: Forest, tree_ids: Tensor, *, out: BestChild | None = None, error: Tensor | None = None
) -> BestChild:
    """The child of each root with the most visits; of equals the one with the greater value, then the first.

    Shapes:
        tree_ids: [n] int32
    Returns: BestChild; slot -1 where the root is a leaf.
    Raises: DeviceError, DtypeError, ShapeError, StrideError, RangeError.
    """
    n = _check_items(forest, tree_ids)
    lane = choose_lane("tree", forest.device)
    real = {"visits", "value"}
    if out is not None:
        check_outputs("out", out, BestChild._fields)
        for name, tensor in zip(BestChild._fields, out, strict=True):
            dtype = forest.dtype if name in real else torch.int32
            check_tensor(f"out.{name}", tensor, device=forest.device, dtype=dtype, shape=(n,))
    if lane == "reference":
        return _into(out, reference.best_child(forest, tree_ids))
    if out is None:
        out = BestChild(
            *(torch.empty_like(tree_ids, dtype=forest.dtype if f in real else None) for f in BestChild._fields)
        )
    _run(lane, "best_child", forest, tree_ids, *out, error=error)
    return out


def reroot(
    forest: Forest, tree_ids: Tensor, slots: Tensor, *, out: Tensor | None = None, error: Tensor | None = None
) -> Tensor:
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
    shape = (n, forest.config.num_slots)
    if out is not None:
        check_tensor("out", out, device=forest.device, dtype=torch.bool, shape=shape)
    if lane == "reference":
        return _into(out, reference.reroot(forest, tree_ids, slots))
    freed = torch.zeros(shape, dtype=torch.bool, device=forest.device) if out is None else out.zero_()
    _run(lane, "reroot", forest, tree_ids, slots, freed, error=error)
    return freed


def mark_in_flight(
    forest: Forest, tree_ids: Tensor, path: Tensor, depth: Tensor, *, error: Tensor | None = None
) -> None:
    """Count the paths of leaves under evaluation: O += 1 on every node, so that `select` looks elsewhere (WU-UCT).

    Shapes and errors as in `backup`. Take each mark off with `unmark_in_flight` before its backup.
    """
    _mark(forest, tree_ids, path, depth, 1, error)


def unmark_in_flight(
    forest: Forest, tree_ids: Tensor, path: Tensor, depth: Tensor, *, error: Tensor | None = None
) -> None:
    """Undo `mark_in_flight` for the same paths.

    Raises: as `backup`; RangeError where a node of the path is not marked.
    """
    _mark(forest, tree_ids, path, depth, -1, error)


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


def _mark(forest: Forest, tree_ids: Tensor, path: Tensor, depth: Tensor, delta: int, error: Tensor | None) -> None:
    n = _check_items(forest, tree_ids, depth=depth)
    _check_path(forest, path, n)
    lane = choose_lane("tree", forest.device)
    if lane == "reference":
        reference.mark(forest, tree_ids, path, depth, delta)
        return
    _run(lane, "mark", forest, tree_ids, path, depth, delta, error=error)


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


def _check_out(forest: Forest, out: Tensor | None, n: int) -> None:
    if out is not None:
        check_tensor("out", out, device=forest.device, dtype=torch.int32, shape=(n,))


def _into(out: Result | None, result: Result) -> Result:
    """The reference's result, copied to the caller's tensors when there are any."""
    if out is None:
        return result
    if isinstance(out, Tensor):
        return out.copy_(result)
    for to, made in zip(out, result, strict=True):
        to.copy_(made)
    return out


def _run(
    lane: Lane, op: str, forest: Forest, tree_ids: Tensor, *arguments: Tensor | int | None, error: Tensor | None
) -> None:
    """Call `_C.tree_<op>` and raise what it reports, unless that stays in the caller's `error`."""
    n = tree_ids.shape[0]
    if error is not None:
        check_tensor("error", error, device=forest.device, dtype=torch.int64, shape=(1,))
    if n == 0:
        return
    passed = [0 if a is None else a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    if lane == "cpu":
        run = getattr(native(), f"tree_{op}")
        word = run(forest.native_view(), tree_ids.data_ptr(), n, *passed, torch.get_num_threads())
    else:
        word = _run_cuda(op, forest, tree_ids, passed, error)
    if word != NO_ERROR:
        item = word // ERROR_STRIDE
        shown = [f"tree {int(tree_ids[item])}"]
        inputs = () if op == "best_child" else arguments[:1]  # of best_child all are outputs, not written yet
        shown += [str(a[item].tolist()) for a in inputs if isinstance(a, Tensor)]
        raise error_of_word(op, word, ", ".join(shown))


def _run_cuda(op: str, forest: Forest, tree_ids: Tensor, passed: list[int], error: Tensor | None) -> int:
    with torch.cuda.device(forest.device):
        word = error_word(forest) if error is None else error
        run = getattr(native(), f"tree_{op}_cuda")
        stream = torch.cuda.current_stream().cuda_stream
        status = run(forest.native_view(), tree_ids.data_ptr(), tree_ids.shape[0], *passed, word.data_ptr(), stream)
        if status:
            raise LaneError(f"{op}: the CUDA launch failed with {native().cuda_error_name(status)}")
        return NO_ERROR if error is not None or torch.cuda.is_current_stream_capturing() else int(word.item())


# The same functions as torch ops, for torch.compile and CUDA graphs: a forest is passed as its tensors and its constants.


def _with_forest(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(fields: Sequence[Tensor], config: Sequence[float], *args: Any, **kwargs: Any) -> Any:
        out = op(Forest(TreeConfig.from_floats(config), fields), *args, **kwargs)
        return tuple(out) if isinstance(out, Selection | BestChild) else out

    return run


_LIBRARY = torch.library.Library("rainkernels", "FRAGMENT")
for _name, (_schema, _fake) in SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _with_forest(globals()[_name.removeprefix("tree_")]), _key)
    torch.library.register_fake(f"rainkernels::{_name}", _fake, lib=_LIBRARY)
