"""RAIN over a mixture of models: the search of the plain implementation on mixed logits, judged and embedded by one model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from aligned_models import aligned_model, dera, mixed_logits, pair, reference_model
from fake_lm import TEMPLATE
from models import stock_copy
from plain_rain import Path, PlainRain, Row
from test_dera import rows_run
from test_rain import assert_agree
from transformers import PreTrainedModel

from raindecode.search.embedder import HiddenStates
from raindecode.search.rain import RAIN

PROMPT = "the inner thing"
QUICK = RAIN(
    evaluator=TEMPLATE, max_iterations=8, min_new_iterations=4, num_samples=3, max_tries=3, first_top_k=4, record_tree=True
)  # fmt: skip


class OneModel:
    """A model by itself, without a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.models, self.weights = [model], []  # type: list[PreTrainedModel], list[float]

    def logits(self, path: Path) -> Row:
        row: Row = mixed_logits(self.models, self.weights, path).astype(np.float32)
        return row

    def hidden(self, path: Path) -> Row:
        with torch.inference_mode():
            out = self.models[0](input_ids=torch.tensor([list(path)]), use_cache=False, output_hidden_states=True)
        row: Row = out.hidden_states[-1][0, -1].float().numpy()
        return row


class Mixture(OneModel):
    """Logits of several; states of the first."""

    def __init__(self, models: list[PreTrainedModel], weights: list[float]) -> None:
        self.models, self.weights = models, weights


class JudgedByTheFirst(PlainRain):
    """The plain procedure, its verdicts those of the first model alone."""

    def ask(self, text: str) -> float:
        mixture = self.model
        self.model = OneModel(mixture.models[0])  # type: ignore[attr-defined]
        try:
            return super().ask(text)
        finally:
            self.model = mixture


@pytest.fixture(scope="module")
def models() -> list[PreTrainedModel]:
    reference = stock_copy(reference_model())
    return [reference, aligned_model(reference)]


@pytest.mark.parametrize(("weight", "seed"), [(0.5, 0), (0.5, 1), (1.6, 2)])
def test_the_search_is_that_on_mixed_logits(models: list[PreTrainedModel], weight: float, seed: int) -> None:
    decoder = pair(*models)
    rain = replace(QUICK, embedder=HiddenStates())
    options: dict[str, Any] = {"max_new_tokens": 8, "seed": seed, "policy": dera(weight)}
    (request,) = decoder.requests(PROMPT, search=rain, **options)
    plain = JudgedByTheFirst(rain, Mixture(models, [weight]), decoder.codec, request).run()
    (done,) = decoder.generate(PROMPT, search=rain, **options)
    assert_agree(plain, done)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_one_model_judges(models: list[PreTrainedModel], weight: float) -> None:
    """The reference where it takes part: its rows are more by those of the evaluation prompts."""
    decoder = pair(*models)
    counts = rows_run(decoder)
    (done,) = decoder.generate(PROMPT, search=QUICK, policy=dera(weight), max_new_tokens=4)
    assert done.stats.evaluations > 2
    judge = 0 if weight < 1 else 1
    assert counts[judge] > counts[1 - judge] + 20 * done.stats.evaluations


def test_the_aligned_model_may_be_of_another_size(models: list[PreTrainedModel]) -> None:
    """States and positions are those of the model that judges and embeds."""
    narrow = stock_copy(reference_model(hidden_size=32, intermediate_size=48))
    decoder = pair(models[0], narrow)
    for weight in (0.0, 0.5, 1.0):
        (done,) = decoder.generate(PROMPT, search=QUICK, policy=dera(weight), max_new_tokens=4)
        assert done.stats.iterations
    alone = pair(narrow).generate(PROMPT, search=QUICK, max_new_tokens=4)[0]
    assert (done.token_ids, done.tree) == (alone.token_ids, alone.tree)


def test_a_judge_with_a_short_context_ends_its_own_request_only(models: list[PreTrainedModel]) -> None:
    short = stock_copy(reference_model("gpt2", n_positions=48))
    decoder = pair(models[0], short)
    done = decoder.generate(
        [PROMPT] * 2, search=replace(QUICK, evaluator=replace(TEMPLATE, header="Q. " * 40)), policy=[dera(0.0), dera(1.0)],
        max_new_tokens=4, errors="return",
    )  # fmt: skip
    assert done[0].stats.iterations
    assert "context of the model 48" in str(done[1])
