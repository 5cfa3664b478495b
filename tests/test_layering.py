"""Imports and includes point down only. The layers are in docs/design.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# A module may import its own layer and the layers below it.
_LAYERS = [
    ("raindecode.__main__", 60),
    ("raindecode.cli", 50),
    ("raindecode.commands", 50),
    ("raindecode.doctor", 50),
    ("raindecode.evaluation", 50),
    ("raindecode.server", 50),
    ("raindecode.integrations", 50),
    ("raindecode.judging", 45),
    ("raindecode.decoder", 40),
    ("raindecode.sweep", 35),
    ("raindecode.sweep_figure", 35),
    ("raindecode.shift_page", 35),
    ("raindecode.requests", 35),
    ("raindecode.token_shift", 35),
    ("raindecode.shift_sides", 35),
    ("raindecode.shift_figure", 35),
    ("raindecode.shift_page", 35),
    ("raindecode.teacher_forcing", 35),
    ("raindecode.prompt_ids", 35),
    ("raindecode.prefix_store", 35),
    ("raindecode.prefix_file", 35),
    ("raindecode.activations", 35),
    ("raindecode.search", 30),
    ("raindecode.policy", 20),
    ("raindecode.engine", 10),
    ("raindecode.text", 5),
    ("raindecode.figures", 5),
    ("raindecode.progress", 5),
    ("raindecode.settings", 5),
    ("raindecode.types", 5),
    ("raindecode.mixture", 0),
    ("raindecode.hidden_edits", 0),
    ("raindecode.env", 0),
    ("raindecode.errors", 0),
    ("rainkernels", -10),
]
_LEAF = "raindecode.testbed"  # beside the layers: see test_the_testbed_is_a_leaf
_TOP = {"cli", "commands", "doctor", "evaluation", "server", "integrations", "__main__"}


def _modules(package: Path, name: str) -> dict[str, Path]:
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


RAINKERNELS = _modules(ROOT / "rainkernels", "rainkernels")
RAINDECODE = _modules(ROOT / "python" / "raindecode", "raindecode")
MODULES = RAINKERNELS | RAINDECODE


def imports(module: str, path: Path) -> Iterator[str]:
    """Every module a file imports, wherever in the file: `from a import b` counts as a.b when that is a module."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else base for name in names)
        elif isinstance(node, ast.Call) and _is_import_call(node):
            assert isinstance(node.args[0], ast.Constant)
            yield str(node.args[0].value)


def _is_import_call(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in {"import_module", "__import__"} and bool(node.args) and isinstance(node.args[0], ast.Constant)


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def layer(module: str) -> int | None:
    for prefix, height in _LAYERS:
        if within(module, prefix):
            return height
    return None


def edges(modules: dict[str, Path]) -> list[tuple[str, str]]:
    return [(module, target) for module, path in modules.items() for target in imports(module, path)]


def test_the_parser_sees_every_kind_of_import(tmp_path: Path) -> None:
    path = tmp_path / "here.py"
    path.write_text(
        "import os.path\nfrom raindecode import env\nfrom raindecode.engine.rng import mix\nfrom . import branch\n"
        "from .. import errors\nfrom .kv_tree import Node\ndef f():\n    import raindecode.text\n"
        "importlib.import_module('rainkernels._C')\n"
    )
    assert set(imports("raindecode.engine.here", path)) == {
        "os.path",
        "raindecode.env",
        "raindecode.engine.rng",
        "raindecode.engine.branch",
        "raindecode.errors",
        "raindecode.engine.kv_tree",
        "raindecode.text",
        "rainkernels._C",
    }


def test_every_module_has_a_layer() -> None:
    homeless = [m for m in RAINDECODE if m != "raindecode" and not within(m, _LEAF) and layer(m) is None]
    assert not homeless, f"give these a layer in _LAYERS: {homeless}"


@pytest.mark.parametrize("module", [m for m in RAINDECODE if m != "raindecode" and not within(m, _LEAF)])
def test_raindecode_imports_point_down(module: str) -> None:
    mine = layer(module)
    assert mine is not None
    for target in imports(module, RAINDECODE[module]):
        theirs = layer(target)
        assert theirs is None or theirs <= mine, f"{module} imports {target}, which is above it"


def test_the_package_itself_is_imported_from_the_top_only() -> None:
    for module, target in edges(RAINDECODE):
        if target == "raindecode":
            assert module.split(".")[1] in _TOP, f"{module} imports the whole package"


def test_the_testbed_is_a_leaf() -> None:
    for module, target in edges(RAINDECODE):
        if within(module, _LEAF):
            assert within(target, _LEAF, "raindecode.errors") or not within(target, "raindecode", "rainkernels"), (
                f"{module} imports {target}: the testbed stands alone"
            )
        elif within(target, _LEAF):
            at_top = module.split(".")[1] in _TOP
            assert at_top or within(module, "raindecode.search", "raindecode.policy.urial", "raindecode.decoder"), (
                f"{module} imports {target}"
            )


def test_raindecode_reaches_kernels_through_their_ops() -> None:
    for module, target in edges(RAINDECODE):
        lanes = ("rainkernels._C", "rainkernels.triton", "rainkernels.reference", "rainkernels.testing")
        assert not within(target, *lanes), f"{module} imports {target}: go through rainkernels.ops"
        if within(module, "raindecode.engine", "raindecode.search", "raindecode.policy"):
            assert not within(target, "rainkernels") or within(target, "rainkernels.ops", "rainkernels.errors"), (
                module,
                target,
            )


def test_rainkernels_knows_tensors_only() -> None:
    for module, target in edges(RAINKERNELS):
        assert not within(target, "raindecode", "transformers", "tokenizers"), f"{module} imports {target}"


def test_only_ops_reach_the_reference() -> None:
    for module, target in edges(RAINKERNELS):
        if within(target, "rainkernels.reference"):
            assert within(module, "rainkernels.ops", "rainkernels.reference", "rainkernels.testing"), (
                f"{module} imports {target}"
            )
        if within(module, "rainkernels.reference"):
            assert not within(target, "rainkernels.ops"), (
                f"{module} imports {target}: the reference owes the ops nothing"
            )


@pytest.mark.parametrize("module", ["raindecode.engine.kv_tree", "raindecode.engine.slots", "raindecode.engine.branch"])
def test_the_tree_holds_integers_only(module: str) -> None:
    seen: set[str] = set()
    queue = [module]
    while queue:
        at = queue.pop()
        for target in imports(at, MODULES[at]):
            assert not within(target, "torch", "transformers"), f"{module} reaches {target} through {at}"
            if target in MODULES and target not in seen:
                seen.add(target)
                queue.append(target)


def includes(path: Path) -> list[str]:
    return re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)", path.read_text(encoding="utf-8"), re.MULTILINE)


SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".hpp", ".cuh", ".cpp", ".cu"})


def test_there_are_sources_to_check() -> None:
    assert len(SOURCES) > 10
    assert any(includes(path) for path in SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(CSRC).as_posix())
def test_includes_point_down(path: Path) -> None:
    where = path.relative_to(CSRC).parts[0]
    for name in includes(path):
        head = name.split("/")[0]
        assert head not in {"torch", "ATen", "c10", "THC"}, f"{path.name} includes {name}: the boundary is torch-free"
        if where != "cuda":
            assert not name.startswith(("cuda_runtime", "cuda.h", "cub", "thrust")), f"{path.name} includes {name}"
        if where == "include":
            assert head not in {"cpu", "cuda", "bindings", "pybind11"}, f"{path.name} includes {name}"
        if where == "cpu":
            assert head not in {"cuda", "bindings", "pybind11"}, f"{path.name} includes {name}"
        if where == "cuda":
            assert head not in {"cpu", "bindings", "pybind11"}, f"{path.name} includes {name}"
