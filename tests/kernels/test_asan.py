"""The C++ lane built with AddressSanitizer, under the fuzz tests: nothing reads or writes outside its tensors.

`make test-asan` is the long form: 2,000 cases for each op, and the other tests of the kernels as well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CASES = os.environ.get("RAINKERNELS_FUZZ_CASES", "25")
KERNEL_TESTS = (
    "test_tree.py",
    "test_kv.py",
    "test_attention.py",
    "test_merge_state.py",
    "test_logits.py",
    "test_edits.py",
    "test_decoder.py",
    "test_decoder_members.py",
    "test_decoder_edits.py",
    "test_decoder_edits_checks.py",
)


def preloads() -> str | None:
    """What must be loaded before Python is: libasan, and libstdc++, whose exceptions it wants to see. None: no libasan."""
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        return None
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        found.append(Path(done.stdout.strip()))
    return " ".join(map(str, found)) if all(p.is_absolute() and p.exists() for p in found) else None


PRELOADS = preloads()
pytestmark = [
    pytest.mark.skipif(PRELOADS is None, reason="libasan was not found: it comes with gcc"),
    pytest.mark.skipif("RAINKERNELS_ASAN_MODULE" in os.environ, reason="this is the sanitized run itself"),
]


@pytest.fixture(scope="module")
def module() -> Path:
    """The sanitized module, built into build/asan; what did not change is not compiled again."""
    build = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        "build/asan",
        "--build-temp",
        "build/asan-tmp",
    ]
    environment = os.environ | {"RAINKERNELS_SANITIZE": "address", "RAINKERNELS_CUDA": "0"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    (built,) = (ROOT / "build" / "asan" / "rainkernels").glob("_C*.so")
    return built


def run(module: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    assert PRELOADS is not None
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), str(HERE)])
    environment = os.environ | {
        "LD_PRELOAD": PRELOADS, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": path,
        "RAINKERNELS_ASAN_MODULE": str(module), "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    }  # fmt: skip
    for name in ("RAINKERNELS_LANE", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-p", "asan_native", "--capture=sys", "--noconftest", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, check=False)


def test_the_sanitizer_sees_a_read_outside_a_tensor(module: Path) -> None:
    probe = str(HERE / "asan_probe.py")
    inside = run(module, f"{probe}::test_inside")
    assert inside.returncode == 0, inside.stdout + inside.stderr
    outside = run(module, f"{probe}::test_outside")
    assert outside.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in outside.stderr
    assert "kv_copy" in outside.stderr


def test_fuzzed_calls_stay_inside_their_tensors(module: Path) -> None:
    done = run(module, str(HERE / "test_fuzz.py"), RAINKERNELS_FUZZ_CASES=CASES)
    print(done.stdout, done.stderr, sep="\n")  # pytest shows it when the test fails
    assert done.returncode == 0, "the output of the sanitized run is below"
    assert "AddressSanitizer" not in done.stderr
    assert " passed" in done.stdout


@pytest.mark.slow
def test_the_kernels_own_tests_stay_inside_their_tensors(module: Path) -> None:
    done = run(module, *(str(HERE / name) for name in KERNEL_TESTS if (HERE / name).exists()))
    print(done.stdout, done.stderr, sep="\n")
    assert done.returncode == 0, "the output of the sanitized run is below"
    assert "AddressSanitizer" not in done.stderr
