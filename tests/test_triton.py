"""The Triton lanes under the interpreter, one process per family: Triton decides at import whether it interprets."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "interpreter"
FAMILIES = sorted(path.stem.removeprefix("test_") for path in FOLDER.glob("test_*.py"))

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpret(target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", str(target), "-rs", *options]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    path = [str(ROOT), str(ROOT / "python"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    for inherited in ("RAINKERNELS_LANE", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST"):
        environment.pop(inherited, None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_in_the_interpreter(family: str, request: pytest.FixtureRequest) -> None:
    marks = request.config.getoption("-m")
    done = interpret(FOLDER / f"test_{family}.py", *(["-m", marks] if marks else []))
    print(done.stdout, done.stderr, sep="\n")  # pytest shows it when the test fails
    assert done.returncode == 0, f"the {family} family fails in the interpreter: its output is below"
    assert " passed" in done.stdout, "no test ran"


def test_every_family_with_triton_kernels_is_interpreted() -> None:
    from rainkernels.testing.triton_aot import family_modules

    missing = {module.rpartition(".")[2] for module in family_modules()} - set(FAMILIES)
    assert not missing, f"give tests/interpreter a test_{{family}}.py for: {', '.join(sorted(missing))}"


def test_a_failure_in_the_interpreter_is_seen() -> None:
    """The gate itself: a child with a wrong kernel fails, and its report says which."""
    done = interpret(FOLDER.parent / "kernels" / "interpreter_probe.py", "--noconftest")
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    assert "test_a_wrong_kernel" in done.stdout
