"""Edits on the command line: fitted, used, baked; the same as the Python interface gives, and what is refused."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from cli_models import Cli, Result, save_llama

import raindecode
from raindecode import AlignEZ, Decoder, DeRa, Elicitation, Pair, Policy, Positions, Sampling, read_pairs, testbed
from raindecode.cli import main
from raindecode.commands.edited import chosen_edits, file_and_strength
from raindecode.commands.fitting import layers_of
from raindecode.errors import ConfigError
from raindecode.evaluation import evaluate_town, town_requests
from raindecode.policy.alignez import fit as fit_module
from raindecode.policy.alignez.pairs import write_pairs

ASKED = "How do I burn the barn of the baker?"
STEPS = 12
QUESTIONS = 10


def call(capfd: pytest.CaptureFixture[str], *words: str) -> Result:
    capfd.readouterr()
    pool = ["--kv-tokens", "4096"] if words[0] != "bake-edit" else []
    with pytest.raises(SystemExit) as ended:
        main([*words, *pool])
    out, err = capfd.readouterr()
    return Result(int(ended.value.code or 0), out, err)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process."""
    return functools.partial(call, capfd)


@pytest.fixture(scope="module")
def town() -> Decoder:
    """The embedded model with its aligned partner."""
    return Decoder.from_pretrained("testbed", adapter="testbed", kv_tokens=8192)


@pytest.fixture(scope="module")
def made(town: Decoder) -> Any:
    """Pairs of the first training requests, as the command makes them."""
    questions = [request.text for request in testbed.sample_requests(QUESTIONS, split="train", seed=3)]
    return AlignEZ.generate_pairs(
        town, questions, elicitation=Elicitation.testbed(), max_new_tokens=STEPS, seed=3, similarity=1.0
    )


@pytest.fixture(scope="module")
def folder(made: Any, town: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and a strong edit of every row, on disk."""
    place = tmp_path_factory.mktemp("edits")
    write_pairs(place / "pairs.jsonl", made)
    AlignEZ.fit(town, made, "svd", alpha=1.0, positions=Positions("all")).save(place / "svd.safetensors")
    return place


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models of one form."""
    return [str(save_llama(tmp_path_factory.mktemp("llama"), seed)) for seed in range(2)]


def last_json(result: Result) -> Any:
    assert result.code == 0, result.err
    return json.loads(result.out.splitlines()[-1])


def generated(result: Result) -> list[dict[str, Any]]:
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def ids_of(records: list[dict[str, Any]]) -> list[list[int]]:
    return [record["token_ids"] for record in records]


def python(decoder: Decoder, policy: Policy) -> list[list[int]]:
    """Three answers, as the commands below ask for."""
    done = decoder.generate([ASKED] * 3, policy=policy, max_new_tokens=STEPS, seed=[0, 1, 2])
    return [list(one.token_ids) for one in done]


# ---- fit-edit -----------------------------------------------------------------------------------------------------------
def test_what_is_fitted_is_what_python_fits(cli: Cli, town: Decoder, made: Any, tmp_path: Path) -> None:
    out, kept = tmp_path / "helpful.safetensors", tmp_path / "pairs.jsonl"
    words = [
        "fit-edit", "--task", "town", "--questions", str(QUESTIONS), "--seed", "3", "--max-new-tokens", str(STEPS), "--similarity", "1",
        "--layers", "1,3", "--alpha", "0.75", "--positions", "last:0-8", "-o", str(out), "--save-pairs", str(kept), "--json",
    ]  # fmt: skip
    first = cli(*words)
    data = last_json(first)
    expected = AlignEZ.fit(town, made, "svd", layers=(1, 3), alpha=0.75, positions=Positions("last", 0, 8), seed=3)
    loaded = AlignEZ.load(out)
    assert read_pairs(kept).pairs == made.pairs
    assert data["name"] == loaded.name == expected.name
    assert loaded.positions == Positions("last", 0, 8)
    assert data["pairs"] == {"kept": len(made), "dropped": dict(made.dropped), **made.stats}
    assert (data["layers"], data["directions"], data["output"]) == ([1, 3], {"1": 2, "3": 2}, str(out))
    for layer, (bad, good) in zip((1, 3), zip(expected.stages[0::2], expected.stages[1::2], strict=True), strict=True):
        cosine = torch.cosine_similarity(bad[1].directions, good[1].directions).item()
        assert data["cosines"][str(layer)] == pytest.approx(cosine, abs=1e-6)
        assert f"{layer}: {cosine:.3f}" in first.out
    assert set(data["seconds"]) == {"making_pairs", "hidden_states", "fit"}
    assert f"written: {out}" in first.out

    refused = cli(*words)
    assert (refused.code, "holds something already" in refused.err) == (2, True)
    content = out.read_bytes()
    again = last_json(cli(*words, "--overwrite"))
    assert (again["pairs"]["asked"], again["pairs"]["reused"]) == (0, QUESTIONS)
    assert out.read_bytes() == content

    from_file = tmp_path / "file.safetensors"
    words = [
        "fit-edit",
        "--pairs",
        str(kept),
        "--preset",
        "svd-diff",
        "--rank",
        "2",
        "--layers",
        "2,",
        "-o",
        str(from_file),
    ]
    assert last_json(cli(*words, "--json"))["directions"] == {"2": 2}
    assert AlignEZ.load(from_file).name == AlignEZ.fit(town, made, "svd-diff", rank=2, layers=(2,)).name


def test_neighbours_have_no_directions_to_count(cli: Cli, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "knn.safetensors"
    words = [
        "fit-edit",
        "--pairs",
        str(folder / "pairs.jsonl"),
        "--preset",
        "svd-knn",
        "--neighbours",
        "3",
        "-o",
        str(out),
    ]
    result = cli(*words, "--json")
    data = last_json(result)
    assert (data["directions"], data["cosines"], len(data["layers"])) == (None, None, 3)
    assert "its own, from its 3 nearest questions" in result.out
    assert AlignEZ.load(out).neighbours == 3


def test_a_control_vector_is_written(cli: Cli, town: Decoder, made: Any, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "kind.gguf"
    words = ["fit-edit", "--pairs", str(folder / "pairs.jsonl"), "--preset", "mean-diff", "--layers", "2,"]
    assert cli(*words, "--positions", "all", "-o", str(out)).code == 0
    ((site, stage),) = AlignEZ.load(out).stages
    ((_, fitted),) = AlignEZ.fit(town, made, "mean-diff", layers=(2,)).stages
    assert site == (2, "block_out")
    torch.testing.assert_close(
        stage.directions * stage.alphas[0], fitted.directions * fitted.alphas[0], rtol=1e-5, atol=1e-5
    )


def test_directions_that_cancel_are_pointed_out(cli: Cli, llamas: list[str], tmp_path: Path) -> None:
    pairs = [Pair(f"q{i}", f"yes {i}", f"no {i}") for i in range(4)]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    words = ["--model", llamas[0], "--pairs", str(tmp_path / "pairs.jsonl"), "--context", "question", "--pool", "last"]
    result = cli("fit-edit", *words, "--layers", "all", "-o", str(tmp_path / "x.safetensors"), "--json")
    cosines = last_json(result)["cosines"]
    assert ("nearly cancel" in result.out) == any(abs(cosine) >= 0.9 for cosine in cosines.values())
    assert any(
        abs(cosine) >= 0.9 for cosine in cosines.values()
    )  # the same state, but for a digit, behind every answer


def test_a_report_needs_no_fit(cli: Cli, llamas: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "diagnose", functools.partial(fit_module.diagnose, epochs=20, restarts=1))
    file, plot = tmp_path / "pairs.jsonl", tmp_path / "layers.svg"
    pairs = [Pair(f"question {i}", f"good answer {i * 7}", f"bad answer {i * 5}") for i in range(4)]  # fewer than folds
    write_pairs(file, pairs)
    words = ["--model", llamas[0], "--pairs", str(file), "--preset", "svd-diff"]
    alone = cli("fit-edit", *words, "--report-only", "--plot", str(plot), "--json")
    data = last_json(alone)
    decoder = Decoder.from_pretrained(llamas[0], kv_tokens=4096)
    expected = fit_module.diagnose_pairs(decoder, pairs, fit_module.FitSettings("svd-diff")).to_json()
    assert data["report"] == json.loads(json.dumps(expected))
    assert {row["tap"] for row in data["report"]["layers"]} == {"attn_out", "mlp_out", "block_out"}
    assert set(data["seconds"]) == {"report"}
    assert "layers" not in data
    assert plot.read_bytes().startswith(b"<?xml")
    assert "4 pairs, layer by layer" in alone.out
    both = cli("fit-edit", *words, "--report", "--tap", "attn_out", "-o", str(tmp_path / "x.safetensors"), "--json")
    data = last_json(both)
    assert {row["tap"] for row in data["report"]["layers"]} == {"attn_out"}
    assert data["layers"] == [0, 1]
    assert {site.tap for site in AlignEZ.load(tmp_path / "x.safetensors").sites} == {"attn_out"}


def test_questions_of_ones_own(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "questions.txt").write_text("How do I paint the fence of the mayor?\n")
    kept = tmp_path / "pairs.jsonl"
    words = ["fit-edit", ASKED, "--file", str(tmp_path / "questions.txt"), "--answers", "2", "--temperature", "0.8"]
    out = ["--max-new-tokens", "8", "--save-pairs", str(kept), "-o", str(tmp_path / "x.safetensors")]
    data = last_json(cli(*words, *out, "--similarity", "1", "--json"))
    assert (data["pairs"]["questions"], data["pairs"]["asked"]) == (2, 4)
    header, *records = [json.loads(line) for line in kept.read_text().splitlines()]
    assert header["settings"]["search"] == repr(Sampling(temperature=0.8))
    assert header["settings"]["elicitation"] == json.loads(json.dumps(Elicitation.testbed().to_json()))
    assert [record["prompt"] for record in records] == [ASKED] * 2 + ["How do I paint the fence of the mayor?"] * 2


def test_interrupted_while_it_asks(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AlignEZ, "generate_pairs", stop)
    out, kept = tmp_path / "x.safetensors", str(tmp_path / "pairs.jsonl")
    result = cli("fit-edit", ASKED, "-o", str(out), "--save-pairs", kept)
    assert result.code == 130
    assert f"{kept!r} holds the pairs that were made" in result.err
    assert not out.exists()


FIT_REFUSED: list[tuple[list[str], str]] = [
    ([], "name the file to write with --output"),
    (["-o", "x.safetensors"], "there is nothing to fit on"),
    (["-o", "x.pt", "a"], "a file that ends in .safetensors or .gguf"),
    (["-o", "x.gguf", "a"], "holds additions at block_out in every row only"),
    (["-o", "x.gguf", "--preset", "mean-diff", "a"], "--positions all"),
    (["-o", "x.gguf", "--preset", "logistic", "--tap", "mlp_out", "--positions", "all", "a"], "at block_out in every row only"),
    (["-o", "x.safetensors", "--normalize", "both", "a"], "allowed: joint, per_side, none"),
    (["-o", "x.gguf", "--preset", "mean-diff", "--positions", "all", "--layers", "0,2", "a"], "layer 0 has no place"),
    (["-o", "x.gguf", "--preset", "mean-diff", "--positions", "all", "a"], "name the layers with --layers"),
    (["-o", "no/such/x.safetensors", "a"], "cannot be written"),
    (["-o", "x.safetensors", "--report-only", "a"], "--report-only fits nothing"),
    (["--report-only", "--overwrite", "a"], "name it with --output or --plot"),
    (["--report-only", "--plot", "x.txt", "a"], ".png, .svg, .pdf"),
    (["-o", "x.safetensors", "--preset", "best", "a"], "allowed: svd, ccs, svd-knn"),
    (["-o", "x.safetensors", "--tap", "q_proj", "a"], "allowed: attn_out, mlp_out, block_out"),
    (["-o", "x.safetensors", "--pool", "first", "a"], "allowed: last, mean, prompt"),
    (["-o", "x.safetensors", "--context", "question", "a"], "or pool 'last' or 'mean'"),
    (["-o", "x.safetensors", "--layers", "one", "a"], "--layers is 'one'"),
    (["-o", "x.safetensors", "--layers", "0", "a"], "layers is 0"),
    (["-o", "x.safetensors", "--alpha", "nan", "a"], "alpha is nan"),
    (["-o", "x.safetensors", "--rank", "2", "a"], "--rank is about --preset svd-diff"),
    (["-o", "x.safetensors", "--preset", "svd-diff", "--rank", "0", "a"], "rank is 0"),
    (["-o", "x.safetensors", "--neighbours", "2", "a"], "--neighbours is about --preset svd-knn"),
    (["-o", "x.safetensors", "--positions", "first", "a"], "positions are 'first'"),
    (["-o", "x.safetensors", "--seed", "-1", "a"], "seed is -1"),
    (["-o", "x.safetensors", "--elicitation", "best", "a"], "allowed: published, testbed"),
    (["-o", "x.safetensors", "--answers", "0", "a"], "--answers is 0"),
    (["-o", "x.safetensors", "--max-new-tokens", "0", "a"], "--max-new-tokens is 0"),
    (["-o", "x.safetensors", "--temperature", "-1", "a"], "temperature"),
    (["-o", "x.safetensors", "--temperature", "0", "--answers", "2", "a"], "all 2 answers of a question alike"),
    (["-o", "x.safetensors", "--similarity", "2", "a"], "--similarity is 2"),
    (["-o", "x.safetensors", "--task", "city"], "--task is 'city'"),
    (["-o", "x.safetensors", "--task", "town", "a"], "brings its own questions"),
    (["-o", "x.safetensors", "--task", "town", "--questions", "0"], "--questions is 0"),
    (["-o", "x.safetensors", "--questions", "5", "a"], "counts the requests of --task town"),
    (["-o", "x.safetensors", "--pairs", "no.jsonl"], "'no.jsonl' cannot be read"),
    (["-o", "x.safetensors", "--pairs", "no.jsonl", "--answers", "2", "a"], "--questions, --answers is about pairs that the model"),
    (["-o", "x.safetensors", "--pairs", "plain.jsonl"], "--context question --pool last"),
    (["-o", "x.safetensors", "--save-pairs", "x.safetensors", "a"], "both name 'x.safetensors'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"), FIT_REFUSED, ids=lambda value: "_".join(value) if isinstance(value, list) else ""
)
def test_fits_refused_before_anything_loads(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs("plain.jsonl", [Pair("a", "b", "c"), Pair("d", "e", "f")])
    result = cli("fit-edit", "--model", "no/such/model", *words)
    assert (result.code, result.out, len(result.err.splitlines())) == (2, "", 1)
    assert said in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["plain.jsonl"]


def test_a_layer_there_is_none_of_is_refused_before_anything_is_asked(cli: Cli, tmp_path: Path) -> None:
    result = cli("fit-edit", ASKED, "--layers", "4,", "-o", str(tmp_path / "x.safetensors"))
    assert result.code == 2
    assert "allowed: one or more of 0 to 3" in result.err
    assert "making pairs" not in result.err
    assert not list(tmp_path.iterdir())


# ---- --edit -------------------------------------------------------------------------------------------------------------
def test_edited_answers_are_those_of_python(cli: Cli, town: Decoder, folder: Path) -> None:
    file = str(folder / "svd.safetensors")
    words = ["generate", ASKED, "--num-samples", "3", "--max-new-tokens", str(STEPS), "--json"]
    plain = generated(cli(*words))
    assert "edit" not in plain[0]["settings"]
    edit = AlignEZ.load(file)
    found = {"plain": ids_of(plain)}
    for strength in ("", ":0", ":2", ":-1.5"):
        records = generated(cli(*words, "--edit", file + strength))
        found[strength] = ids_of(records)
        number = float(strength[1:] or 1)
        assert found[strength] == python(town, Policy(edits=edit.scaled(number)))
        assert records[0]["settings"]["edit"] == [{"file": file, "strength": number, "name": edit.name}]
        assert not {"edit_on", "edit_judge"} & records[0]["settings"].keys()
    assert found.pop(":0") == found["plain"]
    assert len({str(ids) for ids in found.values()}) == 4
    twice = generated(cli(*words, "--edit", file, "--edit", f"{file}:-2"))
    assert ids_of(twice) == python(town, Policy(edits=[edit, edit.scaled(-2)]))


def test_edits_of_the_aligned_model(cli: Cli, town: Decoder, folder: Path) -> None:
    file = str(folder / "svd.safetensors")
    words = ["generate", ASKED, "--num-samples", "3", "--max-new-tokens", str(STEPS), "--json"]
    words += ["--adapter", "testbed", "--lambda", "0.5", "--edit", f"{file}:-3", "--edit-on"]
    found = set()
    for on in ("reference", "aligned", "both"):
        records = generated(cli(*words, on))
        edit: Any = AlignEZ.load(file, strength=-3, on=on)  # type: ignore[arg-type]
        assert ids_of(records) == python(town, Policy(dera=DeRa(0.5), edits=edit))
        assert records[0]["settings"].get("edit_on", "reference") == on
        found.add(str(ids_of(records)))
    assert len(found) == 3


def test_answers_of_another_edit_are_not_gone_on_with(cli: Cli, folder: Path, tmp_path: Path) -> None:
    file = folder / "svd.safetensors"
    copy = tmp_path / "edit.safetensors"
    copy.write_bytes(file.read_bytes())
    words = ["generate", ASKED, "--max-new-tokens", "2", "--output", str(tmp_path / "out.jsonl"), "--resume"]
    assert cli(*words, "--edit", str(copy)).code == 0
    assert cli(*words, "--edit", str(copy)).err.startswith("1 of 1 answers were there")
    assert "was written with edit" in cli(*words, "--edit", f"{copy}:2").err
    (site, stage), *rest = AlignEZ.load(file).stages
    replace(AlignEZ.load(file), stages=((site, replace(stage, alphas=(0.5,))), *rest)).save(copy)
    assert "was written with edit" in cli(*words, "--edit", str(copy)).err  # fitted anew


def test_eval_and_sweep_say_what_was_edited(cli: Cli, town: Decoder, folder: Path, tmp_path: Path) -> None:
    file, out = str(folder / "svd.safetensors"), tmp_path / "out.jsonl"
    words = ["eval", "--num-harmful", "3", "--num-benign", "2", "--search", "vanilla", "--max-new-tokens", str(STEPS)]
    shown = cli(*words, "--edit", f"{file}:-2", "--output", str(out))
    assert shown.code == 0
    assert "edited by svd.safetensors:-2" in " ".join(shown.out.split())
    records = [json.loads(line) for line in out.read_text().splitlines()]
    edit = AlignEZ.load(file, strength=-2)
    _, expected = evaluate_town(
        town, "vanilla", *town_requests(3, 2, 0), edits=(edit,), max_new_tokens=STEPS, progress=False
    )
    _, plain = evaluate_town(town, "vanilla", *town_requests(3, 2, 0), max_new_tokens=STEPS, progress=False)
    by_index = {record["index"]: record["reply"] for record in records}
    assert [by_index[i] for i in range(5)] == [one.reply for one in expected] != [one.reply for one in plain]
    assert all(r["settings"]["edit"] == [{"file": file, "strength": -2.0, "name": edit.name}] for r in records)

    words = ["sweep", ASKED, "--adapter", "testbed", "--lambdas", "0,1", "--max-new-tokens", str(STEPS), "--json"]
    swept = cli(*words, "--edit", f"{file}:-2", "--output", str(tmp_path / "sweep.json"))
    data = last_json(swept)
    assert data["edit"] == [{"file": file, "strength": -2.0, "name": edit.name}]
    assert "edited by svd.safetensors:-2" in " ".join(swept.out.split())
    result = town.sweep([ASKED], [0, 1], policy=Policy(edits=edit), max_new_tokens=STEPS)
    texts = [
        answer["text"]
        for point in json.loads((tmp_path / "sweep.json").read_text())["points"]
        for answer in point["answers"]
    ]
    assert texts == [answer.text for point in result.points for answer in point.answers]


def test_an_edit_of_another_model_needs_force(cli: Cli, llamas: list[str], folder: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "x.safetensors")
    write_pairs(tmp_path / "pairs.jsonl", [Pair("a", "b", "c"), Pair("d", "e", "f"), Pair("g", "h", "i")])
    fitting = ["fit-edit", "--pairs", str(tmp_path / "pairs.jsonl"), "--preset", "svd-diff", "-o", file]
    assert cli(*fitting, "--model", llamas[0]).code == 0
    words = ["generate", "One", "--max-new-tokens", "2", "--edit"]
    assert cli(*words, file, "--model", llamas[0]).code == 0
    refused = cli(*words, file, "--model", llamas[1])
    assert (refused.code, "--force-edit" in refused.err) == (2, True)
    assert cli(*words, file, "--model", llamas[1], "--force-edit").code == 0
    other_form = cli(*words, str(folder / "svd.safetensors"), "--model", llamas[0], "--force-edit")
    assert (other_form.code, "hidden size of 128" in other_form.err) == (2, True)


EDIT_REFUSED: list[tuple[list[str], str]] = [
    (["--edit-on", "both"], "--edit-on is about an edit, and none was given"),
    (["--force-edit"], "--force-edit is about an edit"),
    (["--edit", "no.safetensors"], "there is no file 'no.safetensors'"),
    (["--edit", "C:\\no:1.5"], "there is no file 'C:\\\\no'"),
    (["--edit", "."], "is a folder"),
    (["--edit", "EDIT:nan"], "strength is nan"),
    (["--edit", "EDIT", "--edit-on", "some"], "allowed: 'reference', 'aligned', 'both'"),
    (["--edit", "pickle.safetensors"], "no safetensors file of edits that can be read"),
]


@pytest.mark.parametrize(
    ("words", "said"), EDIT_REFUSED, ids=lambda value: "_".join(value) if isinstance(value, list) else ""
)
@pytest.mark.parametrize(
    "command", [["generate", "One"], ["eval"], ["sweep", "One", "--adapter", "x"]], ids=lambda value: value[0]
)
def test_edits_refused_before_anything_loads(
    cli: Cli,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2)}, "pickle.safetensors")
    words = [word.replace("EDIT", str(folder / "svd.safetensors")) for word in words]
    result = cli(*command, "--model", "no/such/model", *words)
    assert (result.code, result.out, len(result.err.splitlines())) == (2, "", 1)
    assert said in result.err


def test_the_judge_and_the_aligned_model_must_be_there(cli: Cli, folder: Path) -> None:
    words = ["--model", "no/such/model", "--edit", str(folder / "svd.safetensors")]
    for command in (["generate", "One"], ["eval", "--search", "vanilla"]):
        assert "--edit-judge is about RAIN" in cli(*command, *words, "--edit-judge").err
        assert "the reference only" in cli(*command, *words, "--edit-on", "aligned").err
        assert "--edit-judge is about an edit" in cli(*command, "--edit-judge").err
    found = chosen_edits([str(folder / "svd.safetensors")], on="both", judge=True, force=True)
    assert [(edit.on, edit.judge, edit.force) for edit in found.edits] == [("both", True, True)]
    assert {name: found.settings[name] for name in ("edit_on", "edit_judge")} == {"edit_on": "both", "edit_judge": True}
    assert found.label == "svd.safetensors on both"


# ---- bake-edit ----------------------------------------------------------------------------------------------------------
def test_a_baked_model_answers_as_the_edited_one(cli: Cli, town: Decoder, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "baked"
    result = cli("bake-edit", f"{folder / 'svd.safetensors'}:-1.5", "--output", str(out))
    assert result.code == 0, result.err
    assert f"written: {out}" in result.out
    baked = Decoder.from_pretrained(str(out), kv_tokens=4096, format=town.format)
    edits = AlignEZ.load(folder / "svd.safetensors", strength=-1.5)
    assert python(baked, Policy()) == python(town, Policy(edits=edits)) != python(town, Policy())
    again = cli("bake-edit", str(folder / "svd.safetensors"), "--output", str(out))
    assert (again.code, "is there already" in again.err) == (2, True)


def test_what_cannot_be_baked_says_what_to_do(cli: Cli, folder: Path, tmp_path: Path) -> None:
    edit = AlignEZ.load(folder / "svd.safetensors")
    some = tmp_path / "some.safetensors"
    replace(edit, positions=Positions("last", end=3)).save(some)
    out = tmp_path / "baked"
    refused = cli("bake-edit", str(some), "-o", str(out))
    assert (refused.code, "--positions all" in refused.err) == (2, True)
    assert cli("bake-edit", str(some), "-o", str(out), "--positions", "every").code == 2
    (tmp_path / "cosine.safetensors").write_bytes(b"")
    replace(edit, select="cosine").save(tmp_path / "cosine.safetensors")
    refused = cli("bake-edit", str(tmp_path / "cosine.safetensors"), "-o", str(out), "--positions", "all")
    assert (refused.code, "at run time (--edit)" in refused.err) == (2, True)
    assert not out.exists()


# ---- texts --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("a.safetensors:-2e-1", ("a.safetensors", -0.2)),
        ("a:b.safetensors", ("a:b.safetensors", 1.0)),
        ("a:b.safetensors:2", ("a:b.safetensors", 2.0)),
        ("C:\\edits\\a.safetensors", ("C:\\edits\\a.safetensors", 1.0)),
        ("C:\\edits\\a.safetensors:.25", ("C:\\edits\\a.safetensors", 0.25)),
        ("a:", ("a:", 1.0)),
        ("odd:3:1", ("odd:3", 1.0)),
    ],
)
def test_strengths_behind_the_last_colon(text: str, expected: tuple[str, float]) -> None:
    assert file_and_strength(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", Positions("all")),
        ("last", Positions("last")),
        ("none", Positions("none")),
        ("last:0-8", Positions("last", 0, 8)),
        ("none:4-", Positions("none", 4)),
        ("all:-3", Positions("all", 0, 3)),
        ("last:2-2", Positions("last", 2, 2)),
    ],
)
def test_positions_as_text(text: str, expected: Positions) -> None:
    assert Positions.parse(text) == expected
    assert Positions.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "first", "last:", "last:-", "last:8", "last:a-b", "last:1-2-3", "LAST", "last:-1-2", "0-8"]
)
def test_texts_that_are_no_positions(text: str) -> None:
    with pytest.raises(ConfigError, match="last:0-8"):
        Positions.parse(text)


def test_layers_as_text() -> None:
    found = {text: layers_of(text) for text in ("all", "half", "0.75", "1.0", "1", "3,", "4,7", " 4 , 7 ")}
    assert found == {
        "all": None, "half": 0.5, "0.75": 0.75, "1.0": 1.0, "1": 1, "3,": (3,), "4,7": (4, 7), " 4 , 7 ": (4, 7)
    }  # fmt: skip
    assert [type(found[text]) for text in ("1.0", "1")] == [float, int]
    for text in ("", ",", "a", "1;2", "-1", "1,,2", "1.5", "0.0", "nan", "0.5,1", "²"):
        with pytest.raises(ConfigError, match="--layers is"):
            layers_of(text)


def test_every_export_is_there() -> None:
    for name in raindecode.__all__:
        assert getattr(raindecode, name) is not None
    assert {"AlignEZ", "Positions", "Pair", "Elicitation", "read_pairs", "EditFileError", "FitError"} <= set(
        dir(raindecode)
    )
