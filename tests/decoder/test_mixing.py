"""What is measured of a mixture, the weight a divergence leads to, and the correction from tokens to sequences."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from aligned_models import aligned_model, dera, merged, mixed_logits, pair, reference_model, stock_logits, write_adapter
from models import random_tokens, stock_copy
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from raindecode.decoder import Decoder
from raindecode.engine.logit_rows import KeptRows, LogitRow, Logits, stacked
from raindecode.engine.mixing import measure, plausible_row, weight_for_kl
from raindecode.errors import NumericError
from raindecode.mixture import Measured, Mix
from raindecode.policy.dera import DeRa
from raindecode.policy.policy import Policy
from raindecode.search.sampling import Sampling
from raindecode.types import Completion

PROMPTS = [random_tokens(7, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def models() -> list[PreTrainedModel]:
    reference = stock_copy(reference_model())
    return [reference, aligned_model(reference)]


@pytest.fixture(scope="module")
def decoder(models: list[PreTrainedModel]) -> Decoder:
    return pair(*models)


def log_softmax(row: Any) -> Any:
    return row - row.max() - math.log(np.exp(row - row.max()).sum())


def expected(models: list[PreTrainedModel], weight: float, path: list[int], token: int) -> Measured:
    """The statistics in double precision, from plain transformers."""
    logs = [log_softmax(row) for row in stock_logits(models, path)]
    unnormalised = (1 - weight) * logs[0] + weight * logs[1]
    log_z = float(np.log(np.exp(unnormalised).sum()))
    mixture = unnormalised - log_z
    return Measured(
        weights=(1 - weight, weight),
        logprob_models=tuple(float(one[token]) for one in logs),
        log_z=log_z,
        entropy=float(-(np.exp(mixture) * mixture).sum()),
        kl_models=tuple(float((np.exp(mixture) * (mixture - one)).sum()) for one in logs),
    )


def assert_measured(got: Measured, wanted: Measured) -> None:
    assert got.weights == pytest.approx(wanted.weights, abs=1e-9)
    for name in ("logprob_models", "log_z", "entropy", "kl_models"):
        assert getattr(got, name) == pytest.approx(getattr(wanted, name), abs=2e-5, rel=2e-5), name


# ---- statistics -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0, 2.5])
@pytest.mark.parametrize(
    "search", [Sampling(), Sampling(temperature=0.6, top_k=20), Sampling.greedy(), Sampling(repetition_penalty=1.4)],
    ids=["plain", "filtered", "greedy", "penalised"],
)  # fmt: skip
def test_every_token_is_measured(
    decoder: Decoder, models: list[PreTrainedModel], search: Sampling, weight: float
) -> None:
    """Before temperature and filters, whatever these are; also where one model alone draws."""
    done: list[Completion] = decoder.generate(
        PROMPTS, search=search, policy=dera(weight, stats=True), max_new_tokens=4, seed=range(3)
    )
    for prompt, one in zip(PROMPTS, done, strict=True):
        assert one.mixture is not None
        path = list(prompt)
        for token, measured in zip(one.token_ids, one.mixture.tokens, strict=True):
            assert_measured(measured, expected(models, weight, path, token))
            assert measured.log_z <= 1e-6 if 0 <= weight <= 1 else measured.log_z >= -1e-6
            path.append(token)
        assert one.mixture.kl_reference == pytest.approx(sum(t.kl_models[0] for t in one.mixture.tokens))


def test_logprobs_are_those_of_the_mixture(decoder: Decoder, models: list[PreTrainedModel]) -> None:
    (done,) = decoder.generate([PROMPTS[0]], search=Sampling(logprobs=True), policy=dera(0.5), max_new_tokens=5)
    path = list(PROMPTS[0])
    for entry in done.logprobs or ():
        assert entry.logprob == pytest.approx(log_softmax(mixed_logits(models, [0.5], path))[entry.token_id], abs=1e-4)
        path.append(entry.token_id)
    assert path == [*PROMPTS[0], *done.token_ids]


def test_the_notebooks_filters_come_after_the_mixing(decoder: Decoder, models: list[PreTrainedModel]) -> None:
    """Temperature, then top-k, then top-p, on the mixed logits: every token drawn passes them."""
    search = Sampling(temperature=0.7, top_k=50, top_p=0.95, logprobs=True)
    done = decoder.generate([PROMPTS[1]] * 8, search=search, policy=dera(1.7), max_new_tokens=4, seed=range(8))
    assert len({tuple(one.token_ids) for one in done}) > 1
    for one in done:
        path = list(PROMPTS[1])
        for token in one.token_ids:
            z = mixed_logits(models, [1.7], path) / 0.7
            order = np.argsort(-z, kind="stable")[:50]
            probs = np.exp(z[order] - z[order[0]])
            kept = order[: int(np.searchsorted(np.cumsum(probs) / probs.sum(), 0.95)) + 1]
            assert token in kept
            path.append(token)


def test_what_is_implausible_is_not_drawn(decoder: Decoder, models: list[PreTrainedModel]) -> None:
    share = 0.2
    for judge in (0, 1):
        policy = dera(2.0, plausibility=share, plausibility_model=judge)
        for search in (Sampling(temperature=2.0), Sampling(temperature=2.0, repetition_penalty=1.2)):
            done = decoder.generate([PROMPTS[0]] * 6, search=search, policy=policy, max_new_tokens=3, seed=range(6))
            for one in done:
                path = list(PROMPTS[0])
                for token in one.token_ids:
                    row = stock_logits(models, path)[judge]
                    assert row[token] >= row.max() + math.log(share) - 1e-4
                    path.append(token)


def test_a_log_probability_is_the_mixtures_whatever_is_implausible(
    decoder: Decoder, models: list[PreTrainedModel]
) -> None:
    """Drawn by the fused op, and on the host."""
    for penalty in (1.0, 1.0000001):
        search = Sampling(logprobs=True, repetition_penalty=penalty)
        policy = dera(1.5, plausibility=0.3, stats=True)
        (done,) = decoder.generate([PROMPTS[0]], search=search, policy=policy, max_new_tokens=4)
        path = list(PROMPTS[0])
        for entry, measured in zip(done.logprobs or (), done.mixture.tokens, strict=True):
            assert entry.logprob == pytest.approx(
                log_softmax(mixed_logits(models, [1.5], path))[entry.token_id], abs=1e-4
            )
            assert_measured(measured, expected(models, 1.5, path, entry.token_id))
            path.append(entry.token_id)


@pytest.mark.parametrize(
    "judge", [[np.nan, 1.0, 0.0], [-np.inf] * 3, [np.inf, 0.0, 0.0]], ids=["nan", "nothing", "infinite"]
)
def test_a_row_that_judges_nothing_is_an_error(judge: list[float]) -> None:
    mixed = np.zeros(3, dtype=np.float32)
    rows = [LogitRow.of(mixed), LogitRow.of(np.array(judge, dtype=np.float32))]
    with pytest.raises(NumericError, match="maximum"):
        plausible_row(mixed, rows, Mix((0.5, 0.5), plausibility=0.5, plausibility_model=1), 3)


def test_statistics_of_tokens_drawn_elsewhere_know_no_plausibility() -> None:
    rows = [LogitRow.of(np.array(row, dtype=np.float32)) for row in ([5.0, 0, 0, 0], [-np.inf, 1, 1, 0])]
    (found,) = measure([(rows, Mix((1.0, 0.0), stats=True, plausibility=0.9, plausibility_model=1), 0)], 4)
    assert found.logprob_models == (pytest.approx(float(log_softmax(np.array([5.0, 0, 0, 0]))[0]), abs=1e-5), -np.inf)
    assert found.log_z == pytest.approx(0.0, abs=1e-6)


def test_measured_answers_are_plain_data(decoder: Decoder) -> None:
    (done,) = decoder.generate([PROMPTS[0]], policy=dera(0.5, stats=True), max_new_tokens=2)
    record = done.to_json()["mixture"]
    assert len(record["tokens"]) == len(done.token_ids)
    assert set(record["tokens"][0]) == {"weights", "logprob_models", "log_z", "entropy", "kl_models"}


# ---- sequences --------------------------------------------------------------------------------------------------------
def toy_decoder() -> tuple[Decoder, list[PreTrainedModel]]:
    words = {word: i for i, word in enumerate(["<s>", "</s>", "a", "b", "c", "d"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "a")), bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, initializer_range=0.25,
    )  # fmt: skip
    reference = stock_copy(LlamaForCausalLM(config).eval())
    other = aligned_model(reference, seed=2, size=1.7)
    twins = [stock_copy(reference), stock_copy(other)]
    return Decoder(reference, tokenizer, aligned=[(other, tokenizer)], kv_tokens=4000, max_concurrent=512), twins


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_answers_reweighted_are_drawn_from_the_mixture_of_sequences(weight: float) -> None:
    """Token by token, answers come from an approximation. Their weights correct it: exactly for each answer, and within the
    statistical error for a sample of them.
    """
    decoder, models = toy_decoder()
    length, prompt, count = 2, [2, 3], 4000
    logs: dict[tuple[int, ...], list[Any]] = {}

    def given(path: tuple[int, ...]) -> list[Any]:
        if path not in logs:
            logs[path] = [log_softmax(row) for row in stock_logits(models, [*prompt, *path])]
        return logs[path]

    sequences = list(itertools.product(range(6), repeat=length))
    exact, drawn = {}, {}
    for sequence in sequences:
        target = step = 0.0
        for i, token in enumerate(sequence):
            reference, aligned = given(sequence[:i])
            row = (1 - weight) * reference + weight * aligned
            target += row[token]
            step += log_softmax(row)[token]
        exact[sequence], drawn[sequence] = math.exp(target), math.exp(step)
    total = sum(exact.values())
    exact = {sequence: mass / total for sequence, mass in exact.items()}
    assert sum(abs(exact[s] - drawn[s]) for s in sequences) / 2 > 0.01  # there is something to correct

    search = Sampling(ignore_eos=True)
    done = decoder.generate(
        [prompt] * count, search=search, policy=dera(weight, stats=True), max_new_tokens=length, seed=range(count)
    )
    weights: dict[tuple[int, ...], list[float]] = {sequence: [] for sequence in sequences}
    for one in done:
        sequence = tuple(one.token_ids)
        assert one.mixture.log_weight == pytest.approx(sum(t.log_z for t in one.mixture.tokens), abs=1e-4)
        assert one.mixture.log_weight == pytest.approx(math.log(exact[sequence] * total / drawn[sequence]), abs=1e-3)
        weights[sequence].append(math.exp(one.mixture.log_weight))
    everything = sum(map(sum, weights.values()))
    for sequence in sequences:
        # Error of a self-normalised estimate: the ratio's linearisation.
        deviation = sum(
            (w / everything) ** 2 * (float(s == sequence) - exact[sequence]) ** 2
            for s, ws in weights.items()
            for w in ws
        )
        error = abs(sum(weights[sequence]) / everything - exact[sequence])
        assert error <= 4.5 * math.sqrt(deviation) + 3 / count


def test_filtered_answers_are_weighted_by_what_they_were_drawn_with(
    decoder: Decoder, models: list[PreTrainedModel]
) -> None:
    (done,) = decoder.generate(
        [PROMPTS[0]], search=Sampling(temperature=0.5), policy=dera(0.5, stats=True), max_new_tokens=4
    )
    path, log_weight = list(PROMPTS[0]), 0.0
    for token in done.token_ids:
        logs = [log_softmax(row) for row in stock_logits(models, path)]
        log_weight += float(0.5 * logs[0][token] + 0.5 * logs[1][token])
        log_weight -= float(log_softmax(mixed_logits(models, [0.5], path) / 0.5)[token])
        path.append(token)
    assert done.mixture.log_weight == pytest.approx(log_weight, abs=1e-3)
    (greedy,) = decoder.generate([PROMPTS[0]], search=Sampling.greedy(), policy=dera(0.5, stats=True), max_new_tokens=2)
    assert greedy.mixture.log_weight is None


# ---- divergence aimed at ----------------------------------------------------------------------------------------------
def divergence(reference: Any, aligned: Any, weight: float) -> float:
    log_p, log_q = log_softmax(reference + weight * (aligned - reference)), log_softmax(reference)
    return float((np.exp(log_p) * (log_p - log_q)).sum())


@pytest.mark.parametrize("spread", [0.01, 0.5, 3.0, 40.0])
@pytest.mark.parametrize("target", [1e-4, 0.05, 1.0])
def test_the_weight_solved_for_gives_the_divergence(spread: float, target: float) -> None:
    rng = np.random.default_rng(int(spread * 100))
    for offset in (0.0, 1e4):
        reference = (4 * rng.standard_normal(500)).astype(np.float32)
        aligned = (reference + spread * rng.standard_normal(500) + offset).astype(np.float32)
        r, a = reference.astype(np.float64), aligned.astype(np.float64)
        most = 5.0
        found = weight_for_kl(reference, aligned, target, most)
        assert 0 <= found.weight <= most
        assert found.kl == pytest.approx(divergence(r, a, found.weight), rel=1e-4, abs=1e-9)
        if divergence(r, a, most) <= target:
            assert found.weight == most
        else:
            assert found.kl == pytest.approx(target, rel=1e-4)


def test_padding_takes_no_part_in_a_divergence(models: list[PreTrainedModel]) -> None:
    """Models of one tokenizer padded to different widths, the padding loud."""
    reference, aligned = (stock_copy(model) for model in models)
    for model, width in ((reference, 272), (aligned, 280)):
        rows = model.get_output_embeddings().weight.shape[0]
        model.resize_token_embeddings(width, mean_resizing=False)
        model.get_output_embeddings().weight.data[rows:] *= 50
    wide = pair(reference, aligned)
    done = wide.generate(PROMPTS, policy=Policy(dera=DeRa.target_kl(0.05)), max_new_tokens=4, seed=range(3))
    tokens = [token for one in done for token in one.mixture.tokens]
    assert all(t.kl_models[0] == pytest.approx(0.05, rel=1e-3) or t.weights[1] == 2.0 for t in tokens)
    assert all(token < 267 for one in done for token in one.token_ids)


def test_tokens_the_aligned_model_rules_out_count_in_the_divergence() -> None:
    reference = np.array([1.0, 0.5, 0.0, 0.2, 2.0], dtype=np.float32)
    aligned = np.array([3.0, -1.0, 0.0, 0.4, -np.inf], dtype=np.float32)
    found = weight_for_kl(reference, aligned, 1.0, 5.0)
    z = (reference + found.weight * (aligned - reference))[:4].astype(np.float64)
    log_p = log_softmax(z)
    assert float((np.exp(log_p) * (log_p - log_softmax(reference.astype(np.float64))[:4])).sum()) == pytest.approx(
        1.0, rel=1e-4
    )


def test_rows_that_say_nothing_lead_to_a_bounded_weight() -> None:
    row = np.array([1.0, 2.0, -np.inf, 0.5], dtype=np.float32)
    assert weight_for_kl(row, row + 3, 0.1, 2.0).weight == 2.0  # equal distributions: no weight gives more
    empty = np.full(4, -np.inf, dtype=np.float32)
    assert weight_for_kl(empty, row, 0.1, 2.0) == (0.0, 0.0) or weight_for_kl(empty, row, 0.1, 2.0).weight == 0.0
    certain = np.array([50.0, 0.0, -50.0], dtype=np.float32)
    assert weight_for_kl(certain, -certain, 0.5, 2.0).kl == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    "search", [Sampling(), Sampling.greedy(), Sampling(repetition_penalty=1.2)], ids=["drawn", "greedy", "penalised"]
)
def test_answers_keep_the_divergence_they_aim_at(decoder: Decoder, search: Sampling) -> None:
    policy = Policy(dera=DeRa.target_kl(0.08, max_weight=1.5))
    for one in decoder.generate(PROMPTS, search=search, policy=policy, max_new_tokens=6, seed=range(3)):
        for token in one.mixture.tokens:
            weight, kl = token.weights[1], token.kl_models[0]
            assert sum(token.weights) == pytest.approx(1.0)
            assert kl == pytest.approx(0.08, rel=1e-3) or (weight == 1.5 and kl < 0.08)


# ---- rows -------------------------------------------------------------------------------------------------------------
def test_rows_that_lie_together_are_not_copied() -> None:
    there = Logits(torch.arange(20, dtype=torch.float32).view(4, 5))
    cpu = torch.device("cpu")
    rows = [LogitRow(there, i) for i in (1, 2)]
    assert stacked(rows, cpu, 5).data_ptr() == there.there[1].data_ptr()
    assert stacked(rows, cpu, 3).tolist() == there.there[[1, 2], :3].tolist()
    assert stacked(rows[::-1], cpu, 5).tolist() == there.there[[2, 1]].tolist()
    half = LogitRow(Logits(there.there.bfloat16()), 3)
    mixed = stacked([rows[0], half], cpu, 5)
    assert mixed.dtype == torch.float32
    assert mixed.tolist() == there.there[[1, 3]].tolist()


def test_kept_rows_are_copies_by_path_and_model() -> None:
    kept = KeptRows(num_slots=8)
    there = Logits(torch.tensor([[1.0] * 4, [2.0] * 4, [3.0] * 4]))
    kept.add(7, 0, LogitRow(there, 0))
    kept.add(7, 1, LogitRow(there, 1))
    there.there.zero_()
    assert kept.get(7, 0) is not None
    assert kept.get(7, 0).host.tolist() == [1.0] * 4  # type: ignore[union-attr]
    assert kept.get(7, 1).host.tolist() == [2.0] * 4  # type: ignore[union-attr]
    assert kept.get(8, 0) is None
    kept.add(9, 0, LogitRow(there, 2))  # two rows at most
    assert kept.get(7, 0) is None
    assert (len(kept), kept.num_bytes) == (2, 32)


def test_an_adapters_statistics_are_those_of_its_merged_model(models: list[PreTrainedModel], tmp_path: Any) -> None:
    folder = write_adapter(tmp_path, models[0])
    decoder, both = pair(models[0], adapters=[folder]), [models[0], merged(models[0], folder)]
    (done,) = decoder.generate([PROMPTS[0]], policy=dera(0.8, stats=True), max_new_tokens=3)
    path = list(PROMPTS[0])
    for token, measured in zip(done.token_ids, done.mixture.tokens, strict=True):
        wanted = expected(both, 0.8, path, token)
        assert measured.kl_models == pytest.approx(wanted.kl_models, abs=1e-4, rel=1e-3)
        path.append(token)
