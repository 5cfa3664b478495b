"""Builds csrc/cuda/{tree,kv}.cu with g++ over tests/cpp/cuda_emulator and runs the ops' CUDA lane on cpu tensors with it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pybind11

from rainkernels import _lanes

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "cpp" / "cuda_emulator"
KERNELS = ("tree", "kv")
# __CUDACC__ and __CUDA_ARCH__ choose the code a GPU runs; products and sums are kept apart as by nvcc -fmad=false. The
# namespace is renamed so that the types do not meet those of rainkernels._C.
FLAGS = (
    "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w", "-DRK_WITH_CUDA=1",
    "-Drainkernels=rainkernels_emulated",
)  # fmt: skip
DEVICE_FLAGS = ("-x", "c++", "-D__CUDACC__=1", "-D__CUDA_ARCH__=900", "-DRK_ISA=emulated")
_LAUNCH = re.compile(r"([\w<>]+?)<<<(.+?)>>>\(([^;]*)\);")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def rewritten(source: str) -> str:
    """CUDA source with each `kernel<<<grid, block, shared, stream>>>(arguments);` as a call of the emulator."""
    text, launches = _LAUNCH.subn(r"cuda_emulator::launch(\2, [=] { \1(\3); });", source)
    assert launches == source.count("<<<"), "a launch has a form the emulator's build does not know"
    return text


def build() -> ModuleType:
    """The module `cuda_emulated`, compiled once per state of its sources into build/cuda_emulated."""
    sources = sorted(
        [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cu"), *EMULATOR.iterdir(), Path(__file__)]
    )
    sources += [ROOT / "csrc" / "bindings" / f"{name}.cpp" for name in KERNELS]
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    target = ROOT / "build" / "cuda_emulated" / state / f"cuda_emulated{suffix}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _compile(Path(folder), Path(folder) / "module.so")
            os.replace(Path(folder) / "module.so", target)
    spec = importlib.util.spec_from_file_location("cuda_emulated", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(folder: Path, target: Path) -> None:
    includes = [EMULATOR, ROOT / "csrc" / "include", ROOT / "csrc", Path(pybind11.get_include())]
    includes.append(Path(sysconfig.get_path("include")))
    command = [str(compiler()), *FLAGS, *(f"-I{path}" for path in includes)]
    parts: list[tuple[Path, tuple[str, ...]]] = [(EMULATOR / "module.cpp", ())]
    for name in KERNELS:
        parts.append((ROOT / "csrc" / "bindings" / f"{name}.cpp", ()))
        kernels = folder / f"{name}.cu"
        kernels.write_text(rewritten((ROOT / "csrc" / "cuda" / f"{name}.cu").read_text(encoding="utf-8")))
        parts.append((kernels, DEVICE_FLAGS))
    objects = [folder / f"{i}.o" for i in range(len(parts))]
    running = [
        subprocess.Popen([*command, *flags, "-c", path, "-o", out], stderr=subprocess.PIPE, text=True)
        for (path, flags), out in zip(parts, objects, strict=True)
    ]
    failed = [child.communicate()[1] for child in running if child.wait()]
    assert not failed, "\n".join(failed)
    subprocess.run([str(compiler()), "-shared", *objects, "-o", target], check=True)


@contextlib.contextmanager
def cuda_lane(module: ModuleType) -> Iterator[Any]:
    """While this is open, the tree and kv ops take their CUDA lane for cpu tensors, and its kernels run in `module`."""
    stream = SimpleNamespace(cuda_stream=0)
    with contextlib.ExitStack() as patched:
        for place in ("rainkernels.ops.tree", "rainkernels.ops.kv", "rainkernels._forest"):
            patched.enter_context(mock.patch(f"{place}.native", return_value=module))
        lanes = {family: {"cpu": ("cuda",)} for family in KERNELS}
        patched.enter_context(mock.patch.dict(_lanes.FAMILY_LANES, lanes))
        patched.enter_context(mock.patch("rainkernels._lanes.native", return_value=module))
        patched.enter_context(mock.patch("torch.cuda.device", return_value=contextlib.nullcontext()))
        patched.enter_context(mock.patch("torch.cuda.current_stream", return_value=stream))
        patched.enter_context(mock.patch("torch.cuda.is_current_stream_capturing", return_value=False))
        patched.enter_context(mock.patch.dict(os.environ))
        os.environ.pop("RAINKERNELS_LANE", None)
        yield module
