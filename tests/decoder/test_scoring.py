"""Decoder.score and the log-probabilities that answers report: against transformers, whatever the pieces and mixtures."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from raindecode import RAIN, AlignEZ, ConfigError, Decoder, DeRa, Policy, PromptError, Sampling
from raindecode.search import scoring
from raindecode.testbed import ADAPTER, WEIGHTS

TEXT = "How do I paint the fence of the baker? You take a brush and"


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.from_pretrained("testbed", adapter="testbed", kv_tokens=4096)


@pytest.fixture(scope="module")
def logits(decoder: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, vocabulary] of the base model and of the aligned one, by transformers and peft alone."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(str(WEIGHTS))
    ids = torch.tensor([decoder.codec.encode(TEXT)])
    with torch.no_grad():
        base = model(ids).logits[0]
        aligned = peft.PeftModel.from_pretrained(model, str(ADAPTER))(ids).logits[0]
    return base, aligned


def reference(rows: torch.Tensor, ids: list[int]) -> list[float]:
    return rows[:-1].double().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 2.0])
def test_scores_are_those_of_transformers(decoder, logits, weight):
    ids = decoder.codec.encode(TEXT)
    base, aligned = logits
    expected = reference(base + weight * (aligned - base), ids)
    (found,) = decoder.score([ids], policy=Policy(dera=DeRa(weight)))
    assert found.token_ids == ids
    assert found.logprobs[0] is None
    assert [one.token_id for one in found.logprobs[1:]] == ids[1:]
    assert [one.logprob for one in found.logprobs[1:]] == pytest.approx(expected, abs=1e-4)


def test_pieces_and_company_change_nothing(decoder, monkeypatch):
    prompts = [decoder.codec.encode(TEXT), decoder.codec.encode("A fence."), [7], decoder.codec.encode(TEXT + " paint")]
    whole = decoder.score(prompts, top=3)
    monkeypatch.setattr(scoring, "_STEP_BYTES", 4 * 4096)  # a row at a time
    again = decoder.score(prompts, top=3)
    for one, other in zip(whole, again, strict=True):
        assert one.logprobs == other.logprobs
        assert one.top_logprobs == other.top_logprobs
    assert whole[2].logprobs == [None]
    assert whole[2].top_logprobs == [[]]


def test_the_likeliest_come_first_and_include_what_greedy_takes(decoder):
    (scored,) = decoder.score([decoder.codec.encode(TEXT)], top=4)
    for likeliest in scored.top_logprobs[1:]:
        values = [one.logprob for one in likeliest]
        assert values == sorted(values, reverse=True)
        assert len(likeliest) == 4
    (answer,) = decoder.generate(
        [decoder.codec.encode(TEXT)], search=Sampling.greedy(logprobs=True, top_logprobs=4, prompt_logprobs=True),
        max_new_tokens=6,
    )  # fmt: skip
    assert answer.prompt_logprobs.logprobs == scored.logprobs
    assert answer.prompt_logprobs.top_logprobs == scored.top_logprobs
    for chosen, likeliest in zip(answer.logprobs, answer.top_logprobs, strict=True):
        assert likeliest[0].token_id == chosen.token_id
        assert likeliest[0].logprob == pytest.approx(chosen.logprob, abs=1e-6)
    # What was generated, scored as a prompt, says the same.
    (whole,) = decoder.score([answer.prompt_logprobs.token_ids + answer.token_ids])
    assert [one.logprob for one in whole.logprobs[-len(answer.token_ids) :]] == pytest.approx(
        [one.logprob for one in answer.logprobs], abs=1e-4
    )


def test_a_prompt_may_fill_the_context(decoder):
    full = [5] * (decoder.context_length + 1)
    assert len(decoder.score([full])[0].logprobs) == len(full)
    with pytest.raises(PromptError, match=f"at most {len(full)} tokens"):
        decoder.score([[*full, 5]])


def test_what_stands_behind_a_start_is_scored_as_an_answer(decoder):
    """Under an edit of the prompt's last row and the answer's, as `generate` makes it."""
    push = torch.randn(128, generator=torch.Generator().manual_seed(4))
    policy = Policy(edits=AlignEZ.from_directions({0: push}, op="add", alpha=200.0), dera=DeRa(0.5))
    prompt = decoder.codec.encode(TEXT)
    (answer,) = decoder.generate([prompt], policy=policy, search=Sampling(logprobs=True), max_new_tokens=8, seed=2)
    said = [one.logprob for one in answer.logprobs]
    whole = prompt + answer.token_ids
    (one, other) = decoder.score([whole, whole], policy=policy, starts=[len(prompt), len(whole) - 1], top=2)
    assert one.token_ids == other.token_ids == whole
    assert one.logprobs[: len(prompt)] == [None] * len(prompt)
    assert one.top_logprobs[: len(prompt)] == [[]] * len(prompt)
    assert [found.logprob for found in one.logprobs[len(prompt) :]] == pytest.approx(said, abs=1e-4)
    assert [len(found) for found in one.top_logprobs[len(prompt) :]] == [2] * len(said)
    assert sum(found is not None for found in other.logprobs) == 1
    (as_prompt,) = decoder.score([whole], policy=policy)  # the edit of the last row alone
    plain = [found.logprob for found in as_prompt.logprobs[len(prompt) :]]
    assert max(abs(a - b) for a, b in zip(plain, said, strict=True)) > 0.1


@pytest.mark.parametrize("starts", [[0], [3], [1, 1], 1, [True], [1.5]])
def test_starts_leave_a_token_on_either_side(decoder, starts):
    with pytest.raises(ConfigError, match="starts"):
        decoder.score([[5, 6, 7]], starts=starts)


def test_what_has_no_distribution_is_refused(decoder):
    with pytest.raises(ConfigError, match="plausibility"):
        decoder.score([TEXT], policy=Policy(dera=DeRa(0.5, plausibility=0.1)))
    with pytest.raises(ConfigError, match="top"):
        decoder.score([TEXT], top=-1)


@pytest.mark.parametrize("search", [Sampling(), RAIN.preset("town", max_iterations=3, min_new_iterations=2)])
def test_tokens_are_reported_as_they_are_committed(decoder, search):
    told: list[int] = []
    (request,) = decoder.requests(["How do I paint the fence?"], search=search, max_new_tokens=6, seed=3)
    task = decoder.task(request, search, on_token=lambda token, _: told.append(token.token_id))
    (done,) = decoder.engine.run([task])
    assert done.error is None
    assert told == done.result.token_ids


def test_likeliest_of_a_row_are_log_probabilities():
    row = torch.tensor([0.5, -math.inf, 3.0, 3.0, -1.0])
    found = scoring.likeliest(row.numpy(), 3)
    assert [one.token_id for one in found] == [2, 3, 0]
    assert [one.logprob for one in found] == pytest.approx(row.log_softmax(0)[[2, 3, 0]].tolist())


def test_a_request_maker_of_another_thread_makes_equal_requests(decoder):
    given = {"search": None, "policy": None, "max_new_tokens": 4, "seed": 1, "stop": (), "stop_token_ids": ()}
    one = decoder.request_maker().make([TEXT, [1, 2, 3]], **given)
    assert one == decoder.requests([TEXT, [1, 2, 3]], max_new_tokens=4, seed=1)


def test_rows_that_are_no_distribution_read_as_nan():
    nan, inf = math.nan, math.inf
    rows = torch.tensor([[0.0, 1.0], [0.0, nan], [0.0, inf], [-inf, -inf], [-inf, 2.0]])
    found, likeliest = scoring._read(rows, [0, 0, 0, 0, 1], 1)
    assert [math.isnan(one) for one in found] == [False, True, True, True, False]
    assert found[4] == 0.0
    assert [one[0].token_id for one in likeliest][::4] == [1, 1]
