"""RAIN in company, streaming, recorded trees, and settings that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from fake_lm import (
    BOS,
    EOS,
    TEMPLATE,
    HashLM,
    PieceTokenizer,
    fake_decoder,
    hashed_scores,
    hashed_vectors,
    random_llama,
)

from raindecode.decoder import Decoder
from raindecode.engine.engine import Engine
from raindecode.engine.kv_tree import KVTree
from raindecode.errors import ConfigError
from raindecode.search.embedder import HiddenStates, TextEmbedder
from raindecode.search.rain import RAIN
from raindecode.types import Completion

PROMPT = "H:abc, de\nA:"
QUICK = RAIN(evaluator=TEMPLATE, max_iterations=12, min_new_iterations=4, min_visits=2, record_tree=True)
ALIKE = TextEmbedder(partial(hashed_vectors, spread=0.02), 8)
BAD = partial(hashed_scores, "bad", 0)
PROMPTS = [PROMPT, "H:" + "cdef" * 6 + "\nA:", "H:g\nA:", "H:ha ha\nA:", PROMPT]
SEEDS = [1, 2, 3, 4, 5]


def shown(done: Completion) -> tuple[Any, ...]:
    """What may not depend on the company a request keeps (slots are names and may)."""

    def bare(node: dict[str, Any]) -> dict[str, Any]:
        rest = {k: v for k, v in node.items() if k not in ("slot", "children")}
        return {**rest, "children": [bare(child) for child in node["children"]]}

    stats = done.stats
    counters = (stats.tokens_processed, stats.iterations, stats.evaluations)
    return done.text, done.token_ids, done.value, counters, [bare(tree["root"]) for tree in done.tree or ()]


def alone(make: Callable[[], Decoder], rain: RAIN, **options: Any) -> list[tuple[Any, ...]]:
    return [
        shown(make().generate(prompt, search=rain, seed=seed, **options)[0])
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]


@pytest.mark.parametrize("embedder", [HiddenStates(), ALIKE, None], ids=["hidden", "text", "none"])
def test_alone_and_among_others(embedder: Any) -> None:
    rain, lm = replace(QUICK, embedder=embedder), HashLM(20)
    expected = alone(lambda: fake_decoder(lm)[0], rain, max_new_tokens=16)
    decoder, _ = fake_decoder(lm)
    together = decoder.generate(PROMPTS, search=rain, seed=SEEDS, max_new_tokens=16)
    assert [shown(done) for done in together] == expected
    again = decoder.generate(PROMPTS[::-1], search=rain, seed=SEEDS[::-1], max_new_tokens=16)
    assert [shown(done) for done in again[::-1]] == expected


def test_alone_and_among_others_on_a_real_model() -> None:
    decoder = Decoder(random_llama(), PieceTokenizer(), kv_tokens=8192)  # type: ignore[arg-type]
    if decoder.exact == "off":
        pytest.skip("exact mode does not hold on this machine")
    rain = replace(QUICK, max_iterations=8)
    expected = alone(lambda: decoder, rain, max_new_tokens=10)
    together = decoder.generate(PROMPTS, search=rain, seed=SEEDS, max_new_tokens=10)
    assert [shown(done) for done in together] == expected


@pytest.mark.parametrize("kv_tokens", [285, 250])
def test_a_small_pool_changes_nothing_but_the_work(kv_tokens: int) -> None:
    lm = HashLM(21)
    large, _ = fake_decoder(lm)
    expected = large.generate(PROMPTS, search=QUICK, seed=SEEDS, max_new_tokens=16)
    small, _ = fake_decoder(lm)
    small.engine = Engine(small.engine.runner, KVTree(kv_tokens + 1))
    found = small.generate(PROMPTS, search=QUICK, seed=SEEDS, max_new_tokens=16)
    assert small.engine.tree.num_evicted > 0
    assert [shown(done) for done in found] == [shown(done) for done in expected]


def test_seeds_lead_to_different_answers() -> None:
    decoder, _ = fake_decoder(HashLM(22))
    rain = replace(QUICK, max_iterations=6)
    answers = decoder.generate([PROMPT] * 6, search=rain, seed=range(6), max_new_tokens=12)
    assert len({done.text for done in answers}) > 1
    (same,) = decoder.generate(PROMPT, search=rain, seed=3, max_new_tokens=12)
    assert shown(same) == shown(answers[3])


# ---- streaming and records ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes", [{}, {"stop": ("ab", "de,")}, {"keep_after_last": "."}], ids=["plain", "stop", "kept"]
)
def test_streamed_pieces_are_the_text(changes: dict[str, Any]) -> None:
    decoder, _ = fake_decoder(HashLM(23))
    rain = replace(QUICK, **changes)
    pieces: dict[int, str] = {}
    requests = decoder.requests(PROMPTS, search=rain, seed=SEEDS, max_new_tokens=20)

    def on_text(index: int, piece: str) -> None:
        assert piece
        pieces[index] = pieces.get(index, "") + piece

    for index, done in decoder.stream(requests, search=rain, on_text=on_text):
        assert isinstance(done, Completion)
        assert pieces.get(index, "") == done.text


class ByteTokenizer(PieceTokenizer):
    """One token per byte: characters come in parts."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [BOS] * add_special_tokens + [byte + 2 for byte in text.encode()]}

    def decode(self, ids: Any, skip_special_tokens: bool = True, **_: Any) -> str:
        return bytes(i - 2 for i in ids if i > BOS).decode(errors="replace")


class TwoByteLM(HashLM):
    """Writes two-byte characters, of which every other set holds half."""

    def logits(self, path: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
        row = np.full(self.vocabulary, -30.0, dtype=np.float32)
        lead = path[-1] == 0xC3 + 2
        row[np.arange(0xA0, 0xB0) + 2 if lead else 0xC3 + 2] = 5.0
        return row + 0.1 * super().logits(path)


def test_a_half_written_character_is_not_streamed() -> None:
    decoder, _ = fake_decoder(TwoByteLM(vocabulary=260), tokenizer=ByteTokenizer())
    rain = RAIN(evaluator=BAD, max_iterations=4, min_new_iterations=1, set_lengths=(1, 3), rollout_stop="")
    (request,) = decoder.requests("ab", search=rain, max_new_tokens=12)
    pieces: list[str] = []
    ((_, done),) = decoder.stream([request], search=rain, on_text=lambda _, piece: pieces.append(piece))
    assert isinstance(done, Completion)
    assert len(pieces) > 1
    assert "".join(pieces) == done.text
    assert len(done.text) == 6
    assert "\ufffd" not in done.text


def test_recorded_trees_are_plain_data_and_consistent() -> None:
    decoder, _ = fake_decoder(HashLM(24))
    (done,) = decoder.generate(PROMPT, search=replace(QUICK, max_iterations=20), max_new_tokens=20)
    trees = json.loads(json.dumps(done.to_json()))["tree"]
    assert trees == done.tree
    path: list[int] = []
    for tree in trees:
        assert tree["committed"] == path
        (chosen,) = [child for child in tree["root"]["children"] if child["slot"] == tree["chosen"]]
        assert chosen["visits"] == max(child["visits"] for child in tree["root"]["children"])
        assert_counts(tree["root"], done, path)
        path = path + chosen["tokens"]
    assert path == done.token_ids


def assert_counts(node: dict[str, Any], done: Completion, path: list[int]) -> None:
    """Every visit but the first went on to a child; values are means of verdicts; texts belong to the path."""
    below = sum(child["direct_visits"] for child in node["children"])
    assert node["visits"] >= node["direct_visits"] >= below
    assert not node["children"] or node["direct_visits"] == below + 1
    assert -1.0 <= node["value"] <= 1.0
    assert node["text"] == "".join(PieceTokenizer().pieces[t] for t in path if t != EOS)
    for child in node["children"]:
        assert child["prior"] > 0
        assert_counts(child, done, path + child["tokens"])


def test_no_trees_unless_asked_for() -> None:
    decoder, _ = fake_decoder()
    (done,) = decoder.generate(PROMPT, search=replace(QUICK, record_tree=False), max_new_tokens=4)
    assert done.tree is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"max_tries": 0}, "max_tries"),
        ({"dynamic_tries": 0}, "dynamic_tries"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"set_lengths": ()}, "set_lengths"),
        ({"set_lengths": (2, 4)}, "set_lengths"),
        ({"expansion_temperature": 0.0}, "expansion_temperature"),
        ({"expansion_temperature": float("nan")}, "expansion_temperature"),
        ({"max_children": 9}, "max_children"),
        ({"max_children": 33}, "max_children"),
        ({"similarity_threshold": 2.0}, "similarity_threshold"),
        ({"evaluator": 3}, "evaluator"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        replace(QUICK, **changes)
