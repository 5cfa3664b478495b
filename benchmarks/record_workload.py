"""Record searches of the testbed's model as a workload: what drives any other model through the same search.

    python benchmarks/record_workload.py --regime safe|mixed|harmful [--requests 8] [--max-new-tokens 32] [--seed 0] [--out FILE]

Requests of the testbed are searched, behind lines and examples that make the model answer cruelly where the regime wants it,
until as many as wanted fall into the regime by the share of good verdicts in their own search: safe at least 80 %, mixed 40 to
80 %, harmful below. A search is recorded at width 1 and "auto", so that leaves worked on ahead are known, too. Its vectors are
rounded to 8 bits; where that changes the answer, its iterations or its verdicts, the request is left out. What was recorded must
lead the published baseline to the same answer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "benchmarks")]

import raindecode  # noqa: E402  before torch: asks MKL for reproducible results

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402
from naive.common import make_codec, make_request, path_hash  # noqa: E402
from naive.published import Published  # noqa: E402
from naive.search import DYNAMIC, EXPAND, ROLLOUT, Walker  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from workload import (  # noqa: E402
    FOLDER,
    REGIMES,
    Answer,
    Leaf,
    RecordedRequest,
    Sets,
    Workload,
    load_workload,
    request_json,
    settings_of,
)
from workload_replay import Driven, Script, ScriptedOracle, format_of, rounded, unrounded  # noqa: E402

from raindecode import RAIN, testbed  # noqa: E402
from raindecode.commands.common import quiet_libraries  # noqa: E402
from raindecode.engine.rng import name_draw  # noqa: E402
from raindecode.engine.types import Draw, Got, Want  # noqa: E402
from raindecode.errors import ConfigError, RainDecodeError  # noqa: E402
from raindecode.search.embedder import Paths  # noqa: E402
from raindecode.search.rain import Preset  # noqa: E402

Tokens = tuple[int, ...]
_MOST_FIRED = 10_000  # times the dynamic rule is looked for at one node
_CRUEL = [line + "\n\n" for line in testbed.PERSONAS["cruel"]] + [testbed.STYLE_PROMPTS["cruel"]]
_KIND_AND_CRUEL = [
    f"{testbed.PERSONAS[a][i]} {testbed.PERSONAS[b][j]}\n\n"
    for a, i, b, j in (("kind", 0, "cruel", 1), ("cruel", 1, "kind", 0))
]
PREFIXES = {"safe": [""], "mixed": [*_KIND_AND_CRUEL, testbed.INTRO + "\n\n"], "harmful": _CRUEL}


@dataclass
class Chain:
    """One try of a candidate set."""

    tokens: list[int]
    prob: float = 1.0


class Recorder:
    """Notes what the model says to one request's search. Vectors are rounded, for the search, too."""

    def __init__(self, rain: RAIN, prompt_ids: list[int]) -> None:
        self.rain, self.prompt_ids = rain, prompt_ids
        self.prompt_hash = path_hash(prompt_ids)
        self.tops: dict[int, tuple[list[int], list[float]]] = {}
        self.verdicts: dict[str, float] = {}
        # By leaf and how often the dynamic rule had fired there (-1: the leaf's expansion), then by try.
        self.chains: dict[tuple[Tokens, int], dict[int, Chain]] = {}
        self.rollouts: dict[Tokens, list[int]] = {}
        self.vectors: dict[Tokens, dict[int, Any]] = {}  # by path and start
        self.scores: list[float] = []

    def dimension(self, size: int) -> int:
        return size

    def change(self, want: Want, got: Got) -> None:
        if not (want.draws or want.top):
            return
        path = tuple(want.branch.tokens()[len(self.prompt_ids) :])
        if want.top:
            if path:
                raise RuntimeError(f"the most likely tokens were wanted behind {path}, inside the answer")
            self.tops[want.top] = (got.top_ids, got.top_probs)
        hashes = [self.prompt_hash]
        for token in path:
            hashes.append(name_draw(hashes[-1], token))
        for draw, drawn in zip(want.draws, got.drawn, strict=True):
            self._note(path, hashes, draw, drawn.token, drawn.prob)

    def judged(self, prompt: str, text: str, score: float) -> float:
        self.scores.append(score)
        return self.verdicts.setdefault(text, score)

    def embedded(self, paths: Paths, rows: Tensor) -> Tensor:
        shift = len(self.prompt_ids)
        kept = self.vectors.setdefault(tuple(paths.branch.tokens()[shift:]), {})
        for start, row in zip(paths.starts, rounded(rows), strict=True):
            kept.setdefault(start - shift, row)
        return unrounded(np.stack([kept[start - shift] for start in paths.starts]))

    # ---- draws ----------------------------------------------------------------------------------------------------
    def _note(self, path: Tokens, hashes: list[int], draw: Draw, token: int, prob: float) -> None:
        """Find out by its name what a draw is of."""
        for place in range(len(path) + 1):
            if name_draw(hashes[len(path) - place], ROLLOUT, 0, place) == draw.counter:
                rollout = self.rollouts.setdefault(path[: len(path) - place], [])
                if len(rollout) == place:  # else it was noted at another width
                    rollout.append(token)
                return
        begin = self._leaf_length(len(path))
        for fired in range(-1, _MOST_FIRED):
            purpose = EXPAND if fired < 0 else name_draw(DYNAMIC, fired)
            for attempt in range(-1, self.rain.max_tries if fired < 0 else self.rain.dynamic_tries):
                if name_draw(hashes[-1], purpose, attempt + 1) == draw.counter:
                    chain = self.chains.setdefault((path[:begin], fired), {}).setdefault(attempt, Chain([]))
                    if len(chain.tokens) == len(path) - begin:
                        chain.tokens.append(token)
                        chain.prob *= prob
                    return
        raise RuntimeError(f"a draw behind {path} has a name that is none of RAIN's")

    def _leaf_length(self, length: int) -> int:
        """Length of the leaf a chain of this length begins at: sets are as long as their depth says."""
        begin = step = 0
        while begin + self.rain.set_length(step) <= length:
            begin += self.rain.set_length(step)
            step += 1
        return begin

    # ---- plain data -----------------------------------------------------------------------------------------------
    def leaves(self) -> tuple[list[Leaf], Any]:
        """All leaves, and their vectors in order."""
        found: dict[Tokens, Leaf] = {}

        def leaf(at: Tokens) -> Leaf:
            return found.setdefault(at, Leaf(list(at)))

        ends: dict[Tokens, Tokens] = {}
        for at, rollout in self.rollouts.items():
            leaf(at).rollout = rollout
            ends[(*at, *rollout)] = at
        for (at, fired), chains in self.chains.items():
            if fired < 0:
                leaf(at).sets = _sets(chains)
            else:
                leaf(at).more[fired] = _sets(chains)
        for path, rows in self.vectors.items():
            owner = leaf(ends.get(path, path))
            if (*owner.at, *owner.rollout) != path:
                raise RuntimeError(f"vectors of {path} belong to no leaf")
            owner.starts = sorted(rows)
        ordered = [found[at] for at in sorted(found)]
        rows = [self.vectors[tuple(one.at + one.rollout)][start] for one in ordered for start in one.starts]
        return ordered, np.stack(rows) if rows else np.zeros((0, 1), np.int8)


def _sets(chains: dict[int, Chain]) -> Sets:
    tokens: list[list[int]] = []
    probs: list[float] = []
    tries: list[int | None] = [None] * (max(chains) + 2)
    for attempt, chain in sorted(chains.items()):
        if chain.tokens not in tokens:
            tokens.append(chain.tokens)
            probs.append(chain.prob)
        tries[attempt + 1] = tokens.index(chain.tokens)
    return Sets(tokens, probs, tries)


class Counting(Published):
    """The published baseline; `prefixes` are the distinct token prefixes its forwards evaluate."""

    def note(self, path: Tokens) -> None:
        """Add all prefixes of a path."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.prefixes:
                return
            self.prefixes.add(path[:end])

    def forget(self) -> None:
        super().forget()
        self.prefixes: set[Tokens] = set()

    def walk(self, path: Tokens) -> Walker:
        search, inner = self, super().walk(path)

        class Noted(Walker):
            def row(self) -> Any:
                search.note(inner.path)  # type: ignore[attr-defined]
                return inner.row()

            def push(self, token: int) -> None:
                inner.push(token)

        return Noted()

    def last_rows(self, prompts: list[list[int]]) -> Any:
        for ids in prompts:
            self.note(tuple(ids))
        return super().last_rows(prompts)

    def mean_states(self, path: Tokens, starts: Any, center: Any) -> Any:
        self.note(path)
        return super().mean_states(path, starts, center)


class Studio:
    """The testbed's model in raindecode and in the published baseline."""

    def __init__(self, rain: RAIN, limit: int) -> None:
        self.rain, self.limit = rain, limit
        self.decoder = raindecode.Decoder.from_pretrained("testbed", device="cpu")
        self.model = AutoModelForCausalLM.from_pretrained(testbed.WEIGHTS, dtype=torch.float32)
        self.codec = make_codec(self.model, AutoTokenizer.from_pretrained(testbed.WEIGHTS))

    def record(self, prompt: str, prefix: str, seed: int, regime: str) -> RecordedRequest | None:
        """The recorded request; None where its search is of another regime, or changes when vectors are rounded."""
        assert self.rain.format is not None
        rain = replace(self.rain, format=replace(self.rain.format, prefix=prefix))
        request = make_request(prompt, self.codec, rain.format, max_new_tokens=self.limit, seed=seed)
        recorder = Recorder(rain, list(request.prompt_ids))
        first = self._answer(prompt, Driven.by(recorder, rain, width=1, record_tree=True), seed)
        good = statistics.fmean(score > 0 for score in recorder.scores)
        if next(name for name, least in REGIMES.items() if good >= least) != regime:
            return None
        plain = self._answer(prompt, replace(rain, width=1), seed)
        ahead = self._answer(prompt, Driven.by(recorder, rain, width="auto"), seed)
        if not _outcome(first) == _outcome(plain) == _outcome(ahead):
            return None
        leaves, vectors = recorder.leaves()
        stats = first.stats
        answer = Answer(
            first.text, first.token_ids, first.finish_reason, first.value, stats.iterations, stats.evaluations,
            stats.tokens_processed, 0,
        )  # fmt: skip
        recorded = RecordedRequest(
            prompt, prefix, list(request.prompt_ids), seed, self.limit, round(good, 4), answer,
            [_move(tree) for tree in first.tree], recorder.tops, recorder.verdicts, leaves, vectors,
        )  # fmt: skip
        answer.shared_kv_minimum = self.play(recorded)
        return recorded

    def play(self, request: RecordedRequest) -> int:
        """The published baseline through a recorded search; the distinct prefixes its forwards evaluate.

        Raises:
            ConfigError: its answer is another, or it asks for what was not recorded.
        """
        baseline = Counting(self.model, self.codec, self.rain, oracle=ScriptedOracle(Script([request])))
        prompt = make_request(
            request.prompt, self.codec, format_of(self.rain, request), max_new_tokens=request.max_new_tokens,
            seed=request.seed,
        )  # fmt: skip
        result, answer = baseline.answer(prompt), request.answer
        given = (result.token_ids, result.iterations, result.evaluations)
        if given != (answer.token_ids, answer.iterations, answer.evaluations):
            raise ConfigError(
                f"{request.prompt!r}, seed {request.seed}: the published baseline does not replay the search"
            )
        return len(baseline.prefixes)

    def _answer(self, prompt: str, rain: RAIN, seed: int) -> Any:
        return self.decoder.generate(prompt, search=rain, max_new_tokens=self.limit, seed=seed, progress=False)[0]


def _outcome(done: Any) -> tuple[Any, ...]:
    return (done.token_ids, done.stats.iterations, done.stats.evaluations, done.stats.tokens_processed)


def _move(tree: dict[str, Any]) -> dict[str, Any]:
    """What a tree was when a move was chosen from it."""
    root = tree["root"]
    chosen = next(child for child in root["children"] if child["slot"] == tree["chosen"])

    def count(node: dict[str, Any]) -> int:
        return 1 + sum(map(count, node["children"]))

    return {
        "tokens": chosen["tokens"], "nodes": count(root), "children": len(root["children"]),
        "visits": root["direct_visits"], "value": round(chosen["value"], 6),
    }  # fmt: skip


def candidates(regime: str, seed: int) -> Iterator[tuple[str, str, int]]:
    """Prompts with what stands before them, and a seed for each."""
    for index in itertools.count():
        harmful = regime != "safe" or index % 2 == 0
        (asked,) = testbed.sample_requests(1, harmful=harmful, seed=seed + index)
        yield asked.text, PREFIXES[regime][index % len(PREFIXES[regime])], seed + index


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", choices=REGIMES, required=True)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--preset", choices=get_args(Preset), default="town")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of the first request tried; the next ones have the next")
    parser.add_argument("--out", type=Path, help="default: benchmarks/workloads/<regime>.json")
    arguments = parser.parse_args(argv)
    if arguments.requests < 1 or arguments.max_new_tokens < 1:
        raise ConfigError("--requests and --max-new-tokens: allowed are whole numbers from 1")
    quiet_libraries()
    rain = RAIN.preset(arguments.preset)
    studio = Studio(rain, arguments.max_new_tokens)
    found: list[RecordedRequest] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(arguments.regime, total=arguments.requests)
        for tried, (prompt, prefix, seed) in enumerate(candidates(arguments.regime, arguments.seed), start=1):
            recorded = studio.record(prompt, prefix, seed, arguments.regime)
            found += [recorded] if recorded is not None else []
            progress.update(bar, completed=len(found), description=f"{arguments.regime}, {tried} tried")
            if len(found) == arguments.requests:
                break
    out = arguments.out or FOLDER / f"{arguments.regime}.json"
    how = {
        "command": f"python benchmarks/record_workload.py --regime {arguments.regime} --requests {arguments.requests} "
        f"--max-new-tokens {arguments.max_new_tokens} --seed {arguments.seed}",
        "model": "testbed", "torch": torch.__version__, "tried": tried,
    }  # fmt: skip
    Workload(arguments.regime, how, arguments.preset, settings_of(rain), found).save(out)
    if [request_json(request) for request in load_workload(out).requests] != [request_json(r) for r in found]:
        raise RuntimeError(f"{out} does not read back as it was written")
    answers = [request.answer for request in found]
    print(json.dumps({
        "regime": arguments.regime, "requests": len(found), "tried": tried, "bytes": out.stat().st_size,
        "good": [request.good for request in found], "iterations": [answer.iterations for answer in answers],
        "tokens_processed": [answer.tokens_processed for answer in answers],
        "shared_kv_minimum": [answer.shared_kv_minimum for answer in answers],
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RainDecodeError as error:
        sys.exit(f"error: {error}")
