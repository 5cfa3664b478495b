"""The examples of docs/kernels.md run as they stand, each section after the ones before it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rainkernels import has_native

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


@pytest.mark.skipif(not has_native(), reason="rainkernels._C is not built")
def test_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert "tensor" in capsys.readouterr().out


def test_every_family_has_a_section() -> None:
    from rainkernels._lanes import FAMILY_LANES

    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in FAMILY_LANES if f"\n## {name}\n" not in text] == []
