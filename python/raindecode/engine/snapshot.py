"""Snapshot: what a model was made of at one moment, so that what is changed about it later is noticed."""

from __future__ import annotations

from itertools import repeat
from operator import contains, is_
from typing import Any

import torch
from torch import Tensor, nn

# transformers leaves hooks on every module once hidden states were asked for; outside of such a call they do nothing. Another
# Decoder over the model listens during a forward of its own.
_IDLE_HOOKS = {
    "transformers.utils.output_capturing", "raindecode.engine.model_runner", "raindecode.engine.adapter_hooks",
}  # fmt: skip


class Snapshot:
    """The modules and parameters of a model, and that nothing stands between them.

    What counts as a change: a module or a parameter put in, taken out or replaced (an adapter, a new head, a
    parametrization); a parameter moved to other memory (`p.data = ...`, `.to(...)`); a forward hook; a `forward` set on an
    instance. What does not: numbers changed in place, which are read where they lie; buffers; the config.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        shared = torch.nn.modules.module
        self._hooks = [shared._global_forward_hooks, shared._global_forward_pre_hooks]
        self._hooks += [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._own = [m.__dict__ for m in modules]
        self._tables: list[dict[str, Any]] = [table for m in modules for table in (m._modules, m._parameters) if table]
        entries = [(table, name, part) for table in self._tables for name, part in table.items()]
        self._in = [table for table, _, _ in entries]
        self._names = [name for _, name, _ in entries]
        self._parts = [part for _, _, part in entries]
        self._parameters = [part for part in self._parts if isinstance(part, Tensor)]
        self._addresses = [parameter.data_ptr() for parameter in self._parameters]

    @property
    def holds(self) -> bool:
        """Whether the model is still as it was. Asked at every step, so the loops are Python's own."""
        return (
            self.is_plain
            and sum(map(len, self._tables)) == len(self._parts)
            and all(map(is_, map(dict.get, self._in, self._names), self._parts))
            and list(map(Tensor.data_ptr, self._parameters)) == self._addresses
        )

    @property
    def is_plain(self) -> bool:
        """Whether no hook listens and every module runs the forward of its class."""
        if any(map(contains, self._own, repeat("forward"))):
            return False
        return not any(self._hooks) or not any(
            getattr(hook, "__module__", "") not in _IDLE_HOOKS for hooks in self._hooks for hook in hooks.values()
        )
