"""The benchmark scripts run here on tiny shapes, so that the day a GPU is at hand only the GPU is new."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import decode_models  # noqa: E402
import readme_tables  # noqa: E402
from acceptance import environment, runner, summary  # noqa: E402
from acceptance.build import spills  # noqa: E402
from acceptance.runner import Part, run_part  # noqa: E402
from acceptance.summary import goals  # noqa: E402
from bench_kernels import FAMILIES  # noqa: E402
from decode_step import OURS as OURS_STEP  # noqa: E402
from decode_step import OURS_GRAPH, STOCK, STOCK_GRAPH, Wall, ratios  # noqa: E402
from gpu_acceptance import outcome  # noqa: E402
from kernel_bench import attention  # noqa: E402
from kernel_bench.bench import OURS, Bench, Settings, Verdict, run_bench  # noqa: E402
from kernel_bench.machine import Ceilings  # noqa: E402
from kernel_bench.measure import CpuTimer, CudaTimer, alternate, paired_ratio, quartiles, rounded  # noqa: E402
from kernel_bench.report import plain_calls  # noqa: E402
from readme_tables import NONE, cpu_rows, gpu, kernels, newest_gpu, rain, rain_records  # noqa: E402

from rainkernels.ops.attention import tree_attention  # noqa: E402

CEILINGS = Ceilings(1e10, 2e10, {"float32": 1e11})


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


# ---- bench_kernels ----------------------------------------------------------------------------------------------------


def check_row(row: dict[str, Any]) -> None:
    """What readers of a record rely on."""
    assert row["status"] == "ok", row
    assert row["checked"][OURS]["ok"]
    assert row["lane"] == "cpu"
    assert not row["failed"], row["failed"]
    for label, times in row["times"].items():
        assert 0 < times["min_us"] <= times["q1_us"] <= times["median_us"] <= times["q3_us"], label
    assert set(row["ratio"]) == set(row["times"]) - {OURS}
    if row["op"] != "tree search":
        assert row["bytes"] > 0
        assert row["floor_by"] in ("bytes", "flops")
        assert row["share_of_floor"] == pytest.approx(row["floor_us"] / row["times"][OURS]["median_us"], rel=1e-2)


def test_bench_kernels(tmp_path: Path) -> None:
    """The file and the last line hold the same record. The dry run below goes through every family."""
    options = ("--quick", "--ops", "attention,kv", "--device", "cpu", "--json", str(tmp_path / "a.json"))
    done = script("benchmarks/bench_kernels.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "a.json").read_text())
    assert (record["op"], record["schema"], record["not_ok"]) == ("kernels", 1, [])
    assert {row["family"] for row in record["rows"]} == {"attention", "kv"}
    for row in record["rows"]:
        check_row(row)
    assert record["ceilings"]["bytes_per_s"] > 0
    assert "gather + sdpa" in done.stdout.split('{"op"')[0]


def test_unknown_family_is_refused() -> None:
    done = script("benchmarks/bench_kernels.py", "--ops", "attention,logit")
    assert done.returncode == 2
    assert "no family logit" in done.stderr


def bench(**changes: Any) -> Bench:
    numbers = torch.arange(64.0)
    good = [lambda: numbers + 1]
    return Bench(**{
        "op": "add", "case": "64", "dtype": torch.float32, "builders": {OURS: lambda: good, "other": lambda: good},
        "verify": lambda label, run: Verdict(float((run() - numbers - 1).abs().max()), 0.0), "num_bytes": 512.0, **changes,
    })  # fmt: skip


def run_one(case: Bench) -> dict[str, Any]:
    return run_bench(case, Settings(torch.device("cpu"), repeats=3), CpuTimer(1e-5), CEILINGS)


def test_floor_is_the_larger_bound() -> None:
    row = run_one(bench())
    assert (row["floor_by"], row["floor_us"]) == ("bytes", pytest.approx(512 / 2e10 * 1e6, rel=1e-3))
    row = run_one(bench(num_flops=1e6))
    assert (row["floor_by"], row["floor_us"]) == ("flops", pytest.approx(10.0))


def test_a_contender_that_fails_is_named_and_the_rest_is_timed() -> None:
    def missing() -> Any:
        raise ImportError("no such peer")

    row = run_one(bench(builders={**bench().builders, "peer": missing}))
    assert row["status"] == "ok"
    assert row["failed"] == {"peer": "ImportError: no such peer"}
    assert set(row["times"]) == {OURS, "other"}


def test_a_wrong_kernel_is_not_timed() -> None:
    """Ours decides about the row; a wrong peer is only left out. NaN never passes."""
    wrong = {OURS: lambda: [lambda: torch.zeros(64)], "other": bench().builders["other"]}
    row = run_one(bench(builders=wrong))
    assert row["status"] == "wrong"
    assert "times" not in row
    row = run_one(bench(builders={OURS: wrong["other"], "other": wrong[OURS]}))
    assert row["status"] == "ok"
    assert row["failed"]["other"].startswith("off by")
    row = run_one(bench(builders={OURS: lambda: [lambda: torch.full((64,), math.nan)]}))
    assert row["status"] == "wrong"


def test_contenders_take_turns() -> None:
    order: list[str] = []
    timer = CpuTimer(0.0)
    prepared = {name: timer.prepare([lambda name=name: order.append(name)]) for name in "ab"}
    order.clear()
    samples = alternate(prepared, 4, 60.0)
    assert "".join(order) == "abababab"
    assert [len(taken) for taken in samples.values()] == [4, 4]
    assert [len(taken) for taken in alternate(prepared, 50, 0.0).values()] == [3, 3]


def test_statistics() -> None:
    assert quartiles([5.0]) == (5.0, 5.0, 5.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert paired_ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0])["median"] == 2.0
    assert rounded({"a": [1.23456789, math.nan], "b": "x"}) == {"a": [1.235, None], "b": "x"}


def test_cases_of_a_gpu_are_those_the_goals_and_tables_name() -> None:
    """A goal or README line whose case is renamed would read "not measured" for ever."""
    settings = Settings(torch.device("cuda"))
    names = {
        name for family in FAMILIES for name, _ in importlib.import_module(f"kernel_bench.{family}").makers(settings)
    }
    wanted: set[str] = set()

    def noted(rows: Any, op: str, case: str) -> None:
        wanted.add(f"{op}, {case}" if op in ("select", "backup") else case)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readme_tables, "_find", noted)
        patch.setattr(summary, "_find", noted)
        gpu(acceptance())
        goals({})
    assert len(wanted) == 8
    assert wanted <= names


class FakeCuda:
    """Stands in for torch.cuda: a graph that counts replays, events a millisecond apart for each call in between."""

    def __init__(self, patch: pytest.MonkeyPatch, capture_fails: bool = False) -> None:
        self.calls = self.replays = 0
        self.capture_fails = capture_fails
        self.capturing = False
        self.streams = [self.stream()]  # the current one last
        for name, value in {
            "Stream": self.stream, "current_stream": lambda device: self.streams[-1], "synchronize": lambda device: None,
            "stream": self.use, "graph": self.capture, "CUDAGraph": lambda: self, "Event": lambda enable_timing: FakeEvent(self),
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)

    def stream(self, device: object = None) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def use(self, stream: SimpleNamespace) -> Iterator[None]:
        self.streams.append(stream)
        yield
        self.streams.pop()

    @contextlib.contextmanager
    def capture(self, graph: FakeCuda, stream: SimpleNamespace | None = None) -> Iterator[None]:
        self.capturing = True
        try:
            with self.use(stream or self.stream()):  # torch's own is none of the caller's
                yield
        finally:
            self.capturing = False
        if self.capture_fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    def run(self) -> None:
        self.calls += 1

    def run_with_table(self) -> None:
        """Like an op that copies a table to the device the first time it runs on a stream."""
        if not hasattr(self.streams[-1], "table"):
            if self.capturing:
                raise RuntimeError("copy from pageable memory while capturing")
            self.streams[-1].table = True
        self.run()

    def replay(self) -> None:
        self.replays += 1
        self.calls += 2  # the graph holds one call on each of two sets of inputs


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.at = self.cuda.calls

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.at - self.at)


@pytest.mark.parametrize("capture_fails", [False, True])
def test_cuda_timer(monkeypatch: pytest.MonkeyPatch, capture_fails: bool) -> None:
    """Replays where a call can be captured, plain calls where it cannot; microseconds of one call either way."""
    cuda = FakeCuda(monkeypatch, capture_fails)
    prepared = CudaTimer(torch.device("cuda")).prepare([cuda.run, cuda.run])
    before = cuda.replays
    assert prepared.sample() == pytest.approx(1000.0)
    assert prepared.timer == ("events" if capture_fails else "graph")
    assert (cuda.replays > before) is not capture_fails
    if capture_fails:
        assert prepared.capture_error == "RuntimeError: operation not permitted when stream is capturing"
    else:
        assert prepared.eager is not None
        assert prepared.eager() == pytest.approx(1000.0)


def test_a_capture_runs_where_the_warm_up_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another stream, what a call keeps for each stream would be made while capturing, which is refused."""
    cuda = FakeCuda(monkeypatch)
    prepared = CudaTimer(torch.device("cuda")).prepare([cuda.run_with_table] * 2)
    assert (prepared.timer, prepared.capture_error) == ("graph", None)
    wall = Wall(torch.device("cuda")).graph(cuda.run_with_table, before=lambda: None)
    assert wall.timer == "graph"


def test_plain_calls_are_not_compared_with_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who could not be captured is named with the reason, and has no ratio; alike ones still have theirs."""
    cuda = FakeCuda(monkeypatch)

    def uncapturable() -> torch.Tensor:
        if cuda.capturing:
            raise RuntimeError("no copies\nhere")
        return good()

    good = bench().builders["other"]()[0]
    reason = "not captured, timed by plain calls: RuntimeError: no copies"

    def timed(**runs: Any) -> dict[str, Any]:
        case = bench(builders={label: lambda run=run: [run] for label, run in runs.items()}, notes={"rows": 1})
        patched = patch_elapsed(cuda, monkeypatch)
        return run_bench(case, Settings(torch.device("cpu"), repeats=3), patched, CEILINGS)

    row = timed(**{OURS: uncapturable, "graph": good, "plain": uncapturable})
    assert {label: times["timer"] for label, times in row["times"].items()} == {
        OURS: "events", "graph": "graph", "plain": "events"
    }  # fmt: skip
    assert row["failed"] == {OURS: reason, "plain": reason}
    assert set(row["ratio"]) == {"plain"}
    assert row["notes"] == {"rows": 1, "plain_calls": [OURS, "plain"], "not_compared": ["graph"]}
    assert row["times"][OURS]["capture_error"] == "RuntimeError: no copies"
    assert summary._share(row) is None
    assert summary._note(row) == "ours not captured: RuntimeError: no copies"
    assert plain_calls(row) == " (plain calls)"
    row = timed(**{OURS: good, "graph": good, "plain": uncapturable})
    assert set(row["ratio"]) == {"graph"}
    assert row["notes"] == {"rows": 1, "plain_calls": ["plain"], "not_compared": ["plain"]}
    assert summary._share(row) is not None
    row = timed(**{OURS: good, "graph": good})
    assert (row["notes"], row["failed"]) == ({"rows": 1}, {})


def patch_elapsed(cuda: FakeCuda, patch: pytest.MonkeyPatch) -> CudaTimer:
    """A timer for runs that the fake does not count."""
    patch.setattr(FakeEvent, "elapsed_time", lambda self, end: 1.0)
    return CudaTimer(torch.device("cuda"))


def test_attention_is_timed_over_static_memory() -> None:
    """On the Triton lane, here in its interpreter: the tables a capture reads lie still, and the values are right."""
    pytest.importorskip("triton")
    code = (
        "import sys; sys.path.insert(0, 'benchmarks')\n"
        "import torch\n"
        "from kernel_bench import attention\n"
        "from rainkernels.ops import _attention_items as items\n"
        "def refuse(*_): raise AssertionError('a table was copied for a stream')\n"
        "items.ItemTable.on = refuse\n"
        "for case in attention.TINY:\n"
        "    i = case.make(torch.device('cpu'))\n"
        "    verdict = attention.Reference(i)('ours', attention.ours(i))\n"
        "    assert verdict.ok, verdict\n"
    )
    done = script("-c", code, RAINKERNELS_LANE="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_attention_is_captured_on_a_gpu() -> None:
    device = torch.device("cuda")
    for case in attention.TINY:
        with torch.inference_mode():
            prepared = CudaTimer(device).prepare([attention.ours(case.make(device))])
        assert (prepared.timer, prepared.capture_error) == ("graph", None)


def test_the_captured_step_attends_over_static_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is given the buffers that were loaded before; without them (on a CPU) the values are the engine's."""
    model = decode_models.build_model("tiny", torch.device("cpu"), torch.float32)
    step = decode_models.ForestStep(model, 12, 3, 2)
    step.select()
    batch = step.new_batch()
    with torch.inference_mode():
        torch.testing.assert_close(step.fixed(batch)(), step.forward(batch))
    loaded, given = object(), []

    def attend(*tensors: Any, buffers: object = None, **options: Any) -> torch.Tensor:
        given.append(buffers)
        return tree_attention(*tensors, **options)

    monkeypatch.setattr(decode_models, "loaded_buffers", lambda *_: loaded)
    monkeypatch.setattr("raindecode.engine.attention.tree_attention", attend)
    with torch.inference_mode():
        step.fixed(batch)()
    assert given == [loaded] * step.layers


def test_a_step_without_its_graph_is_compared_with_plain_steps_only() -> None:
    samples = {label: [1.0, 1.0] for label in (OURS_STEP, OURS_GRAPH, STOCK, STOCK_GRAPH)}
    found, apart = ratios(samples)
    assert set(found) == {
        f"{OURS_STEP} / {OURS_GRAPH}", f"{STOCK} / {OURS_GRAPH}", f"{STOCK_GRAPH} / {OURS_GRAPH}", f"{STOCK} / {OURS_STEP}"
    }  # fmt: skip
    assert apart == []
    del samples[OURS_GRAPH]
    found, apart = ratios(samples)
    assert (set(found), apart) == ({f"{STOCK} / {OURS_STEP}"}, [STOCK_GRAPH])


def test_host_contenders_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of host work is empty and would look infinitely fast."""
    cuda = FakeCuda(monkeypatch)
    case = bench(on_host=frozenset({"other"}))
    row = run_bench(case, Settings(torch.device("cpu"), repeats=3), CudaTimer(torch.device("cuda")), CEILINGS)
    assert {label: times["timer"] for label, times in row["times"].items()} == {OURS: "graph", "other": "perf_counter"}
    assert cuda.replays > 0


def test_wall_time_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What resets the state runs before every replay, outside the graph."""
    cuda = FakeCuda(monkeypatch)
    resets: list[int] = []
    prepared = Wall(torch.device("cuda")).graph(cuda.run, before=lambda: resets.append(cuda.replays))
    before = len(resets)
    assert prepared.sample() > 0
    assert (prepared.timer, len(resets)) == ("graph", before + 1)


# ---- gpu_acceptance ---------------------------------------------------------------------------------------------------

DRY = (
    "environment",
    "build",
    "doctor",
    "cases",
    "kernels",
    "decode_step",
    "engine_step",
    "dera_step",
    "alignez_step",
    "urial",
)


def check_acceptance(record: dict[str, Any]) -> None:
    assert (record["kind"], record["schema"], record["dry_run"]) == ("gpu_acceptance", 1, True)
    assert record["failed"] == [], {name: record["parts"][name]["tail"] for name in record["failed"]}
    assert list(record["parts"]) == record["planned"]
    for part in record["parts"].values():
        assert (part["status"], part["rc"]) == ("ok", 0)
    parts = {name: part.get("result") for name, part in record["parts"].items()}
    assert parts["cases"]["wrong"] == 0
    assert {row["family"] for row in parts["cases"]["rows"]} == {"attention", "kv", "tree", "logits", "edits"}
    assert parts["build"]["module"]["isa"]
    assert {row["family"] for row in parts["kernels"]["rows"]} == {"attention", "kv", "tree", "logits", "edits"}
    for row in parts["kernels"]["rows"]:
        check_row(row)
    for row in parts["decode_step"]["rows"]:
        assert row["status"] == "ok"
        # Our logits over the tree are transformers' over a cache per branch, growing or static.
        assert [check["ok"] for check in row["checked"].values()] == [True, True]
        assert {"engine", "stock"} <= set(row["times"])
        assert row["floor_us"] > 0
    for row in parts["engine_step"]["rows"]:
        assert (row["status"], set(row["times"])) == ("ok", {"engine"})  # no graphs on a CPU
    assert parts["dera_step"]["same"]
    assert {"single", "lora_pair", "two_models"} <= set(parts["dera_step"]["step_ms"])
    assert parts["alignez_step"]["same"]
    assert {"none", "edits", "edits_256", "hooks"} <= set(parts["alignez_step"]["step_ms"])
    assert parts["urial"]["same"]
    assert {"hot", "again", "disk", "transformers", "transformers_reuse"} <= set(parts["urial"]["ttft_ms"])
    assert all(goal["met"] is None for goal in record["goals"])  # nothing on a CPU counts


def test_acceptance_dry_run(tmp_path: Path) -> None:
    out = tmp_path / "new" / "acceptance.json"
    done = script("benchmarks/gpu_acceptance.py", "--dry-run", "--parts", ",".join(DRY), "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    check_acceptance(json.loads(out.read_text()))


@pytest.mark.slow
def test_acceptance_dry_run_of_the_other_parts(tmp_path: Path) -> None:
    out = tmp_path / "acceptance.json"
    done = script("benchmarks/gpu_acceptance.py", "--dry-run", "--parts", "tests,sanitizer", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(out.read_text())["parts"]
    assert parts["tests"]["result"]["failed"] == 0
    assert parts["sanitizer"]["result"]["wrong"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_sentence(tmp_path: Path) -> None:
    done = script("benchmarks/gpu_acceptance.py", "--out", str(tmp_path / "a.json"))
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "no CUDA GPU" in done.stdout
    assert not (tmp_path / "a.json").exists()


def part(code: str, **changes: Any) -> Part:
    return Part(**{"name": "p", "command": (sys.executable, "-c", code, "{result}"), "budget_s": 10.0, **changes})


def test_part_that_fails(tmp_path: Path) -> None:
    found = run_part(part("print('before'); raise SystemExit(3)"), 60, tmp_path)
    assert (found["status"], found["rc"], found["reason"]) == ("failed", 3, "exit code 3")
    assert found["tail"] == "before\n"
    found = run_part(part("import os; os.abort()"), 60, tmp_path)
    assert (found["status"], found["rc"]) == ("failed", -6)


def test_part_that_hangs_keeps_what_it_had_found(tmp_path: Path) -> None:
    """It is ended with everything it started; the file it wrote before counts."""
    code = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "open(sys.argv[1], 'w').write('{\"pid\": %d}' % child.pid); time.sleep(600)"
    )
    found = run_part(part(code), 8, tmp_path)
    assert (found["status"], found["rc"], found["timed_out"]) == ("failed", None, True)
    child = found["result"]["pid"]
    while is_alive(child):  # it was sent a signal it cannot refuse; dying takes a moment
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_program_of_the_toolkit_is_found_off_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found where the record of the machine finds it, and started from there."""
    program = tmp_path / "compute-sanitizer-x"
    program.write_text("#!/bin/sh\necho 2.0\n")
    program.chmod(0o755)
    wanted = part("", command=(program.name,), needs=program.name)
    assert environment.last_line([program.name, "--version"]) is None
    skipped = run_part(wanted, 60, tmp_path)
    assert (skipped["status"], program.name in skipped["reason"]) == ("skipped", True)
    monkeypatch.setattr(runner, "_CUDA_PROGRAMS", str(tmp_path))
    assert environment.last_line([program.name, "--version"]) == "2.0"
    found = run_part(wanted, 60, tmp_path)
    assert (found["status"], found["tail"]) == ("ok", "2.0\n")


def test_the_last_line_says_what_was_skipped() -> None:
    record = {"parts": {"sanitizer": {"reason": "compute-sanitizer is missing"}}, "failed": [], "skipped": []}
    assert outcome(record) == "every part went well"
    record["skipped"] = ["sanitizer"]
    said = "skipped: sanitizer (compute-sanitizer is missing)"
    assert outcome(record) == f"every part that ran went well; {said}"
    assert outcome(record | {"failed": ["tests"]}) == f"failed: tests; {said}"


def test_part_without_its_program_or_time(tmp_path: Path) -> None:
    assert run_part(part("", needs="no-such-program"), 60, tmp_path)["status"] == "skipped"
    assert run_part(part("raise SystemExit(0)"), 1.0, tmp_path)["reason"] == "no time was left for it"
    missing = run_part(part("", command=("no-such-program",)), 60, tmp_path)
    assert (missing["status"], missing["reason"][:22]) == ("failed", "it could not be starte")


def test_pytest_results_are_counted(tmp_path: Path) -> None:
    xml = (
        "<testsuites><testsuite><testcase classname='a' name='x'/><testcase classname='a' name='y'><failure/></testcase>"
        "<testcase classname='b' name='z'><skipped/></testcase></testsuite></testsuites>"
    )
    found = run_part(part(f"import sys; open(sys.argv[1], 'w').write({xml!r})"), 60, tmp_path)
    assert found["result"] == {"tests": 3, "passed": 1, "failed": 1, "skipped": 1, "failures": ["a::y"]}


def test_spills_are_read_from_the_compiler() -> None:
    text = "ptxas info : Used 40 registers, 400 bytes cmem[0]\n 8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
    assert spills(text) == {"ptxas_kernels": 1, "ptxas_max_registers": 40, "ptxas_spill_bytes": 16}


# ---- goals and tables -------------------------------------------------------------------------------------------------


def kernel_row(op: str, case: str, median: float, **more: Any) -> dict[str, Any]:
    return {
        "op": op, "case": case, "status": "ok", "times": {OURS: {"median_us": median}}, "ratio": {}, "gb_per_s": 1234.5,
        "share_of_floor": 0.5, "share_of_h200_floor": 0.625, **more,
    }  # fmt: skip


def acceptance(failed: tuple[str, ...] = ()) -> dict[str, Any]:
    """A record as a GPU machine would write it."""
    alone = "add + RMSNorm alone, same lane"
    fan = "40 x 32 over 4096, 32/8 heads, D 128, bfloat16"
    edits = "fused, 40 x 4096, k = 4, own slot each, bfloat16 directions"
    rows = [
        kernel_row("attention", fan, 50.0, flops=2e9, gflop_per_s=40.0, ratio={"two-part flash": {"median": 1.5}}),
        kernel_row(
            "edits", edits, 6.0, notes={"rows": 40, "fused": True, "own_slots": True},
            times={OURS: {"median_us": 6.0}, alone: {"median_us": 4.0}},
        ),
    ]  # fmt: skip
    step = {
        "model": "7b", "branches": 40, "prefix": 4096, "status": "ok",
        "times": {"engine": {"median_us": 9e3, "share_of_floor": 0.4}, "engine, CUDA graph": {"median_us": 8e3, "share_of_floor": 0.45}},
        "ratio": {"stock / engine, CUDA graph": {"median": 5.5}},
    }  # fmt: skip
    facts = {"device": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "commit": "abc"}
    return {
        "kind": "gpu_acceptance", "dry_run": False, "utc": "2026-12-01T00:00:00Z", "failed": list(failed),
        "parts": {"kernels": {"result": {**facts, "rows": rows}}, "decode_step": {"result": {"rows": [step]}}},
    }  # fmt: skip


def test_goals() -> None:
    found = {goal["name"]: goal for goal in goals(acceptance()["parts"])}
    share = found["attention, 40 branches over 4k: share of the floor"]
    assert (share["measured"], share["met"]) == (0.625, True)
    assert found["attention, 40 branches over 4k: time of two-part flash over ours"]["met"] is True
    assert found["attention, 40 branches over 4k: time of FlashInfer cascade over ours"]["met"] is None
    assert found["attention, 160 branches over 4k: share of the floor"]["met"] is None
    added = found["edits, fused, own slots: share added to a 7B decode step of 40 rows"]
    assert added["measured"] == pytest.approx(32 * 2.0 / 8e3)
    assert added["met"] is True
    assert "note" not in added


def test_the_goal_of_edits_counts_a_gpu_and_the_7b_shape_only() -> None:
    def goal(record: dict[str, Any]) -> dict[str, Any]:
        return next(one for one in goals({"alignez_step": {"result": record}}) if one["name"].startswith("AlignEZ"))

    record = {"shape": "7b", "same": True, "device_type": "cuda", "added_share": {"edits": 0.004}}
    assert (goal(record)["measured"], goal(record)["met"]) == (0.004, True)
    assert goal(record | {"added_share": {"edits": 0.02}})["met"] is False
    for other in ({"same": False}, {"shape": "1b"}, {"device_type": "cpu"}):
        assert goal(record | other)["met"] is None


def test_the_goal_of_a_pair_counts_right_tokens_of_the_7b_shape_only() -> None:
    def goal(record: dict[str, Any]) -> dict[str, Any]:
        return next(one for one in goals({"dera_step": {"result": record}}) if one["name"].startswith("DeRa"))

    record = {"shape": "7b", "same": True, "ratios": {"lora_pair / single": {"median": 1.1}}}
    assert (goal(record)["measured"], goal(record)["met"]) == (1.1, True)
    assert goal(record | {"ratios": {"lora_pair / single": {"median": 1.2}}})["met"] is False
    assert goal(record | {"same": False})["met"] is None
    assert goal(record | {"shape": "1b"})["met"] is None
    assert goal({})["met"] is None


def test_a_share_of_an_uncaptured_step_is_no_measurement() -> None:
    """The plain step takes longer: the edits' share of it would look smaller than it is."""
    parts = acceptance()["parts"]
    step = parts["decode_step"]["result"]["rows"][0]
    del step["times"]["engine, CUDA graph"]
    step |= {"failed": {"engine, CUDA graph": "RuntimeError: no"}, "ratio": {"stock / engine": {"median": 5.5}}}
    share = "edits, fused, own slots: share added to a 7B decode step of 40 rows"
    found = {goal["name"]: goal for goal in goals(parts)}[share]
    assert (found["measured"], found["met"]) == (None, None)
    assert found["note"] == "the step was not captured: RuntimeError: no"
    assert "9.00 ms in plain calls | 0.40 | 5.5x stock |" in gpu(acceptance() | {"parts": parts})
    row = parts["kernels"]["result"]["rows"][1]
    row["times"][OURS] |= {"timer": "events", "capture_error": "RuntimeError: why"}
    found = {goal["name"]: goal for goal in goals(parts)}[share]
    assert (found["measured"], found["note"]) == (None, "ours not captured: RuntimeError: why")
    assert "6.0 us in plain calls" in gpu(acceptance() | {"parts": parts})


def test_gpu_table(tmp_path: Path) -> None:
    """Without a record every cell says so; with one, what was measured stands there and the rest still says so."""
    assert newest_gpu(tmp_path) is None
    empty = gpu(None)
    assert empty.count(NONE) == 11
    (tmp_path / "h200-b.json").write_text(json.dumps(acceptance(("sanitizer",))))
    (tmp_path / "h200-a.json").write_text(json.dumps(acceptance() | {"dry_run": True, "utc": "2027-01-01T00:00:00Z"}))
    text = gpu(newest_gpu(tmp_path))
    assert text.count(NONE) == 8
    assert "50.0 us, 40 GFLOP/s | 0.62 | 1.50x two-part flash" in text
    assert "8.00 ms | 0.45 | 5.5x stock |" in text
    assert "Parts that failed: sanitizer." in text
    assert [line.split(" | ")[:2] for line in empty.splitlines()[4:]] == [
        line.split(" | ")[:2] for line in text.splitlines()[4:]
    ]


def test_cpu_table(tmp_path: Path) -> None:
    """Newest full record of each family; quick ones do not count."""
    machine = {"op": "kernels", "device": "cpu x", "threads": 2, "torch": "2", "isa": "avx512"}

    def line(family: str, median: float, **more: Any) -> str:
        row = kernel_row(family, "case", median, family=family, ratio={"plain": {"median": 2.5}})
        return json.dumps(machine | {"rows": [row], **more}) + "\n"

    records = line("attention", 1.0) + line("kv", 7.0) + line("attention", 3.0) + line("attention", 5.0, quick=True)
    (tmp_path / "cpu.jsonl").write_text(records)
    text = kernels(cpu_rows(tmp_path))
    assert "| attention | case | 3.0 us, 1,234.5 GB/s | 2.5x plain |" in text
    assert "| kv | case | 7.0 us" in text
    assert "cpu x, 2 threads, avx512" in text
    assert text.count(NONE) == 3  # the families without a record
    assert NONE in kernels([])


def test_rain_table(tmp_path: Path) -> None:
    def record(model: str, parameters: int, **ratios: dict[str, float]) -> None:
        numbers = {
            "model_steps": {"ours": 100.0}, "tokens_processed": {"ours": 1.0, "ours_charged": 1234.0}, "seconds": {"ours": 0.5},
            "ratios": ratios,
        }  # fmt: skip
        facts = {"model": model, "parameters": parameters, "device": "cpu", "dtype": "float32", "threads": 2}
        text = json.dumps({**facts, "regimes": {"safe": numbers}})
        (tmp_path / f"rain-{model}.json").write_text(text, encoding="utf-8")

    assert NONE in rain(rain_records(tmp_path))
    every = {"model_steps": 5.25, "tokens_processed": 8.0, "seconds": 3.0}
    record("1b", 10**9, strong=every)
    record("testbed", 10**6, published=every, strong=every, vanilla=every)
    *_, first, second = rain(rain_records(tmp_path)).splitlines()
    assert first.startswith(
        "| testbed, cpu, float32, 2 threads | safe | 100 (5.2, 5.2, 5.2) | 1,234 (8, 8, 8) | 0.50 (3, 3, 3)"
    )
    assert "| 100 (-, 5.2, -) |" in second


def test_readme_is_up_to_date() -> None:
    done = script("benchmarks/update_readme.py", "--check")
    assert done.returncode == 0, done.stderr


# ---- many_prompts -----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_many_prompts(tmp_path: Path) -> None:
    done = script(
        "benchmarks/many_prompts.py", "--requests", "40", "--max-new-tokens", "2", "--json", str(tmp_path / "a.json")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "a.json").read_text())
    for one in record["runs"].values():
        assert (one["full"], one["slots_lost"], one["cursors_left"]) == (1.0, 0, 0)
        assert [part["finished"] for part in one["parts"]] == [0, 8, 16, 24, 32, 40]
        assert one["tokens"] <= 80
