"""For the test of the sanitizer gate: a call that stays inside its tensors and one that reads past them."""

from __future__ import annotations

import torch

from rainkernels._lanes import native


def copy_row(row: int) -> None:
    pool, row_bytes = torch.zeros(4, 16), 64
    src, dst = torch.tensor([row], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    at = pool.data_ptr(), row_bytes
    native().kv_copy_cpu(*at, *at, src.data_ptr(), dst.data_ptr(), 1)


def test_inside() -> None:
    copy_row(3)


def test_outside() -> None:
    copy_row(4)
