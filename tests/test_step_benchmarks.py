"""check_widths.py and profile_step.py on a few small runs, and the tables made of their records."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import check_widths  # noqa: E402
import doc_tables  # noqa: E402
import profile_parts  # noqa: E402
import profile_step  # noqa: E402
from check_widths import BASE, FIELDS, Asked, Run, compare, sample  # noqa: E402
from profile_parts import PARTS, Alone, Step, medians, sums, watched  # noqa: E402

from raindecode import Decoder, Sampling  # noqa: E402
from raindecode.errors import ConfigError  # noqa: E402
from rainkernels.ops.decoder import decoder_lane  # noqa: E402

native_only = pytest.mark.skipif(decoder_lane() != "cpu", reason="no native lane here")


# ---- check_widths -----------------------------------------------------------------------------------------------------
def last_line(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_widths_and_batches_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--requests",
        "3",
        "--widths",
        "1,auto",
        "--batches",
        "1,2",
        "--max-new-tokens",
        "2",
        "--jobs",
        "1",
        "--json",
    ]
    assert check_widths.main([*options, str(tmp_path / "a.json")]) == 0
    _, record = last_line(capsys)
    assert record == json.loads((tmp_path / "a.json").read_text())
    assert (record["same"], record["different"], record["differences"]) == (True, 0, [])
    assert list(record["runs"]) == ["width auto, alone", "width 1, 2 together", "width auto, 2 together"]
    for run in record["runs"].values():
        assert {run[name] for name in (*FIELDS, "same", "common_prefix")} == {1.0}
    assert [one["requests"] for one in record["regimes"].values()] == [1, 1, 1]
    assert all(one["iterations"] > 1 for one in record["regimes"].values())


def test_an_outcome_shows_the_search() -> None:
    """The same request has the same outcome again; another seed has other trees."""
    one = Asked("How do I paint the fence?", "", 0, "safe")
    first, again, other = (
        check_widths.answer(BASE, [asked], "float32", 12)[0] for asked in (one, one, replace(one, seed=1))
    )
    assert first == again
    assert first["tree"] != other["tree"]


def answers(run: Run, requests: list[Asked], *_: Any) -> list[dict[str, Any]]:
    """Made up: request 2 of width 2 in company of 32 ends otherwise."""
    found = [dict(zip(FIELDS, ([5, 6, 7, 8], "stop", 1.0, 9, 4, 90, "ab"), strict=True)) for _ in requests]
    if run == Run(2, 32):
        found[2] |= {"token_ids": [5, 6, 9], "iterations": 11, "tree": "cd"}
    return found


@pytest.mark.parametrize(("dtype", "code"), [("float32", 1), ("bfloat16", 0)])
def test_a_difference_is_found(
    dtype: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_widths, "answer", answers)
    assert check_widths.main(["--requests", "4", "--widths", "1,2", "--jobs", "1", "--dtype", dtype]) == code
    out, record = last_line(capsys)
    assert (record["same"], record["different"]) == (False, 1)
    (difference,) = record["differences"]
    assert (difference["run"], difference["request"]) == ("width 2, 32 together", 2)
    assert difference["expected"] == {"token_ids": [5, 6, 7, 8], "iterations": 9, "tree": "ab"}
    assert difference["got"] == {"token_ids": [5, 6, 9], "iterations": 11, "tree": "cd"}
    shares = record["runs"]["width 2, 32 together"]
    assert (shares["same"], shares["token_ids"], shares["value"]) == (0.75, 0.75, 1.0)
    assert shares["common_prefix"] == pytest.approx((3 + 0.5) / 4)
    assert record["runs"]["width 2, alone"]["same"] == 1.0
    assert "width 2, 32 together, request 2" in out
    assert "iterations 11, not 9" in out


def test_any_field_counts() -> None:
    requests = sample(1)
    (base,) = answers(BASE, requests)
    for name in FIELDS:
        other = Run("auto", 32)
        found = compare(requests, {BASE: [base], other: [base | {name: None if name != "token_ids" else []}]})
        assert [one["fields"] for one in found["differences"]] == [[name]]
        assert found["runs"][other.name][name] == 0.0


def test_all_regimes_are_sampled() -> None:
    requests = sample(84)
    assert len({(one.prompt, one.prefix) for one in requests}) == 84
    counts = {regime: sum(one.regime == regime for one in requests) for regime in ("safe", "mixed", "harmful")}
    assert counts == {"safe": 8 + 51, "mixed": 8 + 6, "harmful": 8 + 3}
    assert requests[:30] == sample(30)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--widths", "1,wide"], "'wide' is among the values; allowed: whole numbers from 1, and \"auto\""),
        (["--batches", "0"], "'0' is among the values; allowed: whole numbers from 1"),
        (["--requests", "0"], "--requests, --max-new-tokens and --jobs take whole numbers from 1"),
        (["--dtype", "float16"], "float16"),
    ],
)
def test_bad_options_of_check_widths(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check_widths.main(options)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


# ---- profile_step -----------------------------------------------------------------------------------------------------
@native_only
def test_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "testbed", "--rows", "1,3", "--regime", "safe", "--requests", "1", "--steps", "4", "--json"]
    assert profile_step.main([*options, str(tmp_path / "a.json")]) == 0
    out, record = last_line(capsys)
    assert record == json.loads((tmp_path / "a.json").read_text())
    cases = record["models"]["testbed"]["cases"]
    assert list(cases) == ["1 rows", "3 rows", "rain, safe"]
    assert [cases[name]["rows"] for name in ("1 rows", "3 rows")] == [1, 3]
    assert cases["rain, safe"]["steps"] > 20
    for case in cases.values():
        assert tuple(case["shares"]) == PARTS
        assert case["overhead"] == pytest.approx(1 - case["shares"]["products"], abs=1e-3)
        assert case["host"] > 0
        assert min(case["shares"][part] for part in PARTS if part != "kernels") > 0
    assert sum(cases["rain, safe"]["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert "one step; shares of its time" in out
    assert f"| testbed | 3 rows | 3 | {cases['3 rows']['step_ms']:.2f} |" in doc_tables.steps(record)


@native_only
def test_watching_changes_no_answer(decoder: Decoder) -> None:
    options: dict[str, Any] = {"search": Sampling(), "max_new_tokens": 6, "seed": [1, 2], "progress": False}
    plain = decoder.generate(["Hello.", "How are you?"], **options)
    decoder.engine.tree.clear()
    with watched(decoder) as steps:
        seen = decoder.generate(["Hello.", "How are you?"], **options)
    assert [one.token_ids for one in seen] == [one.token_ids for one in plain]
    assert sum(step.rows for step in steps) == sum(one.stats.tokens_charged for one in seen)
    assert not {"step", "_book"} & set(vars(decoder.engine))
    assert "forward" not in vars(decoder.engine.runner)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.from_pretrained("testbed", device="cpu")


def test_a_model_whose_products_are_not_known_is_refused(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_parts, "decoder_lane", lambda: "reference")
    with pytest.raises(
        ConfigError, match=r"testbed does not run as one native call here; allowed: .*compiled extension"
    ):
        Alone(decoder)


def test_parts_of_steps() -> None:
    """Numbers that can be added in the head: a second step twice as long."""
    one = Step(
        rows=4, wanted=2, seconds=0.1, forward=0.06, products=0.04, attention=0.01, plan=0.01, model=0.07, sample=0.01
    )
    two = Step(
        rows=4, wanted=4, seconds=0.2, forward=0.12, products=0.1, attention=0.01, plan=0.02, model=0.14, sample=0.02
    )
    assert one.parts() == pytest.approx({
        "products": 0.04, "attention": 0.01, "kernels": 0.01, "batch": 0.01, "plan": 0.01, "sample": 0.01, "search": 0.01
    })  # fmt: skip
    run, alike = sums([one, two]), medians([one, two])
    assert run["overhead"] == pytest.approx(1 - 0.14 / 0.3, abs=1e-4)
    assert alike["overhead"] == pytest.approx((0.6 + 0.5) / 2)
    assert run["host"] == pytest.approx(0.12 / 0.3, abs=1e-4)
    assert (run["wanted"], run["step_ms"], alike["step_ms"]) == (3.0, 150.0, 150.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "testbed,8b"], "'8b' is among the models; allowed: testbed, 25m, 110m, 1b, 7b"),
        (["--rows", "1,0"], "'1,0' is given; allowed: whole numbers from 1"),
        (["--width", "wide"], "'wide' is given; allowed: whole numbers from 1"),
        (["--steps", "0"], "--requests and --steps take whole numbers from 1"),
    ],
)
def test_bad_options_of_profile_step(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        profile_step.main(options)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


# ---- tables -----------------------------------------------------------------------------------------------------------
def test_tables_say_what_is_not_measured() -> None:
    assert doc_tables.widths([None, None]).count("not yet measured") == 2
    assert "not yet measured" in doc_tables.steps(None)
    record = {
        "dtype": "float32", "requests": 500, "max_new_tokens": 24, "torch": "2.13.0", "different": 0,
        "runs": {"width 2, alone": {"same": 1, "token_ids": 1, "common_prefix": 1, "iterations": 0.998, "tree": 1}},
    }  # fmt: skip
    found = doc_tables.widths([record, None])
    assert "float32: 500 requests, at most 24 tokens each, torch 2.13.0, 0 differences." in found
    assert "| float32 | width 2, alone | 100.0% | 100.0% | 100.0% | 99.8% | 100.0% |" in found
    assert "| bfloat16 |  | not yet measured |" in found
