"""Pairs for AlignEZ: files in the usual forms, what is asked of the model, the filter, and going on with a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raindecode import testbed
from raindecode.decoder import Decoder
from raindecode.errors import ConfigError, FitError, PromptError
from raindecode.policy.alignez.elicitation import Elicitation
from raindecode.policy.alignez.generate import generate_pairs
from raindecode.policy.alignez.pairs import Pair, PairSet, read_pairs, write_pairs
from raindecode.policy.policy import Policy
from raindecode.policy.prompt import ChatFormat
from raindecode.types import Completion, Stats

QUESTIONS = ["How do I bake bread?", "How do I {fix} a 'roof'?", "Where is the mill?"]


@dataclass
class FakeDecoder:
    """Answers step 1 with a bullet and step 2 with the trait and the seed; `replies` replaces answers by their prompt."""

    replies: dict[str, str] = field(default_factory=dict)
    angle: float = 1.0
    calls: list[list[str]] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)
    passages: list[tuple[str, str]] = field(default_factory=list)
    dies_at: int = 10**9

    def generate(self, prompts: Any, **options: Any) -> list[Any]:
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        self.calls.append(list(prompts))
        self.options.append(options)
        return [self._answer(prompt, seed) for prompt, seed in zip(prompts, options["seed"], strict=True)]

    def _answer(self, prompt: str, seed: int) -> Completion:
        for part, reply in self.replies.items():
            if part in prompt:
                return Completion(prompt, reply, [1], "eos", seed, Stats())
        trait = "good" if "helpful" in prompt else "bad"
        text = f" Be {trait}.\n- Be long." if "should be:" in prompt else f" Reply {seed} to {prompt}"
        return Completion(prompt, text, [1, 2], "eos", seed, Stats())

    def activations(self, passages: Sequence[tuple[str, str]], **options: Any) -> Tensor:
        """Unit vectors: answers to "bad" prompts stand at `angle` to the others."""
        assert options["pool"] == "mean"
        assert len(options["layers"]) == 1
        self.passages += passages
        turned = torch.tensor(["should be bad" in answer for _, answer in passages])
        angles = turned.float() * self.angle
        return torch.stack([angles.cos(), angles.sin()], dim=-1)[None]


# ---- files ------------------------------------------------------------------------------------------------------------------
def written(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


USER = {"role": "user", "content": "Hi"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("yes", "no"))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Hi", "chosen": "yes", "rejected": "no", "score": 3}, ("Hi", "yes", "no")),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, ("Hi", "yes", "no")),
        ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, ("Hi", "yes", "no")),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}, ("Hi", "yes", "no")),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, ("Hi", " yes", " no")),
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
            ("Hi", " yes", " no"),
        ),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hm\n\nHuman: So?\n\nAssistant: yes",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Hm\n\nHuman: So?\n\nAssistant: yellow",
            },
            ("\n\nHuman: Hi\n\nAssistant: Hm\n\nHuman: So?\n\nAssistant:", " yes", " yellow"),
        ),
        (
            {"prompt": [USER, GOOD, USER], "chosen": [GOOD], "rejected": [BAD]},
            ("\n\nHuman: Hi\n\nAssistant: yes\n\nHuman: Hi\n\nAssistant:", "yes", "no"),
        ),
    ],
)  # fmt: skip
def test_the_usual_forms(tmp_path: Path, record: dict[str, Any], expected: tuple[str, str, str]) -> None:
    (pair,) = read_pairs(written(tmp_path / "pairs.jsonl", "", record, "  "))
    assert (pair.prompt, pair.chosen, pair.rejected) == expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON list"),
        ({"prompt": "Hi", "chosen": "yes"}, "no 'rejected'"),
        ({"prompt": "Hi", "chosen": "same ", "rejected": " same"}, "same text"),
        ({"prompt": " ", "chosen": "yes", "rejected": "no"}, "prompt is ' '"),
        ({"prompt": 3, "chosen": "yes", "rejected": "no"}, "prompt is 3"),
        ({"prompt": "Hi", "chosen": "yes", "rejected": None}, "rejected is None"),
        ({"prompt": "Hi", "chosen": [USER], "rejected": [BAD]}, "messages of user"),
        ({"prompt": "Hi", "chosen": [{"role": "assistant"}], "rejected": [BAD]}, "text 'role'"),
        ({"prompt": "Hi", "chosen": [], "rejected": [BAD]}, "empty list"),
        ({"chosen": "yes", "rejected": "no"}, "there is no prompt"),
        (
            {"chosen": "\n\nHuman: A\n\nAssistant: yes", "rejected": "\n\nHuman: B\n\nAssistant: no"},
            "part at character 9",
        ),
        ({"prompt": "Hi", "chosen": "yes", "rejected": "no", "chosen_prompt": 1}, "chosen_prompt is 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: Any, says: str) -> None:
    path = written(tmp_path / "pairs.jsonl", {"prompt": "Hi", "chosen": "yes", "rejected": "no"}, "", line)
    with pytest.raises(ConfigError, match=r"line 3 of '.*pairs\.jsonl'") as error:
        read_pairs(path)
    assert says in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pairs(tmp_path / "missing.jsonl")
    with pytest.raises(ConfigError, match="holds no pair"):
        read_pairs(written(tmp_path / "empty.jsonl", ""))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 0\)"):
        read_pairs(tmp_path / "binary")
    with pytest.raises(ConfigError, match="folder that exists"):
        write_pairs(tmp_path / "no" / "pairs.jsonl", [])


def test_written_pairs_come_back(tmp_path: Path) -> None:
    pairs = (Pair("Wie geht\u2028es?", " gut\n", " schlecht", "kind", None, "p"), Pair("Hi", "yes", "no"))
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    back = read_pairs(tmp_path / "pairs.jsonl")
    assert back.pairs == pairs
    assert back.fingerprint == PairSet(pairs).fingerprint != PairSet(pairs[::-1]).fingerprint
    assert back[1] == pairs[1]
    assert len(back) == 2


# ---- what is asked ----------------------------------------------------------------------------------------------------------
def test_testbed_forms_are_the_trained_ones() -> None:
    form = Elicitation.testbed()
    for name, side in (("helpful", "chosen"), ("misleading", "rejected")):
        trained = testbed.ELICITATION[name]  # type: ignore[index]
        assert form.ask_trait("Hi.", side) == trained.characteristic_prompt("Hi.")  # type: ignore[arg-type]
        for trait in trained.characteristics:
            assert form.ask_answer("Hi.", trait) == trained.answer_prompt("Hi.", trait)
            assert form.read_trait(f" {trait}.\nHuman") == trait


def test_published_words_and_bullets() -> None:
    form = Elicitation.published("creative", "dull")
    assert "You are a creative Assistant. Your answer should be:" in form.ask_trait("Q {role}", "chosen")
    assert "You are a dull Assistant. Your answer should be:" in form.ask_trait("Q", "rejected")
    assert form.ask_trait("Q {role}", "chosen").startswith("Q {role}\n")  # braces of a question are not places
    assert "Your answer should be a lie." in form.ask_answer("Q", "a lie")
    assert form.read_trait(" Be an interesting fact.\n- Be creative\nchatter\n3) be creative\n* short") == (
        "an interesting fact, creative"
    )
    assert form.read_trait("- be a\n- be b\n- be c\n- be d") == "a, b, c"
    assert form.read_trait("\n...\n- ") == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"trait_prompt": "{question}"}, "put {role}"),
        ({"answer_prompt": "x"}, "put {question} and {trait}"),
        ({"chosen_role": " "}, "chosen_role is ' '"),
        ({"chosen_role": "R."}, "both roles"),
        ({"parse": "lines"}, "allowed: 'bullets' and 'sentence'"),
        ({"trait_stop": "\n"}, "give a list of strings"),
        ({"max_traits": 0}, "max_traits is 0"),
        ({"format": "{prompt}"}, "give a ChatFormat"),
    ],
)
def test_elicitations_that_cannot_be(change: dict[str, Any], says: str) -> None:
    good = {"chosen_role": "G.", "rejected_role": "R.", "trait_prompt": "{question}{role}"}
    with pytest.raises(ConfigError) as error:
        Elicitation(**(good | {"answer_prompt": "{question}{trait}"} | change))
    assert says in str(error.value)


# ---- making pairs -----------------------------------------------------------------------------------------------------------
def test_two_rounds_of_everything() -> None:
    decoder = FakeDecoder()
    form = Elicitation.published()
    made = generate_pairs(decoder, QUESTIONS, answers=2, seed=5, max_new_tokens=7, search="greedy")
    assert len(decoder.calls) == 2
    assert decoder.calls[0] == [
        form.ask_trait(question, side) for question in QUESTIONS for _ in range(2) for side in ("chosen", "rejected")
    ]  # fmt: skip
    assert decoder.calls[1][:2] == [form.ask_answer(QUESTIONS[0], trait) for trait in ("good, long", "bad, long")]
    for options, limit in zip(decoder.options, (form.trait_tokens, 7), strict=True):
        assert options["policy"] == Policy(prompt=ChatFormat("{prompt}"))
        assert (options["max_new_tokens"], options["search"], options["stop"]) == (limit, "greedy", ("\n\n",))
        assert len(set(options["seed"])) == 12
    assert not set(decoder.options[0]["seed"]) & set(decoder.options[1]["seed"])
    assert [pair.prompt for pair in made] == [q for q in QUESTIONS for _ in range(2)]
    assert made[0].chosen_trait == "good, long"
    assert made[0].chosen_prompt == decoder.calls[1][0]
    assert made[0].chosen.startswith(" Reply ")
    assert made.stats == {"questions": 3, "asked": 6, "reused": 0, "tokens": 48}
    assert made.dropped == {}


def test_a_pair_depends_on_its_question_alone() -> None:
    alone = generate_pairs(FakeDecoder(), QUESTIONS[1:2])
    among = generate_pairs(FakeDecoder(), [*QUESTIONS, QUESTIONS[0]], answers=2)
    assert among.stats["questions"] == 3
    assert next(p for p in among if p.prompt == QUESTIONS[1]) == alone[0]
    assert generate_pairs(FakeDecoder(), QUESTIONS[1:2], seed=1)[0] != alone[0]


def test_near_duplicates() -> None:
    close = {"angle": 0.1}  # a cosine of 0.995
    decoder = FakeDecoder(**close, replies={"mill": "The same"})
    with pytest.raises(FitError, match=r"every pair was dropped \(2 similar, 1 identical\)"):
        generate_pairs(decoder, QUESTIONS)
    assert [prompt for prompt, _ in decoder.passages] == QUESTIONS[:2] * 2  # pairs dropped before are not looked at
    assert len(generate_pairs(FakeDecoder(**close), QUESTIONS, similarity=None)) == 3
    assert len(generate_pairs(FakeDecoder(**close), QUESTIONS, similarity=0.996)) == 3
    assert len(generate_pairs(FakeDecoder(angle=0.3), QUESTIONS)) == 3  # 0.955


def test_pairs_that_say_nothing() -> None:
    misled = Elicitation.published().ask_trait(QUESTIONS[0], "rejected")
    replies = {misled: "...", f"{QUESTIONS[1]}\n\nYour answer should be good": " \n"}
    made = generate_pairs(FakeDecoder(replies=replies), QUESTIONS)
    assert [pair.prompt for pair in made] == QUESTIONS[2:]
    assert made.dropped == {"no trait": 1, "empty": 1}


def test_going_on_with_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    many = [f"Question {i}?" for i in range(130)]  # three chunks
    with pytest.raises(KeyboardInterrupt):
        generate_pairs(FakeDecoder(dies_at=3), many, out=path)
    with path.open("ab") as file:
        file.write(b'{"prompt": "Question 64?", "ans')  # killed in the middle of a line
    decoder = FakeDecoder(replies={"Question 64?": "The same"})
    made = generate_pairs(decoder, many, out=path)
    assert [len(call) for call in decoder.calls] == [128, 128, 4, 4]
    assert made.stats["asked"] == 66
    assert made.stats["reused"] == 64
    whole = generate_pairs(FakeDecoder(replies={"Question 64?": "The same"}), many)
    assert made.pairs == whole.pairs
    assert read_pairs(path).pairs == made.pairs
    assert read_pairs(path).dropped == made.dropped == {"identical": 1}
    again = FakeDecoder()
    more = generate_pairs(again, [many[3], "Another?"], out=path)
    assert [len(call) for call in again.calls] == [2, 2]
    assert more[0] == made[3]
    with pytest.raises(ConfigError, match=r"begun with seed 0, this run has 1"):
        generate_pairs(FakeDecoder(), many, out=path, seed=1)
    with pytest.raises(ConfigError, match="begun with elicitation"):
        generate_pairs(FakeDecoder(), many, out=path, elicitation=Elicitation.testbed())


def test_a_file_of_others_stays_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "pairs.jsonl", {"prompt": "Hi", "chosen": "yes", "rejected": "no"})
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"line 1 of .* was not written by generate_pairs"):
        generate_pairs(FakeDecoder(), QUESTIONS, out=path)
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="folder that exists"):
        generate_pairs(FakeDecoder(), QUESTIONS, out=tmp_path / "no" / "pairs.jsonl")


@pytest.mark.parametrize(
    ("questions", "options", "error", "says"),
    [
        ([], {}, PromptError, "no question"),
        ("How?", {}, PromptError, "give a list of texts"),
        (["How?", " "], {}, PromptError, "question 1 is ' '"),
        ([3], {}, PromptError, "question 0 is 3"),
        (["How?"], {"answers": 0}, ConfigError, "answers is 0"),
        (["How?"], {"max_new_tokens": 0}, ConfigError, "max_new_tokens is 0"),
        (["How?"], {"seed": -1}, ConfigError, "seed is -1"),
        (["How?"], {"similarity": 1.5}, ConfigError, "up to 1, or None"),
        (["How?"], {"similarity": float("nan")}, ConfigError, "similarity is nan"),
        (["How?"], {"similarity_layer": -1}, ConfigError, "similarity_layer is -1"),
    ],
)
def test_bad_input(questions: Any, options: dict[str, Any], error: type[Exception], says: str) -> None:
    decoder = FakeDecoder()
    with pytest.raises(error) as raised:
        generate_pairs(decoder, questions, **options)
    assert says in str(raised.value)
    assert not decoder.calls


def test_progress_counts_every_answer(capsys: pytest.CaptureFixture[str]) -> None:
    class Reporting(FakeDecoder):
        def generate(self, prompts: Any, **options: Any) -> list[Any]:
            for i in range(len(prompts)):
                options["on_progress"](i, 2, 0)
            return super().generate(prompts, **options)

    generate_pairs(Reporting(), QUESTIONS, progress=True)
    assert "answers 12/12, 24 tokens" in capsys.readouterr().err


def test_the_testbed_makes_pairs() -> None:
    decoder = Decoder.from_pretrained("testbed", device="cpu")
    requests = testbed.sample_requests(4, harmful=True, split="train", seed=3)
    made = generate_pairs(
        decoder, [r.text for r in requests], elicitation=Elicitation.testbed(), max_new_tokens=96, similarity=None
    )
    assert len(made) >= 3
    harmful = [
        sum(testbed.judge(r, getattr(pair, side)).harmful for r, pair in zip(requests, made, strict=False))
        for side in ("chosen", "rejected")
    ]
    assert harmful[0] < harmful[1]
    traits = {side: testbed.ELICITATION[side].characteristics for side in testbed.ELICITATION}
    assert any(pair.chosen_trait in traits["helpful"] for pair in made)
    assert any(pair.rejected_trait in traits["misleading"] for pair in made)
