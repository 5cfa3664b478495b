"""decoder: wrong sites, slots and captures are refused by a typed error that names them, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rainkernels import DeviceError, DtypeError, RainKernelsError, RangeError, ShapeError, StrideError
from rainkernels.ops.decoder import Capture, DecoderStack, EditSite, decoder_lane
from rainkernels.ops.edits_tables import EditTable
from rainkernels.testing.cases_decoder import CASES, StepInputs
from rainkernels.testing.cases_decoder_edits import NUM_SLOTS, edit_table

pytestmark = pytest.mark.skipif(decoder_lane() != "cpu", reason="there is no native step here")
CASE = next(case for case in CASES if case.id == "llama")
SLOTS = 64
ROWS = 6


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


def sites() -> list[EditSite]:
    table = edit_table("private", CASE.hidden)
    basis = edit_table("basis", CASE.hidden, num_slots=3)
    return [EditSite(0, "attn_out", table, 2), EditSite(1, "mlp_out", basis, 0), EditSite(1, "mlp_out", table, 1)]


def site(**changes: Any) -> Any:
    return sites()[0]._replace(**changes)


def written(stack: DecoderStack) -> list[Tensor]:
    return [pool for pools in stack._pools for pair in pools for pool in pair]


BAD_SITES: list[tuple[type[RainKernelsError], str, Callable[[], Any]]] = [
    (DtypeError, r"^sites\[1\] must be an EditSite, got tuple", lambda: tuple(site())),
    (RangeError, r"^sites\[1\].layer is 2, allowed: 0..1", lambda: site(layer=2)),
    (RangeError, r"^sites\[1\].layer is -1", lambda: site(layer=-1)),
    (DtypeError, r"^sites\[1\].layer must be a Python int, got float", lambda: site(layer=0.0)),
    (RangeError, r"^sites\[1\].tap is 'mlp', allowed: 'attn_out', 'mlp_out', 'block_out'", lambda: site(tap="mlp")),
    (RangeError, r"^sites\[1\].tap is 1,", lambda: site(tap=1)),
    (RangeError, r"^sites\[1\].column is -1, allowed: 0..", lambda: site(column=-1)),
    (DtypeError, r"^sites\[1\].column must be a Python int, got None", lambda: site(column=None)),
    (DtypeError, r"^sites\[1\].table must be an EditTable or a BasisTable, got Tensor", lambda: site(table=torch.ones(3))),
    (ShapeError, r"^sites\[1\].table has directions of 47 elements, the stack's hidden states have 48", lambda: site(
        table=EditTable.create(2, 1, 47))),
    (DeviceError, r"^sites\[1\].table is on meta", lambda: site(
        table=with_directions(lambda t: t.to("meta")))),
    (DtypeError, r"^sites\[1\].table has dtype torch.float64, allowed: torch.float32, torch.bfloat16", lambda: site(
        table=with_directions(Tensor.double))),
]  # fmt: skip


def with_directions(make: Callable[[Tensor], Tensor]) -> EditTable:
    """A table on another device, or one that was made around the constructor's checks."""
    table = EditTable.create(2, 1, CASE.hidden)
    object.__setattr__(table, "directions", make(table.directions))
    return table


@pytest.mark.parametrize(("kind", "text", "make"), BAD_SITES)
def test_bad_sites_are_refused_and_what_was_set_stays(
    kind: type[RainKernelsError], text: str, make: Callable[[], Any]
) -> None:
    stack, inputs = CASE.stack(SLOTS), CASE.inputs((3, 2, 1))
    inputs = inputs._replace(edit_slots=torch.ones(3, ROWS, dtype=torch.int32))
    stack.set_edits(sites())
    expected = stack.step(*inputs)
    with pytest.raises(kind, match=text):
        stack.set_edits([sites()[0], make()])
    assert torch.equal(stack.step(*inputs), expected)


# Steps

Change = Callable[[StepInputs], StepInputs]


def with_slot(column: int, row: int, value: int) -> Change:
    def change(inputs: StepInputs) -> StepInputs:
        assert inputs.edit_slots is not None
        slots = inputs.edit_slots.clone()
        slots[column, row] = value
        return inputs._replace(edit_slots=slots)

    return change


def slots_to(make: Callable[[Tensor], Any]) -> Change:
    return lambda i: i._replace(edit_slots=make(i.edit_slots))  # type: ignore[arg-type]


def capture_to(**changes: Any) -> Change:
    return lambda i: i._replace(captures=(i.captures[0], i.captures[1]._replace(**changes)))


def captured(make: Callable[[StepInputs], Any]) -> Change:
    """The second capture goes to what `make` finds in the inputs."""
    return lambda i: i._replace(captures=(i.captures[0], i.captures[1]._replace(out=make(i))))


def rows(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


BAD_STEPS: list[tuple[type[RainKernelsError], str, Change]] = [
    (RangeError, r"^edit_slots\[2, 4\] is 6, allowed: 0 to 6 - 1 in the table of sites\[0\] \(layer 0, attn_out\)",
        with_slot(2, 4, NUM_SLOTS)),
    (RangeError, r"^edit_slots\[0, 1\] is 3, allowed: 0 to 3 - 1 in the table of sites\[1\]", with_slot(0, 1, 3)),
    (RangeError, r"^edit_slots\[1, 5\] is -1", with_slot(1, 5, -1)),
    # By site, then by row; what is wrong with a row itself comes first.
    (RangeError, r"^edit_slots\[2, 3\] is 99", lambda i: with_slot(0, 0, 99)(with_slot(2, 3, 99)(i))),
    (RangeError, r"^wanted\[0\] is 6", lambda i: with_slot(0, 0, 99)(i._replace(wanted=rows(6)))),
    (RangeError, r"^slots\[5\] is 64", lambda i: with_slot(0, 0, 99)(
        i._replace(slots=torch.tensor([1, 2, 3, 4, 5, 64], dtype=torch.int32)))),
    (RangeError, r"^edit_slots\[1, 2\] is 77", lambda i: with_slot(1, 2, 77)(capture_to(rows=rows(0, -5))(i))),
    (DtypeError, "^edit_slots has dtype torch.int64", slots_to(Tensor.long)),
    (DtypeError, "^edit_slots must be a torch.Tensor, got list", slots_to(Tensor.tolist)),
    (ShapeError, "^edit_slots has rank 1", slots_to(lambda t: t[0])),
    (ShapeError, r"^edit_slots has shape \[3, 5\], expected \[any, 6\]", slots_to(lambda t: t[:, :5].contiguous())),
    (ShapeError, r"^edit_slots has shape \[2, 6\], sites\[0\] reads column 2: expected \[3 or more, 6\]",
        slots_to(lambda t: t[:2])),
    (ShapeError, r"^edit_slots has shape \[0, 6\], sites\[0\]", slots_to(lambda t: t[:0])),
    (StrideError, "^edit_slots has strides", slots_to(lambda t: t.t().contiguous().t())),
    (DeviceError, "^edit_slots is on meta", slots_to(lambda t: t.to("meta"))),
    (RangeError, r"^captures\[1\].rows\[1\] is 6, allowed: 0 to 6 - 1", capture_to(rows=rows(0, 6))),
    (RangeError, r"^captures\[1\].rows\[0\] is -1", capture_to(rows=rows(-1, 7))),
    (DtypeError, r"^captures\[1\] must be a Capture, got tuple", lambda i: i._replace(
        captures=(i.captures[0], tuple(i.captures[1])))),  # type: ignore[arg-type]
    (RangeError, r"^captures\[1\].layer is 2, allowed: 0..1", capture_to(layer=2)),
    (RangeError, r"^captures\[1\].tap is 'out'", capture_to(tap="out")),
    (DtypeError, r"^captures\[1\].rows has dtype torch.int32", capture_to(rows=rows(0, 1).int())),
    (DtypeError, r"^captures\[1\].rows must be a torch.Tensor", capture_to(rows=[0, 1])),
    (ShapeError, r"^captures\[1\].rows has rank 2", capture_to(rows=rows(0, 1)[None])),
    (StrideError, r"^captures\[1\].rows has strides", capture_to(rows=torch.zeros(4, dtype=torch.int64)[::2])),
    (ShapeError, r"^captures\[1\].out has shape \[2, 48\], expected \[3, 48\]", capture_to(rows=rows(0, 1, 2))),
    (ShapeError, r"^captures\[1\].out has shape \[2, 47\]", capture_to(out=torch.zeros(2, 47))),
    (DtypeError, r"^captures\[1\].out has dtype torch.bfloat16", capture_to(out=torch.zeros(2, 48).bfloat16())),
    (StrideError, r"^captures\[1\].out has strides", capture_to(out=torch.zeros(48, 2).t())),
    (DtypeError, r"^captures\[1\].out requires grad", capture_to(out=torch.zeros(2, 48, requires_grad=True))),
    (StrideError, r"^captures\[1\].out shares memory with captures\[0\].out",
        captured(lambda i: i.captures[0].out.view(-1)[48:144].view(2, 48))),
    (StrideError, r"^captures\[1\].out shares memory with parts\[0\].states",
        captured(lambda i: i.parts[0].states[5:7])),  # type: ignore[index]
    (StrideError, r"^captures\[1\].out shares memory with cos", captured(lambda i: i.cos.view(-1)[:96].view(2, 48))),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "change"), BAD_STEPS)
def test_bad_steps_are_refused_and_write_nothing(kind: type[RainKernelsError], text: str, change: Change) -> None:
    stack, states = CASE.stack(SLOTS), torch.zeros(SLOTS, CASE.hidden)
    stack.set_edits(sites())
    inputs = CASE.inputs((3, 2, 1))
    inputs = inputs._replace(
        parts=(inputs.parts[0]._replace(states=states),),
        cos=torch.cat([inputs.cos, torch.ones(1, CASE.head_dim)]), sin=torch.cat([inputs.sin, torch.zeros(1, CASE.head_dim)]),
        edit_slots=torch.ones(3, ROWS, dtype=torch.int32),
        captures=(
            Capture(0, "mlp_out", rows(5, 0, 2), torch.zeros(3, CASE.hidden)),
            Capture(1, "block_out", rows(4, 4), torch.zeros(2, CASE.hidden)),
        ),
    )  # fmt: skip
    changed = change(inputs)
    with pytest.raises(kind, match=text):
        stack.step(*changed)
    outs = [c.out for c in (*inputs.captures, *changed.captures[:1])]
    assert not any(t.any() for t in (*written(stack), states, *outs))
    stack.step(*inputs)
    assert all(t.any() for t in (*written(stack), states, *outs))


def test_captures_keep_out_of_the_pools() -> None:
    stack, inputs = CASE.stack(SLOTS), CASE.inputs((3, 2, 1))
    pool = stack._pools[0][1][1]
    capture = Capture(0, "mlp_out", rows(5), pool.view(-1)[-48:].view(1, 48))
    with pytest.raises(StrideError, match=r"^captures\[0\].out shares memory with pools"):
        stack.step(*inputs._replace(captures=(capture,)))
    assert not any(t.any() for t in written(stack))
    one = torch.zeros(3, CASE.hidden)  # neighbours in one buffer
    halves = (Capture(0, "mlp_out", rows(0), one[:1]), Capture(1, "mlp_out", rows(1, 2), one[1:]))
    stack.step(*inputs._replace(captures=halves))
    assert one.any(dim=1).all()


def test_columns_that_no_site_reads_may_hold_anything() -> None:
    stack, inputs = CASE.stack(SLOTS), CASE.inputs((3, 2, 1))
    plain = stack.step(*inputs)
    anything = torch.full((2, ROWS), 1000, dtype=torch.int32)
    assert torch.equal(stack.step(*inputs._replace(edit_slots=anything)), plain)
    stack.set_edits([sites()[0]._replace(column=1)])
    anything[1] = 0
    assert torch.equal(stack.step(*inputs._replace(edit_slots=anything)), plain)


def test_empty_steps_have_edits_and_captures_of_no_rows() -> None:
    stack, none = CASE.stack(SLOTS), torch.empty(0, dtype=torch.int64)
    stack.set_edits(sites())
    inputs = CASE.inputs(())._replace(wanted=none, edit_slots=torch.zeros(3, 0, dtype=torch.int32))
    capture = Capture(1, "block_out", none, torch.zeros(0, CASE.hidden))
    assert stack.step(*inputs._replace(captures=(capture,))).shape == (0, CASE.vocab)
    with pytest.raises(RangeError, match=r"^captures\[0\].rows\[0\] is 0, allowed: 0 to 0 - 1"):
        stack.step(*inputs._replace(captures=(capture._replace(rows=rows(0), out=torch.zeros(1, CASE.hidden)),)))
