"""Edits of hidden states: per-row directions by slot, in place or inside residual add + RMSNorm."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rainkernels._checks import DTYPE_CODE, FLOATS, check_choice, check_no_grad, check_real, check_tensor
from rainkernels._lanes import choose_lane, native
from rainkernels.errors import DtypeError, RangeError, ShapeError, StrideError
from rainkernels.ops.edits_tables import BasisTable, EditTable
from rainkernels.reference import edits as reference

__all__ = ["BasisTable", "EditTable", "NormedResidual", "add_edit_rmsnorm", "edit_"]

Table = EditTable | BasisTable
# Codes shared with csrc/include/rainkernels/edits.h and rainkernels/triton/edits.py.
TAPS = ("mlp_out", "block_out")
CASTS = ("llama", "gemma")
_NO_TABLE = (0,) * 13
# Signatures of checked calls without a table, with the bytes that x, residual and out span; a table keeps its own.
_CALLS: dict[object, tuple[int, int, int]] = {}


class NormedResidual(NamedTuple):
    """normed: input of the next layer; residual: the tensor that was given, now holding the sum."""

    normed: Tensor
    residual: Tensor


def edit_(x: Tensor, table: Table, slots: Tensor) -> Tensor:
    """Edit every row by its slot, in place: h' = h + sum_j b_j u_j (see EditTable and BasisTable).

    Arithmetic is float32 for every dtype, rounded once to nearest even; on the triton lane a product with a BasisTable is
    three products of tf32 parts, or where rows and basis are bfloat16 two of bfloat16 parts, which leave 2**-17 of it out.
    On the cpu a row's bits depend on the row and its
    slot alone: not on the other rows, thread count or instruction set.

    Shapes:
        x:     [num_tokens, hidden_size] float32 | bfloat16 | float16, last dim contiguous, written
        table: EditTable or BasisTable with that hidden_size, on the same device
        slots: [num_tokens] int32, slot of each row; 0 for no edit
    Returns:
        x
    Edge cases:
        Rows of slot 0, of an empty slot or with every alpha 0 are not touched: -0.0 and NaN payloads stay. A slot outside
        the table raises RangeError before anything is written; on cuda, where looking would stop the stream, it counts as 0.
        A norm option does nothing where a sum of squares is not finite or an edit leaves less than 2**-20 of the length.
    Raises:
        DeviceError, DtypeError, ShapeError, StrideError, RangeError: naming the argument.
    Devices: cpu, cuda (graph-safe).  Reference: rainkernels.reference.edits.edit
    """
    try:
        signature = (
            x.shape, x.stride(), x.dtype, x.device, x.is_neg(),
            slots.shape, slots.dtype, slots.device, slots.is_contiguous(), slots.is_neg(),
        )  # fmt: skip
        known = signature in table._calls
    except (AttributeError, TypeError, RuntimeError):  # not a dense tensor, or not a table: the checks say which
        _check_edit(x, table, slots)
        raise
    if not known:
        _check_edit(x, table, slots)
        _remember(table._calls, signature, (0, 0, 0))
    check_no_grad("x", x)
    lane = choose_lane("edits", x.device)
    if lane == "cpu":
        bad = native().edits_cpu(
            x.data_ptr(), x.stride(0), 0, 0, 0, 0, 0, 0, slots.data_ptr(), x.shape[0], x.shape[1], DTYPE_CODE[x.dtype],
            0, 0.0, 0, 0, 0.0, *table_arguments(table), torch.get_num_threads(),
        )  # fmt: skip
        if bad >= 0:
            raise _slot_error(slots, bad, table)
    elif lane == "triton":
        _check_slots(slots, table)
        if x.numel():
            from rainkernels.triton import edits as triton_lane

            triton_lane.edit_(x, table, slots)
    else:
        _check_slots(slots, table)
        with torch.no_grad():
            x.copy_(reference.edit(x, slots, **table.reference_arguments()))  # type: ignore[arg-type]
    return x


def add_edit_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    table: Table | None,
    slots: Tensor | None,
    *,
    eps: float,
    tap: Literal["mlp_out", "block_out"] = "mlp_out",
    weight_offset: float = 0.0,
    cast: Literal["llama", "gemma"] = "llama",
    out: Tensor | None = None,
) -> NormedResidual:
    """Residual add, edit and RMSNorm in one pass; the residual is updated in place.

        tap mlp_out    residual += edit(x)               tap block_out    residual = edit(residual + x)
        normed = residual / sqrt(mean(residual^2) + eps) * (weight_offset + weight)

    The sum is formed in float32, edit included, and rounded once to nearest even; the norm is computed from that rounded
    residual, the value the next layer reads, with the mean of squares in float32. Without an edit this is, up to the order
    of that one sum, what transformers computes: cast "llama" rounds the normalised row before it is multiplied by the
    weight (LlamaRMSNorm), "gemma" multiplies in float32 (GemmaRMSNorm with weight_offset 1).

    Shapes:
        x:        [num_tokens, hidden_size] float32 | bfloat16 | float16, last dim contiguous
        residual: like x, written; memory of its own
        weight:   [hidden_size] x's dtype or float32, contiguous
        table, slots: as in `edit_`, or both None for no edit
        out:      like x, contiguous rows, memory of its own or x itself; allocated when None
    Returns:
        NormedResidual(normed, residual)
    Edge cases:
        A row without an edit (as in `edit_`) has the bits it has with table None. A zero row gives zeros when eps > 0.
    Raises:
        DeviceError, DtypeError, ShapeError, StrideError, RangeError: naming the argument.
    Devices: cpu, cuda (graph-safe with `out` given).  Reference: rainkernels.reference.edits.add_edit_rmsnorm
    """
    calls = _CALLS if table is None else getattr(table, "_calls", None)
    try:
        signature = (
            x.shape, x.stride(), x.dtype, x.device, x.is_neg(), residual.shape, residual.stride(), residual.dtype,
            residual.device, residual.is_neg(), weight.shape, weight.stride(), weight.dtype, weight.device, weight.is_neg(),
            None if slots is None else (slots.shape, slots.dtype, slots.device, slots.is_contiguous(), slots.is_neg()),
            None if out is None else (out.shape, out.stride(), out.dtype, out.device, out.is_neg()),
            eps, type(eps), tap, weight_offset, type(weight_offset), cast,
        )  # fmt: skip
        spans = calls.get(signature)  # type: ignore[union-attr]
    except (AttributeError, TypeError, RuntimeError):
        _check_fused(x, residual, weight, table, slots, eps, tap, weight_offset, cast, out)
        raise
    if spans is None:
        _check_fused(x, residual, weight, table, slots, eps, tap, weight_offset, cast, out)
        spans = _span(x), _span(residual), _span(out)
        _remember(calls, signature, spans)
    check_no_grad("residual", residual)
    if out is not None:
        check_no_grad("out", out)
    if x.numel():
        _check_sharing(x, residual, out, spans)
    normed = x.new_empty(x.shape) if out is None else out
    lane = choose_lane("edits", x.device)
    if lane == "cpu":
        bad = native().edits_cpu(
            x.data_ptr(), x.stride(0), residual.data_ptr(), residual.stride(0), normed.data_ptr(), normed.stride(0),
            weight.data_ptr(), DTYPE_CODE[weight.dtype], 0 if slots is None else slots.data_ptr(), x.shape[0], x.shape[1],
            DTYPE_CODE[x.dtype], 1, eps, TAPS.index(tap), CASTS.index(cast), weight_offset, *table_arguments(table),
            torch.get_num_threads(),
        )  # fmt: skip
        if bad >= 0:
            assert slots is not None
            assert table is not None
            raise _slot_error(slots, bad, table)
        return NormedResidual(normed, residual)
    _check_slots(slots, table)
    if lane == "triton":
        if x.numel():
            from rainkernels.triton import edits as triton_lane

            triton_lane.add_edit_rmsnorm(x, residual, weight, table, slots, normed, eps, tap, weight_offset, cast)
    else:
        arguments = None if table is None else table.reference_arguments()
        with torch.no_grad():
            y, summed = reference.add_edit_rmsnorm(
                x, residual, weight, slots, arguments, eps=float(eps), tap=tap, weight_offset=float(weight_offset), cast=cast
            )  # fmt: skip
            residual.copy_(summed)
            normed.copy_(y)
    return NormedResidual(normed, residual)


def table_arguments(table: Table | None) -> tuple[int, ...]:
    """What the native lanes take of a table: addresses, the step from slot to slot, sizes, dtype."""
    if table is None:
        return _NO_TABLE
    if isinstance(table, EditTable):
        slots, k, d = table.directions.shape
        rows, gram, count, steps = table.directions, table.gram.data_ptr(), table.count.data_ptr(), (k * d, k)
    else:
        slots, k = table.alpha.shape
        rows, gram, count, steps = table.basis, 0, 0, (0, 0)
    return (
        rows.data_ptr(), steps[0], DTYPE_CODE[rows.dtype], table.scale.data_ptr(), steps[1], gram, table.op.data_ptr(),
        table.alpha.data_ptr(), table.target.data_ptr(), count, table.norm.data_ptr(), slots, k,
    )  # fmt: skip


def _remember(calls: Any, signature: object, spans: tuple[int, int, int]) -> None:
    if len(calls) >= 1024:
        calls.clear()
    calls[signature] = spans


def _check_rows(name: str, t: Tensor, like: Tensor | None, *, written: bool) -> None:
    if like is None:
        check_tensor(name, t, dtype=FLOATS, shape=(None, None), contiguous=False)
    else:
        check_tensor(name, t, dtype=like.dtype, shape=like.shape, device=like.device, contiguous=False)
    rows, d = t.shape
    if d == 0:
        raise ShapeError(f"{name} has shape {list(t.shape)}: a row needs at least one element")
    if d > 1 and t.stride(1) != 1:
        raise StrideError(f"{name} has strides {list(t.stride())}, the last must be 1: call .contiguous()")
    if written and rows > 1 and t.stride(0) < d:
        raise StrideError(f"{name} has strides {list(t.stride())}: its rows overlap and are written, clone it")


def _check_table(x: Tensor, table: object, slots: object) -> None:
    if not isinstance(table, (EditTable, BasisTable)):
        raise DtypeError(f"table must be an EditTable or a BasisTable, got {type(table).__name__}")
    where = table.alpha.device
    check_tensor("slots", slots, dtype=torch.int32, shape=(x.shape[0],), device=x.device)  # type: ignore[arg-type]
    check_tensor("table", table.alpha, device=x.device if where != x.device else None)
    if table.hidden_size != x.shape[1]:
        raise ShapeError(f"x has rows of {x.shape[1]} elements, table has directions of {table.hidden_size}")


def _check_edit(x: Tensor, table: object, slots: object) -> None:
    _check_rows("x", x, None, written=True)
    _check_table(x, table, slots)


def _check_fused(
    x: Tensor, residual: Tensor, weight: Tensor, table: object, slots: object, eps: object, tap: object, offset: object,
    cast: object, out: Tensor | None,
) -> None:  # fmt: skip
    _check_rows("x", x, None, written=False)
    _check_rows("residual", residual, x, written=True)
    check_tensor("weight", weight, dtype=_weight_dtypes(x), shape=(x.shape[1],), device=x.device)
    if (table is None) != (slots is None):
        raise DtypeError("table and slots belong together: give both, or None for both")
    if table is not None:
        _check_table(x, table, slots)
    if out is not None:
        _check_rows("out", out, x, written=True)
    check_choice("tap", tap, TAPS)
    check_choice("cast", cast, CASTS)
    check_real("eps", eps, "it must be finite in float32 and >= 0")
    check_real("weight_offset", offset, "it must be finite in float32; 1.0 for Gemma, 0.0 otherwise", signed=True)


def _span(t: Tensor | None) -> int:
    """Bytes from the first element to behind the last."""
    return 0 if t is None else ((t.shape[0] - 1) * t.stride(0) + t.shape[1]) * t.element_size()


def _check_sharing(x: Tensor, residual: Tensor, out: Tensor | None, spans: tuple[int, int, int]) -> None:
    """At every call: addresses are no part of a signature."""
    x_at, residual_at = x.data_ptr(), residual.data_ptr()
    x_end, residual_end = x_at + spans[0], residual_at + spans[1]
    if x_at < residual_end and residual_at < x_end and _rows_meet(x, residual):
        raise StrideError("residual shares memory with x and is written while x is read: clone it")
    if out is None:
        return
    out_at = out.data_ptr()
    out_end = out_at + spans[2]
    if out_at < residual_end and residual_at < out_end and _rows_meet(out, residual):
        raise StrideError("residual shares memory with out, and both are written: clone it")
    if out_at < x_end and x_at < out_end:
        itself = out_at == x_at and (out.stride(0) == x.stride(0) or x.shape[0] == 1)
        if not itself and _rows_meet(out, x):
            raise StrideError("out shares memory with x without being x: pass x itself, or memory of its own")


def _rows_meet(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have an element in common; columns of one buffer lie among each other and have none."""
    rows, size = a.shape[0], a.element_size()
    width, step_a, step_b = a.shape[1] * size, a.stride(0) * size, b.stride(0) * size
    between = b.data_ptr() - a.data_ptr()
    if step_a == step_b:
        near = -between // step_a if step_a else 0
        return any(abs(between + min(max(m, 1 - rows), rows - 1) * step_a) < width for m in (near, near + 1))
    for i in range(rows):
        at = i * step_a - between
        near = at // step_b if step_b else 0
        if any(abs(at - min(max(j, 0), rows - 1) * step_b) < width for j in (near, near + 1)):
            return True
    return False


def _weight_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    return (torch.float32,) if x.dtype == torch.float32 else (x.dtype, torch.float32)


def _check_slots(slots: Tensor | None, table: Table | None) -> None:
    if slots is None or table is None or slots.device.type != "cpu" or slots.numel() == 0:
        return
    wrong = (slots < 0) | (slots >= table.num_slots)
    if bool(wrong.any()):
        raise _slot_error(slots, int(wrong.nonzero()[0]), table)


def _slot_error(slots: Tensor, at: int, table: Table) -> RangeError:
    return RangeError(f"slots[{at}] is {int(slots[at])}, allowed are 0..{table.num_slots - 1}; 0 means no edit")


def _as_table(
    directions: Tensor | None, scale: Tensor | None, op: Tensor | None, alpha: Tensor | None, target: Tensor | None,
    norm: Tensor | None, gram: Tensor | None, count: Tensor | None,
) -> Table | None:  # fmt: skip
    if directions is None:
        return None
    if gram is None or count is None:
        return BasisTable(directions, scale, op, alpha, target, norm)  # type: ignore[arg-type]
    return EditTable(directions, scale, gram, op, alpha, target, count, norm)  # type: ignore[arg-type]


def _edit_op(
    x: Tensor, slots: Tensor, directions: Tensor, scale: Tensor, op: Tensor, alpha: Tensor, target: Tensor, norm: Tensor,
    gram: Tensor | None = None, count: Tensor | None = None,
) -> None:  # fmt: skip
    """The dispatcher's form: the table's tensors, checked at every call. Without gram and count: a shared basis."""
    edit_(x, _as_table(directions, scale, op, alpha, target, norm, gram, count), slots)  # type: ignore[arg-type]


def _add_edit_rmsnorm_op(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, tap: str = "mlp_out", weight_offset: float = 0.0,
    cast: str = "llama", slots: Tensor | None = None, directions: Tensor | None = None, scale: Tensor | None = None,
    op: Tensor | None = None, alpha: Tensor | None = None, target: Tensor | None = None, norm: Tensor | None = None,
    gram: Tensor | None = None, count: Tensor | None = None,
) -> Tensor:  # fmt: skip
    table = _as_table(directions, scale, op, alpha, target, norm, gram, count)
    return add_edit_rmsnorm(
        x, residual, weight, table, slots, eps=eps, tap=tap, weight_offset=weight_offset, cast=cast  # type: ignore[arg-type]
    ).normed  # fmt: skip


def _edit_fake(x: Tensor, *table: object, **options: object) -> None:
    return None


def _add_edit_rmsnorm_fake(x: Tensor, *rest: object, **options: object) -> Tensor:
    return x.new_empty(x.shape)


_LIBRARY: Any = torch.library.Library("rainkernels", "FRAGMENT")
_LIBRARY.define(
    "edit_(Tensor(a!) x, Tensor slots, Tensor directions, Tensor scale, Tensor op, Tensor alpha, Tensor target, "
    "Tensor norm, Tensor? gram=None, Tensor? count=None) -> ()"
)
_LIBRARY.define(
    "add_edit_rmsnorm(Tensor x, Tensor(a!) residual, Tensor weight, float eps, str tap='mlp_out', "
    "float weight_offset=0.0, str cast='llama', Tensor? slots=None, Tensor? directions=None, Tensor? scale=None, "
    "Tensor? op=None, Tensor? alpha=None, Tensor? target=None, Tensor? norm=None, Tensor? gram=None, Tensor? count=None) "
    "-> Tensor"
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("edit_", _edit_op, _key)
    _LIBRARY.impl("add_edit_rmsnorm", _add_edit_rmsnorm_op, _key)
torch.library.register_fake("rainkernels::edit_", _edit_fake, lib=_LIBRARY)
torch.library.register_fake("rainkernels::add_edit_rmsnorm", _add_edit_rmsnorm_fake, lib=_LIBRARY)
