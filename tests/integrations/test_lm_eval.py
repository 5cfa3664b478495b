"""lm-evaluation-harness scores tasks on local data with our engine, as its own back end does, and with what that cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("lm_eval", minversion="0.4.10", reason="lm-evaluation-harness is not installed, or an old one")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from town_tasks import CHOICES, alone, evaluate, of_choice, pairs_of, write_tasks

from raindecode import RAIN, URIAL, AlignEZ, ConfigError, Decoder, DeRa, Policy, Sampling, testbed
from raindecode.integrations.lm_eval import RainDecodeLM
from raindecode.policy.prompt import ChatFormat


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.from_pretrained("testbed", adapter="testbed", kv_tokens=8192, max_concurrent=8)


@pytest.fixture(scope="module")
def hf() -> HFLM:
    """The harness's own back end on the same weights."""
    made = HFLM(str(testbed.WEIGHTS), device="cpu", dtype="float32", batch_size=4)
    made.get_model_info = dict  # it asks the hub
    return made


@pytest.fixture(scope="module")
def aligned() -> transformers.PreTrainedModel:
    """The aligned model by peft."""
    peft = pytest.importorskip("peft", reason="peft reads the adapter independently of our loader")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(testbed.WEIGHTS))
    return peft.PeftModel.from_pretrained(model, str(testbed.ADAPTER)).eval()


def instances(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def likelihoods(model: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = model.loglikelihood(instances("loglikelihood", pairs))
    return found


def answers(model: Any, given: list[tuple[str, dict[str, Any]]]) -> list[str]:
    found: list[str] = model.generate_until(instances("generate_until", given))
    return found


def test_tasks_come_out_as_in_the_back_end_of_the_harness(decoder, hf, tasks):
    ours, theirs = evaluate(RainDecodeLM(decoder, dera=0), tasks), evaluate(hf, tasks)
    for (asked, (mine, greedy)), (same, (other, said)) in zip(
        pairs_of(ours, "town_choice"), pairs_of(theirs, "town_choice"), strict=True
    ):
        assert asked == same
        assert mine == pytest.approx(other, abs=1e-4)
        assert greedy == said
    assert pairs_of(ours, "town_write") == pairs_of(theirs, "town_write")
    assert all(text for _, text in pairs_of(ours, "town_write"))
    for (_, mine), (_, other) in zip(pairs_of(ours, "town_text"), pairs_of(theirs, "town_text"), strict=True):
        assert mine == pytest.approx(other, abs=1e-4)
    for task, metric in (
        ("town_choice", "acc,none"),
        ("town_choice", "acc_norm,none"),
        ("town_write", "exact_match,none"),
    ):
        assert ours["results"][task][metric] == theirs["results"][task][metric]
    assert ours["config"]["raindecode_dera"] == "0"


def test_scores_of_a_mixture_are_those_of_two_models_mixed_by_hand(decoder, hf, aligned, tasks):
    tokenizer = hf.tokenizer
    logits: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def by_hand(ids: list[int], start: int, weight: float) -> float:
        if tuple(ids) not in logits:
            logits[tuple(ids)] = alone(hf.model, ids), alone(aligned, ids)
        base, other = logits[tuple(ids)]
        return of_choice(base + weight * (other - base), ids, start)

    apart = 0.0
    for weight in (0.5, 1.5):
        found = evaluate(RainDecodeLM(decoder, dera=weight), tasks, ["town_choice", "town_text"])
        for (context, choice), (score, _) in pairs_of(found, "town_choice"):
            ids, start = tokenizer.encode(context + choice), len(tokenizer.encode(context))
            assert score == pytest.approx(by_hand(ids, start, weight), abs=1e-4)
            apart = max(apart, abs(score - by_hand(ids, start, 0)))
        for (text,), score in pairs_of(found, "town_text"):
            ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
            assert score == pytest.approx(by_hand(ids, 1, weight), abs=1e-4)
    assert apart > 0.1


def test_texts_longer_than_the_context_are_cut_as_there(decoder, tmp_path):
    settings = {"max_length": 24, "batch_size": 4}
    theirs = HFLM(str(testbed.WEIGHTS), device="cpu", dtype="float32", **settings)
    ours = RainDecodeLM(decoder, dera=0, **settings)
    long = "Human: How do I paint the fence of the baker?\nAssistant: You take a brush and " * 3
    rolling = [instances("loglikelihood_rolling", [(long,), ("A fence.",)]) for _ in range(2)]
    found = [
        model.loglikelihood_rolling(given, disable_tqdm=True)
        for model, given in zip((ours, theirs), rolling, strict=True)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-3)  # sums of 70 float32 there
    pairs = [(long, " paint it."), ("", "The baker is here."), ("A fence  ", "is green."), ("A", long[:60])]
    mine, other = likelihoods(ours, pairs), likelihoods(theirs, pairs)
    assert [score for score, _ in mine] == pytest.approx([score for score, _ in other], abs=1e-4)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
    asked = [(long, {"until": ["\n"], "max_gen_toks": 8})]
    assert answers(ours, asked) == answers(theirs, asked)
    assert ours._prompt(long, 8) == ours.tok_encode(long)[8 - 24 :]  # room for the answer
    with pytest.raises(ConfigError, match="max_length"):
        likelihoods(ours, [("A", long)])
    with pytest.raises(ConfigError, match="24 new tokens; allowed: 1 to 23"):
        answers(ours, [("A", {"max_gen_toks": 24})])


def test_edits_change_the_answer_and_the_row_before_it(hf, tmp_path):
    """Against a hook that adds the direction where `generate` does: at the context's last row and behind it."""
    push = torch.randn(128, generator=torch.Generator().manual_seed(4))
    AlignEZ.from_directions({0: push}, op="add", alpha=100.0).save(tmp_path / "push.safetensors")
    edited = RainDecodeLM("testbed", edits=f"{tmp_path / 'push.safetensors'}:2", kv_tokens=4096, device="cuda:0")
    context = "Human: How do I paint the fence?\nAssistant:"
    ids = hf.tokenizer.encode(context + CHOICES[2])
    start = len(hf.tokenizer.encode(context))

    def add(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        out[:, start - 1 :] += 200.0 * push / push.norm()
        return out

    handle = hf.model.model.layers[0].mlp.register_forward_hook(add)
    expected = of_choice(alone(hf.model, ids), ids, start)
    handle.remove()
    (score, _) = likelihoods(edited, [(context, CHOICES[2])])[0]
    assert score == pytest.approx(expected, abs=1e-4)
    assert abs(score - likelihoods(hf, [(context, CHOICES[2])])[0][0]) > 0.1
    assert edited.get_model_info()["raindecode_edits"][0]["strength"] == 2


def test_a_constant_prompt_stands_before_contexts_once(decoder, hf, tasks):
    urial = URIAL.testbed()
    model = RainDecodeLM(decoder, dera=0, prompt="urial")
    question = "How do I paint the fence?"
    expected = likelihoods(hf, [(urial.render(question), choice) for choice in (" No.", " You take a brush.")])
    talk = model.apply_chat_template([{"role": "user", "content": question}])
    assert talk == urial.render(question)
    for context in (question, talk):  # as a task writes it, and with --apply_chat_template
        found = likelihoods(model, [(context, choice) for choice in (" No.", " You take a brush.")])
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    (written,) = decoder.generate(
        [question], policy=Policy(prompt=urial, dera=DeRa(0)), search=Sampling.greedy(), max_new_tokens=12
    )
    asked = {"until": ["\n\n"], "max_gen_toks": 12}
    assert answers(model, [(question, asked), (talk, asked)]) == [written.text] * 2
    begun = [{"role": "user", "content": question}, {"role": "assistant", "content": "You take"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == talk + " You take"
    assert model.chat_template(True) == urial.prefix + urial.turn
    assert model.chat_template(False) is None
    with pytest.raises(ConfigError, match="leave prompt out"):
        evaluate(model, tasks, ["town_text"])
    found = evaluate(model, tasks, ["town_choice"], apply_chat_template=True)
    assert all(context.count(urial.prefix) == 1 for (context, _), _ in pairs_of(found, "town_choice"))


def test_samples_are_those_of_generate_with_their_seeds(decoder):
    model = RainDecodeLM(decoder, dera=0.5, seed=7)
    context = "Human: How do I paint the fence?\nAssistant:"
    asked = {"until": ["\n", ""], "max_gen_toks": 16, "do_sample": True, "temperature": 0.9, "top_p": 0.95}
    policy = Policy(prompt=decoder.format, dera=DeRa(0.5))
    expected = decoder.generate(
        ["How do I paint the fence?"] * 3, search=Sampling(temperature=0.9, top_p=0.95), policy=policy, seed=[7, 8, 7],
        max_new_tokens=16,
    )  # fmt: skip
    colder = {**asked, "do_sample": False, "temperature": 0.0}
    found = answers(model, [(context, asked), (context, colder), (context, asked), (context + " ", asked)])
    assert [found[0], found[2]] == [expected[0].text, expected[1].text]
    assert found[0] != found[2]
    assert answers(model, [(context, asked)]) == [expected[2].text]
    greedy = decoder.generate(["How do I paint the fence?"], search=Sampling.greedy(), policy=policy, max_new_tokens=16)
    assert found[1] == greedy[0].text


def test_rain_answers_are_those_of_generate(decoder):
    settings = {"max_iterations": 3, "min_new_iterations": 2}
    model = RainDecodeLM(decoder, dera=0.5, search="rain", rain=settings, prompt="format", seed=3)
    question = "How do I burn the barn?"
    expected = decoder.generate(
        [question], search=RAIN.preset("town", **settings), policy=Policy(dera=DeRa(0.5)), seed=3, max_new_tokens=6
    )
    asked = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    talk = model.apply_chat_template([{"role": "user", "content": question}])
    assert answers(model, [(question, asked)]) == [expected[0].text]
    assert answers(model, [(talk, asked)]) == [expected[0].text]
    assert model.get_model_info()["raindecode_search"] == "rain"
    # Log-likelihoods are the policy's whatever searches it.
    plain = RainDecodeLM(decoder, dera=0.5, prompt="format")
    assert likelihoods(model, [(question, " No.")]) == likelihoods(plain, [(question, " No.")])


def test_answers_are_kept_in_the_cache_of_the_harness(decoder, tmp_path, monkeypatch):
    pairs = [("Human: How do I paint the fence?\nAssistant:", choice) for choice in (" No.", " You take a brush.")]
    asked = [(pairs[0][0], {"until": ["\n"], "max_gen_toks": 6})]
    texts = instances("loglikelihood_rolling", [("A fence.",)])
    first, again = (CachingLM(RainDecodeLM(decoder, dera=0.5), str(tmp_path / "cache.db")) for _ in range(2))
    found = likelihoods(first, pairs), answers(first, asked), first.loglikelihood_rolling(texts)

    def no_more(*_: Any, **__: Any) -> None:
        raise AssertionError("this is in the cache")

    monkeypatch.setattr(decoder, "score", no_more)
    monkeypatch.setattr(decoder, "stream", no_more)
    assert (likelihoods(again, pairs), answers(again, asked), again.loglikelihood_rolling(texts)) == found


def test_a_context_that_choices_share_runs_once(decoder, monkeypatch):
    model = RainDecodeLM(decoder, dera=0)
    context = "Human: How do I paint the fence of the baker in the morning?\nAssistant:"
    pairs = [(context, choice) for choice in (" No.", " You take a brush.", " I am happy.")]
    start = len(decoder.codec.encode(context))
    distinct = start + sum(len(decoder.codec.encode(context + choice)) - start for _, choice in pairs)
    rows: list[int] = []
    score = decoder.score

    def noting(*given: Any, **named: Any) -> Any:
        found = score(*given, **named)
        rows.extend(one.stats.tokens_charged for one in found)
        return found

    monkeypatch.setattr(decoder, "score", noting)
    decoder.engine.tree.clear()
    likelihoods(model, pairs)
    assert start < sum(rows) <= distinct


def test_a_word_that_begins_in_the_context_is_scored_whole_in_a_format(decoder):
    model, encode = RainDecodeLM(decoder, policy=Policy(prompt=ChatFormat())), decoder.codec.encode
    whole, begun = encode("The fence is green."), encode("The fen")
    shared = len(begun) - 1
    assert whole[:shared] == begun[:shared]
    assert whole[shared] != begun[shared]  # "fen" is another token than "fence"
    ((score, _),) = likelihoods(model, [("The fen", "ce is green.")])
    (scored,) = decoder.score([whole], starts=[shared], progress=False)
    assert score == pytest.approx(sum(one.logprob for one in scored.logprobs[shared:]), abs=1e-5)


def test_an_empty_continuation_has_no_score(decoder):
    with pytest.raises(ConfigError, match="empty continuation"):
        likelihoods(RainDecodeLM(decoder, dera=0, prompt="format"), [("Who are you?", "")])


def test_ways_around_the_decoder_are_closed(decoder):
    model = RainDecodeLM(decoder)
    for way in (model._model_call, model._model_generate):
        with pytest.raises(ConfigError, match="the model 'hf'"):
            way(torch.tensor([[1]]))


def test_what_a_task_cannot_ask_for_is_named(decoder):
    model = RainDecodeLM(decoder, dera=0)
    with pytest.raises(ConfigError, match=r"num_beams=4; allowed: until, max_gen_toks, .*num_beams"):
        answers(model, [("A", {"until": ["."], "num_beams": 4})])
    assert answers(model, [("A", {"until": ["."], "num_beams": 1, "max_gen_toks": 1})])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dera": 0.5}, "none was given"),
        ({"dera": 0.5, "target_kl": 0.1, "adapter": "testbed"}, "exclude each other"),
        ({"dera": -1, "adapter": "testbed"}, "negative"),
        ({"search": "beam"}, "allowed: sampling, rain"),
        ({"rain_preset": "hh"}, "search=rain"),
        ({"search": "rain", "rain_preset": "nice"}, "allowed: hh"),
        ({"search": "rain", "rain": {"iterations": 3}}, "iterations"),
        ({"search": "rain", "rain": 3}, "settings of RAIN by name"),
        ({"prompt": 3}, "allowed: 'raw'"),
        ({"seed": -1}, "seed"),
        ({"max_length": 1}, "max_length"),
        ({"policy": Policy(), "prompt": "urial"}, "put them into it"),
        ({"edits": 3}, "edits is 3"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        RainDecodeLM("testbed", kv_tokens=512, **arguments)


def test_a_loaded_decoder_is_not_loaded_again(decoder):
    with pytest.raises(ConfigError, match="adapter, dtype says how a model is loaded"):
        RainDecodeLM(decoder, adapter="testbed", dtype="bfloat16")
    given = Policy(prompt=URIAL.testbed(), dera=DeRa(0.25))
    model = RainDecodeLM(decoder, policy=given)
    assert model.method.answering == given
    assert RainDecodeLM(decoder).method.policy.dera == DeRa(1.0)  # as on the command line


def test_the_harness_knows_the_model_by_name():
    assert get_model("raindecode") is RainDecodeLM
    model = get_model("raindecode").create_from_arg_string(
        "pretrained=testbed,adapter=testbed,dera=0.5,kv_tokens=512", {"batch_size": "auto", "device": "cpu"}
    )
    assert model.method.policy.dera == DeRa(0.5)
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    ((name, value),) = declared["project"]["entry-points"]["lm_eval.models"].items()
    assert EntryPoint(name, value, "lm_eval.models").load() is RainDecodeLM


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raindecode.integrations.lm_eval", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow  # a process of its own, which imports everything and reads the names of all tasks
def test_the_command_line_of_the_harness_runs_tasks_with_the_model(decoder, tasks, tmp_path):
    words = [
        "run", "--model", "raindecode", "--tasks", "town_choice,town_write", "--include_path", str(tasks),
        "--output_path", str(tmp_path / "out"), "--log_samples", "--model_args",
    ]  # fmt: skip
    done = run(*words, "pretrained=testbed,adapter=testbed,dera=0.5")
    assert done.returncode == 0, done.stderr
    assert "town_choice" in done.stdout
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["config"]["raindecode_dera"] == "0.5"
    here = evaluate(RainDecodeLM(decoder, dera=0.5), tasks, ["town_choice"])
    assert found["results"]["town_choice"]["acc,none"] == here["results"]["town_choice"]["acc,none"]
    (log,) = (tmp_path / "out").rglob("samples_town_choice_*.jsonl")
    logged = [json.loads(line)["filtered_resps"] for line in log.read_text(encoding="utf-8").splitlines()]
    scores = [float(score) for sample in logged for score, _ in sample]
    assert scores == pytest.approx([score for _, (score, _) in pairs_of(here, "town_choice")], abs=1e-4)
    wrong = run(*words, "pretrained=testbed,dera=0.5")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("error: dera and target_kl mix aligned models")
