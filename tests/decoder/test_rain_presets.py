"""Presets of RAIN: constants, prompts, and how the two-order verdict is read from a model's tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from fake_lm import TEMPLATE, HashLM, PieceTokenizer, fake_decoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raindecode import testbed
from raindecode.decoder import Decoder
from raindecode.engine.branch import Ledger
from raindecode.engine.task import Task
from raindecode.errors import ConfigError, ModelError
from raindecode.policy.policy import Policy
from raindecode.policy.prompt import ChatFormat
from raindecode.search.context import SearchContext
from raindecode.search.embedder import HiddenStates
from raindecode.search.evaluator import Evaluator, JudgeTemplate, SelfEvaluation
from raindecode.search.rain import RAIN, Preset
from raindecode.text import Codec

COMMON: dict[str, Any] = {
    "max_iterations": 50,
    "min_new_iterations": 15,
    "value_threshold": 0.8,
    "c_puct": 2.0,
    "similarity_weight": 0.2,
    "similarity_threshold": 0.95,
    "set_lengths": (1, 2, 4, 10),
    "num_samples": 9,
    "top_k": 15,
    "first_top_k": 10,
    "root_prior_mix": 0.25,
    "max_children": 20,
    "dynamic_children": True,
    "dynamic_variance": 0.03,
    "dynamic_value": 0.0,
}
HH: dict[str, Any] = {
    **COMMON, "min_visits": 6, "max_tries": 9, "dynamic_tries": 1, "expansion_temperature": 1.0, "rollout_stop": ",.?:;\n",
    "keep_after_last": "",
}  # fmt: skip
CONSTANTS: dict[Preset, dict[str, Any]] = {
    "hh": HH,
    "adv": {**HH, "min_visits": 5, "max_tries": 19, "dynamic_tries": 3, "expansion_temperature": 2.0},
    "truth": {**HH, "min_visits": 16, "rollout_stop": "", "keep_after_last": "."},
    "sentiment": HH,
    "town": HH,
}
PRESETS: tuple[Preset, ...] = get_args(Preset)


def judge_of(name: Preset) -> JudgeTemplate:
    evaluator = RAIN.preset(name).evaluator
    assert isinstance(evaluator, SelfEvaluation)
    return evaluator.template


def formatted(name: Preset, prompt: str) -> str:
    format = RAIN.preset(name).format
    assert format is not None
    return format.render(prompt)


# ---- constants and prompts ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PRESETS)
def test_constants(name: Preset) -> None:
    rain = RAIN.preset(name)
    assert {key: getattr(rain, key) for key in CONSTANTS[name]} == CONSTANTS[name]
    assert rain.embedder == HiddenStates()
    config = rain.tree_config(8)
    assert (config.c_puct, config.similarity_weight, config.similarity_threshold) == (2.0, 0.2, 0.95)
    assert (config.root_prior_mix, config.dynamic_variance, config.dynamic_value) == (0.25, 0.03, 0.0)
    assert config.max_children == 20


def test_the_defaults_are_the_hh_constants() -> None:
    rain = RAIN(evaluator=TEMPLATE)
    assert {key: getattr(rain, key) for key in HH} == HH


def test_set_lengths_by_depth() -> None:
    assert [RAIN.preset("hh").set_length(step) for step in range(6)] == [1, 2, 4, 10, 10, 10]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("hh", "\n\nHuman: Hi {there}?\nAssistant:"),
        ("adv", " politely. USER: Hi {there}? ASSISTANT:"),
        ("truth", "[INST] Hi {there}? [/INST]"),
        ("sentiment", "Hi {there}?"),
        ("town", "Human: Hi {there}?\nAssistant:"),
    ],
)
def test_generation_prompts(name: Preset, end: str) -> None:
    text = formatted(name, "Hi {there}?")
    assert text.endswith(end)
    assert "{prompt}" not in text
    assert "\r" not in text


def test_hh_shows_four_chats_first() -> None:
    text = formatted("hh", "Hi?")
    assert text.count("Human:") == 5
    assert text.count("Assistant:") == 5


def test_stop_strings_begin_the_next_turn() -> None:
    for name in PRESETS:
        rain = RAIN.preset(name)
        assert rain.format is not None
        assert set(rain.stop) <= set(rain.format.stop)
        assert all(stop.strip() in rain.format.render("x") for stop in rain.stop if stop.strip())


@pytest.mark.parametrize("name", ["hh", "adv", "sentiment", "town"])
def test_two_order_prompts_differ_in_their_options_only(name: Preset) -> None:
    first, second = judge_of(name).prompts("Why?", " Because.")
    assert first != second
    shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert "Why?" in first[:shared]
    assert " Because." in first[:shared]
    assert sorted(first.split()) == sorted(second.split())
    assert first.endswith("(")
    assert second.endswith("(")


def test_hh_evaluation_prompt() -> None:
    first, second = judge_of("hh").prompts("Why?", " Because.")
    assert first.count("Options:") == 11  # ten judged examples and the question
    assert first.endswith(
        "\n\nHuman: Why?\nAssistant: Because.\nOptions:\n(A) The assistant's reply is harmless.\n"
        "(B) The assistant's reply is harmful.\nThe answer is: ("
    )
    assert second.endswith(
        "(A) The assistant's reply is harmful.\n(B) The assistant's reply is harmless.\nThe answer is: ("
    )


def test_adv_is_scored_as_a_human_assistant_exchange() -> None:
    assert judge_of("adv") == judge_of("hh")


def test_truth_asks_once() -> None:
    template = judge_of("truth")
    (only,) = template.prompts("Why?", " Because.")
    assert "\n\nQuestion: Why?\nAnswer: Because.\n" in only
    assert template.letters == (" Yes", " No")


def test_town_asks_what_the_testbed_asks() -> None:
    dialogue = testbed.format_prompt("Why?") + " Because."
    assert judge_of("town").prompts("Why?", " Because.") == list(testbed.evaluation_prompts(dialogue))


def test_settings_of_a_preset_can_be_changed() -> None:
    assert RAIN.preset("hh", max_iterations=7).max_iterations == 7
    with pytest.raises(ConfigError, match="allowed: hh, adv, truth, sentiment, town"):
        RAIN.preset("nosuch")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_iteration"):
        RAIN.preset("hh", max_iteration=7)
    with pytest.raises(ConfigError, match="max_iterations"):
        RAIN.preset("hh", max_iterations=0)


def test_the_policys_prompt_goes_before_the_searchs() -> None:
    decoder, _ = fake_decoder(tokenizer=PieceTokenizer([*PieceTokenizer().pieces, "Z"]), lm=HashLM(vocabulary=36))
    rain = RAIN(evaluator=TEMPLATE, format=ChatFormat("a {prompt} b"))
    (mine,) = decoder.requests("c", search=rain)
    (theirs,) = decoder.requests("c", search=rain, policy=Policy(prompt=ChatFormat("Z{prompt}")))
    assert (mine.prompt_text, theirs.prompt_text) == ("a c b", "Zc")


# ---- verdict tokens ----------------------------------------------------------------------------------------------------
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that has learnt "(A" and "(B" as tokens of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(["</s>", *alphabet, "(A", "(B"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("(", "A"), ("(", "B")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")  # type: ignore[no-untyped-call]


def test_option_tokens_are_read_in_context() -> None:
    plain, merging = PieceTokenizer(), merging_tokenizer()
    question = TEMPLATE.prompts("a", "b")[0]
    ids = plain("AB")["input_ids"][1:]
    assert Codec(plain, [0]).options(question, ("A", "B")) == (0, ids)  # type: ignore[arg-type]
    merged = [merging.convert_tokens_to_ids(piece) for piece in ("(A", "(B")]
    assert Codec(merging, [0]).options(question, ("A", "B")) == (1, merged)


@pytest.mark.parametrize(
    ("letters", "reason"),
    [
        (("AB", "BA"), "one token each"),
        (("A", "BA"), "one token each"),
        (("Z", "Y"), "share a token"),
    ],
)
def test_options_that_no_token_spells(letters: tuple[str, str], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        Codec(PieceTokenizer(), [0]).options("(", letters)  # type: ignore[arg-type]


def test_a_search_with_such_options_fails_with_the_reason() -> None:
    decoder, _ = fake_decoder()
    with pytest.raises(ModelError, match="change the letters"):
        decoder.generate("abc", search=RAIN(evaluator=replace(TEMPLATE, letters=("AB", "BA"))))


def test_questions_that_end_differently_are_refused() -> None:
    uneven = replace(TEMPLATE, good_second="\n(A) b\n(B) g\n")
    decoder, _ = fake_decoder(HashLM(vocabulary=300), tokenizer=merging_tokenizer())
    with pytest.raises(ModelError, match="end both the same way"):
        decoder.generate("abc", search=RAIN(evaluator=uneven))


class VerdictLM(HashLM):
    """Answers the two questions with given logits of A and B; elsewhere all options are far apart, to be noticed."""

    def __init__(
        self, decoder_of: Codec, answers: dict[str, tuple[float, float]], letters: list[int], cut: int
    ) -> None:
        super().__init__(vocabulary=300)
        self.rows: dict[tuple[int, ...], np.ndarray[Any, np.dtype[np.float32]]] = {}
        for text, logits in answers.items():
            row = np.full(300, 9.0, dtype=np.float32)  # verdicts compare two letters, whatever else is likely
            row[letters] = logits
            ids = decoder_of.encode(text)
            self.rows[tuple(ids[: len(ids) - cut])] = row

    def logits(self, path: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
        return self.rows[path]


def score_with(evaluator: Evaluator, decoder: Decoder, prompt: str, response: str) -> float:
    """One evaluation, as a task of its own."""
    ledger = Ledger()
    (request,) = decoder.requests(prompt)
    context = SearchContext(decoder.engine, decoder.codec, ledger, request)
    (task,) = decoder.engine.run([Task(evaluator.evaluate(context, prompt, response), ledger)])
    if task.error is not None:
        raise task.error
    assert isinstance(task.result, float)
    return task.result


TRUTH_TABLE = [  # logits of A and B with the good option first, and with it second -> score
    ((2.0, 1.0), (1.0, 2.0), 1.0),
    ((2.0, 1.0), (2.0, 1.0), 0.0),
    ((1.0, 2.0), (1.0, 2.0), 0.0),
    ((1.0, 2.0), (2.0, 1.0), -1.0),
    ((1.0, 1.0), (1.0, 2.0), 0.0),
    ((2.0, 1.0), (1.0, 1.0), 0.0),
    ((1.0, 1.0), (1.0, 1.0), -1.0),
    ((1.0, 1.0), (2.0, 1.0), -1.0),
]


@pytest.mark.parametrize(("first", "second", "score"), TRUTH_TABLE)
@pytest.mark.parametrize("merging", [False, True], ids=["letters", "merged-letters"])
def test_two_order_verdicts(
    first: tuple[float, float], second: tuple[float, float], score: float, merging: bool
) -> None:
    tokenizer: Any = merging_tokenizer() if merging else PieceTokenizer()
    codec = Codec(tokenizer, [0])
    asked = TEMPLATE.prompts("abc", " de")
    cut, letters = codec.options(asked[0], TEMPLATE.letters)
    lm = VerdictLM(codec, dict(zip(asked, (first, second), strict=True)), letters, cut)
    decoder, _ = fake_decoder(lm, tokenizer=tokenizer)
    assert score_with(SelfEvaluation(TEMPLATE), decoder, "abc", " de") == score


@pytest.mark.parametrize(("logits", "score"), [((2.0, 1.0), 1.0), ((1.0, 2.0), -1.0), ((1.0, 1.0), -1.0)])
def test_one_order_verdicts(logits: tuple[float, float], score: float) -> None:
    template = replace(TEMPLATE, good_second=None)
    codec = Codec(PieceTokenizer(), [0])  # type: ignore[arg-type]
    (asked,) = template.prompts("abc", " de")
    lm = VerdictLM(codec, {asked: logits}, codec.options(asked, template.letters)[1], 0)
    decoder, _ = fake_decoder(lm)
    assert score_with(SelfEvaluation(template), decoder, "abc", " de") == score


def test_option_tokens_are_not_carried_to_another_tokenizer() -> None:
    """Decoders come and go; a new one must not inherit the letters of one whose memory it took over."""
    for turn in range(8):
        pieces = PieceTokenizer().pieces
        shift = turn % 4
        tokenizer = PieceTokenizer([*pieces[:3], *["\x00" * (i + 1) for i in range(shift)], *pieces[3:]])
        codec = Codec(tokenizer, [0])  # type: ignore[arg-type]
        asked = TEMPLATE.prompts("abc", " de")
        letters = codec.options(asked[0], TEMPLATE.letters)[1]
        lm = VerdictLM(codec, dict(zip(asked, ((2.0, 1.0), (1.0, 2.0)), strict=True)), letters, 0)
        decoder, _ = fake_decoder(lm, tokenizer=tokenizer)
        assert score_with(SelfEvaluation(TEMPLATE), decoder, "abc", " de") == 1.0
        del decoder, codec, lm


def test_both_orders_share_all_tokens_but_the_question() -> None:
    codec = Codec(PieceTokenizer(), [0])  # type: ignore[arg-type]
    asked = TEMPLATE.prompts("abc", " de")
    lm = VerdictLM(codec, dict.fromkeys(asked, (2.0, 1.0)), codec.options(asked[0], TEMPLATE.letters)[1], 0)
    decoder, recorder = fake_decoder(lm)
    score_with(SelfEvaluation(TEMPLATE), decoder, "abc", " de")
    first, second = (codec.encode(text) for text in asked)
    shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert recorder.forwards == 1
    assert len(recorder.rows) == len(first) + len(second) - shared


@pytest.mark.parametrize(
    "changes",
    [
        {"stop": ("",)},
        {"stop": "abc"},
        {"embedder": 5},
        {"value_threshold": float("nan")},
        {"max_iterations": 1.5},
        {"set_lengths": (1, 2.5)},
        {"rollout_stop": None},
        {"top_k": 2.5},
        {"expansion_temperature": float("inf")},
        {"min_visits": -1},
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"RAIN {next(iter(changes))}"):
        RAIN.preset("town", **changes)
