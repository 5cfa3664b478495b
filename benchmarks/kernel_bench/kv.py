"""kv_write: K and V of new tokens to their slots, against plain indexing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernel_bench.bench import OURS, Bench, Settings, Verdict, compiled, num_input_sets
from kernel_bench.machine import l2_bytes
from kernel_bench.measure import Run, Runs
from rainkernels._lanes import choose_lane
from rainkernels.ops.kv import kv_write
from rainkernels.reference import kv as reference
from rainkernels.testing.cases_kv import KvCase

CPU = ((40, 8, 64, torch.float32), (1024, 8, 128, torch.float32))
CUDA = ((160, 8, 128, torch.bfloat16), (4096, 8, 128, torch.bfloat16))
TINY = ((5, 2, 16, torch.float32),)


def makers(settings: Settings) -> list[tuple[str, Callable[[], Bench]]]:
    """Names of the cases, and what makes each."""
    shapes = CUDA if settings.device.type == "cuda" else TINY if settings.quick else CPU
    return [
        (f"{rows} rows, {heads} heads, D {dim}", partial(make, rows, heads, dim, dtype, settings))
        for rows, heads, dim, dtype in shapes[: 1 if settings.quick else None]
    ]


def make(rows: int, heads: int, dim: int, dtype: torch.dtype, settings: Settings) -> Bench:
    """Rows as a model hands them over: a transposed view of [heads, rows, dim]."""
    case = KvCase("bench", rows, heads, dim, dim, num_slots=max(4096, 2 * rows), layout="heads_first")
    row_bytes = 2.0 * rows * heads * dim * dtype.itemsize
    on_gpu = settings.device.type == "cuda"
    count = num_input_sets(settings, 2 * row_bytes, l2_bytes(settings.device) if on_gpu else 0)
    sets = [case.make(dtype, settings.device, seed) for seed in range(count)]

    def indexed(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, at: Tensor) -> None:
        k_pool[at] = k
        v_pool[at] = v

    def copied(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, at: Tensor) -> None:
        k_pool.index_copy_(0, at, k)
        v_pool.index_copy_(0, at, v)

    def plain(function: Callable[..., object]) -> Callable[[], Runs]:
        return lambda: [
            partial(function, s["k"], s["v"], s["k_pool"], s["v_pool"], s["slot_mapping"].long()) for s in sets
        ]

    builders: dict[str, Callable[[], Runs]] = {
        OURS: lambda: [partial(kv_write, **s) for s in sets],
        "pool[slots] = rows": plain(indexed),
        "index_copy_": plain(copied),
    }
    if settings.compile and rows == (CUDA if on_gpu else CPU)[0][0]:
        builders["torch.compile"] = lambda: plain(compiled(indexed))()
    wanted = {name: t.clone() for name, t in sets[0].items()}
    reference.kv_write(**wanted)
    drawn = {name: sets[0][name].clone() for name in ("k_pool", "v_pool")}

    def verify(label: str, run: Run) -> Verdict:
        for name, t in drawn.items():
            sets[0][name].copy_(t)
        run()
        wrong = sum(int((sets[0][name] != wanted[name]).sum()) for name in drawn)
        return Verdict(float(wrong), 0.0, "values that differ")

    name = f"{rows} rows, {heads} heads, D {dim}"
    lane = choose_lane("kv", settings.device)
    return Bench("kv_write", name, dtype, builders, verify, 2 * row_bytes + 4 * rows, 0.0, lane, {"input_sets": count})
