"""Every named case of every family on a device, next to the plain definition on the host.

python benchmarks/acceptance/cases.py [--device cuda|cpu] [--families ...] [--small] [--json FILE]

The tests marked `gpu` hold the strict rules; this says in one table how far each case is off, and its small form is what
compute-sanitizer watches. Exit code 1 when a case fails or is off by more than rounding explains.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from kernel_bench.bench import OURS, Settings, forced_lane  # noqa: E402
from kernel_bench.measure import first_line, rounded  # noqa: E402
from torch import Tensor  # noqa: E402

FAMILIES = ("attention", "kv", "tree", "logits", "edits")
_ATOL = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-5}
_SMALL = 5  # cases of each family in the small form


@dataclass(frozen=True)
class Compared:
    """How far a case is off and how far rounding may take it."""

    error: float
    allowed: float


Check = Callable[[], Compared]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--small", action="store_true", help="the first cases of each family, one dtype")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for family in arguments.families.split(","):
        dtypes = (torch.bfloat16,) if arguments.small else (torch.bfloat16, torch.float16, torch.float32)
        try:
            checks = list(_checks(family, dtypes, torch.device(arguments.device)))
        except Exception as error:  # a family that does not import must not hide the others
            rows.append({"family": family, "case": "import", "ok": False, "failed": first_line(error)})
            continue
        for name, dtype, check in checks[: _SMALL if arguments.small else None]:
            row: dict[str, Any] = {"family": family, "case": name, "dtype": str(dtype).removeprefix("torch.")}
            try:
                with torch.inference_mode():
                    found = check()
                row |= {"error": found.error, "allowed": found.allowed, "ok": found.error <= found.allowed}
            except Exception as error:
                row |= {"ok": False, "failed": first_line(error)}
            rows.append(row)
            if not row["ok"]:
                print(row, flush=True)
    wrong = [row for row in rows if not row["ok"]]
    record = rounded({"device": arguments.device, "compared": len(rows), "wrong": len(wrong), "rows": rows})
    if arguments.json:
        arguments.json.write_text(json.dumps(record), encoding="utf-8")
    print(f"{len(rows)} cases compared, {len(wrong)} wrong or failed")
    return 1 if wrong else 0


def _checks(
    family: str, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> Iterator[tuple[str, torch.dtype, Check]]:
    makers: dict[str, Any] = {
        "attention": _attention, "kv": _kv, "tree": _tree, "logits": _logits, "edits": _edits
    }  # fmt: skip
    for dtype in dtypes[:1] if family == "tree" else dtypes:
        yield from ((name, dtype, check) for name, check in makers[family](dtype, device))


def _attention(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Check]]:
    from rainkernels.ops.attention import tree_attention
    from rainkernels.reference import attention as reference
    from rainkernels.testing.cases_attention import CASES

    def check(case: Any) -> Compared:
        i, host = case.make(dtype, device), case.make(dtype)
        got = tree_attention(i.q, i.k_pool, i.v_pool, i.plan(), **i.options, sinks=i.sinks, return_lse=True)
        p = host.plan_inputs
        paths = reference.path_slots(
            p["segment_parent"], p["segment_slots_indptr"], p["slots"], p["row_segment"], p["row_position"]
        )

        def defined(work: torch.dtype) -> tuple[Tensor, Tensor]:
            pools = (host.q.to(work), host.k_pool.to(work), host.v_pool.to(work))
            return reference.tree_attention(*pools, *paths, **host.options, sinks=host.sinks)

        # The rule of the tests: at most twice the error plain PyTorch makes in the same dtype.
        exact, plain = defined(torch.float64), defined(dtype)
        shares = []
        for mine, other, truth, atol in zip(got, plain, exact, (_ATOL[dtype], 1e-4), strict=True):
            allowed = 2 * _compare(other, truth, dtype, 1).error + atol
            shares.append(_compare(mine, truth, dtype, 1).error / allowed)
        return Compared(max(shares), 1.0)

    return ((str(case), lambda case=case: check(case)) for case in CASES)


def _kv(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Check]]:
    from rainkernels.ops.kv import kv_write
    from rainkernels.reference import kv as reference
    from rainkernels.testing.cases_kv import CASES

    def check(case: Any) -> Compared:
        got, wanted = case.make(dtype, device), case.make(dtype)
        kv_write(**got)
        reference.kv_write(**wanted)
        return Compared(float(sum(int((got[n].cpu() != wanted[n]).sum()) for n in ("k_pool", "v_pool"))), 0.0)

    # On a GPU any of several rows that name one slot may win.
    return (
        (str(case), lambda case=case: check(case)) for case in CASES if not (case.repeated and device.type == "cuda")
    )


def _tree(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Check]]:
    from kernel_bench import tree

    def check(op: str) -> Compared:
        bench = tree.make(op, 12, 24, Settings(device))
        verdict = bench.verify(OURS, bench.builders[OURS]()[0])
        return Compared(verdict.error, verdict.allowed)

    return ((op, lambda op=op: check(op)) for op in ("select", "backup"))


def _logits(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Check]]:
    from rainkernels.ops.logits import mix_sample, rank
    from rainkernels.testing.cases_logits import CASES

    def check(case: Any) -> Compared:
        def run(where: torch.device, lane: str | None) -> tuple[Tensor, ...]:
            i = case.make(dtype, where)
            with forced_lane(lane):
                sample, stats = mix_sample(i.logits, i.weights, **i.options, stats=True)
                ranked = rank(i.logits[0], i.logits[-1], sample.token.clamp_min(0), vocab_size=case.vocab)
            return *sample, stats.lse_mix, ranked.rank

        got, wanted = run(device, None), run(torch.device("cpu"), "reference")
        token, other = got[0].cpu(), wanted[0]
        same = token == other
        # A draw that falls within rounding of a boundary may go to the neighbour; one row of a case may.
        error = float(max(0, int((~same).sum()) - 1))
        for mine, theirs in zip(got[1:4], wanted[1:4], strict=True):
            error += _compare(mine.cpu()[same], theirs[same], torch.float32, 2000).error / 1e-3
        error += float((got[4].cpu()[same] != wanted[4][same]).sum())
        return Compared(error, 1.0)

    return ((str(case), lambda case=case: check(case)) for case in CASES)


def _edits(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Check]]:
    from rainkernels.ops.edits import add_edit_rmsnorm, edit_
    from rainkernels.testing.cases_edits import CASES

    def check(case: Any) -> Compared:
        def run(where: torch.device, lane: str | None) -> tuple[Tensor, ...]:
            i = case.make(dtype, where)
            j = i.copy()
            with forced_lane(lane):
                edited = edit_(i.x, i.table, i.slots)
                normed = add_edit_rmsnorm(
                    j.x, j.residual, j.weight, j.table, j.slots, eps=1e-5, tap=case.tap, cast=case.cast,
                    weight_offset=case.weight_offset,
                )  # fmt: skip
            return edited, *normed

        pairs = zip(run(device, None), run(torch.device("cpu"), "reference"), strict=True)
        found = [_compare(a, b, dtype, 16) for a, b in pairs]
        return Compared(max(each.error / each.allowed for each in found), 1.0)

    return ((str(case), lambda case=case: check(case)) for case in CASES)


def _compare(got: Tensor, wanted: Tensor, dtype: torch.dtype, steps: float) -> Compared:
    """Largest difference; `steps` roundings of the largest value in `dtype` are allowed. NaN and infinities must coincide."""
    a, b = got.cpu().double(), wanted.cpu().double()
    finite = torch.isfinite(b)
    if a.shape != b.shape or not torch.equal(a[~finite].nan_to_num(0.0), b[~finite].nan_to_num(0.0)):
        return Compared(float("inf"), 1.0)
    if bool(torch.isfinite(a).ne(finite).any()):
        return Compared(float("inf"), 1.0)
    if not bool(finite.any()):
        return Compared(0.0, 1.0)
    largest = max(1.0, float(b[finite].abs().max()))
    return Compared(float((a - b)[finite].abs().max()), steps * float(torch.finfo(dtype).eps) * largest)


if __name__ == "__main__":
    raise SystemExit(main())
