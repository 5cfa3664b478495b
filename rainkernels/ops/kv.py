"""Token slots of the K and V pools: write new tokens, copy slots. One slot holds one token of one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rainkernels._checks import FLOATS, check_no_grad, check_tensor
from rainkernels._lanes import choose_lane, native
from rainkernels.errors import LaneError, RangeError, StrideError
from rainkernels.reference import kv as reference

__all__ = ["kv_copy", "kv_lane", "kv_write"]

# Signatures of writes that passed every check: all layers of a step write the same one.
_CHECKED: set[object] = set()
_DTYPE_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


def kv_write(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slot_mapping: Tensor) -> None:
    """Write the K and V of new tokens to their slots, in place.

    Shapes:
        k:            [num_tokens, num_kv_heads, head_dim]    float32 | bfloat16 | float16, last dim contiguous
        v:            [num_tokens, num_kv_heads, head_dim_v]  same dtype, last dim contiguous
        k_pool:       [num_slots, num_kv_heads, head_dim]     same dtype, contiguous, written
        v_pool:       [num_slots, num_kv_heads, head_dim_v]   same dtype, contiguous, written
        slot_mapping: [num_tokens] int32, slot of each token; -1 skips the token
    Edge cases:
        Rows naming the same slot: the last one stays (cuda: any one of them). A slot outside the pool raises
        RangeError; on cuda, where looking would stop the stream, such a row is skipped. k, v and the two pools must not
        share memory, which is not looked at: what is read after it was written there is undefined.
    Raises:
        DeviceError, DtypeError, ShapeError, StrideError, RangeError: naming the argument.
    Devices: cpu, cuda (graph-safe).  Reference: rainkernels.reference.kv.kv_write
    """
    try:
        signature = (
            k.shape, k.stride(), k.dtype, k.device, v.shape, v.stride(), v.dtype, v.device,
            k_pool.shape, k_pool.dtype, k_pool.device, k_pool.is_contiguous(), v_pool.shape, v_pool.dtype, v_pool.device,
            v_pool.is_contiguous(), slot_mapping.shape, slot_mapping.dtype, slot_mapping.device, slot_mapping.is_contiguous(),
            k.is_neg(), v.is_neg(), k_pool.is_neg(), v_pool.is_neg(), slot_mapping.is_neg(), k.layout, v.layout,
        )  # fmt: skip
        known = signature in _CHECKED
    except (AttributeError, TypeError, RuntimeError):  # not a dense tensor: the checks say which
        _check_write(k, v, k_pool, v_pool, slot_mapping)
        raise
    if not known:
        _check_write(k, v, k_pool, v_pool, slot_mapping)
        if len(_CHECKED) >= 1024:
            _CHECKED.clear()
        _CHECKED.add(signature)
    check_no_grad("k_pool", k_pool)
    check_no_grad("v_pool", v_pool)
    tokens = k.shape[0]
    lane = choose_lane("kv", k_pool.device)
    if lane == "reference":
        _check_slots("slot_mapping", slot_mapping, k_pool.shape[0], lowest=-1)
        with torch.no_grad():
            reference.kv_write(k, v, k_pool, v_pool, slot_mapping)
        return
    if tokens == 0:
        return
    size = _DTYPE_BYTES[k.dtype]
    arguments = (
        k.data_ptr(), k.stride(0) * size, k.stride(1) * size, k_pool.data_ptr(), k.shape[2] * size,
        v.data_ptr(), v.stride(0) * size, v.stride(1) * size, v_pool.data_ptr(), v.shape[2] * size,
        slot_mapping.data_ptr(), tokens, k.shape[1], k_pool.shape[0],
    )  # fmt: skip
    if lane == "cpu":
        bad = native().kv_write_cpu(*arguments, torch.get_num_threads())
        if bad >= 0:
            raise _slot_error("slot_mapping", int(slot_mapping[bad]), bad, k_pool.shape[0], lowest=-1)
    else:
        with torch.cuda.device(k_pool.device):
            error = native().kv_write_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
        if error:
            raise LaneError(f"kv_write: the CUDA launch failed with {native().cuda_error_name(error)}")


def kv_lane(device: torch.device) -> str:
    """The lane calls on `device` take. The reference looks at the slots, for which a CUDA device has to stop: no capture."""
    return choose_lane("kv", device)


def kv_copy(k_pool: Tensor, v_pool: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy whole slots inside the pools, in place: slot `dst[i]` becomes what slot `src[i]` was before the call.

    Shapes:
        k_pool:   [num_slots, num_kv_heads, head_dim]    float32 | bfloat16 | float16, contiguous, written
        v_pool:   [num_slots, num_kv_heads, head_dim_v]  same dtype, contiguous, written
        src, dst: [num_copies] int32 slots; a slot may be both a source and a destination; dst -1 skips the copy
    Raises:
        DeviceError, DtypeError, ShapeError, StrideError, RangeError: naming the argument.
    Devices: cpu, cuda (clamps src and skips dst outside the pool there).  Reference: rainkernels.reference.kv.kv_copy
    """
    check_tensor("k_pool", k_pool, dtype=FLOATS, shape=(None, None, None))
    device = k_pool.device
    check_tensor("v_pool", v_pool, dtype=k_pool.dtype, shape=(*k_pool.shape[:2], None), device=device)
    check_tensor("src", src, dtype=torch.int32, shape=(None,), device=device)
    check_tensor("dst", dst, dtype=torch.int32, shape=(src.shape[0],), device=device)
    check_no_grad("k_pool", k_pool)
    check_no_grad("v_pool", v_pool)
    num_slots = k_pool.shape[0]
    lane = choose_lane("kv", device)
    if lane == "cuda":
        at = src.clamp(0, max(num_slots - 1, 0))
        kv_write(k_pool.index_select(0, at), v_pool.index_select(0, at), k_pool, v_pool, dst)
        return
    _check_slots("src", src, num_slots, lowest=0)
    _check_slots("dst", dst, num_slots, lowest=-1)
    if lane == "reference":
        with torch.no_grad():
            reference.kv_copy(k_pool, v_pool, src, dst)
    elif src.shape[0]:
        size = _DTYPE_BYTES[k_pool.dtype]
        row = k_pool.shape[1] * size
        native().kv_copy_cpu(
            k_pool.data_ptr(), row * k_pool.shape[2], v_pool.data_ptr(), row * v_pool.shape[2],
            src.data_ptr(), dst.data_ptr(), src.shape[0],
        )  # fmt: skip


def _check_write(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slot_mapping: Tensor) -> None:
    check_tensor("k_pool", k_pool, dtype=FLOATS, shape=(None, None, None))
    device, dtype = k_pool.device, k_pool.dtype
    _, heads, dim = k_pool.shape
    check_tensor("v_pool", v_pool, dtype=dtype, shape=(k_pool.shape[0], heads, None), device=device)
    check_tensor("k", k, dtype=dtype, shape=(None, heads, dim), device=device, contiguous=False)
    tokens = k.shape[0]
    check_tensor("v", v, dtype=dtype, shape=(tokens, heads, v_pool.shape[2]), device=device, contiguous=False)
    check_tensor("slot_mapping", slot_mapping, dtype=torch.int32, shape=(tokens,), device=device)
    for name, t in (("k", k), ("v", v)):
        if t.shape[2] > 1 and t.stride(2) != 1:
            raise StrideError(f"{name} has strides {list(t.stride())}, the last must be 1: call .contiguous()")


def _check_slots(name: str, slots: Tensor, num_slots: int, *, lowest: int) -> None:
    if slots.numel() == 0:
        return
    wrong = (slots < lowest) | (slots >= num_slots)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise _slot_error(name, int(slots[at]), at, num_slots, lowest=lowest)


def _slot_error(name: str, slot: int, at: int, num_slots: int, *, lowest: int) -> RangeError:
    return RangeError(
        f"{name}[{at}] is slot {slot}, allowed are {lowest}..{num_slots - 1} (the pool has {num_slots} slots): "
        "grow the pool or free slots first"
    )


def _fake_write(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slot_mapping: Tensor) -> None:
    return None


def _fake_copy(k_pool: Tensor, v_pool: Tensor, src: Tensor, dst: Tensor) -> None:
    return None


_LIBRARY: Any = torch.library.Library("rainkernels", "FRAGMENT")
_LIBRARY.define("kv_write(Tensor k, Tensor v, Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor slot_mapping) -> ()")
_LIBRARY.define("kv_copy(Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor src, Tensor dst) -> ()")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("kv_write", kv_write, _key)
    _LIBRARY.impl("kv_copy", kv_copy, _key)
torch.library.register_fake("rainkernels::kv_write", _fake_write, lib=_LIBRARY)
torch.library.register_fake("rainkernels::kv_copy", _fake_copy, lib=_LIBRARY)
