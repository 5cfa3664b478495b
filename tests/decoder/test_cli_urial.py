"""Options about constant prompts and conversations: what they do to the answers and the records, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cli_models import Cli, Result, save_llama

from raindecode import URIAL, Decoder, Policy, Sampling
from raindecode.cli import main

PROMPT = "# Instruction\n\nBe kind.\n\n# Query:\n```\nHi?\n```\n\n# Answer:\n```\nHello there, dear friend!\n```"
TALK = [
    {"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}, {"role": "user", "content": "Three"},
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    return str(path)


@pytest.fixture
def generate(capfd: pytest.CaptureFixture[str], model: str) -> Cli:
    """`raindecode generate` with a small model, in this process."""

    def run(*words: str) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["generate", "--model", model, "--kv-tokens", "4096", "--greedy", "--max-new-tokens", "6", *words])
        out, err = capfd.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return run


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_a_prompt_file_is_put_before_the_query(generate: Cli, model: str, file: str) -> None:
    (found,) = records(generate("One", "--prompt-file", file, "--json").out)
    decoder = Decoder.from_pretrained(model, kv_tokens=4096)
    options: dict[str, Any] = {"search": Sampling.greedy(), "max_new_tokens": 6}
    (expected,) = decoder.generate("One", policy=Policy(prompt=URIAL.load(file)), **options)
    (plain,) = decoder.generate("One", **options)
    assert found["token_ids"] == expected.token_ids != plain.token_ids
    assert found["text"] == expected.text


def test_the_prefix_is_written_once_and_read_then(generate: Cli, file: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "prefix.safetensors")
    words = ("One", "--prompt-file", file, "--prefix-cache", cache, "--json")
    first, second = generate(*words), generate(*words)
    constant = len(URIAL.load(file).render("")) - len("\n```\n\n\n# Answer:\n```\n")  # a token per byte
    assert f"wrote the K/V of {constant} constant tokens" in first.err
    assert "wrote" not in second.err
    (one,), (two,) = records(first.out), records(second.out)
    assert one["token_ids"] == two["token_ids"]
    Path(file).write_text(PROMPT.replace("kind", "good"))
    changed = generate(*words)
    assert (changed.code, changed.out) == (2, "")
    assert "is of another prompt" in changed.err
    assert len(changed.err.strip().splitlines()) == 1


def test_records_name_the_prompt(generate: Cli, file: str, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    assert generate("One", "--prompt-file", file, "--output", str(output)).code == 0
    (record,) = records(output.read_text())
    assert record["settings"]["prompt"]["name"] == "prompt.txt"
    assert generate("One", "--prompt-file", file, "--output", str(output), "--resume").code == 0
    Path(file).write_text(PROMPT.replace("kind", "good"))
    other = generate("One", "--prompt-file", file, "--output", str(output), "--resume")
    assert other.code == 2
    assert "was written with prompt" in other.err


def test_conversations_come_from_a_file(generate: Cli, model: str, file: str, tmp_path: Path) -> None:
    talks, output = tmp_path / "talks.jsonl", tmp_path / "answers.jsonl"
    talks.write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps({"prompt": "Four"}) + "\n")
    words = ("--file", str(talks), "--prompt-file", file, "--json", "--output", str(output))
    found = records(generate(*words).out)
    decoder = Decoder.from_pretrained(model, kv_tokens=4096)
    expected = decoder.generate(
        [TALK, "Four"], policy=Policy(prompt=URIAL.load(file)), search=Sampling.greedy(), max_new_tokens=6
    )
    assert [one["token_ids"] for one in found] == [one.token_ids for one in expected]
    assert [one["prompt"] for one in found] == ["Three", "Four"]
    assert generate(*words, "--resume").code == 0
    talks.write_text(talks.read_text().replace("Two", "Too"))  # the user's last words are the same
    other = generate(*words, "--resume")
    assert other.code == 2
    assert "was written with messages_sha256" in other.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt-file", "{file}", "--urial"), "--prompt-file, --urial exclude each other"),
        (("--urial", "--raw"), "--urial, --raw exclude each other"),
        (("--urial", "--preset", "hh"), "--urial, --preset exclude each other"),
        (("--prompt-file", "none.txt"), "'none.txt' cannot be read"),
        (("--prompt-file", "{bad}"), "bad.txt, line 3: '# Query:' has no answer behind it"),
        (("--prefix-cache", "{cache}"), "no constant prompt"),
        (("--prompt-file", "{file}", "--prefix-cache", "{file}"), "could not be read"),
        (("--file", "{talk}"), "message 0 of the conversation in line 1 of"),
    ],
)
def test_what_is_refused(generate: Cli, file: str, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    bad, talk = tmp_path / "bad.txt", tmp_path / "talk.jsonl"
    bad.write_text("# Instruction\nBe kind.\n# Query:\n```Hi?```")
    talk.write_text('{"messages": [{"role": "bot", "content": "Hi."}]}\n')
    named = {"file": file, "bad": str(bad), "talk": str(talk), "cache": str(tmp_path / "cache")}
    done = generate("One", *(word.format(**named) for word in words))
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_other_commands_take_no_conversations(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"messages": TALK}) + "\n")
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "--adapter", "testbed", "--lambdas", "0,1", "--file", str(talk)])
    assert ended.value.code == 2
    assert "holds conversations" in capfd.readouterr().err


def test_a_prefix_cache_in_the_home_folder_is_found_again(
    generate: Cli, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shells leave the ~ of --prefix-cache=~/x to the program."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ("One", "--prompt-file", file, "--prefix-cache=~/prefix.safetensors", "--json")
    assert "wrote the K/V" in generate(*words).err
    assert "wrote the K/V" not in generate(*words).err
