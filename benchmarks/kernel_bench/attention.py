"""tree_attention: decode rows of many branches over one prefix, and prefill, against plain PyTorch and FlashInfer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernel_bench import attention_peers as peers
from kernel_bench.bench import OURS, Bench, Settings, Verdict, compiled, num_input_sets
from kernel_bench.machine import l2_bytes
from kernel_bench.measure import Run, Runs
from kernel_bench.static import loaded_buffers
from rainkernels._lanes import choose_lane
from rainkernels.ops.attention import tree_attention
from rainkernels.reference import attention as reference
from rainkernels.testing.cases_attention import AttentionCase, AttentionInputs, chain, fan

_CHECKED_ROWS = 16  # compared in float64; a gather of all rows' paths would not fit
_ATOL = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 5e-4}


@dataclass(frozen=True)
class Fan:
    """`branches` decode rows, each over a shared prefix and `length` tokens of its own."""

    prefix: int
    branches: int
    length: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.branches} x {self.length} over {self.prefix}, {self.num_qo_heads}/{self.num_kv_heads} heads, "
            f"D {self.head_dim}, {name}"
        )

    def make(self, device: torch.device, seed: int = 0) -> AttentionInputs:
        forest = fan(self.prefix, self.branches, self.length)
        case = AttentionCase("fan", forest, self.num_qo_heads, self.num_kv_heads, self.head_dim, scattered=False)
        return case.make(self.dtype, device, seed)

    @property
    def num_keys(self) -> int:
        return self.prefix + self.branches * self.length

    @property
    def num_rows(self) -> int:
        return self.branches

    def flops(self) -> float:
        return 4.0 * self.branches * (self.prefix + self.length) * self.num_qo_heads * self.head_dim


@dataclass(frozen=True)
class Prefill:
    """All rows of one new request."""

    length: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"prefill {self.length}, {self.num_qo_heads}/{self.num_kv_heads} heads, D {self.head_dim}, {name}"

    def make(self, device: torch.device, seed: int = 0) -> AttentionInputs:
        forest = chain(self.length, self.length)
        case = AttentionCase("prefill", forest, self.num_qo_heads, self.num_kv_heads, self.head_dim, scattered=False)
        return case.make(self.dtype, device, seed)

    @property
    def num_keys(self) -> int:
        return self.length

    @property
    def num_rows(self) -> int:
        return self.length

    def flops(self) -> float:
        return 2.0 * self.length * (self.length + 1) * self.num_qo_heads * self.head_dim


_BF16 = torch.bfloat16
CPU = (
    Fan(2048, 40, 32, 8, 8, 64),
    Fan(2048, 40, 32, 32, 8, 64),
    Fan(2048, 40, 32, 32, 8, 64, _BF16),
    Fan(2048, 1, 1, 8, 8, 64),
    Fan(150, 11, 4, 4, 2, 32),
    Prefill(1024, 8, 8, 64),
    Prefill(1024, 32, 8, 128),
)
CUDA = (
    Fan(4096, 40, 32, 32, 8, 128, _BF16),
    Fan(4096, 160, 32, 32, 8, 128, _BF16),
    Fan(4000, 40, 32, 32, 8, 128, _BF16),
    Fan(4096, 1, 1, 32, 8, 128, _BF16),
    Fan(1024, 10, 32, 32, 32, 128, _BF16),
    Fan(2048, 40, 32, 32, 8, 64),
    Prefill(2048, 32, 8, 128, _BF16),
)
TINY = (Fan(48, 3, 2, 4, 2, 16), Prefill(24, 4, 2, 16))


def makers(settings: Settings) -> list[tuple[str, Callable[[], Bench]]]:
    """Names of the cases, and what makes each."""
    cases: tuple[Fan | Prefill, ...] = CUDA if settings.device.type == "cuda" else CPU
    if settings.quick:
        cases = TINY if settings.device.type == "cpu" else CUDA[:1]
    return [(str(case), partial(make, case, settings)) for case in cases]


def make(case: Fan | Prefill, settings: Settings) -> Bench:
    """The contenders of one case over the same inputs."""
    item = case.dtype.itemsize
    key_bytes = 2.0 * case.num_keys * case.num_kv_heads * case.head_dim * item
    row_bytes = 2.0 * case.num_rows * case.num_qo_heads * case.head_dim * item
    on_gpu = settings.device.type == "cuda"
    count = num_input_sets(settings, key_bytes, l2_bytes(settings.device) if on_gpu else 0)
    sets = [case.make(settings.device, seed) for seed in range(count)]
    builders: dict[str, Callable[[], Runs]] = {OURS: lambda: [ours(i) for i in sets]}

    def add(label: str, contender: Callable[..., peers.Contender]) -> None:
        def build() -> Runs:
            bound = [contender(case, i) for i in sets]
            return [b.run for b in bound]

        builders[label] = build

    def add_compiled(label: str, contender: Callable[..., peers.Contender]) -> None:
        def build() -> Runs:
            bound = [contender(case, i) for i in sets]
            function = compiled(bound[0].function)
            return [partial(function, *b.arguments) for b in bound]

        builders[label] = build

    if isinstance(case, Fan):
        # PyTorch's bfloat16 products need AMX on a CPU, which some virtual machines announce and do not run.
        if on_gpu or case.dtype != _BF16:
            add("gather + sdpa", peers.gathered)
            add("sdpa, cache per branch", peers.replicated)
            add("two-part", peers.two_part)
            add("two-part flash", peers.two_part_flash)
            if settings.compile and case in (CPU[0], CUDA[0]):  # once: it compiles for a while
                add_compiled("two-part, torch.compile", peers.two_part)
        if on_gpu:
            add("FlashInfer cascade", peers.flashinfer_cascade)
    else:
        if on_gpu or case.dtype != _BF16:
            add("causal sdpa", peers.causal)
    verify = Reference(sets[0])
    notes = {"input_sets": count, "keys": case.num_keys, "rows": case.num_rows}
    lane = choose_lane("attention", settings.device)
    notes["static_buffers"] = lane == "triton"
    return Bench("attention", str(case), case.dtype, builders, verify, key_bytes + row_bytes, case.flops(), lane, notes)


def ours(i: AttentionInputs) -> Run:
    """One call over a plan that is there already; on a GPU over static memory, as a captured step has it."""
    plan, out = i.plan(), torch.empty_like(i.q)
    buffers = loaded_buffers(plan, i.q.shape[1], i.k_pool, i.v_pool)
    return lambda: tree_attention(i.q, i.k_pool, i.v_pool, plan, **i.options, out=out, buffers=buffers)


class Reference:
    """Some rows against the float64 definition; an error of twice plain PyTorch's in the same dtype is allowed."""

    def __init__(self, i: AttentionInputs) -> None:
        p = i.plan_inputs
        index, length = reference.path_slots(
            p["segment_parent"], p["segment_slots_indptr"], p["slots"], p["row_segment"], p["row_position"]
        )
        rows = len(length)
        at = torch.arange(rows)[:: max(1, rows // _CHECKED_ROWS)]
        self.rows = at.to(i.q.device)
        index, length = index[at], length[at]
        self.exact = self._attend(i, index, length, torch.float64)
        plain = self._attend(i, index, length, i.q.dtype)
        # peers' partial results are rounded to the dtype before they are merged, hence the factor on top of the rule
        self.allowed = 2 * self._error(plain) + _ATOL[i.q.dtype]

    def __call__(self, label: str, run: Run) -> Verdict:
        out = run()
        assert isinstance(out, Tensor)
        factor = 1.0 if label == OURS else 4.0
        return Verdict(self._error(out[self.rows]), factor * self.allowed)

    def _attend(self, i: AttentionInputs, index: Tensor, length: Tensor, dtype: torch.dtype) -> Tensor:
        q, scale = i.q[self.rows].to(dtype), i.options["softmax_scale"]
        if dtype == torch.float64:
            return reference.tree_attention(
                q, i.k_pool.double(), i.v_pool.double(), index, length, softmax_scale=scale
            )[0]
        # Plain PyTorch in the dtype: products, softmax and products, row by row; on a CPU from operands rounded to the
        # dtype, in float32 (see above why).
        work = torch.float32 if q.device.type == "cpu" else dtype
        group = q.shape[1] // i.k_pool.shape[1]
        out = torch.empty_like(q)
        for r, n in enumerate(length.tolist()):
            at = index[r, :n].to(q.device)
            k = i.k_pool[at].to(work).repeat_interleave(group, 1)
            v = i.v_pool[at].to(work).repeat_interleave(group, 1)
            weights = torch.softmax(torch.einsum("hd,lhd->hl", q[r].to(work), k) * scale, dim=-1).to(dtype).to(work)
            out[r] = torch.einsum("hl,lhd->hd", weights, v)
        return out

    def _error(self, out: Tensor) -> float:
        return float((out.double() - self.exact).abs().max())
