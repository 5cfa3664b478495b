"""Every shipped Triton configuration compiles for sm_80 and sm_90 without a GPU, spills nothing and fits in shared memory.

Under the installed Triton and under 3.6 (`make test` puts it into .venv/triton-3.6; RAINKERNELS_TRITON_OLD names another
folder). Compiled kernels are kept in .venv/triton-cache, so that only changed ones cost time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rainkernels.testing.triton_aot import family_modules

ROOT = Path(__file__).resolve().parents[2]
OLD = "3.6"
ARCHS = (80, 90)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def old_triton() -> Path | None:
    """The folder that holds Triton 3.6, if there is one."""
    named = os.environ.get("RAINKERNELS_TRITON_OLD")
    if named:
        assert (Path(named) / "triton").is_dir(), f"RAINKERNELS_TRITON_OLD={named} holds no package triton"
        return Path(named)
    for venv in (Path(sys.prefix), ROOT / ".venv"):
        if (venv / f"triton-{OLD}" / "triton" / "__init__.py").is_file():
            return venv / f"triton-{OLD}"
    return None


def environment(version: str) -> dict[str, str]:
    """What a child that compiles with this Triton runs under; skips the test where 3.6 is wanted and missing."""
    first: list[str] = []
    if version == OLD:
        folder = old_triton()
        if folder is None:
            pytest.skip(
                f"Triton {OLD} is not there: `make test` installs it, or set RAINKERNELS_TRITON_OLD to its folder"
            )
        first = [str(folder)]
    path = [*first, str(ROOT), str(ROOT / "python"), str(Path(__file__).parent)]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    variables.pop("TRITON_INTERPRET", None)
    if sys.prefix != sys.base_prefix:
        variables.setdefault("TRITON_CACHE_DIR", str(Path(sys.prefix) / "triton-cache" / version))
    return variables


def compile_all(version: str, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    command = [sys.executable, "-m", "rainkernels.testing.triton_aot", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(version), capture_output=True, text=True, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


# Minutes from an empty cache: of the oldest release, `make test` compiles for the GPU it is used on with us.
@pytest.mark.parametrize(
    ("version", "archs"), [("installed", ARCHS), (OLD, ARCHS[-1:]), pytest.param(OLD, ARCHS, marks=pytest.mark.slow)]
)
def test_shipped_kernels_compile_without_spills(version: str, archs: tuple[int, ...]) -> None:
    modules = family_modules()
    if not modules:
        pytest.skip("no family ships Triton kernels")
    status, results, log = compile_all(version, "--arch", *map(str, archs))
    faults = [f"sm_{r['arch']} {r['module']} {r['kernel']}: {fault}" for r in results for fault in r["faults"]]
    assert not faults, f"Triton {results[0]['triton']}:\n" + "\n".join(faults)
    assert status == 0, log
    assert {(r["module"], r["arch"]) for r in results} == {(module, arch) for module in modules for arch in archs}
    assert len({(r["module"], r["kernel"], r["arch"]) for r in results}) == len(results)
    assert all(r["registers"] > 0 for r in results)
    assert len({r["triton"] for r in results}) == 1
    if version == OLD:
        assert results[0]["triton"].startswith(OLD + ".")


@pytest.mark.parametrize("version", ["installed", OLD])
def test_the_gate_tells_good_kernels_from_bad_ones(version: str) -> None:
    status, results, log = compile_all(version, "--module", "aot_probe", "--arch", "80")
    assert status == 1, log
    faults = {r["kernel"]: " ".join(r["faults"]) for r in results}
    assert faults["fine"] == ""
    assert faults["spills"].startswith("spills: ")
    assert "of stack" in faults["spills"]
    assert "shared memory 327680 bytes, sm_80 has 166912" in faults["too-much-shared"]
    assert faults["broken"].startswith("does not compile: ")
    assert "this kernel is never right" in faults["broken"]


def test_unknown_families_are_named() -> None:
    status, results, log = compile_all("installed", "--family", "weather")
    assert (status, results) == (2, [])
    assert "rainkernels.triton.weather" in log
