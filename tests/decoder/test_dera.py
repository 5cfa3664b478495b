"""DeRa: mixtures of models over one tree, beside the models by themselves and plain transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aligned_models import (
    aligned_model,
    dera,
    greedy_by_hand,
    merged,
    mixed_logits,
    pair,
    reference_model,
    stock_logits,
    write_adapter,
)
from models import byte_tokenizer, random_tokens, run_alone, stock_copy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from raindecode.decoder import Decoder
from raindecode.engine.branch import Ledger
from raindecode.engine.types import Search, Want
from raindecode.errors import ConfigError, ModelError, NumericError, PromptError, RainDecodeError, VocabularyError
from raindecode.mixture import Mix
from raindecode.policy.dera import DeRa
from raindecode.policy.policy import Policy
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling
from raindecode.types import Completion

WEIGHTS = Path(__file__).parents[3] / "shared" / "weights"
PROMPTS = [random_tokens(9, seed) for seed in range(4)]
SAMPLINGS = {
    "plain": Sampling(),
    "greedy": Sampling.greedy(),
    "filtered": Sampling(temperature=0.7, top_k=50, top_p=0.95),
    "min p": Sampling(temperature=1.3, min_p=0.05),
    "penalised": Sampling(top_k=40, repetition_penalty=1.3),
    "rain": RAIN(evaluator=lambda pairs: [len(text) % 5 / 2 - 1 for _, text in pairs], max_iterations=8, min_new_iterations=4),
}  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return stock_copy(reference_model())


@pytest.fixture(scope="module")
def aligned(reference: PreTrainedModel) -> PreTrainedModel:
    return aligned_model(reference)


@pytest.fixture(scope="module")
def folder(reference: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_adapter(tmp_path_factory.mktemp("adapter"), reference)


@pytest.fixture
def two(reference: PreTrainedModel, aligned: PreTrainedModel) -> Decoder:
    return pair(reference, aligned)


@pytest.fixture
def lora(reference: PreTrainedModel, folder: str) -> Decoder:
    return pair(reference, adapters=[folder])


def answers(decoder: Decoder, policy: Policy | list[Policy] | None, **options: Any) -> list[Completion]:
    options = {"max_new_tokens": 10, "seed": range(len(PROMPTS)), **options}
    return decoder.generate(PROMPTS, policy=policy, **options)


def told(done: list[Completion]) -> list[Any]:
    """What an answer is, without what it took."""
    return [(c.token_ids, c.text, c.finish_reason, c.value, c.stats.tokens_processed) for c in done]


def rows_run(decoder: Decoder) -> dict[int, int]:
    """Rows that each model runs from now on, counted while they run."""
    counts = dict.fromkeys(range(decoder.num_models), 0)
    numbers = {(id(runner), member): i for i, (runner, member) in enumerate(decoder.engine.models)}
    for runner in decoder.engine.runners:
        inner = runner.forward_parts

        def counting(parts: Any, wanted: Any, runner: Any = runner, inner: Any = inner) -> Any:
            for part in parts:
                counts[numbers[id(runner), part.member]] += part.batch.num_rows
            return inner(parts, wanted)

        runner.forward_parts = counting  # type: ignore[method-assign]
    return counts


def logits_of(decoder: Decoder, mix: Mix, paths: list[list[int]]) -> list[Any]:
    def search(ledger: Ledger) -> Search:
        found = yield [Want(decoder.engine.open(ledger, path, mix), logits=True) for path in paths]
        return [got.logits for got in found]

    return run_alone(decoder.engine, search)


# ---- numbers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight", [-1.0, 0.0, 1e-6, 0.3, 1.0, 1 + 1e-6, 2.0, 10.0])
def test_mixed_logits_are_those_of_double_precision(
    two: Decoder, reference: PreTrainedModel, aligned: PreTrainedModel, weight: float
) -> None:
    mix = DeRa(weight, allow_negative=True).mix(2)
    for path, row in zip(PROMPTS, logits_of(two, mix, PROMPTS), strict=True):
        expected = mixed_logits([reference, aligned], [weight], path)
        size = abs(1 - weight) * np.abs(stock_logits([reference], path)).max() + abs(weight) * np.abs(expected).max()
        assert np.abs(row - expected).max() <= 1e-5 * size


def test_several_models_of_both_kinds_are_mixed(reference: PreTrainedModel, folder: str, tmp_path: Path) -> None:
    second = write_adapter(tmp_path / "second", reference, seed=7, rank=3, targets=("v_proj", "down_proj"))
    whole = aligned_model(reference, seed=3)
    decoder = pair(reference, whole, adapters=[folder, second])
    models = [reference, merged(reference, folder), merged(reference, second), whole]
    weights = [0.5, -0.25, 0.75]
    (row,) = logits_of(decoder, DeRa(weights, allow_negative=True).mix(4), [PROMPTS[0]])
    np.testing.assert_allclose(row, mixed_logits(models, weights, PROMPTS[0]), rtol=1e-4, atol=1e-4)
    (done,) = decoder.generate(
        [PROMPTS[0]],
        search=Sampling.greedy(ignore_eos=True),
        policy=dera(*weights, allow_negative=True),
        max_new_tokens=8,
    )
    assert done.token_ids == greedy_by_hand(models, weights, PROMPTS[0], 8)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox"])
def test_an_adapter_decodes_as_its_merged_model(family: str, tmp_path: Path) -> None:
    """Fused or as transformers runs it; Conv1D and nn.Linear."""
    reference = stock_copy(reference_model(family))
    path = write_adapter(tmp_path / "adapter", reference)
    decoder = pair(reference, adapters=[path])
    models = [reference, merged(reference, path)]
    for weight, row in ((w, logits_of(decoder, DeRa(w).mix(2), [PROMPTS[1]])[0]) for w in (0.0, 0.5, 1.0, 1.5)):
        expected = mixed_logits(models, [weight], PROMPTS[1])
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-4)
    (done,) = decoder.generate(
        [PROMPTS[1]], search=Sampling.greedy(ignore_eos=True), policy=dera(0.7), max_new_tokens=8
    )
    assert done.token_ids == greedy_by_hand(models, [0.7], PROMPTS[1], 8)


def test_peft_and_the_engine_add_the_same_bits(reference: PreTrainedModel, folder: str) -> None:
    """A model with the adapter put in by PEFT runs as transformers runs it; so does ours when it is not fused."""
    peft = pytest.importorskip("peft")
    inside = peft.PeftModel.from_pretrained(copy.deepcopy(reference), folder).get_base_model()
    theirs = Decoder(inside, byte_tokenizer(), kv_tokens=1000)
    ours = pair(reference, adapters=[folder])
    ours.engine.runner.fused = None
    assert theirs.exact == ours.exact == "rows"
    for search in (Sampling(), Sampling.greedy()):
        assert told(answers(theirs, None, search=search)) == told(answers(ours, dera(1.0), search=search))


@pytest.mark.parametrize("names", [("stories260k", "llama2xs-279k")])
def test_real_models_give_the_text_of_a_plain_script(names: tuple[str, str]) -> None:
    folders = [WEIGHTS / name for name in names]
    if not all(folder.is_dir() for folder in folders):
        pytest.skip("the small real models are not here: shared/weights is no part of the project")
    models = [stock_copy(AutoModelForCausalLM.from_pretrained(folder).eval()) for folder in folders]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    decoder = Decoder.from_pretrained(str(folders[0]), aligned=str(folders[1]), kv_tokens=2000)
    prompt = "Once upon a time, there was a little"
    ids = decoder.codec.encode(prompt)
    for weight in (0.0, 0.25, 1.0, 2.0):
        (done,) = decoder.generate([prompt], search=Sampling.greedy(), policy=dera(weight), max_new_tokens=32)
        by_hand = greedy_by_hand(models, [weight], ids, 32, [tokenizer.eos_token_id])
        assert done.token_ids == by_hand
        ended = by_hand[-1] == tokenizer.eos_token_id
        assert done.text == decoder.codec.continuation(ids, by_hand[:-1] if ended else by_hand)


# ---- single models ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("search", SAMPLINGS.values(), ids=SAMPLINGS.keys())
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_weight_of_one_model_is_that_model_bit_for_bit(
    reference: PreTrainedModel, aligned: PreTrainedModel, search: Any, weight: float
) -> None:
    both = pair(reference, aligned)
    assert both.exact == "rows"
    alone = pair(aligned if weight else reference)
    expected = told(answers(alone, None, search=search, max_new_tokens=6))
    counts = rows_run(both)
    assert told(answers(both, dera(weight), search=search, max_new_tokens=6)) == expected
    assert counts[int(1 - weight)] == 0
    assert counts[int(weight)] > 0


def test_a_weight_of_zero_ignores_the_adapter_bit_for_bit(lora: Decoder, reference: PreTrainedModel) -> None:
    expected = told(answers(pair(reference), None))
    counts = rows_run(lora)
    assert told(answers(lora, dera(0.0))) == expected
    assert told(answers(lora, None)) == expected  # without DeRa the reference answers
    assert counts[1] == 0


def test_an_adapter_alone_runs_alone_and_beside_others_alike(
    lora: Decoder, reference: PreTrainedModel, folder: str
) -> None:
    expected = told(answers(pair(reference, adapters=[folder]), dera(1.0)))
    counts = rows_run(lora)
    assert told(answers(lora, dera(1.0))) == expected
    assert counts[0] == 0
    lora.engine.tree.clear()
    done = lora.generate(
        [p for p in PROMPTS for _ in range(2)], policy=[dera(1.0), dera(0.4)] * len(PROMPTS),
        seed=[s for s in range(len(PROMPTS)) for _ in range(2)], max_new_tokens=10,
    )  # fmt: skip
    assert told(done[::2]) == expected


def test_statistics_change_no_token(two: Decoder) -> None:
    for weight in (0.0, 0.6, 1.0):
        plain, measured = (answers(two, dera(weight, stats=stats)) for stats in (False, True))
        assert [c.token_ids for c in plain] == [c.token_ids for c in measured]
        assert all(c.mixture is None for c in plain)
        assert all(c.mixture is not None and len(c.mixture.tokens) == len(c.token_ids) for c in measured)


# ---- K/V --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["two", "lora"])
def test_kv_is_never_used_by_a_model_that_did_not_compute_it(kind: str, request: pytest.FixtureRequest) -> None:
    decoder: Decoder = request.getfixturevalue(kind)
    fresh = {w: told(answers(_cleared(decoder), dera(w))) for w in (0.0, 0.5, 1.0)}
    for order in ((0.0, 1.0, 0.5), (1.0, 0.5, 0.0), (0.5, 0.0, 1.0)):
        _cleared(decoder)
        counts = rows_run(decoder)
        for weight in order:
            assert told(answers(decoder, dera(weight))) == fresh[weight]
        prompt_tokens = sum(map(len, PROMPTS))
        assert min(counts.values()) >= prompt_tokens  # each model ran the prompts itself


def test_a_cached_prompt_is_run_once_per_model(two: Decoder) -> None:
    counts = rows_run(two)
    answers(two, dera(0.5), max_new_tokens=1)
    assert counts == dict.fromkeys((0, 1), sum(map(len, PROMPTS)))
    again = answers(two, [dera(w) for w in (0.1, 0.9, 1.7, 0.3)], max_new_tokens=1)
    assert counts == dict.fromkeys((0, 1), sum(map(len, PROMPTS)) + len(PROMPTS))  # the last token, for its logits
    assert [c.stats.tokens_processed for c in again] == [2 * len(p) for p in PROMPTS]
    assert [c.stats.tokens_charged for c in again] == [2] * len(PROMPTS)


def test_models_that_share_weights_share_forwards(two: Decoder, lora: Decoder) -> None:
    for decoder, forwards in ((two, 2), (lora, 1)):
        before = decoder.engine.model_steps
        (done,) = decoder.generate([PROMPTS[0]], policy=dera(0.5), max_new_tokens=5, search=Sampling(ignore_eos=True))
        assert decoder.engine.model_steps - before == forwards * 5
        assert done.stats.model_steps == forwards * 5


def _cleared(decoder: Decoder) -> Decoder:
    decoder.engine.tree.clear()
    return decoder


# ---- company ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["two", "lora"])
@pytest.mark.parametrize("count", [24, pytest.param(500, marks=pytest.mark.slow)])
def test_an_answer_depends_on_its_own_request_only(kind: str, count: int, request: pytest.FixtureRequest) -> None:
    """In exact mode: not on the requests beside it, nor on their weights."""
    decoder: Decoder = request.getfixturevalue(kind)
    assert decoder.exact == "rows"
    choose = np.random.default_rng(0)
    prompts = [random_tokens(int(choose.integers(1, 14)), int(choose.integers(6))) for _ in range(count)]
    policies = [_any_policy(choose) for _ in range(count)]
    options: dict[str, Any] = {"max_new_tokens": 8}
    together = decoder.generate(prompts, policy=policies, seed=range(count), **options)
    for i in range(count):
        _cleared(decoder)
        (alone,) = decoder.generate([prompts[i]], policy=policies[i], seed=i, **options)
        assert alone.token_ids == together[i].token_ids
        assert alone.mixture == together[i].mixture


def _any_policy(choose: np.random.Generator) -> Policy:
    kinds: list[Callable[[], DeRa]] = [
        lambda: DeRa(0.0),
        lambda: DeRa(1.0),
        lambda: DeRa(float(choose.uniform(0, 2))),
        lambda: DeRa(float(choose.uniform(0, 2)), stats=True),
        lambda: DeRa.target_kl(0.1),
        lambda: DeRa(1.5, plausibility=0.1),
    ]
    return Policy(dera=kinds[int(choose.integers(len(kinds)))]())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama"])
def test_rows_of_an_adapter_keep_their_bits_in_company(family: str, tmp_path: Path) -> None:
    """Run by transformers' modules, of ranks narrow and wide, one row or several."""
    reference = stock_copy(reference_model(family))
    decoder = pair(reference, adapters=[write_adapter(tmp_path / "four", reference, rank=4)])
    decoder.engine.runner.fused = None
    assert decoder.exact == "rows"
    policies = [dera(w, stats=True) for w in (0.0, 0.5, 1.0, 1.5)]
    together = decoder.generate(PROMPTS, policy=policies, seed=range(4), max_new_tokens=8)
    for i, whole in enumerate(together):
        _cleared(decoder)
        (alone,) = decoder.generate([PROMPTS[i]], policy=policies[i], seed=i, max_new_tokens=8)
        assert (alone.token_ids, alone.mixture) == (whole.token_ids, whole.mixture)


def test_counters_do_not_depend_on_company_either(
    two: Decoder, reference: PreTrainedModel, aligned: PreTrainedModel
) -> None:
    search = Sampling(ignore_eos=True)
    alone = answers(_cleared(two), dera(0.0), search=search, max_new_tokens=5)
    beside = answers(_cleared(two), [dera(w) for w in (0.0, 1.0, 0.0, 0.5)], search=search, max_new_tokens=5)
    assert [c.stats.model_steps for c in beside] == [5, 5, 5, 10]
    assert [c.stats.model_steps for c in alone] == [5] * 4
    three = pair(reference, aligned, aligned_model(reference, seed=5))
    (done,) = three.generate([PROMPTS[0]], policy=dera(0.3, 0.4), search=search, max_new_tokens=5)
    assert done.stats.tokens_processed == 3 * (len(PROMPTS[0]) + 4)  # the last token is not run


def test_one_text_under_many_policies_is_few_nodes(two: Decoder) -> None:
    """A chain that follows another one with more models is filled token by token, and is one run all the same."""
    search = Sampling.greedy(ignore_eos=True, stop_token_ids=())
    text = random_tokens(40, 3)
    for policies in ([dera(0.0), dera(1e-30)], [dera(1e-30), dera(0.0)], [dera(0.0), dera(1.0)]):
        _cleared(two)
        done = two.generate([text] * 2, search=search, policy=policies, max_new_tokens=30)
        nodes = [node for node in two.engine.tree.nodes() if node.tokens]
        assert len(nodes) <= 4 + 2 * (done[0].token_ids != done[1].token_ids)


def test_a_run_of_one_model_is_no_run_of_two(two: Decoder) -> None:
    """A path that one model alone went on with, met again by both."""
    start = PROMPTS[0]
    two.generate([start], policy=dera(0.5), max_new_tokens=1)
    (done,) = two.generate([start], policy=dera(0.0), max_new_tokens=8, search=Sampling.greedy(ignore_eos=True))
    longer = [*start, *done.token_ids[:5]]
    (met,) = two.generate([longer], policy=dera(0.001, stats=True), max_new_tokens=2)
    _cleared(two)
    (fresh,) = two.generate([longer], policy=dera(0.001, stats=True), max_new_tokens=2)
    assert met.mixture == fresh.mixture


def test_a_small_pool_only_costs_time(reference: PreTrainedModel, aligned: PreTrainedModel) -> None:
    prompts = [random_tokens(20, seed) for seed in range(8)]
    weights = [0.0, 0.5, 1.0, 1.5] * 2
    options: dict[str, Any] = {"policy": [dera(w) for w in weights], "seed": range(8), "max_new_tokens": 12}
    expected = [c.token_ids for c in pair(reference, aligned).generate(prompts, **options)]
    small = pair(reference, aligned, kv_tokens=70)
    assert [c.token_ids for c in small.generate(prompts, **options)] == expected
    assert small.engine.tree.num_evicted > 0


def test_padded_exact_mode_holds_for_mixtures(
    reference: PreTrainedModel, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raindecode.engine import loader

    verdicts = iter([False, True])
    monkeypatch.setattr(loader, "rows_are_invariant", lambda engine: next(verdicts))
    decoder = pair(reference, adapters=[folder])
    assert decoder.exact == "padded"
    rows: set[int] = set()
    inner = decoder.engine.runner.forward_parts

    def watched(parts: Any, wanted: Any) -> Any:
        rows.add(sum(part.batch.num_rows for part in parts))
        return inner(parts, wanted)

    monkeypatch.setattr(decoder.engine.runner, "forward_parts", watched)
    answers(decoder, [dera(0.5), dera(0.0), dera(1.0), dera(0.7)])
    assert rows == {64}


# ---- errors -----------------------------------------------------------------------------------------------------------
def bad_settings() -> list[tuple[str, Callable[[Decoder], Any], str]]:
    return [
        ("nan", lambda d: DeRa(float("nan")), "allowed: a number from -1000"),
        ("infinite", lambda d: DeRa([0.5, float("inf")]), "allowed: a number"),
        ("text", lambda d: DeRa("0.5"), "allowed: a number"),  # type: ignore[arg-type]
        ("a bool", lambda d: DeRa(True), "allowed: a number"),
        ("none", lambda d: DeRa([]), "allowed: a number"),
        ("huge", lambda d: DeRa(1e300), "allowed: a number"),
        ("negative", lambda d: DeRa(-0.1), "allow_negative=True"),
        ("too many models", lambda d: DeRa([0.1] * 8), "up to 7"),
        ("plausibility", lambda d: DeRa(1.0, plausibility=1.5), "0 \\(off\\) to 1"),
        ("plausibility model", lambda d: DeRa(1.0, plausibility_model=-1), "0 for the reference"),
        ("model of another decoder", lambda d: answers(d, dera(0.5, plausibility=0.1, plausibility_model=2)), "0 to 1"),
        ("divergence", lambda d: DeRa.target_kl(0.0), "above 0"),
        ("largest weight", lambda d: DeRa.target_kl(0.1, max_weight=-1.0), "max_weight"),
        ("weight and divergence", lambda d: DeRa(0.3, kl=0.1), "give one of them"),
        (
            "a bare name",
            lambda d: Decoder(d.engine.runner.model, byte_tokenizer(), adapters="nowhere"),
            "list of strings",
        ),
        ("nine models", lambda d: Decoder(d.engine.runner.model, byte_tokenizer(), adapters=["x"] * 8), "up to 7"),
        ("length", lambda d: answers(d, dera(0.5, 0.5)), "2 DeRa weights were given for 1 aligned"),
        ("no policy", lambda d: answers(d, [dera(0.5), 0.5, dera(1.0), dera(1.0)]), "give a Policy"),  # type: ignore[list-item]
        ("policies", lambda d: answers(d, [dera(0.5)] * 3), "3 policies were given for 4 prompts"),
        ("no DeRa", lambda d: Policy(dera=0.5), "give DeRa"),  # type: ignore[arg-type]
        ("no format", lambda d: Policy(prompt="hello"), "give a ChatFormat"),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize(("case", "use", "says"), bad_settings(), ids=[case for case, *_ in bad_settings()])
def test_bad_settings_are_refused_before_anything_runs(two: Decoder, case: str, use: Any, says: str) -> None:
    before = two.engine.model_steps
    with pytest.raises(ConfigError, match=says):
        use(two)
    assert two.engine.model_steps == before


def test_an_aligned_model_comes_with_its_tokenizer(reference: PreTrainedModel, aligned: PreTrainedModel) -> None:
    for given in (aligned, (aligned,), (byte_tokenizer(), aligned)):
        with pytest.raises(ModelError, match="give pairs"):
            Decoder(copy.deepcopy(reference), byte_tokenizer(), aligned=[given])  # type: ignore[list-item]


def test_one_model_cannot_be_mixed(reference: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="holds one model only"):
        answers(pair(reference), dera(0.5))


def test_a_divergence_is_aimed_at_with_one_aligned_model(reference: PreTrainedModel, aligned: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="needs one aligned model"):
        answers(pair(reference, aligned, aligned), Policy(dera=DeRa.target_kl(0.1)))


def test_models_of_other_tokens_are_refused(reference: PreTrainedModel, aligned: PreTrainedModel) -> None:
    other = byte_tokenizer()
    other.add_tokens(["<new>"])
    with pytest.raises(VocabularyError):
        Decoder(copy.deepcopy(reference), byte_tokenizer(), aligned=[(copy.deepcopy(aligned), other)])
    narrow = aligned_model(reference)
    narrow.resize_token_embeddings(150)
    with pytest.raises(VocabularyError, match="150"):
        Decoder(copy.deepcopy(reference), byte_tokenizer(), aligned=[(narrow, byte_tokenizer())])


def test_an_answer_ends_where_its_own_models_end(reference: PreTrainedModel, aligned: PreTrainedModel) -> None:
    """Ends of text and contexts of models that take no part do not count."""
    chat, other = byte_tokenizer(), copy.deepcopy(aligned)
    chat.eos_token = "a"
    other.config.max_position_embeddings = 20
    decoder = Decoder(copy.deepcopy(reference), byte_tokenizer(), aligned=[(other, chat)], kv_tokens=500)
    (a,) = chat.convert_tokens_to_ids(["a"])
    ends = [decoder.requests([[5, 6]], policy=dera(w, stats=s))[0].eos_token_ids for w, s in _ENDS]
    assert [a in (ids or ()) for ids in ends] == [False, False, True, True]
    assert [2 in (ids or ()) for ids in ends] == [True, True, True, other.config.eos_token_id == 2]
    rooms = [decoder.requests([[5] * 12], policy=dera(w, stats=s))[0].max_new_tokens for w, s in _ENDS]
    assert [room <= 8 for room in rooms] == [False, True, True, True]
    assert decoder.context_length == 20
    long = [7] * 30
    assert len(decoder.generate([long], max_new_tokens=3, search=Sampling(ignore_eos=True))[0].token_ids) == 3
    with pytest.raises(PromptError, match="20"):
        decoder.generate([long], policy=dera(0.5))


def test_a_sweep_ends_answers_as_their_models_do(reference: PreTrainedModel, aligned: PreTrainedModel) -> None:
    chat, other = byte_tokenizer(), copy.deepcopy(aligned)
    chat.eos_token = "a"
    decoder = Decoder(copy.deepcopy(reference), byte_tokenizer(), aligned=[(other, chat)], kv_tokens=3000)
    weights = [0.0, 0.5, 1.0]
    result = decoder.sweep(PROMPTS, weights, max_new_tokens=60)
    for weight, point in zip(weights, result.points, strict=True):
        alone = decoder.generate(PROMPTS, policy=dera(weight, stats=True), seed=range(4), max_new_tokens=60)
        assert [c.token_ids for c in point.answers] == [c.token_ids for c in alone]
    other.config.max_position_embeddings = 12
    with pytest.raises(PromptError, match="the context of the models that answer it 12"):
        decoder.sweep([[5] * 14], weights)


def test_padding_that_a_model_draws_ends_its_own_request_only(
    reference: PreTrainedModel, aligned: PreTrainedModel
) -> None:
    """A model alone draws from its whole row; the others have no such token to be measured at, or to run."""
    loud = copy.deepcopy(aligned)
    rows = loud.get_output_embeddings().weight.shape[0]
    loud.resize_token_embeddings(280, mean_resizing=False)
    loud.get_output_embeddings().weight.data[rows:] *= 50
    decoder = pair(reference, loud)
    policies = [dera(1.0, stats=True), dera(0.5), dera(0.0, stats=True), dera(0.5, stats=True)]
    done = answers(decoder, policies, errors="return", max_new_tokens=40, search=Sampling(ignore_eos=True))
    assert isinstance(done[0], NumericError)
    assert "padding" in str(done[0])
    assert [len(c.token_ids) for c in done[1:]] == [40] * 3


_ENDS = [(0.0, False), (0.0, True), (0.5, False), (1.0, False)]  # weight, statistics


def test_nan_in_one_model_ends_only_the_requests_it_serves(
    reference: PreTrainedModel, aligned: PreTrainedModel
) -> None:
    sick = copy.deepcopy(aligned)
    decoder = pair(reference, sick)
    healthy = told(answers(decoder, dera(0.0)))
    _cleared(decoder)
    poison = PROMPTS[2][-1]
    decoder.engine.runners[1].model.get_input_embeddings().weight.data[poison] = torch.nan
    weights = [0.0, 0.5, 0.5, 0.0]
    done = decoder.generate(
        PROMPTS, policy=[dera(w) for w in weights], seed=range(4), max_new_tokens=10, errors="return"
    )
    assert isinstance(done[2], RainDecodeError)
    assert told([done[0], done[3]]) == [healthy[0], healthy[3]]
