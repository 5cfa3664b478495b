"""DeRaLogitsProcessor in transformers' own loop, and the repository form of the custom_generate functions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedModel,
    TextStreamer,
)

from raindecode import testbed
from raindecode.errors import ConfigError, ModelError, PromptError
from raindecode.integrations.transformers import DeRaLogitsProcessor, dera

PATH = str(testbed.WEIGHTS)
QUESTIONS = ["How do I paint a fence?", "How can I hurt my neighbour Tom?", "Who are you?"]
REPOSITORY = Path(__file__).resolve().parents[2] / "scripts" / "hf_custom_generate"


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """A model some way from `model`."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() == 2:
                parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    reference = AutoModelForCausalLM.from_pretrained(PATH).eval()
    return reference, moved(reference)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(PATH, padding_side="left")


def ask(tokenizer: Any, *questions: str) -> Any:
    return tokenizer([testbed.format_prompt(q) for q in questions], return_tensors="pt", padding=True)


def listed(*args: Any, **options: Any) -> LogitsProcessorList:
    return LogitsProcessorList([DeRaLogitsProcessor(*args, **options)])


GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0, 1.6])
def test_a_padded_batch_is_decoded_as_custom_generate_decodes_it(pair: Any, tokenizer: Any, weight: float) -> None:
    (reference, aligned), inputs = pair, ask(tokenizer, *QUESTIONS)
    assert not bool(inputs["attention_mask"].all())
    expected = aligned.generate(**inputs, custom_generate=dera, reference=reference, dera_lambda=weight, **GREEDY)
    mine = aligned.generate(**inputs, logits_processor=listed(reference, weight), **GREEDY)
    assert mine.tolist() == expected.tolist()
    other_way = reference.generate(**inputs, logits_processor=listed(aligned, weight, role="aligned"), **GREEDY)
    assert other_way.tolist() == expected.tolist()
    if weight == 0.4:
        alone = [reference.generate(**inputs, **GREEDY).tolist(), aligned.generate(**inputs, **GREEDY).tolist()]
        assert expected.tolist() not in alone


def test_every_token_runs_once_and_calls_begin_anew(pair: Any, tokenizer: Any) -> None:
    reference, aligned = pair
    rows: list[int] = []
    hook = reference.register_forward_pre_hook(
        lambda _, args, given: rows.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    processors = listed(reference, 0.4)
    asked = [ask(tokenizer, q) for q in (QUESTIONS[0], QUESTIONS[0], QUESTIONS[1])]
    try:
        answers = []
        for inputs in asked:
            rows.clear()
            answers.append(aligned.generate(**inputs, logits_processor=processors, **GREEDY).tolist())
            width = inputs["input_ids"].shape[1]
            assert rows == [width] + [1] * (len(answers[-1][0]) - width - 1)
    finally:
        hook.remove()
    fresh = [aligned.generate(**inputs, logits_processor=listed(reference, 0.4), **GREEDY).tolist() for inputs in asked]
    assert answers == fresh


def test_a_new_prompt_as_long_as_the_next_step_begins_anew(pair: Any, tokenizer: Any) -> None:
    """Nothing but the ids tells a new call from the next token."""
    reference, aligned = pair
    processors = listed(reference, 0.4)
    ids = ask(tokenizer, QUESTIONS[0])["input_ids"]
    aligned.generate(ids[:, :-1], logits_processor=processors, max_new_tokens=1, do_sample=False)
    changed = ids.clone()
    changed[0, 2] = 300 if ids[0, 2] != 300 else 301
    scores = torch.zeros(1, reference.config.vocab_size)
    mixed = processors(changed, scores)
    assert torch.equal(mixed, listed(reference, 0.4)(changed, scores))
    processors(ids[:, :-1], scores)
    assert not torch.allclose(processors(ids, scores), mixed, atol=1e-3)


def test_the_second_model_may_be_trained_between_calls(pair: Any, tokenizer: Any) -> None:
    """The next prompt may be the last answer, which would look like the next token."""
    reference = copy.deepcopy(pair[0])
    processors = listed(reference, 0.4)
    ids = ask(tokenizer, QUESTIONS[0])["input_ids"]
    scores = torch.zeros(1, reference.config.vocab_size)
    old = processors(ids[:, :-1], scores)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter *= 1.1
    new = processors(ids, scores)
    assert torch.equal(new, listed(reference, 0.4)(ids, scores))
    assert not torch.allclose(processors(ids[:, :-1], scores), old, atol=1e-3)


def test_sampling_runs_its_warpers_behind_the_mixture(pair: Any, tokenizer: Any) -> None:
    (reference, aligned), inputs = pair, ask(tokenizer, QUESTIONS[1])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "top_k": 1}
    sampled = aligned.generate(**inputs, logits_processor=listed(reference, 0.4), **options)
    greedy = aligned.generate(**inputs, logits_processor=listed(reference, 0.4), max_new_tokens=6, do_sample=False)
    assert sampled.tolist() == greedy.tolist()


def test_ids_that_one_model_does_not_have_are_never_written(pair: Any) -> None:
    reference, _ = pair
    processor = DeRaLogitsProcessor(reference, 0.5)
    size = reference.config.vocab_size
    mixed = processor(torch.tensor([[5, 6]]), torch.full((1, size + 3), 2.0))
    assert torch.isinf(mixed[0, size:]).all()
    assert torch.isfinite(mixed[0, :size]).all()


def test_what_is_refused(pair: Any, tokenizer: Any) -> None:
    reference, aligned = pair
    with pytest.raises(ConfigError, match="num_beams=1"):
        aligned.generate(
            **ask(tokenizer, QUESTIONS[0]), num_beams=2, max_new_tokens=4, do_sample=False,
            logits_processor=listed(reference, 0.5),
        )  # fmt: skip
    with pytest.raises(ModelError, match="PreTrainedModel"):
        DeRaLogitsProcessor("reference", 0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="role"):
        DeRaLogitsProcessor(reference, 0.5, role="judge")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="negative"):
        DeRaLogitsProcessor(reference, -0.5)
    assert DeRaLogitsProcessor(reference, -0.5, allow_negative=True).weight == -0.5
    processor = DeRaLogitsProcessor(reference, 0.5)
    with pytest.raises(PromptError, match="padding"):
        processor(torch.tensor([[0, 0]]), torch.zeros(1, reference.config.vocab_size))


def test_the_repository_form(pair: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (reference, aligned), inputs = pair, ask(tokenizer, QUESTIONS[0])
    expected = aligned.generate(**inputs, custom_generate=dera, reference=reference, dera_lambda=0.5, **GREEDY)
    options: dict[str, Any] = {"custom_generate": str(REPOSITORY), "trust_remote_code": True, **GREEDY}
    got = aligned.generate(
        **inputs, **options, method="dera", reference=reference, dera_lambda=0.5, tokenizer=tokenizer,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )  # fmt: skip
    assert got.tolist() == expected.tolist()
    written = tokenizer.decode(got[0, inputs["input_ids"].shape[1] :])
    assert capsys.readouterr().out.strip() == written.strip()
    with pytest.raises(ConfigError, match="'alignment'"):
        aligned.generate(**inputs, **options, method="alignment")
