"""Several engines on Ray. Every row of a batch job is answered once, with Decoder.generate's answer, whatever dies; replicas of the
server answer alike, and one that dies is replaced."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rainkernels
from raindecode import Decoder, DeRa, Policy, Sampling
from raindecode.policy.alignez.edits import AlignEZ
from raindecode.search.rain import RAIN

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'rainkernels[ray]'")

from raindecode.integrations import ray_batch, ray_rows  # noqa: E402
from raindecode.integrations.ray import generate_jsonl  # noqa: E402

CONVERSATION = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "How do I burn the barn of the baker?"},
]
GOOD: list[Any] = [*(f"How do I paint the fence of neighbour {i}?" for i in range(20)), CONVERSATION]
SEED = 40
OPTIONS: dict[str, Any] = {
    "adapter": "testbed", "policy": Policy(dera=DeRa(0.5)), "search": Sampling(ignore_eos=True, logprobs=True), "max_new_tokens": 48,
    "seed": SEED, "stop": ["xyzzy"], "replicas": 2, "batch_size": 2, "kv_tokens": 8192,
}  # fmt: skip
BAD = {
    3: (b"{nonsense", "PromptError", "line 5 of"),
    5: (b'{"prompt": "\xff"}', "PromptError", "not UTF-8"),
    8: (b'{"text": "no prompt"}', "PromptError", 'no text under "prompt"'),
    9: (json.dumps({"prompt": "x " * 3000}).encode(), "PromptError", "the prompt has"),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine; its processes import what this one does."""
    packages = [str(Path(module.__path__[0]).parent) for module in (rainkernels, __import__("raindecode"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([*packages, os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
        yield
        ray.shutdown()


def line_of(prompt: Any) -> bytes:
    return json.dumps({"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}).encode()


@pytest.fixture(scope="module")
def rows() -> list[bytes]:
    """The input's lines: good ones with bad ones and a blank between."""
    lines = [line_of(prompt) for prompt in GOOD]
    for index, (line, _, _) in sorted(BAD.items()):
        lines.insert(index, line)
    return lines


@pytest.fixture(scope="module")
def source(rows: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*rows[:2], b"  ", *rows[2:]]))
    return path


@pytest.fixture(scope="module")
def expected() -> dict[int, dict[str, Any]]:
    """Records of the good rows, from one decoder in this process that answers them all together."""
    decoder = Decoder.from_pretrained("testbed", adapter="testbed", kv_tokens=8192)
    indices = [index for index in range(len(GOOD) + len(BAD)) if index not in BAD]
    asked = {name: OPTIONS[name] for name in ("search", "policy", "max_new_tokens", "stop")}
    answers = decoder.generate(GOOD, seed=[SEED + index for index in indices], **asked)
    return {index: answer.to_json() for index, answer in zip(indices, answers, strict=True)}


def when(ready: Callable[[], bool], act: Callable[[], None]) -> Callable[[], bool]:
    """Call `act` in a thread as soon as it is time; the result says whether that happened."""
    happened, over = [], threading.Event()

    def wait() -> None:
        while not over.is_set():
            if ready():
                act()
                happened.append(True)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()

    def done() -> bool:
        over.set()
        thread.join()
        return bool(happened)

    return done


def processes(words: str) -> list[int]:
    """Processes that this one has started, by whatever others, and whose command line begins so."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(words.encode()) and is_ours(entry):
                found.append(int(entry.name))
        except OSError:  # it has ended
            continue
    return found


def is_ours(entry: Path) -> bool:
    while entry.name not in ("0", "1", str(os.getpid())):
        parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
        entry = entry.with_name(parent)
    return entry.name == str(os.getpid())


def kill_a_worker() -> None:
    workers = processes("ray::MapWorker")
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)


@pytest.fixture(scope="module")
def finished(cluster: None, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The output and the report of a job that lost one of its two processes on the way."""
    path = tmp_path_factory.mktemp("ray") / "out.jsonl"
    killed = when(lambda: path.exists() and path.read_bytes().count(b"\n") > len(BAD), kill_a_worker)
    report = generate_jsonl(source, path, **OPTIONS)
    assert killed(), "the job was over before a process could be killed"
    return path, report


def records_of(path: Path) -> dict[int, dict[str, Any]]:
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    indices = [record["index"] for record in records]
    assert len(set(indices)) == len(indices), f"rows were answered twice: {sorted(indices)}"
    return dict(zip(indices, records, strict=True))


def same(got: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """What decides an answer is equal; counters of forwards shared with other rows are not."""
    names = ("prompt", "text", "token_ids", "finish_reason", "seed", "logprobs", "mixture", "value")
    return all(got[name] == wanted[name] for name in names)


def check(records: dict[int, dict[str, Any]], expected: dict[int, dict[str, Any]]) -> None:
    assert sorted(records) == list(range(len(GOOD) + len(BAD)))
    for index, record in records.items():
        assert record["sample"] == 0
        assert record["seed"] == SEED + index
        if index in BAD:
            _, kind, words = BAD[index]
            assert record["error"]["type"] == kind
            assert words in record["error"]["message"]
        else:
            assert same(record, expected[index]), index


def test_a_job_that_loses_a_process_gives_the_answers_of_one_decoder(
    finished: tuple[Path, Any], expected: dict[int, dict[str, Any]]
) -> None:
    path, report = finished
    records = records_of(path)
    check(records, expected)
    assert (report.rows, report.already, report.answered, report.failed, report.alone) == (25, 0, 21, 4, 0)
    assert records[0]["settings"] == {
        "model": "testbed", "adapter": ["testbed"], "search": "sampling", "ignore_eos": True, "logprobs": True, "lambda": [0.5],
        "max_new_tokens": 48, "stop": ["xyzzy"], "dtype": "float32", "device": "cpu", "exact": True,
    }  # fmt: skip


@pytest.mark.slow
def test_a_job_goes_on_behind_what_a_killed_one_wrote(
    finished: tuple[Path, Any], source: Path, expected: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    lines = finished[0].read_bytes().splitlines(keepends=True)
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"".join(lines[:12]) + lines[12][:40])  # the thirteenth was not finished
    report = generate_jsonl(source, path, **{**OPTIONS, "replicas": 1, "batch_size": 5}, resume=True)
    check(records_of(path), expected)
    assert path.read_bytes().startswith(b"".join(lines[:12]))
    assert (report.rows, report.already, report.answered + report.failed, report.alone) == (25, 12, 13, 0)


@pytest.mark.slow
def test_a_row_that_kills_its_process_gets_an_error_and_its_neighbours_answers(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deadly(pairs: Any) -> list[float]:
        if any("poison" in prompt for prompt, _ in pairs):
            os._exit(1)
        return [0.0] * len(pairs)

    monkeypatch.setattr(ray_batch, "_TRIES", 1)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(line_of(prompt) for prompt in ("Hello.", "Give me poison.", "Good day.")))
    search = RAIN.preset("town", evaluator=deadly, max_iterations=2, min_new_iterations=1)
    report = generate_jsonl(
        path, tmp_path / "out.jsonl", search=search, max_new_tokens=4, replicas=1, batch_size=3, kv_tokens=8192
    )
    records = records_of(tmp_path / "out.jsonl")
    assert records[1]["error"]["message"].startswith("the process that answered it died 1 times")
    decoder = Decoder.from_pretrained("testbed", kv_tokens=8192)
    for index, prompt in ((0, "Hello."), (2, "Good day.")):
        answer = decoder.generate(prompt, search=search, max_new_tokens=4, seed=index)[0]
        assert same(records[index], answer.to_json())
    assert (report.answered, report.failed, report.alone) == (2, 1, 3)


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_told(cluster: None, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ray_batch.RainDecodeError, match=r"ModelError: .*no-such-folder"):
        generate_jsonl(source, tmp_path / "out.jsonl", model="./no-such-folder", replicas=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 41}, "has as seed of row 3: 43; this job has 44"),
        ({"max_new_tokens": 47}, "was written with max_new_tokens 48 (line 1), this run has max_new_tokens 47"),
        ({"policy": Policy()}, "was written with lambda [0.5] (line 1), this run has the default lambda"),
        ({"search": RAIN.preset("town")}, 'was written with search "sampling" (line 1), this run has search "rain"'),
        ({"replicas": 0}, "replicas is 0; allowed: a whole number, 1 or more"),
        ({"num_cpus": -1}, "num_cpus is -1; allowed: 0 or more"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    finished: tuple[Path, Any], source: Path, changes: dict[str, Any], words: str
) -> None:
    before = finished[0].read_bytes()
    with pytest.raises(ValueError, match=r".") as caught:
        generate_jsonl(source, finished[0], **{**OPTIONS, **changes}, resume=True)
    assert words in str(caught.value)
    assert finished[0].read_bytes() == before


def test_a_finished_job_has_nothing_to_resume_and_is_not_overwritten_unasked(
    finished: tuple[Path, Any], source: Path
) -> None:
    before = finished[0].read_bytes()
    report = generate_jsonl(source, finished[0], **OPTIONS, resume=True)
    assert (report.already, report.answered, report.failed) == (25, 0, 0)
    with pytest.raises(ValueError, match="holds answers already"):
        generate_jsonl(source, finished[0], **OPTIONS)
    with pytest.raises(ValueError, match="both name"):
        generate_jsonl(source, source, **OPTIONS, overwrite=True)
    assert finished[0].read_bytes() == before


def test_settings_name_everything_that_decides_an_answer() -> None:
    def told(search: Any = None, **policy: Any) -> str:
        return ray_rows.digest(ray_rows.settings_of(search or Sampling(), Policy(**policy)))

    town = RAIN.preset("town")
    edit = AlignEZ.from_directions({1: torch.ones(1, 8)}, op="add", alpha=1.0)
    other = AlignEZ.from_directions({1: -torch.ones(1, 8)}, op="add", alpha=1.0)
    different = [
        told(), told(Sampling(temperature=0.5)), told(town), told(RAIN.preset("hh")), told(RAIN.preset("town", c_puct=1.0)),
        told(RAIN.preset("town", evaluator=len)), told(dera=DeRa(0.5)), told(dera=DeRa(1.0)), told(dera=DeRa.target_kl(0.1)),
        told(prompt=town.format), told(prompt=RAIN.preset("hh").format), told(edits=edit), told(edits=edit.scaled(0.5)),
        told(edits=other), told(edits=[edit, other]), told(edits=replace(edit, on="both")), told(edits=replace(edit, judge=True)),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert told(RAIN.preset("town", width=4, record_tree=True)) == told(town)
    assert told(RAIN.preset("town")) == told(town)


# ---- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(cluster: None) -> Iterator[str]:
    """Two replicas of the server behind Ray's proxy."""
    pytest.importorskip("raindecode.integrations.ray_serve", reason="the extra `server` is not installed")
    from raindecode.integrations.ray import app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray.serve.run(app({"adapter": "testbed", "kv_tokens": "8192", "replicas": "2", "num_cpus": "1"}))
    yield f"http://127.0.0.1:{port}"
    ray.serve.shutdown()


def post(url: str, **body: Any) -> Any:
    """The response to a request; bad statuses raise."""
    data = json.dumps({"model": "testbed", "max_tokens": 24, **body}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60)


def asked(index: int) -> dict[str, Any]:
    return {
        "prompt": f"User: How do I paint fence {index}?\nAssistant:", "seed": index, "model": "testbed@dera=0.5",
        "align": {"search": "rain", "rain": {"max_iterations": 2, "min_new_iterations": 1}} if index % 4 == 0 else {},
    }  # fmt: skip


def replicas() -> set[int]:
    return set(processes("ray::ServeReplica:"))


@pytest.mark.slow
def test_replicas_answer_alike_stream_and_are_replaced(url: str) -> None:
    assert len(replicas()) == 2
    wanted = {index: json.load(post(url, **asked(index)))["choices"][0]["text"] for index in range(8)}
    decoder = Decoder.from_pretrained("testbed", adapter="testbed", kv_tokens=8192)
    plain = decoder.engine, Policy(dera=DeRa(0.5))
    ids = decoder.codec.encode(asked(1)["prompt"])
    assert decoder.generate([ids], policy=plain[1], max_new_tokens=24, seed=1)[0].text == wanted[1]

    # One of many requests in flight: its tokens come as they are drawn, through the proxy.
    with post(url, **asked(1), stream=True) as response:
        events = [line[6:].strip() for line in response if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    pieces = [json.loads(event)["choices"][0]["text"] for event in events[:-1]]
    assert "".join(pieces) == wanted[1]
    assert len(pieces) > 3

    with pytest.raises(urllib.error.HTTPError) as refused:
        post(url, prompt="x", max_tokens=-1)
    assert refused.value.code == 400
    assert "max_tokens" in json.load(refused.value)["error"]["message"]

    before = replicas()
    victim = min(before)
    retried, started = [], threading.Event()

    def until_answered(number: int) -> tuple[int, str]:
        """As clients do: ask again when the connection breaks or the server says 5xx."""
        for attempt in range(60):
            try:
                answer = json.load(post(url, **asked(number % 8)))
                if number > 8:
                    started.set()
                return number % 8, answer["choices"][0]["text"]
            except (urllib.error.URLError, ConnectionError) as error:
                if getattr(error, "code", 500) < 500:
                    raise
                retried.append((number, attempt))
                time.sleep(0.5)
        raise AssertionError(f"request {number} was never answered")

    with ThreadPoolExecutor(16) as clients:
        answers = [clients.submit(until_answered, number) for number in range(160)]
        assert started.wait(60)
        os.kill(victim, signal.SIGKILL)
        for answer in answers:
            index, text = answer.result()
            assert text == wanted[index]

    deadline = time.monotonic() + 120
    while (running(), len(replicas() - {victim})) != (2, 2) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running() == len(replicas() - {victim}) == 2, "the killed replica was not replaced"
    print(f"{len(retried)} requests were asked again")
    for index in wanted:
        assert until_answered(index) == (index, wanted[index])


def running() -> int:
    """Replicas that take requests, as Ray sees it."""
    states = ray.serve.status().applications["default"].deployments["raindecode"].replica_states
    return sum(number for state, number in states.items() if str(getattr(state, "value", state)) == "RUNNING")
