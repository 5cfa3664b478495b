"""bake: a linear edit put into the weights, as a plain transformers checkpoint that needs nothing at run time."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from raindecode.engine.edit_hooks import EditHooks
from raindecode.engine.model_facts import identity_of
from raindecode.errors import ConfigError, EditFileError, UnsupportedModelError
from raindecode.hidden_edits import Site, Stage
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.alignez.schedule import check_fits

# The product that a module's output comes from.
_LAST = {
    "attn_out": ("o_proj", "out_proj", "c_proj", "dense"),
    "mlp_out": ("down_proj", "c_proj", "dense_4h_to_h", "fc2"),
}


def bake(
    edit: AlignEZ, model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Write a checkpoint whose every row is what the edit makes of it: W <- M W, b <- M b + t of the product of each site.

    The model itself stays as it is. Arithmetic is float64, rounded once to the weights' dtype.

    Args:
        folder: made; must not exist, or be empty.
        tokenizer: written beside the weights.
    Returns:
        The folder.

    Raises:
        ConfigError: the edit is not linear, is not done to every row, or is for another model; the message says what.
        UnsupportedModelError: the output of a site is not that of one product.
        EditFileError: the folder cannot be written.
    """
    check_fits(edit, [identity_of(model)])
    _check_linear(edit)
    place = Path(folder).expanduser()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise EditFileError(f"{str(folder)!r} is there already: give a folder that does not exist, or an empty one")
    changed = _baked(edit, model)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        state[name] = changed[name] if name in changed else tensor.detach().clone()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        try:
            model.save_pretrained(beside, state_dict=state)
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
            beside.chmod(0o755)
            if place.exists():
                place.rmdir()
            beside.rename(place)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    except OSError as error:
        raise EditFileError(
            f"{str(folder)!r} could not be written ({error}): give a folder that may be written to"
        ) from error
    return place


def _check_linear(edit: AlignEZ) -> None:
    if edit.needs_query:
        raise ConfigError(
            f"an edit that selects by {edit.select} differs from request to request, so it cannot be baked: use it at run time (--edit)"
        )
    if edit.on != "reference":
        raise ConfigError(
            f"an edit on {edit.on!r} models was to be baked; allowed: on='reference', the model that is given"
        )
    for site, stage in edit.stages:
        if "tanh" in stage.ops or stage.norm != "none":
            what = "tanh" if "tanh" in stage.ops else f"norm {stage.norm!r}"
            raise ConfigError(
                f"layer {site.layer} has {what}, which is not linear, so it cannot be baked: use the edit at run time (--edit)"
            )
        if site.tap == "block_out":
            raise ConfigError(
                f"layer {site.layer} is edited at block_out, a sum that no one product gives, so the edit cannot be baked: fit it at "
                "mlp_out or attn_out"
            )
    if not edit.positions.everywhere:
        raise ConfigError(
            "an edit of some positions only was to be baked, and weights act on every row: if that is meant, give it "
            "positions=Positions('all') first (dataclasses.replace; --positions all)"
        )


def _baked(edit: AlignEZ, model: PreTrainedModel) -> dict[str, Tensor]:
    """New parameters by name."""
    names = {id(module): name for name, module in model.named_modules()}
    hooks = EditHooks(model)
    changed: dict[str, Tensor] = {}
    by_site: dict[Site, list[Stage]] = {}
    for site, stage in edit.stages:
        by_site.setdefault(site, []).append(stage)
    for site, stages in by_site.items():
        product = _product(hooks.module(site), site, model)
        name = names[id(product)]
        weight = product.weight.detach().double()
        rows = weight.T.clone() if isinstance(product, Conv1D) else weight.clone()  # [hidden_size, in]
        bias = None if product.bias is None else product.bias.detach().double().clone()
        constant = _apply(rows, bias, stages, edit.strength)
        if constant and bias is None:
            raise ConfigError(
                f"layer {site.layer} adds a constant (add, or set to a target) and {name} has no bias to hold it, so the edit cannot be "
                "baked: use it at run time"
            )
        rows = rows.T if isinstance(product, Conv1D) else rows
        changed[f"{name}.weight"] = rows.to(product.weight.dtype).contiguous()
        if bias is not None:
            changed[f"{name}.bias"] = bias.to(product.bias.dtype)
    return changed


def _apply(rows: Tensor, bias: Tensor | None, stages: Iterable[Stage], strength: float) -> bool:
    """Edit the columns of `rows` [hidden_size, in] and `bias` in place; whether a constant other than 0 was to be added."""
    constant = False
    for stage in stages:
        for u32, op, alpha, target in zip(stage.directions, stage.ops, stage.alphas, stage.targets, strict=True):
            u = u32.double().to(rows.device)
            u = u / u.norm()
            strong = strength * alpha
            share = {"project": -strong, "boost": strong, "set": -strong, "add": 0.0}[op]
            shift = {"set": strong * target, "add": strong}.get(op, 0.0)
            rows += share * torch.outer(u, u @ rows)
            if bias is not None:
                bias += (share * (u @ bias) + shift) * u
            constant = constant or shift != 0.0
    return constant


def _product(module: nn.Module, site: Site, model: PreTrainedModel) -> Any:
    children = dict(module.named_children())
    found: Sequence[nn.Module] = [children[name] for name in _LAST[site.tap] if name in children]
    if len(found) != 1 or not isinstance(found[0], (nn.Linear, Conv1D)) or not found[0].weight.is_floating_point():
        raise UnsupportedModelError(
            f"{site.tap} of layer {site.layer} of {type(model).__name__} is not the output of one plain product (it is made of "
            f"{', '.join(children)}), so an edit cannot be baked into it"
        )
    return found[0]
