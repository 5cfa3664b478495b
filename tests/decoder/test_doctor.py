"""The environment report: what it finds, what it calls missing, and how it ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from cli_models import save_llama

import rainkernels
from raindecode import doctor, testbed
from raindecode.cli import main
from rainkernels import _lanes
from rainkernels.errors import LaneError

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def embedded(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    """The small random model in place of the embedded one, and no settings from outside."""
    monkeypatch.setattr(testbed, "WEIGHTS", llama)
    monkeypatch.setenv("RAINDECODE_KV_TOKENS", "1024")
    monkeypatch.delenv("RAINKERNELS_LANE", raising=False)


def run(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *words])
    out, err = capfd.readouterr()
    return int(ended.value.code or 0), out, err


def report(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code, out, _ = run(capfd, "--json", *words)
    assert len(out.splitlines()) == 1
    return code, json.loads(out)


def test_everything_is_here(capfd: pytest.CaptureFixture[str]) -> None:
    code, found = report(capfd)
    assert (code, found["ok"], found["missing"]) == (0, True, [])
    assert found["versions"]["torch"]["value"] == torch.__version__
    assert found["versions"]["rainkernels"]["value"] == rainkernels.__version__
    assert found["kernels"]["cpu instructions"]["value"] == _lanes.native().isa()
    assert found["machine"]["threads"]["value"] == torch.get_num_threads()
    assert found["testbed"]["kv pool"]["value"]["kv_tokens"] == 1024
    assert "RAINDECODE_KV_TOKENS" in found["testbed"]["kv pool"]["text"]
    assert found["testbed"]["exact mode"]["value"] in ("rows", "padded")
    for family in _lanes.FAMILY_LANES:
        assert found["lanes"][f"{family} on cpu"]["value"] == rainkernels.choose_lane(family, torch.device("cpu"))


def test_report_for_people(capfd: pytest.CaptureFixture[str], llama: Path) -> None:
    code, out, err = run(capfd, "--model", str(llama))
    assert (code, err) == (0, "")
    for text in ("versions", "lanes", "tree on cpu", "exact mode", "everything that is needed is here"):
        assert text in out
    assert f"{llama}: LlamaForCausalLM" in out


def test_missing_weights(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(testbed, "WEIGHTS", tmp_path)
    code, found = report(capfd)
    assert (code, found["ok"], found["missing"]) == (1, False, ["weights"])
    assert "model.safetensors" in found["testbed"]["weights"]["text"]
    code, out, _ = run(capfd)
    assert code == 1
    assert out.splitlines()[-1] == "1 missing: weights"


def test_broken_weights(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Path
) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    monkeypatch.setattr(testbed, "WEIGHTS", tmp_path)
    code, found = report(capfd)
    assert (code, found["missing"]) == (1, ["model"])


def test_missing_compiled_module(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> object:
        raise LaneError("the compiled module rainkernels._C cannot be imported: build it")

    monkeypatch.setattr(_lanes, "native", absent)
    code, found = report(capfd)
    assert code == 1
    assert found["missing"][:2] == ["compiled module", "tree on cpu"]
    assert "build it" in found["kernels"]["compiled module"]["text"]


def test_forced_lanes(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAINKERNELS_LANE", "reference")
    checks = {check.name: check for check in doctor._lane_checks()}
    assert checks["tree on cpu"].value == "reference"
    assert "forced by RAINKERNELS_LANE" in checks["tree on cpu"].text
    monkeypatch.setenv("RAINKERNELS_LANE", "gpu")
    code, found = report(capfd)
    assert code == 1
    assert "tree on cpu" in found["missing"]
    assert "RAINKERNELS_LANE='gpu'" in found["lanes"]["tree on cpu"]["text"]


def test_unknown_model(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, "--model", "/no/such/model")
    assert code == 2
    assert "everything" in out
    assert err.startswith("error: there is no folder '/no/such/model'")
    assert len(err.splitlines()) == 1
    code, found = report(capfd, "--model", "/no/such/model")
    assert (code, found["ok"]) == (2, False)


@pytest.mark.parametrize(
    ("state", "status", "said"),
    [("AVX512,STRICT", "ok", "keep their bits"), ("AVX2", "note", "not a strict mode"), (None, "note", "is not set")],
)
def test_mkl_state(monkeypatch: pytest.MonkeyPatch, state: str | None, status: str, said: str) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.delenv("MKL_CBWR", raising=False)
    if state is not None:
        monkeypatch.setenv("MKL_CBWR", state)
    check = doctor._mkl()
    assert (check.status, check.value) == (status, state)
    assert said in check.text


@CPU_ONLY
@pytest.mark.parametrize(("driver", "said"), [(None, "no NVIDIA driver"), ("570.1", "the NVIDIA driver 570.1 is here")])
def test_gpu_sentences(monkeypatch: pytest.MonkeyPatch, driver: str | None, said: str) -> None:
    monkeypatch.setattr(doctor, "_driver_version", lambda: driver)
    (check,) = doctor._gpu()
    assert check.status == "note"
    assert said in check.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_is_named() -> None:
    check = next(iter(doctor._gpu()))
    assert check.status == "ok"
    assert torch.cuda.get_device_name(0) in check.text


@CPU_ONLY
def test_driver_version_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build", "GCC version: 12.2"]
    monkeypatch.setattr(doctor, "_lines", lambda path: lines)
    assert doctor._driver_version() == "570.86.15"
    monkeypatch.setattr(doctor, "_lines", lambda path: [])
    assert doctor._driver_version() is None
