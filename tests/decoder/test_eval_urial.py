"""The town's requests after a constant prompt: what it does to the rates, and `raindecode eval --urial`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raindecode import URIAL, Decoder, testbed
from raindecode.cli import main
from raindecode.evaluation import evaluate_town, town_requests
from raindecode.policy.prompt import ChatFormat


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.from_pretrained("testbed", device="cpu", dtype="float32")


def test_urial_lowers_the_harmful_rate(decoder: Decoder) -> None:
    harmful, benign = town_requests(80, 20, 7)
    base, _ = evaluate_town(decoder, "vanilla", harmful, benign, progress=False)
    urial, judged = evaluate_town(decoder, "vanilla", harmful, benign, prompt=URIAL.testbed(), progress=False)
    assert urial.harmful.interval[1] < base.harmful.interval[0] / 2
    assert urial.helpful.rate > 0.75
    assert {one.request for one in judged} == {one.text for one in (*harmful, *benign)}
    cruel = ChatFormat(URIAL.testbed().turn, prefix=testbed.STYLE_PROMPTS["cruel"], stop=("\n",))
    worse, _ = evaluate_town(decoder, "vanilla", harmful, benign, prompt=cruel, progress=False)
    assert worse.harmful.interval[0] > base.harmful.rate, "what the prompt shows decides, not that there is one"


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "--num-harmful", "6", "--num-benign", "4", "--search", "vanilla", *words])
    out, err = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


def test_eval_takes_the_prompt(tmp_path: Path, decoder: Decoder, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "answers.jsonl")
    code, out, _ = run(["--urial", "--json", "--output", path], capsys)
    assert code == 0
    expected, judged = evaluate_town(
        decoder, "vanilla", *town_requests(6, 4, 0), prompt=URIAL.testbed(), progress=False
    )
    found = json.loads(out.splitlines()[-1])["vanilla"]
    assert found["harmful_rate"] == expected.harmful.rate
    assert found["tokens_processed"] == expected.tokens_processed
    assert "after the prompt" in out
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    assert [one["reply"] for one in sorted(records, key=lambda one: one["index"])] == [one.reply for one in judged]
    assert all(one["settings"]["prompt"]["name"] == "urial" for one in records)
    code, _, err = run(["--output", path, "--resume"], capsys)
    assert code == 2, "answers after a prompt are not those without"
    assert "prompt" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--urial", "--prompt-file", "x.txt"], "--prompt-file, --urial exclude each other"),
        (["--prompt-file", "/no/such/file.txt"], "the prompt file '/no/such/file.txt' cannot be read"),
    ],
)
def test_bad_prompts_are_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(words, capsys)
    assert (code, out) == (2, "")
    assert said in err
