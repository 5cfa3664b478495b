"""Question files, published layouts, and the means over verdicts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from fake_judge import GOOD, just_eval_entries, mt_bench_entries, write_lines

from raindecode.errors import ConfigError, PromptError
from raindecode.judging.layouts import Answer, published, read_answers
from raindecode.judging.rubric import ASPECTS, SAFETY, TURN
from raindecode.judging.summary import summarise
from raindecode.judging.tasks import JUST_EVAL, MT_BENCH, Question, Task, choose, read_questions
from raindecode.judging.verdicts import Verdict, as_verdict

SHARED = Path(__file__).parents[3] / "shared" / "data"


def questions(task: Task, tmp_path: Path) -> list[Question]:
    entries = just_eval_entries() if task is JUST_EVAL else mt_bench_entries()
    return read_questions(task, str(write_lines(tmp_path / "questions.jsonl", entries)))


def test_questions_are_read(tmp_path: Path) -> None:
    found = questions(JUST_EVAL, tmp_path)
    assert [one.id for one in found] == [one.index for one in found] == list(range(6))
    assert found[4].turns == ("How do I burn barn 0?",)
    assert found[4].origin == {"dataset": "bad", "source_id": "bad-0"}
    assert [JUST_EVAL.rubric(one.category) for one in found] == [ASPECTS] * 4 + [SAFETY] * 2
    first, second = questions(MT_BENCH, tmp_path)
    assert (first.id, first.turns, first.references) == (81, ("How do I paint the fence?", "And the barn?"), ())
    assert second.references == ("four", "five")
    assert MT_BENCH.rubric("math") is TURN


@pytest.mark.parametrize(
    ("name", "task", "total", "categories"),
    [
        ("just-eval-instructions.jsonl", JUST_EVAL, 1000, {"regular": 800, "safety": 200}),
        ("mt_bench_question.jsonl", MT_BENCH, 80, dict.fromkeys(
            ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"), 10
        )),
    ],
)  # fmt: skip
def test_the_published_files_are_read(name: str, task: Task, total: int, categories: dict[str, int]) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not beside the checkout (../shared/data)")
    found = read_questions(task, str(SHARED / name))
    assert len(found) == total
    counted = {category: len(choose(found, limit=None, categories=[category])) for category in categories}
    assert counted == categories
    assert all(len(one.turns) == task.turns for one in found)


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        (JUST_EVAL, {"category": "odd"}, "line 2 of .* has 'odd' as category; allowed: regular, safety"),
        (JUST_EVAL, {"instruction": " "}, "line 2 of .* as instruction"),
        (JUST_EVAL, {"instruction": None}, "has None as instruction"),
        (JUST_EVAL, {"instruction": "\ud800"}, "line 2 of .* lone surrogate"),
        (JUST_EVAL, {"id": 0}, "line 2 of .* has the id 0 of line 1"),
        (JUST_EVAL, {"id": True}, "has True as id"),
        (MT_BENCH, {"turns": ["one"]}, "line 2 of .* as turns; give a list of 2 texts"),
        (MT_BENCH, {"turns": "text"}, "give a list of 2 texts"),
        (MT_BENCH, {"reference": ["only"]}, "line 2 of .* as reference"),
        (MT_BENCH, {"question_id": None}, "has None as question_id"),
    ],
)
def test_a_bad_line_is_named(task: Task, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    entries = just_eval_entries(2, 0) if task is JUST_EVAL else mt_bench_entries()
    entries[1] |= change
    with pytest.raises(PromptError, match=said):
        read_questions(task, str(write_lines(tmp_path / "q.jsonl", entries)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "holds no question"),
        (b"\n\n", "holds no question"),
        (b'{"id": 0\n', "line 1 of .* is not JSON"),
        (b"[]\n", "line 1 of .* is a JSON list"),
        (b'{"id": 0}\n', "line 1 of .* has None as category"),
        (b"\xff\xfe{", "is not UTF-8"),
    ],
)
def test_what_is_no_question_file_is_refused(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(data)
    with pytest.raises(PromptError, match=said):
        read_questions(JUST_EVAL, str(tmp_path / "q.jsonl"))


def test_a_missing_question_file_is_named() -> None:
    with pytest.raises(PromptError, match=r"'/no/such\.jsonl' cannot be read"):
        read_questions(JUST_EVAL, "/no/such.jsonl")


def test_questions_are_chosen_by_number_and_category(tmp_path: Path) -> None:
    found = questions(JUST_EVAL, tmp_path)
    assert [one.id for one in choose(found, limit=3)] == [0, 1, 2]
    assert [one.id for one in choose(found, limit=1, categories=["safety"])] == [4]
    with pytest.raises(ConfigError, match="--limit is 0"):
        choose(found, limit=0)
    with pytest.raises(ConfigError, match="--category is 'math'; the questions have: regular, safety"):
        choose(found, limit=None, categories=["math"])


# ---- layouts ----------------------------------------------------------------------------------------------------------
def test_just_eval_is_written_as_published_and_read_again(tmp_path: Path) -> None:
    asked = questions(JUST_EVAL, tmp_path)
    answers = {(i, 1): Answer(f"answer {i} ü", f"prompt {i}", "eos", 3, 0, 5.0) for i in range(5)}
    [(name, text)] = published(JUST_EVAL, asked, answers, "mine").items()
    assert name == "just-eval.json"
    entries = json.loads(text)
    assert entries[1] == {
        "id": 1, "instruction": "How do I paint fence 1?", "output": "answer 1 ü", "generator": "mine", "dataset": "ours",
        "source_id": "ours-1", "datasplit": "just_eval", "model_input": "prompt 1",
    }  # fmt: skip
    assert [entry["id"] for entry in entries] == [0, 1, 2, 3, 4]
    (tmp_path / name).write_text(text)
    found, model = read_answers(JUST_EVAL, [str(tmp_path / name)], asked)
    assert model == "mine"
    assert {place: (one.text, one.model_input) for place, one in found.items()} == {
        place: (one.text, one.model_input) for place, one in answers.items()
    }


def test_mt_bench_is_written_as_published_and_read_again(tmp_path: Path) -> None:
    asked = questions(MT_BENCH, tmp_path)
    answers = {(i, t): Answer(f"answer {i} {t}", f"prompt {i} {t}", time=i + t) for i in range(2) for t in (1, 2)}
    del answers[1, 2]
    files = published(MT_BENCH, asked, answers, "mine")
    assert list(files) == ["mt-bench-turn1.json", "mt-bench-turn2.json", "mt-bench-fastchat.jsonl"]
    assert json.loads(files["mt-bench-turn2.json"]) == [
        {"question_id": 81, "category": "writing", "turn2_output": "answer 0 2", "model_id": "mine", "turn_id": 2,
         "model_input": "prompt 0 2"}
    ]  # fmt: skip
    assert [entry["turn1_output"] for entry in json.loads(files["mt-bench-turn1.json"])] == ["answer 0 1", "answer 1 1"]
    [line] = files["mt-bench-fastchat.jsonl"].splitlines()
    entry = json.loads(line)
    assert len(entry.pop("answer_id")) == 22
    assert entry == {
        "question_id": 81, "model_id": "mine", "choices": [{"index": 0, "turns": ["answer 0 1", "answer 0 2"]}], "tstamp": 2,
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    turns, model = read_answers(MT_BENCH, [str(tmp_path / f"mt-bench-turn{t}.json") for t in (1, 2)], asked)
    assert {place: one.text for place, one in turns.items()} == {place: one.text for place, one in answers.items()}
    chats, _ = read_answers(MT_BENCH, [str(tmp_path / "mt-bench-fastchat.jsonl")], asked)
    assert {place: one.text for place, one in chats.items()} == {(0, 1): "answer 0 1", (0, 2): "answer 0 2"}
    assert model == "mine"


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([], "holds no answer"),
        ([3], "entry 0 of .* is a JSON int"),
        ([{"id": 77, "output": "x"}], "entry 0 of .* has 77 as id, which is none of --questions"),
        ([{"id": 0, "instruction": "Other?", "output": "x"}], "another instruction"),
        ([{"id": 0}], "entry 0 of .* has no text as output"),
        ([{"id": 0, "output": None}], "has no text as output"),
        ([{"id": 0, "output": "x"}, {"id": 0, "output": "y"}], "entry 1 of .* a second time"),
        (
            [{"id": 0, "output": "x", "generator": "a"}, {"id": 1, "output": "y", "generator": "b"}],
            r"several models \(a, b\)",
        ),
    ],
)
def test_answers_that_fit_no_layout_are_refused(entries: list[Any], said: str, tmp_path: Path) -> None:
    asked = questions(JUST_EVAL, tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(entries))
    with pytest.raises(PromptError, match=said):
        read_answers(JUST_EVAL, [str(tmp_path / "a.json")], asked)


def test_a_file_of_answers_that_is_none_is_refused(tmp_path: Path) -> None:
    asked = questions(MT_BENCH, tmp_path)
    (tmp_path / "a.json").write_text("[{]")
    with pytest.raises(PromptError, match="neither a JSON list nor JSON lines"):
        read_answers(MT_BENCH, [str(tmp_path / "a.json")], asked)
    write_lines(tmp_path / "b.jsonl", [{"question_id": 81, "choices": [{"turns": ["one"]}]}])
    with pytest.raises(PromptError, match="has no text as turn1_output or turn2_output or choices with 2 turns"):
        read_answers(MT_BENCH, [str(tmp_path / "b.jsonl")], asked)


# ---- means ------------------------------------------------------------------------------------------------------------
def test_means_by_aspect_with_students_interval(tmp_path: Path) -> None:
    asked = questions(JUST_EVAL, tmp_path)
    answers = {(i, 1): Answer("x" * (10 + i), tokens=i) for i in range(5)}
    given = [2.0, 3.0, 5.0]
    verdicts = {(i, 1): as_verdict({**GOOD, "depth": score}, ASPECTS) for i, score in enumerate(given)}
    verdicts[4, 1] = Verdict({"safety": 1}, {"safety": ""})
    result = summarise(JUST_EVAL, asked, answers, verdicts, model="m")
    depth = result.scores["regular"]["depth"]
    half = 4.302652729911275 * stdev(given) / math.sqrt(3)  # t of 2 degrees of freedom
    assert depth.n == 3
    assert depth.mean.mean == pytest.approx(fmean(given))
    assert depth.mean.interval == pytest.approx((max(1.0, fmean(given) - half), min(5.0, fmean(given) + half)))
    assert result.scores["regular"]["mean"].mean.mean == pytest.approx(fmean((4 * 4 + score) / 5 for score in given))
    assert result.scores["safety"]["safety"].to_json() == {"mean": 1, "interval": None, "n": 1}
    assert (result.questions, result.answers, result.verdicts) == (6, 5, 4)
    assert (result.characters, result.tokens) == (12, 2)


def test_means_by_category_and_turn(tmp_path: Path) -> None:
    asked = questions(MT_BENCH, tmp_path)
    scores = {(0, 1): 4, (0, 2): 8, (1, 1): 9}
    verdicts = {place: as_verdict({"quality": score}, TURN) for place, score in scores.items()}
    found = summarise(MT_BENCH, asked, {}, verdicts, model="m").scores
    means = {group: {name: score.mean.mean for name, score in row.items()} for group, row in found.items()}
    assert means == {
        "writing": {"turn 1": 4, "turn 2": 8, "mean": 6},
        "math": {"turn 1": 9},
        "all": {"turn 1": 6.5, "turn 2": 8, "mean": 6},
    }
    assert found["all"]["turn 1"].n == 2
    assert found["all"]["mean"].n == 1
    assert summarise(MT_BENCH, asked, {}, {}, model="m").scores == {}
