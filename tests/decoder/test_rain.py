"""RainSearch against an independent sequential implementation, and against golden trees.

`python tests/decoder/test_rain.py` (both packages importable) writes the golden trees anew; look at the diff before you keep it.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_lm import (
    EOS,
    TEMPLATE,
    HashLM,
    PieceTokenizer,
    fake_decoder,
    hashed_scores,
    hashed_vectors,
    random_llama,
    random_rain,
)
from plain_rain import PlainRain
from transformers import LlamaForCausalLM

from raindecode.decoder import Decoder
from raindecode.search.embedder import TextEmbedder
from raindecode.search.rain import RAIN
from raindecode.types import Completion

GOLDEN = Path(__file__).parent.parent / "golden"
PROMPT = "H:abc, de\nA:"
QUICK = RAIN(evaluator=TEMPLATE, max_iterations=12, min_new_iterations=4, min_visits=2, record_tree=True)
ALIKE = TextEmbedder(partial(hashed_vectors, spread=0.02), 8)
BAD = partial(hashed_scores, "bad", 0)


def run_both(rain: RAIN, lm: HashLM, prompt: str = PROMPT, **options: Any) -> tuple[PlainRain, Completion]:
    """One request through RainSearch and through the plain implementation; everything they report must agree."""
    decoder, _ = fake_decoder(lm)
    rain = replace(rain, record_tree=True)
    (request,) = decoder.requests(prompt, search=rain, **options)
    plain = PlainRain(rain, lm, decoder.codec, request).run()
    (done,) = decoder.generate(prompt, search=rain, **options)
    assert_agree(plain, done)
    return plain, done


def assert_agree(plain: PlainRain, done: Completion) -> None:
    assert done.token_ids == list(plain.done)
    assert done.finish_reason == plain.reason
    assert done.text == plain.cut(plain.text(plain.done))
    assert done.value == pytest.approx(plain.value, abs=1e-6)
    assert (done.stats.iterations, done.stats.evaluations) == (plain.iterations, plain.evaluations)
    assert done.tree is not None
    assert [len(tree["committed"]) for tree in done.tree] == [len(tree["committed"]) for tree in plain.trees]
    for ours, theirs in zip(done.tree, plain.trees, strict=True):
        assert_same_tree(ours["root"], theirs["root"])


def assert_same_tree(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["tokens"] == theirs["tokens"]
    assert ours["direct_visits"] == theirs["direct_visits"]
    for name in ("prior", "visits", "value"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-5), (name, ours["tokens"])
    assert len(ours["children"]) == len(theirs["children"])
    for child, other in zip(ours["children"], theirs["children"], strict=True):
        assert_same_tree(child, other)


@pytest.mark.parametrize("seed", range(1000, 1024))
def test_same_search_as_the_plain_implementation(seed: int) -> None:
    rain, lm, options = random_rain(seed)
    run_both(rain, lm, **options)


# ---- single features, each with proof that it came up ------------------------------------------------------------------
def test_single_tokens_are_added_where_all_children_look_alike_and_bad() -> None:
    rain = RAIN(evaluator=BAD, embedder=ALIKE, first_top_k=3, max_iterations=30, set_lengths=(1, 2))
    plain, done = run_both(rain, HashLM(1), max_new_tokens=3)
    assert done.tree is not None
    assert plain.added > 0
    assert len(done.tree[0]["root"]["children"]) > 3


def test_sets_are_added_below_a_new_root() -> None:
    rain = RAIN(evaluator=BAD, embedder=ALIKE, first_top_k=2, num_samples=2, max_tries=2, max_iterations=40)
    plain, done = run_both(rain, HashLM(2), max_new_tokens=12)
    assert done.tree is not None
    assert plain.added > 0
    assert any(len(tree["root"]["children"]) > 3 for tree in done.tree[1:])


def test_the_number_of_children_is_capped() -> None:
    rain = RAIN(evaluator=BAD, embedder=ALIKE, first_top_k=3, num_samples=2, max_children=4, max_iterations=60)
    _, done = run_both(rain, HashLM(1), max_new_tokens=3)
    assert done.tree is not None
    assert len(done.tree[0]["root"]["children"]) == 4


@pytest.mark.parametrize(
    "changes", [{"dynamic_children": False}, {"embedder": None}], ids=["switched-off", "without-embedder"]
)
def test_no_child_is_added_without_the_dynamic_rule(changes: dict[str, Any]) -> None:
    rain = RAIN(evaluator=BAD, embedder=ALIKE, first_top_k=3, max_iterations=30)
    plain, _ = run_both(replace(rain, **changes), HashLM(1), max_new_tokens=3)
    assert plain.added == 0


def test_siblings_get_credit_by_similarity() -> None:
    plain, done = run_both(RAIN(evaluator=BAD, embedder=ALIKE), HashLM(3), max_new_tokens=8)
    assert done.tree is not None
    root = done.tree[0]["root"]
    assert plain.credited > 0
    assert any(child["visits"] > child["direct_visits"] for child in root["children"])
    assert root["visits"] == root["direct_visits"]


def test_expansion_temperature_and_more_tries() -> None:
    # A sharp model repeats itself: nine tries find few distinct sets, nineteen at temperature 2 find nine.
    lm = HashLM(4, sharpness=4.0)
    rain = replace(QUICK, dynamic_children=False)
    _, few = run_both(rain, lm, max_new_tokens=8)
    _, many = run_both(replace(rain, max_tries=19, expansion_temperature=2.0), lm, max_new_tokens=8)
    found = [[len(tree["root"]["children"]) for tree in (done.tree or [])[1:]] for done in (few, many)]
    assert min(found[0]) < 10
    assert max(found[0]) <= 10
    assert max(found[1]) == 10


def test_first_tokens_have_the_expansion_temperature() -> None:
    lm = HashLM(4)
    _, cold = run_both(replace(QUICK, root_prior_mix=0.0), lm, max_new_tokens=2)
    _, warm = run_both(replace(QUICK, root_prior_mix=0.0, expansion_temperature=2.0), lm, max_new_tokens=2)
    priors = [
        {tuple(c["tokens"]): c["prior"] for c in (done.tree or [])[0]["root"]["children"][:10]} for done in (cold, warm)
    ]
    assert priors[0].keys() == priors[1].keys()
    roots = {tokens: p**0.5 for tokens, p in priors[0].items()}
    for tokens, p in priors[1].items():
        assert p == pytest.approx(roots[tokens] / sum(roots.values()))


def test_rollouts_to_the_end_of_the_answer() -> None:
    rain = replace(QUICK, rollout_stop="", keep_after_last=".", min_visits=5)
    plain, done = run_both(rain, HashLM(5, eos=1.0), max_new_tokens=20)
    assert "." not in done.text or done.text.endswith(".")
    assert all(text.endswith(".") or "." not in text for text in plain.scores)


def test_one_order_gives_no_zero() -> None:
    plain, _ = run_both(replace(QUICK, evaluator=replace(TEMPLATE, good_second=None)), HashLM(6), max_new_tokens=10)
    assert set(plain.scores.values()) == {-1.0, 1.0}


def test_two_orders_give_zero_where_they_disagree() -> None:
    plain, _ = run_both(QUICK, HashLM(6), max_new_tokens=10)
    assert set(plain.scores.values()) == {-1.0, 0.0, 1.0}


def test_end_of_text_ends_the_answer_and_cuts_sets() -> None:
    plain, done = run_both(RAIN(evaluator=TEMPLATE, max_iterations=20), HashLM(8, eos=1.5), max_new_tokens=40)
    assert done.finish_reason == "eos"
    assert done.token_ids.index(EOS) == len(done.token_ids) - 1
    assert "</s>" not in done.text
    sets = [child["tokens"] for tree in plain.trees for child in tree["root"]["children"]]
    assert all(EOS not in tokens[:-1] for tokens in sets)
    lengths = {len(tokens) for tokens in sets if tokens[-1] != EOS}
    assert {len(tokens) for tokens in sets if tokens[-1] == EOS} - lengths or len(lengths) == 1


def test_finished_leaves_are_judged_once_and_backed_up_again() -> None:
    rain = RAIN(evaluator=partial(hashed_scores, "good", 0), max_iterations=30, first_top_k=2, min_visits=20)
    plain, done = run_both(rain, HashLM(9, eos=6.0), max_new_tokens=20)
    assert done.finish_reason == "eos"
    assert done.stats.iterations > 2 * done.stats.evaluations
    assert plain.evaluations == len(plain.scores)
    ends = [node for tree in done.tree or () for node in below(tree["root"]) if node["tokens"][-1:] == [EOS]]
    assert max(node["direct_visits"] for node in ends) > 1
    assert not any(node["children"] for node in ends)


def below(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [node, *(inner for child in node["children"] for inner in below(child))]


def test_stop_strings_end_the_answer_across_token_borders() -> None:
    ended = 0
    for seed in range(6):
        _, done = run_both(replace(QUICK, stop=("ab", "c,")), HashLM(seed), max_new_tokens=24, seed=seed)
        assert "ab" not in done.text
        assert "c," not in done.text
        ended += done.finish_reason == "stop"
    assert ended > 0


def test_stop_tokens_are_no_text() -> None:
    decoder, _ = fake_decoder()
    stop = decoder.codec.encode("d")[-1]
    _, done = run_both(QUICK, HashLM(10), max_new_tokens=30, stop_token_ids=[stop])
    assert done.finish_reason == "stop"
    assert done.token_ids[-1] == stop
    assert done.text == decoder.codec.decode(done.token_ids[:-1])


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 9])
def test_the_answer_never_runs_past_max_new_tokens(limit: int) -> None:
    lm = HashLM(11, eos=-9.0)
    decoder, recorder = fake_decoder(lm)
    (done,) = decoder.generate(PROMPT, search=replace(QUICK, evaluator=BAD), max_new_tokens=limit)
    assert (len(done.token_ids), done.finish_reason) == (limit, "length")
    assert max(map(len, recorder.rows)) <= len(decoder.codec.encode(PROMPT)) + limit


def test_a_mean_of_exactly_the_threshold_is_not_above_it() -> None:
    # Nine good verdicts and a bad one: 0.8, which in single precision is above 0.8 and would end the search at ten visits.
    def judge(pairs: list[tuple[str, str]]) -> list[float]:
        calls.extend(pairs)
        return [-1.0 if len(calls) == 3 else 1.0 for _ in pairs]

    calls: list[tuple[str, str]] = []
    decoder, _ = fake_decoder(HashLM(12, eos=-9.0, sharpness=0.5))
    rain = RAIN(evaluator=judge, first_top_k=1, max_iterations=30, rollout_stop="", record_tree=True)
    # The judge counts its calls, so no leaf may be judged ahead of its turn.
    (done,) = decoder.generate(PROMPT, search=replace(rain, width=1), max_new_tokens=60)
    assert done.tree is not None
    (only,) = done.tree[0]["root"]["children"]
    assert (only["direct_visits"], only["value"]) == (11, pytest.approx(9 / 11))


def test_children_on_a_rollouts_way_do_not_repeat_it() -> None:
    # Two rollouts that pass the same tokens are two samples; equal ones would back the same verdict up twice.
    lm = HashLM(13, sharpness=0.5, eos=-9.0)
    seen: list[str] = []

    def judge(pairs: list[tuple[str, str]]) -> list[float]:
        seen.extend(text for _, text in pairs)
        return [0.0] * len(pairs)

    decoder, _ = fake_decoder(lm)
    rain = RAIN(
        evaluator=judge, rollout_stop="", first_top_k=20, max_iterations=21, min_new_iterations=1, set_lengths=(1,)
    )
    decoder.generate(PROMPT, search=rain, max_new_tokens=12, seed=5)
    assert len(set(seen)) == len(seen)


# ---- a real model ------------------------------------------------------------------------------------------------------
class StockModel:
    """A transformers model without cache behind the plain implementation."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self._known: dict[tuple[int, ...], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}

    def logits(self, path: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return self._run(path)[0]

    def hidden(self, path: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return self._run(path)[1]

    def _run(self, path: tuple[int, ...]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if path not in self._known:
            with torch.inference_mode():
                out = self.model(input_ids=torch.tensor([path]), use_cache=False, output_hidden_states=True)
            self._known[path] = out.logits[0, -1].numpy(), out.hidden_states[-1][0, -1].numpy()
        return self._known[path]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_same_search_as_stock_transformers(seed: int) -> None:
    llama = random_llama()
    decoder = Decoder(deepcopy(llama), PieceTokenizer(), kv_tokens=4096)  # type: ignore[arg-type]
    rain = replace(QUICK, max_iterations=10, num_samples=4, max_tries=4)
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": seed}
    (request,) = decoder.requests(PROMPT, search=rain, **options)
    plain = PlainRain(rain, StockModel(llama), decoder.codec, request).run()
    (done,) = decoder.generate(PROMPT, search=rain, **options)
    assert_agree(plain, done)
    assert done.stats.tokens_processed == len(plain.needed)


# ---- golden trees ------------------------------------------------------------------------------------------------------
_SMALL: dict[str, Any] = {
    "max_iterations": 9,
    "min_new_iterations": 3,
    "num_samples": 3,
    "first_top_k": 4,
    "record_tree": True,
}
GOLDEN_CASES: dict[str, tuple[RAIN, HashLM]] = {
    "both_orders": (RAIN(evaluator=TEMPLATE, max_tries=3, min_visits=3, **_SMALL), HashLM(30)),
    "more_tries": (
        RAIN(evaluator=TEMPLATE, max_tries=7, dynamic_tries=3, expansion_temperature=2.0, min_visits=2, **_SMALL),
        HashLM(31),
    ),
    "whole_answers": (
        RAIN(
            evaluator=replace(TEMPLATE, good_second=None), max_tries=3, rollout_stop="", keep_after_last=".", **_SMALL
        ),
        HashLM(32, eos=1.0),
    ),
    "added_children": (
        RAIN(evaluator=BAD, embedder=ALIKE, max_tries=3, **{**_SMALL, "max_iterations": 16}),
        HashLM(33),
    ),
}


def golden(name: str) -> dict[str, Any]:
    """A completion as it is stored: numbers rounded, slots and times left out."""
    rain, lm = GOLDEN_CASES[name]
    (done,) = fake_decoder(lm)[0].generate(PROMPT, search=replace(rain, width=1), max_new_tokens=12)
    stats = done.stats
    counted = ("model_steps", "tokens_processed", "tokens_charged", "kv_tokens_peak", "iterations", "evaluations")
    return {
        "text": done.text,
        "token_ids": done.token_ids,
        "finish_reason": done.finish_reason,
        "value": round(done.value or 0.0, 6),
        "stats": {key: getattr(stats, key) for key in counted},
        "trees": [compact(tree["root"]) for tree in done.tree or ()],
    }


def compact(node: dict[str, Any]) -> list[Any]:
    """[tokens, prior, visits, direct visits, value, children]."""
    numbers = [round(node["prior"], 6), round(node["visits"], 5), node["direct_visits"], round(node["value"], 5)]
    return [node["tokens"], *numbers, [compact(child) for child in node["children"]]]


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (key, *flat(item))]
    return [leaf for item in value for leaf in (len(value), *flat(item))] if isinstance(value, list) else [value]


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_trees(name: str) -> None:
    stored = json.loads((GOLDEN / f"rain_{name}.json").read_text(encoding="utf-8"))
    for ours, theirs in zip(flat(golden(name)), flat(stored), strict=True):
        assert ours == (pytest.approx(theirs, abs=2e-5) if isinstance(theirs, float) else theirs)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case in GOLDEN_CASES:
        (GOLDEN / f"rain_{case}.json").write_text(
            json.dumps(golden(case), separators=(",", ":")) + "\n", encoding="utf-8"
        )
