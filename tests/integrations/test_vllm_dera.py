"""DeRa's logits processor over both of vLLM's calling sequences, by stand-ins: no vLLM is needed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from town_pair import load, tokenizer
from vllm_stand_ins import ONE_WAY, SWAP, FirstRunner, SecondRunner, Text, params

from raindecode import testbed
from raindecode.errors import ConfigError, RainDecodeError, VocabularyError
from raindecode.integrations.second_model import SecondModel, SecondSettings
from raindecode.integrations.vllm_dera import DeRaProcessor

WIDTH, LONGEST = 1088, 96


@pytest.fixture(scope="module")
def stock() -> Any:
    return load(testbed.WEIGHTS)


def second_model(settings: SecondSettings | None = None, **options: Any) -> SecondModel:
    options = {"longest": LONGEST, "most_requests": 6, "device": "cpu", "dtype": torch.float32} | options
    return SecondModel.load(
        settings or SecondSettings(reference="testbed"), served_tokenizer=tokenizer(), served_width=WIDTH,
        served_name="served", **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shared() -> SecondModel:
    return second_model()


@pytest.fixture
def second(shared: SecondModel) -> Iterator[SecondModel]:
    yield shared
    shared.close()


def first_runner(second: SecondModel) -> DeRaProcessor:
    return DeRaProcessor(None, torch.device("cpu"), False, second=second)


def reference_rows(stock: Any, tokens: list[int], last: int = 1) -> torch.Tensor:
    with torch.inference_mode():
        return stock(torch.tensor([tokens]), use_cache=False).logits[0, -last:].clone()


def mixed(stock: Any, tokens: list[int], served: torch.Tensor, weight: float, last: int = 1) -> torch.Tensor:
    ref = reference_rows(stock, tokens, last).double()
    return (ref + weight * (served.double() - ref)).float()


def close(got: torch.Tensor, expected: torch.Tensor, weight: float = 1.0) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=5e-4 * max(1.0, abs(weight)))


def some_text(rng: random.Random, *, weights: tuple[float | None, ...] = (None, 0.0, 0.5, 1.0, 2.0)) -> Text:
    return Text([rng.randrange(3, 1000) for _ in range(rng.randrange(1, 30))], rng.choice(weights))


# ---- first runner -----------------------------------------------------------------------------------------------------
def test_a_random_course_of_the_first_runner(second: SecondModel, stock: Any) -> None:
    """Requests come, leave, fill holes, move and swap; every row is mixed with its own request's λ and text, or untouched."""
    rng = random.Random(7)
    torch.manual_seed(0)
    processor = first_runner(second)
    runner = FirstRunner(processor, rng)
    kinds = set()
    for _ in range(25):
        size = len(runner.batch)
        leaving = [i for i in range(size) if rng.random() < 0.25]
        coming = [some_text(rng) for _ in range(rng.randrange(0, 3)) if size - len(leaving) < 5]
        logits = runner.step(coming, leaving, WIDTH, swap=rng.random() < 0.4)
        served = logits.clone()
        out = processor.apply(logits)
        for row, text in enumerate(runner.batch):
            kinds.add(text.weight)
            if text.weight in (None, 1.0):
                assert torch.equal(out[row], served[row])
            else:
                close(out[row], mixed(stock, text.tokens, served[row], text.weight)[0], text.weight)
            text.output.append(rng.randrange(3, 1000))
        assert second.engine.tree.num_cursors == sum(text.weight not in (None, 1.0) for text in runner.batch)
    assert kinds == {None, 0.0, 0.5, 1.0, 2.0}


def test_a_new_request_takes_an_index_that_was_not_given_back(second: SecondModel, stock: Any) -> None:
    processor = first_runner(second)
    old, new = Text([5, 6, 7], 0.5), Text([8, 9], 2.0)
    for text in (old, new):
        added = [(0, params(text.weight), text.prompt, text.output)]
        processor.update_state(SimpleNamespace(batch_size=1, removed=[], added=added, moved=[]))
    served = torch.randn(1, WIDTH)
    close(processor.apply(served.clone()), mixed(stock, new.tokens, served, 2.0), 2.0)
    assert second.engine.tree.num_cursors == 1


def test_moves_of_the_first_runner(second: SecondModel, stock: Any) -> None:
    """One way onto a request that is mixed ends that one; a swap with a row that is not mixed moves one request only."""
    processor = first_runner(second)
    texts = [Text([5], 0.5), Text([6, 7], 2.0), Text([8], None)]
    added = [(i, params(text.weight), text.prompt, text.output) for i, text in enumerate(texts)]
    processor.update_state(SimpleNamespace(batch_size=3, removed=[], added=added, moved=[]))
    processor.update_state(SimpleNamespace(batch_size=3, removed=[], added=[], moved=[(1, 2, SWAP)]))
    served = torch.randn(3, WIDTH)
    out = processor.apply(served.clone())
    assert torch.equal(out[1], served[1])
    close(out[2], mixed(stock, [6, 7], served[2], 2.0)[0], 2.0)
    processor.update_state(SimpleNamespace(batch_size=2, removed=[], added=[], moved=[(2, 0, ONE_WAY)]))
    out = processor.apply(served[:2].clone())
    close(out[0], mixed(stock, [6, 7], served[0], 2.0)[0], 2.0)
    assert torch.equal(out[1], served[1])
    processor.update_state(None)
    processor.update_state(SimpleNamespace(batch_size=0, removed=[1, 0], added=[], moved=[]))
    assert second.engine.tree.num_cursors == 0
    assert torch.equal(processor.apply(served.clone()), served)


def test_a_resumed_request_comes_with_what_it_wrote(second: SecondModel, stock: Any) -> None:
    processor = first_runner(second)
    text = Text([5, 6], 0.5, [9, 10, 11])
    processor.update_state(
        SimpleNamespace(batch_size=1, removed=[], added=[(0, params(0.5), text.prompt, text.output)], moved=[])
    )
    for token in (12, 13):
        served = torch.randn(1, WIDTH)
        close(processor.apply(served.clone()), mixed(stock, text.tokens, served, 0.5))
        text.output.append(token)
    text.output.append(-1)
    with pytest.raises(RainDecodeError, match="has not sampled yet"):
        processor.apply(torch.randn(1, WIDTH))


def test_a_request_of_embeddings_is_no_text(second: SecondModel) -> None:
    with pytest.raises(RainDecodeError, match="no prompt tokens"):
        first_runner(second).update_state(
            SimpleNamespace(batch_size=1, removed=[], added=[(0, params(0.5), None, [])], moved=[])
        )


# ---- Model Runner V2 --------------------------------------------------------------------------------------------------
def test_a_random_course_of_the_second_runner(second: SecondModel, stock: Any) -> None:
    """Slots are recycled without notice, rows shuffled, draft tokens accepted in part, prompts read in parts."""
    rng = random.Random(3)
    torch.manual_seed(0)
    runner = SecondRunner(4, LONGEST, WIDTH)
    processor = DeRaProcessor(None, runner.state, second=second)
    partial = 0
    for _ in range(30):
        for slot in [slot for slot in runner.texts if rng.random() < 0.15]:
            runner.remove(slot)
        while runner.free and rng.random() < 0.6:
            text = some_text(rng)
            slot, changes = runner.add(processor, text)
            assert changes == (text.weight not in (None, 1.0))
        rows, wanted = [], []
        for slot, text in runner.texts.items():
            last = len(text.tokens) - 1
            if not text.output and last > 3 and rng.random() < 0.3:  # a part of the prompt only
                rows.append((slot, 0, last - 2, text.tokens[last - 2]))
                wanted.append((text, None, 0))
                partial += 1
                continue
            drafts = [rng.randrange(3, 1000) for _ in range(rng.randrange(0, 4))] if text.output else []
            for local, token in enumerate([text.tokens[-1], *drafts]):
                rows.append((slot, local, last + local, token))
                wanted.append((text, drafts, local))
        if not rows:
            continue
        order = rng.sample(range(len(rows)), len(rows))
        rows, wanted = [rows[i] for i in order], [wanted[i] for i in order]
        served = torch.randn(len(rows), WIDTH)
        out = processor.apply(served.clone(), runner.context(rows))
        for row, (text, drafts, local) in enumerate(wanted):
            if text.weight in (None, 1.0) or drafts is None:
                assert torch.equal(out[row], served[row])
            else:
                path = text.tokens + drafts[:local]
                close(out[row], mixed(stock, path, served[row], text.weight)[0], text.weight)
        for slot, text in runner.texts.items():
            drafts = next((d for t, d, _ in wanted if t is text), None)
            if drafts is not None:  # some of the drafts are accepted, and a token is drawn
                text.output += [*drafts[: rng.randrange(0, len(drafts) + 1)], rng.randrange(3, 1000)]
                runner.write(slot)
    assert partial > 2
    processor.close()
    assert second.engine.tree.num_cursors == 0


def test_a_step_without_rows_to_mix_reads_nothing(second: SecondModel) -> None:
    runner = SecondRunner(2, LONGEST, WIDTH)
    processor = DeRaProcessor(None, runner.state, second=second)
    runner.add(processor, Text([4, 5], 0.5))
    other, _ = runner.add(processor, Text([4, 5], None))
    before, served = second.engine.model_steps, torch.randn(1, WIDTH)
    assert torch.equal(processor.apply(served.clone(), runner.context([(other, 0, 1, 5)])), served)
    assert second.engine.model_steps == before
    processor.close()


# ---- the second model -------------------------------------------------------------------------------------------------
def test_all_rows_of_a_step_share_one_forward(second: SecondModel) -> None:
    processor = first_runner(second)
    texts = [Text([5, i + 3, 7], 0.5) for i in range(5)]
    added = [(i, params(0.5), text.prompt, text.output) for i, text in enumerate(texts)]
    processor.update_state(SimpleNamespace(batch_size=5, removed=[], added=added, moved=[]))
    for _ in range(3):
        before = second.engine.model_steps
        processor.apply(torch.randn(5, WIDTH))
        assert second.engine.model_steps == before + 1
        for text in texts:
            text.output.append(9)


def test_a_full_kv_pool_costs_time_and_no_answer(stock: Any) -> None:
    """The pool holds one request of the longest kind; four of two thirds of it each are mixed all the same."""
    second = second_model(SecondSettings(reference="testbed", kv_tokens=LONGEST))
    processor, rng = first_runner(second), random.Random(1)
    texts = [Text([rng.randrange(3, 1000) for _ in range(64)], 0.5) for _ in range(4)]
    added = [(i, params(0.5), text.prompt, text.output) for i, text in enumerate(texts)]
    processor.update_state(SimpleNamespace(batch_size=4, removed=[], added=added, moved=[]))
    for step in range(3):
        served = torch.randn(4, WIDTH)
        out = processor.apply(served.clone())
        for row, text in enumerate(texts):
            close(out[row], mixed(stock, text.tokens, served[row], 0.5)[0])
            text.output.append(20 + step)
    assert second.engine.tree.num_slots <= LONGEST + 1
    processor.close()


@pytest.mark.parametrize("weight", [0.5, 1.0, 0.0])
def test_the_reference_may_be_the_one_that_is_served(weight: float) -> None:
    second = second_model(SecondSettings(aligned="testbed", adapter="testbed"))
    processor = first_runner(second)
    processor.update_state(
        SimpleNamespace(batch_size=1, removed=[], added=[(0, params(weight), [5, 6, 7], [])], moved=[])
    )
    served = torch.randn(1, WIDTH)
    out = processor.apply(served.clone())
    follower = second.follow()
    follower.extend([5, 6, 7])
    aligned = second.logits([(follower, ())])
    close(out, served + weight * (aligned - served))
    assert torch.equal(out, served) == (weight == 0)
    second.close()
    processor.close()


# ---- starting ---------------------------------------------------------------------------------------------------------
def config(additional: object = None, **changes: Any) -> Any:
    """A VllmConfig over the embedded model."""
    model = {
        "model": str(testbed.WEIGHTS), "tokenizer": str(testbed.WEIGHTS), "tokenizer_revision": None, "trust_remote_code": False,
        "is_multimodal_model": False, "enable_prompt_embeds": False, "skip_tokenizer_init": False, "max_model_len": LONGEST,
        "dtype": torch.float32, "get_vocab_size": lambda: WIDTH,
    }  # fmt: skip
    return SimpleNamespace(
        additional_config=additional if additional is not None else {}, speculative_config=None,
        model_config=SimpleNamespace(**(model | changes)), scheduler_config=SimpleNamespace(max_num_seqs=2),
    )  # fmt: skip


def start(given: Any) -> DeRaProcessor:
    return DeRaProcessor(given, torch.device("cpu"), False)


def test_what_to_mix_with_comes_from_the_config_or_the_environment(monkeypatch: pytest.MonkeyPatch, stock: Any) -> None:
    monkeypatch.setenv("RAINDECODE_VLLM", '{"reference": "nowhere at all"}')
    text = [5, 6, 7]
    for given in ({"raindecode": {"reference": "testbed"}}, {}):
        processor = start(config(given))
        processor.update_state(SimpleNamespace(batch_size=1, removed=[], added=[(0, params(0.5), text, [])], moved=[]))
        served = torch.randn(1, WIDTH)
        close(processor.apply(served.clone()), mixed(stock, text, served, 0.5))
        processor.close()
        monkeypatch.setenv("RAINDECODE_VLLM", '{"reference": "testbed"}')


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "not told which model"),
        ({"raindecode": {}}, "one of its two names"),
        ({"raindecode": "base"}, "give an object with reference"),
        ({"raindecode": {"reference": "testbed", "aligned": "testbed"}}, "one of its two names"),
        ({"raindecode": {"refrence": "testbed"}}, "hold refrence; allowed: reference, aligned"),
        ({"raindecode": {"reference": 3}}, "raindecode.reference is 3"),
        ({"raindecode": {"reference": "testbed", "adapter": "testbed"}}, "adapter belongs to 'aligned'"),
        ({"raindecode": {"reference": "testbed", "kv_tokens": 5}}, "kv_tokens is 5; allowed: 96"),
        ({"raindecode": {"reference": "testbed", "kv_tokens": 0}}, "kv_tokens is 0"),
        ({"raindecode": {"reference": "testbed", "dtype": "int8"}}, "dtype is 'int8'; allowed: float32"),
        ({"raindecode": {"reference": "testbed", "trust_remote_code": "yes"}}, "allowed: true or false"),
    ],
)
def test_settings_that_are_not_allowed(given: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAINDECODE_VLLM", raising=False)
    with pytest.raises(ConfigError, match=message):
        start(config(given))


@pytest.mark.parametrize("value", ["not json", "[1]"])
def test_an_environment_variable_that_is_no_object(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAINDECODE_VLLM", value)
    with pytest.raises(ConfigError, match="RAINDECODE_VLLM="):
        start(config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_multimodal_model": True}, "reads more than text"),
        ({"enable_prompt_embeds": True}, "prompts of embeddings"),
        ({"max_model_len": 4096}, "reads at most 1024 tokens, requests may have 4096"),
        ({"skip_tokenizer_init": True, "get_vocab_size": lambda: WIDTH + 1}, "no tokenizer says which ids"),
    ],
)
def test_a_server_whose_requests_could_not_be_followed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start(config({"raindecode": {"reference": "testbed"}}, **changes))


def test_another_tokenizer_is_refused(tmp_path: Any) -> None:
    other = tokenizer()
    other.add_tokens(["entirely new"])
    other.save_pretrained(tmp_path)
    with pytest.raises(VocabularyError, match="entirely new"):
        start(config({"raindecode": {"reference": "testbed"}}, tokenizer=str(tmp_path)))
