"""Loads a model and its tokenizer, and puts an engine behind them."""

from __future__ import annotations

import logging as standard_logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from raindecode import env
from raindecode.engine.adapter import Adapter
from raindecode.engine.engine import Engine
from raindecode.engine.exact import PADDED_ROWS, ExactMode, use_rowwise_activations
from raindecode.engine.kv_tree import KVTree
from raindecode.engine.model_runner import ModelRunner, architecture, check_architecture
from raindecode.engine.parallel import MAX_EXACT, check_heads, check_processes, least, processes_of
from raindecode.engine.probe import check_against_stock, fuse_if_equal, rows_are_invariant, stock_logits
from raindecode.errors import ConfigError, ModelError, UnsupportedModelError

_log = standard_logging.getLogger("raindecode")
_POOL_BYTES_CPU = 2**30  # default size of the KV pool on a CPU
_POOL_SHARE_GPU = 0.85  # share of free GPU memory the pool takes by default
_MAX_DEFAULT_TOKENS = 1 << 17


def load_pretrained(
    path: str, *, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False, tensor_parallel: int = 1
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a local folder or a hub id.

    Args:
        tensor_parallel: processes to split the weights over; all of them load it.

    Raises:
        ModelError: nothing is there, or what is there does not load.
        UnsupportedModelError: it is not a causal language model, or transformers has no plan to split it.
        ConfigError: there are not as many processes, or its heads do not divide.
    """
    local = Path(path).expanduser()
    if local.exists() and not (local / "config.json").exists():
        raise ModelError(
            f"{path!r} has no config.json: give a folder saved by transformers' save_pretrained, a hub id, or 'testbed'"
        )
    if not local.exists() and path.startswith(("/", ".", "~")):
        raise ModelError(f"there is no folder {path!r}: give 'testbed', a folder with config.json, or a hub id")
    source = str(local) if local.exists() else path
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"no model at {path!r}: it is no local folder and could not be read as a hub id ({_first_line(error)}); "
            "give 'testbed', a folder with config.json, or a hub id that is cached or reachable"
        ) from error
    placed: dict[str, Any] = {}
    if tensor_parallel > 1:
        check_processes(tensor_parallel)
        check_heads(config, tensor_parallel)
        from transformers.distributed.configuration_utils import DistributedConfig

        placed["distributed_config"] = DistributedConfig(tp_size=tensor_parallel)
    try:
        with _quiet_when_piped():
            model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **placed, **options)
    except ValueError as error:
        if placed:
            raise UnsupportedModelError(
                f"{path!r} (model_type {config.model_type!r}) cannot be split over {tensor_parallel} processes: {_first_line(error)}; "
                "leave tensor_parallel out"
            ) from error
        raise UnsupportedModelError(
            f"{path!r} (model_type {config.model_type!r}) is not a causal language model transformers can load: {_first_line(error)}"
        ) from error
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"the weights of {path!r} could not be loaded: {_first_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # tokenizers raise many kinds, some bare Exception
        raise ModelError(f"the tokenizer of {path!r} could not be loaded: {_first_line(error)}") from error
    if not placed:
        torch.nn.Module.to(model, device)
    elif processes_of(model) != tensor_parallel:
        raise UnsupportedModelError(
            f"{architecture(model)} has no plan by which transformers would split it: leave tensor_parallel out"
        )
    return model.eval(), tokenizer


def build_engine(
    model: PreTrainedModel,
    *,
    adapters: Sequence[Adapter] = (),
    aligned: Sequence[PreTrainedModel] = (),
    vocab_size: int | None = None,
    kv_tokens: int | None = None,
    exact: bool | None = None,
    max_tasks: int = 32,
    verify: bool = True,
    fused: bool = True,
    cuda_graphs: bool | None = None,
) -> tuple[Engine, ExactMode]:
    """An engine for `model`, and the exact mode it runs in.

    Args:
        adapters: low-rank updates of `model`, each a model of the engine behind it.
        aligned: whole models with the same tokens, the last models of the engine.
        vocab_size: ids that exist in every model; None takes the smallest vocabulary.
        kv_tokens: capacity of the KV pool in tokens; None takes RAINDECODE_KV_TOKENS, or what a share of memory holds.
        exact: None turns exact mode on for float32 on a CPU when the probe passes; True insists; False leaves it off.
        verify: compare with the stock model on a few tokens, so that an architecture that cannot be served is refused.
        fused: run models of Llama's form as a FusedModel.
        cuda_graphs: run steps from CUDA graphs; None where that is possible, True insists, False does not.

    Raises:
        UnsupportedModelError: the architecture cannot be served.
        ConfigError: kv_tokens is not positive, or exact mode or CUDA graphs were insisted on and cannot be had here.
    """
    models = (model, *aligned)
    for one in models:
        check_architecture(one)
    kv_tokens = env.kv_tokens() if kv_tokens is None else kv_tokens
    if kv_tokens is not None and kv_tokens < 1:
        raise ConfigError(f"kv_tokens is {kv_tokens}; allowed: 1 or more tokens")
    on_cpu_fp32 = all(one.device.type == "cpu" and one.dtype == torch.float32 for one in models)
    if exact and not on_cpu_fp32:
        kinds = ", ".join(dict.fromkeys(f"{one.dtype} on {one.device}" for one in models))
        raise ConfigError(f"exact mode needs float32 on a CPU; this model is {kinds}: use exact=None or False")
    processes = max(map(processes_of, models))
    if exact and processes > MAX_EXACT:
        raise ConfigError(
            f"exact mode was asked for, and the model is split over {processes} processes; allowed: {MAX_EXACT} at most, or exact=None"
        )
    wants_exact = on_cpu_fp32 and processes <= MAX_EXACT if exact is None else exact
    runners = [
        _runner(one, own, exact=wants_exact, verify=verify, fused=fused, cuda_graphs=cuda_graphs)
        for one, own in zip(models, (adapters, *((),) * len(aligned)), strict=True)
    ]
    mode = _exact_mode(runners) if wants_exact else "off"
    if exact and mode == "off":
        raise ConfigError(
            "exact mode was asked for, but rows of a forward depend on their number on this machine, padded or not"
        )
    tokens = least(kv_tokens or default_kv_tokens(runners), models)
    for runner in runners:
        runner.resize(tokens + 1)
    engine = Engine(
        runners, KVTree(tokens + 1), max_tasks=max_tasks, pad_rows=PADDED_ROWS if mode == "padded" else 0, vocab_size=vocab_size
    )  # fmt: skip
    return engine, mode


_PROBE_SLOTS = 512
_checked: WeakSet[PreTrainedModel] = WeakSet()  # models that have been compared with their own forward


def _runner(
    model: PreTrainedModel, adapters: Sequence[Adapter], *, exact: bool, verify: bool, fused: bool, cuda_graphs: bool | None
) -> ModelRunner:  # fmt: skip
    """A model checked against its own forward, in the fastest form it has. Its pools are small yet."""
    stock = stock_logits(model) if verify and model not in _checked else None
    if exact:
        use_rowwise_activations(model)
    runner = ModelRunner(model, _PROBE_SLOTS, adapters)
    probe = Engine(runner, KVTree(_PROBE_SLOTS))
    if stock is not None:
        check_against_stock(probe, stock)
        _checked.add(model)
    if fused:
        fuse_if_equal(probe)
    obstacle = runner.use_graphs() if cuda_graphs is not False else None
    if cuda_graphs and obstacle is not None:
        raise ConfigError(f"cuda_graphs=True was asked for, but {obstacle}: use cuda_graphs=None or False")
    return runner


def _exact_mode(runners: Sequence[ModelRunner]) -> ExactMode:
    if all(rows_are_invariant(Engine(runner, KVTree(_PROBE_SLOTS))) for runner in runners):
        return "rows"
    if all(rows_are_invariant(Engine(runner, KVTree(_PROBE_SLOTS), pad_rows=PADDED_ROWS)) for runner in runners):
        _log.warning("exact mode pads every forward to %d rows: MKL's strict mode is not active here", PADDED_ROWS)
        return "padded"
    _log.warning("exact mode is off: results may differ in the last bits with the number of requests in a batch")
    return "off"


def default_kv_tokens(runners: Sequence[ModelRunner]) -> int:
    """Tokens the KV pools hold when the user does not say."""
    per_token = max(sum(runner.bytes_per_token for runner in runners), 1)
    device = runners[0].device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(1024, int(free * _POOL_SHARE_GPU) // per_token)
    return max(1024, min(_MAX_DEFAULT_TOKENS, _POOL_BYTES_CPU // per_token))


@contextmanager
def _quiet_when_piped() -> Iterator[None]:
    """No progress bar of transformers' weight loading where stderr is no terminal."""
    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
