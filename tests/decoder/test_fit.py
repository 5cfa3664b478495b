"""Fits of every preset on a small model, against the formulas over the activations they were made from."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from models import tiny_decoder
from torch import Tensor

from raindecode import Decoder, Policy
from raindecode.errors import ConfigError
from raindecode.hidden_edits import Site
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.alignez.pairs import Pair
from raindecode.policy.prompt import ChatFormat

WORDS = ["the inner", "on a", "a", "in the", "on it", "here", "no"]
PAIRS = [
    Pair(
        f"{word} one", f" yes {word}", f" no {word} at all", chosen_prompt=f"{word} be good", rejected_prompt=f"{word} be bad"
    )
    for word in WORDS
]  # fmt: skip


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny_decoder("llama")


def sides(decoder: Decoder, *, elicited: bool) -> tuple[Tensor, Tensor]:
    """[layers, pairs, hidden_size] float64 of the helpful and of the harmful side."""
    plain = Policy(prompt=ChatFormat("{prompt}"))
    if elicited:
        passages = [[(p.chosen_prompt or "", "") for p in PAIRS], [(p.rejected_prompt or "", "") for p in PAIRS]]
    else:
        passages = [[(p.prompt, p.chosen) for p in PAIRS], [(p.prompt, p.rejected) for p in PAIRS]]
    policy = plain if elicited else None
    good, bad = (decoder.activations(side, tap="mlp_out", pool="last", policy=policy).double() for side in passages)
    return good, bad


def first_vector(rows: Tensor) -> Tensor:
    return torch.linalg.svd(rows, full_matrices=False).Vh[0]


def assert_parallel(got: Tensor, expected: Tensor) -> None:
    assert abs(float(got.double() @ expected)) == pytest.approx(float(expected.norm()), rel=1e-5)


@pytest.mark.parametrize("context", ["elicited", "question"])
def test_svd_rejects_the_harmful_side_and_then_boosts_the_helpful_one(decoder: Decoder, context: Any) -> None:
    pool = "prompt" if context == "elicited" else "last"
    edit = AlignEZ.fit(decoder, PAIRS, "svd", layers=(0, 1), context=context, pool=pool, alpha=0.5)
    helpful, harmful = sides(decoder, elicited=context == "elicited")
    assert [(site, stage.ops, stage.alphas) for site, stage in edit.stages] == [
        (Site(layer, "mlp_out"), (op,), (0.5,)) for layer in (0, 1) for op in ("project", "boost")
    ]
    for site, stage in edit.stages:
        rows = harmful if stage.ops == ("project",) else helpful
        assert_parallel(stage.directions[0], first_vector(rows[site.layer]))
    assert edit.model == decoder.identities[0]
    assert json.loads(edit.origin["settings"])["layers"] == [0, 1]


def test_svd_diff_bends_every_direction_of_the_differences(decoder: Decoder) -> None:
    edit = AlignEZ.fit(decoder, PAIRS, "svd-diff", context="question", pool="last")
    helpful, harmful = sides(decoder, elicited=False)
    assert edit.select == "cosine"
    assert [site.layer for site, _ in edit.stages] == [0, 1]
    for site, stage in edit.stages:
        difference = helpful[site.layer] - harmful[site.layer]
        values, vectors = torch.linalg.svd(difference, full_matrices=False)[1:]
        vectors = vectors[values > 1e-6 * values[0]]
        u = stage.directions.double()
        torch.testing.assert_close(u.T @ u, vectors.T @ vectors, rtol=0, atol=1e-4)
        assert set(stage.ops) == {"tanh"}
        assert bool((u @ difference.mean(0) >= -1e-6).all())


def test_mean_diff_adds_the_mean_difference(decoder: Decoder) -> None:
    edit = AlignEZ.fit(
        decoder, PAIRS, "mean-diff", tap="mlp_out", layers=(1,), context="question", pool="last", alpha=2.0
    )
    helpful, harmful = sides(decoder, elicited=False)
    ((site, stage),) = edit.stages
    added = stage.alphas[0] * stage.directions[0].double()
    torch.testing.assert_close(added, 2.0 * (helpful[1] - harmful[1]).mean(0), rtol=1e-5, atol=1e-6)
    assert (site, stage.ops) == (Site(1, "mlp_out"), ("add",))


def test_svd_knn_keeps_the_states_of_questions_and_answers(decoder: Decoder) -> None:
    edit = AlignEZ.fit(decoder, PAIRS, "svd-knn", layers=(1,), context="question", pool="last", neighbours=3)
    helpful, harmful = sides(decoder, elicited=False)
    queries = decoder.activations([(p.prompt, "") for p in PAIRS], layers=[1], tap="mlp_out", pool="last")[0]
    (examples,) = edit.examples.values()
    for got, expected in zip(examples, (queries, helpful[1], harmful[1]), strict=True):
        torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=0)
    assert (edit.neighbours, [part[:2] for part in edit.recipe]) == (3, [("harmful", "project"), ("helpful", "boost")])


@pytest.mark.parametrize("preset", ["ccs", "logistic", "svd"])
def test_a_share_of_the_layers_is_chosen(decoder: Decoder, preset: str) -> None:
    edit = AlignEZ.fit(decoder, PAIRS, preset, layers=0.5)
    (layer,) = {site.layer for site in edit.sites}
    assert json.loads(edit.origin["settings"])["layers"] == [layer]
    (done,) = decoder.generate(["a"], policy=Policy(edits=edit), max_new_tokens=2)
    assert done.token_ids


@pytest.mark.parametrize("given", [None, "pairs", [("a", "b", "c")] * 3, [{"chosen": "a", "rejected": "b"}]])
def test_a_fit_of_something_else_than_pairs_is_refused(decoder: Decoder, given: Any) -> None:
    with pytest.raises(ConfigError, match="no list of Pair objects"):
        AlignEZ.fit(decoder, given)
