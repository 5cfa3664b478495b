"""LiteLLM, unchanged, with the server as an OpenAI-compatible provider."""

from __future__ import annotations

import pytest

from raindecode import RAIN, DeRa, Policy

litellm = pytest.importorskip("litellm", reason="LiteLLM is not installed (pip install litellm)")

ASKED = [{"role": "user", "content": "How do I burn the barn of the baker?"}]


@pytest.fixture
def ask(server):
    def ask(model="testbed", **given):
        return litellm.completion(
            model=f"openai/{model}",
            api_base=f"{server.url}/v1",
            api_key="none",
            messages=ASKED,
            max_tokens=16,
            num_retries=0,
            **given,
        )

    return ask


def test_chat_stream_seed_and_stop(ask, reference):
    (expected,) = reference.generate([ASKED], seed=5, max_new_tokens=16)
    answer = ask(seed=5)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert "".join(c.choices[0].delta.content or "" for c in ask(seed=5, stream=True)) == expected.text
    word = expected.text.split()[1]
    assert ask(seed=5, stop=[word]).choices[0].message.content == expected.text[: expected.text.index(word)]


def test_methods_by_field_extra_body_and_alias(ask, reference):
    (expected,) = reference.generate([ASKED], policy=Policy(dera=DeRa(0.5)), seed=5, max_new_tokens=16)
    for given in (
        {"extra_body": {"align": {"dera": {"lambda": 0.5}}}},
        {"dera_lambda": 0.5},
        {"model": "testbed@dera=0.5"},
    ):
        assert ask(seed=5, **given).choices[0].message.content == expected.text
    (searched,) = reference.generate([ASKED], search=RAIN.preset("town", max_iterations=5), seed=5, max_new_tokens=16)
    given = {"align": {"search": "rain", "rain": {"max_iterations": 5}}}
    assert ask(seed=5, extra_body=given).choices[0].message.content == searched.text


def test_logprobs(ask):
    content = ask(seed=1, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(len(one.top_logprobs) == 2 for one in content)
    assert content


def test_errors(ask):
    with pytest.raises(litellm.NotFoundError, match="this server has 'testbed'"):
        ask(model="nobody")
    with pytest.raises(litellm.BadRequestError, match="there is no such field"):
        ask(extra_body={"align": {"rian": 1}})
