"""Runs one part in a process group of its own, within its time, and keeps how it went."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_CUDA_PROGRAMS = "/usr/local/cuda/bin"  # where the toolkit puts its own, often not on PATH
_TAIL = 6000  # characters of output kept for each part


@dataclass(frozen=True)
class Part:
    """One step of the acceptance run.

    Attributes:
        command: what runs; "{result}" becomes the file the part writes its findings to.
        budget_s: its share of the time; what earlier parts left over comes on top.
        needs: a program without which the part is skipped.
    """

    name: str
    command: tuple[str, ...]
    budget_s: float
    needs: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def find_program(name: str) -> str | None:
    """Path of a program on PATH or of the CUDA toolkit; None when it is in neither place."""
    return shutil.which(name) or shutil.which(name, path=_CUDA_PROGRAMS)


def run_part(part: Part, limit_s: float, folder: Path) -> dict[str, Any]:
    """What a part did: rc, seconds, the tail of its output, and its findings, also those of a part that was stopped."""
    shown = " ".join(Path(word).name if word == sys.executable else word for word in part.command)
    record: dict[str, Any] = {"command": shown, "budget_s": part.budget_s, "limit_s": round(limit_s, 1)}
    needed = find_program(part.needs) if part.needs else None
    if part.needs and needed is None:
        return record | {"status": "skipped", "reason": f"{part.needs} is neither on PATH nor in {_CUDA_PROGRAMS}"}
    if limit_s < 5:
        return record | {"status": "failed", "reason": "no time was left for it"}
    result, log = folder / f"{part.name}.result", folder / f"{part.name}.log"
    command = [word.replace("{result}", str(result)) for word in part.command]
    if needed is not None and command[0] == part.needs:
        command[0] = needed
    begin = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=_environment(part), stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return record | {"status": "failed", "reason": f"it could not be started: {error}"}
        rc = _wait(process, limit_s)
    record |= {"rc": rc, "seconds": round(time.monotonic() - begin, 1), "timed_out": rc is None}
    record["tail"] = log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
    with contextlib.suppress(OSError, ValueError, xml.ParseError):
        record["result"] = _findings(result)
    if rc is None:
        return record | {"status": "failed", "reason": f"it was stopped after {limit_s:.0f} s"}
    return record | ({"status": "ok"} if rc == 0 else {"status": "failed", "reason": f"exit code {rc}"})


def _environment(part: Part) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **part.environment}


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """The exit code; None when the time ran out and the part's whole process group was ended."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        for sent, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                break
        return None


def _findings(path: Path) -> Any:
    """A part's JSON, or the counts of pytest's XML."""
    text = path.read_text(encoding="utf-8")
    if not text.lstrip().startswith("<"):
        return json.loads(text)
    counts: dict[str, Any] = {"tests": 0, "passed": 0, "failed": 0, "skipped": 0, "failures": []}
    for case in xml.fromstring(text).iter("testcase"):
        kinds = {child.tag for child in case}
        state = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts["tests"] += 1
        counts[state] += 1
        if state == "failed":
            counts["failures"].append(f"{case.get('classname')}::{case.get('name')}")
    return counts
