"""decoder: the native step against its definition, rows that do not know of each other, arguments refused before a write."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rainkernels import DtypeError, RainKernelsError, RangeError, ShapeError, StrideError
from rainkernels.ops.decoder import (
    BlockWeights,
    DecoderStack,
    LinearWeight,
    NormWeight,
    StackWeights,
    StepPart,
    decoder_lane,
    linear_rows,
)
from rainkernels.testing.cases_decoder import CASES, DecoderCase, StepInputs, branches, rotary

pytestmark = pytest.mark.skipif(decoder_lane() != "cpu", reason="there is no native step here")
BY_ID = {case.id: case for case in CASES}
SLOTS = 64
# Of unit-sized numbers after two blocks: sums of 5 to 384 products in another order, and exp to 2^-23.
TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", "reference"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


def written(stack: DecoderStack) -> Tensor:
    return torch.stack([pool for pools in stack._pools for pair in pools for pool in pair])


def run(case: DecoderCase, inputs: StepInputs, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits, and all pools after the step."""
    stack = case.stack(SLOTS)
    return stack.step(*(inputs if states is None else with_states(inputs, states))), written(stack)


def with_states(inputs: StepInputs, states: Tensor) -> StepInputs:
    return inputs._replace(parts=tuple(part._replace(states=states) for part in inputs.parts))


def with_plan(inputs: StepInputs, plan: Any) -> StepInputs:
    return inputs._replace(parts=(inputs.parts[0]._replace(plan=plan),))


# What it computes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_native_equals_the_reference(case: DecoderCase, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case.inputs((9, 1, 6))
    states, expected_states = torch.zeros(2, SLOTS, case.hidden)
    logits, pools = run(case, inputs, states)
    assert case.stack(1)._native is not None
    monkeypatch.setenv("RAINKERNELS_LANE", "reference")
    assert case.stack(1)._native is None
    expected, expected_pools = run(case, inputs, expected_states)
    scale = max(1.0, float(expected.abs().max()))
    assert logits.shape == (3, case.vocab)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE * scale, rtol=0)
    torch.testing.assert_close(pools, expected_pools, atol=TOLERANCE * scale, rtol=0)
    torch.testing.assert_close(states, expected_states, atol=TOLERANCE * scale, rtol=0)
    assert pools[:, 1:17].abs().amin(dim=(0, 2, 3)).max() > 0
    assert not pools[:, 0].any()
    assert not pools[:, 17:].any()


@pytest.mark.slow
def test_random_stacks_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for seed in range(200):
        kv_heads = int(rng.integers(1, 4))
        case = DecoderCase(
            "random",
            num_qo_heads=kv_heads * int(rng.integers(1, 5)),
            num_kv_heads=kv_heads,
            head_dim=2 * int(rng.choice([1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 128])),
            hidden=int(rng.integers(1, 70 if seed % 5 else 1100)),
            intermediate=int(rng.integers(1, 90 if seed % 7 else 1100)),
            vocab=int(rng.integers(1, 90)),
            num_blocks=int(rng.integers(1, 4)),
            bias=bool(rng.integers(2)),
            head_bias=bool(rng.integers(2)),
            head_norms=bool(rng.integers(2)),
            sinks=bool(rng.integers(2)),
            softcap=float(rng.choice([0.0, 2.0])),
            windows=tuple(int(w) for w in rng.choice([0, 1, 3, 300], 2)),
        )
        lengths = (290, 3, 2) if seed % 10 == 0 else tuple(int(n) for n in rng.integers(1, 30, int(rng.integers(1, 6))))
        torch.set_num_threads(1 + seed % 2)
        inputs, found = case.inputs(lengths, seed), []
        for lane in ("cpu", "reference"):
            monkeypatch.setenv("RAINKERNELS_LANE", lane)
            stack = case.stack(sum(lengths) + 1, seed)
            found.append((stack.step(*inputs), written(stack)))
        for ours, expected in zip(*found, strict=True):
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(ours, expected, atol=5 * TOLERANCE * scale, rtol=0)


def test_definition_of_a_block() -> None:
    """One row with one key: attention returns the value, so that a block can be written down."""
    case = BY_ID["biases"]
    inputs = case.inputs((1,))
    w = case.make()
    x = w.embedding[inputs.ids[0]].double()

    def norm(x: Tensor, n: NormWeight) -> Tensor:
        return n.weight.double() * x / (x.pow(2).mean() + n.eps).sqrt()

    def apply(layer: LinearWeight, x: Tensor) -> Tensor:
        out = layer.weight.double() @ x
        return out if layer.bias is None else out + layer.bias.double()

    for block in w.blocks:
        v = apply(block.qkv, norm(x, block.attention_norm))[-case.num_kv_heads * case.head_dim :]
        groups = case.num_qo_heads // case.num_kv_heads
        x = x + apply(block.out, v.view(case.num_kv_heads, -1).repeat_interleave(groups, dim=0).flatten())
        gate, up = apply(block.gate_up, norm(x, block.mlp_norm)).chunk(2)
        x = x + apply(block.down, gate * torch.sigmoid(gate) * up)
    expected = apply(w.head, norm(x, w.norm))
    torch.testing.assert_close(run(case, inputs)[0][0].double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_step_goes_on_where_the_last_one_ended() -> None:
    case = BY_ID["windows"]
    whole = case.inputs((14,))
    expected, _ = run(case, whole)
    stack = case.stack(SLOTS)
    for first, last in ((0, 6), (6, 7), (7, 14)):
        plan, _ = branches((last,))
        rows = slice(first, last)
        plan = replace(
            plan, row_segment=plan.row_segment[rows], row_position=plan.row_position[rows], num_rows=last - first
        )
        part = StepInputs(
            whole.ids[rows], whole.positions[rows], whole.slots[rows], (StepPart(0, last - first, plan),), whole.cos,
            whole.sin, torch.tensor([last - first - 1]),
        )  # fmt: skip
        logits = stack.step(*part)
    assert torch.equal(logits, expected)


def test_empty_steps_and_nothing_wanted(lane: str) -> None:
    case = BY_ID["llama"]
    none = torch.empty(0, dtype=torch.int64)
    logits, pools = run(case, case.inputs(())._replace(wanted=none))
    assert logits.shape == (0, case.vocab)
    assert not pools.any()
    full, filled = run(case, case.inputs((5,)))
    logits, pools = run(case, case.inputs((5,))._replace(wanted=none))
    assert logits.shape == (0, case.vocab)
    assert torch.equal(pools, filled)
    twice, _ = run(case, case.inputs((5,))._replace(wanted=torch.tensor([4, 0, 4])))
    assert torch.equal(twice[0], twice[2])
    torch.testing.assert_close(twice[:1], full, atol=TOLERANCE, rtol=0)


def test_weights_changed_in_place_are_seen() -> None:
    case = BY_ID["llama"]
    stack, inputs = case.stack(SLOTS), case.inputs((5,))
    before = stack.step(*inputs)
    for weight in (stack.weights.blocks[1].down.weight, stack.weights.head.weight):
        weight.mul_(2.0)
    after = stack.step(*inputs)
    other = case.stack(SLOTS)
    other.weights.blocks[1].down.weight.mul_(2.0)
    other.weights.head.weight.mul_(2.0)
    assert torch.equal(after, other.step(*inputs))
    assert not torch.allclose(before, after)


# Rows


@pytest.mark.parametrize(
    "case", [BY_ID[name] for name in ("llama", "head-norms", "windows", "narrow-heads", "large-products")], ids=str
)
def test_a_row_keeps_its_bits(case: DecoderCase) -> None:
    """Alone, among others, with any number of threads."""
    torch.set_num_threads(1)
    lengths = (17, 1, 3, 2, 1, 1, 1, 5)
    inputs = case.inputs(lengths)
    every = inputs._replace(wanted=torch.arange(sum(lengths)))
    whole, _ = run(case, every)
    torch.set_num_threads(2)
    assert torch.equal(run(case, every)[0], whole)
    for rows in (1, 2, 3, 7, 13, 17):
        plan, positions = branches((rows,))
        part = StepInputs(
            inputs.ids[:rows], positions, inputs.slots[:rows], (StepPart(0, rows, plan),), inputs.cos, inputs.sin,
            torch.arange(rows),
        )  # fmt: skip
        assert torch.equal(run(case, part)[0], whole[:rows]), rows


def test_a_row_of_nan_stays_alone(lane: str) -> None:
    case = BY_ID["llama"]
    inputs = case.inputs((3, 2, 2))
    stack = case.stack(SLOTS)
    bad = int(inputs.ids[4])
    ids = inputs.ids.clone()
    ids[ids == bad] = (bad + 1) % case.vocab
    clean, _ = run(case, inputs._replace(ids=ids))
    ids[4] = bad
    stack.weights.embedding[bad] = float("nan")
    logits = stack.step(*inputs._replace(ids=ids))
    assert torch.equal(logits[[0, 2]], clean[[0, 2]])
    assert logits[1].isnan().all()


PROGRAM = """
import hashlib, raindecode, torch
from rainkernels.testing.cases_decoder import CASES, together
from rainkernels.testing.cases_decoder_edits import PLACES, StackEdits, captures_of, edit_slots
digest = hashlib.sha256()
edits = StackEdits("all", PLACES * 2, ("private", "basis", "preserve", "bfloat16", "cap"))
for case in CASES:
    stack = case.stack(64, adapters=[case.adapter(0), case.adapter(1)])
    assert stack._native is not None
    steps = [case.inputs((9, 1, 6)), case.inputs((5, 2), 1, member=1), case.inputs((7,), 2, member=2)]
    digest.update(stack.step(*together(*steps)).numpy().tobytes())
    places = [place for place in PLACES if place[0] < case.num_blocks]
    stack.set_edits([site for site in edits.sites(case.hidden) if site.layer < case.num_blocks])
    captures = captures_of(case, torch.arange(30), places)
    inputs = together(*steps)._replace(edit_slots=edit_slots(edits.sites(case.hidden), 30), captures=captures)
    digest.update(stack.step(*inputs).numpy().tobytes())
    digest.update(b"".join(capture.out.numpy().tobytes() for capture in captures))
    digest.update(b"".join(pool.numpy().tobytes() for pools in stack._pools for pair in pools for pool in pair))
print(digest.hexdigest())
"""


def test_instruction_sets_agree_bit_for_bit() -> None:
    """RAINKERNELS_ISA is read once per process, so each set gets its own."""
    digests = set()
    for isa in ("baseline", "avx2", "avx512"):
        env = os.environ | {"RAINKERNELS_ISA": isa}
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, check=True, capture_output=True)
        digests.add(done.stdout)
    assert len(digests) == 1


# Errors

Change = Callable[[StepInputs], StepInputs]


def at(name: str, index: int, value: int) -> Change:
    def change(inputs: StepInputs) -> StepInputs:
        tensor: Tensor = getattr(inputs, name).clone()
        tensor[index] = value
        return inputs._replace(**{name: tensor})

    return change


def to(name: str, make: Callable[[Tensor], Any]) -> Change:
    return lambda inputs: inputs._replace(**{name: make(getattr(inputs, name))})


BAD_STEPS: list[tuple[type[RainKernelsError], str, Change]] = [
    (RangeError, r"ids\[2\] is 61, allowed: 0 to 61 - 1", at("ids", 2, 61)),
    (RangeError, r"ids\[5\] is -1", at("ids", 5, -1)),
    (RangeError, r"positions\[1\] is 5, allowed: 0 to 5 - 1", at("positions", 1, 5)),
    (RangeError, r"slots\[0\] is 64, allowed: 0 to 64 - 1", at("slots", 0, SLOTS)),
    (RangeError, r"slots\[3\] is -1", at("slots", 3, -1)),
    (RangeError, r"wanted\[1\] is 6, allowed: 0 to 6 - 1", at("wanted", 1, 6)),
    (RangeError, r"positions\[0\] is -1", lambda i: at("ids", 3, -1)(at("positions", 0, -1)(i))),
    (
        RangeError,
        r"parts\[0\].plan names slot 70, the pools of member 0 have 64",
        lambda i: with_plan(i, replace(i.parts[0].plan, slots=i.parts[0].plan.slots + 64)),
    ),
    (DtypeError, "ids has dtype torch.int32", to("ids", Tensor.int)),
    (DtypeError, "positions has dtype", to("positions", Tensor.float)),
    (DtypeError, "slots has dtype torch.int64", to("slots", Tensor.long)),
    (DtypeError, "cos has dtype torch.float64", to("cos", Tensor.double)),
    (DtypeError, "ids must be a torch.Tensor, got list", to("ids", Tensor.tolist)),
    (DtypeError, r"parts\[0\].plan must be an AttentionPlan", lambda i: with_plan(i, None)),
    (DtypeError, r"parts\[0\] must be a StepPart, got tuple", lambda i: i._replace(parts=(tuple(i.parts[0]),))),
    (DtypeError, r"parts\[0\].rows must be a Python int", lambda i: i._replace(parts=(i.parts[0]._replace(rows=6.0),))),
    (RangeError, r"parts\[0\].rows is -1", lambda i: i._replace(parts=(i.parts[0]._replace(rows=-1),))),
    (
        RangeError,
        r"parts\[0\].member is 1, allowed: 0..0",
        lambda i: i._replace(parts=(i.parts[0]._replace(member=1),)),
    ),
    (ShapeError, "the parts have no rows, ids has 6", lambda i: i._replace(parts=())),
    (ShapeError, r"the parts have 6 \+ 6 rows, ids has 6", lambda i: i._replace(parts=i.parts * 2)),
    (ShapeError, r"ids has rank 2", to("ids", lambda t: t[None])),
    (ShapeError, r"positions has shape \[5\], expected \[6\]", to("positions", lambda t: t[1:])),
    (ShapeError, r"sin has shape \[5, 8\]", to("sin", lambda t: t[:, :8])),
    (ShapeError, r"wanted has rank 0", to("wanted", lambda t: t[0])),
    (ShapeError, r"parts\[0\] has 6 rows, its plan has 4", lambda i: with_plan(i, branches((4,))[0])),
    (StrideError, "slots has strides", to("slots", lambda t: t.repeat_interleave(2)[::2])),
]


@pytest.mark.parametrize(("kind", "text", "change"), BAD_STEPS)
def test_bad_steps_are_refused_and_write_nothing(
    kind: type[RainKernelsError], text: str, change: Change, lane: str
) -> None:
    case = BY_ID["llama"]
    stack, states = case.stack(SLOTS), torch.zeros(SLOTS, case.hidden)
    inputs = case.inputs((3, 2, 1))
    with pytest.raises(kind, match=text):
        stack.step(*change(with_states(inputs, states)))
    assert not written(stack).any()
    assert not states.any()
    stack.step(*with_states(inputs, states))
    assert states[1:7].any(dim=1).all()


def test_states_and_pools_are_checked(lane: str) -> None:
    case = BY_ID["llama"]
    stack, inputs = DecoderStack(case.make()), case.inputs((3,))
    pool = torch.zeros(SLOTS, case.num_kv_heads, case.head_dim)
    pairs = [(pool.clone(), pool.clone()) for _ in range(case.num_blocks)]
    with pytest.raises(ShapeError, match=r"member 0 has no pools yet: call set_pools\(pools, 0\) first"):
        stack.step(*inputs)
    for bad, kind, text in (
        (pairs[:1], ShapeError, "1 pairs of pools were given for 2 blocks"),
        ([pairs[0], (pool,)], DtypeError, r"pools\[1\] must be a tuple of 2"),
        ([pairs[0], (pool, pool[1:])], ShapeError, r"pools\[1\].v has shape \[63, 2, 16\], expected \[64, 2, 16\]"),
        ([(pool, pool.half()), pairs[1]], DtypeError, r"pools\[0\].v has dtype torch.float16"),
        ([(pool, None), pairs[1]], DtypeError, r"pools\[0\].v must be a torch.Tensor"),
        ([(pool.clone().requires_grad_(), pool), pairs[1]], DtypeError, r"pools\[0\].k requires grad"),
    ):
        with pytest.raises(kind, match=text):
            stack.set_pools(bad)  # type: ignore[arg-type]
    stack.set_pools(pairs)
    for states, kind, text in (
        (torch.zeros(SLOTS, 3), ShapeError, r"states has shape \[64, 3\], expected \[64, 48\]"),
        (torch.zeros(SLOTS, case.hidden).double(), DtypeError, "states has dtype"),
        (torch.zeros(SLOTS, case.hidden, requires_grad=True), DtypeError, "states requires grad"),
    ):
        with pytest.raises(kind, match=text):
            stack.step(*with_states(inputs, states))


def block0(**changes: Any) -> Callable[[StackWeights], StackWeights]:
    def change(w: StackWeights) -> StackWeights:
        block: BlockWeights = replace(w.blocks[0], **changes)
        return replace(w, blocks=(block, *w.blocks[1:]))

    return change


BAD_WEIGHTS: list[tuple[type[RainKernelsError], str, Callable[[StackWeights], StackWeights]]] = [
    (ShapeError, "blocks is empty", lambda w: replace(w, blocks=())),
    (ShapeError, "4 query heads, 3 KV heads", lambda w: replace(w, num_kv_heads=3)),
    (RangeError, "head_dim is 1, allowed: 2", lambda w: replace(w, head_dim=1)),
    (ShapeError, "KV heads of 15", lambda w: replace(w, head_dim=15)),
    (DtypeError, "num_qo_heads must be a Python int", lambda w: replace(w, num_qo_heads=4.0)),
    (DtypeError, "embedding has dtype torch.bfloat16", lambda w: replace(w, embedding=w.embedding.bfloat16())),
    (StrideError, "embedding has strides", lambda w: replace(w, embedding=w.embedding.t().contiguous().t())),
    (ShapeError, "head.weight has shape", lambda w: replace(w, head=LinearWeight(w.head.weight[1:], None))),
    (ShapeError, "head.bias has shape", lambda w: replace(w, head=LinearWeight(w.head.weight, torch.zeros(3)))),
    (RangeError, "norm.eps is -1", lambda w: replace(w, norm=NormWeight(w.norm.weight, -1.0))),
    (RangeError, "norm.eps is nan", lambda w: replace(w, norm=NormWeight(w.norm.weight, float("nan")))),
    (ShapeError, r"blocks\[0\].mlp_norm.weight", block0(mlp_norm=NormWeight(torch.ones(3), 0.0))),
    (ShapeError, r"blocks\[0\].qkv.weight", block0(qkv=LinearWeight(torch.zeros(64, 48), None))),
    (ShapeError, r"blocks\[0\].down.weight has rank 1", block0(down=LinearWeight(torch.zeros(48), None))),
    (ShapeError, r"blocks\[1\].gate_up.weight", block0(
        down=LinearWeight(torch.zeros(48, 7), None), gate_up=LinearWeight(torch.zeros(14, 48), None))),
    (RangeError, r"blocks\[0\].softmax_scale is 0", block0(softmax_scale=0.0)),
    (RangeError, r"blocks\[0\].softcap is -1", block0(softcap=-1.0)),
    (RangeError, r"blocks\[0\].sliding_window is -1", block0(sliding_window=-1)),
    (ShapeError, r"blocks\[0\].sinks", block0(sinks=torch.zeros(2))),
    (ShapeError, "q_norm and k_norm belong together", block0(q_norm=NormWeight(torch.ones(16), 0.0))),
    (RangeError, "q_norm has eps 0.0, k_norm 0.1", block0(
        q_norm=NormWeight(torch.ones(16), 0.0), k_norm=NormWeight(torch.ones(16), 0.1))),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "change"), BAD_WEIGHTS)
def test_bad_weights_are_refused(
    kind: type[RainKernelsError], text: str, change: Callable[[StackWeights], StackWeights]
) -> None:
    with pytest.raises(kind, match=text):
        DecoderStack(change(BY_ID["llama"].make()))


def test_where_there_is_no_native_step_the_definition_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_ID["llama"]
    native, _ = run(case, case.inputs((3,)))
    monkeypatch.setattr("rainkernels.ops.decoder.decoder_lane", lambda: "reference")
    assert case.stack(1)._native is None
    torch.testing.assert_close(run(case, case.inputs((3,)))[0], native, atol=TOLERANCE, rtol=0)


def test_cosines_are_those_of_the_definition() -> None:
    cos, sin = rotary(4, 6)
    assert torch.equal(cos[:, :3], cos[:, 3:])
    assert torch.equal(sin[:, :3], -sin[:, 3:])
    torch.testing.assert_close(sin[3, 3:], torch.tensor([3.0, 3 * 10_000 ** (-1 / 3), 3 * 10_000 ** (-2 / 3)]).sin())


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(0, 8, 8), (1, 40, 9), (2, 128, 70), (5, 20, 3), (37, 1100, 77)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_linear_rows(rows: int, inputs: int, outputs: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for bias in (None, torch.randn(outputs, generator=generator)):
            made = linear_rows(x, LinearWeight(weight, bias))
            torch.testing.assert_close(made, torch.nn.functional.linear(x, weight, bias), atol=1e-4, rtol=1e-5)
            for r in range(rows):
                assert torch.equal(linear_rows(x[r : r + 1], LinearWeight(weight, bias))[0], made[r])
    finally:
        torch.set_num_threads(before)


def test_linear_rows_names_what_is_wrong() -> None:
    linear = LinearWeight(torch.ones(4, 8), None)
    with pytest.raises(ShapeError, match=r"^x has shape"):
        linear_rows(torch.ones(2, 7), linear)
    with pytest.raises(ShapeError, match=r"^out has shape"):
        linear_rows(torch.ones(2, 8), linear, torch.ones(2, 5))
    with pytest.raises(DtypeError, match=r"^weight has dtype"):
        linear_rows(torch.ones(2, 8), LinearWeight(torch.ones(4, 8, dtype=torch.float64), None))
