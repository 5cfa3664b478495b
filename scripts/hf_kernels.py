"""Lay the Triton kernels out as a repository of Hugging Face's `kernels` (torch-noarch): `python scripts/hf_kernels.py FOLDER`.

The modules that `mix_sample`, `rank`, `edit_` and `add_edit_rmsnorm` need are copied from rainkernels with relative imports, an op
namespace of their own, and the compiled lane taken out. FOLDER gets `build/torch-cpu` and `build/torch-cuda`, ready to load with
`get_local_kernel(FOLDER)` or to be uploaded, and `torch-ext` with `build.toml`, which the kernel builder takes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = Path(__file__).resolve().parent / "hf_kernel_files"
PACKAGE = "rainkernels"
ROOTS = ("ops/logits.py", "ops/edits.py")
BACKENDS = ("cpu", "cuda")
PARTS = ("build", "torch-ext")
LANES = """FAMILY_LANES: dict[str, dict[str, tuple[Lane, ...]]] = {
    "logits": {"cuda": ("triton",)},
    "edits": {"cuda": ("triton",)},
}
"""


def modules() -> dict[str, str]:
    """Source by path inside the package, of everything the roots import, wherever in a file."""
    found: dict[str, str] = {}
    queue = list(ROOTS)
    while queue:
        name = queue.pop()
        if name in found:
            continue
        found[name] = (ROOT / PACKAGE / name).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(found[name])):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
                queue += paths_of(node.module, [alias.name for alias in node.names])
    for folder in {Path(name).parent for name in found} - {Path(".")}:
        path = f"{folder.as_posix()}/__init__.py"
        found[path] = (ROOT / PACKAGE / path).read_text(encoding="utf-8")
    return {name: rewritten(name, text) for name, text in sorted(found.items())}


def paths_of(module: str, names: list[str]) -> list[str]:
    """Files that `from module import names` reads."""
    inside = module.split(".")[1:]
    candidates = ["/".join(inside), *("/".join([*inside, name]) for name in names)]
    return [f"{one}.py" for one in candidates if one and (ROOT / PACKAGE / f"{one}.py").is_file()]


def rewritten(name: str, text: str) -> str:
    """A module as it stands in the layout."""
    above = "." * (1 + name.count("/"))
    text = re.sub(rf"^(\s*)from {PACKAGE}\.([\w.]+) import", rf"\1from {above}\2 import", text, flags=re.MULTILINE)
    text = re.sub(rf"^(\s*)from {PACKAGE} import", rf"\1from {above} import", text, flags=re.MULTILINE)
    if "torch.library.Library(" in text:
        text = text.replace(
            f'torch.library.Library("{PACKAGE}", "FRAGMENT")', "torch.library.Library(NAMESPACE, 'FRAGMENT')"
        )
        text = re.sub(rf'register_fake\("{PACKAGE}::(\w+)"', r'register_fake(add_op_namespace_prefix("\1")', text)
        lines = text.split("\n")
        last = max(i for i, line in enumerate(lines) if line.startswith("from .") and "(" not in line)
        lines.insert(
            last + 1,
            f'from {above}_ops import add_op_namespace_prefix\n\nNAMESPACE = add_op_namespace_prefix("").split("::")[0]',
        )
        text = "\n".join(lines)
    if name == "_lanes.py":
        text, count = re.subn(r"^FAMILY_LANES: .*?^}\n", LANES, text, flags=re.MULTILINE | re.DOTALL)
        if count != 1:
            raise SystemExit("rainkernels/_lanes.py has no table FAMILY_LANES any more: bring this script up to date")
    if re.search(rf'(^\s*(from|import) {PACKAGE}\b)|("{PACKAGE}(::|"))', text, flags=re.MULTILINE):
        raise SystemExit(
            f"{PACKAGE}/{name} names the package in a way this script does not rewrite: bring it up to date"
        )
    return text


def ops_module(identity: str) -> str:
    """What the kernel builder would write as `_ops.py`."""
    return (
        f"import torch\n\nops = torch.ops.{identity}\n\n\n"
        "def add_op_namespace_prefix(op_name: str) -> str:\n"
        f'    """The name with the namespace of this build."""\n    return f"{identity}::{{op_name}}"\n'
    )


def write(folder: Path, sources: dict[str, str]) -> None:
    for name, text in sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def lay_out(folder: Path) -> None:
    """Write the repository. What an earlier run wrote there is replaced; a `build` of anything else is left alone.

    Raises:
        SystemExit: there is one.
    """
    marked = folder / "build.toml"
    ours = marked.is_file() and marked.read_bytes() == (FILES / "build.toml").read_bytes()
    if not ours and any((folder / part).exists() for part in PARTS):
        raise SystemExit(f"{folder} has a folder {' or '.join(PARTS)} that is not of this script: give another folder")
    sources = modules() | {name: (FILES / name).read_text(encoding="utf-8") for name in ("__init__.py", "layers.py")}
    mark = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:12]
    for part in PARTS:
        shutil.rmtree(folder / part, ignore_errors=True)
    write(folder / "torch-ext" / PACKAGE, sources)
    for backend in BACKENDS:
        identity = f"{PACKAGE}_{backend}_{mark}"
        metadata = {
            "name": PACKAGE, "id": identity, "version": 1, "license": "Apache-2.0", "python-depends": [],
            "backend": {"type": backend},
        }  # fmt: skip
        extra = {"_ops.py": ops_module(identity), "metadata.json": json.dumps(metadata, indent=2) + "\n"}
        write(folder / "build" / f"torch-{backend}", sources | extra)
    for name in ("build.toml", "CARD.md"):
        shutil.copy(FILES / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the repository goes")
    lay_out(parser.parse_args().folder)


if __name__ == "__main__":
    main()
