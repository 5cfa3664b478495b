"""Recorded searches: their files, their replay in every engine and on any weights, and bench_rain.py which runs on them."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "decoder")]

import bench_rain  # noqa: E402
import rain_engines  # noqa: E402
import rain_report  # noqa: E402
from fake_lm import PieceTokenizer, random_llama, random_rain  # noqa: E402
from naive.common import make_codec  # noqa: E402
from naive.published import Published  # noqa: E402
from naive.strong import Strong  # noqa: E402
from rain_engines import ENGINES, Engines, recorded_outcome  # noqa: E402
from record_workload import Counting, Recorder  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from workload import (  # noqa: E402
    FOLDER,
    REGIMES,
    Answer,
    RecordedRequest,
    Workload,
    load_workload,
    request_json,
    settings_of,
)
from workload_replay import Driven, Script, ScriptedOracle  # noqa: E402

from raindecode.cli import main  # noqa: E402
from raindecode.commands import bench  # noqa: E402
from raindecode.decoder import Decoder  # noqa: E402
from raindecode.errors import ConfigError  # noqa: E402
from raindecode.types import Request  # noqa: E402


# ---- recording and replay, on a random Llama --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models() -> tuple[Any, Decoder, Decoder, LlamaForCausalLM]:
    """Tokenizer, the decoder that is recorded, one with other weights, and these weights as they are."""
    model, tokenizer = random_llama(), PieceTokenizer()
    other = deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(torch.randn_like(weight) * 0.1)
    any_tokenizer: Any = tokenizer
    decoders = [Decoder(deepcopy(one), any_tokenizer, kv_tokens=1 << 13) for one in (model, other)]
    return tokenizer, *decoders, other


def record(decoder: Decoder, rain: Any, request: Request) -> RecordedRequest:
    """A search at both widths."""
    recorder = Recorder(rain, list(request.prompt_ids))
    done, ahead = (run(decoder, Driven.by(recorder, rain, width=width), request) for width in (1, "auto"))
    assert (ahead.token_ids, ahead.stats.iterations) == (done.token_ids, done.stats.iterations)
    stats = done.stats
    answer = Answer(
        done.text, done.token_ids, done.finish_reason, done.value, stats.iterations, stats.evaluations,
        stats.tokens_processed, stats.tokens_processed,
    )  # fmt: skip
    return RecordedRequest(
        request.prompt, "", list(request.prompt_ids), request.seed, request.max_new_tokens, 0.5, answer, [],
        recorder.tops, recorder.verdicts, *recorder.leaves(),
    )  # fmt: skip


def run(decoder: Decoder, rain: Any, request: Request) -> Any:
    ((_, done),) = decoder.stream([request], search=rain, progress=False)
    if isinstance(done, BaseException):
        raise done
    return done


@pytest.mark.parametrize("seed", range(3000, 3006))
def test_a_file_drives_every_engine_through_the_search_on_other_weights(seed: int, models: Any, tmp_path: Path) -> None:
    tokenizer, decoder, other, stock = models
    rain, _, options = random_rain(seed)
    rain = replace(rain, max_iterations=min(rain.max_iterations, 12), min_new_iterations=4, record_tree=False)
    options["max_new_tokens"] = min(options["max_new_tokens"], 12)
    (request,) = decoder.requests("H:abc, de\nA:", search=rain, **options)
    recorded = record(decoder, rain, request)
    path = tmp_path / "mixed.json"
    Workload("mixed", {"command": "a test"}, "town", settings_of(rain), [recorded]).save(path)

    loaded = load_workload(path)
    assert [request_json(one) for one in loaded.requests] == [request_json(recorded)]
    assert settings_of(loaded.rain()) == settings_of(rain)
    expected = recorded_outcome(recorded)
    for width in (1, 3, "auto"):
        done = run(other, Driven.by(Script(loaded.requests), rain, width=width), request)
        assert {"token_ids": done.token_ids, "iterations": done.stats.iterations} | {
            "evaluations": done.stats.evaluations
        } == expected
        assert done.stats.tokens_processed == recorded.answer.tokens_processed
        assert (done.text, done.value) == (recorded.answer.text, pytest.approx(recorded.answer.value, abs=1e-9))
    codec = make_codec(stock, tokenizer)
    for kind in (Counting, Strong):
        baseline = kind(stock, codec, rain, oracle=ScriptedOracle(Script(loaded.requests)))
        result = baseline.answer(request)
        assert (result.token_ids, result.iterations, result.evaluations) == tuple(expected.values())
        if isinstance(baseline, Counting):
            assert len(baseline.prefixes) == recorded.answer.tokens_processed


def test_a_search_that_is_not_the_recorded_one_is_refused(models: Any) -> None:
    tokenizer, decoder, _, stock = models
    rain = replace(random_rain(3001)[0], max_iterations=6, min_new_iterations=3)
    (request,) = decoder.requests("H:abc\nA:", search=rain, max_new_tokens=6, seed=1)
    script = Script([record(decoder, rain, request)])
    baseline = Published(stock, make_codec(stock, tokenizer), rain, oracle=ScriptedOracle(script))
    with pytest.raises(ConfigError, match=r"workload does not hold .* record the workloads anew"):
        baseline.answer(replace(request, seed=2))
    assert script.unrecorded == 0
    script.draw(1, 12345)
    assert script.unrecorded == 1
    assert script.draw(1, 12345) == script.draw(1, 12345)  # what stands in is always the same


# ---- files ------------------------------------------------------------------------------------------------------------
def test_the_workloads_that_come_with_the_source() -> None:
    paths = sorted(FOLDER.glob("*.json"))
    assert {path.stem for path in paths} == set(REGIMES)
    assert sum(path.stat().st_size for path in paths) < 3 * 2**20
    seen = set()
    for path in paths:
        workload = load_workload(path)
        assert workload.regime == path.stem
        assert len(workload.requests) >= 8
        for request in workload.requests:
            assert next(name for name, least in REGIMES.items() if request.good >= least) == workload.regime
            assert request.answer.shared_kv_minimum == request.answer.tokens_processed
            assert len(request.answer.token_ids) <= request.max_new_tokens
            assert sum(len(move["tokens"]) for move in request.moves) == len(request.answer.token_ids)
            seen.add((request.prompt, request.prefix, request.seed))
    assert len(seen) == sum(len(load_workload(path).requests) for path in paths)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2; allowed: 1"),
        ({"version": None}, "version None; allowed: 1"),
        ({"format": "something"}, "no workload; allowed: .*raindecode-rain-workload"),
        ({"regime": "sunny"}, "regime 'sunny'; allowed: safe, mixed, harmful"),
        ({"requests": []}, "holds no request"),
        ({"requests": [{}]}, "damaged .KeyError"),
        ({"settings": {"top_k": -1}}, "damaged .*top_k"),
        ({"settings": {"topk": 1}}, "damaged .*topk"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_typed_error(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    data = json.loads((FOLDER / "safe.json").read_text(encoding="utf-8"))
    path = tmp_path / "safe.json"
    path.write_text(json.dumps(data | change), encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as raised:
        load_workload(path)
    assert "record_workload.py" in str(raised.value)


def test_broken_files_are_typed_errors(tmp_path: Path) -> None:
    text = (FOLDER / "safe.json").read_text(encoding="utf-8")
    data = json.loads(text)
    data["requests"][0]["vectors"] = data["requests"][1]["vectors"]
    cases = {
        "cannot be read .*char": text[:1000],
        "is no workload": "[1]",
        "damaged .*numbers in its vectors": json.dumps(data),
    }
    for said, content in cases.items():
        path = tmp_path / "safe.json"
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=said):
            load_workload(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_workload(tmp_path / "missing.json")


# ---- the engines of the benchmark -------------------------------------------------------------------------------------
def test_all_engines_go_through_a_recorded_search_on_random_weights() -> None:
    workload = load_workload(FOLDER / "safe.json")
    request = min(workload.requests, key=lambda one: one.answer.tokens_processed)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    engines = Engines(model, workload.rain(), [request], ENGINES)
    engines.warm_up()
    found = {name: engines.answer(name, request) for name in ENGINES}
    assert bench_rain.same(engines, request, found)
    for name in ("ours", "ours_width1", "published", "strong"):
        assert found[name]["outcome"] == recorded_outcome(request)
    assert len(found["vanilla"]["token_ids"]) == len(request.answer.token_ids)
    assert 0 < found["ours_width1"]["tokens"] <= found["ours"]["needed"]
    assert engines.script is not None
    assert engines.script.unrecorded == 0
    # Weights are shared, not copied.
    inside = next(engines.decoders["ours"].engine.runner.model.parameters())
    assert inside.data_ptr() == next(model.parameters()).data_ptr()
    found["strong"]["outcome"] = found["strong"]["outcome"] | {"iterations": 1}
    assert not bench_rain.same(engines, request, found)


def test_the_memory_a_model_needs_is_checked_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = load_workload(FOLDER / "safe.json").requests
    cpu = torch.device("cpu")
    needs = {
        name: rain_engines.bytes_needed(name, torch.float32, requests, ENGINES) for name in ("25m", "110m", "1b", "7b")
    }
    assert list(needs.values()) == sorted(needs.values())
    assert needs["7b"] > 4 * 6.7e9
    assert rain_engines.bytes_needed("7b", torch.bfloat16, requests, ENGINES) < needs["7b"]
    monkeypatch.setattr(rain_engines, "bytes_free", lambda device: 8 * 2**30)
    rain_engines.check_room("25m", cpu, torch.float32, needs["25m"])
    with pytest.raises(ConfigError, match=r"'7b' needs about \d\d\.\d GiB in float32.* 8\.0 GiB are free.*bfloat16"):
        bench_rain.main(["--model", "7b", "--regime", "safe"])
    monkeypatch.undo()
    assert rain_engines.bytes_free(cpu) > 0


# ---- bench_rain.py and `raindecode bench rain` ------------------------------------------------------------------------
def test_bench_rain_checks_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rain.json"
    with pytest.raises(SystemExit) as ended:
        main(["bench", "rain", "--regime", "safe", "--requests", "1", "--together", "1", "--json", str(path)])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads(path.read_text(encoding="utf-8"))
    assert (record["model"], record["driven_by"], record["same"]) == ("testbed", "workloads", True)
    assert list(record["regimes"]) == ["safe"]
    regime = record["regimes"]["safe"]
    assert regime["requests"] == 1
    steps, tokens, seconds = (regime[key] for key in ("model_steps", "tokens_processed", "seconds"))
    assert steps["vanilla"] < steps["ours"] < steps["ours_width1"] < steps["strong"] < steps["published"]
    assert (
        tokens["shared_kv_minimum"] == tokens["ours"] <= tokens["ours_charged"] < tokens["strong"] < tokens["published"]
    )
    assert set(seconds) == set(ENGINES)
    assert min(seconds.values()) > 0
    assert set(regime["phases"]["ours"]) == {"plan", "model", "sample", "search"}
    assert sum(regime["phases"]["strong"].values()) == pytest.approx(seconds["strong"], rel=0.01, abs=1e-3)
    assert regime["ratios"]["published"]["model_steps"] == pytest.approx(steps["published"] / steps["ours"], abs=1e-3)
    assert record["together"]["same"] is True
    for word in ("shared-KV minimum", "published", "answers a second"):
        assert word in out


def test_live_runs_agree_without_a_recording(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_rain.main(["--live", "--regime", "safe", "--requests", "1", "--without", "published"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["same"], record["driven_by"]) == (True, "the model")
    assert "published" not in record["regimes"]["safe"]["seconds"]
    assert "unrecorded" not in record


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "8b"], "--model is '8b'; allowed: testbed, 25m, 110m, 1b, 7b"),
        (["--regime", "sunny"], "--regime is 'sunny'; allowed: safe, mixed, harmful, all"),
        (["--dtype", "int8"], "--dtype is 'int8'; allowed: float32"),
        (["--device", "tpu"], "--device is 'tpu'; allowed: cpu"),
        (["--requests", "0"], "--requests is 0; allowed: a whole number from 1"),
        (["--requests", "99", "--regime", "safe"], "--requests is 99; allowed: 1 to 8"),
        (["--threads", "0"], "--threads is 0; allowed: a whole number from 1"),
        (["--together", "99", "--regime", "safe"], "--together is 99; allowed: 0 to"),
        (["--without", "ours"], "--without is 'ours'; allowed: ours_width1, published, strong, vanilla"),
        (["--live", "--model", "25m"], "--live with --model 25m"),
        (["--json", "/no/such/folder/x.json"], "cannot be written"),
        (["--workloads", "/no/such/folder"], "the workload /no/such/folder/safe.json cannot be read"),
        (["--benchmarks", "/no/such/folder"], "there is no /no/such/folder/bench_rain.py"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "rain", *words])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert "error: " in err
    assert said in err


def test_help_shows_the_options_of_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "rain", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for word in (
        "usage: raindecode bench rain",
        "--together N",
        "--plot FILE.png",
        "raindecode bench rain --model 110m",
    ):
        assert word in out


def test_an_installation_without_the_checkout_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench.raindecode, "__file__", str(tmp_path / "site-packages" / "raindecode" / "__init__.py"))
    with pytest.raises(ConfigError, match=r"installed without its benchmarks.*--benchmarks CHECKOUT/benchmarks"):
        bench.benchmark_script("bench_rain.py", None)
    assert bench.benchmark_script("bench_rain.py", str(ROOT / "benchmarks")) == ROOT / "benchmarks" / "bench_rain.py"


# ---- the plot ---------------------------------------------------------------------------------------------------------
def plain_record() -> dict[str, Any]:
    ratios = {
        name: {"model_steps": 2.0, "tokens_processed": 3.0, "seconds": 1.5}
        for name in ("published", "strong", "vanilla")
    }
    return {
        "model": "testbed", "device": "cpu", "dtype": "float32", "threads": 1,
        "regimes": {name: {"ratios": ratios} for name in REGIMES},
    }  # fmt: skip


def test_without_matplotlib_a_plot_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'rainkernels\[bench\]'"):
        bench_rain.main(["--plot", str(tmp_path / "rain.png")])


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "rain.png"
    rain_report.plot(plain_record(), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        rain_report.plot(plain_record(), tmp_path / "rain.nonsense")


def test_the_plot_draws_every_engine_in_every_regime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a stand-in for matplotlib, which need not be installed."""
    drawn: list[tuple[str, list[float]]] = []
    titles: list[str] = []

    class Axis:
        def bar(self, places: Any, heights: list[float], width: float, *, label: str, color: str) -> None:
            assert len(places) == len(heights) == len(REGIMES)
            drawn.append((label, heights))

        def set_title(self, title: str) -> None:
            titles.append(title)

        def __getattr__(self, _name: str) -> Any:
            return lambda *arguments, **options: None

    class Figure:
        def suptitle(self, title: str) -> None:
            titles.append(title)

        def savefig(self, path: Path, dpi: int) -> None:
            path.write_bytes(b"drawn")

    class Pyplot:
        def subplots(self, rows: int, columns: int, **_: Any) -> tuple[Figure, list[Axis]]:
            return Figure(), [Axis() for _ in range(rows * columns)]

        def close(self, figure: Figure) -> None: ...

    monkeypatch.setattr(rain_report, "require_matplotlib", Pyplot)
    rain_report.plot(plain_record(), tmp_path / "rain.png")
    assert drawn == [(name, [value] * 3) for value in (2.0, 3.0, 1.5) for name in ("published", "strong", "vanilla")]
    assert titles[-1] == "one RAIN answer, testbed (cpu, float32, 1 threads)"
    assert (tmp_path / "rain.png").read_bytes() == b"drawn"
