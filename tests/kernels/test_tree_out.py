"""tree ops with the caller's outputs and error word: same results, nothing allocated by the caller's lane, graphs on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rainkernels import DtypeError, RangeError, ShapeError, has_native
from rainkernels.ops import tree

pytestmark = pytest.mark.skipif(not has_native(), reason="rainkernels._C is not built")
CONFIG = tree.TreeConfig(max_rows=6, max_children=3, max_embeddings=9, embedding_dim=8, max_depth=5)


def ints(*values: int, device: str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def grown(device: str = "cpu") -> tree.Forest:
    """Two trees: three children below each root, the second of them expanded, one leaf backed up."""
    forest = tree.Forest.create(2, CONFIG, device=device)
    both = ints(0, 1, device=device)
    priors = torch.tensor([[0.5, 0.3, 0.2]] * 2, device=device)
    three, one = ints(3, 3, device=device), ints(1, 1, device=device)
    first = tree.expand(forest, both, ints(0, 0, device=device), priors, three, one)
    tree.expand(forest, both, first + 1, priors, three, one)
    found = tree.select(forest, both)
    tree.backup(forest, both, found.path, found.depth, torch.tensor([0.5, -0.5], device=device))
    return forest


@pytest.mark.parametrize("lane", ["cpu", "reference"])
def test_outputs_given_are_the_ones_returned(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAINKERNELS_LANE", lane)
    both = ints(0, 1)
    plain, given = grown(), grown()
    want = tree.select(plain, both)
    out = tree.Selection(*(torch.full_like(t, 77) for t in want))
    got = tree.select(given, both, out=out, error=tree.error_word(given))
    assert got.path is out.path
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    best = tree.best_child(plain, both)
    into = tree.BestChild(*(torch.full_like(t, 77) for t in best))
    assert all(torch.equal(a, b) for a, b in zip(tree.best_child(given, both, out=into), best, strict=True))

    slots, priors = torch.full_like(both, 77), torch.full((2, 3), 1 / 3)
    made = tree.expand(given, both, got.node, priors, ints(2, 2), ints(1, 1), out=slots)
    assert made is slots
    assert torch.equal(slots, tree.expand(plain, both, want.node, priors, ints(2, 2), ints(1, 1)))
    child = tree.add_child(given, both, got.node, torch.tensor([0.1, 0.1]), out=slots)
    assert child is slots
    assert torch.equal(slots, tree.add_child(plain, both, want.node, torch.tensor([0.1, 0.1])))
    dropped = tree.backup(given, both, got.path, got.depth, torch.tensor([0.1, 0.2]), out=slots)
    assert dropped is slots
    assert slots.tolist() == [0, 0]

    tree.backup(plain, both, want.path, want.depth, torch.tensor([0.1, 0.2]))
    freed = torch.ones((2, CONFIG.num_slots), dtype=torch.bool)
    assert tree.reroot(given, both, best.slot, out=freed) is freed
    assert torch.equal(freed, tree.reroot(plain, both, best.slot))


def test_outputs_of_another_shape_are_refused() -> None:
    forest, both = grown(), ints(0, 1)
    found = tree.select(forest, both)
    with pytest.raises(ShapeError, match=r"out\.path"):
        tree.select(forest, both, out=found._replace(path=found.path[:1]))
    with pytest.raises(DtypeError, match="out"):
        tree.add_child(forest, both, found.node, torch.ones(2), out=torch.zeros(2))
    with pytest.raises(DtypeError, match="error"):
        tree.select(forest, both, error=torch.zeros(1))


def test_an_error_word_holds_the_first_error_and_is_reset() -> None:
    forest = grown()
    word = tree.error_word(forest)
    tree.raise_error(word)
    word.fill_(3 * 64 + 2)  # item 3, "the slot is no node"
    with pytest.raises(RangeError, match=r"item 3.*no node"):
        tree.raise_error(word)
    tree.raise_error(word)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_search_step_replays() -> None:
    """select and backup under a CUDA graph: no allocation, no wait; ten replays equal ten plain rounds."""
    both = ints(0, 1, device="cuda")
    value = torch.tensor([0.5, -0.25], device="cuda")
    plain, captured = grown("cuda"), grown("cuda")
    word = tree.error_word(captured)
    out, dropped = tree.select(captured, both), torch.empty_like(both)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.memory_allocated()
    with torch.cuda.graph(graph):
        tree.select(captured, both, out=out, error=word)
        tree.backup(captured, both, out.path, out.depth, value, out=dropped, error=word)
    assert torch.cuda.memory_allocated() == before
    for _ in range(10):
        graph.replay()
        found = tree.select(plain, both)
        tree.backup(plain, both, found.path, found.depth, value)
    tree.raise_error(word)
    assert torch.equal(plain.field("values"), captured.field("values"))
    assert torch.equal(plain.field("visits"), captured.field("visits"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_bad_item_is_found_later_and_changes_nothing() -> None:
    forest = grown("cuda")
    word, before = tree.error_word(forest), forest.field("visits").clone()
    found = tree.select(forest, ints(0, 1, device="cuda"))
    bad = found.path.clone()
    bad[1, 1] = 10**6
    tree.backup(forest, ints(0, 1, device="cuda"), bad, found.depth, torch.ones(2, device="cuda"), error=word)
    assert torch.equal(forest.field("visits"), before)
    with pytest.raises(RangeError, match="item 1"):
        tree.raise_error(word)
