"""bench_dera.py: its baselines against each other, its check, its record, and `raindecode bench dera`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_dera  # noqa: E402
import dera_engines  # noqa: E402
from bench_dera import ENGINES, summary, timed  # noqa: E402
from decode_models import build_model  # noqa: E402
from dera_engines import RECOMPUTE, Engines, bytes_needed, load_shape, merged_model, save_random_adapter  # noqa: E402
from naive.dera import Notebook, Single, TwoModels, mixed  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from raindecode.cli import main  # noqa: E402
from raindecode.commands import bench  # noqa: E402
from raindecode.errors import ConfigError  # noqa: E402

CPU = torch.device("cpu")
WEIGHT = 1.6
PROMPT = list(range(40, 3, -1))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedModel, Path]:
    """Reference, aligned model, and the adapter between them."""
    folder = tmp_path_factory.mktemp("adapter")
    reference = build_model("tiny", CPU, torch.float32)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)  # logits far apart, so that greedy choices are sure
    save_random_adapter(reference, folder, 4)
    return reference, merged_model(reference, folder), folder


def greedy(models: list[PreTrainedModel], weights: list[float], count: int) -> list[int]:
    """Without a cache, the whole prefix every time."""
    tokens = list(PROMPT)
    with torch.inference_mode():
        for _ in range(count):
            rows = [m(torch.tensor([tokens]), use_cache=False).logits[0, -1] for m in models]
            tokens.append(int(sum(w * row for w, row in zip(weights, rows, strict=True)).argmax()))  # type: ignore[union-attr]
    return tokens[len(PROMPT) :]


# ---- the baselines ----------------------------------------------------------------------------------------------------
def test_the_adapter_is_merged_and_matters(pair: tuple[PreTrainedModel, PreTrainedModel, Path]) -> None:
    reference, aligned, _ = pair
    changed = [
        name
        for (name, p), q in zip(reference.named_parameters(), aligned.parameters(), strict=True)
        if not torch.equal(p, q)
    ]
    assert len(changed) == 7 * reference.config.num_hidden_layers
    assert all(name.endswith("proj.weight") for name in changed)
    for name in changed:
        before, after = reference.get_parameter(name), aligned.get_parameter(name)
        assert 0.2 < float(((after - before).std() / before.std()).detach()) < 0.4, name
    assert greedy([reference], [1.0], 8) != greedy([reference, aligned], [1 - WEIGHT, WEIGHT], 8)


def test_baselines_decode_the_mixture(pair: tuple[PreTrainedModel, PreTrainedModel, Path]) -> None:
    reference, aligned, _ = pair
    expected = greedy([reference, aligned], [1 - WEIGHT, WEIGHT], 8)
    two = TwoModels(reference, aligned, WEIGHT)
    for engine in (two, Notebook(reference, aligned, WEIGHT), Notebook(reference, aligned, WEIGHT, use_cache=False)):
        for _ in range(2):  # again, with what the first time left in the caches
            stamps: list[int] = []
            assert engine.decode(PROMPT, 8, lambda stamps=stamps: stamps.append(1)) == expected  # type: ignore[misc]
            assert len(stamps) == 8
    assert two.decode(PROMPT[:5], 3, lambda: None) != expected[:3]
    assert two.decode(PROMPT, 8, lambda: None) == expected
    assert Single(aligned).decode(PROMPT, 8, lambda: None) == greedy([aligned], [1.0], 8)


def test_the_notebook_keeps_a_cache_unless_told_not_to(
    pair: tuple[PreTrainedModel, PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, aligned, _ = pair
    rows: list[int] = []
    monkeypatch.setattr(
        reference, "forward", lambda ids, f=reference.forward, **k: (rows.append(ids.shape[1]), f(ids, **k))[1]
    )
    Notebook(reference, aligned, WEIGHT).decode(PROMPT, 3, lambda: None)
    assert rows == [len(PROMPT), 1, 1]
    rows.clear()
    Notebook(reference, aligned, WEIGHT, use_cache=False).decode(PROMPT, 3, lambda: None)
    assert rows == [len(PROMPT), len(PROMPT) + 1, len(PROMPT) + 2]


def test_two_models_draw_from_the_mixture(pair: tuple[PreTrainedModel, PreTrainedModel, Path]) -> None:
    reference, aligned, _ = pair
    two = TwoModels(reference, aligned, WEIGHT)
    with torch.inference_mode():
        two.rewind(PROMPT)
        expected = (two.logits(PROMPT[-1]) / 2).softmax(-1)
    draws = [two.decode(PROMPT, 1, lambda: None, temperature=2.0, seed=seed)[0] for seed in range(300)]
    likely = int(expected.argmax())
    spread = float((expected[likely] * (1 - expected[likely]) / 300) ** 0.5)
    assert abs(draws.count(likely) / 300 - float(expected[likely])) < 4 * spread
    assert draws[:20] == [two.decode(PROMPT, 1, lambda: None, temperature=2.0, seed=s)[0] for s in range(20)]


def test_mixing_is_linear() -> None:
    aligned, reference = torch.tensor([1.0, 4.0]), torch.tensor([3.0, -2.0])
    for weight in (0.0, 0.3, 1.0, 2.5):
        torch.testing.assert_close(mixed(weight, aligned, reference), weight * aligned + (1 - weight) * reference)


# ---- the engines and their check --------------------------------------------------------------------------------------
def test_a_wrong_engine_is_found(pair: tuple[PreTrainedModel, PreTrainedModel, Path]) -> None:
    reference, _, folder = pair
    tokenizer = type("Tokenizer", (), {"__len__": lambda self: 320})()
    engines = Engines(
        reference, tokenizer, folder, weight=WEIGHT, names=["two_models_transformers"], prompt=PROMPT, longest=8
    )
    tokens, logprobs = engines.decode("two_models_transformers", 8, lambda: None)
    assert logprobs is None
    found = engines.check("two_models_transformers", tokens, None)
    assert found["ok"]
    assert found["margin"] <= found["allowed"] == 1e-3
    with torch.inference_mode():
        rows = mixed(WEIGHT, engines._rows(engines.aligned, tokens), engines._rows(reference, tokens)).log_softmax(-1)
    right = [float(row[token]) for row, token in zip(rows, tokens, strict=True)]
    assert engines.check("lora_pair", tokens, right)["logprob_error"] < 1e-4
    # The reference's own choices, another lambda, one token too many to the right, and wrong numbers.
    assert not engines.check("lora_pair", greedy([reference], [1.0], 8), None)["ok"]
    other = TwoModels(reference, engines.aligned, 0.2).decode(PROMPT, 8, lambda: None)
    assert not engines.check("lora_pair", other, None)["ok"]
    assert not engines.check("lora_pair", [*tokens[1:], tokens[0]], None)["ok"]
    assert not engines.check("lora_pair", tokens, [right[0] + 0.01, *right[1:]])["ok"]
    assert engines.check("single", greedy([reference], [1.0], 8), None)["ok"]


def test_every_shape_has_a_word_for_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dera_engines, "build_model", lambda name, *rest: build_model("tiny", *rest))
    model, tokenizer = load_shape("25m", CPU, torch.float32)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.decode([5, 319]) == "w5 w319"
    assert bytes_needed("7b", torch.bfloat16) > 4 * 6.7e9


def test_steps_are_the_times_between_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([5.0, 5.5, 7.0, 7.25])
    monkeypatch.setattr(bench_dera.time, "perf_counter", lambda: next(clock))

    class Engine:
        def decode(self, name: str, count: int, stamp: Any) -> None:
            assert (name, count) == ("lora_pair", 4)
            for _ in range(count):
                stamp()

    assert timed(Engine(), "lora_pair", 3) == [0.5, 1.5, 0.25]  # type: ignore[arg-type]


def test_medians_and_ratios() -> None:
    found = summary({"lora_pair": [[1e-3, 2e-3, 3e-3], [2e-3]], "two_models": [[4e-3, 4e-3, 4e-3], [6e-3]]})
    assert found["step_ms"] == {"lora_pair": 2.0, "two_models": 4.0}
    assert found["ratios"] == {"two_models / lora_pair": {"median": 2.5, "q1": 2.25, "q3": 2.75}}


# ---- the whole --------------------------------------------------------------------------------------------------------
def test_bench_dera_checks_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dera.json"
    options = ["--rounds", "2", "--steps", "5", "--context", "24", "--recompute", "--json", str(path)]
    with pytest.raises(SystemExit) as ended:
        main(["bench", "dera", *options])
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads(path.read_text(encoding="utf-8"))
    assert (record["op"], record["shape"], record["context"], record["same"]) == ("dera", "testbed", 24, True)
    assert set(record["step_ms"]) == {*ENGINES, RECOMPUTE} == set(record["checked"])
    assert min(record["step_ms"].values()) > 0
    for name, found in record["checked"].items():
        assert found["ok"]
        assert (found["logprob_error"] is None) == (name not in ("single", "lora_pair", "two_models"))
    assert record["checked"]["lora_pair"]["tokens_of_two_models"]
    assert record["checked"]["notebook"]["tokens_of_two_models"]
    assert {"two_models / lora_pair", "lora_pair / single", "notebook / lora_pair"} <= set(record["ratios"])
    assert "two_models / lora_pair" in out


def test_wrong_tokens_end_in_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Single, "decode", lambda self, prompt, count, stamp: [7] * count)
    others = [word for name in ENGINES if name != "two_models_transformers" for word in ("--without", name)]
    assert bench_dera.main(["--steps", "2", "--rounds", "1", "--context", "8", *others]) == 1
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert (record["same"], record["step_ms"]) == (False, {}), "wrong engines are not timed"
    assert "WRONG" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shape", "8b"], "--shape is '8b'; allowed: testbed, 25m, 110m, 1b, 7b"),
        (["--shape", "7b"], "--shape 7b with --device cpu: it takes a GPU"),
        (["--dtype", "int8"], "--dtype is 'int8'; allowed: float32"),
        (["--device", "tpu"], "--device is 'tpu'; allowed: cpu"),
        (["--context", "1"], "--context is 1; allowed: a whole number from 2"),
        (["--context", "1020"], "--context is 1020; allowed with --steps 16: 2 to 1007"),
        (["--rank", "0"], "--rank is 0; allowed: a whole number from 1"),
        (["--weight", "1"], "--weight is 1; allowed: above 0"),
        (["--weight", "-2"], "--weight is -2; allowed: above 0"),
        (["--without", "ours"], "--without is 'ours'; allowed: single, lora_pair"),
        ([word for name in ENGINES for word in ("--without", name)], "leaves no engine"),
        (["--json", "/no/such/folder/x.json"], "cannot be written"),
        (["--benchmarks", "/no/such/folder"], "there is no /no/such/folder/bench_dera.py; clone the source"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "dera", *words])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert said in err


def test_help_shows_the_options_of_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "dera", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for word in ("usage: raindecode bench dera", "lora_pair", "--recompute", "raindecode bench dera --shape 110m"):
        assert word in out


def test_an_installation_without_the_checkout_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench.raindecode, "__file__", str(tmp_path / "site-packages" / "raindecode" / "__init__.py"))
    with pytest.raises(ConfigError, match="raindecode bench dera --benchmarks CHECKOUT/benchmarks"):
        bench.benchmark_script("bench_dera.py", None)
