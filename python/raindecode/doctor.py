"""What this machine and this installation offer, what would be used, and why. Facts and sentences; no printing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import raindecode
import rainkernels
from raindecode import env, testbed
from raindecode.decoder import Decoder
from raindecode.engine.cuda_graph import BUCKETS
from raindecode.engine.model_runner import ModelRunner
from raindecode.errors import RainDecodeError
from rainkernels import _lanes

Status = Literal["ok", "note", "missing"]
Load = Callable[..., Decoder]

_REPORTED = (RainDecodeError, rainkernels.RainKernelsError)
_EXACT_WORDS = {
    "rows": "on: an answer does not depend on what runs beside it",
    "padded": "on, with every forward padded to a fixed number of rows, which is slower: MKL's strict mode is not active",
    "off": "off: the last bits of a number may change with what runs beside it, and a draw with them",
}


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        status: "missing" when something that is needed is not there; "note" for what is optional or unusual.
        value: plain data for JSON.
        text: the finding in words.
    """

    group: str
    name: str
    status: Status
    value: Any
    text: str


@dataclass(frozen=True)
class Report:
    """All findings. `model_error` is why the model the user named cannot be used."""

    checks: list[Check] = field(default_factory=list)
    model_error: RainDecodeError | rainkernels.RainKernelsError | None = None

    @property
    def missing(self) -> list[Check]:
        return [check for check in self.checks if check.status == "missing"]

    def groups(self) -> dict[str, list[Check]]:
        """Findings by group, in order."""
        found: dict[str, list[Check]] = {}
        for check in self.checks:
            found.setdefault(check.group, []).append(check)
        return found

    def to_json(self) -> dict[str, Any]:
        """{"ok": bool, "missing": [names], "<group>": {"<name>": {"status", "value", "text"}}}."""
        groups = {
            group: {check.name: {"status": check.status, "value": check.value, "text": check.text} for check in checks}
            for group, checks in self.groups().items()
        }
        ok = not self.missing and self.model_error is None
        return {"ok": ok, "missing": [check.name for check in self.missing], **groups}


def examine(model: str | None = None, *, load: Load = Decoder.from_pretrained) -> Report:
    """Look at everything.

    Args:
        model: also load this model, as Decoder.from_pretrained takes it.
        load: how models are loaded.
    """
    checks = [*_versions(), *_machine(), *_gpu(), *_kernels(), *_lane_checks(), *_testbed(load)]
    if model is None:
        return Report(checks)
    try:
        return Report([*checks, *_loaded("model", load(model))])
    except _REPORTED as error:
        return Report(checks, error)


def _versions() -> Iterator[Check]:
    group = "versions"
    yield Check(group, "python", "ok", platform.python_version(), platform.python_version())
    for name, version in (("raindecode", raindecode.__version__), ("rainkernels", rainkernels.__version__)):
        yield Check(group, name, "ok", version, version)
    for name in ("torch", "transformers", "numpy"):
        version = importlib.metadata.version(name)
        yield Check(group, name, "ok", version, version)
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        yield Check(group, "triton", "note", None, "not installed; only its own kernel lanes on a GPU would use it")
    else:
        yield Check(group, "triton", "ok", triton, triton)


def _machine() -> Iterator[Check]:
    group = "machine"
    name = f"{platform.system()} {platform.release()} on {platform.machine()}"
    yield Check(group, "system", "ok", name, name)
    cores = os.cpu_count() or 1
    yield Check(group, "cpu", "ok", {"name": _cpu_name(), "cores": cores}, f"{_cpu_name()}, {_count(cores, 'core')}")
    threads = torch.get_num_threads()
    yield Check(group, "threads", "ok", threads, f"torch and the kernels use {threads} (OMP_NUM_THREADS changes it)")
    total, free = _memory()
    if total is None or free is None:
        yield Check(group, "memory", "note", None, "cannot be read on this system")
    else:
        sizes = {"total_bytes": total, "available_bytes": free}
        yield Check(group, "memory", "ok", sizes, f"{_size(total)}, {_size(free)} available")
    yield _mkl()


def _mkl() -> Check:
    state = os.environ.get("MKL_CBWR")
    if not torch.backends.mkl.is_available():
        text = "torch was built without MKL, so MKL_CBWR does nothing; the probe below says whether exact mode holds"
        return Check("machine", "mkl", "note", state, text)
    if state is None:
        text = "MKL_CBWR is not set: no AVX2 was found, so matrix products may depend on the number of rows"
        return Check("machine", "mkl", "note", state, text)
    if not state.endswith("STRICT"):
        text = f"MKL_CBWR={state} was set outside and is not a strict mode; unset it to let exact mode run unpadded"
        return Check("machine", "mkl", "note", state, text)
    return Check("machine", "mkl", "ok", state, f"MKL_CBWR={state}: matrix products keep their bits whatever the batch")


def _gpu() -> Iterator[Check]:
    driver = _driver_version()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            seen = torch.cuda.get_device_properties(index)
            value = {
                "name": seen.name,
                "memory_bytes": seen.total_memory,
                "capability": f"{seen.major}.{seen.minor}",
                "driver": driver,
            }
            text = f"{seen.name}, {_size(seen.total_memory)}, compute capability {seen.major}.{seen.minor}, driver {driver}"
            yield Check("gpu", f"cuda:{index}", "ok", value, f"{text}: used unless --device cpu is given")
    elif driver is not None:
        built = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        text = f"the NVIDIA driver {driver} is here, but torch ({built}) sees no GPU: install a torch build that fits the driver"
        yield Check("gpu", "cuda", "note", {"driver": driver}, text)
    else:
        yield Check("gpu", "cuda", "note", None, "no NVIDIA driver, no GPU: everything runs on the CPU")


def _kernels() -> Iterator[Check]:
    group = "kernels"
    try:
        native = _lanes.native()
    except rainkernels.LaneError as error:
        yield Check(group, "compiled module", "missing", False, str(error))
        return
    yield Check(group, "compiled module", "ok", True, "rainkernels._C is built and imports")
    yield Check(
        group, "cpu instructions", "ok", native.isa(), f"{native.isa()}: chosen at run time from what this CPU has"
    )
    if native.has_cuda:
        version = native.cuda_runtime_version()
        text = f"compiled in (runtime {version // 1000}.{version % 1000 // 10}); used for tensors on a GPU"
        yield Check(group, "cuda kernels", "ok", version, text)
    else:
        text = (
            "left out of this build (no nvcc, or RAINKERNELS_CUDA=0); on a GPU the plain PyTorch definitions would run"
        )
        yield Check(group, "cuda kernels", "note", None, text)
    forced = os.environ.get("RAINKERNELS_LANE")
    if forced:
        yield Check(
            group, "forced lane", "note", forced, f"RAINKERNELS_LANE={forced} overrides the choice below; for debugging"
        )


def _lane_checks() -> Iterator[Check]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for family in _lanes.FAMILY_LANES:
        for device in devices:
            name = f"{family} on {device}"
            try:
                lane = rainkernels.choose_lane(family, torch.device(device))
            except rainkernels.LaneError as error:
                yield Check("lanes", name, "missing", None, str(error))
                continue
            if lane in ("cpu", "cuda") and not rainkernels.has_native():
                yield Check("lanes", name, "missing", lane, f"{lane}: but the compiled module is not there")
                continue
            status: Status = "note" if lane == "reference" else "ok"
            yield Check("lanes", name, status, lane, f"{lane}: {_why(family, device, lane)}")


def _why(family: str, device: str, lane: str) -> str:
    if os.environ.get("RAINKERNELS_LANE") == lane:
        return "forced by RAINKERNELS_LANE"
    if lane == "reference":
        built = _lanes.FAMILY_LANES[family].get(device, ())
        return f"no kernel for {device} tensors {'in this build' if built else 'is written for this family'}; plain PyTorch"
    return f"the first lane of this family for {device} tensors"


def _testbed(load: Load) -> Iterator[Check]:
    group = "testbed"
    lacking = [
        name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (testbed.WEIGHTS / name).exists()
    ]
    if lacking:
        text = (
            f"the embedded weights lack {', '.join(lacking)}: install again, or run python -m raindecode.testbed.train"
        )
        yield Check(group, "weights", "missing", lacking, text)
        return
    size = _folder_bytes(testbed.WEIGHTS)
    yield Check(group, "weights", "ok", size, f"present, {_size(size)}")
    if (testbed.ADAPTER / "adapter_config.json").exists():
        size = _folder_bytes(testbed.ADAPTER)
        yield Check(group, "adapter", "ok", size, f"present, {_size(size)}")
    else:
        yield Check(
            group, "adapter", "note", None, "absent: nothing but the aligned adapter's own measurements needs it"
        )
    try:
        yield from _loaded(group, load("testbed", device="cpu"))
    except Exception as error:  # whatever is wrong with an installation, a report has to come out
        yield Check(group, "model", "missing", None, f"does not load: {type(error).__name__}: {error}")


def _loaded(group: str, decoder: Decoder) -> Iterator[Check]:
    runner = decoder.engine.runner
    model = runner.model
    weights = sum(p.numel() for p in model.parameters())
    what = {"name": decoder.name, "class": type(model).__name__, "parameters": weights, "dtype": str(model.dtype)}
    dtype = str(model.dtype).removeprefix("torch.")
    words = (
        f"{decoder.name}: {type(model).__name__}, {weights / 1e6:,.1f} million parameters, {dtype} on {runner.device}"
    )
    yield Check(group, "model", "ok", {**what, "device": str(runner.device)}, words)
    slots = decoder.engine.tree.num_slots
    capacity = {"kv_tokens": slots, "bytes_per_token": runner.bytes_per_token, "context": decoder.context_length}
    text = f"room for {slots:,} tokens ({_kv_source()}); context {decoder.context_length:,}"
    yield Check(group, "kv pool", "ok", capacity, text)
    if runner.device.type == "cuda":
        yield _graphs(group, runner)
    status: Status = "ok" if decoder.exact == "rows" else "note"
    text = _EXACT_WORDS[decoder.exact]
    if decoder.exact == "off" and (runner.device.type != "cpu" or model.dtype != torch.float32):
        text = f"off: exact mode is for float32 on a CPU, this is {dtype} on {runner.device}"
    yield Check(group, "exact mode", status, decoder.exact, text)


def _graphs(group: str, runner: ModelRunner) -> Check:
    if runner.graphs is None:
        reason = runner.graphs_obstacle or "cuda_graphs=False (--no-cuda-graphs)"
        return Check(group, "CUDA graphs", "note", False, f"off: {reason}")
    if runner.graphs.failed is not None:
        return Check(group, "CUDA graphs", "note", False, f"off: a capture failed ({runner.graphs.failed})")
    return Check(
        group, "CUDA graphs", "ok", True, f"on: the layers of a step of up to {BUCKETS[-1]} rows are one launch"
    )


def _kv_source() -> str:
    return "sized from memory; --kv-tokens changes it" if env.kv_tokens() is None else "from RAINDECODE_KV_TOKENS"


def _cpu_name() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _memory() -> tuple[int | None, int | None]:
    """Total and available bytes, None where they cannot be read."""
    fields = {line.partition(":")[0]: line.split()[1] for line in _lines("/proc/meminfo") if len(line.split()) > 1}
    total, free = fields.get("MemTotal"), fields.get("MemAvailable")
    return (int(total) * 1024 if total else None), (int(free) * 1024 if free else None)


def _driver_version() -> str | None:
    """Version of the NVIDIA kernel driver, None where there is none."""
    for line in _lines("/proc/driver/nvidia/version"):
        numbers = [word for word in line.split() if word[:1].isdigit() and "." in word]
        if numbers:
            return numbers[0]
    return "unknown" if torch.cuda.is_available() else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
