"""Fuzzing of public ops: a call that is right, then one or two things wrong with it, then the verdict.

A call must end in a typed error that names an argument and leaves every tensor as it was, or in what the reference lane
gives. A draw is a few integers, from which everything else follows, so a failing example can be run again from its report.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from rainkernels.errors import RainKernelsError
from rainkernels.ops.tree import Forest

Call = dict[str, Any]
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.uint8,
    torch.bool, torch.complex64,
)  # fmt: skip
FAR = (-(2**31), -(2**31) + 1, -3, -2, -1, 0, 1, 2, 7, 31, 64, 2**16, 2**30, 2**31 - 1)
ODD_FLOATS = (float("nan"), float("inf"), float("-inf"), -1.0, -0.0, 0.0, 1e-45, 3e38, -3e38, 1e4)
NOT_TENSORS = (None, 3, 1.5, "text", [1, 2], (), {}, np.zeros(3, dtype=np.float32))
# A refused call may have begun to fill these.
OUTPUTS = ("out", "out_stats", "workspace")
ODD_NUMBERS = (
    float("nan"), float("inf"), float("-inf"), -1, -1.0, 0, 0.0, 1e-30, 1e30, 1e300, 2**31 - 1, 2**31, 2**63, -(2**63), 2**70, 10**400,
    3, 0.5, None, "3", True, [1.0], 1j, torch.tensor(1.0), np.float64(2.0), np.int64(2),
)  # fmt: skip


@dataclass(frozen=True)
class FuzzOp:
    """A public op: `make` gives the arguments of a right call, `call` takes them."""

    make: Callable[[Random], Call]
    call: Callable[..., Any]
    also_named: tuple[str, ...] = ()  # what errors may call a part of an argument
    same: Callable[[Any, Any], bool] | None = None  # of two results; None: equal bits, a NaN being any NaN
    compares: bool = True  # False where the result of a wrong value has no definition: only that nothing breaks
    steady: tuple[str, ...] = ()  # arguments that are never changed
    derived: tuple[str, ...] = ()  # arguments that follow from others: what wrong values of them give has no definition


@dataclass(frozen=True)
class Change:
    """What was done to which argument."""

    argument: str
    kind: str

    @property
    def of_keywords(self) -> bool:
        return self.kind in ("missing", "unknown")


def generator(rng: Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.getrandbits(32))


def randn(rng: Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(rng)).to(dtype)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Changes


def change(call: Call, op: FuzzOp, rng: Random) -> Change:
    """Change one argument of the call in place."""
    name = rng.choice([n for n in call if n not in op.steady] or list(call))
    value = call[name]
    if rng.random() < 0.04:
        if rng.random() < 0.5:
            del call[name]
            return Change(name, "missing")
        call["colour"] = 1
        return Change("colour", "unknown")
    if isinstance(value, Tensor):
        kind, changed = changed_tensor(value, rng)
    elif isinstance(value, Forest):
        kind, changed = "not a forest", rng.choice(NOT_TENSORS)
    elif isinstance(value, tuple | list) and value and all(isinstance(t, Tensor) for t in value):
        at = rng.randrange(len(value))
        kind, inner = changed_tensor(value[at], rng)
        changed = rebuilt(value, [*value[:at], inner, *value[at + 1 :]])
    else:
        kind, changed = "value", rng.choice(ODD_NUMBERS)
    call[name] = changed
    return Change(name, kind)


def changed_tensor(t: Tensor, rng: Random) -> tuple[str, Any]:
    """A kind of change and the tensor after it; the tensor itself where the kind does not apply."""
    if t.layout != torch.strided or t.device.type != "cpu" or t.is_neg():
        return "second change", t  # it is wrong already
    kinds: dict[str, Callable[[], Any]] = {
        "dtype": lambda: t.to(rng.choice(DTYPES)),
        "rank": lambda: rng.choice([t[None], t.reshape(-1), t[0] if t.dim() and t.shape[0] else t, t[..., None]]),
        "size": lambda: _resized(t, rng),
        "device": lambda: t.to("meta"),
        "stride": lambda: _strided(t, rng),
        "content": lambda: _with_content(t, rng),
        "negative view": lambda: torch._neg_view(t) if t.dtype != torch.bool else t,
        "sparse": lambda: t.to_sparse() if t.dim() else t,
        "not a tensor": lambda: rng.choice(NOT_TENSORS),
        "empty": lambda: t.new_empty(rng.choice([(0,), (0, *t.shape[1:]), ()])),
    }
    kind = rng.choice([*kinds, "content", "content", "stride", "size"])
    return kind, kinds[kind]()


def _resized(t: Tensor, rng: Random) -> Tensor:
    if t.dim() == 0:
        return t
    dim = rng.randrange(t.dim())
    size = t.shape[dim]
    wanted = rng.choice([size + 1, max(size - 1, 0), 0, 2 * size, 1])
    at = torch.arange(wanted) % max(size, 1)
    return t.index_select(dim, at) if size else t.new_zeros([*t.shape[:dim], wanted, *t.shape[dim + 1 :]])


def _strided(t: Tensor, rng: Random) -> Tensor:
    """The same values (or for an expansion, repeated ones) lying otherwise in memory."""
    if t.dim() == 0:
        return t
    dim = rng.randrange(t.dim())
    ways: list[Callable[[], Tensor]] = [
        lambda: t.transpose(dim, -1).contiguous().transpose(dim, -1),
        lambda: t.repeat_interleave(2, dim).unflatten(dim, (t.shape[dim], 2)).select(dim + 1, 0),
        lambda: t.narrow(dim, 0, 1).expand(t.shape) if t.shape[dim] else t,
        lambda: torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].view(t.shape),
        lambda: torch.cat([t, t], dim).narrow(dim, t.shape[dim], t.shape[dim]),
    ]
    return rng.choice(ways)()


def _with_content(t: Tensor, rng: Random) -> Tensor:
    t = t.clone()
    if t.numel() == 0:
        return t
    for _ in range(rng.choice([1, 1, 3])):
        at = tuple(rng.randrange(size) for size in t.shape)
        if t.dtype == torch.bool:
            t[at] = not bool(t[at])
        elif t.dtype.is_floating_point or t.dtype.is_complex:
            t[at] = rng.choice(ODD_FLOATS)
        else:
            info = torch.iinfo(t.dtype)
            t[at] = min(max(rng.choice([*FAR, int(t.max()) + 1]), info.min), info.max)
    return t


# Verdict


def check(op: FuzzOp, seed: int, num_changes: int) -> str:
    """Make one call, change it, run it on the cpu lane and on the reference. Returns the outcome in one word."""
    rng = Random(seed)
    call = op.make(rng)
    changes = [change(call, op, rng) for _ in range(num_changes)]
    words = sorted({*call, *(c.argument for c in changes), *op.also_named})
    first, second = copied(call), copied(call)
    note = f"seed {seed}, changes {changes}"
    result = error = None
    try:
        result = op.call(**first)
    except RainKernelsError as refused:
        error = refused
    except TypeError:
        assert any(c.of_keywords for c in changes), note
        return "keyword"
    except Exception as wrong:
        raise AssertionError(f"{note}: {type(wrong).__name__}: {wrong}") from wrong
    if error is not None:
        assert re.search(rf"\b({'|'.join(words)})\b", str(error)), f"{note}: names no argument: {error}"
        kept = [{n: v for n, v in c.items() if n not in OUTPUTS} for c in (first, call)]
        assert same_bits(*kept), f"{note}: refused ({error}), but something was written"
    if not op.compares:
        return "result" if error is None else "refused"
    wanted, reason = None, None
    with reference_lane():
        try:
            wanted = op.call(**second)
        except RainKernelsError as refused:
            reason = refused
        except Exception as wrong:
            raise AssertionError(f"{note}: reference: {type(wrong).__name__}: {wrong}") from wrong
    assert type(error) is type(reason), f"{note}: cpu lane: {error!r}; reference lane: {reason!r}"
    if error is not None:
        return "refused"
    if any(c.argument in op.derived for c in changes):
        return "undefined"
    if op.same and any(_is_extreme(call.get(c.argument)) for c in changes):
        return "extreme"
    same = op.same or same_bits
    assert same(result, wanted), f"{note}: {result} is not the reference's {wanted}"
    assert same(first, second), f"{note}: the arguments differ after the call"
    return "result"


def _is_extreme(value: Any) -> bool:
    """Whether numbers are in it that swallow all others in a sum, which leaves no digits for two lanes to agree on."""
    if isinstance(value, (int, float)):
        return 1e6 < abs(value) < float("inf")
    for t in flat(value):
        if t.layout == torch.strided and t.device.type == "cpu" and t.dtype.is_floating_point:
            size = t.abs()
            if bool(((size > 1e6) & torch.isfinite(size)).any()):
                return True
    return False


@contextmanager
def reference_lane() -> Iterator[None]:
    with mock.patch.dict(os.environ, {"RAINKERNELS_LANE": "reference"}):
        yield


def rebuilt(old: Any, items: list[Any]) -> Any:
    """The items as a list, tuple or named tuple like the old one."""
    return old._make(items) if hasattr(old, "_make") else type(old)(items)


def copied(value: Any) -> Any:
    """A copy that lies in memory as the original does, its own storage included."""
    if isinstance(value, dict):
        return {name: copied(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return rebuilt(value, [copied(v) for v in value])
    if isinstance(value, Forest):
        return value.clone()
    if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu":
        if value.is_neg() or value.is_conj():
            return value
        return torch.empty(0, dtype=value.dtype).set_(
            value.untyped_storage().clone(), value.storage_offset(), value.shape, value.stride()
        )
    return value


def flat(value: Any) -> list[Any]:
    """All tensors of a result or of arguments, in one order."""
    if isinstance(value, Forest):
        tops = {"free_rows": value.free_rows(), "free_embeddings": value.free_embeddings()}
        fields = {name: value.field(name) for name in _fields()}
        for name, top in tops.items():  # above the top lies scratch
            fields[name] = torch.where(torch.arange(fields[name].shape[1]) < top[:, None], fields[name], 0)
        return list(fields.values())
    if isinstance(value, dict):
        return [t for v in value.values() for t in flat(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in flat(v)]
    return [value] if isinstance(value, Tensor) else []


def _fields() -> list[str]:
    from rainkernels._forest import FIELDS

    return [name for name, _ in FIELDS]


def same_bits(a: Any, b: Any) -> bool:
    return _all(a, b, lambda x, y: torch.equal(x, y) or _equal_nan(x, y))


def same_within(relative: dict[torch.dtype, float]) -> Callable[[Any, Any], bool]:
    """Results of two lanes that round differently, by dtype. What is not finite in the reference may be anything."""

    def compare(x: Tensor, y: Tensor) -> bool:
        if not x.dtype.is_floating_point:
            return torch.equal(x, y)
        bound = relative[x.dtype]
        defined = torch.isfinite(y)
        return torch.allclose(x[defined].double(), y[defined].double(), rtol=bound, atol=bound)

    return lambda a, b: _all(a, b, compare)


def _all(a: Any, b: Any, compare: Callable[[Tensor, Tensor], bool]) -> bool:
    pairs = list(zip(flat(a), flat(b), strict=True))
    return all(
        x.shape == y.shape
        and x.dtype == y.dtype
        and (x.device.type == "meta" or x.layout != torch.strided or compare(x, y))
        for x, y in pairs
    )


def _equal_nan(x: Tensor, y: Tensor) -> bool:
    if not (x.dtype.is_floating_point or x.dtype.is_complex):
        return False
    return torch.allclose(x, y, rtol=0.0, atol=0.0, equal_nan=True)
