"""One kernel that is right and one that is not, for the test of the interpreter gate. Not collected by itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def add_kernel(X, OUT, AMOUNT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(OUT + i, tl.load(X + i) + AMOUNT)


def run(amount: int) -> torch.Tensor:
    x, out = torch.arange(8), torch.empty(8, dtype=torch.int64)
    add_kernel[(1,)](x, out, amount, 8)
    return out


def test_a_right_kernel() -> None:
    assert run(1).tolist() == list(range(1, 9))


def test_a_wrong_kernel() -> None:
    assert run(2).tolist() == list(range(1, 9))
