"""bench_serve.py: when requests are sent, what is made of their times, failures, tables, and answers compared with a decoder's."""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

if find_spec("httpx2") is None:
    pytest.importorskip("httpx", reason="a client of HTTP is missing: pip install 'rainkernels[judge]'")

import bench_serve  # noqa: E402
import serve_target  # noqa: E402
from serve_load import MALFORMED, Load, Planned, Record, Shares, arrivals, plan  # noqa: E402
from serve_metrics import latencies, most_open, spread, summary, table  # noqa: E402
from serve_options import limits  # noqa: E402
from serve_target import Answer, Expected, OwnServer, Remote, samples  # noqa: E402

from raindecode.cli import main  # noqa: E402
from raindecode.errors import ConfigError, RainDecodeError  # noqa: E402


# ---- what is sent, and when --------------------------------------------------------------------------------------------
def test_arrivals_are_a_poisson_process_that_a_seed_repeats():
    times = arrivals(4001, 20.0, 1.0, seed=3)
    gaps = np.diff(times)
    assert times[0] == 0
    assert times == arrivals(4001, 20.0, 1.0, seed=3) != arrivals(4001, 20.0, 1.0, seed=4)
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # as gaps of a Poisson process
    even, bursts = (np.diff(arrivals(4001, 20.0, shape, seed=3)) for shape in (100.0, 0.25))
    assert even.mean() == pytest.approx(1 / 20, rel=0.05)
    assert even.std() == pytest.approx(even.mean() / 10, rel=0.1)
    assert bursts.std() == pytest.approx(2 * bursts.mean(), rel=0.1)
    assert arrivals(3, float("inf"), 1.0, seed=3) == [0.0, 0.0, 0.0]
    assert arrivals(1, 5.0, 1.0, seed=3) == [0.0]


def planned(shares: Shares, count: int = 400, **changes: Any) -> list[Planned]:
    given: dict[str, Any] = {
        "model": "m", "chat": True, "max_new_tokens": 5, "temperature": 0.5, "align": {"dera": 0.5},
        "rain": {"preset": "town"}, "seed": 7,
    }  # fmt: skip
    return plan([f"q{i}" for i in range(count)], [0.1 * i for i in range(count)], shares=shares, **{**given, **changes})


def test_shares_of_a_plan_are_drawn_by_the_seed_and_apart_from_each_other():
    shares = Shares(rain=0.25, cancel=0.1, slow=0.2, malformed=0.05)
    made = planned(shares)
    assert made == planned(shares) != planned(shares, seed=8)
    searched = [one for one in made if one.kind == "rain"]
    assert 70 <= len(searched) <= 120
    assert 20 <= sum(one.cancel_after is not None for one in made) <= 60
    assert {one.cancel_after for one in made} == {None, 0, 1, 2, 3, 4, 5}
    assert 50 <= sum(one.slow for one in made) <= 110
    wrong = [one for one in made if one.kind == "malformed"]
    assert 8 <= len(wrong) <= 35
    assert all(one.body is None and one.raw == MALFORMED[one.index % len(MALFORMED)] for one in wrong)
    plain = planned(Shares(rain=0.25))
    assert [one.kind for one in plain if one.index in {s.index for s in searched}] == ["rain"] * len(searched)
    assert searched[0].body["align"] == {"dera": 0.5, "search": "rain", "rain": {"preset": "town"}}
    assert plain[3].at == pytest.approx(0.3)
    (one,) = planned(Shares(), 1, chat=False, align={}, model=None)
    assert one.body == {
        "prompt": "q0", "max_tokens": 5, "temperature": 0.5, "seed": 7, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert planned(Shares(), 2)[1].body["messages"] == [{"role": "user", "content": "q1"}]
    assert planned(Shares(), 2)[1].body["seed"] == 8


# ---- numbers -----------------------------------------------------------------------------------------------------------
def record(index: int, sent: float, pieces: list[float], ended: float, **given: Any) -> Record:
    made = {"status": "ok", "prompt_tokens": 10, "completion_tokens": len(pieces), **given}
    return Record(
        index, made.pop("kind", "plain"), made.pop("due", sent), sent=sent, pieces=pieces, ended=ended, **made
    )


RECORDS = [
    record(0, 0.0, [0.1, 0.2, 0.4], 0.4, counters={"iterations": 2, "model_steps": 5}),
    record(1, 1.0, [1.3, 1.5], 1.7, completion_tokens=5, due=0.9, counters={"iterations": 1}),
    record(2, 1.0, [1.5], 2.0, kind="rain"),
    record(3, 1.0, [], 1.2, completion_tokens=1),  # said nothing but its end
    record(4, 1.0, [3.0, 9.0], 9.0, slow=True),
    record(5, 1.0, [1.1], 1.2, status="cancelled"),
    record(6, 1.0, [], 1.1, status="refused"),
    record(7, 1.0, [], 1.1, status="failed", error="500 x"),
    record(8, 1.0, [], 1.1, status="failed", error="500 x"),
]


def test_latencies_are_those_of_known_times():
    found = latencies(RECORDS)
    assert found["ttft"] == pytest.approx([100, 300, 500])
    assert found["tpot"] == pytest.approx([150, 100])  # of 2 and of 4 further tokens
    assert found["itl"] == pytest.approx([100, 200, 200])
    assert found["e2el"] == pytest.approx([400, 700, 1000, 200])


def test_a_summary_counts_what_ended_how():
    found = summary(RECORDS, 10.0, {"ttft": 350, "e2el": 650})
    assert {name: found[name] for name in ("completed", "failed", "cancelled", "refused")} == {
        "completed": 5, "failed": 2, "cancelled": 1, "refused": 1,
    }  # fmt: skip
    assert found["errors"] == {"500 x": 2}
    assert found["total_input_tokens"] == 50
    assert found["total_output_tokens"] == 3 + 5 + 1 + 1 + 2
    assert found["request_throughput"] == pytest.approx(0.5)
    assert found["output_throughput"] == pytest.approx(1.2)
    assert found["total_token_throughput"] == pytest.approx(6.2)
    assert found["request_goodput"] == pytest.approx(0.2)  # the first, and the one without text
    assert found["median_e2el_ms"] == pytest.approx(550)
    assert found["p99_e2el_ms"] == pytest.approx(np.percentile([400, 700, 1000, 200], 99))
    assert found["p90_ttft_ms"] == pytest.approx(460)
    assert found["mean_send_delay_ms"] == pytest.approx(100 / 9)
    assert found["counters"] == {"iterations": 3, "model_steps": 5}
    assert found["max_concurrent_requests"] == most_open(RECORDS) == 8
    assert "request_goodput" not in summary(RECORDS, 10.0)


def test_nothing_answered_is_no_number():
    found = summary([RECORDS[7]], 1.0) | {"request_rate": "inf", "max_concurrency": None}
    assert found["median_ttft_ms"] is found["p99_e2el_ms"] is None
    assert "Mean TTFT (ms):                          -\n" in table(found)
    assert spread("x", [])["std_x_ms"] is None


def test_the_table_has_the_form_of_the_field():
    lines = table(summary(RECORDS, 10.0) | {"request_rate": 2.0, "max_concurrency": 8}).splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[-1] == "=" * 50
    assert "Successful requests:                     5" in lines
    assert "Request rate configured (RPS):           2.00" in lines
    assert "Maximum request concurrency:             8" in lines
    assert "Output token throughput (tok/s):         1.20" in lines
    assert "---------------Time to First Token----------------" in lines
    assert "Mean TTFT (ms):                          300.00" in lines
    assert "P99 E2EL (ms):                           991.00" in lines
    assert "iterations:                              3" in lines


# ---- against a server that does as it is told --------------------------------------------------------------------------
class Told(BaseHTTPRequestHandler):
    """Streams the prompt's words back; a first word such as !500 says otherwise."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[dict[str, Any]]] = []
    hung_up: ClassVar[list[str]] = []
    keys: ClassVar[set[str | None]] = set()

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        found = {
            "/v1/models": '{"data": [{"id": "told"}]}',
            "/metrics": 'x_num_requests_running 0.0\nx_sum{a="b"} 2.5\n',
        }
        self._whole(200 if self.path in found else 404, found.get(self.path, "{}"))

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        self.keys.add(self.headers["authorization"])
        try:
            body = json.loads(raw.decode())
            words = body["messages"][-1]["content"].split()
        except (ValueError, LookupError, TypeError):
            self._whole(400, '{"error": {"message": "no"}}')
            return
        self.asked.append(body)
        try:
            self._answer(words)
        except OSError:
            self.hung_up.append(words[0])

    def _answer(self, words: list[str]) -> None:
        command = words[0]
        if command == "!500":
            self._whole(500, "broken")
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(b": ping\n\n")
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for word in words * (200 if command == "!long" else 1):
            self._event({"choices": [{"delta": {"content": word}, "finish_reason": None}], "usage": None})
            time.sleep(0.005)
        if command == "!strange":
            self._event({"choices": [{"delta": None}]})
        if command == "!error":
            self._event({"error": {"message": "it broke"}})
        if command != "!unfinished":
            self._event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 4, "completion_tokens": 2 * len(words), "align": {"model_steps": 3}}
        self._event({"choices": [], "usage": usage})
        if command != "!cut":
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
        self.wfile.flush()

    def _whole(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def told() -> Iterator[str]:
    Told.asked.clear(), Told.hung_up.clear(), Told.keys.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Told)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def load(base: str, prompts: list[str], **given: Any) -> list[Record]:
    wanted = plan(
        prompts, [0.0] * len(prompts), model="told", chat=True, max_new_tokens=9, temperature=1.0, align={}, rain={}, shares=Shares(),
        seed=0,
    )  # fmt: skip
    found, seconds = asyncio.run(Load(f"{base}/v1/chat/completions", **given).run(wanted))
    assert seconds >= max(one.ended for one in found)
    return found


def test_answers_are_read_and_failures_named(told):
    found = load(told, ["a b c", "!500", "!cut", "!unfinished", "!error", "d", "!strange"], key="k")
    assert [one.status for one in found] == ["ok", "failed", "failed", "failed", "failed", "ok", "failed"]
    assert [one.error for one in found[:6]] == [
        "", "500 broken", "the stream ended without [DONE]", "the stream ended without a finish_reason", '{"message": "it broke"}', "",
    ]  # fmt: skip
    first = found[0]
    assert (first.text, first.completion_tokens, first.prompt_tokens, first.counters) == (
        "abc",
        6,
        4,
        {"model_steps": 3},
    )
    assert len(first.pieces) == 3
    assert first.sent < first.pieces[0] <= first.pieces[1] <= first.pieces[2] < first.ended
    assert Told.keys == {"Bearer k"}
    assert [one["seed"] for one in sorted(Told.asked, key=lambda one: one["seed"])] == list(range(7))
    assert "NoneType" in found[6].error
    (nobody,) = load("http://127.0.0.1:9", ["a"])
    assert nobody.status == "failed"
    assert "Connect" in nobody.error


def test_the_client_hangs_up_reads_slowly_and_sends_nonsense_as_planned(told):
    body = {"messages": [{"role": "user", "content": "!long"}]}
    short = {"messages": [{"role": "user", "content": "a b"}]}
    wanted = [
        Planned(0, "plain", 0.0, body, cancel_after=3), Planned(1, "plain", 0.0, body, cancel_after=0),
        Planned(2, "plain", 0.0, short, slow=True), Planned(3, "malformed", 0.0, None, b"{"),
        Planned(4, "malformed", 0.0, None, json.dumps(short).encode()), Planned(5, "plain", 0.2, short),
    ]  # fmt: skip
    seen: list[int] = []
    found, _ = asyncio.run(Load(f"{told}/v1/chat/completions").run(wanted, lambda one: seen.append(one.index)))
    assert [one.status for one in found] == ["cancelled", "cancelled", "ok", "refused", "failed", "ok"]
    assert len(found[0].pieces) == 3
    assert not found[1].pieces
    assert found[4].error == "200 for a malformed body"
    assert found[2].ended - found[2].sent > 0.1
    assert 0.2 <= found[5].sent < found[5].ended
    assert found[5].due == 0.2
    assert sorted(seen) == list(range(6))
    until = time.monotonic() + 10
    while Told.hung_up.count("!long") < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert Told.hung_up.count("!long") == 2


def test_no_more_requests_are_open_than_allowed(told):
    found = load(told, ["a b c d"] * 9, max_concurrency=2)
    assert all(one.status == "ok" for one in found)
    assert most_open(found) == 2
    assert max(one.sent for one in found) > max(one.due for one in found)


def test_a_run_against_a_server_writes_table_and_record(told, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "k")
    (tmp_path / "prompts.txt").write_text("a b\n\nc d e\n", encoding="utf-8")
    words = [
        "--base-url", told + "/v1/", "--prompts", str(tmp_path / "prompts.txt"), "--num-prompts", "5", "--warmup", "1", "--request-rate",
        "100", "--api-key-env", "SOME_KEY", "--json", str(tmp_path / "out.json"), "--goodput", "e2el:60000", "--label", "try",
    ]  # fmt: skip
    assert bench_serve.main(words) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["completed"] == 5
    assert found["total_output_tokens"] == 4 + 6 + 4 + 6 + 4
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    assert (found["model_id"], found["backend"], found["label"], found["checked"]) == ("told", "openai", "try", None)
    assert found["server_metrics"] == {"x_num_requests_running": 0.0, 'x_sum{a="b"}': 2.5}
    assert found["counters"] == {"model_steps": 15}
    assert {"torch", "python", "cpu", "commit", "utc", "raindecode", "request_rate", "seed"} <= set(found)
    shown = capsys.readouterr().out
    assert "Successful requests:                     5" in shown
    assert "answers were not compared" in shown
    assert json.loads(shown.splitlines()[-1]) == found
    assert all(one["model"] == "told" for one in Told.asked)
    (tmp_path / "prompts.txt").write_text("a b\n!500 x\n", encoding="utf-8")
    assert bench_serve.main(words) == 1
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["failed"] == 2
    assert "2 failed: 500 broken" in capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("!500\n", encoding="utf-8")
    with pytest.raises(RainDecodeError, match="request 0: 500 broken"):
        bench_serve.main(words)


# ---- against our own ---------------------------------------------------------------------------------------------------
class ThreadServer:
    """In the place of OwnServer: the same server in a thread, since a process takes many seconds to start."""

    exit_code = 0

    def __init__(self, words: list[str]) -> None:
        pytest.importorskip("fastapi", reason="the server's packages are not installed")
        pytest.importorskip("uvicorn", reason="the server's packages are not installed")
        from raindecode import Decoder
        from raindecode.server import http
        from raindecode.server.app import create_app
        from raindecode.server.settings import ServerSettings

        self.words = words
        settings = ServerSettings(port=0, align={"dera": 1.0})
        self._told: queue.Queue[str] = queue.Queue()
        decoder = Decoder.from_pretrained("testbed", adapter="testbed", kv_tokens=8192)
        self._server = http.Server(create_app(settings, decoder), settings, self._told.put)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> ThreadServer:
        self._thread.start()
        self.url = self._told.get(timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=60)

    def usage(self) -> dict[str, float]:
        return {}


MIXED = [
    "--adapter", "testbed", "--num-prompts", "16", "--max-new-tokens", "8", "--warmup", "2", "--max-concurrency", "8", "--seed", "2",
    "--rain-share", "0.3", "--malformed-share", "0.3", "--rain", '{"max_iterations": 3, "min_new_iterations": 2}',
]  # fmt: skip


def test_answers_of_a_server_of_its_own_are_those_of_a_decoder(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_serve, "OwnServer", ThreadServer)
    assert bench_serve.main([*MIXED, "--cancel-share", "0.2", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["completed"] + found["cancelled"] + found["refused"] == 16
    assert min(found[name] for name in ("completed", "cancelled", "refused")) > 0
    assert found["checked"] == {
        "with": "Decoder in this process, same seeds", "warmup": 2, "wrong": 0, "answers": found["completed"],
    }  # fmt: skip
    assert set(found["kinds"]) == {"plain", "rain"}
    assert found["counters"]["iterations"] > 0
    assert found["server"]["default"] == {"dera": {"lambda": 1.0, "allow_negative": False}}
    assert found["direct"]["server_over_direct"] is None  # the server did less: some were hung up on
    assert found["direct"]["output_tokens"] > 0
    assert found["server_metrics"]["raindecode_num_requests_running"] == 0
    assert "0 of " in capsys.readouterr().out


def test_a_wrong_answer_ends_the_run_before_anything_is_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_serve, "OwnServer", ThreadServer)
    made = Expected.of

    def of(decoder: Any, wanted: Any, settings: Any) -> Expected:
        right = made(decoder, wanted, settings)
        first = min(right.answers)
        return Expected({**right.answers, first: Answer(right.answers[first].text + "!", 8)}, right.seconds, 0.0)

    monkeypatch.setattr(Expected, "of", of)
    assert bench_serve.main([*MIXED, "--json", str(tmp_path / "out.json")]) == 1
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["checked"]["wrong"] == 1
    assert "duration" not in found
    assert "1 of 2 answers differ" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--align or --rain asks for what the server has not"):
        bench_serve.main([*MIXED, "--align", '{"rane": true}'])
    monkeypatch.setattr(Expected, "of", None)
    assert bench_serve.main([*MIXED, "--unchecked", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["checked"] is None
    assert "direct" not in found
    assert found["completed"] + found["refused"] == 16


@pytest.mark.slow  # starts the server in a process of its own, as the benchmark does
def test_it_starts_its_own_server_and_says_why_it_could_not(tmp_path, capfd):
    pytest.importorskip("fastapi", reason="the server's packages are not installed")
    with pytest.raises(SystemExit) as ended:
        main(["bench", "serve", "--quick", "--model", "25m", "--json", str(tmp_path / "out.json")])
    assert ended.value.code == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (found["completed"], found["checked"]["wrong"], found["server_exit_code"]) == (8, 0, 0)
    assert found["direct"]["server_over_direct"] > 0
    assert found["server_usage"]["after"]["cpu_s"] >= found["server_usage"]["before"]["cpu_s"] > 0
    assert found["model_id"] == "25m"
    assert found["mean_tpot_ms"] > 0  # every token of random weights is text
    with (
        pytest.raises(RainDecodeError, match=r"did not start \(it ended\).*no-such-folder"),
        OwnServer(["--model", "./no-such-folder"]),
    ):
        pass


# ---- what it refuses ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--request-rate", "0"], "--request-rate is 0.0; allowed: more than 0"),
        (["--request-rate", "nan"], "--request-rate is nan"),
        (["--burstiness", "-1"], "--burstiness"),
        (["--num-prompts", "0"], "--num-prompts is 0; allowed: a whole number from 1"),
        (["--max-concurrency", "0"], "--max-concurrency"),
        (["--rain-share", "1.5"], "--rain-share is 1.5; allowed: 0 to 1"),
        (["--align", "[1]"], "--align is '\\[1\\]'; give a JSON object"),
        (["--rain", "{"], "--rain is '{'"),
        (["--goodput", "itl:3"], "allowed: ttft, tpot or e2el"),
        (["--goodput", "ttft:soon"], "--goodput is 'ttft:soon'"),
        (["--goodput", "ttft:nan"], "--goodput is 'ttft:nan'"),
        (["--endpoint", "chats"], "allowed: chat, completions"),
        (["--dtype", "int8"], "allowed: float32"),
        (["--temperature", "-1"], "--temperature"),
        (["--api-key-env", "NO_SUCH_NAME_HERE"], "which is not set"),
        (["--base-url", "http://127.0.0.1:9", "--adapter", "testbed"], "give one of them"),
        (["--base-url", "http://127.0.0.1:9"], "/v1/models cannot be read"),
        (["--base-url", "http://127.0.0.1:9", "--model", "m", "--prompts", "no-such-file"], "cannot be read"),
        (["--base-url", "http://[", "--model", ""], "/v1/models cannot be read"),
        (["--json", "no-such-folder/out.json"], "cannot be written"),
        (["--json", "."], "cannot be written"),
    ],
)
def test_options_that_are_not_allowed_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        bench_serve.main(words)


def test_small_readers():
    assert limits(["ttft:200", "tpot:50.5"]) == {"ttft": 200.0, "tpot": 50.5}
    text = '# HELP a b\na 1.0\nb_bucket{le="1.0"} 3.0\nb_created 5.0\nb_sum{c="d e"} 2e3\n\n'
    assert samples(text) == {"a": 1.0, 'b_sum{c="d e"}': 2000.0}
    assert serve_target.ROOT == ROOT


def test_pages_of_another_server_are_no_error(told, monkeypatch):
    monkeypatch.setattr(Told, "do_GET", lambda self: self._whole(200, "<html>\n<p>a page for everything</p>\n</html>"))
    remote = Remote(told, None)
    assert (remote.align(), remote.metrics(), remote.settle()) == ({}, {}, {})
    with pytest.raises(ConfigError, match="give a server of OpenAI's API"):
        remote.models()


def test_the_command_line_shows_the_options_of_the_script(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "serve", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "raindecode bench serve --request-rate 10" in shown
    assert "--burstiness" in shown
