"""Models that decode together must mean the same by a token id, and must split text alike."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from models import EVERY_BYTE, byte_tokenizer
from tokenizers import Tokenizer, processors
from tokenizers.models import BPE, Unigram
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

import raindecode
from raindecode import testbed
from raindecode.engine.vocabulary import check_same_tokenizer, shared_vocab_size
from raindecode.errors import ModelError, VocabularyError

Description = dict[str, Any]


def remade(change: Callable[[Description], Any]) -> PreTrainedTokenizerFast:
    """The byte tokenizer with something changed in its description."""
    description = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    change(description)
    core = Tokenizer.from_str(json.dumps(description))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def check(other: Any, reference: Any = None) -> None:
    check_same_tokenizer(reference or byte_tokenizer(), other, name="the aligned model")


def refused(other: Any, message: str) -> str:
    with pytest.raises(VocabularyError, match=message) as caught:
        check(other)
    assert "the aligned model" in str(caught.value)
    return str(caught.value)


def swap(vocabulary: dict[str, int], one: str, two: str) -> None:
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]


def test_the_same_tokenizer_passes() -> None:
    check(byte_tokenizer())
    check(remade(lambda d: None))
    shipped = AutoTokenizer.from_pretrained(testbed.WEIGHTS)
    check(AutoTokenizer.from_pretrained(testbed.WEIGHTS), shipped)
    with pytest.raises(VocabularyError):
        check(shipped)


def test_ids_of_other_texts_are_listed() -> None:
    message = refused(remade(lambda d: swap(d["model"]["vocab"], "a", "b")), "vocabulary: 2 ids mean one token")
    first = byte_tokenizer().convert_tokens_to_ids("a")
    assert f"{first} is 'a' and 'b', {first + 1} is 'b' and 'a'; only" in message


def test_ids_that_are_no_token_are_listed_and_counted() -> None:
    other = byte_tokenizer()
    other.add_tokens([f"<extra {i}>" for i in range(7)])
    message = refused(other, "vocabulary: 7 ids")
    assert f"{EVERY_BYTE} is no token and '<extra 0>'" in message
    assert "and 2 more" in message


def test_merges_in_another_order_are_refused() -> None:
    message = refused(remade(lambda d: d["model"]["merges"].insert(0, d["model"]["merges"].pop())), "merges: .* has 8")
    assert "number 0 is ['t', 'h'] and ['Ã', '©']" in message


def test_a_missing_merge_is_refused() -> None:
    refused(remade(lambda d: d["model"]["merges"].pop()), r"merges: .* has 8 and .* 7; number 7 is .* and none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["model"].update(byte_fallback=True), "model, byte_fallback: it is false .* true"),
        (lambda d: d["model"].update(ignore_merges=True), "model, ignore_merges"),
        (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer: it is null .*NFC"),
        (lambda d: d["pre_tokenizer"].update(use_regex=True), "pre_tokenizer: .*ByteLevel"),
        (lambda d: d.update(decoder={"type": "Fuse"}), "decoder: .*Fuse"),
        (lambda d: d["added_tokens"][0].update(lstrip=True), "added tokens: 1 differ .*: 0 is .*'lstrip': False.*'lstrip': True"),
    ],
    ids=["byte-fallback", "ignore-merges", "normalizer", "pre-tokenizer", "decoder", "added-token"],
)  # fmt: skip
def test_text_that_would_be_split_otherwise_is_refused(change: Callable[[Description], Any], message: str) -> None:
    refused(remade(change), message)


def test_scores_of_pieces_are_compared() -> None:
    def unigram(score: float) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0), ("aa", score)], unk_id=0)),
            unk_token="<unk>",
        )

    check(unigram(-1.5), unigram(-1.5))
    with pytest.raises(VocabularyError, match=r"model, vocab: .*-1.5.*-3.0"):
        check(unigram(-3.0), unigram(-1.5))


def test_added_tokens_differ_in_whether_they_are_shown_only() -> None:
    check(remade(lambda d: d["added_tokens"][0].update(special=False)))


def test_texts_must_begin_alike() -> None:
    other = byte_tokenizer()
    other.bos_token = "<pad>"
    message = refused(other, r"bos token: it is 1 .* and 0 \('<pad>'\)")
    assert "set bos_token of one tokenizer" in message
    other.bos_token = None
    refused(other, "bos token: .* and None")


def test_texts_may_end_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    """A base and its chat model often name different ids of the same vocabulary."""
    other = byte_tokenizer()
    other.eos_token = "<pad>"
    with caplog.at_level("WARNING", "raindecode"):
        check(other)
    assert "eos token: it is 2 ('</s>') to the reference model and 0 ('<pad>')" in caplog.text


def test_padding_must_be_the_same_where_both_have_it() -> None:
    other = byte_tokenizer()
    other.pad_token = None
    check(other)
    other.pad_token = "</s>"
    refused(other, r"pad token: it is 0 \('<pad>'\) .* and 2 \('</s>'\)")


def test_templates_and_frames_are_logged_only(caplog: pytest.LogCaptureFixture) -> None:
    other = byte_tokenizer()
    check(other)
    assert not caplog.records
    other.chat_template = "{{ messages }}"
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    with caplog.at_level(logging.WARNING, "raindecode"):
        check(other)
    assert "chat template of the aligned model differs" in caplog.text
    assert "post-processor" in caplog.text


class _Plain:
    """A tokenizer that has no description of its parts, as slow ones have none."""

    is_fast = False

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_tokenizers_without_a_description_are_compared_by_what_they_do() -> None:
    check(_Plain(byte_tokenizer()))
    check(byte_tokenizer(), _Plain(byte_tokenizer()))
    refused(_Plain(remade(lambda d: d["model"]["merges"].pop(0))), "splitting: .* is .* to the reference model and")
    refused(_Plain(remade(lambda d: d["pre_tokenizer"].update(add_prefix_space=True))), "splitting: ")


def test_two_texts_of_one_id_are_told_apart() -> None:
    def double(*pairs: tuple[str, int]) -> Any:
        plain = _Plain(byte_tokenizer())
        vocabulary = {**byte_tokenizer().get_vocab(), **dict(pairs)}
        plain.get_vocab = lambda: vocabulary  # type: ignore[attr-defined]
        return plain

    reference = double(("one", 900), ("other", 900))
    check(double(("other", 900), ("one", 900)), reference)
    with pytest.raises(VocabularyError, match=r"vocabulary: 1 ids .* 900 is 'other' and 'one'"):
        check(double(("one", 900)), reference)


def tokens(count: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({str(i): i for i in range(count)}, [])))


def test_padding_of_the_embedding_is_no_token() -> None:
    size = 151_665  # Qwen2.5's, in models whose rows were padded for different training clusters
    assert shared_vocab_size(tokens(size), [151_936, 152_064], ["0.5B", "7B"]) == size
    assert shared_vocab_size(tokens(300), [300, 300], ["a", "b"]) == 300
    assert shared_vocab_size(tokens(300), [300, 1324], ["a", "b"]) == 300
    assert shared_vocab_size(tokens(50_257), [50_257, 53_248], ["a", "b"]) == 50_257  # 13 x 4096


def test_gaps_between_ids_count() -> None:
    gaps = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0, "b": 1, "c": 41}, [])))
    assert len(gaps) == 3
    assert shared_vocab_size(gaps, [64, 64], ["a", "b"]) == 42
    with pytest.raises(VocabularyError, match="ids up to 41"):
        shared_vocab_size(gaps, [64, 41], ["a", "b"])


def test_added_tokens_count() -> None:
    tokenizer = tokens(10)
    tokenizer.add_tokens([AddedToken("<call>", special=True)])
    assert shared_vocab_size(tokenizer, [16], ["a"]) == 11


def test_widths_that_cannot_be_of_one_vocabulary_are_refused() -> None:
    with pytest.raises(
        VocabularyError, match=r"ids up to 299, .* reference 300, aligned 299; allowed: 300 or more each"
    ):
        shared_vocab_size(tokens(300), [300, 299], ["reference", "aligned"])
    with pytest.raises(
        VocabularyError, match=r"reference 300, aligned 1400; the tokenizer has 300 ids; allowed: .* 1024"
    ):
        shared_vocab_size(tokens(300), [300, 1400], ["reference", "aligned"])
    with pytest.raises(VocabularyError, match="no tokens"):
        shared_vocab_size(tokens(0), [300], ["reference"])


def test_the_error_is_public() -> None:
    assert raindecode.VocabularyError is VocabularyError
    assert issubclass(VocabularyError, ModelError)
