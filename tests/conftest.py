"""What holds for every test: when it is over, no request holds a slot of any engine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Some virtual machines announce AMX and die on its first instruction, in any bfloat16 product of plain torch. No test needs it.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

# No test may wait for a network: what is not here is not there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

# Imported before any test makes a matrix product: importing it asks MKL for reproducible results.
import raindecode  # noqa: F401
from raindecode.engine.engine import LIVE_ENGINES

# Triton decides at import whether it interprets: these tests run in processes of their own, started by test_triton.py.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]


# Minutes each: begun first, so that no process of `make test` is left with one of them at the end.
_FIRST = ("test_triton_aot.py", "test_triton.py", "test_asan.py", "test_ray.py", "test_tensor_parallel.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _FIRST)


@pytest.fixture(autouse=True)
def all_slots_are_free_again() -> Iterator[None]:
    """After a test that finished, cancelled or failed its requests, every slot can be had again."""
    yield
    for engine in list(LIVE_ENGINES):
        tree = engine.tree
        engine.pins.clear()
        assert tree.num_cursors == 0, f"{tree.num_cursors} cursors were not released"
        tree.clear()
        assert tree.num_free == tree.num_slots, f"{tree.num_slots - tree.num_free} slots are lost"
        assert not list(tree.nodes())
