"""kv family: every lane against the definition, bad input, registration."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rainkernels.errors import DtypeError, RangeError, ShapeError, StrideError
from rainkernels.ops.kv import kv_copy, kv_write
from rainkernels.reference import kv as reference
from rainkernels.testing.cases_kv import CASES, KvCase

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PREFILL = next(case for case in CASES if case.id == "prefill")


@pytest.fixture(params=["cpu", "reference"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAINKERNELS_LANE", request.param)
    return str(request.param)


def written_by_hand(i: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    k_pool, v_pool = i["k_pool"].clone(), i["v_pool"].clone()
    for t, slot in enumerate(i["slot_mapping"].tolist()):
        if slot >= 0:
            k_pool[slot], v_pool[slot] = i["k"][t], i["v"][t]
    return k_pool, v_pool


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_touches_exactly_its_slots(case: KvCase, dtype: torch.dtype, lane: str) -> None:
    inputs = case.make(dtype)
    k_pool, v_pool = written_by_hand(inputs)
    kv_write(**inputs)
    assert torch.equal(inputs["k_pool"], k_pool)
    assert torch.equal(inputs["v_pool"], v_pool)


@pytest.mark.parametrize("threads", [1, 2])
def test_write_with_repeated_slots_does_not_depend_on_threads(threads: int) -> None:
    case = next(case for case in CASES if case.id == "threaded")
    inputs = case.make(torch.float32)
    wanted = written_by_hand(inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kv_write(**inputs)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(inputs["k_pool"], wanted[0])
    assert torch.equal(inputs["v_pool"], wanted[1])


@pytest.mark.parametrize(
    ("src", "dst"),
    [([3, 5], [7, 1]), ([1, 2, 3], [2, 3, 4]), ([4, 9], [9, 4]), ([6], [6]), ([2, 2], [5, -1]), ([], [])],
)
def test_copy_reads_before_it_writes(src: list[int], dst: list[int], lane: str) -> None:
    inputs = PREFILL.make(torch.float32)
    k_pool, v_pool = inputs["k_pool"], inputs["v_pool"]
    k_old, v_old = k_pool.clone(), v_pool.clone()
    kv_copy(k_pool, v_pool, torch.tensor(src, dtype=torch.int32), torch.tensor(dst, dtype=torch.int32))
    for a, b in zip(src, dst, strict=True):
        if b >= 0:
            assert torch.equal(k_pool[b], k_old[a])
            assert torch.equal(v_pool[b], v_old[a])
    kept = [s for s in range(k_pool.shape[0]) if s not in dst]
    assert torch.equal(k_pool[kept], k_old[kept])


BAD_WRITES: list[tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], type[Exception]]] = [
    ("k", lambda i: {"k": i["k"].double()}, DtypeError),
    ("k", lambda i: {"k": i["k"][:, :1]}, ShapeError),
    ("k", lambda i: {"k": i["k"][..., 0]}, ShapeError),
    ("k", lambda i: {"k": i["k"].transpose(1, 2).contiguous().transpose(1, 2)}, StrideError),
    ("v", lambda i: {"v": i["v"][:-1]}, ShapeError),
    ("v", lambda i: {"v": i["v"].bfloat16()}, DtypeError),
    ("k_pool", lambda i: {"k_pool": i["k_pool"].transpose(0, 1).contiguous().transpose(0, 1)}, StrideError),
    ("k_pool", lambda i: {"k_pool": i["k_pool"].int()}, DtypeError),
    ("v_pool", lambda i: {"v_pool": i["v_pool"][:-1]}, ShapeError),
    ("slot_mapping", lambda i: {"slot_mapping": i["slot_mapping"].long()}, DtypeError),
    ("slot_mapping", lambda i: {"slot_mapping": i["slot_mapping"][:-1]}, ShapeError),
    ("slot_mapping", lambda i: {"slot_mapping": i["slot_mapping"] + 60}, RangeError),
    ("slot_mapping", lambda i: {"slot_mapping": i["slot_mapping"] - 3 - i["slot_mapping"]}, RangeError),
]


@pytest.mark.parametrize(("name", "change", "error"), BAD_WRITES)
def test_bad_write_is_refused_before_anything_is_written(
    name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], error: type[Exception], lane: str
) -> None:
    inputs = PREFILL.make(torch.float32)
    old = inputs["k_pool"].clone()
    with pytest.raises(error, match=name):
        kv_write(**(inputs | change(inputs)))
    assert torch.equal(inputs["k_pool"], old)


@pytest.mark.parametrize(
    ("src", "dst", "name"), [([64], [0], "src"), ([-1], [0], "src"), ([0], [64], "dst"), ([0], [-2], "dst")]
)
def test_bad_copy_is_refused(src: list[int], dst: list[int], name: str, lane: str) -> None:
    inputs = PREFILL.make(torch.float32)
    with pytest.raises(RangeError, match=name):
        kv_copy(
            inputs["k_pool"],
            inputs["v_pool"],
            torch.tensor(src, dtype=torch.int32),
            torch.tensor(dst, dtype=torch.int32),
        )


def test_registered_ops() -> None:
    inputs = PREFILL.make(torch.float32)
    torch.library.opcheck(torch.ops.rainkernels.kv_write.default, tuple(inputs.values()))
    slots = inputs["slot_mapping"]
    pools = (inputs["k_pool"], inputs["v_pool"])
    torch.library.opcheck(torch.ops.rainkernels.kv_copy.default, (*pools, slots[:4], slots[4:8]))
    with torch.inference_mode():
        made = PREFILL.make(torch.float32, seed=1)
        wanted = written_by_hand(made)
        torch.ops.rainkernels.kv_write(*made.values())
        assert torch.equal(made["k_pool"], wanted[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [case for case in CASES if not case.repeated], ids=str)
def test_cuda_write(case: KvCase) -> None:
    inputs = case.make(torch.bfloat16, "cuda")
    wanted = {name: t.clone() for name, t in inputs.items()}
    reference.kv_write(**wanted)
    kv_write(**inputs)
    assert torch.equal(inputs["k_pool"], wanted["k_pool"])
    assert torch.equal(inputs["v_pool"], wanted["v_pool"])
