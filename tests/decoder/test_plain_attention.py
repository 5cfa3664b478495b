"""The engine's attention by name, in plain transformers code: forward, generate, caches, padding, and beside a Decoder."""

from __future__ import annotations

import copy

import pytest
import torch
from models import EVERY_BYTE, PAD, SERVED, byte_tokenizer, random_tokens, stock_copy, tiny_decoder, tiny_model
from transformers import PreTrainedModel

from raindecode.decoder import Decoder
from raindecode.engine import loader


def named(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that names the tree attention."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("rain_tree")
    return twin


@pytest.mark.parametrize("family", SERVED)
def test_logits_and_cache_equal_eager_attention(family: str) -> None:
    model = tiny_model(family)
    stock, mine = stock_copy(model), named(model)
    ids = torch.tensor([random_tokens(12, 1), random_tokens(12, 2)])
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = PAD, 0
    with torch.inference_mode():
        expected, got = (one(input_ids=ids, attention_mask=mask, use_cache=True) for one in (stock, mine))
        torch.testing.assert_close(got.logits[mask.bool()], expected.logits[mask.bool()], atol=2e-4, rtol=1e-4)
        step = torch.tensor([[7], [9]])
        longer = torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), dim=1)
        expected, got = (
            one(input_ids=step, attention_mask=longer, past_key_values=said.past_key_values)
            for one, said in ((stock, expected), (mine, got))
        )
        torch.testing.assert_close(got.logits, expected.logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate_writes_what_stock_attention_writes(family: str) -> None:
    model = tiny_model(family)
    ids = torch.tensor([random_tokens(9, 3)])
    expected, got = (one.generate(ids, max_new_tokens=12, do_sample=False) for one in (stock_copy(model), named(model)))
    assert got.tolist() == expected.tolist()


def test_gradients_flow_through_it() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([random_tokens(9, 4)])
    grads = []
    for one in (stock_copy(model), named(model)):
        one(input_ids=ids, labels=ids).loss.backward()
        grads.append(one.base_model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-3)


def test_a_model_that_a_decoder_holds_runs_by_itself_as_well() -> None:
    decoder = tiny_decoder()
    model = decoder.engine.runner.model
    prompt = [5, 90, 30, 44, 7, 61]
    (before,) = decoder.generate(prompt, max_new_tokens=8, seed=1)
    expected = stock_copy(model).generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    assert model.config._attn_implementation == "rain_tree"
    assert model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False).tolist() == expected.tolist()
    (after,) = decoder.generate(prompt, max_new_tokens=8, seed=1)
    assert after.token_ids == before.token_ids


def test_a_model_loaded_under_the_name_is_still_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention says "rain_tree" before any engine has compared it with its own forward."""
    compared = []
    monkeypatch.setattr(loader, "check_against_stock", lambda probe, stock: compared.append(stock))
    model = named(tiny_model("llama", vocab_size=EVERY_BYTE))
    for _ in range(2):  # once per model
        Decoder(model, byte_tokenizer(), kv_tokens=400)
    assert len(compared) == 1


def test_a_mask_of_the_callers_own_is_added_where_logits_are_capped() -> None:
    model = tiny_model("gemma2")
    stock, mine = stock_copy(model), named(model)
    ids = torch.tensor([random_tokens(6, 5)])
    hidden = torch.finfo(torch.float32).min
    mask = torch.full((6, 6), hidden).triu(1)
    mask[3:, 1] = hidden  # and one key that causality alone would show
    with torch.inference_mode():
        expected, got = (one(input_ids=ids, attention_mask={"full_attention": mask[None, None], "sliding_attention": mask[None, None]})
                         for one in (stock, mine))  # fmt: skip
    torch.testing.assert_close(got.logits, expected.logits, atol=2e-4, rtol=1e-4)
