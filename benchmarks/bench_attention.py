"""tree_attention against what plain PyTorch offers for the same rows.

    python benchmarks/bench_attention.py [--threads 2] [--repeats 15] [--quick]

Every case is checked against the float64 definition before it is timed. Contenders alternate, so a noisy machine hits all
of them; the table shows medians. The last line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from rainkernels.ops.attention import tree_attention
from rainkernels.reference import attention as reference
from rainkernels.testing.cases_attention import AttentionCase, AttentionInputs, chain, fan

Contender = Callable[[], Tensor]


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

    def make(self) -> AttentionInputs:
        forest = fan(self.prefix, self.branches, self.length)
        case = AttentionCase("fan", forest, self.num_qo_heads, self.num_kv_heads, self.head_dim, scattered=False)
        return case.make(self.dtype)

    def flops(self) -> float:
        return 4.0 * self.branches * (self.prefix + self.length) * self.num_qo_heads * self.head_dim


@dataclass(frozen=True)
class Prefill:
    """All rows of one new request."""

    length: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"prefill {self.length}, {self.num_qo_heads}/{self.num_kv_heads} heads, D {self.head_dim}, float32"

    def make(self) -> AttentionInputs:
        forest = chain(self.length, self.length)
        case = AttentionCase("prefill", forest, self.num_qo_heads, self.num_kv_heads, self.head_dim, scattered=False)
        return case.make(torch.float32)

    def flops(self) -> float:
        return 2.0 * self.length * (self.length + 1) * self.num_qo_heads * self.head_dim


FANS = (
    Fan(2048, 40, 32, 8, 8, 64),
    Fan(2048, 40, 32, 32, 8, 64),
    Fan(2048, 40, 32, 32, 8, 64, torch.bfloat16),
    Fan(2048, 1, 1, 8, 8, 64),
    Fan(150, 11, 4, 4, 2, 32),
)
PREFILLS = (Prefill(1024, 8, 8, 64), Prefill(1024, 32, 8, 128))


def ours(i: AttentionInputs) -> Contender:
    plan = i.plan()
    return lambda: tree_attention(i.q, i.k_pool, i.v_pool, plan, **i.options)


def gathered(case: Fan, i: AttentionInputs) -> Contender:
    """K and V of every branch gathered side by side, as a cache per branch holds them, then one SDPA."""
    slots = i.plan_inputs["slots"].long()
    own = slots[case.prefix :].view(case.branches, case.length)
    at = torch.cat([slots[: case.prefix].expand(case.branches, -1), own], dim=1)
    grouped = case.num_qo_heads != case.num_kv_heads

    def run() -> Tensor:
        k, v = i.k_pool[at].transpose(1, 2), i.v_pool[at].transpose(1, 2)
        out = functional.scaled_dot_product_attention(i.q[:, :, None], k, v, enable_gqa=grouped)
        return out[:, :, 0]

    return run


def two_part(case: Fan, i: AttentionInputs) -> Contender:
    """Prefix pass with its log-sum-exp, suffix pass, merge: matrix products, the prefix read once for all rows."""
    group, heads = case.num_qo_heads // case.num_kv_heads, case.num_kv_heads
    first, scale = int(i.plan_inputs["slots"][0]), i.options["softmax_scale"]
    cut = first + case.prefix

    def part(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = (q @ k.transpose(-1, -2)).float() * scale
        lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        return torch.exp(scores - lse).to(v.dtype) @ v, lse

    def run() -> Tensor:
        q = i.q.view(case.branches, heads, group, case.head_dim)
        k, v = i.k_pool[first:cut].transpose(0, 1), i.v_pool[first:cut].transpose(0, 1)
        out_a, lse_a = part(q.transpose(0, 1).reshape(heads, -1, case.head_dim), k, v)
        shape = (heads, case.branches, group, -1)
        out_a, lse_a = out_a.view(shape).transpose(0, 1), lse_a.view(shape).transpose(0, 1)
        own_k = i.k_pool[cut:].view(case.branches, case.length, heads, -1).transpose(1, 2)
        own_v = i.v_pool[cut:].view(case.branches, case.length, heads, -1).transpose(1, 2)
        out_b, lse_b = part(q, own_k, own_v)
        lse = torch.logaddexp(lse_a, lse_b)
        merged = torch.exp(lse_a - lse) * out_a + torch.exp(lse_b - lse) * out_b
        return merged.reshape(case.branches, -1, case.head_dim)

    return run


def causal(case: Prefill, i: AttentionInputs) -> Contender:
    """PyTorch's own causal attention over K and V that already lie side by side."""
    q, k, v = (t.transpose(0, 1)[None] for t in (i.q, i.k_pool[1:], i.v_pool[1:]))
    grouped = case.num_qo_heads != case.num_kv_heads
    return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)[0].transpose(
        0, 1
    )


def check(name: str, i: AttentionInputs, contenders: dict[str, Contender]) -> None:
    """Every contender agrees with the float64 definition."""
    p = i.plan_inputs
    index, length = reference.path_slots(
        p["segment_parent"], p["segment_slots_indptr"], p["slots"], p["row_segment"], p["row_position"]
    )
    exact, _ = reference.tree_attention(
        i.q.double(), i.k_pool.double(), i.v_pool.double(), index, length, softmax_scale=i.options["softmax_scale"]
    )
    for label, run in contenders.items():
        error = float((run().double() - exact).abs().max())
        if error > (3e-2 if i.q.dtype == torch.bfloat16 else 2e-5):
            raise SystemExit(f"{name}: {label} is off by {error:.2e}")


def alternate(contenders: dict[str, Contender], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median and least microseconds of each contender, run in turns; short ones are repeated inside a sample."""
    samples: dict[str, list[float]] = {label: [] for label in contenders}
    inner = {}
    for label, run in contenders.items():
        begin = time.perf_counter()
        run()
        inner[label] = max(1, min(200, int(2e-3 / (time.perf_counter() - begin))))
    for _ in range(repeats):
        for label, run in contenders.items():
            begin = time.perf_counter()
            for _ in range(inner[label]):
                run()
            samples[label].append((time.perf_counter() - begin) / inner[label] * 1e6)
    medians = {label: statistics.median(taken) for label, taken in samples.items()}
    return medians, {label: min(taken) for label, taken in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="the first case only, few repeats")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    repeats = 3 if arguments.quick else arguments.repeats
    cases: tuple[Fan | Prefill, ...] = FANS[:1] if arguments.quick else (*FANS, *PREFILLS)
    rows = []
    print(f"{'case':56} {'tree us':>9} {'least':>9} {'GFLOP/s':>8}  speed-up over")
    for case in cases:
        i = case.make()
        contenders = {"tree": ours(i)}
        if isinstance(case, Fan) and case.dtype == torch.bfloat16:
            pass  # PyTorch's bfloat16 products need AMX here, which some virtual machines announce and do not run
        elif isinstance(case, Fan):
            contenders |= {"gather + sdpa": gathered(case, i), "two-part": two_part(case, i)}
        else:
            contenders |= {"causal sdpa": causal(case, i)}
        with torch.inference_mode():
            check(str(case), i, contenders)
            taken, least = alternate(contenders, repeats)
        rate = case.flops() / taken["tree"] / 1e3
        ratios = {label: t / taken["tree"] for label, t in taken.items() if label != "tree"}
        against = ", ".join(f"{k} {v:.1f}x" for k, v in ratios.items())
        print(f"{case!s:56} {taken['tree']:9.1f} {least['tree']:9.1f} {rate:8.1f}  {against}")
        rows.append({"case": str(case), "median_us": taken, "min_us": least, "gflop_per_s": rate, "speedup": ratios})
    facts = {"threads": arguments.threads, "repeats": repeats, "torch": torch.__version__, "cpu": platform.processor()}
    print(json.dumps({"op": "tree_attention", "lane": "cpu", **facts, "rows": rows}))


if __name__ == "__main__":
    main()
