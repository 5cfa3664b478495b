"""The CUDA kernels of the tree and kv families, run on the CPU by an emulator, against the CPU lane.

tests/cpp/cuda_emulator/cuda_runtime.h says what this can find and what it cannot. A GPU is still needed for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from emulated_cuda import build, compiler, cuda_lane, rewritten
from test_tree import bad_calls, contents, expand_one, small_forest
from tree_driver import ForestDriver, ints

from rainkernels.errors import RainKernelsError
from rainkernels.ops import tree
from rainkernels.ops.kv import kv_copy, kv_write
from rainkernels.testing import cases_kv, cases_tree

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler was found")
FORWARD, BACKWARD, SHUFFLED = 0, 1, 7
ORDERS = pytest.mark.parametrize("order", [FORWARD, BACKWARD, SHUFFLED], ids=["forward", "backward", "shuffled"])


@pytest.fixture(scope="module")
def built() -> ModuleType:
    return build()


@pytest.fixture
def emulated(built: ModuleType) -> Iterator[ModuleType]:
    yield built
    built.set_order(FORWARD)


def test_the_machine_sums_over_warps(emulated: ModuleType) -> None:
    x = torch.arange(200, dtype=torch.int64) * 7 % 31 - 9
    padded = torch.cat([x, torch.zeros(88, dtype=torch.int64)]).view(-1, 32)
    for order in (FORWARD, BACKWARD, SHUFFLED):
        emulated.set_order(order)
        out = torch.empty_like(x)
        emulated.sums(x.data_ptr(), out.data_ptr(), len(x))
        for i, got in enumerate(out.tolist()):
            warp = padded[i // 32]
            first = int(warp[0])
            remainder = first - 10 * int(first / 10)  # as C++ rounds
            some = 2 * bool((warp % 2 != 0).any()) + (i // 32 < 6) + 4 * (i // 96 == 2)
            assert got == 1000 * int(warp.sum()) + 100 * remainder + some


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("half a block barrier", "deadlock|not in its own mask"),
        ("two exchanges", "wait at __syncwarp and at a vote"),
        ("not in its mask", "not in its own mask"),
        ("absent lane", "reads a lane that takes no part"),
    ],
)
def test_the_machine_refuses_misused_barriers(kind: str, said: str, emulated: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=said):
        emulated.misuse(kind)


def test_every_launch_is_rewritten() -> None:
    line = "k<Op><<<f(a), 64, 0, static_cast<cudaStream_t>(stream)>>>(f, a[0], error);"
    assert rewritten(line) == (
        "cuda_emulator::launch(f(a), 64, 0, static_cast<cudaStream_t>(stream), [=] { k<Op>(f, a[0], error); });"
    )
    with pytest.raises(AssertionError, match="form"):
        rewritten("launch_me<<<1, 2>>>")


@pytest.mark.parametrize(
    ("dtype", "order"),
    [(torch.float32, FORWARD), (torch.float32, SHUFFLED), (torch.float64, BACKWARD)],
    ids=["f32-forward", "f32-shuffled", "f64-backward"],
)
@pytest.mark.parametrize("case", cases_tree.CASES, ids=str)
def test_searches_are_bitwise_those_of_the_cpu_lane(
    case: cases_tree.TreeCase, dtype: torch.dtype, order: int, emulated: ModuleType
) -> None:
    seeds = [11, 12, 13]
    wanted = ForestDriver(case, seeds, dtype)
    traces = wanted.run()
    emulated.set_order(order)
    with cuda_lane(emulated):
        got = ForestDriver(case, seeds, dtype)
        assert [vars(t) for t in got.run()] == [vars(t) for t in traces]
    for a, b in zip(contents(got.forest), contents(wanted.forest), strict=True):
        assert torch.equal(a, b)


@ORDERS
@pytest.mark.parametrize("embeddings", [6, 64], ids=["pool-runs-out", "pool-suffices"])
def test_leaves_of_one_tree_are_backed_up_in_order(embeddings: int, order: int, emulated: ModuleType) -> None:
    """One call names trees several times: the items of a tree in the order given, whatever the order of the blocks."""
    case = next(case for case in cases_tree.CASES if case.id == "alike")
    config = replace(case.config, max_embeddings=embeddings)
    driver = ForestDriver(replace(case, config=config), [1, 2], torch.float32)
    for _ in range(8):
        driver.simulate()
    trees = ints([1, 0, 1, 0, 0])
    chosen = tree.select(driver.forest, trees)
    values, rows = torch.tensor([1.0, 0.0, -1.0, 1.0, 0.5]), int(chosen.depth.max()) + 1
    x = 1 + 0.1 * torch.randn(5, rows, config.embedding_dim, generator=torch.Generator().manual_seed(0))
    other = driver.forest.clone()
    wanted = tree.backup(driver.forest, trees, chosen.path, chosen.depth, values, x)
    emulated.set_order(order)
    with cuda_lane(emulated):
        assert torch.equal(tree.backup(other, trees, chosen.path, chosen.depth, values, x), wanted)
    assert bool(wanted.any()) == (embeddings == 6)
    assert all(torch.equal(a, b) for a, b in zip(contents(other), contents(driver.forest), strict=True))


@pytest.mark.parametrize("name", list(bad_calls()))
def test_bad_items_are_refused_as_on_the_cpu_lane(name: str, emulated: ModuleType) -> None:
    call = bad_calls()[name][2]
    forest = small_forest()
    expand_one(forest, 0, [0.5, 0.5])
    other, before = forest.clone(), contents(forest)
    with pytest.raises(RainKernelsError) as wanted:
        call(forest)  # type: ignore[operator]
    emulated.set_order(BACKWARD)
    with cuda_lane(emulated), pytest.raises(RainKernelsError) as got:
        call(other)  # type: ignore[operator]
    assert (type(got.value), str(got.value)) == (type(wanted.value), str(wanted.value))
    assert all(torch.equal(a, b) for a, b in zip(contents(other), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("case", cases_kv.CASES, ids=str)
def test_kv_write_equals_the_cpu_lane(case: cases_kv.KvCase, dtype: torch.dtype, emulated: ModuleType) -> None:
    wanted, got = case.make(dtype), case.make(dtype)
    kv_write(**wanted)
    emulated.set_order(FORWARD)  # of several rows for one slot the last block's stays, as on the cpu lane
    with cuda_lane(emulated):
        kv_write(**got)
    assert torch.equal(got["k_pool"], wanted["k_pool"])
    assert torch.equal(got["v_pool"], wanted["v_pool"])


@pytest.mark.parametrize("offset", [1, 2, 4], ids=lambda n: f"{2 * n}-bytes-off")
def test_kv_write_of_rows_at_odd_addresses(offset: int, emulated: ModuleType) -> None:
    """Each width of copy is taken: rows that begin 2, 4 or 8 bytes past an aligned address."""
    g = torch.Generator().manual_seed(offset)
    flat = torch.randn(6 * 2 * 16 + offset, generator=g).to(torch.bfloat16)
    k = flat[offset:].view(6, 2, 16)
    pools = [torch.zeros(8, 2, 16, dtype=torch.bfloat16) for _ in range(2)]
    with cuda_lane(emulated):
        kv_write(k, k, *pools, ints([3, 0, 7, -1, 1, 2]))
    for pool in pools:
        assert torch.equal(pool[[3, 0, 7, 1, 2]], k[[0, 1, 2, 4, 5]])
        assert not pool[4:7].any()


def test_kv_slots_outside_the_pool_are_skipped(emulated: ModuleType) -> None:
    case = next(case for case in cases_kv.CASES if case.id == "prefill")
    inputs = case.make(torch.float32)
    k_pool, v_pool = inputs["k_pool"].clone(), inputs["v_pool"].clone()
    inputs["slot_mapping"][:] = ints([case.num_slots, -2, 2**31 - 1, -(2**31)] * 10)
    with cuda_lane(emulated):
        kv_write(**inputs)
        kv_copy(inputs["k_pool"], inputs["v_pool"], ints([5, 9]), ints([case.num_slots, -7]))
    assert torch.equal(inputs["k_pool"], k_pool)
    assert torch.equal(inputs["v_pool"], v_pool)


@pytest.mark.parametrize(
    ("src", "dst"), [([3, 5], [7, 1]), ([1, 2, 3], [2, 3, 4]), ([4, 9], [9, 4]), ([2, 2], [5, -1])]
)
def test_kv_copy_equals_the_cpu_lane(src: list[int], dst: list[int], emulated: ModuleType) -> None:
    case = next(case for case in cases_kv.CASES if case.id == "prefill")
    wanted, got = case.make(torch.bfloat16), case.make(torch.bfloat16)
    kv_copy(wanted["k_pool"], wanted["v_pool"], ints(src), ints(dst))
    emulated.set_order(SHUFFLED)
    with cuda_lane(emulated):
        kv_copy(got["k_pool"], got["v_pool"], ints(src), ints(dst))
    assert torch.equal(got["k_pool"], wanted["k_pool"])
    assert torch.equal(got["v_pool"], wanted["v_pool"])
