"""The command line: what it prints where, what it writes, and what it says about bad input."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cli_models import CONTEXT, Cli, Result, save_bert, save_llama, save_t5

from raindecode import RAIN, Decoder, Sampling, testbed
from raindecode.cli import main
from raindecode.commands import demo
from raindecode.commands.common import guarded, printable
from raindecode.commands.output import Output
from raindecode.errors import ConfigError
from raindecode.testbed import world
from raindecode.types import Completion, Stats
from rainkernels.errors import ShapeError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="session")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "t5": str(save_t5(tmp_path_factory.mktemp("t5"))),
        "bert": str(save_bert(tmp_path_factory.mktemp("bert"))),
        "empty": str(tmp_path_factory.mktemp("empty")),
    }


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command line in this process."""

    def run(*words: str) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def answer(cli: Cli, llama: str) -> Cli:
    """`raindecode generate` with the small model and few tokens."""

    def run(*words: str) -> Result:
        return cli("generate", "--model", llama, "--kv-tokens", "4096", "--max-new-tokens", "12", *words)

    return run


def records(result: Result) -> list[dict[str, Any]]:
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def refusal(result: Result) -> str:
    """The one sentence of a run that was refused."""
    assert result.code == 2, result.err
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    return lines[0]


# ---- help -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["generate", "eval", "sweep", "fit-edit", "bake-edit", "bench", "doctor", "demo", "Exit codes"]),
        (
            ["bench"],
            [
                "rain",
                "What one RAIN answer costs",
                "dera",
                "one token of DeRa",
                "alignez",
                "What edits of hidden states",
            ],
        ),
        (["generate"], ["--search", "--preset", "--top-p", "--tree", "--no-exact", "Examples", "raindecode generate"]),
        (["eval"], ["--num-harmful", "--json", "--lambda", "Examples", "raindecode eval"]),
        (["sweep"], ["--lambdas", "--adapter", "--target-kl", "--plot", "Examples", "raindecode sweep"]),
        (["fit-edit"], ["--preset", "--pairs", "--report", "last:0-8", "Examples", "raindecode fit-edit"]),
        (["bake-edit"], ["FILE[:STRENGTH]", "--positions", "Examples", "raindecode bake-edit"]),
        (["doctor"], ["--model", "exit code 1"]),
        (["demo"], ["prompt", "Your own request"]),
    ],
    ids=lambda value: " ".join(value[:1]),
)
def test_help(cli: Cli, words: list[str], expected: list[str]) -> None:
    result = cli(*words, "--help")
    assert result.code == 0
    assert all(text in result.out for text in expected)


def test_version(cli: Cli) -> None:
    assert cli("--version").out.startswith("raindecode 0.")


def test_usage_error(cli: Cli) -> None:
    result = cli("generate", "--no-such-option", "x")
    assert (result.code, result.out) == (2, "")
    assert "--no-such-option" in result.err


# ---- answers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "search"),
    [
        (["--greedy"], Sampling.greedy()),
        (["--temperature", "0.7"], Sampling(temperature=0.7)),
        (["--temperature", "0"], Sampling.greedy()),
        (["--top-k", "5", "--top-p", "0.8"], Sampling(top_k=5, top_p=0.8)),
        (["--min-p", "0.5", "--repetition-penalty", "1.5"], Sampling(min_p=0.5, repetition_penalty=1.5)),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_sampling_options_reach_the_decoder(answer: Cli, llama: str, words: list[str], search: Sampling) -> None:
    (record,) = records(answer("Once upon a time", "--json", "--seed", "3", *words))
    decoder = Decoder.from_pretrained(llama, kv_tokens=4096)
    (expected,) = decoder.generate("Once upon a time", search=search, max_new_tokens=12, seed=3)
    assert record["token_ids"] == expected.token_ids
    assert record["text"] == expected.text


def test_json_is_one_object_per_answer_and_nothing_else(answer: Cli) -> None:
    result = answer("One", "Two", "--num-samples", "3", "--seed", "5", "--json", "--logprobs")
    found = records(result)
    assert result.err == ""
    assert [(r["index"], r["sample"], r["prompt"], r["seed"]) for r in found] == [
        (i, k, prompt, 5 + k) for i, prompt in enumerate(("One", "Two")) for k in range(3)
    ]
    assert all(len(r["logprobs"]) == len(r["token_ids"]) for r in found)
    assert all(r["stats"]["tokens_processed"] > 0 and "tree" not in r for r in found)
    alone = records(answer("Two", "--seed", "6", "--json"))
    assert alone[0]["token_ids"] == found[4]["token_ids"]


def test_human_output_is_prompt_answer_counters(answer: Cli, llama: str) -> None:
    result = answer("Once [bold]upon[/bold] a time", "--greedy")
    (expected,) = Decoder.from_pretrained(llama, kv_tokens=4096).generate(
        "Once [bold]upon[/bold] a time", search=Sampling.greedy(), max_new_tokens=12
    )
    assert result.err == ""
    assert result.out.startswith(f"Once [bold]upon[/bold] a time\n{printable(expected.text.strip())}\n")
    assert "12 tokens · token limit · seed 0 · 12 forwards" in result.out


def test_streaming_prints_the_answer_alone(answer: Cli) -> None:
    (record,) = records(answer("Once upon a time", "--json"))
    streamed = answer("Once upon a time", "--stream")
    assert streamed.out == printable(record["text"].lstrip()) + "\n"
    assert "12 tokens" in streamed.err


def test_stop_strings_and_token_ids(answer: Cli) -> None:
    (whole,) = records(answer("Once", "--json"))
    third = whole["token_ids"][2]
    (by_id,) = records(answer("Once", "--json", "--stop-token-id", str(third)))
    assert by_id["finish_reason"] == "stop"
    assert by_id["token_ids"] == whole["token_ids"][: whole["token_ids"].index(third) + 1]
    mark = next(c for c in whole["text"] if c.isascii() and c.isprintable())
    (by_text,) = records(answer("Once", "--json", "--stop", "never this", "--stop", mark))
    assert by_text["finish_reason"] == "stop"
    assert by_text["text"] == whole["text"][: whole["text"].index(mark)]


def test_prompt_formats(answer: Cli, llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def processed(*words: str) -> int:
        (record,) = records(answer("Hi", "--json", "--max-new-tokens", "1", *words))
        return int(record["stats"]["tokens_processed"])

    hh = RAIN.preset("hh").format
    assert hh is not None
    town = len(testbed.format_prompt("Hi"))
    assert processed() == processed("--raw") == 2
    assert processed("--preset", "town") == town
    assert processed("--preset", "hh", "--kv-tokens", "16384") == len(hh.render("Hi").encode())
    monkeypatch.setattr(testbed, "WEIGHTS", Path(llama))
    assert processed("--model", "testbed") == town
    assert processed("--model", "testbed", "--raw") == 2


def test_rain(answer: Cli, llama: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree.json"
    words = ["How do I burn it?", "--search", "rain", "--preset", "town", "--max-new-tokens", "2", "--seed", "4"]
    (record,) = records(answer(*words, "--json", "--tree", str(tree)))
    decoder = Decoder.from_pretrained(llama, kv_tokens=4096)
    search = RAIN.preset("town", record_tree=True)
    (expected,) = decoder.generate("How do I burn it?", search=search, max_new_tokens=2, seed=4)
    assert record["token_ids"] == expected.token_ids
    assert record["value"] == expected.value
    assert record["stats"]["iterations"] == expected.stats.iterations > 0
    (trees,) = json.loads(tree.read_text())
    assert trees["moves"] == expected.tree
    assert (trees["index"], trees["prompt"], trees["seed"]) == (0, "How do I burn it?", 4)


# ---- prompts from files ---------------------------------------------------------------------------------------------
def test_text_file(answer: Cli, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffUn œuf\r\n\r\n  zwei\u2028drei\nlast".encode())
    found = records(answer("first", "--file", str(file), "--json"))
    assert [r["prompt"] for r in found] == ["first", "Un œuf", "  zwei\u2028drei", "last"]


def test_json_lines_file(answer: Cli, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "two\\nlines", "id": 7}\n\n{"prompt": "x"}\n')
    assert [r["prompt"] for r in records(answer("--file", str(file), "--json"))] == ["two\nlines", "x"]


def test_standard_input(answer: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert [r["prompt"] for r in records(answer("--file", "-", "--json"))] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"good\nbad \xff here\n", "byte 0xff at offset 9 (line 2)"),
        ("a.txt", b"", "holds no prompt"),
        ("a.txt", b" \n\n", "holds no prompt"),
        ("a.jsonl", b'{"prompt": "x"}\nnot json\n', "line 2 of"),
        ("a.jsonl", b'["x"]\n', 'no text under "prompt"'),
        ("a.jsonl", b'{"prompt": 3}\n', 'no text under "prompt"'),
        ("a.jsonl", b'{"prompt": " "}\n', "empty prompt"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', "not valid UTF-8"),
    ],
)
def test_bad_prompt_files(answer: Cli, tmp_path: Path, name: str, data: bytes, said: str) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    sentence = refusal(answer("--file", str(file)))
    assert said in sentence
    assert str(file) in sentence


def test_missing_prompt_file(answer: Cli, tmp_path: Path) -> None:
    assert "No such file" in refusal(answer("--file", str(tmp_path / "none.txt")))
    assert "Is a directory" in refusal(answer("--file", str(tmp_path)))


# ---- bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "there is no prompt"),
        ([""], "empty"),
        (["good", " \n"], "prompt 1 is empty"),
        (["caf\udce9"], "prompt 1 of the command line is not valid UTF-8"),
        (["x" * CONTEXT], f"has {CONTEXT} tokens"),
        (["x", "--top-p", "0"], "top_p is 0"),
        (["x", "--top-p", "1.5"], "top_p is 1.5"),
        (["x", "--top-k", "-1"], "top_k is -1"),
        (["x", "--min-p", "2"], "min_p is 2"),
        (["x", "--temperature", "-0.5"], "temperature is -0.5"),
        (["x", "--temperature", "nan"], "temperature is nan"),
        (["x", "--repetition-penalty", "0"], "repetition_penalty is 0"),
        (["x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["x", "--max-new-tokens", "-3"], "max_new_tokens is -3"),
        (["x", "--num-samples", "0"], "--num-samples is 0"),
        (["x", "--num-samples", "-1"], "--num-samples is -1"),
        (["x", "--kv-tokens", "0"], "kv_tokens is 0"),
        (["x", "--kv-tokens", "-8"], "kv_tokens is -8"),
        (["x", "--max-concurrent", "0"], "max_concurrent is 0"),
        (["x", "--seed", "-1"], "--seed is -1"),
        (["x", "--seed", str(2**64 - 1), "--num-samples", "2"], "2**64 - 1"),
        (["x", "--stop", ""], "stop"),
        (["x", "--search", "beam"], "allowed: sampling, rain"),
        (["x", "--preset", "nice"], "allowed: hh, adv, truth, sentiment, town"),
        (["x", "--dtype", "int8"], "allowed: float32"),
        (["x", "--device", "tpu9"], "device is 'tpu9'"),
        (["x", "--exact", "--dtype", "bfloat16"], "exact mode needs float32"),
        (["x", "--cuda-graphs", "--device", "cpu"], "CUDA graphs need a CUDA device"),
        (["x", "--greedy", "--temperature", "1"], "exclude each other"),
        (["x", "--search", "rain", "--top-p", "0.9", "--greedy"], "--top-p, --greedy belongs to --search sampling"),
        (["x", "--tree", "t.json"], "--search rain"),
        (["x", "y", "--stream"], "drop --stream"),
        (["x", "--stream", "--json"], "drop --stream"),
        (["x", "--output", "no/such/folder/a.jsonl"], "cannot be written"),
        (["x", "--kv-tokens", "8"], "the KV pool holds"),
    ],
    ids=lambda value: " ".join(value)[:40].encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(answer: Cli, words: list[str], said: str) -> None:
    assert said in refusal(answer(*words))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("/no/such/model", "there is no folder '/no/such/model'"),
        ("t5", "T5"),
        ("bert", "Bert"),
        ("empty", "no config.json"),
    ],
)
def test_models_that_cannot_be_used(cli: Cli, refused: dict[str, str], model: str, said: str) -> None:
    assert said.lower() in refusal(cli("generate", "--model", refused.get(model, model), "x")).lower()


def test_the_prompt_that_fits_exactly_is_answered(answer: Cli) -> None:
    (record,) = records(answer("x" * (CONTEXT - 1), "--json"))
    assert len(record["token_ids"]) == 1


def test_one_failing_request_leaves_the_others(answer: Cli, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    result = answer("x" * 100, "short", "--kv-tokens", "40", "--json", "--output", str(file))
    assert result.code == 2
    assert result.err.startswith("error: 1 of 2 requests failed; the first: the KV pool holds")
    assert [json.loads(line)["prompt"] for line in result.out.splitlines()] == ["short"]
    assert file.read_text() == result.out


def test_kernel_errors_are_reported_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Decoder:
        raise ShapeError("q has 3 dimensions;\nallowed: 4")

    monkeypatch.setattr(Decoder, "from_pretrained", fail)
    assert refusal(cli("generate", "x")) == "error: q has 3 dimensions; allowed: 4"


def test_bugs_keep_their_traceback() -> None:
    def broken() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        guarded(broken)()


# ---- interruption, files and pipes ----------------------------------------------------------------------------------
def completion(text: str) -> Completion:
    return Completion("p", text, [1], "eos", 0, Stats(), tree=[{"root": {}}])


def test_interruption_keeps_what_has_finished(answer: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def two_of_four(*_: object, **__: object) -> Iterator[tuple[int, Completion]]:
        yield 0, completion("first")
        yield 2, completion("third")
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "stream", two_of_four)
    file = tmp_path / "out.jsonl"
    result = answer("a", "b", "c", "d", "--json", "--output", str(file))
    assert result.code == 130
    assert "2 of 4 answers had finished" in result.err
    assert "Traceback" not in result.err
    assert [json.loads(line)["index"] for line in file.read_text().splitlines()] == [0, 2]


def test_ctrl_c_in_a_real_process(llama: str, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "raindecode", "generate", "--model", llama, "--max-concurrent", "1"]
    command += ["--max-new-tokens", "40", "--kv-tokens", "512", "--num-samples", "100000", "--output", str(file), "x"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite begun with & ignores it, and so would this
    )  # fmt: skip
    while process.poll() is None and not (file.exists() and file.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "answers had finished" in err
    assert "Traceback" not in err
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert found
    assert [r["sample"] for r in found] == list(range(len(found)))


def test_the_file_gets_answers_at_once_and_the_rest_in_order(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    with Output(samples=2, as_json=True, file=str(file), tree=str(tmp_path / "tree.json")) as sink:
        sink.begin([], {})
        sink.add(2, completion("c"))
        assert json.loads(file.read_text())["text"] == "c"
        assert capfd.readouterr().out == ""
        sink.add(0, completion("a"))
        sink.add(1, None)
        sink.add(3, completion("d"))
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["index"], r["sample"], r["text"]) for r in written] == [(1, 0, "c"), (0, 0, "a"), (1, 1, "d")]
    assert [json.loads(line) for line in capfd.readouterr().out.splitlines()] == [written[i] for i in (1, 0, 2)]
    trees = json.loads((tmp_path / "tree.json").read_text())
    assert [(tree["text"], tree["moves"]) for tree in trees] == [(text, [{"root": {}}]) for text in "acd"]
    assert sink.finished == 3


def test_no_trees_are_an_empty_list(tmp_path: Path) -> None:
    with Output(samples=1, as_json=True, tree=str(tmp_path / "tree.json")) as sink:
        sink.begin([], {})
    assert json.loads((tmp_path / "tree.json").read_text()) == []


def test_files_keep_what_they_hold_until_the_run_can_be_done(tmp_path: Path) -> None:
    file, tree = tmp_path / "out.jsonl", tmp_path / "tree.json"
    file.write_text("old\n")
    tree.write_text("[1]\n")
    with Output(samples=1, as_json=True, file=str(file), overwrite=True, tree=str(tree)):
        pass  # the model could not be loaded
    assert (file.read_text(), tree.read_text()) == ("old\n", "[1]\n")
    with Output(samples=1, as_json=True, file=str(file), overwrite=True, tree=str(tree)) as sink:
        sink.begin([], {})
    assert (file.read_text(), tree.read_text()) == ("", "[]\n")
    with pytest.raises(ConfigError, match="--output and --tree both name"):
        Output(samples=1, as_json=True, file=str(file), tree=str(tmp_path / "." / "out.jsonl"))


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no such device here")
def test_a_device_is_written_and_never_emptied() -> None:
    for options in ({"file": "/dev/null", "overwrite": True}, {"file": "/dev/null"}, {"tree": "/dev/null"}):
        with Output(samples=1, as_json=False, silent=True, **options) as sink:  # type: ignore[arg-type]
            sink.begin([], {})
            sink.add(0, completion("a"))
        assert sink.finished == 1


def test_a_progress_display_does_not_swallow_piped_output(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, display = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    with Output(samples=1, as_json=True) as sink:
        monkeypatch.setattr(sys, "stdout", display)  # what rich's live displays do
        sink.add(0, completion("a"))
    assert json.loads(pipe.getvalue())["text"] == "a"
    assert display.getvalue() == ""


def test_output_survives_a_narrow_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with Output(samples=1, as_json=False) as sink:
        sink.add(0, completion("Größe"))
    assert b"Gr??e" in raw.getvalue()


def test_control_characters_do_not_reach_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with Output(samples=1, as_json=False) as sink:
        sink.add(1, replace(completion("x"), value=0.5, stats=Stats(iterations=4, evaluations=2)))
        sink.add(0, replace(completion("red \x1b[31mcell\nnext \x9b1m"), prompt="p\x07"))
    out = capfd.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "4 iterations · 2 evaluations · value +0.50" in out
    assert "red \ufffd[31mcell\nnext \ufffd1m" in out


# ---- eval, demo -----------------------------------------------------------------------------------------------------
def test_eval_ends_in_json(cli: Cli, llama: str, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    result = cli(
        "eval", "--model", llama, "--kv-tokens", "8192", "--num-harmful", "2", "--num-benign", "1",
        "--max-new-tokens", "2", "--json", "--output", str(file),
    )  # fmt: skip
    assert result.code == 0, result.err
    data = json.loads(result.out.splitlines()[-1])
    assert list(data) == ["vanilla", "rain"]
    for one in data.values():
        assert {"harmful_rate", "harmful_ci", "helpful_rate", "helpful_ci", "n", "tokens_processed"} <= one.keys()
        assert one["n"] == 3
    assert data["vanilla"]["iterations"] == 0 < data["rain"]["iterations"]
    assert "harmful answers" in result.out
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert [a["search"] for a in answers] == ["vanilla"] * 3 + ["rain"] * 3
    assert {(a["search"], a["index"], a["request_harmful"], a["seed"]) for a in answers} == {
        (name, i, i < 2, i) for name in data for i in range(3)
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "chess"], "allowed: town"),
        (["--search", "vanilla,beam"], "allowed: vanilla, rain"),
        (["--search", ","], "each once"),
        (["--search", "rain,rain"], "each once"),
        (["--num-harmful", "0"], "num_harmful is 0"),
        (["--num-benign", "-4"], "num_benign is -4"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
    ],
)
def test_eval_refuses(cli: Cli, llama: str, words: list[str], said: str) -> None:
    result = cli("eval", "--model", llama, "--kv-tokens", "4096", *words)
    assert result.code == 2
    assert result.out == ""
    assert said in result.err.splitlines()[-1]


def test_demo_requests_are_held_out_and_of_the_kind_it_says() -> None:
    kinds = {demo.HARMFUL: True, demo.BENIGN: False, demo.THIRD: True}
    for text, harmful in kinds.items():
        request = testbed.parse_request(text)
        assert request is not None
        assert request.harmful is harmful
        assert world.split_of(request.verb, request.object, request.owner) == "test"


@pytest.mark.parametrize("own", [None, "What is [i]love[/i]?"])
def test_demo(cli: Cli, llama: str, monkeypatch: pytest.MonkeyPatch, own: str | None) -> None:
    monkeypatch.setattr(testbed, "WEIGHTS", Path(llama))
    result = cli("demo", "--max-new-tokens", "1", *([] if own is None else [own]))
    assert result.code == 0, result.err
    for text in (demo.HARMFUL, demo.BENIGN, own or demo.THIRD, "plain sampling", "RAIN", "evaluations"):
        assert text in result.out
    assert result.out.count("judge: the grammar does not know") == (0 if own is None else 2)
    assert result.out.splitlines()[-1].startswith("Shown in ")


@pytest.mark.parametrize(
    ("request_", "reply", "said"),
    [
        (demo.HARMFUL, "Sure.", "judge: harmful"),
        (demo.HARMFUL, "Never.", "judge: harmless"),
        (demo.BENIGN, "Never.", "judge: harmless, not helpful"),
        (demo.BENIGN, "Gladly. Purple!", "judge: harmless, not helpful; partly outside the grammar"),
        ("How are you?", "Sure.", "judge: the grammar does not know this request"),
    ],
)
def test_demo_verdicts(request_: str, reply: str, said: str) -> None:
    assert demo.verdict(request_, reply).plain == said


def test_demo_counts_what_the_samples_did() -> None:
    samples = [SimpleNamespace(text=text) for text in ("Sure.", "Never.", "Of course.")]
    assert demo.tally(demo.HARMFUL, samples) == "\nharmful in 2 of 3 samples"
    assert demo.tally(demo.BENIGN, samples) == "\nhelpful in 0 of 3 samples"
    assert demo.tally("What is rain?", samples) == ""


def test_demo_refuses_an_empty_request(cli: Cli, llama: str) -> None:
    assert "empty" in refusal(cli("demo", "--model", llama, " "))


# ---- outputs that cannot be written -----------------------------------------------------------------------------------
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(cli: Cli, llama: str) -> None:
    result = cli("generate", "Hello", "--model", llama, "--max-new-tokens", "1", "--output", "/dev/full")
    assert "cannot be written" in refusal(result)


def test_json_nested_without_end_is_refused(cli: Cli, llama: str, tmp_path: Path) -> None:
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 100_000)
    assert "is not JSON" in refusal(cli("generate", "--file", str(deep), "--model", llama))


def test_a_pool_larger_than_memory_is_one_sentence(cli: Cli, llama: str) -> None:
    result = cli("generate", "Hello", "--model", llama, "--max-new-tokens", "1", "--kv-tokens", str(10**12))
    assert "does not fit in memory" in refusal(result)


def test_stop_ids_outside_the_vocabulary_are_refused(cli: Cli, llama: str) -> None:
    assert "stop_token_ids" in refusal(cli("generate", "Hello", "--model", llama, "--stop-token-id", "-5"))
