"""Edits on the halves of a mixture: which model's rows they reach, and that K/V of edited and unedited rows stay apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aligned_models import aligned_model, merged, pair, reference_model, write_adapter
from edit_oracle import edited_logits
from test_edits_engine import EVERYWHERE, PROMPTS, answers, edit_of, told
from torch import Tensor
from transformers import PreTrainedModel

from raindecode import Decoder, DeRa, Policy
from raindecode.errors import ConfigError
from raindecode.policy.alignez.edits import AlignEZ

WEIGHT = 0.7


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return reference_model()


@pytest.fixture(scope="module", params=["adapter", "whole"])
def both(
    request: pytest.FixtureRequest, reference: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Decoder, PreTrainedModel, PreTrainedModel]:
    """A decoder of two models, and both as plain transformers has them."""
    if request.param == "adapter":
        folder = write_adapter(tmp_path_factory.mktemp("edits") / "lora", reference)
        return pair(reference, adapters=[folder]), reference_model(), merged(reference_model(), folder)
    other = aligned_model(reference)
    return pair(reference, other), reference_model(), aligned_model(reference_model())


def mixed(models: Any, ids: list[int], edit: AlignEZ, on: str) -> Tensor:
    """Log-probabilities of the mixture after every token, float64."""
    halves = {"reference": (True, False), "aligned": (False, True), "both": (True, True)}[on]
    rows = [
        edited_logits(model, ids, edit.resolve() if edited else [], range(len(ids)))
        for model, edited in zip(models, halves, strict=True)
    ]
    return torch.log_softmax((1 - WEIGHT) * rows[0] + WEIGHT * rows[1], -1)


@pytest.mark.parametrize("on", ["reference", "aligned", "both"])
def test_edits_reach_the_half_they_are_for(both: Any, on: Any) -> None:
    decoder, *models = both
    plain = edit_of(decoder)
    edit = AlignEZ(stages=plain.stages, positions=EVERYWHERE, on=on, force=True)
    width = decoder.identities[0].hidden_size
    assert width == 64
    ours = answers(decoder, Policy(dera=DeRa(WEIGHT), edits=edit))
    for prompt, done in zip(PROMPTS, ours, strict=True):
        ids = decoder.codec.encode(prompt)
        expected = mixed(models, ids + done.token_ids, edit, on)[len(ids) - 1 : -1]
        assert done.logprobs is not None
        got = [p.logprob for p in done.logprobs]
        likeliest = expected.max(-1).values.numpy()
        np.testing.assert_allclose(got, likeliest, rtol=1e-4, atol=1e-4)


def test_halves_never_share_what_they_computed(both: Any) -> None:
    """One after the other over the same tree, and each over an empty one: the same bits."""
    decoder = both[0]
    plain = edit_of(decoder)
    policies = [
        Policy(dera=DeRa(WEIGHT), edits=[AlignEZ(stages=plain.stages, positions=EVERYWHERE, on=on)])  # type: ignore[arg-type]
        for on in ("reference", "aligned", "both")
    ] + [Policy(dera=DeRa(WEIGHT)), Policy(edits=plain), Policy(dera=DeRa(1.0), edits=plain)]
    shared = [told(answers(decoder, policy)) for policy in policies]
    fresh = []
    for policy in policies:
        decoder.engine.tree.clear()
        fresh.append(told(answers(decoder, policy)))
    assert shared == fresh
    assert len({str(one) for one in shared}) == len(policies)
    together = answers(decoder, policies, [PROMPTS[0]] * len(policies))
    assert [told([one])[0] for one in together] == [one[0] for one in fresh]


def test_the_aligned_half_of_one_model_is_refused(reference: PreTrainedModel) -> None:
    alone = pair(reference_model())
    edit = AlignEZ(stages=edit_of(alone).stages, on="both")
    assert answers(alone, Policy(edits=edit))  # both halves of one model are that model
    with pytest.raises(ConfigError, match="reference only"):
        answers(alone, Policy(edits=AlignEZ(stages=edit.stages, on="aligned")))


def test_an_edit_of_a_model_that_takes_no_part_is_refused(both: Any) -> None:
    decoder = both[0]
    edit = AlignEZ(stages=edit_of(decoder).stages, on="aligned", force=True)
    with pytest.raises(ConfigError, match="takes no part without DeRa"):
        answers(decoder, Policy(edits=edit))
    assert answers(decoder, Policy(dera=DeRa(0.0), edits=edit))  # a weight of 0 is a choice


def test_an_edit_of_the_aligned_model_by_the_prompt(tmp_path: Path) -> None:
    """What is chosen by the prompt is chosen by the state of the model that is edited."""
    reference = reference_model()
    decoder = pair(reference, adapters=[write_adapter(tmp_path / "lora", reference)])
    stages = edit_of(decoder, ["mlp_out"], k=6).stages
    edit = AlignEZ(stages=stages, select="cosine", positions=EVERYWHERE, on="aligned")
    states = decoder.activations([(PROMPTS[0], "")], layers=[0, 1], tap="mlp_out", model=1)[:, 0]
    chosen = edit.resolve({site: states[site.layer] for site, _ in stages})
    static = AlignEZ(stages=tuple(chosen), positions=EVERYWHERE, on="aligned")
    ours, theirs = answers(decoder, [Policy(dera=DeRa(WEIGHT), edits=e) for e in (edit, static)], [PROMPTS[0]] * 2)
    assert ours.logprobs == theirs.logprobs


def test_a_sweep_edits_under_every_weight(both: Any) -> None:
    decoder = both[0]
    edit = edit_of(decoder)
    points = decoder.sweep(PROMPTS[:2], [0.0, WEIGHT], policy=Policy(edits=edit), max_new_tokens=5, seed=4).points
    for point, weight in zip(points, (0.0, WEIGHT), strict=True):
        policy = Policy(dera=DeRa(weight, stats=True), edits=edit)
        alone = decoder.generate(PROMPTS[:2], policy=policy, max_new_tokens=5, seed=[4, 5])
        assert [a.token_ids for a in point.answers] == [a.token_ids for a in alone]
        plain = decoder.generate(PROMPTS[:2], policy=Policy(dera=DeRa(weight)), max_new_tokens=5, seed=[4, 5])
        assert [a.token_ids for a in alone] != [a.token_ids for a in plain]
