"""The baselines of benchmarks/naive: same answers as raindecode's RAIN, and counters that count what ran."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "decoder")]

from fake_lm import TEMPLATE, PieceTokenizer, hashed_scores, hashed_vectors, random_llama, random_rain  # noqa: E402
from naive.common import Result, make_codec, make_request  # noqa: E402
from naive.oracle import Recording  # noqa: E402
from naive.published import Published  # noqa: E402
from naive.search import NaiveRain  # noqa: E402
from naive.strong import Strong, copied  # noqa: E402
from naive.vanilla import Vanilla  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaForCausalLM  # noqa: E402

from raindecode import testbed  # noqa: E402
from raindecode.decoder import Decoder  # noqa: E402
from raindecode.search.embedder import HiddenStates, TextEmbedder  # noqa: E402
from raindecode.search.rain import RAIN  # noqa: E402
from raindecode.search.sampling import Sampling  # noqa: E402
from raindecode.types import Completion, Request  # noqa: E402

TOWN = RAIN.preset("town")
BASELINES = pytest.mark.parametrize("baseline", [Published, Strong])
MIXED = partial(hashed_scores, "mixed", 0)
BAD = partial(hashed_scores, "bad", 0)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.from_pretrained("testbed", device="cpu")


@pytest.fixture(scope="module")
def stock() -> Any:
    """The testbed's model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(testbed.WEIGHTS, dtype=torch.float32)


@pytest.fixture(scope="module")
def codec(stock: Any) -> Any:
    return make_codec(stock, AutoTokenizer.from_pretrained(testbed.WEIGHTS))


class Calls:
    """What a model is really called with, seen by a hook of its own."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.forwards = self.tokens = 0
        self._hook = model.base_model.register_forward_pre_hook(self._seen, with_kwargs=True)

    def _seen(self, _module: object, _args: object, options: dict[str, Any]) -> None:
        self.forwards += 1
        self.tokens += options["input_ids"].numel()

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def assert_same(result: Result, done: Completion) -> None:
    """Answer, iterations and verdicts."""
    assert result.token_ids == done.token_ids
    assert (result.text, result.finish_reason) == (done.text, done.finish_reason)
    assert (result.iterations, result.evaluations) == (done.stats.iterations, done.stats.evaluations)
    assert result.value == (None if done.value is None else pytest.approx(done.value, abs=1e-5))


def run(search: NaiveRain | Vanilla, request: Request) -> Result:
    """An answer whose counters are those of the model's own hook."""
    with Calls(search.model) as calls:
        result = search.answer(request)
    assert (result.model_steps, result.tokens_processed) == (calls.forwards, calls.tokens)
    assert set(result.meter.seconds) == {"generate", "evaluate", "embed", "select"}
    assert result.seconds >= sum(result.meter.model_seconds.values()) > 0
    return result


# ---- the testbed ------------------------------------------------------------------------------------------------------
CASES: dict[str, RAIN] = {
    "town": TOWN,
    "adv": replace(TOWN, max_tries=19, dynamic_tries=3, expansion_temperature=2.0, min_visits=5),
    "truth": replace(TOWN, rollout_stop="", min_visits=16, keep_after_last=".", max_iterations=25),
    "text embedder": replace(TOWN, embedder=TextEmbedder(partial(hashed_vectors, spread=0.05), 8), max_iterations=25),
    "no embedder": replace(TOWN, embedder=None),
    "bad verdicts": replace(
        TOWN, evaluator=BAD, embedder=HiddenStates(center=False), first_top_k=3, max_iterations=20, set_lengths=(1, 2)
    ),
}


# Without a shared cache these two take half a minute; the strong baseline runs them always.
_LONG = {(Published, "truth"), (Published, "bad verdicts")}


@pytest.mark.parametrize(
    ("baseline", "name"),
    [
        pytest.param(baseline, name, marks=[pytest.mark.slow] if (baseline, name) in _LONG else [])
        for baseline in (Published, Strong)
        for name in CASES
    ],
)
def test_same_answer_as_raindecode_on_the_testbed(
    baseline: type[NaiveRain], name: str, decoder: Decoder, stock: Any, codec: Any
) -> None:
    rain = CASES[name]
    search = baseline(stock, codec, rain)
    for seed, harmful in enumerate((True, False) if name == "town" else (True,)):
        (asked,) = testbed.sample_requests(1, harmful=harmful, seed=seed)
        (done,) = decoder.generate(asked.text, search=rain, seed=seed, max_new_tokens=24)
        request = make_request(asked.text, codec, rain.format, seed=seed, max_new_tokens=24)
        (theirs,) = decoder.requests(asked.text, search=rain, seed=seed, max_new_tokens=24)
        assert request == replace(theirs, constant=0)  # baselines pin nothing
        assert_same(run(search, request), done)


@pytest.mark.parametrize("seed", range(3))
def test_vanilla_samples_as_raindecode_does(seed: int, decoder: Decoder, stock: Any, codec: Any) -> None:
    (asked,) = testbed.sample_requests(1, seed=seed)
    (done,) = decoder.generate(asked.text, search=Sampling(), seed=seed, max_new_tokens=30)
    request = make_request(asked.text, codec, decoder.format, seed=seed, max_new_tokens=30)
    result = run(Vanilla(stock, codec), request)
    assert (result.token_ids, result.text, result.finish_reason) == (done.token_ids, done.text, done.finish_reason)
    assert result.model_steps == len(result.token_ids)
    assert result.tokens_processed == len(request.prompt_ids) + len(result.token_ids) - 1


def test_vanilla_of_a_given_length(stock: Any, codec: Any) -> None:
    result = run(Vanilla(stock, codec), make_request("Hello.", codec, TOWN.format))
    longer = run(Vanilla(stock, codec), make_request("Hello.", codec, TOWN.format))
    assert longer.token_ids == result.token_ids
    exact = Vanilla(stock, codec).answer(
        make_request("Hello.", codec, TOWN.format), num_tokens=len(result.token_ids) + 7
    )
    assert exact.token_ids[: len(result.token_ids)] == result.token_ids
    assert (len(exact.token_ids), exact.finish_reason) == (len(result.token_ids) + 7, "length")


# ---- settings by chance, on a random Llama ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def llama() -> tuple[LlamaForCausalLM, Decoder, Any]:
    model = random_llama()
    tokenizer: Any = PieceTokenizer()
    return model, Decoder(deepcopy(model), tokenizer, kv_tokens=1 << 13), make_codec(model, tokenizer)


@BASELINES
@pytest.mark.parametrize("seed", range(2000, 2012))
def test_same_answer_under_settings_by_chance(seed: int, baseline: type[NaiveRain], llama: Any) -> None:
    model, decoder, codec = llama
    rain, _, options = random_rain(seed)
    rain = replace(rain, max_iterations=min(rain.max_iterations, 12), min_new_iterations=5)
    options["max_new_tokens"] = min(options["max_new_tokens"], 14)
    (request,) = decoder.requests("H:abc, de\nA:", search=rain, **options)
    (done,) = decoder.generate("H:abc, de\nA:", search=rain, **options)
    assert_same(run(baseline(model, codec, rain), request), done)


# ---- the habits -------------------------------------------------------------------------------------------------------
def test_published_runs_the_prefix_again_for_every_chain(llama: Any) -> None:
    model, _, codec = llama
    search = Published(model, codec, RAIN(evaluator=MIXED, embedder=None))
    request = make_request("H:abc\nA:", codec, None, max_new_tokens=1)
    search.answer(request)  # the meter of a request is needed
    search.forget()
    path = tuple(request.prompt_ids)

    def lengths(*tokens: int) -> list[int]:
        """Tokens of each forward of a chain that goes through `tokens`."""
        seen: list[int] = []
        hook = model.base_model.register_forward_pre_hook(
            lambda _m, _a, options: seen.append(options["input_ids"].numel()), with_kwargs=True
        )
        with torch.inference_mode(), hook:
            walker = search.walk(path)
            walker.row()
            for token in tokens:
                walker.push(token)
                walker.row()
        return seen

    n = len(path)
    assert lengths(7, 8) == [n, 1, 1]  # a chain keeps its keys and values
    assert lengths(9, 8, 7) == [n + 1, 1, 1]  # the leaf is a hit, the second token pays
    assert lengths(7, 8, 9, 7) == [n + 3, 1]  # every hit, however deep, costs the keys and values
    assert lengths(7, 8) == []


def test_published_runs_both_orders_in_full_and_one_forward_per_level(stock: Any, codec: Any) -> None:
    request = make_request("How do I paint the fence?", codec, TOWN.format, max_new_tokens=6)
    result = run(Published(stock, codec, TOWN), request)
    assert result.meter.steps["evaluate"] == 2 * result.evaluations
    assert result.meter.tokens["embed"] > result.meter.steps["embed"] * len(request.prompt_ids)


def test_strong_runs_less_and_keeps_what_requests_share(stock: Any, codec: Any) -> None:
    request = make_request("How do I paint the fence?", codec, TOWN.format, max_new_tokens=12)
    strong = Strong(stock, codec, TOWN)
    first, second = run(strong, request), run(strong, request)
    assert first.meter.steps["evaluate"] == first.evaluations
    assert second.token_ids == first.token_ids
    assert second.tokens_processed < first.tokens_processed
    strong.clear()
    assert run(strong, request).tokens_processed == first.tokens_processed
    slow = run(Published(stock, codec, TOWN), request)
    assert slow.model_steps > 2 * first.model_steps
    assert slow.tokens_processed > 3 * first.tokens_processed


def test_a_copied_cache_owns_its_memory(llama: Any) -> None:
    model, _, _ = llama
    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=torch.tensor([[3, 4, 5]]), past_key_values=cache, use_cache=True)
        rows = copied(cache, 2, 3)
        assert rows.get_seq_length() == 2
        assert rows.layers[0].keys.shape[0] == 3
        rows.layers[0].keys.zero_()
        assert cache.layers[0].keys.abs().sum() > 0
        assert copied(DynamicCache(), 0, 2).get_seq_length() == 0


# ---- workloads --------------------------------------------------------------------------------------------------------
@BASELINES
def test_a_recorded_search_replays_on_other_weights(baseline: type[NaiveRain], llama: Any) -> None:
    model, _, codec = llama
    rain = RAIN(evaluator=TEMPLATE, max_iterations=10, min_new_iterations=4, min_visits=2)
    request = make_request("H:abc, de\nA:", codec, None, max_new_tokens=12, seed=5)
    recording = Recording()
    first = run(baseline(model, codec, rain, oracle=recording), request)
    recording.record = False
    other = deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(torch.randn_like(weight) * 0.1)
    for kind in (Published, Strong):
        again = run(kind(other, codec, rain, oracle=recording), request)
        assert (again.token_ids, again.iterations, again.value) == (first.token_ids, first.iterations, first.value)
        if kind is baseline:
            assert (again.meter.steps, again.meter.tokens) == (first.meter.steps, first.meter.tokens)
    assert run(baseline(other, codec, rain), request).token_ids != first.token_ids
    with pytest.raises(KeyError):
        Strong(other, codec, rain, oracle=Recording(record=False)).answer(request)


@BASELINES
def test_an_evaluator_of_ones_own_replaces_the_models(baseline: type[NaiveRain], llama: Any) -> None:
    model, decoder, codec = llama
    rain = RAIN(evaluator=TEMPLATE, max_iterations=10, min_new_iterations=4)
    request = make_request("H:abc, de\nA:", codec, None, max_new_tokens=10, seed=5)
    (done,) = decoder.generate("H:abc, de\nA:", search=replace(rain, evaluator=MIXED), max_new_tokens=10, seed=5)
    result = run(baseline(model, codec, rain, evaluator=MIXED), request)
    assert_same(result, done)
    assert result.meter.steps["evaluate"] == 0


def test_what_the_baselines_cannot_do_is_refused(llama: Any) -> None:
    model, _, codec = llama

    class Own:
        def evaluate(self) -> None: ...
        def dimension(self) -> None: ...

    with pytest.raises(TypeError, match="Own"):
        Strong(model, codec, RAIN(evaluator=Own()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Own"):
        Strong(model, codec, RAIN(evaluator=MIXED, embedder=Own()))  # type: ignore[arg-type]


def test_the_baselines_import_no_engine() -> None:
    for path in (ROOT / "benchmarks" / "naive").glob("*.py"):
        names = [
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        ]
        engine = {name for name in names if name.startswith("raindecode.engine")}
        assert engine <= {"raindecode.engine.rng", "raindecode.engine.sampler"}, path


def test_compare_prints_a_table_and_a_line_of_json() -> None:
    script = ROOT / "benchmarks" / "naive" / "compare.py"
    done = subprocess.run(
        [sys.executable, str(script), "--requests", "1", "--max-new-tokens", "6"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert [row["engine"] for row in record["answers"]] == ["published", "strong", "vanilla", "raindecode"]
    assert [row["same_answer"] for row in record["answers"]] == [True, True, None, None]
