"""decoder: edits and captures of hidden states inside a step, against their definition and bit for bit against the ops."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from rainkernels.ops.decoder import DecoderStack, EditSite, StackWeights, decoder_lane, linear_rows
from rainkernels.ops.edits import add_edit_rmsnorm, edit_
from rainkernels.ops.edits_tables import EditTable
from rainkernels.reference import decoder as reference
from rainkernels.testing.cases_decoder import CASES as STACKS
from rainkernels.testing.cases_decoder import DecoderCase, StepInputs, branches, together
from rainkernels.testing.cases_decoder_edits import (
    CASES,
    NUM_SLOTS,
    PLACES,
    StackEdits,
    captures_of,
    edit_slots,
    edit_table,
)

pytestmark = pytest.mark.skipif(decoder_lane() != "cpu", reason="there is no native step here")
STACK = {case.id: case for case in STACKS}
EDITS = {case.id: case for case in CASES}
SLOTS = 64
NO_EDIT = (0, NUM_SLOTS - 2, NUM_SLOTS - 1)  # what these slots hold edits nothing


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


def stack_with(case: DecoderCase, sites: Sequence[EditSite], num_adapters: int = 0) -> DecoderStack:
    stack = case.stack(SLOTS, adapters=[case.adapter(i) for i in range(num_adapters)])
    stack.set_edits(sites)
    return stack


def pools_of(stack: DecoderStack, member: int = 0) -> Tensor:
    return torch.stack([pool for pair in stack._pools[member] for pool in pair])


def with_states(inputs: StepInputs, states: Tensor) -> StepInputs:
    return inputs._replace(parts=tuple(part._replace(states=states) for part in inputs.parts))


def inputs_of(case: DecoderCase, sites: Sequence[EditSite], lengths: tuple[int, ...] = (9, 1, 6)) -> StepInputs:
    """Logits and captures of every row, slots of every kind."""
    inputs = case.inputs(lengths)
    every = torch.arange(len(inputs.ids))
    places = [place for place in PLACES if place[0] < case.num_blocks]
    return inputs._replace(
        wanted=every, edit_slots=edit_slots(sites, len(every)), captures=captures_of(case, every, places)
    )


def fresh(inputs: StepInputs) -> StepInputs:
    """With captures of its own."""
    return inputs._replace(captures=tuple(c._replace(out=torch.zeros_like(c.out)) for c in inputs.captures))


def close(ours: Tensor, expected: Tensor, relative: float) -> None:
    """Row by row, by their lengths."""
    off = (ours.double() - expected.double()).norm(dim=-1)
    assert (off <= relative * expected.double().norm(dim=-1)).all(), float(off.max())


# What it computes


@pytest.mark.parametrize("edits", CASES, ids=str)
@pytest.mark.parametrize("name", ["llama", "biases", "narrow-heads"])
def test_native_equals_the_reference(edits: StackEdits, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows of three members; every edit is seen."""
    case = STACK[name]
    sites, found = edits.sites(case.hidden), []
    steps = [case.inputs(lengths, i, member=i) for i, lengths in enumerate([(9, 1, 6), (4, 2), (7,)])]
    inputs = together(*(step._replace(wanted=torch.arange(len(step.ids))) for step in steps))
    rows = torch.randperm(len(inputs.ids), generator=torch.Generator().manual_seed(1))
    for lane in ("cpu", "reference"):
        monkeypatch.setenv("RAINKERNELS_LANE", lane)
        stack = stack_with(case, sites, 2)
        assert (stack._native is not None) == (lane == "cpu")
        plain = stack.step(*inputs)
        captures = captures_of(case, rows)
        step = inputs._replace(edit_slots=edit_slots(sites, len(rows)), captures=captures)
        logits = stack.step(*step)
        assert not torch.allclose(plain, logits, atol=1e-2)
        found.append([logits, *(c.out for c in captures), *(pools_of(stack, i) for i in range(3))])
    for ours, expected in zip(*found, strict=True):
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(ours, expected, atol=1e-4 * scale, rtol=0)


def doubled(value: Any) -> Any:
    """The weights in float64."""
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, tuple):
        items = [doubled(v) for v in value]
        return value._make(items) if hasattr(value, "_make") else tuple(items)
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{name: doubled(getattr(value, name)) for name in value.__dataclass_fields__})
    return value


def attend_double(inputs: StepInputs, lengths: tuple[int, ...]) -> reference.Attend:
    """Attention of `branches(lengths)` from its definition, in float64."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    runs = [next(i for i, end in enumerate(ends) if r < end) for r in range(ends[-1])]
    first = [end - n for end, n in zip(ends, lengths, strict=True)]
    seen = [[*range(lengths[0] if runs[r] else 0), *range(first[runs[r]], r + 1)] for r in range(ends[-1])]

    def attend(q: Tensor, k_pool: Tensor, v_pool: Tensor, block: Any) -> Tensor:
        group, out = q.shape[1] // k_pool.shape[1], torch.empty_like(q)
        for r, keys in enumerate(seen):
            at = inputs.slots[keys].long()
            k, v = (pool[at].repeat_interleave(group, dim=1) for pool in (k_pool, v_pool))
            weights = (torch.einsum("hd,nhd->hn", q[r], k) * block.softmax_scale).softmax(-1)
            out[r] = torch.einsum("hn,nhd->hd", weights, v)
        return out

    return attend


def double_step(
    weights: StackWeights, inputs: StepInputs, sites: Sequence[EditSite], lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """States, logits and captures of the definition in float64."""
    w = doubled(weights)
    shape = SLOTS, w.num_kv_heads, w.head_dim
    pools = [(torch.zeros(shape).double(), torch.zeros(shape).double()) for _ in w.blocks]
    captures = [c._replace(out=c.out.double()) for c in inputs.captures]
    part = reference.PartRows(slice(0, len(inputs.ids)), pools, None, attend_double(inputs, lengths))
    assert inputs.edit_slots is not None
    edits = [
        reference.RowEdits(s.layer, s.tap, inputs.edit_slots[s.column], s.table.reference_arguments()) for s in sites
    ]
    step = (inputs.ids, inputs.positions, inputs.slots, [part], inputs.cos.double(), inputs.sin.double())
    states, logits = reference.step(w, *step, inputs.wanted, edits, captures)
    return states, logits, [c.out for c in captures]


@pytest.mark.parametrize("edits", CASES, ids=str)
def test_within_1e_5_of_float64(edits: StackEdits) -> None:
    case, lengths = STACK["head-norms"], (9, 1, 6)
    sites = edits.sites(case.hidden)
    inputs = inputs_of(case, sites, lengths)
    states = torch.zeros(SLOTS, case.hidden)
    logits = stack_with(case, sites).step(*with_states(inputs, states))
    expected = double_step(case.make(), inputs, sites, lengths)
    close(states[inputs.slots.long()], expected[0], 1e-5)
    close(logits, expected[1], 1e-5)
    for capture, out in zip(inputs.captures, expected[2], strict=True):
        close(capture.out, out, 1e-5)


def test_definition_of_an_edited_block(lane: str) -> None:
    """One row with one key, where attention returns the value; the edits from their published loops."""
    case = STACK["biases"]
    w, inputs = doubled(case.make()), case.inputs((1,))
    directions = torch.randn(3, case.hidden, generator=torch.Generator().manual_seed(0)).double()
    sites, loops = [], {}
    for i, (op, alpha) in enumerate((("project", 0.9), ("tanh", 2.0), ("boost", 0.7), ("add", -1.5))):
        layer, tap = PLACES[(0, 1, 2, 5)[i]]
        table = EditTable.create(2, 3, case.hidden)
        table.set_slot(1, directions, op=op, alpha=alpha)  # type: ignore[arg-type]
        sites.append(EditSite(layer, tap, table, 0))
        loops[layer, tap] = op, alpha

    def norm(x: Tensor, n: Any) -> Tensor:
        return n.weight * x / (x.pow(2).mean() + n.eps).sqrt()

    def apply(layer: Any, x: Tensor) -> Tensor:
        return layer.weight @ x + layer.bias

    seen = []

    def at(place: tuple[int, Any], h: Tensor) -> Tensor:
        seen.append(h)
        if place in loops:
            op, alpha = loops[place]
            for u in directions:
                u = u / u.norm()
                c = h @ u
                h = h + alpha * {"project": -c, "tanh": c.tanh(), "boost": c, "add": torch.tensor(1.0)}[op] * u
        return h

    x = w.embedding[inputs.ids[0]]
    for i, block in enumerate(w.blocks):
        v = apply(block.qkv, norm(x, block.attention_norm))[-case.num_kv_heads * case.head_dim :]
        groups = case.num_qo_heads // case.num_kv_heads
        mixed = v.view(case.num_kv_heads, -1).repeat_interleave(groups, dim=0).flatten()
        x = x + at((i, "attn_out"), apply(block.out, mixed))
        gate, up = apply(block.gate_up, norm(x, block.mlp_norm)).chunk(2)
        x = at((i, "block_out"), x + at((i, "mlp_out"), apply(block.down, silu(gate) * up)))
    expected = apply(w.head, norm(x, w.norm))

    captures = captures_of(case, torch.tensor([0]))
    slots = torch.ones(1, 1, dtype=torch.int32)
    logits = stack_with(case, sites).step(*inputs._replace(edit_slots=slots, captures=captures))
    close(logits[0], expected, 1e-5)
    for capture, h in zip(captures, seen, strict=True):
        close(capture.out[0], h, 1e-5)


@pytest.mark.parametrize("edits", CASES, ids=str)
@pytest.mark.parametrize("name", ["llama", "narrow-heads"])
def test_captures_are_exact(edits: StackEdits, name: str) -> None:
    """The residual, added up from captured rows with the ops of the edits family, is that of the step bit for bit."""
    case = STACK[name]
    sites = edits.sites(case.hidden)
    inputs, states = inputs_of(case, sites), torch.zeros(SLOTS, case.hidden)
    logits = stack_with(case, sites).step(*with_states(inputs, states))
    at = {(c.layer, c.tap): c.out for c in inputs.captures}
    assert inputs.edit_slots is not None

    def edited(place: tuple[int, Any]) -> Tensor:
        h = at[place].clone()
        for site in sites:
            if (site.layer, site.tap) == place:
                edit_(h, site.table, inputs.edit_slots[site.column])  # type: ignore[index]
        return h

    w = case.make()
    x = w.embedding[inputs.ids]
    for i, block in enumerate(w.blocks):
        x = x + edited((i, "attn_out"))
        normed = add_edit_rmsnorm(x, torch.zeros_like(x), block.mlp_norm.weight, None, None, eps=block.mlp_norm.eps)
        gate, up = linear_rows(normed.normed, block.gate_up).chunk(2, dim=1)
        close(at[i, "mlp_out"], linear_rows(silu(gate) * up, block.down), 1e-5)
        x = x + edited((i, "mlp_out"))
        assert torch.equal(at[i, "block_out"], x)
        x = edited((i, "block_out"))
    final = add_edit_rmsnorm(x, torch.zeros_like(x), w.norm.weight, None, None, eps=w.norm.eps).normed
    assert torch.equal(states[inputs.slots.long()], final)
    assert torch.equal(logits, linear_rows(final, w.head))


def test_captures_of_some_rows(lane: str) -> None:
    """Any rows in any order, none, the same place twice; without edits too, and nothing else changes."""
    case = STACK["llama"]
    inputs = inputs_of(case, ())._replace(edit_slots=None)
    stack = stack_with(case, ())
    logits = stack.step(*inputs)
    rows = torch.tensor([7, 0, 7, 15])
    some = (*captures_of(case, rows), *captures_of(case, torch.empty(0, dtype=torch.int64)), *captures_of(case, rows))
    assert torch.equal(stack.step(*inputs._replace(captures=some)), logits)
    for i, whole in enumerate(inputs.captures):
        assert whole.out.any(dim=1).all()
        assert torch.equal(some[i].out, whole.out[rows])
        assert torch.equal(some[i + 2 * len(PLACES)].out, whole.out[rows])
    assert torch.equal(stack.step(*inputs._replace(captures=())), logits)


# Tables


def test_sites_are_replaced_and_removed(lane: str) -> None:
    case = STACK["llama"]
    first, second = EDITS["every-place"].sites(case.hidden), EDITS["basis-mlp_out"].sites(case.hidden)
    inputs = inputs_of(case, first)
    plain = case.stack(SLOTS).step(*inputs._replace(edit_slots=None))
    stack = stack_with(case, first)
    edited = stack.step(*inputs)
    assert not torch.allclose(edited, plain, atol=1e-2)
    assert torch.equal(stack.step(*inputs._replace(edit_slots=None)), plain), "without slots nothing is edited"
    stack.set_edits(second)
    assert torch.equal(stack.step(*inputs), stack_with(case, second).step(*inputs))
    stack.set_edits([])
    assert torch.equal(stack.step(*inputs), plain)
    stack.set_edits(first)
    assert torch.equal(stack.step(*inputs), edited)


def test_slots_changed_in_place_are_seen(lane: str) -> None:
    case = STACK["llama"]
    table = edit_table("private", case.hidden)
    stack, inputs = stack_with(case, [EditSite(1, "mlp_out", table, 0)]), case.inputs((5,))
    inputs = inputs._replace(edit_slots=torch.full((1, 5), NUM_SLOTS - 1, dtype=torch.int32))
    plain = stack.step(*inputs._replace(edit_slots=None))
    assert torch.equal(stack.step(*inputs), plain)
    table.set_slot(NUM_SLOTS - 1, torch.randn(2, case.hidden), op="boost", alpha=1.0)
    assert not torch.allclose(stack.step(*inputs), plain, atol=1e-3)
    table.clear_slot(NUM_SLOTS - 1)
    assert torch.equal(stack.step(*inputs), plain)


def test_tables_are_kept_alive() -> None:
    case = STACK["llama"]
    inputs = inputs_of(case, EDITS["every-place"].sites(case.hidden))
    stack = stack_with(case, EDITS["every-place"].sites(case.hidden))
    gc.collect()
    overwritten = [torch.full((NUM_SLOTS, 3, case.hidden), float("nan")) for _ in range(64)]
    expected = stack_with(case, EDITS["every-place"].sites(case.hidden)).step(*inputs)
    assert torch.equal(stack.step(*inputs), expected)
    assert len(overwritten) == 64


# Rows


@pytest.mark.parametrize("edits", CASES, ids=str)
def test_rows_without_an_edit_keep_their_bits(edits: StackEdits, lane: str) -> None:
    """Beside edited rows; slot 0, a slot of alpha 0 and an empty one. The stem that all attend to is not edited."""
    case, lengths = STACK["llama"], (9, 3, 2, 1, 4)
    sites = edits.sites(case.hidden)
    inputs = inputs_of(case, sites, lengths)
    slots = torch.zeros_like(inputs.edit_slots)  # type: ignore[arg-type]
    slots[:, :9] = torch.tensor(NO_EDIT).repeat(3)
    slots[:, 9:12], slots[:, 14:15] = 2, 1  # the second and the fourth run
    bare, stack = stack_with(case, ()), stack_with(case, sites)
    plain = fresh(inputs)._replace(edit_slots=None)
    expected = bare.step(*plain)
    logits = stack.step(*inputs._replace(edit_slots=slots))
    edited = torch.zeros(19, dtype=torch.bool)
    edited[9:12] = edited[14:15] = True
    assert torch.equal(logits[~edited], expected[~edited])
    assert (logits[edited] - expected[edited]).abs().amax(1).min() > 1e-4
    for ours, theirs in zip(inputs.captures, plain.captures, strict=True):
        assert torch.equal(ours.out[~edited], theirs.out[~edited])
    kept = inputs.slots[~edited].long()
    assert torch.equal(pools_of(stack)[:, kept], pools_of(bare)[:, kept])


@pytest.mark.parametrize("edits", [EDITS["every-place"], EDITS["two-at-every-place"]], ids=str)
@pytest.mark.parametrize("name", ["llama", "narrow-heads", "large-products"])
def test_an_edited_row_keeps_its_bits(edits: StackEdits, name: str) -> None:
    """Alone, among others, with any number of threads."""
    case, lengths = STACK[name], (17, 1, 3, 2, 1, 1, 1, 5)
    sites = [site for site in edits.sites(case.hidden) if site.layer < case.num_blocks]
    inputs = inputs_of(case, sites, lengths)
    assert inputs.edit_slots is not None
    whole, found = stack_with(case, sites).step(*inputs), {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in (1, 2, 7, 17, 31):
            if rows == 31:
                part = fresh(inputs)
            else:
                plan, positions = branches((rows,))
                part = inputs_of(case, sites, (rows,))._replace(
                    ids=inputs.ids[:rows], positions=positions, cos=inputs.cos, sin=inputs.sin,
                    edit_slots=inputs.edit_slots[:, :rows].contiguous(),
                )  # fmt: skip
                part = part._replace(parts=(part.parts[0]._replace(plan=plan),))
            assert torch.equal(stack_with(case, sites).step(*part), whole[:rows]), (threads, rows)
            found[threads, rows] = part.captures
    for (_, rows), captures in found.items():
        for ours, theirs in zip(captures, inputs.captures, strict=True):
            assert torch.equal(ours.out, theirs.out[:rows])


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_table_that_edits_nothing_leaves_the_bits_of_others(place: tuple[int, Any]) -> None:
    """Before or behind the one that does: whether a table runs inside the norm or in place is no row's business."""
    case = STACK["narrow-heads"]
    live = EditSite(*place, edit_table("private", case.hidden), 0)
    idle = live._replace(table=edit_table("basis", case.hidden), column=1)
    over = idle._replace(layer=place[0], tap="block_out")
    inputs = inputs_of(case, [live, idle])
    assert inputs.edit_slots is not None
    inputs.edit_slots[1] = 0
    expected = stack_with(case, [live]).step(*inputs)
    for sites in ([live, idle], [idle, live], [idle, live, over, over], [over, live]):
        assert torch.equal(stack_with(case, sites).step(*inputs), expected)


def test_nan_in_a_slot_stays_with_its_rows(lane: str) -> None:
    case = STACK["llama"]
    table = edit_table("private", case.hidden)
    assert isinstance(table, EditTable)
    inputs = case.inputs((5, 1, 1, 1))
    slots = torch.zeros(1, 8, dtype=torch.int32)
    slots[0, 5:] = torch.tensor([1, 2, 1])
    stack = stack_with(case, [EditSite(0, "attn_out", table, 0)])
    clean = stack.step(*inputs._replace(edit_slots=slots))
    table.directions[2] = float("nan")
    logits = stack.step(*inputs._replace(edit_slots=slots))
    assert torch.equal(logits[[0, 1, 3]], clean[[0, 1, 3]])
    assert logits[2].isnan().all()
