"""AdapterHooks: a low-rank adapter on some rows of a forward of transformers' own modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
            self._model.get_submodule(name).register_forward_hook(_Addition(update, rows))
            for name, update in self._adapter.updates.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Addition:
    """Adds one update to some rows of a module's output: y += scale (x down^T) up^T, in the order of PEFT's own sum."""

    def __init__(self, update: LowRankUpdate, rows: slice) -> None:
        self._update = update
        self._rows = rows

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        update, x = self._update, args[0][..., self._rows, :]
        # Of one row, a slice of three dimensions is multiplied in another way than several are, and ends in other bits.
        flat = x.reshape(-1, x.shape[-1]).to(update.down.dtype)
        change = linear(linear(flat, update.down), update.up) * update.scale
        output[..., self._rows, :] += change.view(*x.shape[:-1], -1)
