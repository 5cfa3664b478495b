"""The engines of bench_rain.py on one model: raindecode at width "auto" and 1, and the baselines, driven by workloads."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from decode_models import SHAPES, build_model, kv_bytes, llama_config, weight_bytes
from naive.common import make_codec, make_request
from naive.oracle import Oracle
from naive.published import Published
from naive.strong import Strong
from naive.vanilla import Vanilla
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from workload import RecordedRequest
from workload_replay import Driven, Script, ScriptedOracle, format_of

import raindecode
from raindecode import RAIN, testbed
from raindecode.errors import ConfigError
from raindecode.search.sampling import Sampling
from raindecode.types import Request

Row = dict[str, Any]
MODELS = ("testbed", "25m", "110m", "1b", "7b")
ENGINES = ("ours", "ours_width1", "published", "strong", "vanilla")
_POOL_BYTES, _POOL_TOKENS = 2**30, 1 << 17  # most a Decoder takes for keys and values on a CPU by itself
_SLACK = 2**30


def load_model(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The testbed's model, or random weights in one of SHAPES, as transformers makes it (sdpa)."""
    if name != "testbed":
        return build_model(name, device, dtype)
    model = AutoModelForCausalLM.from_pretrained(testbed.WEIGHTS, dtype=dtype)
    return torch.nn.Module.to(model, device).eval()


def bytes_needed(name: str, dtype: torch.dtype, requests: Sequence[RecordedRequest], engines: Sequence[str]) -> int:
    """Memory of a run, rounded up: weights once, a KV pool for each Decoder, rows of logits the baselines keep by path."""
    if name == "testbed":
        return _SLACK
    config = llama_config(name)
    most = min(_POOL_BYTES, _POOL_TOKENS * kv_bytes(config, dtype))
    pools = sum(engine.startswith("ours") for engine in engines) * most
    states = max(request.answer.tokens_processed for request in requests)
    kept = states * config.vocab_size * 4 if {"published", "strong"} & set(engines) else 0
    return int(weight_bytes(config, dtype) + pools + kept + _SLACK)


def bytes_free(device: torch.device) -> int:
    """Memory a process can still get on the device; of a container's limit, what is left of it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def check_room(name: str, device: torch.device, dtype: torch.dtype, needed: int) -> None:
    """Refuse a model that does not fit, before anything is allocated.

    Raises:
        ConfigError: it does not.
    """
    free = bytes_free(device)
    if needed > free:
        short = ", or --dtype bfloat16" if dtype == torch.float32 else ""
        raise ConfigError(
            f"model {name!r} needs about {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')} on this device, and "
            f"{free / 2**30:.1f} GiB are free: use a smaller --model ({', '.join(MODELS)}){short}, or free memory"
        )


class Engines:
    """All engines over one set of weights.

    Args:
        model: as transformers made it; the baselines run it as it is, raindecode a copy that shares the weights.
        rain: the settings of the workload.
        requests: whose searches are played. None: the model's own numbers count.
        names: which engines are wanted.
    """

    def __init__(
        self, model: PreTrainedModel, rain: RAIN, requests: Sequence[RecordedRequest] | None, names: Sequence[str]
    ) -> None:
        self.model, self.rain, self.names = model, rain, names
        self.tokenizer = AutoTokenizer.from_pretrained(testbed.WEIGHTS)
        self.codec = make_codec(model, self.tokenizer)
        self.script = None if requests is None else Script(requests)
        self.decoders = {name: self.new_decoder() for name in names if name.startswith("ours")}
        oracle = Oracle() if self.script is None else ScriptedOracle(self.script)
        kinds = {"published": Published, "strong": Strong}
        self.naive: dict[str, Any] = {
            name: kind(model, self.codec, rain, oracle=oracle) for name, kind in kinds.items() if name in names
        }
        self.vanilla = Vanilla(model, self.codec)

    def new_decoder(self) -> raindecode.Decoder:
        """A Decoder with a KV pool of its own, over the same weights."""
        shared = {id(parameter): parameter for parameter in self.model.parameters()}
        return raindecode.Decoder(deepcopy(self.model, shared), self.tokenizer, format=self.rain.format)

    def driven(self, **changes: Any) -> RAIN:
        """The search raindecode is given."""
        return replace(self.rain, **changes) if self.script is None else Driven.by(self.script, self.rain, **changes)

    def warm_up(self) -> None:
        """Answer something short with the model's own numbers: judge's examples are cached where they are kept."""
        rain = replace(self.rain, max_iterations=1, min_new_iterations=1, min_visits=0)
        request = make_request("Hello.", self.codec, rain.format, max_new_tokens=2)
        for decoder in self.decoders.values():
            _only(decoder.stream([request], search=rain, progress=False))
        for engine in self.naive.values():
            with _changed(engine, rain=rain, oracle=Oracle()):
                engine.answer(request)
        self.vanilla.answer(request, num_tokens=2)

    def answer(self, name: str, request: RecordedRequest) -> Row:
        """One engine's answer with what it cost."""
        if name.startswith("ours"):
            width = 1 if name == "ours_width1" else "auto"
            return self._ours(self.decoders[name], request, self.driven(width=width))
        asked = self.request(request)
        if name == "vanilla":
            return _plain(self.vanilla.answer(asked, num_tokens=len(request.answer.token_ids)))
        row = _plain(self.naive[name].answer(asked))
        self.naive[name].forget()  # rows of logits by path: what a request leaves is much on a large vocabulary
        return row

    def together(self, requests: Sequence[RecordedRequest]) -> Row:
        """Many requests at once on a fresh Decoder, and how many answers a second that makes."""
        self.decoders.clear()  # their pools
        decoder = self.new_decoder()
        warm = make_request("Hello.", self.codec, self.rain.format, max_new_tokens=2)
        _only(decoder.stream([warm], search=Sampling(), progress=False))
        asked = [self.request(request) for request in requests]
        began = time.perf_counter()
        found = dict(decoder.stream(asked, search=self.driven(), progress=False))
        seconds = time.perf_counter() - began
        done = [_checked(found[index]) for index in range(len(asked))]
        outcomes = [_outcome(d.token_ids, d.stats.iterations, d.stats.evaluations) for d in done]
        return {
            "requests": len(asked), "seconds": round(seconds, 3), "answers_per_second": round(len(asked) / seconds, 3),
            "tokens_charged": sum(d.stats.tokens_charged for d in done),
            "tokens_processed": sum(d.stats.tokens_processed for d in done), "outcomes": outcomes,
        }  # fmt: skip

    def request(self, request: RecordedRequest) -> Request:
        """As raindecode's Decoder makes it.

        Raises:
            ConfigError: the tokenizer reads the prompt in another way than when it was recorded.
        """
        asked = make_request(
            request.prompt, self.codec, format_of(self.rain, request), max_new_tokens=request.max_new_tokens,
            seed=request.seed,
        )  # fmt: skip
        if list(asked.prompt_ids) != list(request.prompt_ids):
            raise ConfigError(
                f"the testbed's tokenizer gives other tokens for {request.prompt!r} than the workload holds: record the "
                "workloads anew with `python benchmarks/record_workload.py --regime NAME`"
            )
        return asked

    def _ours(self, decoder: raindecode.Decoder, request: RecordedRequest, rain: RAIN) -> Row:
        asked = self.request(request)
        began = time.perf_counter()
        done = _only(decoder.stream([asked], search=rain, progress=False))
        seconds = time.perf_counter() - began
        stats = done.stats
        phases = dict(stats.seconds)
        return {
            "model_steps": stats.model_steps, "tokens": stats.tokens_charged, "needed": stats.tokens_processed,
            "seconds": seconds, "phases": phases | {"search": seconds - sum(phases.values())},
            "model_seconds": phases["model"], "token_ids": done.token_ids, "iterations": stats.iterations,
            "outcome": _outcome(done.token_ids, stats.iterations, stats.evaluations),
        }  # fmt: skip


def _plain(result: Any) -> Row:
    return {
        "model_steps": result.model_steps, "tokens": result.tokens_processed, "seconds": result.seconds,
        "phases": dict(result.meter.seconds), "model_seconds": sum(result.meter.model_seconds.values()),
        "embed_steps": result.meter.steps["embed"], "token_ids": result.token_ids,
        "outcome": _outcome(result.token_ids, result.iterations, result.evaluations),
    }  # fmt: skip


def recorded_outcome(request: RecordedRequest) -> Row:
    """What every engine must come to."""
    answer = request.answer
    return _outcome(answer.token_ids, answer.iterations, answer.evaluations)


def _outcome(token_ids: list[int], iterations: int, evaluations: int) -> Row:
    return {"token_ids": list(token_ids), "iterations": iterations, "evaluations": evaluations}


def _only(outcomes: Iterator[tuple[int, Any]]) -> Any:
    ((_, outcome),) = outcomes
    return _checked(outcome)


def _checked(outcome: Any) -> Any:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


@contextmanager
def _changed(engine: Any, **values: Any) -> Iterator[None]:
    """The engine with other attributes for a while."""
    before = {name: getattr(engine, name) for name in values}
    vars(engine).update(values)
    try:
        yield
    finally:
        vars(engine).update(before)


__all__ = ["ENGINES", "MODELS", "SHAPES", "Engines", "bytes_needed", "check_room", "load_model", "recorded_outcome"]
