"""AdapterHooks: a low-rank adapter on some rows of a forward of transformers' own modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import linear

from raindecode.engine.adapter import Adapter, LowRankUpdate


class AdapterHooks:
    """One adapter of a model whose modules stay as they are: what it adds, it adds to their outputs.

    Args:
        adapter: of modules `model` has.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self._model = model
        self._adapter = adapter

    @contextmanager
    def on(self, rows: slice) -> Iterator[None]:
        """Adapt these rows of every forward meanwhile. Rows are the dimension before the last."""
        hooks = [
            self._model.get_submodule(name).register_forward_hook(partial(_add, update, rows))
            for name, update in self._adapter.updates.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _add(update: LowRankUpdate, rows: slice, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """y += scale (x down^T) up^T, in the order of PEFT's own sum."""
    x = args[0][..., rows, :].to(update.down.dtype)
    output[..., rows, :] += linear(linear(x, update.down), update.up) * update.scale
