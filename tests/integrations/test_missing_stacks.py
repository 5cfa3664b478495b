"""Without its stack a plug-in says what to install; the package itself loads none of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

STACKS = ("ray", "vllm", "sglang", "lm_eval", "litellm", "openai", "fastapi", "uvicorn")
SCRIPT = """
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {stacks!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import raindecode, raindecode.integrations, raindecode.integrations.transformers
for module in ("ray", "ray_serve", "vllm", "sglang", "lm_eval"):
    try:
        importlib.import_module(f"raindecode.integrations.{{module}}")
    except ModuleNotFoundError as error:
        print(module, error.name, error, sep="|")
"""


@pytest.fixture(scope="module")
def told() -> dict[str, tuple[str, str]]:
    """By module: the name of what is missing, and what is said."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(stacks=STACKS)], check=True, stdout=subprocess.PIPE, text=True
    )
    found = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {module: (name, words) for module, name, words in found}


@pytest.mark.parametrize(
    ("module", "missing", "words"),
    [
        ("ray", "ray", "pip install 'rainkernels[ray]'"),
        ("ray_serve", "fastapi", "pip install 'rainkernels[ray,server]'"),
        ("vllm", "vllm", "install rainkernels there"),
        ("sglang", "sglang", "install rainkernels there"),
        ("lm_eval", "lm_eval", "pip install 'lm_eval[hf]>=0.4.10'"),
    ],
)
def test_a_plug_in_without_its_stack_says_what_to_install(told: object, module: str, missing: str, words: str) -> None:
    assert isinstance(told, dict)
    name, said = told[module]
    assert name.partition(".")[0] == missing
    assert words in said
