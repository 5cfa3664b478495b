"""What a shipped Triton configuration is: enough to compile it ahead of time on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ALL_REGISTERS", "AotKernel"]


@dataclass(frozen=True)
class AotKernel:
    """One kernel with the constants it is launched with.

    Every family module has `aot_kernels() -> list[AotKernel]` that names each configuration its launchers can choose;
    tests compile all of them for sm_80 and sm_90 and look at shared memory and spills.
    """

    name: str  # unique, such as "attention_wide-bf16-d128-g4"
    fn: Any  # the @triton.jit function
    signature: Mapping[str, str]  # run-time argument -> Triton type, such as "*bf16", "fp32", "i32"
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = field(default=())  # arguments divisible by 16, as the launcher's are
    max_registers: int | None = None  # per thread, where the launcher says


# Registers per thread when a block of eight warps has the processor for itself. Told so, ptxas does not spill for a second
# block, as it otherwise does at 64 or 128.
ALL_REGISTERS = 255
