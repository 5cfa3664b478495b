"""Edits of hidden states in a model that vLLM runs, by hooks on its layers. Imports vLLM only to put itself into a worker.

Hooks run in eager mode only, and what they change is in the K/V cache: docs/integrations/vllm.md says what follows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raindecode import env
from raindecode.engine.edit_hooks import TAP_MODULES
from raindecode.errors import ConfigError, UnsupportedModelError
from raindecode.hidden_edits import Site, Stage
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.alignez.positions import Positions
from rainkernels.ops.edits import edit_
from rainkernels.ops.edits_tables import EditTable


def load_edits(given: Sequence[str]) -> list[AlignEZ]:
    """Edits from files, FILE or FILE:STRENGTH each.

    Raises:
        EditFileError: there is no such file, or it holds no edit. ConfigError: `given` is no list of names.
    """
    if isinstance(given, str) or not all(isinstance(one, str) and one for one in given):
        raise ConfigError(f"edits are {given!r}; give a list of FILE or FILE:STRENGTH")
    edits = []
    for one in given:
        path, _, tail = one.rpartition(":")
        strength = _number(tail) if path and not Path(one).exists() else None
        edits.append(AlignEZ.load(one) if strength is None else AlignEZ.load(path, strength=strength))
    return edits


def cache_salt(edits: Sequence[AlignEZ | str]) -> str:
    """What requests under these edits must carry as `cache_salt`, so that they share K/V with no others; "" for no edits.

    Args:
        edits: loaded, or as `load_edits` takes them, in the order they run.
    """
    loaded = [load_edits([one])[0] if isinstance(one, str) else one for one in edits]
    active = [(edit.name, float(edit.strength), str(edit.positions)) for edit in loaded if edit.strength]
    return f"raindecode-{hashlib.sha256(repr(active).encode()).hexdigest()[:32]}" if active else ""


class Steering:
    """Worker extension (`--worker-extension-cls raindecode.integrations.vllm.Steering`): edits by remote call.

    `llm.collective_rpc("raindecode_steer", args=(["helpful.safetensors:0.5"],))` from then on edits every row of every request.
    K/V that is cached stays: send requests with the salt it returns, or reset the prefix cache.
    """

    model_runner: Any

    def raindecode_steer(self, edits: Sequence[str]) -> str:
        """Put these edits in the place of those there are; none takes them away. Their `cache_salt`.

        Raises:
            ConfigError, EditFileError, UnsupportedModelError: see `steer`; what was there stays.
        """
        return steer(self.model_runner, load_edits(edits))


def steer(runner: Any, edits: Sequence[AlignEZ]) -> str:
    """Edit the model of one of vLLM's model runners from now on; returns the edits' `cache_salt`.

    Raises:
        ConfigError: the runner compiles its model, captures graphs, or is Model Runner V2; layers are spread over workers; an edit is
            for another model, depends on the prompt, or on where the prompt ends while prefixes are cached.
        UnsupportedModelError: the model has no such place.
    """
    active = [edit for edit in edits if edit.strength]
    if active:
        _check_runner(runner)
        for edit in active:
            _check_edit(edit, runner)
    hooks = _Hooks(runner, active) if active else None
    old = getattr(runner, _HELD, None)
    if old is not None:
        old.remove()
    if hooks is not None:
        hooks.install()
    setattr(runner, _HELD, hooks)
    return cache_salt(active)


def register_steering() -> None:
    """Have every worker of this process steer the model it loads by RAINDECODE_VLLM_EDITS; nothing where that is not set.

    Usable as an entry point of "vllm.general_plugins". Importing `raindecode.integrations.vllm` calls it, which a worker does that is
    started with `--worker-extension-cls raindecode.integrations.vllm.Steering`. Safe to call twice.
    """
    if not env.vllm_edits():
        return
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if getattr(WorkerWrapperBase, _HELD, False):
        return
    before = WorkerWrapperBase.__dict__.get("load_model")

    def load_model(self: Any, *args: Any, **options: Any) -> Any:
        result = self.worker.load_model(*args, **options) if before is None else before(self, *args, **options)
        edits = load_edits(env.vllm_edits())
        _check_sharing(self.worker.model_runner.vllm_config)
        steer(self.worker.model_runner, edits)
        return result

    WorkerWrapperBase.load_model = load_model
    setattr(WorkerWrapperBase, _HELD, True)


_HELD = "_raindecode_steering"


@dataclass(frozen=True)
class _Placed:
    """One stage at one place, as a table whose slot 1 it is."""

    site: Site
    table: EditTable
    edit: int  # which of the edits it belongs to


class _Hooks:
    """Hooks of one set of edits on one runner's model."""

    def __init__(self, runner: Any, edits: Sequence[AlignEZ]) -> None:
        self._runner = runner
        self._edits = edits
        self._model: nn.Module = runner.get_model()
        self._layers = _layers(self._model, runner.model_config.hf_text_config.num_hidden_layers)
        parameter = next(self._model.parameters())
        self._placed = [
            _Placed(site, _table(stage, parameter.device, runner.model_config.dtype), i)
            for i, edit in enumerate(edits)
            for site, stage in edit.resolve()
        ]
        self._slots: list[Tensor | None] = [None] * len(edits)  # of the forward under way, by edit
        self._handles: list[Any] = []
        self._places = {one.site: self._module(one.site) for one in self._placed}

    def install(self) -> None:
        if any(not edit.positions.everywhere for edit in self._edits):
            self._handles.append(self._model.register_forward_pre_hook(self._begin, with_kwargs=True))
        for site, module in self._places.items():
            hook = _edit_stream if site.tap == "block_out" else _edit_output
            own = [one for one in self._placed if one.site == site]

            def edited(_module: nn.Module, _args: Any, output: Any, own: Any = own, hook: Any = hook) -> Any:
                return hook(output, lambda rows: self._apply(rows, own))

            self._handles.append(module.register_forward_hook(edited))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _module(self, site: Site) -> nn.Module:
        if not 0 <= site.layer < len(self._layers):
            raise ConfigError(
                f"an edit is for layer {site.layer}, {type(self._model).__name__} has layers 0 to {len(self._layers) - 1}"
            )
        layer = self._layers[site.layer]
        if site.tap == "block_out":
            return layer
        children = dict(layer.named_children())
        for name in TAP_MODULES[site.tap]:
            if name in children:
                return children[name]
        raise UnsupportedModelError(
            f"{type(self._model).__name__} of vLLM has no {site.tap}: its layers are made of {', '.join(children)}; use block_out"
        )

    def _apply(self, rows: Tensor, placed: Sequence[_Placed]) -> None:
        for one in placed:
            if self._edits[one.edit].positions.everywhere:
                slots = torch.ones(len(rows), dtype=torch.int32, device=rows.device)
            else:
                known = self._slots[one.edit]
                if known is None or len(known) != len(rows):
                    continue  # a forward without requests: vLLM warms up
                slots = known
            edit_(rows, one.table, slots)

    def _begin(self, _module: nn.Module, _args: Any, options: dict[str, Any]) -> None:
        """Before a forward: which of its rows each edit is for."""
        ids, positions = options.get("input_ids"), options.get("positions")
        batch = self._runner.input_batch
        self._slots = [None] * len(self._edits)
        if ids is None or positions is None or positions.dim() != 1 or not batch.num_reqs:
            return
        starts = np.asarray(self._runner.query_start_loc.np[: batch.num_reqs + 1])
        if starts[-1] > len(ids):
            return
        place = positions[: starts[-1]].cpu().numpy()
        lengths = np.repeat(np.asarray(batch.num_prompt_tokens[: batch.num_reqs]), np.diff(starts))
        for i, edit in enumerate(self._edits):
            slots = np.zeros(len(ids), dtype=np.int32)
            slots[: len(place)] = edited_rows(edit.positions, place, lengths)
            self._slots[i] = torch.from_numpy(slots).to(ids.device)


def edited_rows(
    positions: Positions, place: npt.NDArray[Any], prompt_length: npt.NDArray[Any]
) -> npt.NDArray[np.bool_]:
    """[rows] which rows are edited; `place` [rows] is each one's position in its request, whose prompt is so long."""
    in_prompt = place < prompt_length
    if positions.prompt == "last":
        in_prompt = place == prompt_length - 1
    elif positions.prompt == "none":
        in_prompt = np.zeros_like(in_prompt)
    written = place - prompt_length
    generated = (place >= prompt_length) & (written >= positions.first)
    if positions.end is not None:
        generated &= written < positions.end
    rows: npt.NDArray[np.bool_] = in_prompt | generated
    return rows


def _edit_output(output: Any, apply: Any) -> Any:
    """The output of attention or of a feed-forward part, before it is added to the stream."""
    states = output[0] if isinstance(output, tuple) else output
    apply(states)
    return output


def _edit_stream(output: Any, apply: Any) -> Any:
    """The stream behind a layer. vLLM's layers return what is still to be added and the stream before it."""
    if isinstance(output, Tensor):
        apply(output)
        return output
    if isinstance(output, tuple) and len(output) == 2 and all(isinstance(one, Tensor) for one in output):
        added, stream = output
        if added.shape == stream.shape:
            stream = added + stream
            apply(stream)
            return torch.zeros_like(added), stream
    raise UnsupportedModelError(
        "a layer of this model returns neither a hidden state nor one with its residual, so block_out cannot be reached: "
        "edit mlp_out"
    )


def _table(stage: Stage, device: torch.device, dtype: torch.dtype) -> EditTable:
    count, hidden_size = stage.directions.shape
    table = EditTable.create(2, count, hidden_size, device=device, dtype=dtype)
    table.set_slot(1, stage.directions, op=stage.ops, alpha=stage.alphas, target=stage.targets, norm=stage.norm)
    return table


def _layers(model: nn.Module, expected: int) -> Sequence[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == expected:
            return list(module)
    raise UnsupportedModelError(
        f"{type(model).__name__} of vLLM does not keep its {expected} layers in one list, so their hidden states cannot be reached"
    )


def _check_runner(runner: Any) -> None:
    config = runner.vllm_config
    if type(runner).__module__.startswith("vllm.v1.worker.gpu."):
        raise ConfigError("steering knows the rows of vLLM's first model runner only: set VLLM_USE_V2_MODEL_RUNNER=0")
    mode = getattr(config.compilation_config, "mode", 0) or 0
    if not config.model_config.enforce_eager or int(mode) != 0:
        raise ConfigError(
            "vLLM compiles this model or runs it from graphs, which no hook sees, so it would not be steered at every step: start it "
            "with --enforce-eager"
        )
    if config.parallel_config.pipeline_parallel_size > 1:
        raise ConfigError(
            f"the layers are spread over {config.parallel_config.pipeline_parallel_size} stages; allowed: "
            "--pipeline-parallel-size 1"
        )


def _check_edit(edit: AlignEZ, runner: Any) -> None:
    model = runner.model_config.hf_text_config
    if edit.needs_query:
        raise ConfigError(
            f"an edit with select {edit.select!r} is decided by the prompt, which vLLM's batches do not allow: fit one without"
        )
    if edit.hidden_size != model.hidden_size:
        raise ConfigError(f"an edit is for a hidden size of {edit.hidden_size}, the model has {model.hidden_size}")
    if edit.model is not None and not edit.force:
        theirs, ours = (edit.model.architecture, edit.model.num_layers), (model.model_type, model.num_hidden_layers)
        if theirs != ours:
            raise ConfigError(
                f"an edit was fitted on {theirs[0]} with {theirs[1]} layers, the model is {ours[0]} with {ours[1]}"
            )
    if not edit.positions.everywhere and runner.vllm_config.cache_config.enable_prefix_caching:
        raise ConfigError(
            f"an edit with positions {edit.positions} depends on where the prompt ends, so the K/V of a token are not the same for all "
            "prompts that begin alike: start vLLM with --no-enable-prefix-caching, or fit the edit with positions 'all'"
        )


def _check_sharing(config: Any) -> None:
    if getattr(config, "kv_transfer_config", None) is not None:
        raise ConfigError(
            "K/V computed under RAINDECODE_VLLM_EDITS would reach servers without these edits through the KV connector: leave out "
            "--kv-transfer-config"
        )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
