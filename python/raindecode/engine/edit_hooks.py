"""EditHooks: edits and captures of hidden states at the outputs of transformers' own modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from raindecode.engine.edits import RowEdits, Tapped
from raindecode.errors import UnsupportedModelError
from raindecode.hidden_edits import Site
from rainkernels.ops.edits import edit_

TAP_MODULES = {
    "attn_out": ("self_attn", "attn", "attention", "self_attention"),
    "mlp_out": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe"),
}
"""What a layer calls the module whose output a tap is; that of "block_out" is the layer."""


class EditHooks:
    """Edits of a model whose modules stay as they are."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @contextmanager
    def on(self, edits: RowEdits | None, tapped: Tapped | None) -> Iterator[None]:
        """Edit and capture rows of every forward meanwhile. Rows are the dimension before the last.

        Raises:
            UnsupportedModelError: the architecture has no module of a place that is asked for.
        """
        sites = {*(() if edits is None else edits.sites), *(() if tapped is None else tapped.sites)}
        hooks = [self.module(site).register_forward_hook(_Edit(site, edits, tapped)) for site in sites]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def module(self, site: Site) -> nn.Module:
        """The module whose output a place is."""
        layers = _layers(self._model)
        if not 0 <= site.layer < len(layers):
            raise UnsupportedModelError(
                f"{type(self._model).__name__} has {len(layers)} layers, {site.tap} of layer {site.layer} was asked for; "
                f"allowed: 0 to {len(layers) - 1}"
            )
        layer = layers[site.layer]
        if site.tap == "block_out":
            return layer
        children = dict(layer.named_children())
        for name in TAP_MODULES[site.tap]:
            if name in children:
                return children[name]
        raise UnsupportedModelError(
            f"{type(self._model).__name__} has no {site.tap}: its layers are made of {', '.join(children)}; use block_out"
        )


class _Edit:
    def __init__(self, site: Site, edits: RowEdits | None, tapped: Tapped | None) -> None:
        self._site = site
        self._tables = () if edits is None else edits.at(site)
        self._tapped = tapped if tapped is not None and tapped.wants(site) else None

    def __call__(self, _module: nn.Module, _args: object, output: Any) -> None:
        states: Tensor = output[0] if isinstance(output, tuple) else output
        rows = states.view(-1, states.shape[-1])
        if self._tapped is not None:
            self._tapped.put(self._site, rows)
        for table, slots in self._tables:
            edit_(rows, table, slots)


def _layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    expected = model.config.get_text_config().num_hidden_layers
    for _, module in model.base_model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == expected:
            return list(module)
    raise UnsupportedModelError(
        f"{type(model).__name__} does not keep its {expected} layers in one list, so their hidden states cannot be reached"
    )
