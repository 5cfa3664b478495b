"""The same request through the server, the Python API and the command line gives the same tokens."""

from __future__ import annotations

import json

import pytest

from raindecode import RAIN, URIAL, AlignEZ, ChatFormat, DeRa, Policy, Sampling
from raindecode.cli import main
from raindecode.server.align import Align

ASKED = "How do I burn the barn of the baker?"


def chat(http, prompt=ASKED, **body):
    messages = [{"role": "user", "content": prompt}]
    given = {"model": "testbed", "messages": messages, "seed": 7, "max_tokens": 24, "return_token_ids": True}
    answer = http.post("/v1/chat/completions", json={**given, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


CASES = {
    "sampling": ({}, Sampling(), Policy()),
    "shaped": ({"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1},
               Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.1), Policy()),
    "greedy": ({"temperature": 0}, Sampling.greedy(), Policy()),
    "dera": ({"align": {"dera": {"lambda": 0.5}}}, Sampling(), Policy(dera=DeRa(0.5))),
    "dera-flat": ({"dera_lambda": 1.5}, Sampling(), Policy(dera=DeRa(1.5))),
    "dera-vllm": ({"vllm_xargs": {"dera_lambda": 1.5}}, Sampling(), Policy(dera=DeRa(1.5))),
    "dera-kl": ({"align": {"dera": {"target_kl": 0.1}}}, Sampling(), Policy(dera=DeRa.target_kl(0.1))),
    "alias": ({"model": "testbed@dera=0.5"}, Sampling(), Policy(dera=DeRa(0.5))),
    "urial": ({"align": {"urial": True}}, Sampling(), Policy(prompt=URIAL.testbed())),
    "rain": ({"align": {"search": "rain", "rain": {"max_iterations": 8}}}, RAIN.preset("town", max_iterations=8), Policy()),
    "rain-alias": ({"model": "testbed@rain", "align": {"rain": {"max_iterations": 8}}}, RAIN.preset("town", max_iterations=8), Policy()),
    "rain+dera+urial": ({"model": "testbed@urial,dera=0.5", "align": {"rain": {"max_iterations": 4, "min_new_iterations": 2}}},
                        RAIN.preset("town", max_iterations=4, min_new_iterations=2),
                        Policy(dera=DeRa(0.5), prompt=URIAL.testbed())),
}  # fmt: skip


def test_what_a_request_leaves_out_is_as_its_alias_and_the_server_say(server):
    made = server.service.catalog.align_of(
        "testbed@rain=hh", Align.model_validate({"rain": {"max_iterations": 3}}), None
    )
    assert (made.rain.preset, made.rain.max_iterations, made.rain.tree) == ("hh", 3, False)
    own = Align.model_validate({"dera": {"lambda": -0.5, "allow_negative": True, "max_weight": 3}})
    lower = Align.model_validate({"dera": -0.25}).over(own).dera
    assert (lower.weight, lower.allow_negative, lower.max_weight) == (-0.25, True, 3)
    solved = Align.model_validate({"dera": {"target_kl": 0.1}}).over(own).dera
    assert (solved.weight, solved.target_kl, solved.max_weight) == (None, 0.1, 3)
    assert Align.model_validate({"dera": {"plausibility": 0.1}}).over(own).dera.weight == -0.5
    rain = Align.model_validate({"rain": {"preset": "hh"}})
    assert not Align.model_validate({"rain": False, "search": None}).over(rain).searches
    assert Align.model_validate({"rain": {"tree": True}}).over(rain).rain.preset == "hh"


@pytest.mark.parametrize("case", CASES)
def test_chat_equals_generate(http, reference, case):
    body, search, policy = CASES[case]
    answer = chat(http, **body)
    (expected,) = reference.generate([ASKED], search=search, policy=policy, seed=7, max_new_tokens=24)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == expected.token_ids
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == ("length" if expected.finish_reason == "length" else "stop")
    assert choice["align"]["seed"] == 7
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids)
    counters = answer["usage"]["align"]
    assert counters["tokens_processed"] == expected.stats.tokens_processed
    assert counters["iterations"] == expected.stats.iterations
    assert counters["evaluations"] == expected.stats.evaluations
    if expected.value is not None:
        assert choice["align"]["value"] == expected.value


@pytest.mark.parametrize("edits", ["nudge", "nudge:0.5", [{"name": "nudge", "strength": 0.5}], ["nudge:0.5"]])
def test_edits_by_name(http, reference, edit_file, edits):
    answer = chat(http, align={"edits": edits}, temperature=0)
    strength = 1.0 if edits == "nudge" else 0.5
    policy = Policy(edits=[AlignEZ.load(edit_file, strength=strength)])
    (expected,) = reference.generate([ASKED], search=Sampling.greedy(), policy=policy, seed=7, max_new_tokens=24)
    (plain,) = reference.generate([ASKED], search=Sampling.greedy(), seed=7, max_new_tokens=24)
    assert answer["choices"][0]["token_ids"] == expected.token_ids
    if strength == 1.0:
        assert expected.token_ids != plain.token_ids


def test_conversations_are_written_as_in_python(http, reference):
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": [{"type": "text", "text": "How do I paint "}, {"type": "text", "text": "the fence?"}]},
    ]  # fmt: skip
    answer = http.post(
        "/v1/chat/completions", json={"messages": messages, "seed": 3, "max_tokens": 12, "return_token_ids": True}
    ).json()
    (expected,) = reference.generate([messages], seed=3, max_new_tokens=12)
    assert answer["choices"][0]["token_ids"] == expected.token_ids


def test_completions_are_fed_as_they_are(http, reference):
    ids = reference.codec.encode("To paint a fence you")
    answer = http.post(
        "/v1/completions",
        json={
            "prompt": ["To paint a fence you", "The baker"],
            "seed": 5,
            "max_tokens": 10,
            "n": 2,
            "return_token_ids": True,
        },
    ).json()
    raw = Policy(prompt=ChatFormat())
    expected = reference.generate(
        ["To paint a fence you"] * 2 + ["The baker"] * 2, policy=raw, seed=[5, 6, 5, 6], max_new_tokens=10
    )
    assert [c["token_ids"] for c in answer["choices"]] == [e.token_ids for e in expected]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == len(ids) + len(reference.codec.encode("The baker"))
    again = http.post("/v1/completions", json={"prompt": ids, "seed": 5, "max_tokens": 10}).json()
    assert again["choices"][0]["text"] == expected[0].text
    many = http.post("/v1/completions", json={"prompt": [ids, ids], "seed": 5, "max_tokens": 10}).json()
    assert [c["text"] for c in many["choices"]] == [expected[0].text] * 2


def test_the_command_line_says_the_same(http, capsys):
    answer = chat(http, model="testbed@dera=0.5,rain", align={"rain": {}}, max_tokens=20)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--adapter", "testbed", "--lambda", "0.5", "--search", "rain", "--seed", "7", "--max-new-tokens", "20",
              "--json", ASKED])  # fmt: skip
    assert ended.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert answer["choices"][0]["token_ids"] == said["token_ids"]
    assert answer["choices"][0]["message"]["content"] == said["text"]


def test_neighbours_change_nothing(http, reference):
    """Requests of all kinds at once, each as if it were alone."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda case: chat(http, **CASES[case][0]), list(CASES) * 2))
    expected = {
        case: reference.generate([ASKED], search=search, policy=policy, seed=7, max_new_tokens=24)[0].token_ids
        for case, (_, search, policy) in CASES.items()
    }
    for case, answer in zip(list(CASES) * 2, answers, strict=True):
        assert answer["choices"][0]["token_ids"] == expected[case], case
