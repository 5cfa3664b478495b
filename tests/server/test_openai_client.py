"""The official client, unchanged: chats, streams, stops, log-probabilities, seeds, errors."""

from __future__ import annotations

import pytest

from raindecode import RAIN, DeRa, Policy, Sampling

openai = pytest.importorskip("openai", reason="the official client is not installed (pip install openai)")

ASKED = [{"role": "user", "content": "How do I paint the fence of the baker?"}]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_chat(client, reference):
    answer = client.chat.completions.create(model="testbed", messages=ASKED, seed=1, max_tokens=20)
    (expected,) = reference.generate([ASKED], seed=1, max_new_tokens=20)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.model_extra["align"]["tokens_processed"] == expected.stats.tokens_processed
    assert answer.system_fingerprint.startswith("rainkernels-")


def test_seeds_and_n(client, reference):
    answer = client.chat.completions.create(model="testbed", messages=ASKED, seed=11, n=3, max_completion_tokens=12)
    expected = reference.generate([ASKED] * 3, seed=[11, 12, 13], max_new_tokens=12)
    assert [c.message.content for c in answer.choices] == [e.text for e in expected]
    unseeded = [client.chat.completions.create(model="testbed", messages=ASKED, max_tokens=12) for _ in range(2)]
    seeds = [one.choices[0].model_extra["align"]["seed"] for one in unseeded]
    assert seeds[0] != seeds[1]
    (again,) = reference.generate([ASKED], seed=seeds[0], max_new_tokens=12)
    assert unseeded[0].choices[0].message.content == again.text


@pytest.mark.parametrize("align", [None, {"dera": 0.5}, {"search": "rain", "rain": {"max_iterations": 6}}])
def test_streams_hold_the_whole_answer(client, reference, align):
    stream = client.chat.completions.create(
        model="testbed", messages=ASKED, seed=2, max_tokens=24, stream=True, stream_options={"include_usage": True},
        extra_body={"align": align} if align else None,
    )  # fmt: skip
    chunks = list(stream)
    search = RAIN.preset("town", max_iterations=6) if align and "search" in align else Sampling()
    policy = Policy(dera=DeRa(0.5)) if align and "dera" in align else None
    (expected,) = reference.generate([ASKED], search=search, policy=policy, seed=2, max_new_tokens=24)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == (
        "length" if expected.finish_reason == "length" else "stop"
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(expected.token_ids)
    assert {c.id for c in chunks} == {chunks[0].id}


def test_streams_of_several_answers(client, reference):
    stream = client.completions.create(
        model="testbed", prompt=["The fence", "The barn"], n=2, seed=4, max_tokens=8, stream=True
    )
    texts = ["", "", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    whole = client.completions.create(model="testbed", prompt=["The fence", "The barn"], n=2, seed=4, max_tokens=8)
    assert texts == [c.text for c in whole.choices]


def test_stops(client, reference):
    whole = client.completions.create(model="testbed", prompt="How do I", seed=1, temperature=0, max_tokens=20).choices[
        0
    ]
    word = whole.text.split()[3]
    for stop in (word, [word, "never said"]):
        cut = client.completions.create(
            model="testbed", prompt="How do I", seed=1, temperature=0, max_tokens=20, stop=stop
        )
        assert cut.choices[0].text == whole.text[: whole.text.index(word)]
        assert cut.choices[0].finish_reason == "stop"
    pieces = client.completions.create(
        model="testbed", prompt="How do I", seed=1, temperature=0, max_tokens=20, stop=word, stream=True
    )
    assert "".join(c.choices[0].text for c in pieces) == whole.text[: whole.text.index(word)]


def test_chat_logprobs(client, reference):
    asked = {"model": "testbed", "messages": ASKED, "seed": 3, "max_tokens": 8, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(**asked).choices[0]
    (expected,) = reference.generate([ASKED], search=Sampling(logprobs=True, top_logprobs=3), seed=3, max_new_tokens=8)
    said = answer.logprobs.content
    assert [one.logprob for one in said] == [one.logprob for one in expected.logprobs]
    assert "".join(bytes(b for one in said for b in one.bytes).decode()) == expected.text
    assert [[t.logprob for t in one.top_logprobs] for one in said] == [
        [t.logprob for t in likeliest] for likeliest in expected.top_logprobs
    ]
    streamed = [
        one for chunk in client.chat.completions.create(**asked, stream=True)
        for one in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]  # fmt: skip
    assert streamed == said


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [0, 3])
def test_echo_with_logprobs(client, reference, stream, tokens):
    ids = reference.codec.encode("How do I paint the fence?")
    asked = {
        "model": "testbed",
        "prompt": ids,
        "echo": True,
        "logprobs": 2,
        "max_tokens": tokens,
        "temperature": 0,
        "seed": 1,
    }
    if tokens == 0 and stream:
        chunks = list(client.completions.create(**asked, stream=True))
        parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
        said = parts[0].token_logprobs
    elif stream:
        parts = [
            c.choices[0].logprobs for c in client.completions.create(**asked, stream=True) if c.choices[0].logprobs
        ]
        said = [value for part in parts for value in part.token_logprobs]
    else:
        choice = client.completions.create(**asked).choices[0]
        said = choice.logprobs.token_logprobs
        assert choice.text.startswith("How do I paint the fence?")
        assert "".join(choice.logprobs.tokens).removeprefix("<bos>") == choice.text  # special tokens are in no text
        for at, token in list(zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True))[1:]:
            assert choice.text[at : at + len(token)] == token
        assert choice.logprobs.top_logprobs[0] is None
        assert all(
            t in top for t, top in zip(choice.logprobs.tokens[1:], choice.logprobs.top_logprobs[1:], strict=True)
        )
    (scored,) = reference.score([ids])
    assert said[: len(ids)] == [None] + [one.logprob for one in scored.logprobs[1:]]
    assert len(said) == len(ids) + tokens


def test_echo_as_text(client):
    plain = client.completions.create(model="testbed", prompt="The fence", seed=4, max_tokens=6)
    echoed = client.completions.create(model="testbed", prompt="The fence", seed=4, max_tokens=6, echo=True)
    assert echoed.choices[0].text == "The fence" + plain.choices[0].text
    stream = client.completions.create(
        model="testbed", prompt="The fence", seed=4, max_tokens=6, echo=True, stream=True
    )
    assert "".join(c.choices[0].text for c in stream) == echoed.choices[0].text


def test_models(client):
    names = [one.id for one in client.models.list()]
    assert names[0] == "testbed"
    assert {"testbed@rain", "testbed@urial", "testbed@dera=0.5", "testbed@edit=nudge"} <= set(names)
    assert client.models.retrieve("testbed@dera=0.25").root == "testbed"
    for name in names:
        answer = client.chat.completions.create(model=name, messages=ASKED, max_tokens=2, seed=1)
        assert answer.model == name


def test_errors_are_the_clients_own(client):
    with pytest.raises(openai.NotFoundError, match="this server has 'testbed'") as missing:
        client.chat.completions.create(model="gpt-4", messages=ASKED)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=r"align\.dera\.lambda") as bad:
        client.chat.completions.create(
            model="testbed", messages=ASKED, extra_body={"align": {"dera": {"lambda": "much"}}}
        )
    assert bad.value.param == "align.dera.lambda"
    with pytest.raises(openai.BadRequestError, match="there is no such field"):
        client.chat.completions.create(model="testbed", messages=ASKED, extra_body={"align": {"rian": {}}})
    with pytest.raises(openai.BadRequestError, match="negative"):
        client.chat.completions.create(model="testbed", messages=ASKED, extra_body={"dera_lambda": -1})
    with pytest.raises(openai.BadRequestError, match="1024") as long:
        client.completions.create(model="testbed", prompt=[5] * 2000)
    assert long.value.code == "context_length_exceeded"
    answer = client.chat.completions.create(
        model="testbed", messages=ASKED, max_tokens=1, extra_body={"no_such_field": 1}
    )
    assert answer.usage.completion_tokens == 1
    with pytest.raises(openai.BadRequestError, match="no log-probability"):
        client.chat.completions.create(model="testbed@rain", messages=ASKED, logprobs=True)


def test_a_stream_can_be_left(client, server):
    stream = client.chat.completions.create(
        model="testbed@rain",
        messages=ASKED,
        seed=1,
        stream=True,
        extra_body={"align": {"rain": {"max_iterations": 400}}},
    )
    next(iter(stream))
    stream.close()
    server.settle()
    assert server.service.decoder.engine.num_running == 0


async def _many(url: str) -> list[str]:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        asked = (client.completions.create(model="testbed", prompt="The", seed=i, max_tokens=5) for i in range(40))
        return [answer.choices[0].text for answer in await asyncio.gather(*asked)]


def test_the_asynchronous_client(server, reference):
    import asyncio

    texts = asyncio.run(_many(server.url))
    expected = reference.generate(["The"] * 40, seed=list(range(40)), max_new_tokens=5, policy=Policy(prompt=_raw()))
    assert texts == [one.text for one in expected]


def _raw():
    from raindecode import ChatFormat

    return ChatFormat()
