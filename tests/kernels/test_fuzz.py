"""No public op crashes, reads outside its tensors or raises anything but a typed error, whatever it is called with.

RAINKERNELS_FUZZ_CASES says how many calls each op gets: 100 by default, 2,000 under `make test-slow` and `make test-asan`,
where a compiled lane with AddressSanitizer makes a wrong access end the run.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import fuzz_decoder
import fuzz_edits
import fuzz_kv
import fuzz_logits
import fuzz_tree
import pytest
import torch
from fuzz import FuzzOp, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = os.environ.get("RAINKERNELS_FUZZ_CASES")
OPS: dict[str, FuzzOp] = {**fuzz_tree.OPS, **fuzz_kv.OPS, **fuzz_logits.OPS, **fuzz_edits.OPS, **fuzz_decoder.OPS}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", OPS)
def test_any_call_is_refused_or_right(name: str) -> None:
    outcomes: Counter[tuple[int, str]] = Counter()

    @settings(
        max_examples=int(CASES or 100), deadline=None, database=None, derandomize=CASES is None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 1, 1, 2]))
    def run(seed: int, num_changes: int) -> None:
        outcomes[num_changes, check(OPS[name], seed, num_changes)] += 1

    run()
    assert not outcomes[0, "refused"], "a right call was refused"
    assert outcomes[0, "result"], "no right call was made"
    assert outcomes[1, "refused"], "no wrong call was refused"
