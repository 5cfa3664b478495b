"""What a build says when the machine lacks something: one clear sentence, before anything is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run in the project root with nothing on PATH."""
    environment = {k: v for k, v in os.environ.items() if k not in {"CXX", "CC"}} | {"PATH": str(tmp_path)} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_system_check_names_a_missing_compiler(tmp_path: Path) -> None:
    done = run("/bin/sh", "scripts/check_system.sh", sys.executable, tmp_path=tmp_path)
    assert done.returncode == 2
    assert "no C++ compiler was found: install g++" in done.stderr


def test_the_system_check_names_a_missing_python(tmp_path: Path) -> None:
    done = run("/bin/sh", "scripts/check_system.sh", "python-that-is-not-there", tmp_path=tmp_path)
    assert done.returncode == 2
    assert "was not found" in done.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [({}, "No C++ compiler was found"), ({"CXX": "c++-that-is-not-there"}, "No C++ compiler was found")],
    ids=["none", "named"],
)
def test_the_build_names_a_missing_compiler(tmp_path: Path, variables: dict[str, str], said: str) -> None:
    build = ("setup.py", "-q", "build_ext", "--build-temp", str(tmp_path / "t"), "--build-lib", str(tmp_path / "l"))
    done = run(sys.executable, *build, tmp_path=tmp_path, **variables)
    assert done.returncode != 0
    assert said in done.stderr


def test_the_build_refuses_an_unknown_cuda_setting(tmp_path: Path) -> None:
    build = ("setup.py", "-q", "build_ext", "--build-temp", str(tmp_path / "t"), "--build-lib", str(tmp_path / "l"))
    (tmp_path / "c++").symlink_to("/bin/true")
    done = run(sys.executable, *build, tmp_path=tmp_path, RAINKERNELS_CUDA="maybe")
    assert done.returncode != 0
    assert "allowed are 0 (leave CUDA out), 1 (require it) and auto" in done.stderr


def test_the_build_refuses_an_unknown_sanitizer(tmp_path: Path) -> None:
    build = ("setup.py", "-q", "build_ext", "--build-temp", str(tmp_path / "t"), "--build-lib", str(tmp_path / "l"))
    (tmp_path / "c++").symlink_to("/bin/true")
    done = run(sys.executable, *build, tmp_path=tmp_path, RAINKERNELS_SANITIZE="thread")
    assert done.returncode != 0
    assert "RAINKERNELS_SANITIZE='thread': allowed are address and nothing" in done.stderr
