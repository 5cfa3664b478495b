"""Every CUDA kernel compiles for sm_80 and sm_90a with the flags of the build, and none spills a register."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
CMAKE = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
ARCHS = ("sm_80", "sm_90a")


class Kernel(NamedTuple):
    name: str
    arch: str
    registers: int
    spills: int  # bytes stored to and loaded from local memory


def nvcc() -> str | None:
    """The compiler the build would take: CUDACXX, then the usual place, then PATH."""
    named = os.environ.get("CUDACXX")
    return shutil.which(named) if named else shutil.which("nvcc", path=f"/usr/local/cuda/bin:{os.environ['PATH']}")


NVCC = nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found (looked at CUDACXX, /usr/local/cuda and PATH)")


def setting(name: str) -> list[str]:
    """The words of `set(name ...)` in CMakeLists.txt."""
    found = re.search(rf"^\s*set\({name} ([^)]*)\)", CMAKE, re.MULTILINE)
    assert found, f"CMakeLists.txt sets no {name}"
    return found[1].split()


def compiled(source: Path, folder: Path, *flags: str) -> list[Kernel]:
    """Compile one file for every architecture of ARCHS; its kernels as ptxas reports them."""
    assert NVCC is not None
    targets = [f"--generate-code=arch=compute_{a[3:]},code={a}" for a in ARCHS]
    build = [NVCC, "-std=c++17", *setting("RK_NVCC_FLAGS"), *targets, *flags, "-Icsrc/include", "-Icsrc"]
    done = subprocess.run(
        [*build, "-c", str(source), "-o", str(folder / f"{source.stem}.o")],
        cwd=ROOT, env=os.environ | {"TMPDIR": str(folder)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return [
        Kernel(m["name"], m["arch"], int(m["registers"]), int(m["stores"]) + int(m["loads"]))
        for m in report.finditer(done.stdout + done.stderr)
    ]


def test_the_build_is_for_the_architectures_tested_here() -> None:
    real = {f"sm_{a.removesuffix('-real')}" for a in setting("CMAKE_CUDA_ARCHITECTURES") if a.endswith("-real")}
    assert real == set(ARCHS)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_spills(source: Path, tmp_path: Path) -> None:
    kernels = compiled(source, tmp_path)
    if "__global__" in source.read_text(encoding="utf-8"):
        assert {k.arch for k in kernels} == set(ARCHS)
        by_arch = [{k.name for k in kernels if k.arch == arch} for arch in ARCHS]
        assert by_arch[0] == by_arch[1]
    else:
        assert not kernels
    spilling = [k for k in kernels if k.spills]
    assert not spilling, spilling


def test_a_spill_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "hungry.cu"
    source.write_text(
        "__global__ void hungry(float* x) {\n"
        "  float v[64];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 64; ++i) v[i] = x[i];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 64; ++i) x[i] = v[63 - i] * v[i];\n"
        "}\n"
    )
    kernels = compiled(source, tmp_path, "-maxrregcount=24")
    assert [k.arch for k in kernels] == list(ARCHS)
    assert all(k.spills > 0 for k in kernels)
