"""Ops of every family inside torch.compile(fullgraph=True), between operations of PyTorch: one graph, the same numbers.

The back end is aot_eager: all of the capture and none of inductor's code generation, which an op of ours does not see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_edits_checks import registered_tables
from test_tree import op_calls
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from rainkernels import has_native
from rainkernels.testing import cases_attention, cases_edits, cases_kv, cases_logits

pytestmark = pytest.mark.skipif(not has_native(), reason="rainkernels._C is not built")
OPS = torch.ops.rainkernels
TREE_OPS = sorted(op_calls())


def case(cases: Any, name: str) -> Any:
    return next(one for one in cases if one.id == name)


def copied(arguments: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, arguments)


def assert_compiles(function: Callable[..., Any], *arguments: Any) -> None:
    """One graph without a break; its results, and what it wrote into its arguments, are those of the plain call."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain, mine = copied(arguments), copied(arguments)
    with torch.inference_mode():
        expected, got = function(*plain), compiled(*mine)
    theirs, ours = tree_leaves((expected, plain)), tree_leaves((got, mine))
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)


def test_attention() -> None:
    i = case(cases_attention.CASES, "step").make(torch.float32)

    def step(q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: list[Tensor]) -> tuple[Tensor, Tensor]:
        v, lse = OPS.tree_attention(q * 2, k_pool, v_pool, *plan, 0.125, 0.0, 20, None)
        return v.relu() + 1, lse

    assert_compiles(step, i.q, i.k_pool, i.v_pool, list(i.plan_inputs.values()))


def test_merging_states() -> None:
    g = torch.Generator().manual_seed(0)

    def merged(v: Tensor, lse: Tensor, other: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        v, lse = OPS.merge_state(v * 2, lse, other, weight + 1)
        return v - 1, lse

    v = [torch.randn(3, 2, 8, generator=g) for _ in range(2)]
    assert_compiles(merged, v[0], torch.randn(3, 2, generator=g), v[1], torch.randn(3, 2, generator=g))


def test_kv() -> None:
    i = case(cases_kv.CASES, "prefill").make(torch.float32)

    def moved(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: Tensor) -> Tensor:
        OPS.kv_write(k + 1, v * 2, k_pool, v_pool, slots)
        OPS.kv_copy(k_pool, v_pool, slots[:4].contiguous(), slots[4:8].contiguous())
        return k_pool.sum() + v_pool.sum()

    assert_compiles(moved, *(i[name] for name in ("k", "v", "k_pool", "v_pool", "slot_mapping")))


@pytest.mark.parametrize("name", ["tiles", "bias", "plausibility", "eight-models"])
@pytest.mark.parametrize("stats", [False, True])
def test_mixing_and_drawing(name: str, stats: bool) -> None:
    i = case(cases_logits.CASES, name).make(torch.float32)
    given = dict(i.options)
    first = [given.pop(key) for key in ("temperature", "seed", "position")]

    def drawn(logits: list[Tensor], weights: Tensor, first: list[Tensor], given: dict[str, Any]) -> list[Tensor]:
        token, prob, *rest = OPS.mix_sample(logits, weights, *first, stats=stats, **given)
        return [token + 1, prob.log(), *rest]

    assert_compiles(drawn, list(i.logits), i.weights, first, given)


def test_ranks() -> None:
    g = torch.Generator().manual_seed(0)

    def ranked(base: Tensor, aligned: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        rank, logprob, *_ = OPS.logits_rank(base * 2, aligned, token)
        return rank + 1, logprob.exp()

    assert_compiles(
        ranked, torch.randn(4, 300, generator=g), torch.randn(4, 300, generator=g), torch.tensor([0, 7, 299, 5])
    )


@pytest.mark.parametrize(("name", "table"), registered_tables(), ids=lambda v: v if isinstance(v, str) else "")
def test_edits(name: str, table: dict[str, Any]) -> None:
    i = case(cases_edits.CASES, name).make(torch.float32)

    def edited(x: Tensor, residual: Tensor, weight: Tensor, slots: Tensor, table: dict[str, Any]) -> Tensor:
        OPS.edit_(x, slots, **table)
        normed: Tensor = OPS.add_edit_rmsnorm(x * 0.5, residual, weight, 1e-6, slots=slots, **table)
        return normed + OPS.add_edit_rmsnorm(x, residual, weight, 1e-6)

    assert_compiles(edited, i.x, i.residual, i.weight, i.slots, table)


@pytest.mark.parametrize("name", TREE_OPS)
def test_trees(name: str) -> None:
    fields, config, ids, *rest = op_calls()[name]

    def moved(fields: list[Tensor], ids: Tensor, rest: list[Any]) -> list[Any]:
        out = getattr(OPS, name)(fields, config, ids + 0, *rest)
        return [fields[0] * 2, out]

    assert_compiles(moved, fields, ids, rest)


def test_every_registered_op_is_compiled_here() -> None:
    """A new op has to be added above."""
    known = {
        "tree_attention",
        "merge_state",
        "kv_write",
        "kv_copy",
        "mix_sample",
        "logits_rank",
        "edit_",
        "add_edit_rmsnorm",
    }
    registered = {
        name.removeprefix("rainkernels::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("rainkernels::")
    }
    assert registered == known | set(TREE_OPS)
