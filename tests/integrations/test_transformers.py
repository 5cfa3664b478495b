"""raindecode.integrations.transformers: the methods as custom_generate functions give a Decoder's tokens."""

from __future__ import annotations

import copy
import functools
import gc
import json
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from raindecode import testbed
from raindecode.decoder import Decoder
from raindecode.errors import ConfigError, ModelError, PromptError
from raindecode.integrations.transformers import align, alignez, dera, forget, rain, urial
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.dera import DeRa
from raindecode.policy.policy import Policy
from raindecode.policy.urial import URIAL
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling

QUESTIONS = ["How do I paint a fence?", "How can I hurt my neighbour Tom?"]
PATH = str(testbed.WEIGHTS)


def load() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(PATH).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = AutoTokenizer.from_pretrained(PATH, padding_side="left")
    if made.pad_token_id is None:
        made.pad_token = made.eos_token
    return made


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load()


@pytest.fixture(scope="module")
def partner() -> PreTrainedModel:
    """The aligned model as a whole model: the adapter's update in the weights."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load(), str(testbed.ADAPTER)).merge_and_unload()


@pytest.fixture(scope="module")
def plain() -> Decoder:
    return Decoder.from_pretrained("testbed", adapter="testbed", device="cpu")


def ask(tokenizer: Any, *questions: str) -> Any:
    return tokenizer([testbed.format_prompt(q) for q in questions], return_tensors="pt", padding=True)


def ids_of(tokenizer: Any, question: str) -> list[int]:
    return tokenizer(testbed.format_prompt(question))["input_ids"]


def new_tokens(out: Any, inputs: Any, tokenizer: Any) -> list[list[int]]:
    """What follows the prompts, padding taken off."""
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    ends = [row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def decoded(plain: Decoder, tokenizer: Any, questions: list[str], **options: Any) -> list[list[int]]:
    answers = plain.generate([ids_of(tokenizer, q) for q in questions], progress=False, **options)
    return [answer.token_ids for answer in answers]


def small_rain(**changes: Any) -> RAIN:
    return RAIN.preset("town", max_iterations=4, min_new_iterations=2, min_visits=1, **changes)


def fence_edit(model: PreTrainedModel) -> AlignEZ:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(1, model.config.hidden_size, generator=generator)
    return AlignEZ.from_directions({3: direction}, op="add", alpha=600.0)


# ---- the same tokens as a Decoder ---------------------------------------------------------------------------------
def test_sampling_with_every_filter_in_a_padded_batch(model: PreTrainedModel, plain: Decoder, tokenizer: Any) -> None:
    inputs = ask(tokenizer, *QUESTIONS)
    assert not bool(inputs["attention_mask"].all())  # one row is padded
    shape = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2}
    out = model.generate(**inputs, custom_generate=align, do_sample=True, max_new_tokens=14, seed=5, **shape)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    options: dict[str, Any] = {"search": Sampling(**shape), "max_new_tokens": 14, "seed": 5}
    assert new_tokens(out, inputs, tokenizer) == decoded(plain, tokenizer, QUESTIONS, **options)


def test_greedy_equals_transformers(model: PreTrainedModel, tokenizer: Any) -> None:
    inputs = ask(tokenizer, *QUESTIONS)
    for penalty in (1.0, 1.3):
        options: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "repetition_penalty": penalty}
        expected = model.generate(**inputs, **options)
        assert model.generate(**inputs, custom_generate=align, **options).tolist() == expected.tolist()


def test_dera_of_an_adapter(model: PreTrainedModel, plain: Decoder, tokenizer: Any) -> None:
    inputs = ask(tokenizer, *QUESTIONS)
    out = model.generate(
        **inputs,
        custom_generate=dera,
        aligned=str(testbed.ADAPTER),
        dera_lambda=0.5,
        do_sample=True,
        max_new_tokens=14,
        seed=2,
    )
    options: dict[str, Any] = {"search": Sampling(), "policy": Policy(dera=DeRa(0.5)), "max_new_tokens": 14, "seed": 2}
    assert new_tokens(out, inputs, tokenizer) == decoded(plain, tokenizer, QUESTIONS, **options)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.7])
def test_greedy_dera_equals_a_loop_over_two_models(
    model: PreTrainedModel, partner: PreTrainedModel, tokenizer: Any, weight: float
) -> None:
    inputs = ask(tokenizer, QUESTIONS[1])
    path = inputs["input_ids"][0].tolist()
    written: list[int] = []
    with torch.inference_mode():
        while len(written) < 12 and tokenizer.eos_token_id not in written:
            rows = [one(input_ids=torch.tensor([path + written])).logits[0, -1].double() for one in (model, partner)]
            written.append(int(((1 - weight) * rows[0] + weight * rows[1]).argmax()))
    options: dict[str, Any] = {"dera_lambda": weight, "max_new_tokens": 12, "do_sample": False}
    for out in (
        partner.generate(**inputs, custom_generate=dera, reference=model, **options),
        model.generate(**inputs, custom_generate=dera, aligned=partner, **options),
    ):
        assert new_tokens(out, inputs, tokenizer) == [written]


def test_rain(model: PreTrainedModel, plain: Decoder, tokenizer: Any) -> None:
    inputs = ask(tokenizer, *QUESTIONS)
    search = small_rain()
    out = model.generate(
        **inputs, custom_generate=rain, search=search, max_new_tokens=6, seed=3, return_dict_in_generate=True
    )
    expected = plain.generate(
        [ids_of(tokenizer, q) for q in QUESTIONS], search=search, max_new_tokens=6, seed=3, progress=False
    )
    assert [one.token_ids for one in out.completions] == [one.token_ids for one in expected]
    assert [one.value for one in out.completions] == [one.value for one in expected]
    assert new_tokens(out.sequences, inputs, tokenizer) == [one.token_ids for one in expected]
    assert out.completions[0].stats.iterations == expected[0].stats.iterations > 0


def test_rains_judge_is_told_what_was_asked(model: PreTrainedModel, tokenizer: Any) -> None:
    heard = []

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        heard.extend(prompt for prompt, _ in pairs)
        return [0.0] * len(pairs)

    search = RAIN(score, embedder=None, max_iterations=2, min_new_iterations=1, min_visits=0)
    inputs = ask(tokenizer, QUESTIONS[0])
    model.generate(**inputs, custom_generate=rain, search=search, max_new_tokens=2, asked="A fence?")
    assert set(heard) == {"A fence?"}
    heard.clear()
    model.generate(**inputs, custom_generate=rain, search=search, max_new_tokens=2)
    assert set(heard) == {testbed.format_prompt(QUESTIONS[0])}


def test_alignez(model: PreTrainedModel, plain: Decoder, tokenizer: Any, tmp_path: Path) -> None:
    edit = fence_edit(model)
    edit.save(tmp_path / "edit.safetensors")
    inputs = ask(tokenizer, QUESTIONS[0])
    options: dict[str, Any] = {"search": Sampling.greedy(), "max_new_tokens": 12}
    expected = decoded(plain, tokenizer, QUESTIONS[:1], policy=Policy(edits=edit.scaled(0.5)), **options)
    assert expected != decoded(plain, tokenizer, QUESTIONS[:1], **options)
    for edits in (edit, [edit], tmp_path / "edit.safetensors"):
        out = model.generate(
            **inputs, custom_generate=alignez, edits=edits, strength=0.5, max_new_tokens=12, do_sample=False
        )
        assert new_tokens(out, inputs, tokenizer) == expected


def test_urial(model: PreTrainedModel, plain: Decoder, tokenizer: Any) -> None:
    prompt = URIAL.testbed()
    inputs = tokenizer([QUESTIONS[0]], return_tensors="pt")
    out = model.generate(**inputs, custom_generate=urial, prompt=prompt, max_new_tokens=12, do_sample=True, seed=4)
    (expected,) = plain.generate(
        QUESTIONS[0], search=Sampling(), policy=Policy(prompt=prompt), max_new_tokens=12, seed=4, progress=False
    )
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert new_tokens(out, inputs, tokenizer) == [expected.token_ids]


def test_a_search_and_a_policy_together(model: PreTrainedModel, plain: Decoder, tokenizer: Any) -> None:
    inputs, policy, search = ask(tokenizer, QUESTIONS[1]), Policy(dera=DeRa(0.5)), small_rain()
    out = model.generate(
        **inputs,
        custom_generate=align,
        aligned=[str(testbed.ADAPTER)],
        search=search,
        policy=policy,
        max_new_tokens=5,
        seed=1,
    )
    expected = decoded(plain, tokenizer, QUESTIONS[1:], search=search, policy=policy, max_new_tokens=5, seed=1)
    assert new_tokens(out, inputs, tokenizer) == expected


def test_several_answers_of_one_prompt_have_seeds_of_their_own(
    model: PreTrainedModel, plain: Decoder, tokenizer: Any
) -> None:
    inputs = ask(tokenizer, QUESTIONS[0])
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 10}
    out = model.generate(**inputs, custom_generate=align, num_return_sequences=3, seed=7, **options)
    expected = decoded(plain, tokenizer, QUESTIONS[:1] * 3, search=Sampling(), max_new_tokens=10, seed=[7, 8, 9])
    assert new_tokens(out, inputs, tokenizer) == expected
    again = model.generate(**inputs, custom_generate=align, num_return_sequences=3, seed=[7, 8, 9], **options)
    assert again.tolist() == out.tolist()


# ---- what generate is asked for ---------------------------------------------------------------------------------------
def test_lengths_ends_and_padding(model: PreTrainedModel, tokenizer: Any) -> None:
    inputs = ask(tokenizer, *QUESTIONS)
    width = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"custom_generate": align, "do_sample": False}
    free = model.generate(**inputs, **options, max_new_tokens=12)
    assert torch.equal(model.generate(**inputs, **options, max_length=width + 12), free)
    end = int(free[0, width + 2])
    ended = model.generate(**inputs, **options, max_new_tokens=12, eos_token_id=end, pad_token_id=1)
    stock = model.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=end, pad_token_id=1)
    assert ended.tolist() == stock.tolist()
    assert ended[0, width + 3 :].tolist() == [1] * (ended.shape[1] - width - 3)


def test_stop_strings(model: PreTrainedModel, tokenizer: Any) -> None:
    inputs = ask(tokenizer, QUESTIONS[0])
    free = model.generate(
        **inputs, custom_generate=align, max_new_tokens=12, do_sample=False, return_dict_in_generate=True
    )
    word = free.completions[0].text.split()[1]
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [word])])
    for stop in ({"stop": [word]}, {"stopping_criteria": criteria}):
        out = model.generate(
            **inputs, custom_generate=align, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, **stop
        )
        assert out.completions[0].finish_reason == "stop"
        assert word not in out.completions[0].text


def test_processors_given_by_hand_count_like_settings(model: PreTrainedModel, plain: Decoder, tokenizer: Any) -> None:
    inputs = ask(tokenizer, QUESTIONS[0])
    given = LogitsProcessorList([TopKLogitsWarper(5), TopPLogitsWarper(0.7)])
    out = model.generate(
        **inputs, custom_generate=align, logits_processor=given, do_sample=True, top_k=0, max_new_tokens=8, seed=3
    )
    options: dict[str, Any] = {"search": Sampling(top_k=5, top_p=0.7), "max_new_tokens": 8, "seed": 3}
    assert new_tokens(out, inputs, tokenizer) == decoded(plain, tokenizer, QUESTIONS[:1], **options)


class Heard:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert not self.ended
        self.puts.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("searching", [False, True])
@pytest.mark.parametrize("with_the_function", [False, True])
def test_a_streamer_hears_every_token_once(
    model: PreTrainedModel, tokenizer: Any, searching: bool, with_the_function: bool
) -> None:
    inputs, streamer = ask(tokenizer, QUESTIONS[0]), Heard()
    options: dict[str, Any] = {"search": small_rain()} if searching else {}
    call: Any = functools.partial(align, streamer=streamer) if with_the_function else align
    given = {} if with_the_function else {"streamer": streamer}
    out = model.generate(**inputs, custom_generate=call, max_new_tokens=6, **options, **given)
    assert streamer.puts[0] == inputs["input_ids"][0].tolist()
    assert all(len(put) == 1 for put in streamer.puts[1:])
    assert [put[0] for put in streamer.puts[1:]] == out[0, inputs["input_ids"].shape[1] :].tolist()
    assert streamer.ended == 1


def test_text_streamers(model: PreTrainedModel, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = ask(tokenizer, QUESTIONS[0])
    options: dict[str, Any] = {"custom_generate": align, "max_new_tokens": 8, "do_sample": False}
    out = model.generate(**inputs, **options, streamer=TextStreamer(tokenizer, skip_prompt=True))
    expected = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert capsys.readouterr().out.strip() == expected.strip()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=lambda: model.generate(**inputs, **options, streamer=streamer))
    thread.start()
    assert "".join(streamer).strip() == expected.strip()
    thread.join()


def test_a_streamer_ends_after_an_error_too(model: PreTrainedModel, tokenizer: Any) -> None:
    class Broken(Heard):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.puts) == 3:
                raise OSError("the listener has gone")

    inputs = ask(tokenizer, QUESTIONS[0])
    for streamer, options, kind in ((Broken(), {}, OSError), (Heard(), {"seed": -1}, ConfigError)):
        with pytest.raises(kind):
            model.generate(**inputs, custom_generate=align, max_new_tokens=6, streamer=streamer, **options)
        assert streamer.ended == 1
    with pytest.raises(ConfigError, match="2 rows"):
        model.generate(**ask(tokenizer, *QUESTIONS), custom_generate=align, max_new_tokens=6, streamer=Heard())


def _refused() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    def too_long(input_ids: Any, scores: Any, **_: Any) -> bool:
        return False

    return {
        "beams": ({"num_beams": 2}, ConfigError, "num_beams"),
        "scores": ({"return_dict_in_generate": True, "output_scores": True}, ConfigError, "output_scores"),
        "n-grams": ({"no_repeat_ngram_size": 2}, ConfigError, "NoRepeatNGram"),
        "min_new_tokens": ({"min_new_tokens": 3}, ConfigError, "MinLength|MinNewTokens"),
        "typical_p": ({"do_sample": True, "typical_p": 0.5}, ConfigError, "Typical"),
        "processor": (
            {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(9, 2)])}, ConfigError, "MinLengthLogitsProcessor",
        ),
        "order": (
            {"logits_processor": LogitsProcessorList([TopPLogitsWarper(0.5), TopKLogitsWarper(5)])}, ConfigError, "order",
        ),
        "tokens kept": (
            {"logits_processor": LogitsProcessorList([TopKLogitsWarper(5, min_tokens_to_keep=2)])}, ConfigError, "min_tokens_to_keep",
        ),
        "positions": ({"position_ids": torch.arange(3, 16)[None]}, ConfigError, "position_ids"),
        "time": ({"max_time": 5.0}, ConfigError, "MaxTimeCriteria"),
        "criterion": ({"stopping_criteria": StoppingCriteriaList([too_long])}, ConfigError, "criterion"),
        "embeddings": ({"token_type_ids": torch.zeros(1, 3)}, Exception, "token_type_ids"),
        "seed": ({"seed": -1}, ConfigError, "seed"),
        "seeds": ({"seed": [1, 2]}, ConfigError, "seeds"),
        "search": ({"search": Sampling()}, ConfigError, "search"),
        "policy": ({"policy": "dera"}, ConfigError, "policy"),
        "no partner": ({"policy": Policy(dera=DeRa(0.5))}, ConfigError, "one model"),
        "tokenizer": ({"custom_generate": functools.partial(align, tokenizer=3)}, ModelError, "tokenizer"),
        "reference": ({"reference": "base"}, ModelError, "PreTrainedModel"),
        "asked": ({"search": "town", "asked": ["a", "b"]}, PromptError, "asked"),
        "RAIN's draws": ({"search": "town", "do_sample": True, "temperature": 0.3}, ConfigError, "expansion_temperature"),
        "pool": ({"kv_tokens": 0}, ConfigError, "kv_tokens"),
    }  # fmt: skip


@pytest.mark.parametrize("case", list(_refused()))
def test_what_cannot_be_done_is_refused_by_name(model: PreTrainedModel, tokenizer: Any, case: str) -> None:
    options, kind, words = _refused()[case]
    before = model.config._attn_implementation
    with pytest.raises(kind, match=words):
        model.generate(**ask(tokenizer, QUESTIONS[0]), **{"custom_generate": align, "max_new_tokens": 4, **options})
    assert model.config._attn_implementation == before


def test_padding_on_the_wrong_side_a_filled_cache_and_drafts(model: PreTrainedModel, tokenizer: Any) -> None:
    inputs = ask(tokenizer, *QUESTIONS)
    right = {name: tensor.flip(1) for name, tensor in inputs.items()}
    with pytest.raises(PromptError, match="left"):
        model.generate(**right, custom_generate=align, max_new_tokens=4)
    one = ask(tokenizer, QUESTIONS[0])["input_ids"]
    cache = model(one[:, :-1], use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="past_key_values"):
        model.generate(one, past_key_values=cache, custom_generate=align, max_new_tokens=4)
    with pytest.raises(ConfigError, match="assistant_model"):
        model.generate(one, assistant_model=load(), custom_generate=align, max_new_tokens=4)
    with pytest.raises(ConfigError, match="give one"):
        model.generate(one, custom_generate=dera, reference=model, aligned=model, max_new_tokens=4)
    with pytest.raises(ConfigError, match="reference="):
        model.generate(one, custom_generate=dera, dera_lambda=0.5, max_new_tokens=4)
    with pytest.raises(ConfigError, match="edits"):
        model.generate(one, custom_generate=alignez, max_new_tokens=4)


# ---- the model before, between and behind calls -------------------------------------------------------------------------
def kinds(model: PreTrainedModel) -> list[str]:
    return [type(module).__name__ for module in model.modules()]


def test_the_model_is_what_it_was(tokenizer: Any, tmp_path: Path) -> None:
    model = load()
    inputs = ask(tokenizer, QUESTIONS[0])
    modules, weights = kinds(model), {name: p.clone() for name, p in model.named_parameters()}
    with torch.inference_mode():
        logits = model(**inputs).logits
    for _ in range(2):
        model.generate(**inputs, custom_generate=align, max_new_tokens=4)
        assert model.config._attn_implementation == "sdpa"
        assert kinds(model) == modules
        with torch.inference_mode():
            assert torch.equal(model(**inputs).logits, logits)
    with pytest.raises(ConfigError):
        model.generate(**inputs, custom_generate=align, max_new_tokens=4, seed=-1)
    assert kinds(model) == modules
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    assert all(torch.equal(saved[name], weights[name]) for name in saved)
    twin = copy.deepcopy(model)
    greedy: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert twin.generate(**inputs, **greedy).tolist() == model.generate(**inputs, **greedy).tolist()


def test_a_model_trained_between_calls_answers_as_it_is_now(tokenizer: Any) -> None:
    model = load()
    inputs = ask(tokenizer, QUESTIONS[0])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    first = model.generate(**inputs, custom_generate=align, **options)
    words = tokenizer(QUESTIONS[0], return_tensors="pt")
    constant: Callable[..., Any] = functools.partial(urial, prompt=URIAL.testbed())
    behind = model.generate(**words, custom_generate=constant, **options)
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.02 * parameter.grad.sign()
    model.eval()
    expected = model.generate(**inputs, **options)
    assert expected.tolist() != first.tolist()
    assert model.generate(**inputs, custom_generate=align, **options).tolist() == expected.tolist()
    fresh = copy.deepcopy(model).generate(**words, custom_generate=constant, **options)
    assert fresh.tolist() != behind.tolist()
    assert model.generate(**words, custom_generate=constant, **options).tolist() == fresh.tolist()
    model.to(torch.bfloat16)
    out = model.generate(**inputs, custom_generate=align, **options)
    assert out.tolist() == copy.deepcopy(model).generate(**inputs, custom_generate=align, **options).tolist()


def test_decoders_are_made_once_and_go_with_their_model(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Decoder]] = []
    build = Decoder.__init__

    def counted(self: Decoder, *args: Any, **options: Any) -> None:
        made.append(weakref.ref(self))
        build(self, *args, **options)

    monkeypatch.setattr(Decoder, "__init__", counted)
    model, inputs = load(), ask(tokenizer, QUESTIONS[0])
    for seed in range(3):
        model.generate(**inputs, custom_generate=align, max_new_tokens=3, seed=seed)
    assert len(made) == 1
    for _ in range(2):
        model.generate(**inputs, custom_generate=dera, aligned=str(testbed.ADAPTER), max_new_tokens=3)
    assert len(made) == 2
    model.generate(
        **inputs, custom_generate=align, max_new_tokens=3, kv_tokens=9000
    )  # a larger pool, instead of the first
    gc.collect()
    assert [ref() is None for ref in made] == [True, False, False]
    forget(model)
    gc.collect()
    assert all(ref() is None for ref in made)
    model.generate(**inputs, custom_generate=align, max_new_tokens=3)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert made[-1]() is None


def test_forgetting_either_model_of_a_pair_lets_go_of_both(tokenizer: Any) -> None:
    reference, inputs = load(), ask(tokenizer, QUESTIONS[0])
    for kept in ("model", "reference"):
        model = load()
        model.generate(**inputs, custom_generate=dera, reference=reference, dera_lambda=0.5, max_new_tokens=2)
        gone = weakref.ref(model)
        forget(model if kept == "model" else reference)
        del model
        gc.collect()
        assert gone() is None


def test_beside_a_decoder_of_the_same_model(tokenizer: Any) -> None:
    """Either finds the model as it needs it, and both keep their speed: the Decoder's fused model stays current."""
    model = load()
    decoder = Decoder(model, tokenizer)
    inputs = ask(tokenizer, QUESTIONS[0])
    prompt = inputs["input_ids"][0].tolist()
    options: dict[str, Any] = {"search": Sampling.greedy(), "max_new_tokens": 6, "progress": False}
    (expected,) = decoder.generate(prompt, **options)
    out = model.generate(**inputs, custom_generate=align, max_new_tokens=6, do_sample=False)
    assert new_tokens(out, inputs, tokenizer) == [expected.token_ids]
    assert decoder.engine.runner.fused.is_current
    assert decoder.generate(prompt, **options)[0].token_ids == expected.token_ids


def test_a_model_without_a_tokenizer_needs_one_given(tokenizer: Any) -> None:
    model = load()
    model.name_or_path = "nowhere/at-all"
    inputs = ask(tokenizer, QUESTIONS[0])
    with pytest.raises(ModelError, match=r"functools\.partial"):
        model.generate(**inputs, custom_generate=align, max_new_tokens=3)
    given: Callable[..., Any] = functools.partial(align, tokenizer=tokenizer)
    assert model.generate(**inputs, custom_generate=given, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
