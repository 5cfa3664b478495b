"""`raindecode serve` as a process: its address, its keys, its end; options that are refused before a model is loaded."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from raindecode.cli import main

ROOT = Path(__file__).resolve().parents[2]


def refused(capsys, *options: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *options])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    return said


def test_a_process_serves_and_ends_in_order(tmp_path, edit_file):
    keys = tmp_path / "keys"
    keys.write_text("# of tests\nkey-of-a-file\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "raindecode", "serve", "--adapter", "testbed", "--lambda", "0.5", "--port", "0",
         "--edit", f"mine={edit_file}", "--api-key-file", str(keys), "--align", '{"edits": ["mine:0.1"]}', "--name", "town"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "RAINDECODE_API_KEY": "key-of-the-environment"},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        lines = []
        while not (found := re.search(r"serving town at (http://127\.0\.0\.1:\d+)", line := process.stderr.readline())):
            assert line, lines
            lines.append(line)
        url = found[1]
        for key in ("key-of-a-file", "key-of-the-environment"):
            default = httpx.get(f"{url}/v1/align", headers={"authorization": f"Bearer {key}"}).json()["default"]
            assert default["dera"] == {"lambda": [0.5], "allow_negative": False}
            assert default["edits"][0]["name"] == "mine"
        assert httpx.get(f"{url}/v1/align").status_code == 401
        body = {"model": "town", "messages": [{"role": "user", "content": "Hello."}], "seed": 1, "max_tokens": 3}
        answer = httpx.post(
            f"{url}/v1/chat/completions", json=body, headers={"authorization": "Bearer key-of-a-file"}, timeout=60
        )
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(60) == 0
        assert "Traceback" not in rest
        assert '"event": "answer"' in rest
        assert "Hello" not in rest
    finally:
        process.kill()
        process.wait()


def test_options_that_are_refused(capsys, tmp_path):
    assert "is not JSON" in refused(capsys, "--align", "{")
    assert "give an object" in refused(capsys, "--align", "5")
    assert "port is 70000" in refused(capsys, "--port", "70000")
    assert "log_level" in refused(capsys, "--log-level", "loud")
    assert "max_queue" in refused(capsys, "--max-queue", "-1")
    assert "cannot be read" in refused(capsys, "--api-key-file", str(tmp_path / "none"))
    (tmp_path / "empty").write_text("\n")
    assert "holds no key" in refused(capsys, "--api-key-file", str(tmp_path / "empty"))
    assert "names no file" in refused(capsys, "--edit", "a=")
    assert "is taken" in refused(capsys, "--edit", "a=x", "--edit", "a=y")
    assert "not one clients can use" in refused(capsys, "--edit", "../a=x")
    assert "holds '@'" in refused(capsys, "--name", "a@b")
    assert "--lambda" in refused(capsys, "--lambda", "0.5")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot listen" in refused(capsys, "--port", str(taken.getsockname()[1]))
    assert "cannot listen" in refused(capsys, "--host", "no.such.host.invalid", "--port", "0")


def test_files_that_cannot_be_used(capsys, tmp_path):
    assert "none.safetensors" in refused(capsys, "--port", "0", "--edit", str(tmp_path / "none.safetensors"))
    assert "no-such-prompt" in refused(capsys, "--port", "0", "--prompt-file", str(tmp_path / "no-such-prompt"))
    assert "there is no edit 'x'" in refused(capsys, "--port", "0", "--align", '{"edits": ["x"]}')
    assert "does not hold" in refused(capsys, "--port", "0", "--align", '{"rian": 1}')


def test_without_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sse_starlette", None)
    for name in [name for name in sys.modules if name.startswith("raindecode.server")]:
        monkeypatch.delitem(sys.modules, name)
    assert "rainkernels[server]" in refused(capsys)
