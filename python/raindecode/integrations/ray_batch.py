"""A Ray Data job that answers a JSON-lines file with several engines."""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import ray.data
import torch

from raindecode.commands.answer_file import AnswerFile, Record
from raindecode.commands.common import REPORTED, quiet_libraries
from raindecode.decoder import Decoder
from raindecode.errors import ConfigError, RainDecodeError
from raindecode.integrations.ray_rows import FOUND_OUT, Row, answered, read_rows, settings_of
from raindecode.policy.policy import Policy
from raindecode.progress import ProgressDisplay
from raindecode.search.rain import RAIN
from raindecode.search.sampling import Sampling
from raindecode.settings import as_strings, as_token_ids, require_finite, require_whole
from raindecode.types import Completion

_TRIES = 3
_LOST_BATCHES = 8  # of the first round: when more are lost, it is not the rows' fault
_NOT_LOADED, _GIVEN_UP = -1, -2  # index of what a process says instead of answers


@dataclass(frozen=True)
class BatchReport:
    """How a batch job ended.

    Attributes:
        rows: of the input.
        already: rows that the output had records of when the job began.
        answered: rows answered now.
        failed: rows that got an error record now.
        alone: rows that were tried one by one, because processes kept dying on their batch.
        seconds: wall time, loading included.
    """

    rows: int
    already: int
    answered: int
    failed: int
    alone: int
    seconds: float


@dataclass(frozen=True)
class _Job:
    """What every process of a job needs to know."""

    loading: Mapping[str, Any]
    search: Sampling | RAIN
    policy: Policy
    asking: Mapping[str, Any]  # arguments of Decoder.requests that all rows share
    seed: int
    threads: int
    tries: int  # of a batch whose process dies
    settings: Record


class _Answerer:
    """One process with one engine. Ray makes it, and makes it again when it dies."""

    def __init__(self, job: _Job, tries: Any) -> None:
        self._job, self._tries = job, tries
        self._failure: str | None = None
        torch.set_num_threads(job.threads)
        quiet_libraries()
        try:
            self._decoder = Decoder.from_pretrained(**job.loading)
        except REPORTED as error:  # told with the first batch: Ray would only say that a process died
            self._failure = f"{type(error).__name__}: {error}"
            return
        found = (self._decoder.dtype, self._decoder.engine.runner.device.type, bool(self._decoder.exact))
        self._settings = {**job.settings, **dict(zip(FOUND_OUT, found, strict=True))}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Indices and JSON of rows to indices and JSON of their records."""
        rows = [Row(int(i), json.loads(g)) for i, g in zip(batch["index"], batch["given"], strict=True)]
        if self._failure is not None:
            records: dict[int, Record] = {_NOT_LOADED: {"message": self._failure}}
        elif ray.get(self._tries.begin.remote((rows[0].index, len(rows)))) > self._job.tries:
            records = {_GIVEN_UP: {}}
        else:
            try:
                records = dict(self._answer(rows))
            except Exception as error:
                # Nothing a row can be blamed for: a bug, or a device that is out of memory or broken. A fresh process tries again.
                traceback.print_exception(error)
                sys.stderr.flush()
                os._exit(1)
        return {
            "index": np.array(list(records), dtype=np.int64),
            "record": np.array([json.dumps(record) for record in records.values()], dtype=object),
        }

    def _answer(self, rows: Sequence[Row]) -> Iterator[tuple[int, Record]]:
        job, decoder = self._job, self._decoder
        requests, asked = [], []
        for row in rows:
            try:
                assert row.given is not None
                requests += decoder.requests(
                    [row.given], search=job.search, policy=job.policy, seed=job.seed + row.index, **job.asking
                )
                asked.append(row)
            except REPORTED as error:
                yield row.index, error_record(row, job.seed, error, self._settings)
        for at, outcome in decoder.stream(requests, search=job.search, progress=False):
            row = asked[at]
            if isinstance(outcome, Completion):
                record = replace(outcome, tree=None).to_json()
                del record["tree"]
                yield row.index, {**row.head, **record, **row.marks, "settings": self._settings}
            elif isinstance(outcome, REPORTED):
                yield row.index, error_record(row, job.seed, outcome, self._settings)
            else:
                raise outcome


def error_record(row: Row, seed: int, error: BaseException, settings: Record) -> Record:
    """What stands in the output for a row without an answer."""
    message = str(error)
    if message.startswith("prompt 0 "):  # of the list of one that the row was asked in
        message = "the prompt " + message.removeprefix("prompt 0 ")
    said = {"type": type(error).__name__, "message": message}
    return {**row.head, **row.marks, "seed": seed + row.index, "error": said, "settings": settings}


@dataclass
class _Sink:
    """Takes records as they come and writes each row's once."""

    file: AnswerFile
    display: ProgressDisplay
    done: set[int]
    answered: int = 0
    failed: int = 0

    def add(self, index: int, record: Record) -> None:
        if index in self.done:  # a batch that was run again
            return
        self.file.write(record)
        self.done.add(index)
        if "error" in record:
            self.failed += 1
        else:
            self.answered += 1
            report = self.display.reporter(index)
            if report is not None:
                report(len(record["token_ids"]), record["stats"]["iterations"])
        self.display.finished(index)


def generate_jsonl(
    input: str | Path,
    output: str | Path,
    *,
    model: str = "testbed",
    adapter: str | Sequence[str] = (),
    aligned: str | Sequence[str] = (),
    search: Sampling | RAIN | None = None,
    policy: Policy | None = None,
    max_new_tokens: int = 256,
    seed: int = 0,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    replicas: int = 2,
    batch_size: int = 64,
    num_cpus: float = 1,
    num_gpus: float = 0,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    kv_tokens: int | None = None,
    exact: bool | None = None,
    max_concurrent: int = 32,
    trust_remote_code: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
    address: str | None = None,
) -> BatchReport:
    """Answer every row of a JSON-lines file, with one engine in each of several processes.

    A row is {"prompt": ...} or {"messages": [...]}. Row i is answered with the seed `seed` + i, so an answer is the one that
    Decoder.generate gives, whatever the number of processes (exact mode). Records are those of `raindecode generate --output`, written
    as batches finish, in any order; `index` says which row is meant. A row that cannot be answered has an "error" with a type
    and a message instead, and ends nothing.

    A batch whose process dies is run again. One that loses three processes is taken apart and its rows are tried one by one, so
    that a row which kills its process gets an error record and its neighbours get answers.

    Args:
        input, output: files of this process; only rows and records travel to the others.
        model, adapter, aligned, dtype, kv_tokens, exact, max_concurrent, trust_remote_code: see Decoder.from_pretrained. A folder has to
            be there on every machine.
        search, policy, max_new_tokens, stop, stop_token_ids: see Decoder.generate; one policy for all rows. Search trees are not kept.
        replicas: processes with an engine each.
        batch_size: rows a process takes at a time: what is lost, and run again, when it dies.
        num_cpus: cores reserved for each process, and its threads.
        num_gpus: GPUs of each process; with 0 it runs on the CPU.
        resume: answer only what the output has no record of. Error records count.
        overwrite: drop what the output holds.
        progress: as in Decoder.generate.
        address: of a Ray cluster, when this process is connected to none yet; None takes RAY_ADDRESS, else starts one on this machine.

    Raises:
        ConfigError, PromptError: a setting is outside what is allowed, or a file cannot be used; nothing has run.
        ModelError and others, as RainDecodeError: no process could load the model.
        RainDecodeError: processes kept dying; what has finished is written, and `resume` goes on.
    """
    for name, number in (("replicas", replicas), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        require_whole(name, number, 1)
    require_whole("seed", seed, 0)
    for name, share in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
        require_finite(name, share)
        if share < 0:
            raise ConfigError(f"{name} is {share!r}; allowed: 0 or more")
    if Path(input).resolve() == Path(output).resolve():
        raise ConfigError(f"input and output both name {str(input)!r}: give another output")
    chosen, how = Sampling() if search is None else search, Policy() if policy is None else policy
    adapters, others = _names("adapter", adapter), _names("aligned", aligned)
    asking = {
        "max_new_tokens": max_new_tokens,
        "stop": as_strings("stop", stop),
        "stop_token_ids": as_token_ids("stop_token_ids", stop_token_ids),
    }
    job = _Job(
        loading={
            "model": model, "adapter": adapters, "aligned": others, "device": "cuda" if num_gpus else "cpu", "dtype": dtype,
            "kv_tokens": kv_tokens, "exact": exact, "max_concurrent": max_concurrent, "trust_remote_code": trust_remote_code,
        },
        search=chosen, policy=how, asking=asking, seed=seed, threads=max(1, int(num_cpus)), tries=_TRIES,
        settings={
            "model": model, **({"adapter": list(adapters)} if adapters else {}), **({"aligned": list(others)} if others else {}),
            **settings_of(chosen, how), **{k: list(v) if isinstance(v, tuple) else v for k, v in asking.items() if v},
        },
    )  # fmt: skip
    began = time.perf_counter()
    rows = read_rows(str(input))
    resources = {"num_cpus": num_cpus, "num_gpus": num_gpus or None}
    with AnswerFile(str(output), resume=resume, overwrite=overwrite) as file:
        if not ray.is_initialized():
            ray.init(address=address)
        file.begin()
        done = answered(file, rows, seed, job.settings) if resume else set()
        already = len(done)
        with ProgressDisplay.choose(progress, len(rows) - already, searching=isinstance(chosen, RAIN)) as display:
            sink = _Sink(file, display, done)
            for row in rows:
                if row.error is not None and row.index not in done:
                    sink.add(row.index, error_record(row, seed, row.error, job.settings))
            alone = _answer_all(job, rows, sink, replicas=replicas, batch_size=batch_size, resources=resources)
    return BatchReport(len(rows), already, sink.answered, sink.failed, alone, time.perf_counter() - began)


def _names(what: str, given: str | Sequence[str]) -> tuple[str, ...]:
    return as_strings(what, [given] if isinstance(given, str) else given)


def _answer_all(
    job: _Job, rows: Sequence[Row], sink: _Sink, *, replicas: int, batch_size: int, resources: dict[str, Any]
) -> int:
    """Run what is left in batches, then what batches were lost row by row; returns how many rows that were."""
    tries, lost = _count_tries(), 0
    left = [row for row in rows if row.index not in sink.done]
    for index, record in _run(job, tries, left, replicas, batch_size, resources):
        if index != _GIVEN_UP:
            sink.add(index, record)
            continue
        lost += 1
        if lost > _LOST_BATCHES:
            raise RainDecodeError(
                f"processes died {job.tries} times each on {lost} batches, which is not their rows' fault: see what the processes wrote "
                f"before they died. {len(sink.done)} of {len(rows)} rows are written; resume (--resume) goes on behind them"
            )
    left = [row for row in left if row.index not in sink.done]
    for index, record in _run(job, tries, left, replicas, 1, resources):
        if index != _GIVEN_UP:
            sink.add(index, record)
    for row in left:
        if row.index not in sink.done:
            died = RainDecodeError(f"the process that answered it died {job.tries} times, with nothing else to answer")
            sink.add(row.index, error_record(row, job.seed, died, job.settings))
    return len(left)


def _count_tries() -> Any:
    """An actor that counts how often each batch was begun. Ray runs a lost batch again without end and cannot be told otherwise
    for good (the arguments that could are deprecated)."""

    class Tries:  # local, so that its process imports Ray alone
        def __init__(self) -> None:
            self.begun: dict[tuple[int, int], int] = {}

        def begin(self, batch: tuple[int, int]) -> int:
            self.begun[batch] = self.begun.get(batch, 0) + 1
            return self.begun[batch]

    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Tries).remote()


def _run(
    job: _Job, tries: Any, rows: Sequence[Row], replicas: int, batch_size: int, resources: dict[str, Any]
) -> Iterator[tuple[int, Record]]:
    """Indices and records of rows as their batches finish; _GIVEN_UP for a batch that lost too many processes."""
    if not rows:
        return
    items = [{"index": row.index, "given": json.dumps(row.given)} for row in rows]
    blocks = math.ceil(len(items) / batch_size)  # a block is a batch: it is what Ray runs again
    answers = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
        _Answerer,
        fn_constructor_args=(job, tries),
        batch_size=None,
        # One under way and one at hand. A process that dies takes both with it, and both are run again.
        compute=ray.data.ActorPoolStrategy(size=min(replicas, blocks), max_tasks_in_flight_per_actor=2),
        **resources,
    )
    answers.context.enable_progress_bars = False
    for block in answers.iter_batches(batch_size=None):
        for index, record in zip(block["index"], block["record"], strict=True):
            if index == _NOT_LOADED:
                raise RainDecodeError(json.loads(record)["message"])
            yield int(index), json.loads(record)
