"""decoder: rows of several members in one step, low-rank adapters beside the stack as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rainkernels import DtypeError, RainKernelsError, RangeError, ShapeError, StrideError
from rainkernels.ops.decoder import BlockUpdate, DecoderStack, LowRank, StepPart, decoder_lane
from rainkernels.testing.cases_decoder import CASES, DecoderCase, StepInputs, branches, merged, together

pytestmark = pytest.mark.skipif(decoder_lane() != "cpu", reason="there is no native step here")
BY_ID = {case.id: case for case in CASES}
SLOTS = 40
# As in test_decoder.py; an update adds two rounded products to each of a block's.
TOLERANCE = 4e-5


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", "reference"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


def pools_of(stack: DecoderStack, member: int) -> Tensor:
    return torch.stack([pool for pair in stack._pools[member] for pool in pair])


def every(inputs: StepInputs) -> StepInputs:
    return inputs._replace(wanted=torch.arange(len(inputs.ids)))


def members(case: DecoderCase) -> list[StepInputs]:
    """Steps of three members; what they attend to lies in the same slots of their own pools."""
    return [every(case.inputs(lengths, i, member=i)) for i, lengths in enumerate([(5, 1, 3), (4, 2, 1, 6), (7,)])]


def stack_of(case: DecoderCase, num_adapters: int = 2) -> DecoderStack:
    return case.stack(SLOTS, adapters=[case.adapter(i) for i in range(num_adapters)])


def close(ours: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(ours, expected, atol=TOLERANCE * scale, rtol=0)


# What it computes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_members_equal_the_reference_and_merged_weights(case: DecoderCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: the stack as it is keeps its bits beside them."""
    alone = members(case)
    states = [torch.zeros(SLOTS, case.hidden) for _ in alone]
    steps = [step._replace(parts=(step.parts[0]._replace(states=s),)) for step, s in zip(alone, states, strict=True)]
    inputs = together(steps[1], steps[0], steps[2])
    stack = stack_of(case)
    logits = stack.step(*inputs)
    of_member = dict(zip((1, 0, 2), logits.split([13, 9, 7]), strict=True))

    bare = case.stack(SLOTS)
    assert torch.equal(of_member[0], bare.step(*alone[0]))
    assert torch.equal(pools_of(stack, 0), pools_of(bare, 0))
    for i in (1, 2):
        other = case.stack(SLOTS)
        other = DecoderStack(merged(case.make(), case.adapter(i - 1)))
        other.set_pools([(torch.zeros_like(k), torch.zeros_like(v)) for k, v in bare._pools[0]])
        part = alone[i].parts[0]._replace(member=0)
        close(of_member[i], other.step(*alone[i]._replace(parts=(part,))))
        close(pools_of(stack, i), pools_of(other, 0))
        assert not torch.allclose(of_member[i], bare.step(*alone[i]._replace(parts=(part,))), atol=1e-2)

    kept = [s.clone() for s in states]
    monkeypatch.setenv("RAINKERNELS_LANE", "reference")
    reference = stack_of(case)
    assert reference._native is None
    close(logits, reference.step(*inputs))
    for i in range(3):
        close(pools_of(stack, i), pools_of(reference, i))
        close(kept[i], states[i])
        assert kept[i][1 : 1 + len(alone[i].ids)].any(dim=1).all()


def test_parts_of_one_member_see_each_other(lane: str) -> None:
    """A run of rows, cut into parts with other members between and parts without rows, is the run."""
    case = BY_ID["windows"]
    whole, stack = every(case.inputs((9,), member=1)), stack_of(case)
    expected = stack.step(*whole)
    between, empty = every(case.inputs((2,), 5, member=2)), case.inputs((), member=0)
    plan = branches((9,))[0]

    def rows(first: int, last: int) -> StepInputs:
        at = slice(first, last)
        cut = replace(plan, row_segment=plan.row_segment[at], row_position=plan.row_position[at], num_rows=last - first)
        return whole._replace(
            ids=whole.ids[at], positions=whole.positions[at], slots=whole.slots[at],
            parts=(StepPart(1, last - first, cut),), wanted=torch.arange(last - first),
        )  # fmt: skip

    cut = stack_of(case)
    found = cut.step(*together(empty, rows(3, 9), between, empty, rows(0, 2), rows(2, 3)))
    close(torch.cat([found[8:], found[:6]]), expected)
    if lane == "cpu":
        assert torch.equal(torch.cat([found[8:], found[:6]]), expected)
    close(pools_of(cut, 1), pools_of(stack, 1))


def test_updates_that_are_empty_or_0_leave_the_bits(lane: str) -> None:
    case = BY_ID["llama"]
    inputs = every(case.inputs((6, 2)))
    zero = tuple(replace(b, qkv=tuple(p._replace(scale=0.0) for p in b.qkv)) for b in case.adapter())
    qkv_only = tuple(BlockUpdate(qkv=b.qkv) for b in zero)
    stack = case.stack(SLOTS, adapters=[[BlockUpdate()] * case.num_blocks, qkv_only])
    expected = stack.step(*inputs)
    for member in (1, 2):
        part = inputs.parts[0]._replace(member=member)
        assert torch.equal(stack.step(*inputs._replace(parts=(part,))), expected)


def test_adapters_are_copied(lane: str) -> None:
    case = BY_ID["llama"]
    adapter, inputs = case.adapter(), case.inputs((3,), member=1)
    stack = case.stack(SLOTS, adapters=[adapter])
    before = stack.step(*inputs)
    for part in adapter[0].qkv:
        part.down.zero_()
        part.up.zero_()
    assert torch.equal(stack.step(*inputs), before)


# Rows


@pytest.mark.parametrize("case", [BY_ID[name] for name in ("llama", "narrow-heads", "large-products")], ids=str)
def test_a_row_of_any_member_keeps_its_bits(case: DecoderCase) -> None:
    """Alone, beside the rows of others, with any number of threads, and one row at a time."""
    alone = members(case)
    expected = [stack_of(case).step(*step) for step in alone]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for order in ((0, 1, 2), (2, 1), (1, 0)):
            found = stack_of(case).step(*together(*(alone[i] for i in order)))
            assert torch.equal(found, torch.cat([expected[i] for i in order])), (threads, order)
    one = every(case.inputs((1,), 1, member=1))
    one = one._replace(ids=alone[1].ids[:1], cos=alone[1].cos, sin=alone[1].sin)
    assert torch.equal(stack_of(case).step(*one), expected[1][:1])


def test_attention_of_short_parts_runs_side_by_side() -> None:
    """Long enough for a second thread together, not one by one: then each part has a thread of its own."""
    case = BY_ID["head-norms"]
    # 48 to 51 rows over about 48 keys are up to 0.8 million multiply-adds, 91 rows over 90 keys more than a million.
    short = [case.inputs((48, i), i, member=i % 3) for i in range(1, 4)]
    long = [case.inputs((90, 1), 9, member=0), case.inputs((90, 2), 9, member=2)]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        stack = case.stack(SLOTS * 3, adapters=[case.adapter(0), case.adapter(1)])
        found.append((stack.step(*together(*short)), stack.step(*together(*long))))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_nan_in_an_adapter_stays_with_its_rows(lane: str) -> None:
    case = BY_ID["llama"]
    alone = members(case)
    inputs = together(*alone)
    clean = stack_of(case).step(*inputs)
    adapters = [list(case.adapter(0)), case.adapter(1)]
    bad = adapters[0][1].down[0]
    adapters[0][1] = replace(adapters[0][1], down=(bad._replace(up=torch.full_like(bad.up, float("nan"))),))
    logits = case.stack(SLOTS, adapters=adapters).step(*inputs)
    assert torch.equal(logits[:9], clean[:9])
    assert logits[9:22].isnan().all()
    assert torch.equal(logits[22:], clean[22:])


# Errors


def part_of(inputs: StepInputs, index: int, **changes: Any) -> StepInputs:
    parts = list(inputs.parts)
    parts[index] = parts[index]._replace(**changes)
    return inputs._replace(parts=tuple(parts))


BAD_STEPS: list[tuple[type[RainKernelsError], str, Callable[[StepInputs], StepInputs]]] = [
    (RangeError, r"parts\[1\].member is 3, allowed: 0..2", lambda i: part_of(i, 1, member=3)),
    (DtypeError, r"parts\[1\].member must be a Python int, got bool", lambda i: part_of(i, 1, member=True)),
    (ShapeError, r"parts\[1\] has 4 rows, its plan has 3", lambda i: part_of(i, 1, rows=4)),
    (ShapeError, r"the parts have 2 rows, ids has 5", lambda i: i._replace(parts=i.parts[:1])),
    (ShapeError, r"member 2 has no pools yet: call set_pools\(pools, 2\) first", lambda i: part_of(i, 1, member=2)),
    (ShapeError, r"parts\[1\].states has shape \[40, 48\], expected \[20, 48\]",
        lambda i: part_of(i, 1, states=torch.zeros(40, 48))),
    (DtypeError, r"parts\[0\].states has dtype", lambda i: part_of(i, 0, states=torch.zeros(40, 48).half())),
    (RangeError, r"parts\[1\].plan names slot 33, the pools of member 1 have 20", lambda i: part_of(
        i, 1, plan=replace(i.parts[1].plan, slots=i.parts[1].plan.slots + 30))),
    # 25 is a slot of member 0, not of member 1.
    (RangeError, r"slots\[4\] is 25, allowed: 0 to 20 - 1 in the pools of member 1",
        lambda i: i._replace(slots=torch.tensor([25, 2, 1, 2, 25], dtype=torch.int32))),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "change"), BAD_STEPS)
def test_bad_parts_are_refused_and_write_nothing(
    kind: type[RainKernelsError], text: str, change: Callable[[StepInputs], StepInputs], lane: str
) -> None:
    case = BY_ID["llama"]
    stack = DecoderStack(case.make(), [case.adapter(0), case.adapter(1)])
    pools = [
        [tuple(torch.zeros(2, slots, case.num_kv_heads, case.head_dim).unbind()) for _ in range(case.num_blocks)]
        for slots in (40, 20)
    ]
    for member, pairs in enumerate(pools):
        stack.set_pools(pairs, member)  # type: ignore[arg-type]
    with pytest.raises(RangeError, match=r"member is 3, allowed: 0..2; 0 is the stack as it is"):
        stack.set_pools(pools[0], 3)  # type: ignore[arg-type]
    inputs = together(case.inputs((2,)), case.inputs((3,), member=1))
    with pytest.raises(kind, match=text):
        stack.step(*change(inputs))
    assert not any(pool.any() for pairs in pools for pair in pairs for pool in pair)
    stack.step(*inputs)
    stack.drop_pools()
    with pytest.raises(ShapeError, match="member 0 has no pools yet"):
        stack.step(*inputs)


def with_part(product: str, *parts: LowRank) -> Callable[[list[BlockUpdate]], Any]:
    return lambda blocks: [blocks[0], replace(blocks[1], **{product: parts})]


def part(inputs: int, outputs: int, first: int = 0, rank: int = 2, scale: float = 1.0) -> LowRank:
    return LowRank(torch.ones(rank, inputs), torch.ones(outputs, rank), first, scale)


BAD_ADAPTERS: list[tuple[type[RainKernelsError], str, Callable[[list[BlockUpdate]], Any]]] = [
    (ShapeError, r"adapters\[1\] has 1 block updates, the stack 2 blocks", lambda blocks: blocks[:1]),
    (DtypeError, r"blocks\[1\] must be a BlockUpdate, got tuple", lambda blocks: [blocks[0], ()]),
    (ShapeError, r"adapters\[1\].blocks\[1\].qkv\[1\].up has shape \[16, 2\], expected \[any, 3\]", with_part(
        "qkv", part(48, 16), LowRank(torch.ones(3, 48), torch.ones(16, 2), 16, 1.0))),
    (ShapeError, r"out\[0\].down has shape \[2, 48\], expected \[any, 64\]", with_part("out", part(48, 48))),
    (ShapeError, r"out\[0\].down has shape \[0, 64\], expected a rank of 1", with_part("out", part(64, 48, rank=0))),
    (ShapeError, r"gate_up\[0\].up has 80 rows and begins at output 81, the product has 160", with_part(
        "gate_up", part(48, 80, 81))),
    (ShapeError, r"down\[0\].up has 0 rows", with_part("down", part(80, 0))),
    (RangeError, r"down\[0\].first is -1", with_part("down", part(80, 5, -1))),
    (RangeError, r"down\[0\].scale is inf, it must be finite", with_part("down", part(80, 5, scale=float("inf")))),
    (DtypeError, r"down\[0\].scale must be a Python number", with_part("down", part(80, 5, scale=None))),  # type: ignore[arg-type]
    (RangeError, r"qkv\[1\] ends before output 20, adapters\[1\].blocks\[1\].qkv\[0\] begins at 19", with_part(
        "qkv", part(48, 16, 19), part(48, 20))),
    (DtypeError, r"down\[0\].up has dtype torch.float16", with_part("down", part(80, 5)._replace(up=torch.ones(5, 2).half()))),
    (StrideError, r"down\[0\].down has strides", with_part("down", part(80, 5)._replace(down=torch.ones(80, 2).t()))),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "change"), BAD_ADAPTERS)
def test_bad_adapters_are_refused(
    kind: type[RainKernelsError], text: str, change: Callable[[list[BlockUpdate]], Any]
) -> None:
    case = BY_ID["llama"]
    with pytest.raises(kind, match=text):
        DecoderStack(case.make(), [case.adapter(), change(list(case.adapter()))])
