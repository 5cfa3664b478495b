"""Constant prompts: computed once, pinned, given up under pressure, and kept in files that fit one model and policy."""

from __future__ import annotations

import copy
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from aligned_models import aligned_model, pair, reference_model, write_adapter
from models import byte_tokenizer
from safetensors import safe_open
from safetensors.torch import save_file
from test_edits_engine import edit_of

from raindecode import RAIN, ChatFormat, Completion, Decoder, DeRa, JudgeTemplate, Policy, Positions, Sampling
from raindecode.engine.branch import Ledger
from raindecode.engine.pins import LEAST_PINNED
from raindecode.errors import CapacityError, ConfigError, PrefixFileError, PromptError
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.policy.alignez.schedule import constant_schedules
from raindecode.prefix_file import _checksums as checksums

PREFIX = "the inner on a thing in the other " * 12
FORM = ChatFormat("\n[{prompt}]", prefix=PREFIX, stop=("[",))
PLAIN = Policy(prompt=FORM)
QUERIES = ["on a", "in the", "er"]
GREEDY = Sampling(temperature=0.0, ignore_eos=True, logprobs=True)
JUDGE = JudgeTemplate("say (A) or (B) of it. " * 8, "{prompt}:", " good (A) or (B)? (", " bad (A) or (B)? (")
RAINY = RAIN(evaluator=JUDGE, max_iterations=4, min_new_iterations=2)


def decoder_of(model: Any = None, **options: Any) -> Decoder:
    options.setdefault("kv_tokens", 3000)
    return Decoder(reference_model() if model is None else model, byte_tokenizer(), **options)


def answers(decoder: Decoder, queries: Any = QUERIES, policy: Any = PLAIN, **options: Any) -> list[Completion]:
    return decoder.generate(queries, policy=policy, **{"search": GREEDY, "max_new_tokens": 4} | options)


def told(done: list[Completion]) -> list[Any]:
    return [(one.token_ids, one.logprobs, one.value, one.stats.tokens_processed) for one in done]


def charged(done: list[Completion]) -> int:
    return sum(one.stats.tokens_charged for one in done)


def constant_of(decoder: Decoder, policy: Policy = PLAIN) -> int:
    return decoder.requests("x", policy=policy)[0].constant


# ---- in the tree ------------------------------------------------------------------------------------------------------
def test_a_request_runs_its_own_tokens_once_the_prefix_is_there() -> None:
    decoder = decoder_of()
    constant = constant_of(decoder)
    assert constant == len(decoder.codec.encode(FORM.prefix + "\n[")) > LEAST_PINNED
    (first,) = answers(decoder, "on a", max_new_tokens=1)
    own = [len(request.prompt_ids) - constant for request in decoder.requests(QUERIES, policy=PLAIN)]
    assert first.stats.tokens_charged == constant + own[0]
    for query, tokens in zip(QUERIES[1:], own[1:], strict=True):
        (done,) = answers(decoder, query, max_new_tokens=1)
        assert done.stats.tokens_charged == tokens
        assert done.stats.tokens_processed == constant + tokens
    assert len(decoder.engine.pins) == 1
    assert decoder.engine.pins.num_tokens == constant


def test_first_requests_that_come_together_compute_it_once() -> None:
    decoder = decoder_of(max_concurrent=8)
    queries = [f"{i} on a" for i in range(8)]
    done = answers(decoder, queries, max_new_tokens=1)
    constant = constant_of(decoder)
    requests = decoder.requests(queries, policy=PLAIN)
    assert charged(done) == constant + sum(len(one.prompt_ids) - constant for one in requests)


def test_a_pinned_prefix_outlasts_what_fills_the_pool() -> None:
    decoder = decoder_of(kv_tokens=700)
    constant = constant_of(decoder)
    answers(decoder, "on a", max_new_tokens=1)
    for i in range(6):  # other prompts, which fill the pool and push each other out
        answers(decoder, f"{i} " + "in a row " * 30, policy=None)
    assert decoder.engine.tree.num_evicted > 0
    (done,) = answers(decoder, "er", max_new_tokens=1)
    assert done.stats.tokens_charged == len(decoder.requests("er", policy=PLAIN)[0].prompt_ids) - constant


def test_it_is_given_up_before_a_request_fails_or_waits() -> None:
    decoder = decoder_of(kv_tokens=700)
    answers(decoder, "on a", max_new_tokens=1)
    assert len(decoder.engine.pins) == 1
    long = [5 + i % 90 for i in range(690)]
    (done,) = answers(decoder, [long], policy=None, max_new_tokens=2)
    assert len(done.token_ids) == 2
    assert len(decoder.engine.pins) == 0


def test_it_is_given_up_before_a_request_waits_for_another() -> None:
    prompts = [
        [5 + i % 90 for i in range(290)],
        [7 + i % 80 for i in range(290)],
    ]  # both fit 700 slots, but not beside a prefix
    steps = []
    for before in ([], ["on a"]):
        decoder = decoder_of(kv_tokens=700)
        answers(decoder, before, policy=Policy(prompt=ChatFormat("[{prompt}]", prefix="on a " * 60)), max_new_tokens=1)
        assert len(decoder.engine.pins) == len(before)
        start = decoder.engine.model_steps
        answers(decoder, prompts, policy=None, max_new_tokens=8)
        steps.append(decoder.engine.model_steps - start)
    assert steps[1] == steps[0]


def test_prefixes_too_short_or_too_long_are_not_pinned() -> None:
    decoder = decoder_of(kv_tokens=700)
    answers(decoder, "on a", policy=Policy(prompt=ChatFormat("[{prompt}]", prefix="on " * 5)))
    answers(decoder, "on a", policy=Policy(prompt=ChatFormat("[{prompt}]", prefix="on " * 250)))
    assert len(decoder.engine.pins) == 0


def test_the_least_recently_used_go_when_there_are_many() -> None:
    decoder = decoder_of(kv_tokens=1000)
    forms = [Policy(prompt=ChatFormat("[{prompt}]", prefix=f"{i} " + "on " * 70)) for i in range(4)]
    for i in (0, 1, 2, 0, 3):
        answers(decoder, "on a", policy=forms[i], max_new_tokens=1)
    pins = decoder.engine.pins
    assert len(pins) == 3
    assert pins.num_tokens <= pins.most == 500
    decoder.engine.tree.clear()  # what is pinned stays
    for i, held in enumerate((True, False, True, True)):
        constant = tuple(decoder.requests("x", policy=forms[i])[0].prompt_ids[: constant_of(decoder, forms[i])])
        cursor = decoder.engine.tree.match(constant)
        length = cursor.length
        decoder.engine.tree.release(cursor)
        assert (length == len(constant)) == held, i


def test_a_pin_holds_nothing_behind_the_prefix() -> None:
    decoder = decoder_of()
    answers(decoder, "on a", max_new_tokens=8)
    decoder.engine.tree.clear()
    assert decoder.engine.tree.num_used == constant_of(decoder)


def test_the_judges_prompt_is_pinned_and_verdicts_do_not_change() -> None:
    decoder = decoder_of()
    first = answers(decoder, "on a", search=RAINY, policy=PLAIN)
    assert len(decoder.engine.pins) == 2
    again = answers(decoder, "in the", search=RAINY, policy=PLAIN)
    alone = decoder_of()
    assert told(again) == told(answers(alone, "in the", search=RAINY, policy=PLAIN))
    assert charged(again) < charged(answers(decoder_of(), "in the", search=RAINY, policy=PLAIN))
    assert first[0].stats.evaluations > 0


def test_a_system_text_is_part_of_the_constant() -> None:
    decoder = decoder_of()

    def talk(query: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": "in a row"}, {"role": "user", "content": query}]

    answers(decoder, [talk("on a")])
    constant = decoder.requests([talk("x")], policy=PLAIN)[0].constant
    assert constant > constant_of(decoder)
    (done,) = answers(decoder, [talk("er")], max_new_tokens=1)
    assert done.stats.tokens_charged == len(decoder.requests([talk("er")], policy=PLAIN)[0].prompt_ids) - constant


def test_every_system_text_has_its_own_constant() -> None:
    decoder = decoder_of()

    def constant(system: str) -> int:
        talk = [{"role": "system", "content": system}, {"role": "user", "content": "x"}]
        return decoder.requests([talk], policy=PLAIN)[0].constant

    texts = ("in a row", "one after the other")
    plain = constant_of(decoder)
    assert [constant(text) for text in texts] == [
        len(decoder.codec.encode(FORM.prefix + text + "\n\n\n[")) for text in texts
    ]
    assert constant_of(decoder) == plain < constant(texts[0])


def test_a_token_that_spans_the_seam_is_the_querys() -> None:
    policy = Policy(prompt=ChatFormat("i{prompt}]", prefix=PREFIX))  # "i" and "n" are one token
    decoder = decoder_of()
    apart, merged = decoder.requests(["on a", "n a"], policy=policy)
    assert merged.constant == apart.constant - 1
    assert merged.prompt_ids[: merged.constant] == apart.prompt_ids[: merged.constant]
    assert merged.prompt_ids[merged.constant] != apart.prompt_ids[merged.constant]
    answers(decoder, "on a", policy=policy)
    assert told(answers(decoder, "n a", policy=policy)) == told(answers(decoder_of(), "n a", policy=policy))


def test_models_and_edits_keep_their_prefixes_apart(tmp_path: Path) -> None:
    model = reference_model()
    decoder = decoder_of(model, adapters=[write_adapter(tmp_path / "a", model)])
    edited = Policy(prompt=FORM, edits=edit_of(decoder))
    constant = constant_of(decoder)
    for policy, query in ((PLAIN, "er"), (Policy(prompt=FORM, dera=DeRa(0.5)), "in a"), (edited, "the other")):
        answers(decoder, "on a", policy=policy, max_new_tokens=1)
        (done,) = answers(decoder, query, policy=policy, max_new_tokens=1)
        models = 2 if policy.dera else 1
        own = len(decoder.requests(query, policy=policy)[0].prompt_ids) - constant
        assert done.stats.tokens_charged == models * own
        fresh = decoder_of(adapters=[str(tmp_path / "a")])
        assert told([done]) == told(answers(fresh, query, policy=policy, max_new_tokens=1))
        assert len(fresh.engine.pins) == 1
    assert len(decoder.engine.pins) == 3


def test_a_failed_or_cancelled_request_pins_what_it_ran_or_nothing() -> None:
    decoder = decoder_of()

    def stop(*_: Any) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        decoder.generate("on a", policy=PLAIN, search=GREEDY, max_new_tokens=8, on_progress=stop)
    assert len(decoder.engine.pins) == 1
    stream = decoder.stream(
        decoder.requests(["on a"] * 3, policy=Policy(prompt=ChatFormat("<{prompt}>", prefix=PREFIX)))
    )
    stream.close()  # type: ignore[attr-defined]
    assert len(decoder.engine.pins) == 1


def test_rows_go_to_the_slots_they_are_for() -> None:
    """Slots that lie together, and slots in any order."""
    decoder = decoder_of()
    answers(decoder, "on a")
    runner = decoder.engine.runner
    taken = runner.rows(torch.tensor([1, 2, 3]))
    for slots in ([40, 41, 42], [70, 50, 60]):
        runner.put_rows(torch.tensor(slots), taken)
        for name, rows in runner.rows(torch.tensor(slots)).items():
            assert torch.equal(rows, taken[name])
            assert not torch.equal(rows[0], rows[1])
    with pytest.raises(ValueError, match="do not have the form"):
        runner.put_rows(torch.tensor([1]), {name: rows[:1].double() for name, rows in taken.items()})


def test_pinning_is_asked_for_once_for_every_way_to_run_the_tokens() -> None:
    decoder = decoder_of()
    engine, ledger = decoder.engine, Ledger()
    ids, plain = list(range(5, 5 + LEAST_PINNED)), decoder.requests("x")[0].mix
    edit = engine.edit_path(constant_schedules([edit_of(decoder)], 1)[0])
    for _ in range(2):
        engine.pin_at_end(ledger, ids, plain)
        engine.pin_at_end(ledger, ids, plain, edit)
    assert len(ledger.at_end) == 2
    ledger.release()
    assert len(engine.pins) == 0  # nothing of it has run


# ---- in files ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prefix.safetensors"


def assert_fits(maker: Decoder, taker: Decoder, file: Path, **options: Any) -> None:
    """What one decoder saved serves the other: the same answers, and none of the constant tokens are run."""
    policy, search = options.get("policy", PLAIN), options.get("search", GREEDY)
    saved = maker.save_prefix(file, policy=policy, search=search)
    assert taker.load_prefix(file, policy=policy, search=search) == saved > LEAST_PINNED
    expected = answers(maker, policy=policy, search=search)
    maker.engine.forget()
    cold = answers(maker, policy=policy, search=search)
    done = answers(taker, policy=policy, search=search)
    assert told(done) == told(expected) == told(cold)
    models = maker.requests("x", policy=policy)[0].mix.models.bit_count()
    judged = saved - constant_of(maker, policy)
    assert charged(cold) - charged(done) == models * constant_of(maker, policy) + judged


def test_a_saved_prefix_gives_the_bits_of_a_computed_one(file: Path) -> None:
    maker = decoder_of()
    assert maker.exact != "off"
    assert_fits(maker, decoder_of(), file)
    mode = stat.S_IMODE(file.stat().st_mode)
    assert mode & stat.S_IRUSR
    plain = file.with_name("plain")
    plain.write_text("")
    assert mode == stat.S_IMODE(plain.stat().st_mode)


def test_loading_takes_one_forward_of_one_row(file: Path) -> None:
    """That of the check: pools whose form is known need none."""
    decoder_of().save_prefix(file, policy=PLAIN)
    taker = decoder_of()
    taker.load_prefix(file, policy=PLAIN)
    assert taker.engine.model_steps == 1


def test_with_a_judges_prompt(file: Path) -> None:
    assert_fits(decoder_of(), decoder_of(), file, search=RAINY)


def test_of_a_mixture_with_an_adapter(file: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", reference_model())
    pairs = [decoder_of(reference_model(), adapters=[adapter]) for _ in range(2)]
    assert_fits(*pairs, file, policy=Policy(prompt=FORM, dera=DeRa(0.5)))


def test_of_a_mixture_of_two_models(file: Path) -> None:
    reference = reference_model()
    pairs = [pair(reference, aligned_model(reference)) for _ in range(2)]
    assert_fits(*pairs, file, policy=Policy(prompt=FORM, dera=DeRa(0.5)))


def test_a_prefix_of_one_model_is_not_taken_for_another_s(file: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", reference_model())
    maker, taker, fresh = (decoder_of(adapters=[adapter]) for _ in range(3))
    alone = Policy(prompt=FORM, dera=DeRa(1.0))  # the adapter without the reference
    maker.save_prefix(file, policy=alone)
    taker.load_prefix(file, policy=alone)
    assert charged(answers(taker, "on a", policy=alone, max_new_tokens=1)) < 20
    assert told(answers(taker)) == told(answers(fresh))
    both = Policy(prompt=FORM, dera=DeRa(0.5))
    assert told(answers(taker, policy=both)) == told(answers(decoder_of(adapters=[adapter]), policy=both))


def test_under_edits(file: Path) -> None:
    maker, taker = decoder_of(), decoder_of()
    answers(taker, policy=Policy(prompt=FORM, edits=edit_of(taker, seed=3)))  # so that edits have other numbers there
    assert_fits(maker, taker, file, policy=Policy(prompt=FORM, edits=edit_of(maker)))


def test_in_bfloat16_and_through_transformers_own_modules(file: Path) -> None:
    pairs = [decoder_of(reference_model().bfloat16()) for _ in range(2)]
    for one in pairs:
        one.engine.runner.fused = None
        one.engine.forget()
    maker, taker = pairs
    maker.save_prefix(file, policy=PLAIN)
    taker.load_prefix(file, policy=PLAIN)
    (done,) = answers(taker, "er", max_new_tokens=1)
    assert done.stats.tokens_charged == len(taker.requests("er", policy=PLAIN)[0].prompt_ids) - constant_of(taker)


def test_a_part_that_is_cached_already_is_kept(file: Path) -> None:
    maker, taker = decoder_of(), decoder_of()
    maker.save_prefix(file, policy=PLAIN)
    half = maker.requests("x", policy=PLAIN)[0].prompt_ids[:90]
    answers(taker, [half], policy=None, max_new_tokens=1)
    taker.load_prefix(file, policy=PLAIN)
    taker.load_prefix(file, policy=PLAIN)
    assert told(answers(taker)) == told(answers(maker))


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"seed": 5}, "another model"),
    "number type": ({"dtype": torch.bfloat16}, "another number type"),
    "prompt": (
        {"policy": Policy(prompt=ChatFormat("\n[{prompt}]", prefix=PREFIX + "x"))},
        "of another prompt: .* differ from token",
    ),
    "search": ({"search": RAINY}, "holds 1 prompts .* have 2"),
    "mixture": ({"policy": Policy(prompt=FORM, dera=DeRa(0.5))}, "made by 1 models, 2 run"),
    "adapter": ({"policy": Policy(prompt=FORM, dera=DeRa(1.0))}, "another model of the mixture"),
    "edits": ({"edited": True}, "under other edits"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_file_of_something_else_is_refused(what: str, file: Path, tmp_path: Path) -> None:
    changes, words = CHANGES[what]
    adapter = write_adapter(tmp_path / "a", reference_model())
    decoder_of(adapters=[adapter]).save_prefix(file, policy=PLAIN)
    model = reference_model()
    if "seed" in changes:
        model = aligned_model(model, seed=changes["seed"])
    other = decoder_of(model.to(changes.get("dtype", torch.float32)), adapters=[adapter])
    policy = Policy(prompt=FORM, edits=edit_of(other)) if "edited" in changes else changes.get("policy", PLAIN)
    with pytest.raises(PrefixFileError, match=words):
        other.load_prefix(file, policy=policy, search=changes.get("search"))
    assert len(other.engine.pins) == 0


def test_another_adapter_is_another_maker(file: Path, tmp_path: Path) -> None:
    first, second = (write_adapter(tmp_path / name, reference_model(), seed=i) for i, name in enumerate("ab"))
    policy = Policy(prompt=FORM, dera=DeRa(1.0))
    decoder_of(adapters=[first]).save_prefix(file, policy=policy)
    with pytest.raises(PrefixFileError, match="another adapter"):
        decoder_of(adapters=[second]).load_prefix(file, policy=policy)


def test_a_change_that_the_fingerprint_misses_is_noticed(file: Path) -> None:
    """One element among many of one matrix of the first layer."""
    decoder_of().save_prefix(file, policy=PLAIN)
    model = reference_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] += 4.0
    other = decoder_of(model)
    assert other.identities == decoder_of().identities
    with pytest.raises(PrefixFileError, match="not what this model computes"):
        other.load_prefix(file, policy=PLAIN)
    assert len(other.engine.pins) == 0
    assert told(answers(other)) == told(answers(decoder_of(copy.deepcopy(model))))


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "other", "text", "metadata", "nested", "sums", "rows", "form", "empty"]
)
def test_damaged_files_are_refused(damage: str, file: Path) -> None:
    decoder = decoder_of()
    decoder.save_prefix(file, policy=PLAIN)
    data = bytearray(file.read_bytes())
    with safe_open(file, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    words = "damaged"
    if damage == "flip":
        data[-700] ^= 4
    elif damage == "truncate":
        del data[-100:]
    elif damage == "text":
        data = bytearray(b"no tensors here, only words" * 4)
    elif damage == "empty":
        data = bytearray()
    if damage == "other":
        save_file(tensors, file, {})
        words = "no file of prompts' K/V"
    elif damage == "metadata":
        save_file(tensors, file, {**metadata, "prefixes": "[{]"})
    elif damage == "nested":
        save_file(tensors, file, {**metadata, "prefixes": "[" * 100_000})
    elif damage == "form":  # another program's file, with sums that agree
        tensors["0.0.1.k"] = tensors["0.0.1.k"].double()
        save_file(tensors, file, {**metadata, "crc32": json.dumps(checksums(tensors))})
        words = "do not fit this model"
    elif damage == "sums":
        save_file(tensors, file, {**metadata, "crc32": "{}"})
    elif damage == "rows":
        save_file({k: t[:-1].contiguous() if k.endswith("1.k") else t for k, t in tensors.items()}, file, metadata)
    else:
        file.write_bytes(data)
    decoder.engine.forget()
    with pytest.raises(PrefixFileError, match=words):
        decoder.load_prefix(file, policy=PLAIN)


def test_what_cannot_be_saved_or_loaded(file: Path) -> None:
    decoder = decoder_of()
    for policy in (None, Policy(prompt=ChatFormat("{prompt}"))):
        with pytest.raises(ConfigError, match="no constant prompt"):
            decoder.save_prefix(file, policy=policy)
    with pytest.raises(PrefixFileError, match="there is no file"):
        decoder.load_prefix(file, policy=PLAIN)
    with pytest.raises(PrefixFileError, match="could not be written"):
        decoder.save_prefix(file / "in" / "no folder", policy=PLAIN)
    with pytest.raises(PromptError, match="more than the model's context leaves"):
        decoder.save_prefix(file, policy=Policy(prompt=ChatFormat("{prompt}", prefix="on " * 1024)))
    with pytest.raises(CapacityError, match="keeps 100 at the most"):
        decoder_of(kv_tokens=200).save_prefix(file, policy=PLAIN)
    judged = decoder_of(kv_tokens=2 * constant_of(decoder) + 20)
    with pytest.raises(CapacityError, match="the prompt and the judge's prompt have"):
        judged.save_prefix(file, policy=PLAIN, search=RAINY)
    assert not list(file.parent.iterdir())
    stages = edit_of(decoder).stages
    chosen = AlignEZ(stages=stages, select="cosine", positions=Positions("all"))
    with pytest.raises(ConfigError, match="decides prompt by prompt"):
        decoder.save_prefix(file, policy=Policy(prompt=FORM, edits=chosen))
    later = AlignEZ(stages=stages, select="cosine", positions=Positions("last"))
    assert decoder.save_prefix(file, policy=Policy(prompt=FORM, edits=later)) == constant_of(decoder)
    assert decoder.load_prefix(file, policy=PLAIN) == constant_of(decoder)  # these edits leave the prefix alone


def test_arguments_that_say_nothing_are_refused(file: Path) -> None:
    decoder = decoder_of()
    for call in (decoder.save_prefix, decoder.load_prefix):
        with pytest.raises(ConfigError, match="search is a str"):
            call(file, policy=PLAIN, search="rain")  # type: ignore[arg-type]
        for system in (5, "  ", "\ud800"):
            with pytest.raises(PromptError, match="system is"):
                call(file, policy=PLAIN, system=system)  # type: ignore[arg-type]
    assert not file.exists()


def test_a_short_system_text_can_be_saved_too(file: Path) -> None:
    maker, taker = decoder_of(format=ChatFormat("[{prompt}]")), decoder_of(format=ChatFormat("[{prompt}]"))
    saved = maker.save_prefix(file, system="in a row")
    assert 0 < saved < LEAST_PINNED
    assert taker.load_prefix(file, system="in a row") == saved
    talk = [{"role": "system", "content": "in a row"}, {"role": "user", "content": "on"}]
    (done,) = taker.generate(talk, search=GREEDY, max_new_tokens=1)
    assert done.stats.tokens_charged == len(taker.requests(talk)[0].prompt_ids) - saved
