"""Compile every shipped Triton configuration without a GPU and look at what it asks of one.

    python -m rainkernels.testing.triton_aot [--arch 80 90] [--family attention] [--module my.kernels] [--json] [--jobs 2]

A configuration fails when it does not compile, spills registers (uses a stack or local memory), or wants more shared
memory than a block of the chip can have. Exit status: 0 all pass, 1 one fails, 2 the call is wrong or Triton is missing.
Triton's cache (TRITON_CACHE_DIR) makes a second run quick. To compile under another Triton, put it first in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rainkernels.triton.aot import AotKernel

__all__ = ["SHARED_LIMIT", "Compiled", "compile_kernel", "family_modules", "kernels_of", "main"]

# Bytes of shared memory one block may have (CUDA C++ Programming Guide, table of technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_NOT_FAMILIES = {"aot"}


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs on one architecture: registers per thread, the rest in bytes (per thread, shared per block)."""

    module: str
    kernel: str
    arch: int
    triton: str
    registers: int = 0
    stack: int = 0  # ptxas puts spilled registers here; Triton code has no other use for it
    local: int = 0
    shared: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def faults(self) -> list[str]:
        """Why the gate does not let this kernel pass; empty when it does."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.stack or self.local:
            found.append(f"spills: {self.stack} bytes of stack and {self.local} of local memory per thread")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"shared memory {self.shared} bytes, sm_{self.arch} has {SHARED_LIMIT[self.arch]}")
        return found


def family_modules() -> list[str]:
    """The modules of rainkernels.triton that ship kernels: those whose source defines aot_kernels()."""
    package = importlib.import_module("rainkernels.triton")
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        if info.name in _NOT_FAMILIES:
            continue
        source = Path(next(iter(package.__path__))) / f"{info.name}.py"
        if re.search(r"^def aot_kernels\(", source.read_text(encoding="utf-8"), re.MULTILINE):
            found.append(f"rainkernels.triton.{info.name}")
    return found


@functools.cache
def kernels_of(module: str) -> list[AotKernel]:
    """The configurations a module ships. Raises ValueError where two have one name."""
    kernels: list[AotKernel] = importlib.import_module(module).aot_kernels()
    names = [kernel.name for kernel in kernels]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{module}.aot_kernels() names {', '.join(twice)} twice: give each configuration its own name")
    return kernels


def compile_kernel(kernel: AotKernel, arch: int) -> tuple[int, int, int, int]:
    """Registers, stack, local and shared bytes of one configuration. Raises whatever Triton or ptxas raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.fn.arg_names)
    unknown = sorted(({*kernel.signature, *kernel.constexprs} ^ set(names)) | (set(kernel.aligned) - set(names)))
    if unknown:
        raise ValueError(f"signature, constexprs and aligned do not fit the arguments of the kernel: {unknown}")
    source = ASTSource(
        fn=kernel.fn,
        signature={name: kernel.signature.get(name, "constexpr") for name in names},
        constexprs=dict(kernel.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in kernel.aligned},
    )
    options: dict[str, Any] = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    if kernel.max_registers is not None:
        options["maxnreg"] = kernel.max_registers
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _usage(compiled.asm["cubin"])
    return usage["REG"], usage["STACK"], usage["LOCAL"], int(compiled.metadata.shared) + usage["SHARED"]


def _usage(cubin: bytes) -> dict[str, int]:
    import triton

    program = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([program, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", done.stdout)}
    if len(usage) != 4:
        raise ValueError(f"cuobjdump did not say what the kernel uses: {done.stdout}{done.stderr}")
    return usage


def _measure(module: str, index: int, arch: int) -> Compiled:
    import triton

    kernel, start = kernels_of(module)[index], time.perf_counter()
    result: dict[str, Any] = {}
    try:
        usage = compile_kernel(kernel, arch)
        result = dict(zip(("registers", "stack", "local", "shared"), usage, strict=True))
    except Exception as error:  # whatever the compiler raises is the finding
        result = {"error": f"{type(error).__name__}: {_short(str(error))}"}
    seconds = round(time.perf_counter() - start, 2)
    return Compiled(module, kernel.name, arch, triton.__version__, seconds=seconds, **result)


def _short(text: str, most: int = 2000) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}"


def _measure_all(modules: Sequence[str], archs: Sequence[int], jobs: int) -> Iterator[Compiled]:
    work = [(module, i, arch) for module in modules for i in range(len(kernels_of(module))) for arch in archs]
    context = multiprocessing.get_context("spawn")  # MLIR starts threads, which a fork does not survive
    with ProcessPoolExecutor(max_workers=max(1, min(jobs, len(work))), mp_context=context) as pool:
        futures = [pool.submit(_measure, *item) for item in work]
        for done, future in enumerate(as_completed(futures), start=1):
            result = future.result()
            mark = "FAIL" if result.faults else "ok"
            note = f"[{done}/{len(work)}] sm_{result.arch} {result.kernel}: {mark} ({result.seconds:.1f} s)"
            print(note, file=sys.stderr, flush=True)
            yield result


def _print_table(results: Sequence[Compiled]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("module", "kernel", "arch", "registers", "stack", "local", "shared KiB", "seconds", "verdict")
    for r in results:
        numbers = (str(r.registers), str(r.stack), str(r.local), f"{r.shared / 1024:.1f}", f"{r.seconds:.1f}")
        table.add_row(r.module, r.kernel, f"sm_{r.arch}", *numbers, "; ".join(r.faults) or "ok")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rainkernels.testing.triton_aot", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=sorted(SHARED_LIMIT))
    parser.add_argument(
        "--family", nargs="+", default=[], help="modules of rainkernels.triton; default: all that ship kernels"
    )
    parser.add_argument("--module", nargs="+", default=[], help="any importable modules with aot_kernels()")
    parser.add_argument("--json", action="store_true", help="one JSON object per line on stdout instead of a table")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: 2)")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        print("triton is not installed: pip install triton", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 is set: Triton would interpret and not compile; unset it", file=sys.stderr)
        return 2
    modules = [f"rainkernels.triton.{family}" for family in args.family] + args.module or family_modules()
    try:
        results = list(_measure_all(modules, args.arch, args.jobs))
    except ModuleNotFoundError as error:
        print(
            f"{error}; there are: {', '.join(family_modules()) or 'no families with Triton kernels'}", file=sys.stderr
        )
        return 2
    results.sort(key=lambda r: (r.module, r.arch, r.kernel))
    if args.json:
        for result in results:
            print(json.dumps(asdict(result) | {"faults": result.faults}))
    else:
        _print_table(results)
    failed = sum(bool(result.faults) for result in results)
    print(f"{len(results)} configurations compiled, {failed} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
