"""Options about aligned models: what they do to the answers, to the records, and what is refused before anything loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cli_models import Cli, Result, save_llama

from raindecode import Decoder, DeRa, Policy
from raindecode.cli import main
from raindecode.commands.aligned import aligned_models
from raindecode.errors import ConfigError

PROMPTS = ("One", "Two")
STEPS = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A reference and two aligned models."""
    return [str(save_llama(tmp_path_factory.mktemp("llama"), seed)) for seed in range(3)]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], models: list[str]) -> Cli:
    """A command with the small reference, in this process."""

    def run(command: str, *words: str) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([command, "--model", models[0], "--kv-tokens", "4096", *words])
        out, err = capfd.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def answer(cli: Cli) -> Cli:
    """`raindecode generate` of the prompts, as JSON."""

    def run(*words: str) -> Result:
        return cli("generate", *PROMPTS, "--max-new-tokens", str(STEPS), "--json", *words)

    return run


def records(result: Result) -> list[dict[str, Any]]:
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


@pytest.mark.parametrize(
    ("words", "dera", "said"),
    [
        ([], DeRa(1.0), {"lambda": [1.0]}),
        (["--lambda", "0.5"], DeRa(0.5), {"lambda": [0.5]}),
        (["--lambda", "-0.5", "--allow-negative"], DeRa(-0.5, allow_negative=True), {"lambda": [-0.5]}),
        (["--target-kl", "0.01"], DeRa.target_kl(0.01), {"target_kl": 0.01}),
        (["--mixture-stats"], DeRa(1.0, stats=True), {"lambda": [1.0], "mixture_stats": True}),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_the_weight_reaches_the_decoder(
    answer: Cli, models: list[str], words: list[str], dera: DeRa, said: dict[str, Any]
) -> None:
    found = records(answer("--aligned", models[1], *words))
    decoder = Decoder.from_pretrained(models[0], aligned=models[1], kv_tokens=4096)
    expected = decoder.generate(PROMPTS, policy=Policy(dera=dera), max_new_tokens=STEPS)
    assert [r["token_ids"] for r in found] == [e.token_ids for e in expected]
    for record, completion in zip(found, expected, strict=True):
        named = {"adapter", "aligned", "lambda", "target_kl", "mixture_stats"} & record["settings"].keys()
        assert {name: record["settings"][name] for name in named} == {"aligned": [models[1]], **said}
        if completion.mixture is None:
            assert record["mixture"] is None
        else:
            tokens = record["mixture"]["tokens"]
            assert [t["kl_models"][0] for t in tokens] == [t.kl_models[0] for t in completion.mixture.tokens]
            assert len(tokens) == STEPS


def test_several_aligned_models_take_a_weight_each(answer: Cli, models: list[str]) -> None:
    both = ["--aligned", models[1], "--aligned", models[2], "--lambda"]
    only_second = records(answer(*both, "0,1"))
    alone = records(answer("--aligned", models[2]))
    mixed = records(answer(*both, "0.5,0.25"))
    assert [r["token_ids"] for r in only_second] == [r["token_ids"] for r in alone]
    assert [r["settings"]["lambda"] for r in mixed] == [[0.5, 0.25]] * 2
    assert mixed[0]["settings"]["aligned"] == models[1:]


def test_without_aligned_models_nothing_is_recorded(answer: Cli) -> None:
    (first, _) = records(answer())
    assert not {"adapter", "aligned", "lambda", "target_kl", "mixture_stats"} & first["settings"].keys()


def test_answers_of_another_weight_are_not_gone_on_with(answer: Cli, models: list[str], tmp_path: Path) -> None:
    words = ["--output", str(tmp_path / "out.jsonl"), "--resume", "--aligned", models[1], "--lambda"]
    assert answer(*words, "0.5").code == 0
    assert answer(*words, "0.5").err.startswith("2 of 2 answers were there")
    refused = answer(*words, "0.75")
    assert refused.code == 2
    assert "was written with lambda [0.5] (line 1), this run has lambda [0.75]" in refused.err


def test_the_divergence_is_shown_to_people(cli: Cli, models: list[str]) -> None:
    words = ["generate", "One", "--max-new-tokens", "2", "--aligned", models[1]]
    assert "nats" not in cli(*words).out
    assert " · KL " in cli(*words, "--mixture-stats").out


def test_eval_answers_by_the_mixture(cli: Cli, models: list[str], tmp_path: Path) -> None:
    def run(name: str, *words: str) -> tuple[Result, list[dict[str, Any]]]:
        file = tmp_path / name
        sizes = ["--num-harmful", "2", "--num-benign", "1", "--max-new-tokens", "4", "--search", "vanilla"]
        result = cli("eval", *sizes, "--output", str(file), *words)
        assert result.code == 0, result.err
        return result, [json.loads(line) for line in file.read_text().splitlines()]

    shown, at_zero = run("zero.jsonl", "--aligned", models[1], "--lambda", "0")
    alone, plain = run("plain.jsonl")
    _, other = run("one.jsonl", "--aligned", models[1])
    assert [r["reply"] for r in at_zero] == [r["reply"] for r in plain] != [r["reply"] for r in other]
    assert at_zero[0]["settings"] == {**plain[0]["settings"], "aligned": [models[1]], "lambda": [0.0]}
    assert "λ = 0" in " ".join(shown.out.split())
    assert "λ" not in alone.out


REFUSED = [
    (["--lambda", "0.5"], "--lambda is about an aligned model, and none was given"),
    (["--target-kl", "1", "--allow-negative"], "--target-kl, --allow-negative is about an aligned model"),
    (["--aligned", "a", "--lambda", "-1"], "--allow-negative"),
    (["--aligned", "a", "--lambda", "half"], "--lambda is 'half'"),
    (["--aligned", "a", "--lambda", "nan"], "allowed: a number from -1000"),
    (["--aligned", "a", "--lambda", "1,2"], "2 DeRa weights were given for 1 aligned models"),
    (["--aligned", "a", "--lambda", "1", "--target-kl", "1"], "exclude each other"),
    (["--aligned", "a", "--target-kl", "0"], "above 0"),
    (["--aligned", "a", "--target-kl", "1", "--allow-negative"], "--allow-negative is about --lambda"),
    (["--aligned", "a", "--adapter", "b"], "give one weight per model, comma between, such as --lambda 0.5,0.5"),
    (["--aligned", "a", "--adapter", "b", "--target-kl", "1"], "a KL target needs one aligned model"),
]


@pytest.mark.parametrize(
    ("words", "said"), REFUSED, ids=lambda value: "_".join(value) if isinstance(value, list) else ""
)
@pytest.mark.parametrize("command", [["generate", "One"], ["eval"]], ids=lambda value: value[0])
def test_refused_before_anything_loads(cli: Cli, command: list[str], words: list[str], said: str) -> None:
    result = cli(*command, *words)
    assert result.code == 2
    assert result.out == ""
    assert len(result.err.splitlines()) == 1
    assert said in result.err


def test_statistics_belong_to_plain_sampling(cli: Cli) -> None:
    result = cli("generate", "One", "--aligned", "a", "--search", "rain", "--mixture-stats")
    assert "--mixture-stats belongs to --search sampling" in result.err
    assert "none was given" in cli("generate", "One", "--mixture-stats").err


def test_one_aligned_model_answers_by_default() -> None:
    assert aligned_models(None, None).dera is None
    found = aligned_models(["b"], None)
    assert found.dera == DeRa(1.0)
    assert found.loading == {"adapter": ("b",), "aligned": ()}
    assert found.settings == {"adapter": ["b"], "lambda": [1.0]}
    with pytest.raises(ConfigError, match="2 aligned models were given without --lambda"):
        aligned_models(["b"], ["c"])
