"""Definition of the tree ops in plain PyTorch, one item at a time. Same arguments and results as `rainkernels.ops.tree`.

Sums over an embedding run in 16 accumulators (element i goes to accumulator i % 16) that a fixed tree adds up, so that every
lane gives the same bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rainkernels._forest import (
    BLOCK,
    HEADER_FREE_EMBEDDINGS,
    HEADER_FREE_ROWS,
    HEADER_IN_FLIGHT,
    HEADER_ROOT,
    NEED_CHILD,
    NONE,
    OVERFLOW,
    PINNED_ROW,
    BestChild,
    Forest,
    Selection,
)
from rainkernels._tree_errors import TreeError, tree_error

LANES = 16
NORM_FLOOR = 1e-8


class _Tree:
    """One tree of a forest: views of its fields."""

    def __init__(self, forest: Forest, tree_id: int) -> None:
        self.config = forest.config
        self.dtype = forest.dtype
        fields = {name: forest.field(name)[tree_id] for name in _NAMES}
        self.visits, self.values, self.priors = fields["visits"], fields["values"], fields["priors"]
        self.direct_visits, self.in_flight = fields["direct_visits"], fields["in_flight"]
        self.child_row, self.embedding_of = fields["child_row"], fields["embedding_of"]
        self.owner, self.count, self.set_length = fields["owner"], fields["count"], fields["set_length"]
        self.free_rows, self.free_embeddings = fields["free_rows"], fields["free_embeddings"]
        self.bounds, self.header = fields["bounds"], fields["header"]
        self.means, self.tails = fields["means"], fields["tails"]

    @property
    def root(self) -> int:
        return int(self.header[HEADER_ROOT])

    def is_live(self, slot: int) -> bool:
        if slot == self.root:
            return True
        row, k = divmod(slot, self.config.max_children)
        return 0 <= row < self.config.num_rows and int(self.owner[row]) >= 0 and k < int(self.count[row])

    def parent(self, slot: int) -> int:
        return NONE if slot == self.root else int(self.owner[slot // self.config.max_children])

    def row_slots(self, row: int) -> list[int]:
        first = row * self.config.max_children
        return list(range(first, first + int(self.count[row])))

    def real(self, x: float) -> Tensor:
        return torch.tensor(x, dtype=self.dtype)

    def pop(self, stack: Tensor, counter: int) -> int:
        self.header[counter] -= 1
        return int(stack[int(self.header[counter])])

    def push(self, stack: Tensor, counter: int, item: int) -> None:
        stack[int(self.header[counter])] = item
        self.header[counter] += 1


_NAMES = (
    "visits", "values", "priors", "direct_visits", "in_flight", "child_row", "embedding_of", "owner", "count",
    "set_length", "free_rows", "free_embeddings", "bounds", "header", "means", "tails",
)  # fmt: skip


def is_live(forest: Forest, tree_id: int, slot: int) -> bool:
    """Whether `slot` is a node of the tree."""
    return _Tree(forest, tree_id).is_live(slot)


def fold(acc: Tensor) -> Tensor:
    """Sum of 16 accumulators in the last dim: the upper half is added to the lower half four times."""
    while acc.shape[-1] > 1:
        half = acc.shape[-1] // 2
        acc = acc[..., :half] + acc[..., half:]
    return acc[..., 0]


def ordered_sum(x: Tensor) -> Tensor:
    """Sum over the last dim in the order every lane uses."""
    pad = -x.shape[-1] % LANES
    blocks = torch.nn.functional.pad(x, (0, pad)).unflatten(-1, (-1, LANES))
    acc = torch.zeros_like(blocks[..., 0, :])
    for i in range(blocks.shape[-2]):
        acc = acc + blocks[..., i, :]
    return fold(acc)


def rounded_root(x: Tensor) -> Tensor:
    """Correctly rounded square root of a scalar; torch.sqrt may be off by one unit in the last place."""
    return torch.tensor(math.sqrt(float(x)), dtype=x.dtype)


def select(forest: Forest, tree_ids: Tensor, skip_node: Tensor | None = None) -> Selection:
    """See `rainkernels.ops.tree.select`."""
    n, max_depth = tree_ids.shape[0], forest.config.max_depth
    trees = _trees("select", forest, tree_ids)
    status, node, depth = (torch.zeros(n, dtype=torch.int32) for _ in range(3))
    path = torch.full((n, max_depth), NONE, dtype=torch.int32)
    for i, t in enumerate(trees):
        skip = NONE if skip_node is None else int(skip_node[i])
        ask, here, slots = skip < 0, t.root, [t.root]
        while (row := int(t.child_row[here])) >= 0:
            if ask and t.config.dynamic_children and _wants_child(t, row):
                status[i] = NEED_CHILD
                break
            ask = ask or here == skip
            here = t.row_slots(row)[int(torch.argmax(_scores(t, row, here)))]
            slots.append(here)
        if not ask:
            raise tree_error("select", TreeError.SKIP_NODE, i)
        path[i, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
        node[i], depth[i] = here, len(slots) - 1
    return Selection(*(x.to(forest.device) for x in (status, node, path, depth)))


def expand(
    forest: Forest, tree_ids: Tensor, nodes: Tensor, priors: Tensor, num_children: Tensor, set_length: Tensor
) -> Tensor:
    """See `rainkernels.ops.tree.expand`."""
    trees = _trees("expand", forest, tree_ids)
    seen: set[tuple[int, int]] = set()
    for i, t in enumerate(trees):
        count, key = int(num_children[i]), (int(tree_ids[i]), int(nodes[i]))
        if not t.is_live(key[1]):
            raise tree_error("expand", TreeError.NODE, i)
        if int(t.child_row[key[1]]) >= 0:
            raise tree_error("expand", TreeError.EXPANDED, i)
        if not 1 <= count <= min(forest.config.max_children, priors.shape[1]):
            raise tree_error("expand", TreeError.CHILD_COUNT, i)
        if int(set_length[i]) < 1:
            raise tree_error("expand", TreeError.SET_LENGTH, i)
        if not bool((torch.isfinite(priors[i, :count]) & (priors[i, :count] >= 0)).all()):
            raise tree_error("expand", TreeError.PRIOR, i)
        if key in seen:
            raise tree_error("expand", TreeError.DUPLICATE, i)
        seen.add(key)
    first_slot = torch.full((len(trees),), OVERFLOW, dtype=torch.int32, device=forest.device)
    for i, t in enumerate(trees):
        node, count, depth = int(nodes[i]), int(num_children[i]), 0
        up = node
        while (up := t.parent(up)) >= 0:
            depth += 1
        if int(t.header[HEADER_FREE_ROWS]) == 0 or depth + 1 >= t.config.max_depth:
            continue
        row = t.pop(t.free_rows, HEADER_FREE_ROWS)
        t.owner[row], t.count[row], t.set_length[row], t.child_row[node] = node, count, int(set_length[i]), row
        for k, slot in enumerate(t.row_slots(row)):
            _clear_slot(t, slot, _mixed(t, priors[i, k], count, node == t.root))
        first_slot[i] = row * t.config.max_children
    return first_slot


def add_child(forest: Forest, tree_ids: Tensor, nodes: Tensor, prior: Tensor, *, mix: bool = False) -> Tensor:
    """See `rainkernels.ops.tree.add_child`."""
    trees = _trees("add_child", forest, tree_ids)
    for i, t in enumerate(trees):
        if not t.is_live(int(nodes[i])):
            raise tree_error("add_child", TreeError.NODE, i)
        if int(t.child_row[int(nodes[i])]) < 0:
            raise tree_error("add_child", TreeError.NOT_EXPANDED, i)
        if not (math.isfinite(float(prior[i])) and float(prior[i]) >= 0):
            raise tree_error("add_child", TreeError.PRIOR, i)
    slots = torch.full((len(trees),), OVERFLOW, dtype=torch.int32, device=forest.device)
    for i, t in enumerate(trees):
        row = int(t.child_row[int(nodes[i])])
        count = int(t.count[row])
        if count == t.config.max_children:
            continue
        slots[i] = row * t.config.max_children + count
        t.count[row] = count + 1
        _clear_slot(t, int(slots[i]), _mixed(t, prior[i], count + 1, mix and int(nodes[i]) == t.root))
    return slots


def backup(
    forest: Forest, tree_ids: Tensor, path: Tensor, depth: Tensor, value: Tensor, embedding: Tensor | None = None
) -> Tensor:
    """See `rainkernels.ops.tree.backup`."""
    trees = _trees("backup", forest, tree_ids)
    if embedding is not None and embedding.shape[1] == 0:
        embedding = None
    for i, t in enumerate(trees):
        slots = _path_slots("backup", t, path, depth, i)
        if not math.isfinite(float(value[i])):
            raise tree_error("backup", TreeError.VALUE, i)
        if embedding is None:
            continue
        if len(slots) > embedding.shape[1]:
            raise tree_error("backup", TreeError.EMBEDDING_ROWS, i)
        if not bool(torch.isfinite(embedding[i, 1 : len(slots)]).all()):
            raise tree_error("backup", TreeError.EMBEDDING, i)
    dropped = torch.zeros(len(trees), dtype=torch.int32, device=forest.device)
    for i, t in enumerate(trees):
        for j in range(int(depth[i]), -1, -1):
            node = int(path[i, j])
            _count_visit(t, node, value[i], is_root=j == 0)
            if j == 0 or embedding is None:
                continue
            if not _update_mean(t, node, embedding[i, j]):
                dropped[i] += 1
            elif t.config.similarity:
                _spread_to_siblings(t, node, value[i])
    return dropped


def best_child(forest: Forest, tree_ids: Tensor) -> BestChild:
    """See `rainkernels.ops.tree.best_child`."""
    trees = _trees("best_child", forest, tree_ids)
    slot = torch.full((len(trees),), NONE, dtype=torch.int32, device=forest.device)
    visits = torch.zeros(len(trees), dtype=forest.dtype, device=forest.device)
    direct, value = torch.zeros_like(slot), torch.zeros_like(visits)
    for i, t in enumerate(trees):
        row = int(t.child_row[t.root])
        if row < 0:
            continue
        best = max(t.row_slots(row), key=lambda s, t=t: (float(t.visits[s]), float(t.values[s])))  # type: ignore[misc]
        slot[i], visits[i], direct[i], value[i] = best, t.visits[best], t.direct_visits[best], t.values[best]
    return BestChild(slot, visits, direct, value)


def reroot(forest: Forest, tree_ids: Tensor, slots: Tensor) -> Tensor:
    """See `rainkernels.ops.tree.reroot`."""
    trees = _trees("reroot", forest, tree_ids)
    for i, t in enumerate(trees):
        if not t.is_live(int(slots[i])):
            raise tree_error("reroot", TreeError.NODE, i)
        if int(slots[i]) == t.root:
            raise tree_error("reroot", TreeError.IS_ROOT, i)
        if int(t.header[HEADER_IN_FLIGHT]) > 0:
            raise tree_error("reroot", TreeError.IN_FLIGHT, i)
        if bool((tree_ids[:i] == tree_ids[i]).any()):
            raise tree_error("reroot", TreeError.DUPLICATE, i)
    freed = torch.zeros((len(trees), forest.config.num_slots), dtype=torch.bool, device=forest.device)
    for i, t in enumerate(trees):
        root, home = int(slots[i]), int(slots[i]) // t.config.max_children
        kept = _rows_below(t, root)
        gone = [t.root]
        for row in range(t.config.num_rows - 1, 0, -1):
            if row in kept or int(t.owner[row]) == NONE:
                continue
            gone += [slot for slot in t.row_slots(row) if slot != root]
            t.count[row], t.owner[row] = 0, PINNED_ROW if row == home else NONE
            if row != home:
                t.push(t.free_rows, HEADER_FREE_ROWS, row)
        for slot in gone:
            freed[i, slot] = True
            if int(t.embedding_of[slot]) >= 0:
                t.push(t.free_embeddings, HEADER_FREE_EMBEDDINGS, int(t.embedding_of[slot]))
            t.embedding_of[slot] = NONE
        t.header[HEADER_ROOT] = root
        _mix_root_priors(t)
    return freed


def mark(forest: Forest, tree_ids: Tensor, path: Tensor, depth: Tensor, delta: int) -> None:
    """See `rainkernels.ops.tree.mark_in_flight` (delta 1) and `unmark_in_flight` (delta -1)."""
    trees = _trees("mark", forest, tree_ids)
    taken: dict[tuple[int, int], int] = {}
    for i, t in enumerate(trees):
        for slot in _path_slots("mark", t, path, depth, i):
            key = (int(tree_ids[i]), slot)
            taken[key] = taken.get(key, 0) + 1
            if delta < 0 and taken[key] > int(t.in_flight[slot]):
                raise tree_error("mark", TreeError.MARK, i)
    for i, t in enumerate(trees):
        for slot in _path_slots("mark", t, path, depth, i):
            t.in_flight[slot] += delta
        t.header[HEADER_IN_FLIGHT] += delta


def _trees(op: str, forest: Forest, tree_ids: Tensor) -> Sequence[_Tree]:
    for i, tree_id in enumerate(tree_ids.tolist()):
        if not 0 <= tree_id < forest.num_trees:
            raise tree_error(op, TreeError.TREE_ID, i, f"tree {tree_id}")
    return [_Tree(forest, tree_id) for tree_id in tree_ids.tolist()]


def _path_slots(op: str, t: _Tree, path: Tensor, depth: Tensor, i: int) -> list[int]:
    if not 0 <= int(depth[i]) < t.config.max_depth:
        raise tree_error(op, TreeError.DEPTH, i)
    slots: list[int] = path[i, : int(depth[i]) + 1].tolist()
    if slots[0] != t.root or any(not t.is_live(b) or t.parent(b) != a for a, b in itertools.pairwise(slots)):
        raise tree_error(op, TreeError.PATH, i)
    return slots


def _scores(t: _Tree, row: int, node: int) -> Tensor:
    at = t.row_slots(row)
    n, q, p = t.visits[at], t.values[at], t.priors[at]
    explored, seen = t.visits[node], 1 + n
    if int(t.header[HEADER_IN_FLIGHT]) > 0:
        explored, seen = explored + t.in_flight[node].to(t.dtype), seen + t.in_flight[at].to(t.dtype)
    span = t.bounds[1] - t.bounds[0] + t.real(1e-5)
    exploit = torch.where(n == 0, t.real(0.0), (q - t.bounds[0]) / span)
    return exploit + t.real(t.config.c_puct) * p * rounded_root(explored) / seen


def _wants_child(t: _Tree, row: int) -> bool:
    at = t.row_slots(row)
    if not 2 <= len(at) < t.config.max_children:
        return False
    if bool((t.embedding_of[at] < 0).any()) or not bool((t.values[at] < t.real(t.config.dynamic_value)).all()):
        return False
    means = t.means[t.embedding_of[at].long()]
    centre = torch.zeros_like(means[0])
    for mean in means:
        centre = centre + mean
    centre = centre / len(at)
    variance = torch.zeros_like(centre)
    for mean in means:
        variance = variance + (mean - centre) * (mean - centre)
    variance = variance / (len(at) - 1)
    norm = rounded_root(ordered_sum(variance * variance))
    limit = torch.tensor(t.config.dynamic_variance, dtype=torch.float32) * t.set_length[row].to(torch.float32)
    return bool(norm < limit)


def _mixed(t: _Tree, prior: Tensor, count: int, at_root: bool) -> Tensor:
    mix = t.real(t.config.root_prior_mix)
    return (1 - mix) * prior + mix / count if at_root and t.config.root_prior_mix > 0 else prior


def _clear_slot(t: _Tree, slot: int, prior: Tensor) -> None:
    t.visits[slot] = t.values[slot] = 0.0
    t.priors[slot] = prior
    t.direct_visits[slot] = t.in_flight[slot] = 0
    t.child_row[slot] = t.embedding_of[slot] = NONE


def _count_visit(t: _Tree, node: int, g: Tensor, *, is_root: bool) -> None:
    t.visits[node] += 1
    t.direct_visits[node] += 1
    t.values[node] += (g - t.values[node]) / t.visits[node]
    if not is_root:
        t.bounds[0] = torch.minimum(t.bounds[0], t.values[node])
        t.bounds[1] = torch.maximum(t.bounds[1], t.values[node])


def _update_mean(t: _Tree, node: int, x: Tensor) -> bool:
    if int(t.embedding_of[node]) >= 0:
        at = int(t.embedding_of[node])
        rate = 1 / t.direct_visits[node].to(torch.float32)
        t.means[at] = t.means[at] + (x - t.means[at]) * rate
    elif int(t.header[HEADER_FREE_EMBEDDINGS]) > 0:
        at = t.pop(t.free_embeddings, HEADER_FREE_EMBEDDINGS)
        t.embedding_of[node] = at
        t.means[at] = x
    else:
        return False
    total = torch.tensor(0.0)
    for c in range(t.config.num_blocks - 1, -1, -1):
        block = t.means[at, c * BLOCK : (c + 1) * BLOCK]
        total = total + ordered_sum(block * block)
        t.tails[at, c] = rounded_root(total)
    return True


def _spread_to_siblings(t: _Tree, node: int, g: Tensor) -> None:
    others = [s for s in t.row_slots(node // t.config.max_children) if s != node and int(t.embedding_of[s]) >= 0]
    if not others:
        return
    own, at = int(t.embedding_of[node]), t.embedding_of[others].long()
    norms = t.tails[own, 0].clamp_min(NORM_FLOOR) * t.tails[at, 0].clamp_min(NORM_FLOOR)
    cosines = ordered_sum(t.means[own] * t.means[at]) / norms
    for slot, cosine in zip(others, cosines, strict=True):
        if float(cosine) < torch.tensor(t.config.similarity_threshold, dtype=torch.float32):
            continue
        before, weight = t.visits[slot].clone(), t.real(t.config.similarity_weight) * cosine.to(t.dtype)
        t.visits[slot] = before + weight
        t.values[slot] = (t.values[slot] * before + weight * g) / t.visits[slot]


def _rows_below(t: _Tree, slot: int) -> set[int]:
    rows, queue = set(), [int(t.child_row[slot])]
    for row in queue:
        if row >= 0:
            rows.add(row)
            queue += [int(t.child_row[s]) for s in t.row_slots(row)]
    return rows


def _mix_root_priors(t: _Tree) -> None:
    row = int(t.child_row[t.root])
    if row < 0 or t.config.root_prior_mix == 0:
        return
    at, mix = t.row_slots(row), t.real(t.config.root_prior_mix)
    total = t.real(0.0)
    for slot in at:
        t.priors[slot] = (1 - mix) * t.priors[slot] + mix / len(at)
        total = total + t.priors[slot]
    t.priors[at] = t.priors[at] / total
