"""bench_urial.py and urial_combinations.py: engines, counters, goals, records, tables, and `raindecode bench urial`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_urial  # noqa: E402
import urial_combinations  # noqa: E402
from bench_urial import goals, ratios, summary  # noqa: E402
from naive.urial import Answer, Published  # noqa: E402
from preset_runs import Sizes  # noqa: E402
from rain_engines import load_model  # noqa: E402
from readme_tables import NONE, full_records  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from urial_combinations import ARMS  # noqa: E402
from urial_engines import ENGINES, OWN, PREFIX, Engines, bytes_needed, constant_prompt, kv_tokens  # noqa: E402
from urial_tables import combinations, first_tokens, together  # noqa: E402

from raindecode import URIAL, testbed  # noqa: E402
from raindecode.cli import main  # noqa: E402
from raindecode.evaluation import Rate  # noqa: E402

CPU = torch.device("cpu")
RECORD = ROOT / "benchmarks" / "results" / "urial-testbed.json"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    tokenizer = AutoTokenizer.from_pretrained(testbed.WEIGHTS)
    file = tmp_path_factory.mktemp("prefix") / "prefix.safetensors"
    format = constant_prompt(tokenizer, 150)
    return Engines(load_model("testbed", CPU, torch.float32), tokenizer, format, file, rows=3, new_tokens=8)


# ---- prompt and queries ------------------------------------------------------------------------------------------------
def test_the_prompt_is_about_as_long_as_asked_for() -> None:
    tokenizer = AutoTokenizer.from_pretrained(testbed.WEIGHTS)
    made = constant_prompt(tokenizer, 1000)
    assert 960 <= len(tokenizer(made.prefix)["input_ids"]) <= 1000
    assert made == constant_prompt(tokenizer, 1000)
    exchanges = made.prefix.strip().split("\n\n")[1:]
    assert len(exchanges) > 10
    assert all(one.startswith("Human: ") and "\nAssistant: " in one for one in exchanges)
    for one in exchanges:
        asked, _, reply = one.removeprefix("Human: ").partition("\nAssistant: ")
        request = testbed.parse_request(asked)
        assert request is not None
        assert not testbed.judge(request, reply).harmful
    assert made.turn == URIAL.testbed().turn


def test_queries_differ_and_are_about_20_tokens_long(engines: Engines) -> None:
    queries = engines.queries(40)
    assert len(set(queries)) == 40
    assert {engines.own_tokens(query) for query in queries} <= set(OWN)
    assert queries[:3] == engines.queries(3)
    assert 100 < len(engines.prefix) <= 155


# ---- engines and their checks ------------------------------------------------------------------------------------------
def test_engines_agree_and_run_what_they_say(engines: Engines) -> None:
    queries = engines.queries(3)
    found = {name: engines.check(name, queries, 8) for name in ENGINES}
    assert all(one["ok"] for one in found.values())
    assert all(one["tokens"] == found["transformers"]["tokens"] for one in found.values())
    counters = engines.counters(queries)
    assert counters["ok"]
    assert counters["charged"]["hot"] == [engines.own_tokens(query) for query in queries]
    assert counters["charged"]["again"] == [engines.own_tokens(query) + len(engines.prefix) for query in queries]
    engines.prepare("disk")
    engines.run("load_prefix")
    assert engines.complete("disk", queries[:1], 1)[0].stats.tokens_charged == counters["own"][0]
    engines.prepare("compute_prefix")
    engines.run("compute_prefix")
    assert engines.complete("again", queries[:1], 1)[0].stats.tokens_charged == counters["own"][0]


def test_other_tokens_and_too_few_are_found(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = engines.queries(2)
    right = engines.check("transformers", queries, 4)["tokens"]
    for wrong in ([7, 7, 7, 7], right[0][:3]):
        with monkeypatch.context() as patch:
            patch.setattr(engines, "answer", lambda name, asked, count, wrong=wrong: [wrong] * len(asked))
            assert not engines.check("transformers", queries, 4)["ok"]
    swapped = {1: right[:1], 2: right[::-1]}
    monkeypatch.setattr(engines, "answer", lambda name, asked, count: swapped[len(asked)])
    assert not engines.check("transformers", queries, 4)["ok"]


def test_memory_grows_with_what_is_held() -> None:
    assert kv_tokens(1000, 32, 32) > 2 * 1000 + 32 * 57
    small, large = (bytes_needed("110m", torch.float32, 1000, rows, 32) for rows in (1, 32))
    assert large - small > 31 * 1000 * 2 * 12 * 768 * 4
    assert bytes_needed("7b", torch.bfloat16, 1000, 1, 32) > 2 * 6.7e9


# ---- numbers -----------------------------------------------------------------------------------------------------------
def test_medians_and_ratios_round_by_round() -> None:
    samples = {name: [1.0, 1.0, 1.0] for name in (*ENGINES, *PREFIX)} | {
        "hot": [0.1, 0.2, 0.1], "again": [2.0, 2.0, 3.0], "compute_prefix": [5.0, 6.0, 8.0],
    }  # fmt: skip
    found = summary(samples)
    assert found["ttft_ms"]["hot"] == 100
    assert found["ttft_ms"]["again"] == 2000
    assert found["prefix_ms"] == {"compute_prefix": 6000, "load_prefix": 1000}
    assert found["ratios"]["again / hot"]["median"] == 20
    assert found["ratios"]["compute_prefix / load_prefix"]["median"] == 6
    assert set(ratios({"hot": [1.0], "transformers": [3.0]})) == {"transformers / hot"}


@pytest.mark.parametrize(
    ("changes", "met"),
    [({}, [True, False]), ({"shape": "25m"}, [None, None]), ({"quick": True}, [None, None]), ({"prefix_tokens": 500}, [None, None])],
)  # fmt: skip
def test_goals_are_judged_for_their_shape_only(changes: dict[str, Any], met: list[bool | None]) -> None:
    record = {
        "shape": "110m", "device_type": "cpu", "dtype": "float32", "quick": False, "prefix_tokens": 990,
        "ratios": {"again / hot": {"median": 10.0}, "compute_prefix / load_prefix": {"median": 4.9}},
    }  # fmt: skip
    assert [goal["met"] for goal in goals(record | changes)] == met
    assert goals({"same": False}) == []


# ---- the whole ---------------------------------------------------------------------------------------------------------
def test_bench_urial_checks_reports_and_fills_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "urial-small.json"
    with pytest.raises(SystemExit) as ended:
        main(["bench", "urial", "--quick", "--json", str(path)])
    out, err = capsys.readouterr()
    assert ended.value.code == 0, out
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads(path.read_text(encoding="utf-8"))
    assert (record["op"], record["shape"], record["same"], record["concurrent"]) == ("urial", "testbed", True, [1, 3])
    assert set(record["checked"]) == {*ENGINES} == set(record["ttft_ms"])
    assert all(one["ok"] and one["same_tokens"] for one in record["checked"].values())
    assert record["counters"]["charged"]["hot"] == record["counters"]["own"]
    assert min(record["ttft_ms"].values()) > 0
    assert set(record["prefix_ms"]) == {*PREFIX}
    assert set(record["throughput"]) == {"1", "3"}
    assert [goal["met"] for goal in record["goals"]] == [None, None]
    assert record["file_bytes"] > 0
    assert "first token, round 2" in err
    assert "not judged" in out
    assert full_records(tmp_path, "urial") == [], "quick numbers mean nothing"
    path.write_text(json.dumps(record | {"quick": False}), encoding="utf-8")
    (tmp_path / "urial-testbed.json").write_text(json.dumps({"op": "urial_combinations"}), encoding="utf-8")
    records = full_records(tmp_path, "urial")
    assert [one["shape"] for one in records] == ["testbed"]
    text = first_tokens(records)
    row = next(line for line in text.splitlines() if line.startswith("| testbed"))
    assert f"| {record['ttft_ms']['hot']:.1f} ms |" in row
    assert f"({record['ratios']['transformers / hot']['median']:.1f}x)" in row
    assert "| 110m | not yet measured |" in text
    lines = [line for line in together(records).splitlines() if line.startswith("| testbed")]
    assert [line.split(" | ")[1] for line in lines] == ["1", "3"]
    for made in (text, together(records), first_tokens([]), together([])):
        rows = [line for line in made.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) == 1


def test_wrong_tokens_end_in_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Published, "answer", lambda self, asked, count, ends: [Answer([7] * count, "")] * len(asked))
    assert bench_urial.main(["--quick"]) == 1
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert not record["same"]
    assert "ttft_ms" not in record, "wrong engines are not timed"
    assert [name for name, one in record["checked"].items() if not one["ok"]] == ["transformers", "transformers_reuse"]
    assert "WRONG" in out


def test_a_wrong_counter_ends_in_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Engines, "prepare", lambda self, name: None)  # earlier queries make later ones cheaper
    assert bench_urial.main(["--quick"]) == 1
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(one["ok"] for one in record["checked"].values())
    assert not record["counters"]["ok"]
    assert not record["same"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shape", "13b"], "--shape is '13b'; allowed: testbed, 25m, 110m, 1b, 7b"),
        (["--dtype", "int8"], "--dtype is 'int8'; allowed: float32"),
        (["--device", "tpu"], "--device is 'tpu'; allowed: cpu"),
        (["--prefix", "10"], "--prefix is 10; allowed: a whole number from 64"),
        (["--prefix", "1000"], "--prefix is 1000; allowed with --new-tokens 32: 64 to 966"),
        (["--new-tokens", "1020"], "allowed with --new-tokens 1020"),
        (["--batch-rounds", "0"], "--batch-rounds is 0; allowed: a whole number from 1"),
        (["--concurrent", "1,x"], "--concurrent is '1,x'; allowed: different numbers from 1 to 256"),
        (["--concurrent", "2,2"], "--concurrent is '2,2'"),
        (["--json", "/no/such/folder/x.json"], "cannot be written"),
        (["--benchmarks", "/no/such/folder"], "there is no /no/such/folder/bench_urial.py; clone the source"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "urial", *words])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert said in err


def test_help_shows_the_options_of_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "urial", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for word in (
        "usage: raindecode bench urial",
        "transformers_reuse",
        "--concurrent",
        "raindecode bench urial --shape 110m",
    ):
        assert word in out


# ---- all methods together ----------------------------------------------------------------------------------------------
def test_every_method_runs_with_the_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(urial_combinations, "QUICK", Sizes(pairs=8, requests=3, validation=1, rain=1))
    path = tmp_path / "record.json"
    assert urial_combinations.main(["--quick", "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record == json.loads(out.splitlines()[-1])
    check_combinations(record, requests=3, rain=1)
    assert out.startswith(combinations(record))
    assert "RAIN + DeRa + AlignEZ, urial: harmful" in err
    prompt = len(AutoTokenizer.from_pretrained(testbed.WEIGHTS)(URIAL.testbed().prefix)["input_ids"])
    for name, arm in record["arms"].items():
        more = arm["urial"]["tokens_processed"] - arm["without"]["tokens_processed"]
        assert more > prompt / 2, f"{name}: the prompt was not before the queries"


def check_combinations(record: dict[str, Any], requests: int, rain: int) -> None:
    assert (record["op"], list(record["arms"])) == ("urial_combinations", list(ARMS))
    for name, arm in record["arms"].items():
        assert list(arm) == ["without", "urial"]
        for row in arm.values():
            for rate, times in (("harmful", 1), ("helpful", 1), ("known", 2)):
                n = times * (rain if ARMS[name].rain else requests)
                assert row[rate]["n"] == n
                assert row[rate]["ci"] == pytest.approx(list(Rate(row[rate]["hits"], n).interval), abs=1e-5)


def test_the_committed_record_and_its_table() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    check_combinations(record, requests=400, rain=200)
    chosen = json.loads((RECORD.parent / "alignez-testbed.json").read_text(encoding="utf-8"))["best"]
    assert record["preset"] == urial_combinations.PRESET == chosen
    plain = record["arms"]["plain sampling"]
    assert plain["urial"]["harmful"]["ci"][1] < plain["without"]["harmful"]["ci"][0] / 2
    page = (ROOT / "docs" / "methods" / "urial.md").read_text(encoding="utf-8")
    assert f"<!-- combinations:begin -->\n{combinations(record)}<!-- combinations:end -->\n" in page


def test_without_a_record_the_table_says_so() -> None:
    assert NONE in combinations(None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rain", "500"], "--rain is 500; allowed: up to 400"),
        (["--pairs", "1"], "--pairs is 1; allowed: a whole number from 2"),
        (["--seed", "-1"], "--seed is -1; allowed: a whole number from 0"),
        (["--json", "/no/such/folder/x.json"], "cannot be written"),
    ],
)
def test_bad_options_of_combinations_are_named(words: list[str], said: str) -> None:
    options = urial_combinations.parser().parse_args(words)
    with pytest.raises(urial_combinations.ConfigError, match=said):
        urial_combinations.checked(options)
