"""A run that was killed goes on from the file it wrote: nothing is done twice, nothing is lost, nothing is mixed up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cli_models import Cli, Result, save_llama

from raindecode import Decoder
from raindecode.cli import main
from raindecode.commands.answer_file import AnswerFile
from raindecode.errors import ConfigError
from raindecode.types import Request

ROOT = Path(__file__).parents[2]
PROMPTS = ("One", "Two", "Three")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(prompt, seed) of every request that reached the decoder."""
    seen: list[tuple[str, int]] = []
    stream = Decoder.stream

    def noting(self: Decoder, requests: Sequence[Request], **options: Any) -> Any:
        seen.extend((request.prompt, request.seed) for request in requests)
        return stream(self, requests, **options)

    monkeypatch.setattr(Decoder, "stream", noting)
    return seen


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], llama: str) -> Cli:
    """A command with the small model, in this process."""

    def run(command: str, *words: str) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([command, "--model", llama, "--kv-tokens", "4096", *words])
        out, err = capfd.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def answer(cli: Cli, tmp_path: Path) -> Cli:
    """`raindecode generate` of three prompts, two samples each, into out.jsonl."""

    def run(*words: str, prompts: Sequence[str] = PROMPTS) -> Result:
        file = str(tmp_path / "out.jsonl")
        return cli("generate", *prompts, "--num-samples", "2", "--max-new-tokens", "6", "--output", file, *words)

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def refusal(result: Result) -> str:
    """The one sentence of a run that was refused."""
    assert result.code == 2, result.err
    assert result.out == ""
    assert result.err.count("\n") == 1, result.err
    return result.err.removeprefix("error: ")


def records(file: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """What is in a file by (index, sample), times left out; each is there once."""
    found = {}
    for line in file.read_text().splitlines():
        record = json.loads(line)
        del record["stats"]
        assert (record["index"], record["sample"]) not in found
        found[record["index"], record["sample"]] = record
    return found


# ---- going on ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("whole", "torn"), [(0, 0), (0, 40), (1, 0), (2, 1), (4, 300), (5, -1), (6, 0)], ids=lambda value: str(value)
)
def test_what_a_killed_run_left_is_gone_on_with(
    answer: Cli, file: Path, asked: list[tuple[str, int]], whole: int, torn: int
) -> None:
    assert answer().code == 0
    expected = records(file)
    lines = file.read_bytes().splitlines(keepends=True)
    left = b"".join(lines[:whole]) + (lines[whole][:torn] if torn else b"")  # -1: all but the end of the line
    file.write_bytes(left)
    kept = whole + (torn == -1)
    asked.clear()
    result = answer("--resume", "--json")
    assert result.code == 0, result.err
    assert len(asked) == 6 - kept
    assert not {(r["prompt"], r["seed"]) for r in map(json.loads, lines[:kept])} & set(asked)
    assert records(file) == expected
    assert file.read_bytes().startswith(b"".join(lines[:kept]))
    shown = [json.loads(line) for line in result.out.splitlines()]
    assert [(r["prompt"], r["seed"]) for r in shown] == asked
    assert (f"{kept} of 6 answers were there, {6 - kept} to go" in result.err) == (kept > 0)


def test_resume_starts_a_run_that_has_no_file(answer: Cli, file: Path) -> None:
    assert answer("--resume").code == 0
    assert sorted(records(file)) == [(i, k) for i in range(3) for k in range(2)]


def test_more_prompts_and_samples_may_follow(cli: Cli, answer: Cli, file: Path, asked: list[tuple[str, int]]) -> None:
    assert answer().code == 0
    asked.clear()
    words = ["--num-samples", "3", "--max-new-tokens", "6", "--output", str(file), "--resume"]
    assert cli("generate", *PROMPTS, "Four", *words).code == 0
    assert asked == [("One", 2), ("Two", 2), ("Three", 2), ("Four", 0), ("Four", 1), ("Four", 2)]
    assert sorted(records(file)) == [(i, k) for i in range(4) for k in range(3)]


def test_a_request_that_failed_is_tried_again(cli: Cli, file: Path, asked: list[tuple[str, int]]) -> None:
    words = ["x" * 100, "short", "--max-new-tokens", "6", "--output", str(file), "--resume"]
    assert "1 of 2 requests failed" in cli("generate", *words, "--kv-tokens", "40").err
    asked.clear()
    assert cli("generate", *words).code == 0
    assert asked == [("x" * 100, 0)]
    assert sorted(records(file)) == [(0, 0), (1, 0)]


def test_a_run_killed_without_warning_is_finished(
    llama: str, cli: Cli, file: Path, asked: list[tuple[str, int]]
) -> None:
    prompts = [f"prompt {i}" for i in range(40)]
    words = [*prompts, "--max-new-tokens", "30", "--max-concurrent", "3", "--output", str(file), "--resume"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "raindecode", "generate", "--model", llama, "--kv-tokens", "4096", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") >= 4):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = file.read_bytes().count(b"\n")
    assert there >= 4
    assert cli("generate", *words).code == 0
    assert len(asked) == len(prompts) - there
    assert sorted(records(file)) == [(i, 0) for i in range(len(prompts))]


# ---- what is refused --------------------------------------------------------------------------------------------------
def test_answers_are_not_overwritten_unasked(answer: Cli, file: Path) -> None:
    assert answer().code == 0
    before = file.read_bytes()
    sentence = refusal(answer())
    assert "holds answers already: --resume goes on with them, --overwrite drops them" in sentence
    assert file.read_bytes() == before
    assert answer("--overwrite", "--seed", "7").code == 0
    assert {record["seed"] for record in records(file).values()} == {7, 8}


def test_an_empty_file_holds_nothing(answer: Cli, file: Path) -> None:
    file.touch()
    assert answer().code == 0
    assert len(records(file)) == 6


def test_another_runs_file_is_refused(answer: Cli, file: Path, asked: list[tuple[str, int]]) -> None:
    assert answer("--max-concurrent", "1").code == 0
    before = file.read_bytes()
    asked.clear()
    for words, said in {
        "--max-new-tokens 7": "was written with max_new_tokens 6 (line 1), this run has max_new_tokens 7",
        "--temperature 0.5": "was written with the default temperature (line 1), this run has temperature 0.5",
        "--greedy": "this run has temperature 0.0",
        "--logprobs": "this run has logprobs true",
        "--stop a": 'this run has stop ["a"]',
        "--stop-token-id 5": "this run has stop_token_ids [5]",
        "--raw": "this run has raw true",
        "--preset town": 'this run has preset "town"',
        "--search rain --preset town": 'this run has search "rain"',
        "--dtype bfloat16": 'was written with dtype "float32" (line 1), this run has dtype "bfloat16"',
        "--seed 1": "has as seed of prompt 0, sample 0: 0; this run has 1",
        "--num-samples 1": "sample 1; this run has 3 prompts, 1 samples each",
    }.items():
        sentence = refusal(answer("--resume", *words.split()))
        assert said in sentence
        assert "name another file" in sentence
    for prompts, said in {
        ("Two", "One", "Three"): "has as prompt of prompt 0, sample 0: 'One'; this run has 'Two'",
        ("One",): "holds prompt 1, sample 0; this run has 1 prompts, 2 samples each",
    }.items():
        assert said in refusal(answer("--resume", prompts=prompts))
    assert asked == []
    assert file.read_bytes() == before


def test_a_file_that_makes_no_sense_is_refused(answer: Cli, file: Path) -> None:
    assert answer("--max-concurrent", "1").code == 0
    lines = file.read_bytes().splitlines(keepends=True)
    for damaged, said in (
        ([b"no json\n", *lines], f"line 1 of {str(file)!r} is no answer of raindecode"),
        ([lines[0], b"[1]\n", *lines[1:]], "line 2 of"),
        ([*lines, lines[2]], "holds prompt 1, sample 0 a second time: remove one"),
        ([b'{"prompt": "One"}\n'], "does not say what settings"),
        ([lines[0].replace(b'"index": 0', b'"index": null')], "holds prompt None, sample 0"),
        ([lines[0].replace(b'"index": 0', b'"index": -1')], "holds prompt -1, sample 0"),
    ):
        file.write_bytes(b"".join(damaged))
        assert said in refusal(answer("--resume"))
        assert file.read_bytes() == b"".join(damaged)


def test_options_that_do_not_go_together(cli: Cli, answer: Cli, tmp_path: Path) -> None:
    assert "name it with --output" in refusal(cli("generate", "x", "--resume"))
    assert "name it with --output" in refusal(cli("generate", "x", "--overwrite"))
    assert "exclude each other" in refusal(answer("--resume", "--overwrite"))
    tree = ["--search", "rain", "--tree", str(tmp_path / "tree.json")]
    assert "--tree holds the searches of one whole run" in refusal(answer("--resume", *tree))
    device = cli("generate", "x", "--max-new-tokens", "1", "--output", os.devnull, "--resume")
    assert "no ordinary file" in refusal(device)
    assert cli("generate", "x", "--max-new-tokens", "1", "--output", os.devnull).code == 0


def test_two_runs_do_not_share_a_file(answer: Cli, file: Path) -> None:
    pytest.importorskip("fcntl")
    other = AnswerFile(str(file))
    for words in ([], ["--resume"], ["--overwrite"]):
        assert "another run is writing" in refusal(answer(*words))
    other.close()
    assert answer().code == 0


# ---- eval -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def evaluate(cli: Cli, tmp_path: Path) -> Cli:
    """`raindecode eval` of three requests and both searches into out.jsonl."""

    def run(*words: str) -> Result:
        few = ["--num-harmful", "2", "--num-benign", "1", "--max-new-tokens", "2", "--json"]
        return cli("eval", *few, "--output", str(tmp_path / "out.jsonl"), *words)

    return run


def results(result: Result) -> dict[str, Any]:
    """Results by search, without what a resumed run does not have to run."""
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out.splitlines()[-1])
    for one in found.values():
        for name in ("seconds", "model_steps", "resumed", "tokens_charged"):
            one.pop(name, None)
    return found


@pytest.mark.parametrize("whole", [4])
def test_an_evaluation_is_gone_on_with(evaluate: Cli, file: Path, asked: list[tuple[str, int]], whole: int) -> None:
    first = evaluate()
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    file.write_bytes(b"".join(lines[:whole]) + b"".join(lines[whole:])[:50])
    asked.clear()
    again = evaluate("--resume")
    assert len(asked) == 6 - whole
    assert results(again) == results(first)
    assert ("answered before" in again.out) == (whole > 0)
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(one["search"], one["index"]) for one in found} == {(s, i) for s in ("vanilla", "rain") for i in range(3)}
    assert len(found) == 6


def test_another_evaluations_file_is_refused(evaluate: Cli, file: Path) -> None:
    assert evaluate("--search", "vanilla").code == 0
    before = file.read_bytes()
    for words, said in {
        "": "holds answers already",
        "--resume --seed 1": "was written with seed 0 (line 1), this run has seed 1",
        "--resume --num-benign 2": "this run has num_benign 2",
        "--resume --max-new-tokens 3": "this run has max_new_tokens 3",
    }.items():
        assert said in refusal(evaluate("--search", "vanilla", *words.split()))
    assert file.read_bytes() == before


def test_an_evaluations_file_that_makes_no_sense_is_refused(evaluate: Cli, answer: Cli, file: Path) -> None:
    assert evaluate("--search", "vanilla").code == 0
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[0])
    assert "a second time" in refusal(evaluate("--resume"))
    file.write_bytes(lines[0].replace(b'"search": "vanilla"', b'"search": "beam"'))
    assert "line 1" in refusal(evaluate("--resume"))
    file.write_bytes(lines[0].replace(b'"request": "', b'"request": "X'))
    assert "answers none of this run's requests" in refusal(evaluate("--resume"))
    assert answer("--overwrite").code == 0
    assert "was written with the default task" in refusal(evaluate("--resume"))


@pytest.mark.parametrize("foreign", ['[{"id": 0}]', "a note", '"text"', "12", '{"other": ', "[1]\n", "note\n"])
def test_a_file_of_something_else_stays_as_it_is(foreign: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(foreign)
    with AnswerFile(str(path), resume=True) as file:
        file.begin()
        with pytest.raises(ConfigError, match="is no answer of raindecode"):
            list(file.records())
    assert path.read_text() == foreign


@pytest.mark.parametrize("torn", ['{"index": 1, "te', '{"ind', "{", '{"index": 1, "text": "a'])
def test_a_torn_record_is_cut_off(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"index": 0}\n' + torn)
    with AnswerFile(str(path), resume=True) as file:
        assert [record for _, record in file.records()] == [{"index": 0}]
    assert path.read_text() == '{"index": 0}\n'
