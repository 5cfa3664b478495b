"""``raindecode shift``: table, JSON, files, and what it refuses before anything loads."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from aligned_models import write_adapter
from cli_models import Cli, Result, byte_tokenizer, save_llama
from transformers import AutoModelForCausalLM

from raindecode import URIAL, AlignEZ, Decoder, DeRa, Policy, Sampling
from raindecode.cli import main

URIAL_FILE = "# Instruction\n\nBe kind.\n\n# Query:\n```\nHi\n```\n\n# Answer:\n```\nHello!\n```\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base and an aligned model."""
    return [str(save_llama(tmp_path_factory.mktemp("llama"), seed)) for seed in range(2)]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], models: list[str]) -> Cli:
    """`raindecode shift` with the small models, in this process."""

    def run(*words: str) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["shift", "--base", models[0], "--kv-tokens", "16384", *words])
        out, err = capfd.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return run


def last_line(result: Result) -> Any:
    assert result.code == 0, result.err
    return json.loads(result.out.splitlines()[-1])


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the page's writer."""
    module = types.ModuleType("raindecode.shift_page")
    module.write_page = lambda path, data: Path(path).write_text(f"<html>{data['aligned']}")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "raindecode.shift_page", module)


def test_table_json_and_files(cli: Cli, models: list[str], tmp_path: Path, page: None) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / f"shift.{suffix}" for suffix in ("json", "html", "svg")]
    words = ["One", "Two", "--aligned", models[1], "--max-new-tokens", "9", "--top", "3", "--json"]
    result = cli(*words, *(word for file in files for word in ("-o", str(file))))
    data = last_line(result)
    decoder = Decoder.from_pretrained(models[0], aligned=models[1], kv_tokens=16384)
    expected = decoder.token_shift(None, 1.0, ["One", "Two"], max_new_tokens=9, top=3)
    wanted = {**expected.to_json(), "base": models[0], "aligned": models[1]}
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(wanted))
    assert {**data, "answers": wanted["answers"]} == json.loads(json.dumps(wanted))
    assert files[1].read_text() == f"<html>{models[1]}"
    assert "share of answers" in files[2].read_text()
    assert result.err.splitlines() == [f"2 answers of {models[1]}, read by {models[0]}"]
    for name in ("unshifted", "marginal", "shifted"):
        (row,) = [line for line in result.out.splitlines() if line.strip().startswith(f"{name} (")]
        assert row.strip().endswith(f"{100 * expected.summary[name]:.1f} %")
    refused = cli("One", "--aligned", models[1], "-o", str(files[0]))
    assert "holds something already: --overwrite replaces it" in refused.err
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(wanted))


def test_what_aligned_may_be(cli: Cli, models: list[str], tmp_path: Path) -> None:
    """A λ, an adapter (named as such or as aligned), an edit, a prompt."""
    base = AutoModelForCausalLM.from_pretrained(models[0])
    adapter = write_adapter(tmp_path / "lora", base)
    edit = str(tmp_path / "edit.safetensors")
    plain = Decoder.from_pretrained(models[0], kv_tokens=16384)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    AlignEZ.from_directions({0: direction}, op="add", alpha=3.0, model=plain.identities[0]).save(edit)
    prompt = tmp_path / "kind.txt"
    prompt.write_text(URIAL_FILE)
    mixed = Decoder.from_pretrained(models[0], aligned=models[1], kv_tokens=16384)
    tuned = Decoder.from_pretrained(models[0], adapter=adapter, kv_tokens=16384)
    cases: list[tuple[list[str], Decoder, Any, str]] = [
        (["--aligned", models[1], "--lambda", "0.5"], mixed, 0.5, f"{models[1]}, λ 0.5"),
        (["--aligned", models[1], "--target-kl", "0.1"], mixed, DeRa.target_kl(0.1), f"{models[1]}, KL 0.1"),
        (["--adapter", adapter], tuned, 1.0, f"adapter {adapter}"),
        (["--aligned", adapter], tuned, 1.0, f"adapter {adapter}"),
        (["--edit", f"{edit}:0.5"], plain, AlignEZ.load(edit, strength=0.5), f"{models[0]}, edited by edit.safetensors:0.5"),
        (["--prompt-file", str(prompt)], plain, URIAL.load(prompt), f"{models[0]}, prompt kind.txt"),
        (
            ["--adapter", adapter, "--edit", edit, "--edit-on", "both", "--prompt-file", str(prompt)], tuned,
            Policy(prompt=URIAL.load(prompt), dera=DeRa(1.0), edits=AlignEZ.load(edit, on="both")),
            f"adapter {adapter}, edited by edit.safetensors on both, prompt kind.txt",
        ),
    ]  # fmt: skip
    for words, decoder, side, label in cases:
        data = last_line(cli("One", *words, "--max-new-tokens", "5", "--json"))
        expected = decoder.token_shift(None, side, ["One"], max_new_tokens=5)
        assert data["aligned"] == label
        assert data["summary"] == expected.summary


def test_answers_of_generate_are_read_as_they_were_written(cli: Cli, models: list[str], tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    decoder = Decoder.from_pretrained(models[0], aligned=models[1], kv_tokens=16384)
    written = decoder.generate(
        ["One", "Two"], policy=Policy(dera=DeRa(1.0)), search=Sampling.greedy(), max_new_tokens=6
    )
    with pytest.raises(SystemExit):
        main(
            ["generate", "--model", models[0], "--aligned", models[1], "One", "Two", "--greedy", "--max-new-tokens", "6",
             "--output", str(file)]
        )  # fmt: skip
    found = tmp_path / "shift.json"
    assert cli("--answers", str(file), "--aligned", models[1], "-o", str(found)).code == 0
    data = json.loads(found.read_text())
    by_prompt = {entry["prompt"]: [t["id"] for t in entry["tokens"]] for entry in data["answers"]}
    assert by_prompt == {one.prompt: one.token_ids for one in written}
    assert {entry["finish_reason"] for entry in data["answers"]} == {"given"}
    # Ids that spell something else, those of another tokenizer, are not believed.
    file.write_text(json.dumps({"prompt": "One", "text": "abc", "token_ids": [5, 6]}) + "\n\n")
    assert cli("--answers", str(file), "--aligned", models[1], "-o", str(found), "--overwrite").code == 0
    (entry,) = json.loads(found.read_text())["answers"]
    assert "".join(t["token"] for t in entry["tokens"]) == "abc"


def test_town(cli: Cli, models: list[str]) -> None:
    words = [
        "--task",
        "town",
        "--num-harmful",
        "2",
        "--num-benign",
        "1",
        "--max-new-tokens",
        "3",
        "--aligned",
        models[1],
    ]
    assert last_line(cli(*words, "--json"))["summary"]["answers"] == 3


REFUSED = [
    (["One"], "there is nothing to compare the base with"),
    (["One", "--lambda", "0.5"], "--lambda is about an aligned model"),
    (["--aligned", "a"], "there is no prompt"),
    (["One", "--aligned", "a", "-o", "no/such/folder/s.json"], "cannot be written"),
    (["One", "--aligned", "a", "-o", "shift.txt"], "allowed: files that end in .json, .html, .png"),
    (["One", "--aligned", "a", "-o", "a.json", "-o", "./a.json"], "names a file twice"),
    (["One", "--aligned", "a", "--overwrite"], "name it with --output"),
    (["One", "--aligned", "a", "--top", "0"], "--top is 0"),
    (["One", "--aligned", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
    (["One", "--aligned", "a", "--seed", "-1"], "--seed is -1"),
    (["One", "--aligned", "a", "--num-harmful", "3"], "count the requests of --task town"),
    (["One", "--aligned", "a", "--task", "town"], "drop the prompts"),
    (["--aligned", "a", "--task", "chess"], "allowed: town"),
    (["--aligned", "a", "--task", "town", "--raw"], "drop --raw and --preset"),
    (["One", "--aligned", "a", "--raw", "--preset", "hh"], "--raw and --preset exclude each other"),
    (["One", "--aligned", "a", "--preset", "nice"], "allowed: hh, adv"),
    (["One", "--aligned", "a", "--lambda", "0.5", "--target-kl", "1"], "exclude each other"),
    (["One", "--urial", "--prompt-file", "a.txt"], "exclude each other"),
    (["One", "--prompt-file", "a.txt"], "the prompt file 'a.txt' cannot be read"),
    (["One", "--edit", "a.safetensors"], "a.safetensors"),
    (["--aligned", "a", "--answers", "none.jsonl"], "the answers 'none.jsonl' cannot be read"),
    (["One", "--aligned", "/no/such/model"], "there is no folder '/no/such/model'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"), REFUSED, ids=lambda value: "_".join(value) if isinstance(value, list) else ""
)
def test_refused_in_one_sentence(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(*words)
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1, result.err
    assert said in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lines", "words", "said"),
    [
        ("", [], "holds no answer"), ("{", [], "line 1 of"), ('{"prompt": "a"}', [], "is no answer; write"),
        ('{"prompt": "a", "text": ""}', [], "answer 0 is empty"), ('{"prompt": "a", "text": "b"}', ["One"], "brings prompts and answers"),
        ('{"prompt": "a", "text": "b"}', ["--max-new-tokens", "3"], "brings prompts and answers"),
    ],
)  # fmt: skip
def test_bad_answers(cli: Cli, models: list[str], tmp_path: Path, lines: str, words: list[str], said: str) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(lines)
    result = cli("--aligned", models[1], "--answers", str(file), *words)
    assert (result.code, result.out) == (2, "")
    assert said in result.err.splitlines()[-1]


def test_an_edit_of_a_base_that_takes_no_part_is_refused(cli: Cli, models: list[str], tmp_path: Path) -> None:
    edit = str(tmp_path / "edit.safetensors")
    AlignEZ.from_directions({0: torch.ones(32)}, op="add").save(edit)
    result = cli("One", "--aligned", models[1], "--edit", edit)
    assert result.code == 2
    assert "give --edit-on aligned or both" in result.err


def test_different_tokenizers_are_refused(cli: Cli, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", 1)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(other)
    result = cli("One", "--aligned", str(other))
    assert (result.code, result.out) == (2, "")
    assert "vocabulary: 1 ids mean one token" in result.err


def test_a_run_that_fails_leaves_files_as_they_were(cli: Cli, tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.png"
    old.write_text("old")
    pytest.importorskip("matplotlib")
    assert cli("One", "--aligned", "/no/such/model", "-o", str(old), "-o", str(new), "--overwrite").code == 2
    assert old.read_text() == "old"
    assert not new.exists()
