"""A judge behind an endpoint: what is sent, what is tried again, what ends a run, and where the key does not show."""

from __future__ import annotations

import email.utils
import io
import json
import logging
import pickle
import re
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_judge import ALL_GOOD, GOOD, Asked, FakeJudge, Reply, judging

from raindecode.errors import ConfigError, JudgeError, JudgeUnavailableError
from raindecode.judging import endpoint
from raindecode.judging.endpoint import checked_url, retry_after
from raindecode.judging.judges import CallableJudge, OpenAIJudge
from raindecode.judging.rubric import ASPECTS, Item
from raindecode.judging.run import MOST_FAILURES, judge_all
from raindecode.judging.secret import Secret
from raindecode.judging.verdicts import Verdict

KEY = "sk-Very/secret+0123456789"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def items(number: int) -> list[Item]:
    return [Item(i, i, "regular", 1, (f"Question {i}?",), (f"Answer {i}.",), (), ASPECTS) for i in range(number)]


def number_in(asked: Asked) -> int:
    """Which item was asked about."""
    found = re.search(r"Question (\d+)\?", asked.prompt)
    assert found is not None
    return int(found[1])


def judge_of(fake: FakeJudge, **options: Any) -> OpenAIJudge:
    return OpenAIJudge("big", fake.url, **{"key": Secret(KEY), "backoff": 0.01, "timeout": 5.0, **options})


def outcomes(judge: OpenAIJudge, number: int = 1) -> list[Verdict | JudgeError]:
    try:
        return judge_all(judge, items(number), progress=False)
    finally:
        judge.close()


def problem(found: list[Verdict | JudgeError]) -> str:
    [one] = found
    assert isinstance(one, JudgeError)
    return str(one)


@pytest.fixture
def server() -> Iterator[Callable[..., FakeJudge]]:
    """Makes endpoints that give some replies one after another, the last one again and again."""
    with_ends = []

    def start(*replies: Reply | Callable[[int, Asked], Reply]) -> FakeJudge:
        def reply(number: int, asked: Asked) -> Reply:
            chosen = replies[min(number, len(replies) - 1)]
            return chosen if isinstance(chosen, Reply) else chosen(number, asked)

        context = judging(reply)
        with_ends.append(context)
        return context.__enter__()

    yield start
    for context in with_ends:
        context.__exit__(None, None, None)


def test_the_good_path(server: Callable[..., FakeJudge]) -> None:
    def graded(_: int, asked: Asked) -> Reply:
        score = 1 + number_in(asked) % 5
        return Reply(json.dumps({**GOOD, "depth": {"score": score, "reason": f"on {number_in(asked)}"}}), pause=0.03)

    fake = server(graded)
    found = outcomes(judge_of(fake, concurrency=4), 12)
    assert [one.scores["depth"] for one in found if isinstance(one, Verdict)] == [1 + i % 5 for i in range(12)]
    assert isinstance(found[7], Verdict)
    assert found[7].reasons["depth"] == "on 7"
    assert len(fake.asked) == 12
    assert 2 <= fake.together <= 4
    first = fake.asked[0]
    assert first.path == "/v1/chat/completions"
    assert first.headers["Authorization"] == f"Bearer {KEY}"
    assert first.body["model"] == "big"
    assert first.body["temperature"] == 0
    assert "Answer" in first.prompt


def test_the_body_can_be_added_to_and_taken_from(server: Callable[..., FakeJudge]) -> None:
    fake = server(Reply())
    judge = judge_of(fake, body={"max_tokens": 9, "temperature": None}, key=None)
    assert judge.settings == {
        "judge": "openai",
        "judge_model": "big",
        "judge_body": {"max_tokens": 9, "temperature": None},
    }
    outcomes(judge)
    assert fake.asked[0].body.keys() == {"model", "messages", "max_tokens"}
    assert "Authorization" not in fake.asked[0].headers


# ---- tried again ------------------------------------------------------------------------------------------------------
def test_too_many_requests_waits_as_asked_with_all_threads(server: Callable[..., FakeJudge]) -> None:
    fake = server(Reply(status=429, headers={"Retry-After": "0.4"}), Reply())
    found = outcomes(judge_of(fake, concurrency=1), 2)
    assert all(isinstance(one, Verdict) for one in found)
    assert len(fake.asked) == 3
    assert fake.asked[1].at - fake.asked[0].at >= 0.4


def test_one_who_is_told_to_wait_holds_back_the_others(server: Callable[..., FakeJudge]) -> None:
    fake = server(Reply(status=429, headers={"Retry-After": "0.5"}), Reply())
    assert all(isinstance(one, Verdict) for one in outcomes(judge_of(fake, concurrency=2), 40))
    early = [one for one in fake.asked[1:] if one.at - fake.asked[0].at < 0.5]
    assert len(early) <= 10  # asked before the first answer was read; without holding back nearly all 40 are


def test_who_asks_for_too_long_a_wait_is_not_waited_for(server: Callable[..., FakeJudge]) -> None:
    fake = server(Reply(status=429, headers={"Retry-After": "3600"}))
    assert "asks to wait 3,600 s, longer than the 120 s" in problem(outcomes(judge_of(fake)))
    assert len(fake.asked) == 1


@pytest.mark.parametrize("bad", [Reply(status=500), Reply(status=503), Reply(status=408), Reply(drop=True)])
def test_trouble_that_passes_is_outlasted(server: Callable[..., FakeJudge], bad: Reply) -> None:
    fake = server(bad, bad, Reply())
    [found] = outcomes(judge_of(fake, retries=2))
    assert isinstance(found, Verdict)
    assert len(fake.asked) == 3


def test_trouble_that_stays_is_an_error_of_the_item(server: Callable[..., FakeJudge]) -> None:
    fake = server(Reply(None, 500, body="out of \x1b[31mmemory"))
    said = problem(outcomes(judge_of(fake, retries=2)))
    assert "status 500: out of \ufffd[31mmemory (3 tries)" in said
    assert len(fake.asked) == 3


@pytest.mark.parametrize("slow", [Reply(pause=1.0), Reply(dribble=0.02)], ids=["silent", "dribbling"])
def test_a_slow_judge_is_not_waited_for_forever(server: Callable[..., FakeJudge], slow: Reply) -> None:
    said = problem(outcomes(judge_of(server(slow), timeout=0.2, retries=1)))
    assert "did not answer within 0.2 s (2 tries)" in said


def test_a_judge_that_is_late_once_is_asked_again(server: Callable[..., FakeJudge]) -> None:
    fake = server(Reply(pause=0.6), Reply())
    [found] = outcomes(judge_of(fake, timeout=0.3))
    assert isinstance(found, Verdict)


# ---- nonsense ---------------------------------------------------------------------------------------------------------
def test_an_aspect_that_was_left_out_is_asked_for_again(server: Callable[..., FakeJudge]) -> None:
    short = json.dumps({name: entry for name, entry in GOOD.items() if name != "depth"})
    fake = server(Reply(short), Reply("no"), Reply())
    [found] = outcomes(judge_of(fake))
    assert isinstance(found, Verdict)
    first, second, third = fake.asked
    assert third.body["messages"][:3] == second.body["messages"]
    assert [one["role"] for one in third.body["messages"]] == ["user", "assistant"] * 2 + ["user"]
    assert second.body["messages"][0] == first.body["messages"][0]
    assert second.body["messages"][1] == {"role": "assistant", "content": short}
    assert "lacks depth" in second.body["messages"][2]["content"]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply("I cannot take part in this."), "no JSON object: 'I cannot take part in this.'"),
        (Reply(json.dumps({**GOOD, "depth": 8})), "the score of depth is 8; allowed: a number from 1 to 5"),
        (Reply(None, body="<html>hello</html>"), "something that is no JSON: <html>hello</html>"),
        (Reply(None, body='{"error": {"message": "no"}}'), "answers without a message"),
        (Reply(None, body='{"choices": []}'), "answers without a message"),
        (Reply(None, body="[[[]]]"), "answers without a message"),
        (Reply(None, body='{"choices": [{"message": {"content": null, "refusal": "never"}}]}'), "refused: 'never'"),
        (Reply(""), "the judge said nothing"),
    ],
)
def test_nonsense_is_asked_again_and_then_an_error(server: Callable[..., FakeJudge], reply: Reply, said: str) -> None:
    fake = server(reply)
    assert said in problem(outcomes(judge_of(fake, attempts=2)))
    assert len(fake.asked) == (1 if "no JSON:" in said else 2)


def test_one_bad_item_does_not_harm_the_others(server: Callable[..., FakeJudge]) -> None:
    fake = server(lambda _, asked: Reply(None, 400, body="context too long") if number_in(asked) == 2 else Reply())
    found = outcomes(judge_of(fake), 5)
    assert [isinstance(one, Verdict) for one in found] == [True, True, False, True, True]
    assert "refuses the question with status 400: context too long" in str(found[2])


def test_a_judge_that_only_fails_is_not_asked_to_the_end(server: Callable[..., FakeJudge]) -> None:
    fake = server(Reply("no"))
    with pytest.raises(
        JudgeUnavailableError, match=f"{MOST_FAILURES} items in a row got no verdict; the last, question"
    ):
        outcomes(judge_of(fake, attempts=1, concurrency=2), 200)
    assert len(fake.asked) < 60


def test_failures_with_verdicts_between_them_end_nothing() -> None:
    def score(asked: list[dict[str, Any]]) -> list[Any]:
        return [ALL_GOOD if item["id"] % 8 == 7 else "no" for item in asked]

    found = judge_all(CallableJudge(score), items(24), progress=False)
    assert [isinstance(one, Verdict) for one in found] == [i % 8 == 7 for i in range(24)]


# ---- what ends a run --------------------------------------------------------------------------------------------------
def test_nobody_there_is_said_soon() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(JudgeUnavailableError, match=r"cannot be reached .*: start it, or correct --judge-url"):
            outcomes(OpenAIJudge("big", url), 50)
        with pytest.raises(JudgeUnavailableError) as caught:  # a key that was typed into the address
            outcomes(OpenAIJudge("big", f"{url}/{KEY}", Secret(KEY)), 1)
        assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(None, 401, body=f"bad key {KEY[:9]}***"), "refuses the key, or its absence"),
        (Reply(None, 404, body="no such model"), "status 404: no such model; --judge-url is the address in front of"),
        (Reply(None, 302, headers={"Location": "http://127.0.0.1:9/"}), "status 302"),
    ],
)
def test_what_holds_for_all_items_ends_the_run(server: Callable[..., FakeJudge], reply: Reply, said: str) -> None:
    fake = server(reply)
    with pytest.raises(JudgeUnavailableError, match=said) as raised:
        outcomes(judge_of(fake, concurrency=2), 50)
    assert KEY[:9] not in str(raised.value)
    assert len(fake.asked) <= 2


def test_verdicts_that_were_there_are_handed_on_before_the_end(server: Callable[..., FakeJudge]) -> None:
    fake = server(*[Reply()] * 5, Reply(status=401))
    kept: list[int] = []
    judge = judge_of(fake, concurrency=1)
    with pytest.raises(JudgeUnavailableError):
        judge_all(judge, items(20), lambda at, _: kept.append(at), progress=False)
    judge.close()
    assert kept == [0, 1, 2, 3, 4]


def test_retry_after_is_read_in_both_forms() -> None:
    assert retry_after("7", 0) == 7
    assert retry_after("-1", 0) == 0
    assert retry_after(email.utils.formatdate(1000, usegmt=True), 990) == 10
    assert retry_after(email.utils.formatdate(1000, usegmt=True), 2000) == 0
    for nothing in (None, "soon", "nan", "inf"):
        assert retry_after(nothing, 0) is None


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host/v1", "http://", "http://h:port/", "http://a b/", "http://host/v1?x=1"]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="--judge-url"):
        checked_url(url)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"concurrency": 0}, "judge-concurrency is 0"),
        ({"attempts": 0}, "judge-attempts is 0"),
        ({"retries": -1}, "judge-retries is -1"),
        ({"timeout": 0.0}, "judge-timeout is 0"),
        ({"timeout": float("nan")}, "judge-timeout is nan"),
        ({"body": {"messages": []}}, "sets messages"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        OpenAIJudge("big", "http://127.0.0.1:1/v1", **options)


def test_the_library_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "httpx2", None)
    with pytest.raises(ConfigError, match=r"needs the package httpx2: pip install 'rainkernels\[judge\]'"):
        OpenAIJudge("big", "http://127.0.0.1:1/v1")


# ---- the key ----------------------------------------------------------------------------------------------------------
ECHOES = {
    "in a verdict": Reply(json.dumps({**ALL_GOOD, "depth": {"score": 3, "reason": f"you sent Bearer {KEY}"}})),
    "in a score": Reply(json.dumps({**ALL_GOOD, "depth": {"score": KEY, "reason": ""}})),
    "in prose": Reply(f"your key is {KEY}"),
    "in headers": Reply(headers={"X-Echo": f"Bearer {KEY}", "Set-Cookie": f"key={KEY}"}),
    "in an error": Reply(None, 500, body=f"Authorization: Bearer {KEY}"),
    "in a refusal": Reply(None, 400, body=json.dumps({"error": f"key {KEY} is odd"}).replace("/", "\\/")),
    "in another error": Reply(None, 404, body=f"no model for {KEY}", headers={"X-Echo": KEY}),
    "in the place redirected to": Reply(None, 307, headers={"Location": f"http://127.0.0.1:9/?key={KEY}"}),
    "to one refused": Reply(None, 401, body=f"Incorrect API key provided: {KEY}"),
    "in no JSON": Reply(None, body=f"<p>{KEY}</p>"),
}  # fmt: skip


@pytest.mark.parametrize("echo", ECHOES)
def test_the_key_shows_up_nowhere(
    server: Callable[..., FakeJudge], echo: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    seen: list[str] = []
    judge = judge_of(server(ECHOES[echo]), retries=1, attempts=2)
    try:
        for one in judge_all(judge, items(1), progress=False):
            seen.append(repr(one))
            if isinstance(one, Verdict):
                seen.append(json.dumps(one.to_json()))
            else:
                seen += traceback.format_exception(one)
    except JudgeError as error:
        seen += [repr(error), *traceback.format_exception(error)]
    finally:
        logging.getLogger().removeHandler(handler)
        for name in ("httpx2", "httpcore2"):
            logging.getLogger(name).setLevel(logging.NOTSET)
    seen += [repr(judge), str(judge), repr(judge.settings), repr(vars(judge)), repr(judge._endpoint), stream.getvalue()]
    judge.close()
    seen += [*capfd.readouterr(), caplog.text, *(str(record.args) + str(record.msg) for record in caplog.records)]
    everything = "\n".join(seen)
    assert "receive_response_headers" in everything  # the library did log what came back
    for part in (KEY, KEY.replace("/", "\\/"), KEY.replace("/", "%2F"), KEY[3:16]):
        assert part not in everything
    if echo in ("in a verdict", "in prose", "in headers"):
        assert "[key]" in everything


def test_a_key_is_not_shown_pickled_or_taken_with_white_space(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = Secret(KEY)
    assert KEY not in f"{secret!r} {secret} {[secret]}"
    with pytest.raises(TypeError, match="not written anywhere"):
        pickle.dumps(secret)
    for bad in (f"{KEY} x", f"{KEY}\r\nX: y", f"{KEY}é"):
        with pytest.raises(ConfigError) as raised:
            Secret(bad)
        assert KEY not in "".join(traceback.format_exception(raised.value, limit=0))
    monkeypatch.setenv("SOME_KEY", f"{KEY}\n")
    assert Secret.from_environment("SOME_KEY").header() == {"Authorization": f"Bearer {KEY}"}
    assert not Secret.from_environment("NO_SUCH_KEY")


def test_an_address_with_a_password_is_not_shown() -> None:
    with pytest.raises(ConfigError) as raised:
        checked_url(f"https://me:{KEY.replace('/', '')}@host/v1")
    assert KEY.replace("/", "") not in str(raised.value)


def test_what_comes_back_after_the_end_is_hidden_too(
    server: Callable[..., FakeJudge], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        outcomes(judge_of(server(Reply())))
    log = logging.getLogger("httpcore2.http11")
    with caplog.at_level(logging.DEBUG, log.name):
        log.debug("%s", f"late: {KEY}")
    assert caplog.messages[-1] == "late: [key]"
    assert len(log.filters) == 1


# ---- functions --------------------------------------------------------------------------------------------------------
def test_a_function_judges_in_batches() -> None:
    sizes = []

    def score(given: list[dict[str, Any]]) -> list[Any]:
        sizes.append(len(given))
        assert given[0]["aspects"] == list(ASPECTS.aspects)
        assert (given[0]["lowest"], given[0]["highest"]) == (1, 5)
        assert given[0]["answers"][-1] in given[0]["prompt"]
        return [GOOD if one["id"] != 2 else json.dumps(GOOD) for one in given]

    found = judge_all(CallableJudge(score, batch=2), items(5), progress=False)
    assert sizes == [2, 2, 1]
    assert all(isinstance(one, Verdict) for one in found)


def test_a_function_may_fail_for_some_items() -> None:
    replies = [GOOD, {"depth": 3}, ValueError("odd"), None, "no idea"]
    found = judge_all(CallableJudge(lambda _: replies, "mine"), items(5), progress=False)
    assert isinstance(found[0], Verdict)
    for one, said in zip(
        found[1:], ("lacks helpfulness", "raised ValueError: odd", "a NoneType", "no JSON"), strict=True
    ):
        assert isinstance(one, JudgeError)
        assert said in str(one)


def test_a_function_that_raises_fails_its_batch() -> None:
    def score(given: list[dict[str, Any]]) -> list[Any]:
        if any(one["id"] == 0 for one in given):
            raise RuntimeError("out of memory")
        return [GOOD] * len(given)

    found = judge_all(CallableJudge(score, "mine", batch=2), items(4), progress=False)
    assert [isinstance(one, Verdict) for one in found] == [False, False, True, True]
    assert "the judge mine raised RuntimeError: out of memory" in str(found[1])


@pytest.mark.parametrize(
    ("replies", "said"), [([], "0 replies for 2"), ("text", "a str"), ({}, "a dict"), (3, "an? int")]
)
def test_a_function_that_returns_something_else_ends_the_run(replies: Any, said: str) -> None:
    with pytest.raises(JudgeUnavailableError, match=said):
        judge_all(CallableJudge(lambda _: replies, "mine"), items(2), progress=False)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "allowed: openai, none, or MODULE:FUNCTION"),
        ("no_such_module:f", "ModuleNotFoundError"),
        ("json:no_such", "AttributeError"),
        ("json:__doc__", "a str; give a function"),
    ],
)
def test_functions_that_are_none(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CallableJudge.named(name)
