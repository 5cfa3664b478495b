"""scripts/hf_kernels.py: the layout loads with the real `kernels` package and computes what rainkernels computes."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rainkernels.ops import edits, logits
from rainkernels.testing import cases_edits, cases_logits

kernels = pytest.importorskip("kernels", reason="Hugging Face's package kernels is not installed")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "hf_kernels.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hf_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels") / "rainkernels"
    script().lay_out(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(repository: Path) -> Any:
    return kernels.get_local_kernel(repository, backend="cpu")


def case(cases: Any, name: str) -> Any:
    return next(one for one in cases if one.id == name)


@pytest.mark.parametrize("name", ["tiles", "bias", "plausibility", "eight-models"])
def test_mixing_and_drawing(loaded: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    i = case(cases_logits.CASES, name).make(torch.float32)
    got, measured = loaded.mix_sample(i.logits, i.weights, stats=True, **i.options)
    monkeypatch.setenv("RAINKERNELS_LANE", "reference")
    expected, theirs = logits.mix_sample(i.logits, i.weights, stats=True, **i.options)
    pairs = zip((*got, *measured), (*expected, *theirs), strict=True)
    assert all(torch.equal(a, b) or (a.isnan() == b.isnan()).all() for a, b in pairs)
    assert torch.equal(got.token, expected.token)
    assert len(set(got.token.tolist())) > 1


def test_ranks(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, aligned = torch.randn(2, 4, 300, generator=torch.Generator().manual_seed(0))
    token = torch.tensor([0, 7, 299, 5])
    got = loaded.rank(base, aligned, token)
    monkeypatch.setenv("RAINKERNELS_LANE", "reference")
    assert all(torch.equal(a, b) for a, b in zip(got, logits.rank(base, aligned, token), strict=True))


@pytest.mark.parametrize("name", ["all-ops", "basis"])
def test_edits(loaded: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    i = case(cases_edits.CASES, name).make(torch.float32)
    kind = type(i.table).__name__
    table = getattr(loaded, kind)(**{n: t for n, t in vars(i.table).items() if not n.startswith("_")})
    x, residual = i.x.clone(), i.residual.clone()
    loaded.edit_(x, table, i.slots)
    normed = loaded.add_edit_rmsnorm(i.x, residual, i.weight, table, i.slots, eps=1e-6).normed
    assert not torch.equal(x, i.x)
    monkeypatch.setenv("RAINKERNELS_LANE", "reference")
    theirs, added = i.x.clone(), i.residual.clone()
    edits.edit_(theirs, i.table, i.slots)
    assert torch.equal(x, theirs)
    assert torch.equal(normed, edits.add_edit_rmsnorm(i.x, added, i.weight, i.table, i.slots, eps=1e-6).normed)
    assert torch.equal(residual, added)


def test_its_ops_have_a_namespace_of_their_own(loaded: Any, repository: Path) -> None:
    identities = [
        json.loads((repository / "build" / f"torch-{backend}" / "metadata.json").read_text())["id"]
        for backend in ("cpu", "cuda")
    ]
    assert loaded.__name__ == identities[0] != identities[1]
    mine = getattr(torch.ops, identities[0])
    x = torch.randn(3, 8)
    plain = torch.ops.rainkernels.add_edit_rmsnorm(x, torch.zeros_like(x), torch.ones(8), 1e-6)
    torch.testing.assert_close(mine.add_edit_rmsnorm(x, torch.zeros_like(x), torch.ones(8), 1e-6), plain)
    inside = [name for name in sys.modules if name.startswith(identities[0] + ".")]
    assert f"{identities[0]}.ops.edits" in inside
    assert loaded.edit_.__module__ == f"{identities[0]}.ops.edits"


@pytest.mark.parametrize("family", ["logits", "edits"])
def test_the_triton_modules_are_those_of_the_package(loaded: Any, family: str) -> None:
    """Every configuration that is compiled ahead of time there is there here, of functions of the layout's own."""
    pytest.importorskip("triton", reason="triton is not installed")
    mine = importlib.import_module(f"{loaded.__name__}.triton.{family}").aot_kernels()
    package = importlib.import_module(f"rainkernels.triton.{family}").aot_kernels()
    assert [one.name for one in mine] == [one.name for one in package]
    assert all(one.fn.fn.__module__.startswith(f"{loaded.__name__}.triton.") for one in mine)
    assert [one.fn.src for one in mine] == [one.fn.src for one in package]


@kernels.use_kernel_forward_from_hub("RainRMSNorm")
class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        share = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (hidden_states * share)


@kernels.use_kernel_forward_from_hub("RainDeRaSample")
class Likeliest(nn.Module):
    def forward(
        self, reference: Tensor, aligned: Tensor, weight: Tensor, temperature: Tensor, seed: Tensor, position: Tensor
    ) -> Tensor:
        return torch.lerp(reference, aligned, weight[:, None]).argmax(-1).int()


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_take_the_place_of_modules(repository: Path, compiled: bool) -> None:
    torch.manual_seed(0)
    norm, sample = Norm(16), Likeliest()
    x, rows = torch.randn(2, 5, 16), torch.randn(2, 3, 50)
    draw = (torch.tensor([0.0, 0.5, 1.0]), torch.zeros(3), torch.arange(3), torch.zeros(3, dtype=torch.int64))
    with torch.no_grad():
        expected, token = norm(x), sample(*rows, *draw)
    mapping = {
        f"Rain{name}": {"cpu": kernels.LocalLayerRepository(repo_path=repository, layer_name=name)}
        for name in ("RMSNorm", "DeRaSample")
    }
    mode = kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE if compiled else kernels.Mode.INFERENCE
    both = nn.ModuleList([norm, sample]).eval()
    with kernels.use_kernel_mapping(mapping):
        norm, sample = kernels.kernelize(both, mode=mode, device="cpu", use_fallback=False)
    assert all("layers" in one.forward.__func__.__module__ for one in (norm, sample))
    if compiled:
        norm = torch.compile(norm, fullgraph=True, backend="aot_eager")
        sample = torch.compile(sample, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected)
        assert torch.equal(sample(*rows, *draw), token)
        warm = sample(*rows, draw[0], torch.ones(3), *draw[2:])
    assert warm.shape == (3,)
    assert all(0 <= t < 50 for t in warm.tolist())


def test_the_builders_description_is_valid(repository: Path) -> None:
    from kernels._rust import Backend, Build

    assert Build.open(repository).all_kernel_depends(Backend.CUDA) == []
    assert not (repository / "torch-ext" / "rainkernels" / "_ops.py").exists()
    assert (repository / "torch-ext" / "rainkernels" / "triton" / "edits.py").read_text() == (
        repository / "build" / "torch-cuda" / "triton" / "edits.py"
    ).read_text()


def test_a_second_run_gives_the_same_files(repository: Path, tmp_path: Path) -> None:
    tmp_path /= "with spaces"
    script().lay_out(tmp_path)
    (tmp_path / "build" / "stale.py").write_text("")
    script().lay_out(tmp_path)
    kept = {
        path.relative_to(folder): path.read_text()
        for folder in (repository, tmp_path)
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    for path, text in kept.items():
        assert (repository / path).read_text() == (tmp_path / path).read_text() == text


@pytest.mark.parametrize("part", ["build", "torch-ext"])
def test_a_build_folder_of_something_else_is_left_alone(tmp_path: Path, part: str) -> None:
    (tmp_path / part).mkdir()
    (tmp_path / part / "mine.o").write_text("mine")
    (tmp_path / "build.toml").write_text("[something]")
    with pytest.raises(SystemExit, match="not of this script"):
        script().lay_out(tmp_path)
    assert (tmp_path / part / "mine.o").read_text() == "mine"
    assert (tmp_path / "build.toml").read_text() == "[something]"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_triton_kernels_run(repository: Path) -> None:
    loaded = kernels.get_local_kernel(repository, backend="cuda")
    i = case(cases_logits.CASES, "tiles").make(torch.float32, "cuda")
    got, _ = loaded.mix_sample(i.logits, i.weights, **i.options)
    expected, _ = logits.mix_sample(i.logits, i.weights, **i.options)
    assert torch.equal(got.token, expected.token)
