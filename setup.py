"""Build rainkernels: setuptools drives CMake and ninja for the one extension module, rainkernels._C."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configure with CMake, compile with ninja, leave the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        require_compiler()
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        tree = Path(self.build_temp).resolve() / ext.name
        tree.mkdir(parents=True, exist_ok=True)
        cuda = os.environ.get("RAINKERNELS_CUDA", "auto").lower()
        if cuda not in {"0", "1", "auto"}:
            raise SystemExit(
                f"RAINKERNELS_CUDA={cuda!r}: allowed are 0 (leave CUDA out), 1 (require it) and auto (the default)."
            )
        sanitize = os.environ.get("RAINKERNELS_SANITIZE", "").lower()
        if sanitize not in {"", "address"}:
            raise SystemExit(f"RAINKERNELS_SANITIZE={sanitize!r}: allowed are address and nothing (the default).")
        build_type = "Debug" if self.debug else "RelWithDebInfo" if sanitize else "Release"
        configure = [
            *cmake_command(),
            "-S",
            str(ROOT),
            "-B",
            str(tree),
            "-G",
            "Ninja",
            f"-DCMAKE_BUILD_TYPE={build_type}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DRAINKERNELS_CUDA={cuda}",
            f"-DRAINKERNELS_SANITIZE={sanitize}",
            f"-DRAINKERNELS_VERSION={self.distribution.get_version()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
        ]
        ninja = ninja_program()
        if ninja:
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([*cmake_command(), "--build", str(tree), "--parallel", jobs], check=True)


def cmake_command() -> list[str]:
    """The cmake to run: the one of the build environment when it is there, else the one on PATH."""
    try:
        import cmake
    except ImportError:
        found = shutil.which("cmake")
        if found is None:
            raise SystemExit("CMake was not found. Install it (pip install cmake) and run the build again.") from None
        return [found]
    return [str(Path(cmake.CMAKE_BIN_DIR) / "cmake")]


def ninja_program() -> str | None:
    """Path of ninja; None leaves the search to CMake."""
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    program = Path(ninja.BIN_DIR) / "ninja"
    return str(program) if program.exists() else shutil.which("ninja")


def require_compiler() -> None:
    """Stop with one clear sentence where there is no C++ compiler."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["c++", "g++", "clang++"]
    if not any(name and shutil.which(name.split()[0]) for name in candidates):
        raise SystemExit(
            f"No C++ compiler was found (looked for {', '.join(candidates)}). rainkernels needs one with C++17: "
            "install g++ (Debian: apt-get install g++) or set CXX, then run the build again."
        )


setup(ext_modules=[CMakeExtension("rainkernels._C")], cmdclass={"build_ext": CMakeBuild})
