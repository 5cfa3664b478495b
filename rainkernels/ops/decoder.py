"""A stack of Llama-like decoder blocks run over one step of token rows in a single native call."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rainkernels._checks import check_int, check_no_grad, check_outputs, check_tensor
from rainkernels._decoder_weights import (
    UPDATED,
    BlockUpdate,
    BlockWeights,
    LinearWeight,
    LowRank,
    NormWeight,
    StackWeights,
    check_adapters,
    check_stack,
)
from rainkernels._lanes import choose_lane, native
from rainkernels.errors import DtypeError, RangeError, ShapeError
from rainkernels.ops._attention_plan import AttentionPlan, layout_of
from rainkernels.ops._decoder_edits import (
    Capture,
    EditSite,
    Tap,
    capture_fault,
    check_captures,
    check_sites,
    check_slots,
    first_fault,
    row_edits,
    slot_fault,
)
from rainkernels.ops._decoder_native import address, native_captures, native_sites, native_stack
from rainkernels.ops.attention import tree_attention
from rainkernels.reference import decoder as reference

__all__ = [
    "BlockUpdate",
    "BlockWeights",
    "Capture",
    "DecoderStack",
    "EditSite",
    "LinearWeight",
    "LowRank",
    "NormWeight",
    "StackWeights",
    "StepPart",
    "Tap",
    "decoder_lane",
    "linear_rows",
]

_CPU = torch.device("cpu")
# Order shared with csrc/cpu/decoder.h (enum StepRule), which goes on with edit_slot and capture_row.
_RULES = (
    "", "ids[{i}] is {value}, allowed: 0 to {vocab} - 1", "positions[{i}] is {value}, allowed: 0 to {positions} - 1",
    "slots[{i}] is {value}, allowed: 0 to {slots} - 1 in the pools of member {member}",
    "wanted[{i}] is {value}, allowed: 0 to {rows} - 1",
)  # fmt: skip


def decoder_lane() -> str:
    """The lane a DecoderStack takes: "cpu", or "reference" where there is no native code or the machine is too old for it.

    An x86 without fused multiply-add would compute each in software.
    """
    lane = choose_lane("decoder", _CPU)
    if lane == "cpu" and platform.machine() in ("x86_64", "AMD64") and "RAINKERNELS_ISA" not in os.environ:
        return "reference" if native().isa() == "baseline" else lane
    return lane


def linear_rows(x: Tensor, linear: LinearWeight, out: Tensor | None = None) -> Tensor:
    """x weight^T + bias, the product a DecoderStack runs: a row's bits do not depend on the other rows.

    Shapes:
        x:   [T, in] float32 on the cpu, contiguous
        out: [T, out] float32, contiguous, memory of its own; allocated when None
    Returns:
        [T, out]
    Raises:
        DeviceError, DtypeError, ShapeError, StrideError: naming the argument.
    Reference: torch.nn.functional.linear
    """
    check_tensor("weight", linear.weight, dtype=torch.float32, shape=(None, None), device=_CPU)
    outputs, inputs = linear.weight.shape
    check_tensor("x", x, dtype=torch.float32, shape=(None, inputs), device=_CPU)
    rows = x.shape[0]
    if linear.bias is not None:
        check_tensor("bias", linear.bias, dtype=torch.float32, shape=(outputs,), device=_CPU)
    if out is None:
        out = x.new_empty(rows, outputs)
    else:
        check_tensor("out", out, dtype=torch.float32, shape=(rows, outputs), device=_CPU)
        check_no_grad("out", out)
    if decoder_lane() != "cpu":
        with torch.no_grad():
            return out.copy_(torch.nn.functional.linear(x, *linear))
    native().linear_rows(
        linear.weight.data_ptr(), address(linear.bias), x.data_ptr(), inputs, out.data_ptr(), outputs, rows,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


class StepPart(NamedTuple):
    """Neighbouring rows of a step that belong to one member.

    member: 0 is the stack as it is, i the stack with adapter i - 1
    rows:   how many
    plan:   attention of these rows, over the slots of the member's pools
    states: [num_slots of the member, hidden] float32; each row's final state, after the last norm, is written to its slot
    """

    member: int
    rows: int
    plan: AttentionPlan
    states: Tensor | None = None


class DecoderStack:
    """The blocks of one model on the cpu, in float32, and of the same model with low-rank adapters.

    A block: x += out(attention(rotary(norm(qkv(norm(x)))))), x += down(silu(gate) * up). An adapter adds low-rank updates
    to its products. Rows of all members share a step's products, the updates reach the rows of their member only. Edits
    change rows of any member at the places set by `set_edits`. On the native lane a row's bits do not depend on the other
    rows, on threads or on the instruction set.

    Args:
        weights: read where they lie: what is changed in place is seen at the next step.
        adapters: each one BlockUpdate per block. They are copied.

    Raises:
        DeviceError, DtypeError, ShapeError, StrideError, RangeError: naming the weight.
    Source: Touvron et al., Llama, 2023; Hu et al., LoRA, 2021.  Reference: rainkernels.reference.decoder.step
    """

    def __init__(self, weights: StackWeights, adapters: Sequence[Sequence[BlockUpdate]] = ()) -> None:
        check_stack(weights)
        check_adapters(weights, adapters)
        self.weights = weights
        self._pools: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(len(adapters) + 1)]  # none: not set
        self._sites: tuple[EditSite, ...] = ()
        self._room = torch.empty(0, dtype=torch.float32)
        self._native: Any = None
        with torch.no_grad():
            if decoder_lane() == "cpu":
                self._native, self._kept = native_stack(weights, adapters)
            else:
                self._adapters = [[_copied(block) for block in blocks] for blocks in adapters]

    @property
    def num_members(self) -> int:
        """1 and one per adapter."""
        return len(self._pools)

    def set_pools(self, pools: list[tuple[Tensor, Tensor]], member: int = 0) -> None:
        """K and V pool of every block for one member, [num_slots, num_kv_heads, head_dim] float32 each; steps write to them."""
        w = self.weights
        self._check_member("member", member)
        if len(pools) != len(w.blocks):
            raise ShapeError(f"{len(pools)} pairs of pools were given for {len(w.blocks)} blocks: give one each")
        slots: int | None = None  # as many as the first pool has
        for i, pair in enumerate(pools):
            check_outputs(f"pools[{i}]", pair, ("k", "v"))
            for name, pool in zip(("k", "v"), pair, strict=True):
                shape = (slots, w.num_kv_heads, w.head_dim)
                check_tensor(f"pools[{i}].{name}", pool, dtype=torch.float32, shape=shape, device=_CPU)
                check_no_grad(f"pools[{i}].{name}", pool)
                slots = pool.shape[0]
        self._pools[member] = list(pools)
        if self._native is not None:
            self._native.set_pools(member, [k.data_ptr() for k, _ in pools], [v.data_ptr() for _, v in pools], slots)

    def drop_pools(self) -> None:
        """Let go of the pools of all members; steps raise until others are set."""
        self._pools = [[] for _ in self._pools]

    def set_edits(self, sites: Sequence[EditSite]) -> None:
        """Say where steps edit hidden states, and by which tables; replaces what was set, an empty list removes it.

        Sites of one place run in the order given, each on what those before left. The tables are kept alive and read
        where they lie: a slot filled or cleared between steps is seen at the next one.

        Raises:
            DeviceError, DtypeError, ShapeError, RangeError: naming the site; what was set stays.
        """
        sites = tuple(sites)
        check_sites(sites, len(self.weights.blocks), self.weights.embedding.shape[1])
        if self._native is not None:
            self._native.set_edits(native_sites(sites))
        self._sites = sites

    def step(
        self, ids: Tensor, positions: Tensor, slots: Tensor, parts: Sequence[StepPart], cos: Tensor, sin: Tensor,
        wanted: Tensor, edit_slots: Tensor | None = None, captures: Sequence[Capture] = (),
    ) -> Tensor:  # fmt: skip
        """Run rows of tokens through the blocks.

        Shapes:
            ids, positions: [T] int64;  slots: [T] int32, where each row's K and V go in the pools of its member
            parts:    whose rows they are, in this order: together T. A member may occur again, a part have no rows. K and V
                      of all rows are written before any row attends.
            cos, sin: [num_positions, head_dim] float32, the first half of every row of `sin` negative
            wanted:   [n] int64, rows (of all T) whose logits are wanted
            edit_slots: [num_columns, T] int32, for every column of the sites each row's slot in the site's table, 0 for no
                      edit; None: no row is edited
            captures: hidden states to copy out
        Returns:
            logits [n, vocab] float32
        Edge cases:
            A row whose slots edit nothing keeps the bits of a step without edits, whatever rows are beside it; so does a
            row captured. What a row attends to may be edited all the same.
        Raises:
            DeviceError, DtypeError, ShapeError, StrideError, RangeError: naming the argument; nothing was written.
        """
        w = self.weights
        rows, threads = self._check_step(ids, positions, slots, parts, cos, sin, wanted), torch.get_num_threads()
        self._check_edits(edit_slots, captures, parts, (ids, positions, slots, cos, sin, wanted))
        if self._native is None:
            return self._reference(ids, positions, slots, parts, cos, sin, wanted, edit_slots, captures)
        logits = torch.empty(len(wanted), w.head.weight.shape[0], dtype=torch.float32)
        group = w.num_qo_heads // w.num_kv_heads
        layouts = [layout_of(part.plan, group) for part in parts]
        made = [
            (part.member, part.rows, layout.data_ptr(), address(part.states))
            for part, layout in zip(parts, layouts, strict=True)
        ]
        self._room = _at_least(self._room, self._native.workspace_floats(made, len(wanted), threads))
        rule, index, which = self._native.step(
            ids.data_ptr(), positions.data_ptr(), slots.data_ptr(), rows, made, cos.data_ptr(), sin.data_ptr(), cos.shape[0],
            self._room.data_ptr(), wanted.data_ptr(), len(wanted), logits.data_ptr(), threads,
            address(edit_slots), native_captures(captures),
        )  # fmt: skip
        if rule == len(_RULES):
            assert edit_slots is not None
            raise slot_fault(self._sites, edit_slots, which, index)
        if rule > len(_RULES):
            raise capture_fault(captures, rows, which, index)
        if rule:
            raise self._fault(rule, index, (ids, positions, slots, wanted), parts, len(cos))
        return logits

    def _num_slots(self, member: int) -> int:
        return len(self._pools[member][0][0])

    def _fault(
        self, rule: int, index: int, arguments: tuple[Tensor, ...], parts: Sequence[StepPart], num_positions: int
    ) -> RangeError:
        members = [part.member for part in parts for _ in range(part.rows)]
        member = members[index] if rule < len(arguments) else 0
        return RangeError(
            _RULES[rule].format(
                i=index, value=int(arguments[rule - 1][index]), vocab=len(self.weights.embedding),
                positions=num_positions, slots=self._num_slots(member), member=member, rows=len(arguments[0]),
            )
        )  # fmt: skip

    def _check_member(self, name: str, member: int) -> None:
        check_int(name, member, 0, len(self._pools) - 1, hint="0 is the stack as it is, i has adapter i - 1")

    def _check_step(
        self, ids: Tensor, positions: Tensor, slots: Tensor, parts: Sequence[StepPart], cos: Tensor, sin: Tensor,
        wanted: Tensor,
    ) -> int:  # fmt: skip
        w = self.weights
        check_tensor("ids", ids, dtype=torch.int64, shape=(None,), device=_CPU)
        rows = ids.shape[0]
        check_tensor("positions", positions, dtype=torch.int64, shape=(rows,), device=_CPU)
        check_tensor("slots", slots, dtype=torch.int32, shape=(rows,), device=_CPU)
        check_tensor("cos", cos, dtype=torch.float32, shape=(None, w.head_dim), device=_CPU)
        check_tensor("sin", sin, dtype=torch.float32, shape=cos.shape, device=_CPU)
        check_tensor("wanted", wanted, dtype=torch.int64, shape=(None,), device=_CPU)
        for i, part in enumerate(parts):
            self._check_part(f"parts[{i}]", part)
        if sum(part.rows for part in parts) != rows:
            given = " + ".join(str(part.rows) for part in parts) or "no"
            raise ShapeError(f"the parts have {given} rows, ids has {rows}: each row belongs to one part")
        return rows

    def _check_edits(
        self,
        edit_slots: Tensor | None,
        captures: Sequence[Capture],
        parts: Sequence[StepPart],
        inputs: tuple[Tensor, ...],
    ) -> None:
        if edit_slots is not None:
            check_slots(self._sites, edit_slots, len(inputs[0]))
        if not captures:
            return
        names = "ids", "positions", "slots", "cos", "sin", "wanted", "edit_slots"
        beside = [*zip(names, inputs if edit_slots is None else (*inputs, edit_slots), strict=False)]
        beside += [(f"parts[{i}].states", part.states) for i, part in enumerate(parts) if part.states is not None]
        beside += [("pools", pool) for pools in self._pools for pair in pools for pool in pair]
        check_captures(captures, len(self.weights.blocks), self.weights.embedding.shape[1], beside)

    def _check_part(self, name: str, part: StepPart) -> None:
        if not isinstance(part, StepPart):
            raise DtypeError(f"{name} must be a StepPart, got {type(part).__name__}")
        self._check_member(f"{name}.member", part.member)
        check_int(f"{name}.rows", part.rows, 0)
        if not self._pools[part.member]:
            raise ShapeError(f"member {part.member} has no pools yet: call set_pools(pools, {part.member}) first")
        if not isinstance(part.plan, AttentionPlan):
            raise DtypeError(
                f"{name}.plan must be an AttentionPlan from attention_plan(), got {type(part.plan).__name__}"
            )
        if part.plan.num_rows != part.rows:
            raise ShapeError(
                f"{name} has {part.rows} rows, its plan has {part.plan.num_rows}: build the plan from the same batch"
            )
        num_slots = self._num_slots(part.member)
        if part.plan.max_slot >= num_slots:
            raise RangeError(
                f"{name}.plan names slot {part.plan.max_slot}, the pools of member {part.member} have {num_slots}"
            )
        if part.states is not None:
            shape = num_slots, self.weights.embedding.shape[1]
            check_tensor(f"{name}.states", part.states, dtype=torch.float32, shape=shape, device=_CPU)
            check_no_grad(f"{name}.states", part.states)

    def _reference(
        self, ids: Tensor, positions: Tensor, slots: Tensor, parts: Sequence[StepPart], cos: Tensor, sin: Tensor,
        wanted: Tensor, edit_slots: Tensor | None, captures: Sequence[Capture],
    ) -> Tensor:  # fmt: skip
        w = self.weights
        arguments = ids, positions, slots, wanted
        num_slots = torch.tensor([self._num_slots(part.member) for part in parts for _ in range(part.rows)])
        limits: tuple[int | Tensor, ...] = len(w.embedding), len(cos), num_slots, len(ids)
        faults = []  # by row, then by rule; `wanted` last, as its entries are no rows
        for rule, (values, limit) in enumerate(zip(arguments, limits, strict=True), start=1):
            wrong = torch.nonzero((values < 0) | (values >= limit)).flatten()
            if len(wrong):
                faults.append((rule == len(arguments), int(wrong[0]), rule))
        if faults:
            _, index, rule = min(faults)
            raise self._fault(rule, index, arguments, parts, len(cos))
        if (fault := first_fault(self._sites, edit_slots, captures, len(ids))) is not None:
            raise fault
        ends = list(accumulate(part.rows for part in parts))
        members = [
            reference.PartRows(
                slice(end - part.rows, end), self._pools[part.member],
                self._adapters[part.member - 1] if part.member else None, _attend(part.plan),
            )
            for part, end in zip(parts, ends, strict=True)
        ]  # fmt: skip
        with torch.no_grad():
            edits = row_edits(self._sites, edit_slots)
            final, logits = reference.step(w, ids, positions, slots, members, cos, sin, wanted, edits, captures)
            for part, member in zip(parts, members, strict=True):
                if part.states is not None:
                    part.states[slots[member.rows].long()] = final[member.rows]
        return logits


def _attend(plan: AttentionPlan) -> reference.Attend:
    def attend(q: Tensor, k_pool: Tensor, v_pool: Tensor, block: BlockWeights) -> Tensor:
        return tree_attention(
            q, k_pool, v_pool, plan, softmax_scale=block.softmax_scale, softcap=block.softcap,
            sliding_window=block.sliding_window, sinks=block.sinks,
        )  # fmt: skip

    return attend


def _at_least(room: Tensor, floats: int) -> Tensor:
    return room if len(room) >= floats else torch.empty(floats + floats // 4, dtype=torch.float32)


def _copied(update: BlockUpdate) -> BlockUpdate:
    parts = (getattr(update, name) for name in UPDATED)
    return BlockUpdate(*(tuple(p._replace(down=p.down.clone(), up=p.up.clone()) for p in each) for each in parts))
