"""The shared-KV minimum: RAIN runs each token prefix it needs once, and no prefix that it does not need.

Two independent counts stand against the engine's own: what the forward was really given (fake_lm.Recorder rebuilds each row's
token path from the attention plan), and what the procedure needs at the least (plain_rain notes every prefix whose logits or
hidden state it uses).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from fake_lm import TEMPLATE, HashLM, fake_decoder, hashed_vectors, random_rain
from plain_rain import PlainRain

from raindecode.search.embedder import HiddenStates, TextEmbedder
from raindecode.search.rain import RAIN
from raindecode.types import Completion

PROMPT = "H:abc, de\nA:"
LIMIT = 1.05
TEXTS = TextEmbedder(partial(hashed_vectors, spread=0.05), 8)
ADV: dict[str, Any] = {"max_tries": 19, "dynamic_tries": 3, "expansion_temperature": 2.0, "min_visits": 5}
TRUTH: dict[str, Any] = {"rollout_stop": "", "min_visits": 16, "keep_after_last": "."}
CASES = [
    pytest.param(RAIN(evaluator=TEMPLATE), HashLM(40), id="hh"),
    pytest.param(RAIN(evaluator=TEMPLATE, **ADV), HashLM(41), id="adv"),
    pytest.param(RAIN(evaluator=replace(TEMPLATE, good_second=None), **TRUTH), HashLM(42, eos=1.0), id="truth"),
    pytest.param(RAIN(evaluator=TEMPLATE, embedder=TEXTS), HashLM(43), id="text-embedder"),
    pytest.param(RAIN(evaluator=TEMPLATE, embedder=None), HashLM(44, eos=0.5), id="no-embedder"),
    pytest.param(RAIN(evaluator=TEMPLATE, first_top_k=3, num_samples=2), HashLM(45, sharpness=1.0), id="narrow"),
    pytest.param(*random_rain(7)[:2], id="random"),
]


def run(rain: RAIN, lm: HashLM, **options: Any) -> tuple[Completion, list[tuple[int, ...]], PlainRain]:
    """One request on a fresh engine: its completion, every row that was run, and the plain run of the same.

    Width 1: rows that are run ahead of the search and not used are none that it needs.
    """
    rain = replace(rain, width=1)
    decoder, recorder = fake_decoder(lm)
    (request,) = decoder.requests(PROMPT, search=rain, **options)
    (done,) = decoder.generate(PROMPT, search=replace(rain, record_tree=True), **options)
    return done, recorder.rows, PlainRain(rain, lm, decoder.codec, request).run()


@pytest.mark.parametrize(("rain", "lm"), CASES)
def test_rows_run_are_the_shared_kv_minimum(rain: RAIN, lm: HashLM) -> None:
    done, rows, plain = run(rain, lm, max_new_tokens=24, seed=1)
    minimum = len(plain.needed)
    assert set(rows) == plain.needed
    assert done.stats.tokens_processed == len(set(rows))
    assert done.stats.tokens_charged == len(rows)
    assert minimum <= done.stats.tokens_processed <= LIMIT * minimum
    assert minimum <= done.stats.tokens_charged <= LIMIT * minimum


@pytest.mark.parametrize("embedder", [HiddenStates(), TEXTS, None], ids=["hidden", "text", "none"])
def test_the_last_token_of_a_set_runs_only_when_something_needs_it(embedder: Any) -> None:
    """A candidate nobody visited stays one token short, unless another path goes on through its last token."""
    lm = HashLM(46)
    done, rows, plain = run(RAIN(evaluator=TEMPLATE, embedder=embedder), lm, max_new_tokens=20, seed=2)
    prompt, ran = plain.prompt, set(rows)
    parents = {path[:-1] for path in ran}
    unvisited = [
        (*prompt, *tree["committed"], *path)
        for tree in done.tree or ()
        for node, path in below(tree["root"], ())
        if node["direct_visits"] == 0
    ]
    assert len(unvisited) > 20
    left_out = [path for path in unvisited if path not in ran]
    assert len(left_out) > len(unvisited) / 2
    for path in left_out:
        assert path[:-1] in ran
        assert path not in parents
    for path in set(unvisited) & ran:
        assert path in plain.needed  # a rollout or a longer set passed this way, or it was visited after the move


def below(node: dict[str, Any], path: tuple[int, ...]) -> list[tuple[dict[str, Any], tuple[int, ...]]]:
    pairs = [(node, path)]
    for child in node["children"]:
        pairs += below(child, (*path, *child["tokens"]))
    return pairs


def test_text_embedders_cost_no_tokens() -> None:
    """With texts judged by a function, only what is sampled from has to run: no row ends an answer or a rollout."""
    rain = RAIN(evaluator=lambda pairs: [0.5] * len(pairs), embedder=TEXTS)
    _, rows, plain = run(rain, HashLM(47), max_new_tokens=16)
    assert set(rows) == plain.needed
    assert len(rows) == len(set(rows))


def test_a_second_request_finds_the_first_ones_rows() -> None:
    """What is cached lowers the rows run for a request, never the count of prefixes it needs."""
    decoder, recorder = fake_decoder(HashLM(48))
    rain = RAIN(evaluator=TEMPLATE, max_iterations=10, min_new_iterations=3, width=1)
    (first,) = decoder.generate(PROMPT, search=rain, max_new_tokens=12)
    (again,) = decoder.generate(PROMPT, search=rain, max_new_tokens=12)
    assert again.stats.tokens_processed == first.stats.tokens_processed
    assert again.stats.tokens_charged < 0.1 * first.stats.tokens_charged
    assert again.text == first.text
    assert len(recorder.rows) == first.stats.tokens_charged + again.stats.tokens_charged


def test_rollout_and_candidate_sets_advance_together() -> None:
    """A full expansion takes about as many forwards as its longest chain has tokens, and one for the verdict."""
    rain = RAIN(evaluator=TEMPLATE, max_iterations=1, min_new_iterations=1, set_lengths=(1, 10), first_top_k=1)
    decoder, recorder = fake_decoder(HashLM(49, eos=-9.0))
    (done,) = decoder.generate(PROMPT, search=replace(rain, rollout_stop="?"), max_new_tokens=11)
    # The root: one forward for the prompt and its rollout of at most 11 tokens, then the verdict; the child likewise.
    assert done.stats.iterations == 2
    assert recorder.forwards <= 2 * (11 + 2)
    assert done.stats.model_steps == recorder.forwards
