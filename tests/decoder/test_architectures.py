"""Families of transformers models: what is served computes what the stock model does; what is not is refused by name."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import (
    CONTEXT,
    SERVED,
    WINDOW,
    byte_tokenizer,
    random_tokens,
    run_alone,
    stock_copy,
    stock_row,
    tiny_decoder,
    tiny_model,
)

from raindecode.decoder import Decoder
from raindecode.engine.branch import Ledger
from raindecode.engine.loader import build_engine, load_pretrained
from raindecode.engine.logit_rows import HostRow
from raindecode.engine.types import Want
from raindecode.errors import ModelError, UnsupportedModelError

TOLERANCE = 1e-4
CHUNK = 256  # keys per chunk of the attention kernel (csrc/include/rainkernels/attention.h)


@pytest.mark.parametrize("family", SERVED)
def test_logits_equal_plain_transformers(family: str) -> None:
    """Prefill, decode and branches in one forward, on paths longer than the window and than a chunk of attention."""
    model = tiny_model(family)
    stock = stock_copy(model)
    engine, _ = build_engine(model, kv_tokens=1500)
    long, short = random_tokens(CHUNK + 40, 1), random_tokens(3, 2)
    first = [long[:-1], long[: CHUNK - 2]]
    second = [
        long,  # decode
        long[:-1] + random_tokens(1, 3),  # decode, another branch of the same node
        long[: CHUNK - 2] + random_tokens(6, 4),  # across the border of a chunk
        long[: CHUNK + 1] + random_tokens(2, 5),  # fork inside a node
        long[: WINDOW - 1] + random_tokens(30, 6),
        short,  # prefill
        short + random_tokens(2 * WINDOW, 7),  # goes on from the one before, in the same forward
        random_tokens(70, 8),
    ]

    def search(ledger: Ledger) -> Generator[Any, Any, list[HostRow]]:
        rows = []
        for paths in (first, second):
            answers = yield [Want(engine.open(ledger, path), logits=True) for path in paths]
            rows += [answer.logits for answer in answers]
        return rows

    steps = engine.model_steps
    rows = run_alone(engine, search)
    assert engine.model_steps == steps + 2
    for path, ours in zip(first + second, rows, strict=True):
        assert np.abs(ours - stock_row(stock, path)).max() <= TOLERANCE


def test_sinks_and_windows_matter_in_the_models_tested() -> None:
    path = random_tokens(4 * WINDOW, 1)
    sinks = tiny_model("gpt_oss")
    row = stock_row(sinks, path)
    for name, parameter in sinks.named_parameters():
        if name.endswith("sinks"):
            parameter.data.fill_(-30.0)
    assert np.abs(row - stock_row(sinks, path)).max() > 0.1
    for family in ("mistral", "gemma2"):
        narrow, wide = tiny_model(family), tiny_model(family, sliding_window=CONTEXT)
        assert np.abs(stock_row(narrow, path) - stock_row(wide, path)).max() > 0.1


def test_bfloat16_is_served_within_its_own_error() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    stock, full = stock_copy(model), stock_copy(model).float()
    engine, mode = build_engine(model, kv_tokens=200)
    assert mode == "off"
    path = random_tokens(60, 1)

    def search(ledger: Ledger) -> Generator[Any, Any, HostRow]:
        (answer,) = yield [Want(engine.open(ledger, path), logits=True)]
        return answer.logits

    ours, theirs, exact = run_alone(engine, search), stock_row(stock, path), stock_row(full, path)
    assert np.abs(ours - exact).max() <= 2 * np.abs(theirs - exact).max() + 0.02


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("bert", "both directions"),
        ("mamba", "their state runs along the sequence"),
        ("qwen3_next", "linear_attention"),
        ("bloom", "attention interface"),
        ("falcon", "attention interface"),
        ("gptj", "attention interface"),
        ("llama4_text", "chunk"),
        ("phimoe", "sliding window"),
        ("qwen2_moe", "sliding window"),
        ("doge", "mask of its own"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(family: str, reason: str) -> None:
    model = tiny_model(family)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        build_engine(model, kv_tokens=100)
    assert type(model).__name__ in str(caught.value)
    assert family in str(caught.value)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel.*language-model head"):
        build_engine(tiny_model("llama").base_model, kv_tokens=100)


def test_a_model_that_computes_something_else_over_a_tree_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    rotary = model.model.rotary_emb
    plain = rotary.forward
    # Positions by row, as a model with state of its own would have them.
    monkeypatch.setattr(rotary, "forward", lambda x, position_ids: plain(x, torch.arange(x.shape[1])[None]))
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*differ from the stock model"):
        build_engine(model, kv_tokens=100)


def test_one_model_may_stand_behind_two_decoders() -> None:
    model, tokenizer = tiny_model("llama", vocab_size=len(byte_tokenizer())), byte_tokenizer()
    first = Decoder(model, tokenizer, kv_tokens=200)
    second = Decoder(model, tokenizer, kv_tokens=300)
    texts = [d.generate("the inner", max_new_tokens=8)[0].token_ids for d in (first, second, first)]
    assert texts[0] == texts[1] == texts[2]


# ---- loading ----------------------------------------------------------------------------------------------------------
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def test_a_saved_model_loads_and_answers_the_same(tmp_path: Path) -> None:
    decoder = tiny_decoder()
    before = decoder.generate("the inner", max_new_tokens=8, seed=3)[0]
    tiny_model("llama", vocab_size=decoder.engine.runner.model.config.vocab_size).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    after = Decoder.from_pretrained(str(tmp_path), device="cpu", kv_tokens=300).generate(
        "the inner", max_new_tokens=8, seed=3
    )[0]
    assert after.token_ids == before.token_ids
    assert after.text == before.text


def test_nothing_at_the_path() -> None:
    with pytest.raises(ModelError, match=r"no/such/model.*give 'testbed'"):
        load_pretrained("./no/such/model", **CPU)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no config"):
        load_pretrained(str(tmp_path), **CPU)


def test_a_saved_encoder_decoder_is_refused(tmp_path: Path) -> None:
    tiny_model("t5").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'t5'"):
        load_pretrained(str(tmp_path), **CPU)


def test_weights_without_a_tokenizer(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        load_pretrained(str(tmp_path), **CPU)


def test_a_damaged_weights_file(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ModelError, match="weights"):
        load_pretrained(str(tmp_path), **CPU)
