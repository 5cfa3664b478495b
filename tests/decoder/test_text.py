"""Text and tokens: encoding, decoding in context, streaming, option tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EOS, byte_tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from raindecode import testbed
from raindecode.errors import ModelError
from raindecode.text import Codec, TextStream, find_stop


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(byte_tokenizer(), [EOS])


def word_codec() -> Codec:
    """Words with a marker for the space before them, as sentencepiece has it: the marker of a text's first word is dropped."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *"ABabcdehlo(.", "▁A", "▁B", "▁ab", "▁cd", "(A"]
    merges = [("▁", "A"), ("▁", "B"), ("a", "b"), ("▁", "ab"), ("c", "d"), ("▁", "cd"), ("(", "A")]
    pieces += [a + b for a, b in merges if a + b not in pieces]
    core = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return Codec(tokenizer, [2])


# ---- encoding and decoding --------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_byte_level_text_comes_back(codec: Codec, text: str) -> None:
    assert codec.decode(codec.encode(text)) == text


def test_special_tokens_stand_in_front_only() -> None:
    words = word_codec()
    ids = words.encode("ab cd")
    assert ids[0] == 1
    assert 2 not in ids
    assert words.decode(ids) == "ab cd"
    assert words.decode([*ids, 2]) == "ab cd"


def test_a_continuation_keeps_its_leading_space() -> None:
    words = word_codec()
    whole, head = words.encode("ab cd"), words.encode("ab")
    tail = whole[len(head) :]
    assert words.decode(tail) == "cd"
    assert words.continuation(head, tail) == " cd"
    assert words.continuation([1], words.encode("cd")[1:]) == "cd"


# ---- streaming --------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("ab é€🎉中\n theñ"), max_size=25), context=st.sampled_from(["", "the", "x é"]))
def test_streamed_text_is_the_text(codec: Codec, text: str, context: str) -> None:
    stream = TextStream(codec, codec.encode(context))
    pieces = [stream.push(token) for token in codec.encode(text)]
    pieces.append(stream.finish())
    assert "".join(pieces) == text == stream.text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(3, 266), max_size=20))
def test_bytes_that_are_no_text_stream_as_they_decode(codec: Codec, ids: list[int]) -> None:
    stream = TextStream(codec, codec.encode("the"))
    for token in ids:
        stream.push(token)
    stream.finish()
    assert stream.text == codec.decode(ids)
    assert stream.finish() == ""


def test_a_character_appears_when_it_is_whole(codec: Codec) -> None:
    stream = TextStream(codec, codec.encode("x"))
    ids = codec.encode("🎉")
    assert len(ids) == 4
    assert [stream.push(token) for token in ids] == ["", "", "", "🎉"]


def test_an_unfinished_character_comes_at_the_end(codec: Codec) -> None:
    stream = TextStream(codec, codec.encode("x"))
    assert [stream.push(token) for token in codec.encode("a🎉")[:3]] == ["a", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.text == "a\ufffd"


def test_words_stream_with_the_spaces_between_them() -> None:
    words = word_codec()
    head, whole = words.encode("ab"), words.encode("ab cd ab A")
    stream = TextStream(words, head)
    assert [stream.push(token) for token in whole[len(head) :]] == [" cd", " ab", " A"]


def test_special_tokens_add_no_text() -> None:
    words = word_codec()
    stream = TextStream(words, words.encode("ab"))
    cd = words.encode("ab cd")[-1]
    assert [stream.push(token) for token in (2, cd, 2, cd)] == ["", " cd", "", " cd"]


@pytest.mark.parametrize(
    ("text", "stops", "start", "expected"),
    [
        ("abcabc", ["c"], 0, 2),
        ("abcabc", ["c"], 3, 5),
        ("abcabc", ["ca", "bc"], 0, 1),
        ("abc", ["x"], 0, -1),
        ("abc", [], 0, -1),
        ("", ["x"], 0, -1),
    ],
)
def test_find_stop(text: str, stops: list[str], start: int, expected: int) -> None:
    assert find_stop(text, stops, start) == expected


# ---- options of a multiple-choice prompt ------------------------------------------------------------------------------
def test_options_are_read_in_context(codec: Codec) -> None:
    merged, ids = codec.options("Answer: (", ["A", "B"])
    assert merged == 0
    assert ids == [codec.encode("A")[0], codec.encode("B")[0]]


def test_options_after_a_space_merge_with_it() -> None:
    words = word_codec()
    merged, ids = words.options("ab ", ["A", "B"])
    spelled = [words.encode("ab A"), words.encode("ab B")]
    assert ids == [one[-1] for one in spelled]
    assert words.encode("ab ")[: len(words.encode("ab ")) - merged] == spelled[0][:-1]
    assert merged == 1


@pytest.mark.parametrize(
    ("context", "letters", "reason"),
    [
        ("Answer: ", ["yes", "no"], "do not become one token each"),
        ("Answer: (", ["A", "A"], "share a token"),
        ("i", ["n", "x"], "do not become one token each"),
    ],
)
def test_options_that_are_no_single_tokens_are_refused(
    codec: Codec, context: str, letters: list[str], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        codec.options(context, letters)


def test_what_another_call_of_the_tokenizer_left_behind_reaches_no_prompt() -> None:
    """The tokenizer's core keeps what the last call asked of it; transformers resets that at its next call."""
    tokenizer = byte_tokenizer()
    codec = Codec(tokenizer, [EOS])
    text = "the</s>inner"
    expected = tokenizer(text)["input_ids"]
    assert EOS in expected
    for left in (
        {"split_special_tokens": True},
        {"truncation": True, "max_length": 2},
        {"padding": "max_length", "max_length": 99},
    ):
        tokenizer(text, **left)
        assert codec.encode(text) == expected, left
        assert codec.encode(text) == expected
    tokenizer.split_special_tokens = True
    assert codec.encode(text) == tokenizer(text)["input_ids"] != expected


def test_tokenizers_with_methods_of_their_own_are_asked() -> None:
    class Shouting(type(byte_tokenizer())):  # type: ignore[misc]
        def _decode(self, *args: object, **kwargs: object) -> str:
            return str(super()._decode(*args, **kwargs)).upper()

    tokenizer = Shouting(tokenizer_object=byte_tokenizer().backend_tokenizer)
    ids = Codec(tokenizer, [EOS]).encode("the inner")
    assert Codec(tokenizer, [EOS]).decode(ids) == "THE INNER"
    patched = byte_tokenizer()
    patched._decode = lambda *_args, **_kwargs: "patched"
    assert Codec(patched, [EOS]).decode(ids) == "patched"
    assert Codec(byte_tokenizer(), [EOS]).decode(ids) == "the inner"


def test_a_plain_tokenizer_is_asked_without_its_wrapper() -> None:
    codec = Codec(AutoTokenizer.from_pretrained(testbed.WEIGHTS), {2})
    assert codec._backend is not None
    text = "Human: How do I paint a fence?\n"
    ids = codec.encode(text)
    assert ids == list(codec.tokenizer(text)["input_ids"])
    assert codec.decode(ids) == codec.tokenizer.decode(ids, skip_special_tokens=True) == text
