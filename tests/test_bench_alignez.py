"""bench_alignez.py: its check, its arithmetic, its record and tables, and `raindecode bench alignez`."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import alignez_engines  # noqa: E402
import alignez_parts  # noqa: E402
import bench_alignez  # noqa: E402
from alignez_engines import OURS, THEIRS, Engines, Ours, Theirs, bytes_needed  # noqa: E402
from alignez_parts import _Places, draw_pairs, parts_ms  # noqa: E402
from alignez_tables import edit_steps, fit_times  # noqa: E402
from bench_alignez import ENGINES, goals, median_interval, order, rows_checked, summary  # noqa: E402
from dera_engines import load_shape, sharing  # noqa: E402
from naive.alignez import Edit, Folded  # noqa: E402
from readme_tables import NONE, full_records  # noqa: E402

from raindecode import Decoder  # noqa: E402
from raindecode.cli import main  # noqa: E402
from raindecode.commands.fitting import Timed  # noqa: E402
from raindecode.errors import RainDecodeError  # noqa: E402
from raindecode.policy.alignez.edits import AlignEZ  # noqa: E402
from raindecode.policy.alignez.presets import PRESETS  # noqa: E402

ROWS, STEPS = 5, 4


@pytest.fixture(scope="module")
def engines() -> Engines:
    model, tokenizer = load_shape("testbed", torch.device("cpu"), torch.float32)
    prompts = [[*range(40, 60), token] for token in range(100, 100 + ROWS)]
    return Engines(model, tokenizer, prompts, directions=2, tap="mlp_out", steps=STEPS)


# ---- the engines and their check ------------------------------------------------------------------------------------------
def test_every_engine_passes_and_edits_differ(engines: Engines) -> None:
    for name in ENGINES:
        found = engines.check(name, rows_checked(ROWS), STEPS)
        assert found["ok"], (name, found)
        assert found["rows"] == [0, 2, 4]
        assert (found["logprob_error"] is None) == (name in THEIRS)
        assert (found["effect"] is None) == (name in ("none", "stock"))
        assert (found["alone_error"] is None) == (name != "edits_256")
    assert engines.check("edits_256", [1], STEPS)["alone_error"] < 1e-5


def other_order(engines: Engines, name: str) -> Any:
    """Boosted first, then taken away: the other of two operations that do not commute."""
    tables = [engines.shared] * ROWS if name == "edits" else engines.own
    edits = [AlignEZ.from_directions(dict(enumerate(u)), op=["boost", "project"]) for u in tables]
    return [alignez_engines.Policy(edits=edit) for edit in edits]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("edits", "order"), ("edits_256", "order"), ("edits_256", "rows"), ("edits", "layer"), ("edits", "off"), ("none", "on"),
    ],
)  # fmt: skip
def test_a_wrong_edit_is_found(engines: Engines, monkeypatch: pytest.MonkeyPatch, name: str, wrong: str) -> None:
    policies = engines.policies[name]
    others: dict[str, Any] = {
        "order": lambda: other_order(engines, name),
        "rows": lambda: [*policies[1:], policies[0]],
        "layer": lambda: [alignez_engines.Policy(edits=engines.edit(engines.shared[:-1]))] * ROWS,
        "off": lambda: engines.policies["none"],
        "on": lambda: engines.policies["edits"],
    }
    monkeypatch.setitem(engines.policies, name, others[wrong]())
    assert not engines.check(name, rows_checked(ROWS), STEPS)["ok"]


def test_a_batch_that_differs_from_alone_is_found(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = engines.generate

    def generate(name: str, rows: Any, steps: int) -> Any:
        done = plain(name, rows, steps)
        return [(tokens, [value + 0.01 for value in values]) for tokens, values in done] if len(rows) == 1 else done

    monkeypatch.setattr(engines, "generate", generate)
    found = engines.check("edits_256", [2], STEPS)
    assert found["alone_error"] == pytest.approx(0.01, rel=1e-3)
    assert not found["ok"]


def test_an_edit_that_moves_nothing_proves_nothing(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "shared", engines.shared * 0 + torch.eye(engines.shared.shape[2])[:2])
    monkeypatch.setattr(engines, "ops", ["add", "add"])
    monkeypatch.setattr(AlignEZ, "from_directions", lambda *a, **k: None)
    monkeypatch.setattr(
        engines, "hooks", lambda model, u: alignez_engines.HookedEdits(model, {0: Edit(u[0], ["add", "add"], 1e-9)})
    )
    monkeypatch.setitem(engines.policies, "edits", engines.policies["none"])
    found = engines.check("edits", [0], STEPS)
    assert found["logprob_error"] <= found["allowed"]
    assert not found["ok"]


def test_hooks_that_do_nothing_are_found(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines.hooked, "hooks_256", None)
    assert not engines.check("hooks_256", range(ROWS), STEPS)["ok"]


def test_a_decode_advances_all_requests_by_a_token_per_step(engines: Engines) -> None:
    expected = {name: engines.generate(name, range(ROWS), STEPS + 1) for name in OURS}
    for name in ENGINES:
        decode = engines.begin(name, STEPS)
        for _ in range(STEPS - 1):
            decode.step()
        if isinstance(decode, Ours):
            with pytest.raises(RainDecodeError, match="request 0 is not done"):
                decode.end()
        decode.step()
        tokens = decode.end()
        assert [len(row) for row in tokens] == [STEPS + 1] * ROWS
        if name in OURS:
            assert tokens == [one[0] for one in expected[name]]
            assert engines.decoders[name].engine.num_running == 0
        else:
            assert isinstance(decode, Theirs)
            hooks = engines.models[name].model.layers[0].mlp._forward_hooks
            assert not hooks, "the model is as it was"


# ---- the parts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["edits", "edits_256"])
def test_the_norms_alone_do_the_edits_of_the_step(engines: Engines, name: str) -> None:
    places = _Places(engines, (name,))
    slots = places.lookup(name)().slots[0].tolist()  # type: ignore[attr-defined]
    assert len(set(slots)) == (1 if name == "edits" else ROWS)
    assert 0 not in slots
    before, wanted = places.residual.clone(), torch.zeros_like(places.residual)
    stacked = engines.shared if name == "edits" else torch.stack(engines.own, dim=1)
    for u in stacked:
        wanted += Folded(Edit(u, engines.ops), torch.float32, torch.device("cpu")).apply(places.x[:, None])[:, 0]
    places.norms(name)()
    torch.testing.assert_close(places.residual - before, wanted, rtol=1e-4, atol=1e-4)
    places.residual.copy_(before)
    places.norms(None)()
    torch.testing.assert_close(places.residual - before, places.x * len(stacked), rtol=1e-4, atol=1e-4)


def test_parts_are_added_up(engines: Engines) -> None:
    found = parts_ms(engines, 3)
    assert set(found["added_ms"]) == {"edits", "edits_256", "hooks", "hooks_256"}
    assert found["added_ms"]["hooks"] == found["ms"]["hooks"]["median"] > 0
    for each in found["ms"].values():
        assert each["q1"] <= each["median"] <= each["q3"]
    assert found["ms"]["lookup_edits"]["median"] > 0


def test_pairs_of_every_preset_and_what_they_ask_for() -> None:
    model, tokenizer = load_shape("testbed", torch.device("cpu"), torch.float32)
    pairs = draw_pairs(tokenizer, 6)
    for pair in pairs:
        assert pair.chosen_prompt is not None
        assert pair.chosen_prompt.startswith(pair.prompt)
        assert 8 <= len(tokenizer.encode(pair.prompt)) <= 40
    decoder = Decoder(sharing(model), tokenizer)
    calls = {}
    for name in PRESETS:
        asked: list[int] = []

        class Watched(Timed):
            def activations(self, passages: Any, _asked: list[int] = asked, **options: Any) -> torch.Tensor:
                _asked.append(len(passages))
                return super().activations(passages, **options)

        timed = Watched(decoder)
        AlignEZ.fit(timed, pairs, name, progress=False)
        calls[name] = asked
        assert timed.seconds > 0
    assert calls == {**{name: [12] for name in PRESETS}, "svd-knn": [12, 6]}


# ---- the arithmetic -------------------------------------------------------------------------------------------------------
def samples() -> dict[str, list[list[float]]]:
    """Seconds of two rounds; `none` drifts, the differences do not."""
    none, stock = [[0.1, 0.2], [0.4]], [[0.3, 0.3], [0.3]]

    def plus(base: list[list[float]], more: float) -> list[list[float]]:
        return [[each + more for each in one] for one in base]

    return {
        "none": none, "edits": plus(none, 0.002), "edits_256": plus(none, 0.01), "stock": stock, "hooks": plus(stock, 0.03),
        "hooks_256": plus(stock, 0.06),
    }  # fmt: skip


def test_differences_are_taken_within_cycles() -> None:
    found = summary(samples(), {name: [[2 * x for x in one] for one in rounds] for name, rounds in samples().items()})
    assert found["step_ms"]["none"] == pytest.approx(200)
    assert found["added_ms"] == pytest.approx({"edits": 2, "edits_256": 10, "hooks": 30, "hooks_256": 60})
    assert found["added_cpu_ms"] == pytest.approx({"edits": 4, "edits_256": 20, "hooks": 60, "hooks_256": 120})
    assert found["cpu_ms"]["none"] == pytest.approx(400)
    assert found["added_share"] == pytest.approx({"edits": 0.01, "edits_256": 0.05, "hooks": 0.1, "hooks_256": 0.2})
    assert found["ratios"]["edits_256 / edits"]["median"] == pytest.approx(210 / 202)
    assert found["ratios"]["stock / none"]["median"] == pytest.approx(1.5)


def test_every_engine_runs_behind_every_other() -> None:
    orders = [order(cycle) for cycle in range(len(ENGINES))]
    for place in zip(*orders, strict=True):
        assert sorted(place) == sorted(ENGINES)
    behind = [pair for one in orders for pair in pairwise(one)]
    assert len(set(behind)) == len(behind) == len(ENGINES) * (len(ENGINES) - 1)
    assert order(len(ENGINES)) == orders[0]


def test_interval_of_the_median() -> None:
    assert median_interval([3.0, 1.0]) == [1.0, 3.0]
    assert median_interval(list(range(100))) == [40, 59]


def record(**changes: Any) -> dict[str, Any]:
    facts = {
        "op": "alignez", "shape": "110m", "parameters": 10**8, "rows": 256, "directions": 2, "tap": "mlp_out", "quick": False,
        "dtype": "float32", "device": "cpu x", "device_type": "cpu", "threads": 2, "same": True, "pairs": 128,
    }  # fmt: skip
    parts = {"added_ms": {"edits": 1.0, "edits_256": 20.0, "hooks": 5.0, "hooks_256": 50.0}}
    fits = {"fit_ratio": {"svd": {"median": 1.1}, "ccs": {"median": 1.3}}, "fit_s": {"svd": 8.25, "ccs": 9.75}}
    found = summary(samples(), samples())
    once = {name: found[name] for name in ("added_ms", "added_interval_ms", "added_share")}
    return {**facts, **found, "toggled": once, "added_ms_by_parts": parts, **fits, **changes}


def test_goals() -> None:
    found = {goal["name"].partition(":")[0]: goal for goal in goals(record())[2:]}
    share, of_hooks = goals(record())[:2]
    assert (share["value"], share["by_parts"], share["met"]) == (pytest.approx(0.01), pytest.approx(0.005), True)
    assert (of_hooks["value"], of_hooks["by_parts"], of_hooks["met"]) == (pytest.approx(1 / 15), 0.2, True)
    assert (found["edits_256"]["value"], found["edits_256"]["met"]) == (pytest.approx(210 / 202), True)
    assert found["edits_256"]["by_parts"] == pytest.approx(220 / 201)
    assert {name: found[f"fit, {name}"]["met"] for name in ("svd", "ccs")} == {"svd": True, "ccs": False}
    slower = record()
    slower["toggled"]["added_ms"] |= {"edits": 11.0, "edits_256": 60.0}
    assert [goal["met"] for goal in goals(slower)[:3]] == [False, False, False]
    for other in ({"shape": "25m"}, {"rows": 8}, {"quick": True}, {"threads": 1}):
        assert {goal["met"] for goal in goals(record(**other))} == {None}
    noisy = record()
    noisy["toggled"]["added_ms"] |= {"hooks": -1.0}
    assert (goals(noisy)[1]["value"], goals(noisy)[1]["met"]) == (None, None)
    assert goals({"same": False}) == []


def test_tables(tmp_path: Path) -> None:
    assert edit_steps([]).count(NONE) == fit_times([]).count(NONE) == 12
    for name, one in {
        "110m": record(), "testbed-cost": record(shape="testbed", parameters=10**6), "quick": record(quick=True),
        "wrong": record(same=False), "other": {"op": "else"},
    }.items():  # fmt: skip
        (tmp_path / f"alignez-{name}.json").write_text(json.dumps(one), encoding="utf-8")
    records = full_records(tmp_path, "alignez")
    assert [each["shape"] for each in records] == ["testbed", "110m"]
    *_, first, second = edit_steps(records).splitlines()
    assert first.startswith(
        "| testbed, 256 requests, cpu x, float32, 2 threads | 200.00 ms | 2.00 ms (1.0%; 2.00 to 2.00), parts 1.00 ms |"
    )
    assert second.endswith(
        "| 300.00 ms | 30.00 ms (10.0%; 30.00 to 30.00), parts 5.00 ms | 60.00 ms (20.0%; 60.00 to 60.00), parts 50.00 ms |"
    )
    assert f"| 110m, 128 pairs, cpu x, 2 threads | 1.10x (8.2 s) | 1.30x (9.8 s) | {NONE} |" in fit_times(records)


def test_memory_grows_with_rows() -> None:
    sizes = [bytes_needed("110m", torch.float32, rows, 64, 16) for rows in (64, 256)]
    per_token = 2 * 12 * 768 * 4
    assert sizes[1] - sizes[0] > 3 * 192 * 80 * per_token, "a cache for every row of three engines"
    assert bytes_needed("testbed", torch.float32, 256, 64, 16) == 2**30


def test_a_decode_takes_its_edits_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair has one step with edits and one without, their order turning; afterwards the edits are there again."""
    from alignez_engines import BASES

    from raindecode.engine.edits import EditBank

    options = bench_alignez.parser("x").parse_args(["--rows", "3", "--context", "6", "--steps", "3"])
    model, tokenizer = bench_alignez.load_shape("testbed", torch.device("cpu"), torch.float32)
    prompts = bench_alignez.draw_prompts(options, len(tokenizer), 100)
    engines = Engines(model, tokenizer, prompts, directions=2, tap="mlp_out", steps=8)
    seen: list[bool] = []
    inner = EditBank.slots

    def watched(self: EditBank, parts: Any) -> Any:
        slots = inner(self, parts)
        seen.append(slots is not None)
        return slots

    monkeypatch.setattr(EditBank, "slots", watched)
    steps: list[str] = []
    found = alignez_parts.toggled_ms(engines, 1, 3, steps.append)
    assert list(found) == list(BASES)
    assert {name: len(pairs) for name, pairs in found.items()} == dict.fromkeys(BASES, 3)
    assert min(ms for pairs in found.values() for pair in pairs for ms in pair) > 0
    assert len(steps) == 3 * len(BASES)
    assert seen == [True] * 8, "the prompts of two engines, and one step of each pair"
    assert all("slots" not in vars(engines.decoders[name].engine.runner.edits) for name in ("edits", "edits_256"))


# ---- the whole ------------------------------------------------------------------------------------------------------------
def test_bench_alignez_checks_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "alignez.json"
    with pytest.raises(SystemExit) as ended:
        main(["bench", "alignez", "--quick", "--json", str(path)])
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads(path.read_text(encoding="utf-8"))
    assert (found["op"], found["shape"], found["rows"], found["same"]) == ("alignez", "testbed", 8, True)
    assert set(found["step_ms"]) == set(found["checked"]) == set(ENGINES)
    assert min(found["step_ms"].values()) > 0
    assert set(found["added_ms"]) == set(found["added_share"]) == {"edits", "edits_256", "hooks", "hooks_256"}
    assert set(found["toggled"]["added_ms"]) == set(found["added_ms"])
    assert found["toggled"]["pairs"] == found["rounds"] * (found["steps"] // 2)
    assert set(found["fit_ratio"]) == set(PRESETS)
    assert min(found["forwards_s"].values()) > 0
    assert len(found["load"]) == 2
    assert [goal["met"] for goal in found["goals"]] == [None] * (3 + len(PRESETS))
    assert "not judged: edits: share of a step" in out


def test_a_wrong_edit_ends_in_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plain = AlignEZ.from_directions
    monkeypatch.setattr(AlignEZ, "from_directions", lambda u, **given: plain(u, **{**given, "op": "project"}))
    assert bench_alignez.main(["--quick", "--no-fit"]) == 1
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert (found["same"], found["goals"], "step_ms" in found) == (False, [], False), "wrong engines are not timed"
    assert [name for name, one in found["checked"].items() if not one["ok"]] == ["edits", "edits_256"]
    assert "WRONG" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shape", "13b"], "--shape is '13b'; allowed: testbed, 25m, 110m, 1b, 7b"),
        (["--dtype", "int8"], "--dtype is 'int8'; allowed: float32"),
        (["--tap", "mlp"], "--tap is 'mlp'; allowed: attn_out, mlp_out, block_out"),
        (["--device", "tpu"], "--device is 'tpu'; allowed: cpu"),
        (["--rows", "1"], "--rows is 1; allowed: a whole number from 2"),
        (["--rows", "2000"], "--rows is 2000; allowed with this model: up to 1085"),
        (["--context", "1020"], "--context is 1020; allowed with this model: up to 1005"),
        (["--directions", "17"], "--directions is 17; allowed: 1 to 16"),
        (["--presets", "svd,pca"], "--presets names 'pca'; allowed: svd, ccs, svd-knn"),
        (["--fit-rounds", "0"], "--fit-rounds is 0; allowed: a whole number from 1"),
        (["--json", "/no/such/folder/x.json"], "cannot be written"),
        (["--benchmarks", "/no/such/folder"], "there is no /no/such/folder/bench_alignez.py; clone the source"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "alignez", *words])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert said in err


def test_help_shows_the_options_of_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "alignez", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for word in ("usage: raindecode bench alignez", "edits_256", "--fit-rounds", "raindecode bench alignez --quick"):
        assert word in out
