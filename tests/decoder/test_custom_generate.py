"""custom_generate functions on architectures of every kind: greedy, they write what transformers writes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from aligned_models import aligned_model, greedy_by_hand
from models import EVERY_BYTE, PAD, SERVED, byte_tokenizer, random_tokens, stock_copy, tiny_model

from raindecode.integrations.transformers import align, dera

TOKENIZER = byte_tokenizer()


@pytest.mark.parametrize("family", SERVED)
def test_greedy_equals_transformers(family: str) -> None:
    model = tiny_model(family, vocab_size=EVERY_BYTE)
    stock = stock_copy(model)
    before = model.config._attn_implementation
    ids = torch.tensor([random_tokens(9, 1), random_tokens(9, 2)])
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = PAD, 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": PAD}
    expected = stock.generate(ids, **options)
    got = model.generate(ids, custom_generate=functools.partial(align, tokenizer=TOKENIZER), **options)
    assert got.tolist() == expected.tolist()
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen3"])
def test_greedy_dera_equals_a_loop_over_two_models(family: str) -> None:
    reference = tiny_model(family, vocab_size=EVERY_BYTE)
    aligned = aligned_model(reference)
    stock = [stock_copy(reference), stock_copy(aligned)]
    prompt = random_tokens(9, 3)
    got = aligned.generate(
        torch.tensor([prompt]), custom_generate=functools.partial(dera, tokenizer=TOKENIZER), reference=reference,
        dera_lambda=0.6, max_new_tokens=10, do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert got[0, len(prompt) :].tolist() == greedy_by_hand(stock, [0.6], prompt, 10)
