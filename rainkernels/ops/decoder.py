"""A stack of Llama-like decoder blocks run over one step of token rows in a single native call."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
from torch import Tensor

from rainkernels._checks import check_no_grad, check_outputs, check_tensor
from rainkernels._decoder_weights import BlockWeights, LinearWeight, NormWeight, StackWeights, check_stack
from rainkernels._lanes import choose_lane, native
from rainkernels.errors import DtypeError, RangeError, ShapeError
from rainkernels.ops._attention_plan import AttentionPlan, layout_of
from rainkernels.ops.attention import tree_attention
from rainkernels.reference import decoder as reference

__all__ = ["BlockWeights", "DecoderStack", "LinearWeight", "NormWeight", "StackWeights", "decoder_lane", "linear_rows"]

_CPU = torch.device("cpu")
# Order shared with csrc/cpu/decoder.h (enum StepRule).
_RULES = (
    "", "ids[{i}] is {value}, allowed: 0 to {vocab} - 1", "positions[{i}] is {value}, allowed: 0 to {positions} - 1",
    "slots[{i}] is {value}, allowed: 0 to {slots} - 1", "wanted[{i}] is {value}, allowed: 0 to {rows} - 1",
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
        linear.weight.data_ptr(), _address(linear.bias), x.data_ptr(), inputs, out.data_ptr(), outputs, rows,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


class DecoderStack:
    """The blocks of one model on the cpu, in float32.

    A block: x += out(attention(rotary(norm(qkv(norm(x)))))), x += down(silu(gate) * up). On the native lane a row's bits
    do not depend on the other rows, on threads or on the instruction set.

    Raises:
        DeviceError, DtypeError, ShapeError, StrideError, RangeError: naming the weight.
    Source: Touvron et al., Llama, 2023.  Reference: rainkernels.reference.decoder.step
    """

    def __init__(self, weights: StackWeights) -> None:
        check_stack(weights)
        self.weights = weights
        self._pools: list[tuple[Tensor, Tensor]] = []
        self._num_slots = 0
        self._room = torch.empty(0, dtype=torch.float32)
        self._attention_room = torch.empty(0, dtype=torch.float32)
        self._native: Any = None
        if decoder_lane() == "cpu":
            self._native = _native_stack(weights)

    def set_pools(self, pools: list[tuple[Tensor, Tensor]]) -> None:
        """K and V pool of every block, [num_slots, num_kv_heads, head_dim] float32 each; steps write to them."""
        w = self.weights
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
        assert slots is not None
        self._pools, self._num_slots = list(pools), slots
        if self._native is not None:
            self._native.set_pools([k.data_ptr() for k, _ in pools], [v.data_ptr() for _, v in pools])

    def drop_pools(self) -> None:
        """Let go of the pools; steps raise until others are set."""
        self._pools, self._num_slots = [], 0

    def step(
        self, ids: Tensor, positions: Tensor, slots: Tensor, plan: AttentionPlan, cos: Tensor, sin: Tensor, wanted: Tensor,
        *, states: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Run rows of tokens through the blocks.

        Shapes:
            ids, positions: [T] int64;  slots: [T] int32, where each row's K and V go
            plan:     of these rows, over these slots
            cos, sin: [num_positions, head_dim] float32, the first half of every row of `sin` negative
            wanted:   [n] int64, rows whose logits are wanted
            states:   [num_slots, hidden] float32; each row's final state, after the last norm, is written to its slot
        Returns:
            logits [n, vocab] float32
        Raises:
            DeviceError, DtypeError, ShapeError, StrideError, RangeError: naming the argument; nothing was written.
        """
        w = self.weights
        rows, threads = self._check_step(ids, positions, slots, plan, cos, sin, wanted, states), torch.get_num_threads()
        logits = torch.empty(len(wanted), w.head.weight.shape[0], dtype=torch.float32)
        if self._native is None:
            return self._reference(ids, positions, slots, plan, cos, sin, wanted, states)
        layout = layout_of(plan, w.num_qo_heads // w.num_kv_heads)
        sizes = (layout.data_ptr(), w.num_qo_heads, w.num_kv_heads, w.head_dim, w.head_dim, threads)
        self._attention_room = _at_least(self._attention_room, native().attention_workspace_floats(*sizes))
        self._room = _at_least(self._room, self._native.workspace_floats(rows, len(wanted)))
        rule, index = self._native.step(
            ids.data_ptr(), positions.data_ptr(), slots.data_ptr(), rows, cos.data_ptr(), sin.data_ptr(), cos.shape[0],
            self._num_slots, layout.data_ptr(), self._attention_room.data_ptr(), self._room.data_ptr(),
            0 if states is None else states.data_ptr(), wanted.data_ptr(), len(wanted), logits.data_ptr(), threads,
        )  # fmt: skip
        if rule:
            raise self._fault(rule, index, (ids, positions, slots, wanted), len(cos))
        return logits

    def _fault(self, rule: int, index: int, arguments: tuple[Tensor, ...], num_positions: int) -> RangeError:
        return RangeError(
            _RULES[rule].format(
                i=index, value=int(arguments[rule - 1][index]), vocab=len(self.weights.embedding),
                positions=num_positions, slots=self._num_slots, rows=len(arguments[0]),
            )
        )  # fmt: skip

    def _check_step(
        self, ids: Tensor, positions: Tensor, slots: Tensor, plan: AttentionPlan, cos: Tensor, sin: Tensor, wanted: Tensor,
        states: Tensor | None,
    ) -> int:  # fmt: skip
        w = self.weights
        if not self._pools:
            raise ShapeError("there are no pools yet: call set_pools() first")
        check_tensor("ids", ids, dtype=torch.int64, shape=(None,), device=_CPU)
        rows = ids.shape[0]
        check_tensor("positions", positions, dtype=torch.int64, shape=(rows,), device=_CPU)
        check_tensor("slots", slots, dtype=torch.int32, shape=(rows,), device=_CPU)
        check_tensor("cos", cos, dtype=torch.float32, shape=(None, w.head_dim), device=_CPU)
        check_tensor("sin", sin, dtype=torch.float32, shape=cos.shape, device=_CPU)
        check_tensor("wanted", wanted, dtype=torch.int64, shape=(None,), device=_CPU)
        if states is not None:
            hidden = w.embedding.shape[1]
            check_tensor("states", states, dtype=torch.float32, shape=(self._num_slots, hidden), device=_CPU)
            check_no_grad("states", states)
        if not isinstance(plan, AttentionPlan):
            raise DtypeError(f"plan must be an AttentionPlan from attention_plan(), got {type(plan).__name__}")
        if plan.num_rows != rows:
            raise ShapeError(f"ids has {rows} rows, the plan has {plan.num_rows}: build the plan from the same batch")
        if plan.max_slot >= self._num_slots:
            raise RangeError(f"plan names slot {plan.max_slot}, the pools have {self._num_slots}")
        return rows

    def _reference(
        self, ids: Tensor, positions: Tensor, slots: Tensor, plan: AttentionPlan, cos: Tensor, sin: Tensor, wanted: Tensor,
        states: Tensor | None,
    ) -> Tensor:  # fmt: skip
        def attend(q: Tensor, k_pool: Tensor, v_pool: Tensor, block: BlockWeights) -> Tensor:
            return tree_attention(
                q, k_pool, v_pool, plan, softmax_scale=block.softmax_scale, softcap=block.softcap,
                sliding_window=block.sliding_window, sinks=block.sinks,
            )  # fmt: skip

        w = self.weights
        arguments = ids, positions, slots, wanted
        limits = len(w.embedding), len(cos), self._num_slots, len(ids)
        faults = []  # by row, then by rule; `wanted` last, as its entries are no rows
        for rule, (values, limit) in enumerate(zip(arguments, limits, strict=True), start=1):
            wrong = torch.nonzero((values < 0) | (values >= limit)).flatten()
            if len(wrong):
                faults.append((rule == len(arguments), int(wrong[0]), rule))
        if faults:
            _, index, rule = min(faults)
            raise self._fault(rule, index, arguments, len(cos))
        with torch.no_grad():
            final, logits = reference.step(w, ids, positions, slots, self._pools, attend, cos, sin, wanted)
            if states is not None:
                states[slots.long()] = final
        return logits


def _at_least(room: Tensor, floats: int) -> Tensor:
    return room if len(room) >= floats else torch.empty(floats + floats // 4, dtype=torch.float32)


def _native_stack(w: StackWeights) -> Any:
    intermediate = w.blocks[0].down.weight.shape[1]
    vocab, hidden = w.embedding.shape
    shape = [hidden, intermediate, w.num_qo_heads, w.num_kv_heads, w.head_dim, vocab]
    stack = native().DecoderStack(
        shape, w.embedding.data_ptr(), w.norm.weight.data_ptr(), w.norm.eps, w.head.weight.data_ptr(),
        _address(w.head.bias),
    )  # fmt: skip
    for block in w.blocks:
        q_norm, k_norm = (None if n is None else n.weight for n in (block.q_norm, block.k_norm))
        tensors = (
            block.attention_norm.weight, *block.qkv, q_norm, k_norm, *block.out, block.mlp_norm.weight, *block.gate_up,
            *block.down, block.sinks,
        )  # fmt: skip
        head_eps = 0.0 if block.q_norm is None else block.q_norm.eps
        numbers = (block.attention_norm.eps, head_eps, block.mlp_norm.eps, block.softmax_scale, block.softcap)
        stack.add_block([_address(t) for t in tensors], numbers, block.sliding_window)
    return stack


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
