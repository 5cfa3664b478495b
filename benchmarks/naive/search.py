"""The RAIN procedure for one request, one thing after another; how the model is run is left to the baselines.

The same algorithm, settings, stop rules and draws as raindecode's (docs/methods/rain.md). Nodes and statistics are plain
Python objects and numpy; their time is the phase "select" and is no part of what the baselines show.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from naive.answers import AnswerRules
from naive.common import Meter, Path, Result, Row, path_hash
from naive.oracle import Oracle
from raindecode.engine.rng import name_draw
from raindecode.engine.sampler import Filter
from raindecode.search.embedder import HiddenStates, TextEmbedder, unit_rows
from raindecode.search.evaluator import CallableEvaluator, ScoreFunction, SelfEvaluation
from raindecode.search.rain import RAIN
from raindecode.text import Codec
from raindecode.types import Request

ROLLOUT, EXPAND, DYNAMIC = 1, 2, 3  # purposes, part of every draw's name
_CENTER_TOKENS = 16
Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(eq=False)
class Node:
    """n (fractional visits), fn (direct visits), q, p; `mean` is the mean embedding of the paths through the node."""

    parent: Node | None
    tokens: Path
    step: int
    p: float = 1.0
    n: float = 0.0
    fn: int = 0
    q: float = 0.0
    mean: Vector | None = None
    rolled: int = 0
    asked: int = 0
    children: list[Node] = field(default_factory=list)
    pool: list[tuple[Path, float]] = field(default_factory=list)


class Walker(ABC):
    """A growing token path of which every next-token row is wanted."""

    @abstractmethod
    def row(self) -> Row:
        """Logits after the path."""

    @abstractmethod
    def push(self, token: int) -> None:
        """Append a token."""


class NaiveRain(ABC):
    """RAIN on plain transformers, one request at a time.

    Args:
        model: a causal language model of transformers, as loaded.
        codec: its tokenizer (common.make_codec).
        rain: the settings; a preset or any other.
        evaluator: scores (prompt, response) pairs instead of rain.evaluator.
        oracle: what drawn tokens, verdicts and vectors are, if not what the model's numbers say (recorded workloads).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        codec: Codec,
        rain: RAIN,
        *,
        evaluator: ScoreFunction | None = None,
        oracle: Oracle | None = None,
    ) -> None:
        self.model, self.codec, self.rain = model, codec, rain
        self.oracle = Oracle() if oracle is None else oracle
        own = rain.evaluator
        self.judge = own.template if isinstance(own, SelfEvaluation) else None
        self.evaluator = own.function if evaluator is None and isinstance(own, CallableEvaluator) else evaluator
        if self.evaluator is None and self.judge is None:
            raise TypeError(f"the baselines take a JudgeTemplate or a function as evaluator, not {type(own).__name__}")
        if not (rain.embedder is None or isinstance(rain.embedder, (HiddenStates, TextEmbedder))):
            raise TypeError(f"the baselines have no embedder {type(rain.embedder).__name__}")
        self._letters: tuple[int, list[int]] | None = None

    # ---- what the baselines differ in -----------------------------------------------------------------------------
    @abstractmethod
    def forget(self) -> None:
        """A request begins: drop what is kept per request."""

    @abstractmethod
    def walk(self, path: Path) -> Walker:
        """A walker behind `path` (prompt included)."""

    @abstractmethod
    def chains(
        self, path: Path, length: int, tries: Sequence[int], purpose: int, ends: Callable[[Path], bool]
    ) -> list[tuple[Path, float]]:
        """Token sets after `path` with joint probabilities, one per try; -1 is the greedy one."""

    @abstractmethod
    def last_rows(self, prompts: list[list[int]]) -> list[Row]:
        """Logits after each evaluation prompt."""

    @abstractmethod
    def mean_states(self, path: Path, starts: Sequence[int], center: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        """Mean final hidden states from each of `starts` to the end of `path`, and of the positions `center`."""

    # ---- outer loop -----------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def answer(self, request: Request) -> Result:
        """Answer one request."""
        rain = self.rain
        self.request = request
        self.meter = Meter()
        self.prompt: Path = tuple(request.prompt_ids)
        self._prompt_hash = path_hash(self.prompt)
        self.rules = AnswerRules(self.codec, rain, request)
        self.verdicts: dict[str, float] = {}
        self.done: Path = ()
        self.root = Node(None, (), 0)
        self.iterations = self.evaluations = 0
        self.forget()
        reason: str | None = None
        value = None
        while reason is None:
            first = self.root.fn
            best = None
            for _ in range(first, max(rain.max_iterations, first + rain.min_new_iterations)):
                self._iterate()
                best = self._most_visited()
                if best is None or (best.fn > rain.min_visits and best.q > rain.value_threshold):
                    break
            if best is None:
                reason = self.rules.ended(self.done) or "length"
                break
            self.done += best.tokens
            value = best.q
            reason = self.rules.ended(self.done)
            self._make_root(best)
        self.meter.stop()
        text = self.rules.judged(self.done)
        return Result(text, list(self.done), reason, self.meter, value, self.iterations, self.evaluations)

    def _most_visited(self) -> Node | None:
        return max(self.root.children, key=lambda child: (child.n, child.q), default=None)

    def _make_root(self, node: Node) -> None:
        node.parent = None
        self.root = node
        mixed = [self._mixed(child.p, len(node.children)) for child in node.children]
        for child, p in zip(node.children, mixed, strict=True):
            child.p = p / sum(mixed)

    # ---- one iteration --------------------------------------------------------------------------------------------
    def _iterate(self) -> None:
        node, path, answer = self.root, [self.root], self.done
        while node.children:
            self._maybe_add_child(node, answer)
            parent_sqrt = math.sqrt(node.n)
            node = max(node.children, key=lambda child: self._score(parent_sqrt, child))
            path.append(node)
            answer += node.tokens
        with self.meter.phase("generate"):
            tail = self._roll_out(node, answer)
        value = self._verdict(self.rules.judged(answer + tail))
        if self.rules.ended(answer) is None:
            self._expand(node, answer)
        vectors = None
        if len(path) > 1 and self.rain.embedder is not None:
            with self.meter.phase("embed"):
                vectors = self._embed(path, answer, tail)
        self._back_up(path, value, vectors)
        self.iterations += 1

    def _score(self, parent_sqrt: float, child: Node) -> float:
        worth = 0.0 if child.n == 0 else (child.q + 1.0) / (2.0 + 1e-5)
        return worth + self.rain.c_puct * child.p * parent_sqrt / (1.0 + child.n)

    def _back_up(self, path: list[Node], value: float, vectors: Vector | None) -> None:
        for depth in range(len(path) - 1, -1, -1):
            node = path[depth]
            node.n += 1
            node.fn += 1
            if depth and vectors is not None:
                x = vectors[depth - 1]
                node.mean = x.copy() if node.mean is None else node.mean + (x - node.mean) / node.fn
                self._credit(node, value)
            node.q += (value - node.q) / node.n

    def _credit(self, node: Node, value: float) -> None:
        assert node.parent is not None
        assert node.mean is not None
        others = [other for other in node.parent.children if other is not node and other.mean is not None]
        if not others:
            return
        means = np.stack([other.mean for other in others if other.mean is not None])
        cosines = means @ node.mean / (np.linalg.norm(means, axis=1) * np.linalg.norm(node.mean))
        for other, cosine in zip(others, cosines.tolist(), strict=True):
            if cosine >= self.rain.similarity_threshold:
                weight = self.rain.similarity_weight * cosine
                other.q = (other.q * other.n + weight * value) / (other.n + weight)
                other.n += weight

    # ---- children -------------------------------------------------------------------------------------------------
    def _expand(self, node: Node, answer: Path) -> None:
        rain, length = self.rain, self.rain.set_length(node.step)
        with self.meter.phase("generate"):
            if length == 1:
                ids, probs = self._top(answer, rain.first_top_k)
                shaped = [p ** (1.0 / rain.expansion_temperature) for p in probs]
                node.pool = [((token,), p / sum(shaped)) for token, p in zip(ids, shaped, strict=True)]
            else:
                node.pool = self._sets(answer, length, rain.num_samples, rain.max_tries, EXPAND)
        total = sum(p for _, p in node.pool)
        for tokens, p in node.pool:
            prior = self._mixed(p / total, len(node.pool)) if node is self.root else p / total
            node.children.append(Node(node, tokens, node.step + 1, prior))

    def _maybe_add_child(self, node: Node, answer: Path) -> None:
        kids, rain = node.children, self.rain
        if not rain.dynamic_children or rain.embedder is None or not 2 <= len(kids) < rain.max_children:
            return
        means = [kid.mean for kid in kids if kid.mean is not None]
        if len(means) < len(kids) or max(kid.q for kid in kids) >= rain.dynamic_value:
            return
        if np.linalg.norm(np.var(np.stack(means), axis=0, ddof=1)) >= rain.dynamic_variance * len(kids[0].tokens):
            return
        length = rain.set_length(node.step)
        with self.meter.phase("generate"):
            if length == 1:
                ids, probs = self._top(answer, len(kids) + 1)
                pool: list[tuple[Path, float]] = [((token,), p) for token, p in zip(ids, probs, strict=True)]
            else:
                fresh = self._sets(answer, length, 1, rain.dynamic_tries, name_draw(DYNAMIC, node.asked))
                node.pool = fresh + node.pool
                pool = node.pool[: len(kids) + 1]
        node.asked += 1
        total, known = sum(p for _, p in pool), {kid.tokens for kid in kids}
        for tokens, p in pool:
            if tokens not in known:
                prior = self._mixed(p / total, len(pool)) if node is self.root else p / total
                kids.append(Node(node, tokens, node.step + 1, prior))
                return

    def _top(self, answer: Path, count: int) -> tuple[list[int], list[float]]:
        return self.oracle.top(self.name(answer), self.walk(self.prompt + answer).row(), count)

    def _sets(self, answer: Path, length: int, wanted: int, tries: int, purpose: int) -> list[tuple[Path, float]]:
        """One greedy set and up to `wanted` distinct sampled ones, tried in waves as large as the number missing."""
        greedy: tuple[Path, float] | None = None
        found: dict[Path, float] = {}
        tried = 0
        while greedy is None or (len(found) < wanted and tried < tries):
            wave = min(wanted - len(found), tries - tried)
            names = [-1] * (greedy is None) + list(range(tried, tried + wave))
            made = self.chains(self.prompt + answer, length, names, purpose, partial(self.rules.closes, answer))
            tried += wave
            if greedy is None:
                greedy = made.pop(0)
            for tokens, p in made:
                if tokens != greedy[0]:
                    found.setdefault(tokens, p)
        p_greedy = greedy[1]
        if found:
            p_greedy = max(min(p_greedy, sum(found.values())), max(found.values()) + min(found.values()))
        return [(greedy[0], p_greedy), *found.items()]

    def set_filter(self) -> Filter:
        """The shape of an expansion's distributions."""
        return Filter(temperature=self.rain.expansion_temperature, top_k=self.rain.top_k)

    def name(self, answer: Sequence[int]) -> int:
        """Hash of the prompt and `answer`, from which draws have their names."""
        return path_hash(answer, self._prompt_hash)

    # ---- rollout, verdict, vectors --------------------------------------------------------------------------------
    def _roll_out(self, node: Node, answer: Path) -> Path:
        tail: Path = ()
        walker: Walker | None = None
        name = self.name(answer)
        while not self.rules.rollout_ends(answer + tail):
            walker = self.walk(self.prompt + answer) if walker is None else walker
            draw_name = name_draw(name, ROLLOUT, node.rolled, len(tail))
            (drawn,) = self.oracle.draw([draw_name], [walker.row()], Filter(), self.request.seed, [False])
            tail += (drawn.token,)
            walker.push(drawn.token)
        node.rolled += 1
        return tail

    def _verdict(self, text: str) -> float:
        if text not in self.verdicts:
            with self.meter.phase("evaluate"):
                self.verdicts[text] = self.oracle.verdict(self.request.prompt, text, self._score_of(text))
            self.evaluations += 1
        return self.verdicts[text]

    def _score_of(self, text: str) -> float:
        if self.evaluator is not None:
            return float(self.evaluator([(self.request.prompt, text)])[0])
        assert self.judge is not None
        if self._letters is None:
            self._letters = self.codec.options(self.judge.prompts("Hello.", " Hi.")[0], self.judge.letters)
        cut, (first, second) = self._letters
        encoded = [self.codec.encode(prompt) for prompt in self.judge.prompts(self.request.prompt, text)]
        rows = self.last_rows([ids[: len(ids) - cut] for ids in encoded])
        good = [row[first] > row[second] if order == 0 else row[second] > row[first] for order, row in enumerate(rows)]
        return 2.0 * (sum(map(bool, good)) / len(good) - 0.5)

    def _embed(self, path: list[Node], answer: Path, tail: Path) -> Vector:
        """[len(path) - 1, size]: unit vectors of the suffixes that begin at each node below the root."""
        embedder = self.rain.embedder
        starts, at = [], len(answer) - sum(len(node.tokens) for node in path[1:])
        for node in path[1:]:
            starts.append(at)
            at += len(node.tokens)
        suffixes = [(answer + tail)[start:] for start in starts]
        if isinstance(embedder, TextEmbedder):
            rows = self.embed_texts(embedder, [self.codec.decode(suffix) for suffix in suffixes])
        else:
            assert isinstance(embedder, HiddenStates)
            whole = self.prompt + answer + tail
            middle = (max(0, len(self.prompt) - _CENTER_TOKENS), len(self.prompt)) if embedder.center else None
            shift = len(self.prompt)
            rows, center = self.mean_states(whole, [shift + start for start in starts], middle)
            rows = rows - center if embedder.center else rows
        unit = self.oracle.vectors(self.name(answer + tail), suffixes, unit_rows(rows.cpu()))
        result: Vector = unit.numpy().astype(np.float64)
        return result

    def embed_texts(self, embedder: TextEmbedder, texts: list[str]) -> Tensor:
        """Vectors of an encoder of texts, all levels in one call."""
        return torch.from_numpy(np.asarray(embedder.function(texts), dtype=np.float32))

    def _mixed(self, p: float, k: int) -> float:
        return (1.0 - self.rain.root_prior_mix) * p + self.rain.root_prior_mix / k
