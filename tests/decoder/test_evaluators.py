"""Evaluators and embedders: what RAIN asks of them, what they may return, and who pays when they fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_lm import HIDDEN, TEMPLATE, HashLM, fake_decoder, hashed_vectors
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from raindecode.engine.branch import Ledger
from raindecode.engine.task import Task
from raindecode.errors import ConfigError, EvaluatorError, ModelError
from raindecode.search.context import SearchContext
from raindecode.search.embedder import Embedder, HiddenStates, Paths, TextEmbedder, sentence_transformer
from raindecode.search.evaluator import (
    CallableEvaluator,
    ClassifierEvaluator,
    SelfEvaluation,
    as_evaluator,
    checked_score,
)
from raindecode.search.rain import RAIN
from raindecode.types import Completion

Pairs = list[tuple[str, str]]
QUICK = RAIN(evaluator=TEMPLATE, max_iterations=6, min_new_iterations=2, min_visits=2)
PROMPTS = ["H:abc\nA:", "H:de, gh\nA:", "H:g\nA:"]


def outcomes(rain: RAIN, prompts: Sequence[str] = PROMPTS) -> list[Completion | BaseException]:
    """What became of each request, run together."""
    decoder, _ = fake_decoder(HashLM(1))
    requests = decoder.requests(list(prompts), search=rain, max_new_tokens=8, seed=range(len(prompts)))
    found = dict(decoder.stream(requests, search=rain))
    return [found[i] for i in range(len(prompts))]


# ---- a function of one's own -------------------------------------------------------------------------------------------
def test_a_function_gets_pairs_and_its_scores_count() -> None:
    asked: Pairs = []

    def score(pairs: Pairs) -> list[float]:
        asked.extend(pairs)
        return [0.25 for _ in pairs]

    done = outcomes(replace(QUICK, evaluator=score, width=1))
    assert {prompt for prompt, _ in asked} == set(PROMPTS)
    assert all(isinstance(d, Completion) and d.value == pytest.approx(0.25) for d in done)
    assert ("H:g\nA:", "") in asked  # the bare prompt is judged first
    assert len(asked) == sum(d.stats.evaluations for d in done if isinstance(d, Completion))


def test_texts_of_several_requests_come_in_one_call() -> None:
    sizes: list[int] = []

    def score(pairs: Pairs) -> list[float]:
        sizes.append(len(pairs))
        return [0.0] * len(pairs)

    outcomes(replace(QUICK, evaluator=score, width=1))
    assert max(sizes) == len(PROMPTS)
    outcomes(replace(QUICK, evaluator=score, width=4))
    assert max(sizes) > len(PROMPTS)  # leaves ahead of their turn are judged in the same call


def test_a_text_is_judged_once_per_request() -> None:
    asked: Pairs = []

    def score(pairs: Pairs) -> list[float]:
        asked.extend(pairs)
        return [-1.0] * len(pairs)

    outcomes(replace(QUICK, evaluator=score, max_iterations=30), PROMPTS[:1])
    assert len(set(asked)) == len(asked)


@dataclass
class Unhashable:
    """A callable object, as a user may write it: dataclasses with eq have no hash."""

    score: float

    def __call__(self, pairs: Pairs) -> Any:
        return np.full(len(pairs), self.score, dtype=np.float32)


def test_numpy_scores_from_an_object_without_a_hash() -> None:
    done = outcomes(replace(QUICK, evaluator=Unhashable(0.5)))
    assert [d.value for d in done if isinstance(d, Completion)] == pytest.approx([0.5] * 3)


def _raises(pairs: Pairs) -> list[float]:
    raise KeyError("no such word")


FAULTS: list[Any] = [
    pytest.param(_raises, "KeyError.*no such word", id="raises"),
    pytest.param(lambda pairs: [math.nan] * len(pairs), "nan.*from -1 to 1", id="nan"),
    pytest.param(lambda pairs: [1.5] * len(pairs), "1.5.*from -1 to 1", id="out-of-range"),
    pytest.param(lambda pairs: [0.0] * (len(pairs) + 1), "2 results came back", id="too-many"),
    pytest.param(lambda pairs: [], "0 results came back", id="too-few"),
    pytest.param(lambda pairs: None, "NoneType", id="nothing"),
    pytest.param(lambda pairs: ["good"] * len(pairs), "'good'.*a number", id="words"),
]


@pytest.mark.parametrize(("function", "message"), FAULTS)
def test_faults_of_a_function_are_named(function: Callable[[Pairs], Any], message: str) -> None:
    decoder, _ = fake_decoder()
    with pytest.raises(EvaluatorError, match=message):
        decoder.generate("abc", search=replace(QUICK, evaluator=function))


@pytest.mark.parametrize(("function", "message"), FAULTS)
def test_only_the_request_at_fault_ends(function: Callable[[Pairs], Any], message: str) -> None:
    def score(pairs: Pairs) -> list[float]:
        bad = [(p, r) for p, r in pairs if p == PROMPTS[1] and r]
        return [0.5] * len(pairs) if not bad else list(function(pairs)) if len(pairs) == 1 else _mixed(pairs)

    def _mixed(pairs: Pairs) -> list[float]:
        """In company the fault shows as that request's score, or as an exception of the whole call."""
        one = list(function(pairs[:1]))
        if len(one) != 1:
            return one
        return [one[0] if p == PROMPTS[1] and r else 0.5 for p, r in pairs]

    good = outcomes(replace(QUICK, evaluator=lambda pairs: [0.5] * len(pairs)))
    done = outcomes(replace(QUICK, evaluator=score))
    assert isinstance(done[1], EvaluatorError)
    for index in (0, 2):
        ours, theirs = done[index], good[index]
        assert isinstance(ours, Completion)
        assert isinstance(theirs, Completion)
        assert (ours.text, ours.value, ours.stats.iterations) == (theirs.text, theirs.value, theirs.stats.iterations)


@pytest.mark.parametrize("score", [-1, 0, 1, 0.5, np.float32(0.25), torch.tensor(-0.5)])
def test_scores_that_are_numbers(score: Any) -> None:
    assert checked_score(score, "mine") == float(score)


@pytest.mark.parametrize("score", [None, "x", [1, 2], math.inf, -math.inf, 1.001])
def test_scores_that_are_none(score: Any) -> None:
    with pytest.raises(EvaluatorError, match="mine"):
        checked_score(score, "mine")


def test_what_counts_as_an_evaluator() -> None:
    assert as_evaluator(TEMPLATE) == SelfEvaluation(TEMPLATE)
    assert isinstance(as_evaluator(lambda pairs: [0.0]), CallableEvaluator)
    own = SelfEvaluation(TEMPLATE)
    assert as_evaluator(own) is own
    with pytest.raises(ConfigError, match="float"):
        as_evaluator(1.0)  # type: ignore[arg-type]


def test_a_class_with_evaluate_is_an_evaluator() -> None:
    class Shortest:
        def evaluate(self, context: SearchContext, prompt: str, response: str) -> Generator[Any, Any, float]:
            yield from ()
            return 1.0 if len(response) < 4 else -1.0

    (done,) = outcomes(replace(QUICK, evaluator=Shortest()), PROMPTS[:1])
    assert isinstance(done, Completion)
    assert done.value is not None


def test_an_evaluation_prompt_without_room_ends_its_request_only() -> None:
    decoder, _ = fake_decoder(HashLM(1), context=96)
    rain = replace(QUICK, evaluator=replace(TEMPLATE, header="Q" * 45))
    requests = decoder.requests(["H:abc\nA:", "H:" + "de" * 15 + "\nA:"], search=rain, max_new_tokens=4)
    done = dict(decoder.stream(requests, search=rain))
    assert isinstance(done[0], Completion)
    assert isinstance(done[1], EvaluatorError)
    assert "96" in str(done[1])


# ---- a classifier ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *"abcdefgh", ",", ".", "H", "A", ":"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    ).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, id2label={0: "toxic", 1: "fine"}, label2id={"toxic": 0, "fine": 1},
        initializer_range=0.5, hidden_dropout_prob=0.0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_classifier_scores_are_twice_the_probability_less_one(classifier: Path) -> None:
    evaluator = ClassifierEvaluator(str(classifier), "fine", batch_size=2)
    pairs = [("ab", "cd"), ("a", "gh gh gh"), ("H:", "e" * 200)]
    scores = evaluator.scores(pairs)
    assert len(scores) == 3
    assert scores == pytest.approx([evaluator.scores([pair])[0] for pair in pairs], abs=1e-5)
    other = ClassifierEvaluator(str(classifier), 0).scores(pairs)
    assert scores == pytest.approx([-score for score in other], abs=1e-5)
    assert len({round(score, 4) for score in scores}) == 3
    inputs = evaluator._tokenizer("ab", "cd", return_tensors="pt")
    with torch.inference_mode():
        probability = evaluator._model(**inputs).logits.softmax(-1)[0, 1]
    assert scores[0] == pytest.approx(2 * float(probability) - 1, abs=1e-6)


def test_a_search_judged_by_a_classifier(classifier: Path) -> None:
    evaluator = ClassifierEvaluator(str(classifier), "fine")
    done = outcomes(replace(QUICK, evaluator=evaluator))
    assert all(isinstance(d, Completion) and d.value is not None and -1 < d.value < 1 for d in done)


@pytest.mark.parametrize("label", ["nice", 2, -1])
def test_labels_that_are_not_there(classifier: Path, label: str | int) -> None:
    with pytest.raises(ModelError, match="toxic, fine"):
        ClassifierEvaluator(str(classifier), label)


def test_a_classifier_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no sequence classifier"):
        ClassifierEvaluator(str(tmp_path / "nothing"), "fine")


# ---- embedders ---------------------------------------------------------------------------------------------------------
def embed(embedder: Embedder, prompt: str, answer: str, starts: Sequence[int]) -> tuple[Tensor, HashLM, list[int], int]:
    """Rows of an embedder for suffixes of prompt + answer; the model, the token path, the prompt's length."""
    lm = HashLM(3)
    decoder, _ = fake_decoder(lm)
    ledger = Ledger()
    (request,) = decoder.requests(prompt)
    context = SearchContext(decoder.engine, decoder.codec, ledger, request)
    ids = [*request.prompt_ids, *decoder.codec.encode(answer)[1:]]
    at = [len(request.prompt_ids) + s for s in starts]
    paths = Paths(decoder.engine.open(ledger, ids), at, lambda: [decoder.codec.decode(ids[s:]) for s in at])
    (task,) = decoder.engine.run([Task(embedder.embed(context, paths), ledger)])
    if task.error is not None:
        raise task.error
    assert isinstance(task.result, Tensor)
    assert task.result.shape == (len(starts), embedder.dimension(context))
    assert task.result.dtype == torch.float32
    assert task.result.norm(dim=-1).tolist() == pytest.approx([1.0] * len(starts))
    return task.result, lm, ids, len(request.prompt_ids)


@pytest.mark.parametrize("prompt", ["H:a\nA:", "H:abc, de, gh. abc, de, gh. abc, de\nA:"], ids=["short", "long"])
@pytest.mark.parametrize("center", [True, False])
def test_hidden_states_are_means_of_the_path(prompt: str, center: bool) -> None:
    rows, lm, ids, length = embed(HiddenStates(center=center), prompt, " de, fgh.", [0, 2, 5])
    states = np.stack([lm.hidden(tuple(ids[: i + 1])) for i in range(len(ids))]).astype(np.float64)
    assert rows.shape[1] == HIDDEN
    for row, start in zip(rows.numpy(), (0, 2, 5), strict=True):
        expected = states[length + start :].mean(0)
        if center:
            expected = expected - states[max(0, length - 16) : length].mean(0)
        np.testing.assert_allclose(row, expected / np.linalg.norm(expected), atol=1e-5)


def test_centring_tells_texts_apart() -> None:
    """Raw states share a direction, so that any two texts look alike; less that of the prompt they do not."""
    raw, *_ = embed(HiddenStates(center=False), "H:abc, de, gh. ab\nA:", "ab, cd. ef gh", [0, 6])
    centred, *_ = embed(HiddenStates(), "H:abc, de, gh. ab\nA:", "ab, cd. ef gh", [0, 6])
    assert float(raw[0] @ raw[1]) > float(centred[0] @ centred[1])


def test_text_embedders_get_the_suffixes_and_give_unit_rows() -> None:
    seen: list[str] = []

    def function(texts: list[str]) -> Any:
        seen.extend(texts)
        return 7.0 * hashed_vectors(texts, 0.5, 4)

    embed(TextEmbedder(function, 4), "H:a\nA:", " de, fgh.", [0, 2, 5])
    assert seen[0] == " de, fgh."
    assert [seen[0].endswith(text) for text in seen] == [True] * 3
    assert len(seen[0]) > len(seen[1]) > len(seen[2])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda texts: np.zeros((len(texts), 3)), r"\(3, 3\).*\(3, 4\)"),
        (lambda texts: np.full((len(texts), 4), np.nan), "finite"),
        (lambda texts: np.zeros((1, 4)), r"\(1, 4\)"),
        (_raises, "KeyError"),
    ],
    ids=["size", "nan", "count", "raises"],
)
def test_faults_of_a_text_embedder(function: Any, message: str) -> None:
    with pytest.raises(EvaluatorError, match=message):
        embed(TextEmbedder(function, 4), "H:a\nA:", " de, fgh.", [0, 2, 5])


def test_a_failing_embedder_ends_its_request_only() -> None:
    def function(texts: list[str]) -> Any:
        if any("g" in text for text in texts):
            raise ValueError("no g here")
        return hashed_vectors(texts, 0.1)

    done = outcomes(replace(QUICK, embedder=TextEmbedder(function, 8)), [*PROMPTS, *PROMPTS])
    failed = [d for d in done if isinstance(d, EvaluatorError)]
    assert failed
    assert all("no g here" in str(error) for error in failed)
    assert all(isinstance(d, (Completion, EvaluatorError)) for d in done)


def test_without_an_embedder_no_sibling_gets_credit() -> None:
    decoder, _ = fake_decoder(HashLM(1))
    rain = replace(QUICK, embedder=None, max_iterations=20, record_tree=True)
    (done,) = decoder.generate(PROMPTS[0], search=rain, max_new_tokens=8)
    assert done.tree is not None
    assert all(c["visits"] == c["direct_visits"] for tree in done.tree for c in tree["root"]["children"])


def test_the_published_encoder_needs_its_package() -> None:
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="sentence"):
            sentence_transformer()
    else:
        pytest.skip("sentence-transformers is installed; loading its model needs the network")
