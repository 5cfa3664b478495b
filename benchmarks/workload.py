"""Recorded RAIN searches as files: what the numbers of a real run led to, so that any model can be driven through the search.

A file is JSON, one request per line. Of a request it holds the prompt, the settings' outcome (answer, counters, one summary per
tree that a move was chosen from) and everything that numbers of the model decided: the most likely tokens (`tops`), the verdicts by
text, and by leaf (`at`, answer tokens) its rollout, its candidate sets by try (the greedy one first) with joint probabilities, and
the vectors of the suffixes of leaf and rollout. Names of draws are not stored: they follow from the paths (raindecode.engine.rng).
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raindecode.errors import ConfigError
from raindecode.search.rain import RAIN

FORMAT, VERSION = "raindecode-rain-workload", 1
REGIMES = {"safe": 0.8, "mixed": 0.4, "harmful": 0.0}  # by the least share of good verdicts in a search
FOLDER = Path(__file__).resolve().parent / "workloads"
SCALE = 127  # vectors are stored as whole numbers, in units of 1 / SCALE
_NOT_STORED = {"evaluator", "format", "embedder", "width", "record_tree"}

Tokens = tuple[int, ...]
Rows = npt.NDArray[np.int8]


@dataclass
class Sets:
    """The chains of one expansion: `tries[i]` is the index in `tokens` of try i - 1 (the first is the greedy one), or None."""

    tokens: list[list[int]]
    probs: list[float]  # joint
    tries: list[int | None]


@dataclass
class Leaf:
    """What was done for the leaf behind the answer tokens `at`.

    Attributes:
        rollout: sampled behind it.
        sets: its candidate sets; None at the start of the answer, and where the answer ends.
        more: sets drawn for one more child (dynamic rule), by how often it had fired there.
        starts: positions in `at` from which the suffixes with vectors begin.
    """

    at: list[int]
    rollout: list[int] = field(default_factory=list)
    sets: Sets | None = None
    more: dict[int, Sets] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)


@dataclass
class Answer:
    """What came out, with the counters that do not depend on the machine.

    Attributes:
        shared_kv_minimum: distinct token prefixes that the forwards of the published baseline evaluate.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    value: float | None
    iterations: int
    evaluations: int
    tokens_processed: int
    shared_kv_minimum: int


@dataclass
class RecordedRequest:
    """One request and its search.

    Attributes:
        prefix: text before the dialogue (persona or examples).
        good: share of good verdicts among those the search asked for.
        moves: of each tree a move was chosen from: tokens chosen, nodes, visits of the root, value of the choice.
        tops: most likely tokens behind the prompt with probabilities, by their number.
        vectors: [starts of all leaves, size], in the order of `leaves` and of their `starts`.
    """

    prompt: str
    prefix: str
    prompt_ids: list[int]
    seed: int
    max_new_tokens: int
    good: float
    answer: Answer
    moves: list[dict[str, Any]]
    tops: dict[int, tuple[list[int], list[float]]]
    verdicts: dict[str, float]
    leaves: list[Leaf]
    vectors: Rows


@dataclass
class Workload:
    """The requests of one regime with the settings they were searched with."""

    regime: str
    recorded: dict[str, Any]
    preset: str
    settings: dict[str, Any]
    requests: list[RecordedRequest]

    def rain(self) -> RAIN:
        """The settings, judged by the model itself."""
        plain = {name: tuple(v) if isinstance(v, list) else v for name, v in self.settings.items()}
        return RAIN.preset(self.preset, **plain)  # type: ignore[arg-type]

    def save(self, path: Path) -> None:
        """Write the file."""
        head = {"format": FORMAT, "version": VERSION} | {k: v for k, v in vars(self).items() if k != "requests"}
        lines = [json.dumps(request_json(request), separators=(",", ":")) for request in self.requests]
        text = json.dumps(head, separators=(",", ":"))[:-1] + ',"requests":[\n' + ",\n".join(lines) + "\n]}\n"
        path.write_text(text, encoding="utf-8")


def settings_of(rain: RAIN) -> dict[str, Any]:
    """The settings a file keeps: all but evaluator, format and embedder, which are the preset's, and what changes no search."""
    return {f.name: getattr(rain, f.name) for f in fields(RAIN) if f.name not in _NOT_STORED}


def load_workload(path: Path) -> Workload:
    """Read a file.

    Raises:
        ConfigError: it cannot be read, is no workload, or one of another version.
    """
    record = "record it anew with `python benchmarks/record_workload.py --regime NAME`, or take the file from version control"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the workload {path} cannot be read ({error}): {record}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f"{path} is no workload; allowed: a JSON object whose format is {FORMAT!r}: {record}")
    if data.get("version") != VERSION:
        raise ConfigError(f"the workload {path} has version {data.get('version')!r}; allowed: {VERSION}: {record}")
    if data.get("regime") not in REGIMES:
        raise ConfigError(
            f"the workload {path} has regime {data.get('regime')!r}; allowed: {', '.join(REGIMES)}: {record}"
        )
    try:
        requests = [_request(one) for one in data["requests"]]
        workload = Workload(data["regime"], data["recorded"], data["preset"], data["settings"], requests)
        workload.rain()
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error, zlib.error) as error:
        detail = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the workload {path} is damaged ({detail}): {record}") from error
    if not requests:
        raise ConfigError(f"the workload {path} holds no request; allowed: at least one: {record}")
    return workload


def request_json(request: RecordedRequest) -> dict[str, Any]:
    """A request as the file holds it."""
    plain = {k: v for k, v in asdict(request).items() if k != "vectors"}
    plain["leaves"] = [{k: v for k, v in leaf.items() if v} for leaf in plain["leaves"]]
    for leaf in plain["leaves"]:
        leaf.setdefault("at", [])
    packed = zlib.compress(request.vectors.astype(np.int8).tobytes(), 9)
    return plain | {"vectors": base64.b85encode(packed).decode(), "size": int(request.vectors.shape[1])}


def _request(data: dict[str, Any]) -> RecordedRequest:
    plain = dict(data)
    size = plain.pop("size")
    leaves = [_leaf(leaf) for leaf in plain["leaves"]]
    flat = np.frombuffer(zlib.decompress(base64.b85decode(plain["vectors"])), dtype=np.int8)
    count = sum(len(leaf.starts) for leaf in leaves)
    if flat.size != count * size:
        raise ValueError(f"{flat.size} numbers in its vectors, {count} x {size} are wanted")
    plain["answer"] = Answer(**plain["answer"])
    plain["tops"] = {int(k): (list(ids), list(probs)) for k, (ids, probs) in plain["tops"].items()}
    return RecordedRequest(**{**plain, "leaves": leaves, "vectors": flat.reshape(count, size)})


def _leaf(data: dict[str, Any]) -> Leaf:
    plain = dict(data)
    if "sets" in plain:
        plain["sets"] = Sets(**plain["sets"])
    plain["more"] = {int(k): Sets(**sets) for k, sets in plain.get("more", {}).items()}
    return Leaf(**plain)
