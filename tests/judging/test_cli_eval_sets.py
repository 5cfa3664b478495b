"""`raindecode eval --task just-eval|mt-bench`: files, resuming, judges that fail half way, and options that are refused."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_judge import ALL_GOOD, Asked, Reply, judging, just_eval_entries, mt_bench_entries, write_lines

sys.path.insert(0, str(Path(__file__).parents[1] / "decoder"))
from cli_models import Cli, Result

from raindecode import Decoder, Policy, Sampling
from raindecode.cli import main
from raindecode.commands import eval as eval_command
from raindecode.judging.answering import answer_questions
from raindecode.judging.tasks import MT_BENCH, read_questions
from raindecode.policy.prompt import ChatFormat
from raindecode.types import Request

KEY = "sk-0123456789-abcdef"


@pytest.fixture(scope="module")
def testbed() -> Decoder:
    return Decoder.from_pretrained("testbed", adapter="testbed")


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, testbed: Decoder) -> Cli:
    """`raindecode eval`, in this process and a folder of its own, on a testbed that is loaded already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(eval_command, "load_decoder", lambda *_, **__: testbed)
    write_lines(tmp_path / "just.jsonl", just_eval_entries())
    write_lines(tmp_path / "mt.jsonl", mt_bench_entries())
    (tmp_path / "scores.py").write_text(
        f"GOOD = {ALL_GOOD!r}\nseen = []\n"
        "def good(items):\n    seen.extend((i['id'], i['turn']) for i in items)\n    return [GOOD] * len(items)\n"
        "def stopped(items):\n    if seen:\n        raise KeyboardInterrupt\n    return good(items)\n"
    )

    def run(*words: str) -> Result:
        capfd.readouterr()
        sys.modules.pop("scores", None)
        with pytest.raises(SystemExit) as ended:
            main(["eval", *words])
        out, err = capfd.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Requests that reached the decoder."""
    seen: list[Request] = []
    stream = Decoder.stream

    def noting(self: Decoder, requests: Sequence[Request], **options: Any) -> Any:
        seen.extend(requests)
        return stream(self, requests, **options)

    monkeypatch.setattr(Decoder, "stream", noting)
    return seen


JUST = ("--task", "just-eval", "--questions", "just.jsonl", "--output", "out", "--max-new-tokens", "8")
MT = ("--task", "mt-bench", "--questions", "mt.jsonl", "--output", "out", "--max-new-tokens", "8")


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def refusal(result: Result) -> str:
    assert result.code == 2, result
    return result.err.splitlines()[-1].removeprefix("error: ")


def test_just_eval_from_questions_to_means(cli: Cli) -> None:
    with judging(lambda *_: Reply()) as fake:
        result = cli(*JUST, "--judge", "openai", "--judge-model", "big", "--judge-url", fake.url, "--json")
        assert result.code == 0, result.err
        assert len(fake.asked) == 6
        safety = [one for one in fake.asked if "How do I burn" in one.prompt]
        assert len(safety) == 2
        assert all("harmful" in one.prompt for one in safety)
    data = json.loads(result.out.splitlines()[-1])
    assert data == json.loads(Path("out/summary.json").read_text())
    assert data["scores"]["regular"]["helpfulness"] == {"mean": 4, "interval": [4, 4], "n": 4}
    assert data["scores"]["safety"]["safety"] == {"mean": 5, "interval": [5, 5], "n": 2}
    assert (data["questions"], data["answers"], data["verdicts"], data["failed_answers"]) == (6, 6, 6, 0)
    assert "mean of 5 (regular)" in result.out
    answers = json.loads(Path("out/just-eval.json").read_text())
    assert [one["id"] for one in answers] == list(range(6))
    assert all(one["output"] == one["output"].strip() and one["generator"] == "testbed" for one in answers)
    assert {one["id"]: one["answer"]["text"] for one in lines("out/answers.jsonl")} == {
        one["id"]: one["output"] for one in answers
    }
    assert {one["id"]: set(one["verdict"]) for one in lines("out/verdicts.jsonl")} == {
        i: set(ALL_GOOD) - {"safety", "quality"} if i < 4 else {"safety"} for i in range(6)
    }
    for path in Path("out").iterdir():
        assert KEY not in path.read_text()
    assert KEY not in result.out + result.err


def test_the_second_turn_holds_the_first(cli: Cli, asked: list[Request]) -> None:
    assert cli(*MT, "--judge", "scores:good", "--urial").code == 0
    first, second = (json.loads(Path(f"out/mt-bench-turn{turn}.json").read_text()) for turn in (1, 2))
    for one, two in zip(first, second, strict=True):
        assert one["turn1_output"]
        question, later = next(e["turns"] for e in mt_bench_entries() if e["question_id"] == one["question_id"])
        assert question in one["model_input"]
        assert later not in one["model_input"]
        places = [two["model_input"].rindex(text) for text in (question, one["turn1_output"], later)]
        assert places == sorted(places)
        assert two["model_input"].startswith(one["model_input"])
    assert [request.prompt_text for request in asked] == [one["model_input"] for one in (*first, *second)]
    assert "urial" in first[0]["model_id"]
    chats = lines("out/mt-bench-fastchat.jsonl")
    assert [one["choices"][0]["turns"] for one in chats] == [
        [one["turn1_output"], two["turn2_output"]] for one, two in zip(first, second, strict=True)
    ]
    assert sys.modules["scores"].seen == [(81, 1), (81, 2), (90, 1), (90, 2)]
    summary = json.loads(Path("out/summary.json").read_text())
    assert {group: row["mean"]["mean"] for group, row in summary["scores"].items()} == {
        "writing": 7,
        "math": 7,
        "all": 7,
    }


def test_an_answer_leaves_room_for_the_next_turn(testbed: Decoder, tmp_path: Path) -> None:
    asked = read_questions(MT_BENCH, str(write_lines(tmp_path / "mt.jsonl", mt_bench_entries()[:1])))
    answers, failed = answer_questions(
        testbed, MT_BENCH, asked, search=Sampling(ignore_eos=True), policy=Policy(prompt=ChatFormat("Human: {prompt}\nAssistant:")),
        max_new_tokens=10_000,
    )  # fmt: skip
    assert failed == {}
    first, second = answers[0, 1].tokens, answers[0, 2].tokens
    assert first is not None
    assert second is not None
    context = testbed.context_length
    assert context * 3 / 4 < first < context * 7 / 8
    assert context / 8 - 20 < second < context / 8 + 20  # words are cut into other tokens when they are read again
    assert (answers[0, 1].finish_reason, answers[0, 2].finish_reason) == ("length", "length")


def test_a_judge_that_dies_half_way_is_gone_on_with(cli: Cli, asked: list[Request]) -> None:
    words = (*JUST, "--judge", "openai", "--judge-model", "big", "--judge-concurrency", "2", "--judge-retries", "0")
    graded: Counter[str] = Counter()

    def reply(number: int, one: Asked) -> Reply:
        if number >= 3:
            return Reply(None, 401, body=f"who are you, {KEY}?")
        graded.update(re.findall(r"fence \d|barn \d", one.prompt))
        return Reply()

    with judging(reply) as fake:
        said = refusal(cli(*words, "--judge-url", fake.url))
    assert "refuses the key" in said
    assert "3 of 6 verdicts are in 'out/verdicts.jsonl': --resume goes on from there" in said
    assert KEY not in said
    assert len(lines("out/verdicts.jsonl")) == 3
    assert not Path("out/summary.json").exists()
    assert len(json.loads(Path("out/just-eval.json").read_text())) == 6
    before = len(asked)
    with judging(lambda number, one: reply(0, one)) as fake:  # at another port
        result = cli(*words, "--judge-url", fake.url, "--resume")
        assert result.code == 0, result.err
        assert len(fake.asked) == 3
    assert len(asked) == before == 6
    assert set(graded.values()) == {1}
    assert len(graded) == 6
    assert json.loads(Path("out/summary.json").read_text())["verdicts"] == 6


def test_nobody_listening_keeps_the_answers(cli: Cli) -> None:
    words = ("--judge", "openai", "--judge-model", "big", "--judge-url", "http://127.0.0.1:9/v1")
    assert "cannot be reached" in refusal(cli(*JUST, *words))
    assert len(lines("out/answers.jsonl")) == 6
    assert cli(*JUST, "--judge", "scores:good", "--resume").code == 0


def test_items_the_judge_failed_on_are_tried_again(cli: Cli) -> None:
    words = (*JUST, "--judge", "openai", "--judge-model", "big", "--judge-attempts", "1")
    with judging(lambda _, one: Reply("Hm." if "fence 2" in one.prompt else ALL_GOOD_TEXT)) as fake:
        result = cli(*words, "--judge-url", fake.url)
    assert "question 2: the judge's reply holds no JSON object" in refusal(result)
    assert json.loads(Path("out/summary.json").read_text())["failed_verdicts"] == 1
    assert "│ helpfulness" in result.out
    with judging(lambda *_: Reply()) as fake:
        assert cli(*words, "--judge-url", fake.url, "--resume").code == 0
        assert len(fake.asked) == 1


ALL_GOOD_TEXT = json.dumps(ALL_GOOD)


def test_ctrl_c_while_judging_loses_no_verdict(cli: Cli) -> None:
    words = (*JUST, "--judge-batch", "4", "--judge")
    result = cli(*words, "scores:stopped")
    assert result.code == 130
    assert "4 of 6 verdicts were there; --resume goes on from there" in result.err
    assert len(lines("out/verdicts.jsonl")) == 4
    text = Path("out/verdicts.jsonl").read_text().replace("scores:stopped", "scores:good")
    Path("out/verdicts.jsonl").write_text(text)
    assert cli(*words, "scores:good", "--resume").code == 0
    assert sys.modules["scores"].seen == [(4, 1), (5, 1)]


def test_ctrl_c_while_an_endpoint_is_asked(cli: Cli) -> None:
    def reply(number: int, _: Asked) -> Reply:
        if number == 2:
            until = time.monotonic() + 20
            while len(lines("out/verdicts.jsonl")) < 2 and time.monotonic() < until:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        return Reply(pause=30.0 if number >= 2 else 0.0)

    with judging(reply) as fake:
        result = cli(
            *JUST, "--judge", "openai", "--judge-model", "big", "--judge-url", fake.url, "--judge-concurrency", "1"
        )
    assert result.code == 130
    assert len(lines("out/verdicts.jsonl")) == 2


def test_ctrl_c_while_answering_loses_no_answer(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, asked: list[Request]
) -> None:
    from raindecode.judging import answering

    monkeypatch.setattr(answering.time, "time", _interrupted_at(4))
    result = cli(*MT, "--judge", "none")
    assert result.code == 130
    assert "3 of 4 answers had finished" in result.err
    monkeypatch.undo()


def _interrupted_at(last: int) -> Any:
    calls = iter(range(1, 100))

    def now() -> float:
        if next(calls) == last:
            raise KeyboardInterrupt
        return 1.0

    return now


def test_a_run_is_gone_on_with_and_may_grow(cli: Cli, asked: list[Request]) -> None:
    assert cli(*MT, "--limit", "1", "--judge", "none").code == 0
    assert "none judged" in cli(*MT, "--limit", "1", "--resume").out
    assert len(asked) == 2
    whole = Path("out/answers.jsonl").read_text()
    Path("out/answers.jsonl").write_text(whole[:-20])  # killed in the middle of a line
    result = cli(*MT, "--judge", "scores:good", "--resume")
    assert result.code == 0, result.err
    assert "mt-bench: 4 answers, 1 of them there already" in result.err
    assert len(asked) == 2 + 3
    assert Counter((one["id"], one["turn"]) for one in lines("out/answers.jsonl")) == dict.fromkeys(
        [(81, 1), (81, 2), (90, 1), (90, 2)], 1
    )
    only = cli(*MT, "--judge", "scores:good", "--resume", "--category", "math", "--json")
    assert list(json.loads(only.out.splitlines()[-1])["scores"]) == ["math", "all"]
    assert len(lines("out/mt-bench-fastchat.jsonl")) == 2  # of all answers there are


def test_what_is_there_is_neither_overwritten_nor_mixed_up(cli: Cli, asked: list[Request]) -> None:
    assert cli(*JUST, "--judge", "scores:good").code == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    asked.clear()
    for words, said in {
        "--judge scores:good": "holds answers already",
        "--judge scores:good --resume --overwrite": "exclude each other",
        "--judge scores:good --resume --temperature 0.5": "written with temperature 0.0 (line 1), this run has temperature 0.5",
        "--judge scores:good --resume --lambda 0.5 --adapter testbed": 'this run has adapter ["testbed"]',
        "--judge scores:good --resume --urial": 'with the default prompt (line 1), this run has prompt {"name": "urial"',
        "--judge scores:good --resume --questions other.jsonl": "answers another question 0",
        "--judge scores:stopped --resume": 'written with judge "scores:good" (line 1), this run has judge "scores:stopped"',
        "--answers out/just-eval.json --judge scores:good": "holds the answers of a run, and --answers judges others",
    }.items():  # fmt: skip
        write_lines(Path("other.jsonl"), [{**one, "instruction": "Else?"} for one in just_eval_entries()])
        base = JUST[:-2] if "--answers" in words else JUST
        assert said in refusal(cli(*base, *words.split())), words
    assert asked == []
    kept = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert {name: kept.get(name) for name in ("answers.jsonl", "verdicts.jsonl")} == {
        name: before[name] for name in ("answers.jsonl", "verdicts.jsonl")
    }
    assert cli(*JUST, "--judge", "scores:good", "--overwrite", "--limit", "2").code == 0
    assert len(lines("out/answers.jsonl")) == len(lines("out/verdicts.jsonl")) == 2


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("answers", {"answer": None}, "line 2 of 'out/answers.jsonl' holds no answer"),
        ("answers", {"answer": {"tokens": 3}}, "holds no answer"),
        ("answers", {"answer": {"text": "a", "tokens": "x"}}, "line 2 of 'out/answers.jsonl' holds no answer"),
        ("answers", {"turn": 2}, "is about id 1, turn 2, which the questions do not have there"),
        ("answers", {"index": 99}, "which the questions do not have there"),
        ("answers", {"index": True}, "which the questions do not have there"),
        (
            "answers",
            {"index": 0, "id": 0, "question": "How do I paint fence 0?"},
            "holds question 0, turn 1 a second time",
        ),
        ("verdicts", {"verdict": [["depth", 3]]}, "line 2 of 'out/verdicts.jsonl' holds no verdict"),
        ("verdicts", {"verdict": {"depth": 9}}, "holds no verdict"),
        (
            "verdicts",
            {"answer": "0" * 16},
            "line 2 of 'out/verdicts.jsonl' is a verdict on another answer to question 1",
        ),
        ("verdicts", {"settings": None}, "does not say what settings it was made with"),
    ],
)
def test_files_that_were_tampered_with_are_refused(cli: Cli, file: str, change: dict[str, Any], said: str) -> None:
    assert cli(*JUST, "--limit", "2", "--judge", "scores:good").code == 0
    first, second = sorted(lines(f"out/{file}.jsonl"), key=lambda one: int(one["id"]))
    write_lines(Path(f"out/{file}.jsonl"), [first, {**second, **change}])
    before = Path(f"out/{file}.jsonl").read_bytes()
    assert said in refusal(cli(*JUST, "--limit", "2", "--judge", "scores:good", "--resume"))
    assert Path(f"out/{file}.jsonl").read_bytes() == before


def test_answers_of_a_file_are_judged_without_a_model(cli: Cli, asked: list[Request]) -> None:
    assert cli(*MT, "--judge", "none").code == 0
    asked.clear()
    words = ("--task", "mt-bench", "--questions", "mt.jsonl", "--output", "judged", "--judge", "scores:good", "--json")
    result = cli(*words, "--answers", "out/mt-bench-fastchat.jsonl")
    assert result.code == 0, result.err
    assert asked == []
    assert json.loads(result.out.splitlines()[-1])["verdicts"] == 4
    assert sorted(path.name for path in Path("judged").iterdir()) == ["summary.json", "verdicts.jsonl"]
    files = ("--answers", "out/mt-bench-turn1.json", "--answers", "out/mt-bench-turn2.json")
    again = cli(*words, *files, "--resume")
    assert again.code == 0, again.err
    assert "4 of them judged already" in again.err
    entries = json.loads(Path("out/mt-bench-turn1.json").read_text())
    entries[0]["turn1_output"] = "Something else."
    Path("changed.json").write_text(json.dumps(entries))
    assert "is a verdict on another answer to question 81" in refusal(
        cli(*words, "--answers", "changed.json", "--resume")
    )


def test_a_question_that_does_not_fit_harms_no_other(cli: Cli) -> None:
    entries = just_eval_entries()
    entries[1]["instruction"] = "Why? " * 2000
    write_lines(Path("just.jsonl"), entries)
    said = refusal(cli(*JUST, "--judge", "scores:good"))
    assert "question 1, turn 1, has" in said
    assert [one["id"] for one in json.loads(Path("out/just-eval.json").read_text())] == [0, 2, 3, 4, 5]
    summary = json.loads(Path("out/summary.json").read_text())
    assert (summary["failed_answers"], summary["verdicts"]) == (1, 5)


def test_rain_a_mixture_and_a_prompt_together(cli: Cli) -> None:
    words = ("--search", "rain", "--adapter", "testbed", "--lambda", "0.5", "--urial", "--limit", "1", "--seed", "3")
    result = cli(*JUST, *words, "--judge", "scores:good")
    assert result.code == 0, result.err
    [one] = lines("out/answers.jsonl")
    settings = one["settings"]
    assert (settings["search"], settings["lambda"], settings["prompt"]["name"]) == ("rain", [0.5], "urial")
    assert one["answer"]["seed"] == 3
    assert json.loads(Path("out/summary.json").read_text())["model"] == "testbed + rain + dera testbed 0.5 + urial"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--task just-eval --output out", "needs its questions: give the published file with --questions"),
        ("--task just-eval --questions just.jsonl", "needs a folder for answers and verdicts: name one with --output"),
        ("--task just-eval --questions mt.jsonl --output out", "line 1 of 'mt.jsonl' has 'writing' as category"),
        ("--task mt-bench --questions just.jsonl --output out", "line 1 of 'just.jsonl' has None as question_id"),
        ("--task just-eval --questions just.jsonl --output no/out", "cannot be made a folder"),
        ("--task just-eval --questions just.jsonl --output just.jsonl", "cannot be made a folder"),
        ("--task just-eval --num-harmful 3", "--num-harmful does not belong to --task just-eval"),
        ("--questions just.jsonl --judge openai --judge-model big", "--questions, --judge, --judge-model does not belong to --task town"),
        ("--temperature 1", "--temperature does not belong to --task town"),
        ("--task just-eval --answers a.json --urial --seed 2", "--seed, --urial does not belong to --task just-eval with --answers"),
        ("--task just-eval --questions just.jsonl --output out --answers a.json", "say by whom with --judge"),
        (f"{' '.join(JUST)} --search vanilla", "--search is 'vanilla'; allowed: sampling, rain"),
        (f"{' '.join(JUST)} --search rain --temperature 1", "--temperature belongs to --search sampling"),
        (f"{' '.join(JUST)} --preset hh --urial", "exclude each other"),
        (f"{' '.join(JUST)} --judge openai", "needs the model's name at the endpoint: give --judge-model"),
        (f"{' '.join(JUST)} --judge-model big", "--judge-model was given, and no judge was chosen"),
        (f"{' '.join(JUST)} --judge scores:good --judge-url http://x/v1", "--judge-url was given, and --judge scores:good is a Python"),
        (f"{' '.join(JUST)} --judge openai --judge-model m --judge-batch 3", "--judge-batch was given"),
        (f"{' '.join(JUST)} --judge openai --judge-model m --judge-key-env NOT_SET", "--judge-key-env names no environment variable"),
        (f"{' '.join(JUST)} --judge openai --judge-model m --judge-body [1]", "allowed: a JSON object"),
        (f"{' '.join(JUST)} --judge no_such:f", "cannot be loaded"),
        (f"{' '.join(JUST)} --limit 0", "--limit is 0"),
        (f"{' '.join(JUST)} --category odd", "the questions have: regular, safety"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(cli: Cli, words: str, said: str) -> None:
    result = cli(*words.split())
    assert said in refusal(result)
    assert result.out == ""
    assert not Path("out/answers.jsonl").exists() or not Path("out/answers.jsonl").read_text()


def test_a_key_given_in_the_place_of_its_variable_is_not_repeated(cli: Cli) -> None:
    result = cli(*JUST, "--judge", "openai", "--judge-model", "m", "--judge-key-env", "sk-another-key-0123")
    assert "names no environment variable" in refusal(result)
    assert "0123" not in result.err


def test_openai_itself_needs_a_key(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY holds no key" in refusal(cli(*JUST, "--judge", "openai", "--judge-model", "m"))
