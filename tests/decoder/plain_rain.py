"""RAIN once more, written from the description of the official procedure: plain Python, one thing after another, nodes as
objects, every forward from the first token. Slow. The tests' second opinion on RainSearch, which shares no code with it.

Randomness is an input of the procedure: draws bear the same names here and there (raindecode.engine.rng). Every token prefix
whose logits or hidden state the procedure needs is written down; there is no way to answer with fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from raindecode.engine.rng import mix, name_draw
from raindecode.engine.sampler import uniforms
from raindecode.search.embedder import HiddenStates, TextEmbedder
from raindecode.search.evaluator import CallableEvaluator, SelfEvaluation
from raindecode.search.rain import RAIN
from raindecode.text import Codec
from raindecode.types import Request

Path = tuple[int, ...]
Row = np.ndarray[Any, np.dtype[Any]]
ROLLOUT, EXPAND, DYNAMIC = 1, 2, 3


class Model(Protocol):
    """A language model without a cache."""

    def logits(self, path: Path) -> Row: ...

    def hidden(self, path: Path) -> Row: ...


@dataclass(eq=False)
class PlainNode:
    """n (fractional visits), fn (direct visits), q, p; `mean` is the mean embedding of the paths through the node."""

    parent: PlainNode | None
    tokens: Path
    step: int
    p: float = 1.0
    n: float = 0.0
    fn: int = 0
    q: float = 0.0
    mean: Row | None = None
    rolled: int = 0
    asked: int = 0
    children: list[PlainNode] = field(default_factory=list)
    pool: list[tuple[Path, float]] = field(default_factory=list)


class PlainRain:
    """One request. After `run`: text, tokens, reason, trees, iterations, evaluations, needed."""

    def __init__(self, rain: RAIN, model: Model, codec: Codec, request: Request) -> None:
        self.rain, self.model, self.codec, self.request = rain, model, codec, request
        self.prompt: Path = tuple(request.prompt_ids)
        self.stops = [*rain.stop, *request.stop]
        self.last_tokens = set(codec.eos_token_ids) | set(request.stop_token_ids)
        self.root = PlainNode(None, (), 0)
        self.done: Path = ()
        self.scores: dict[str, float] = {}
        self.needed: set[Path] = set()
        self.trees: list[dict[str, Any]] = []
        self.iterations = self.evaluations = self.added = self.credited = 0
        self.value = 0.0
        self.reason: str | None = None

    # ---- outer loop
    def run(self) -> PlainRain:
        while self.reason is None:
            first = self.root.fn
            for _ in range(first, max(self.rain.max_iterations, first + self.rain.min_new_iterations)):
                self.iterate()
                best = self.most_visited()
                if best.fn > self.rain.min_visits and best.q > self.rain.value_threshold:
                    break
            best = self.most_visited()
            self.trees.append({"committed": list(self.done), "chosen": best.tokens, "root": self.export(self.root)})
            self.done += best.tokens
            self.value = best.q
            self.reason = self.end(self.done)
            self.make_root(best)
        return self

    def most_visited(self) -> PlainNode:
        return max(self.root.children, key=lambda child: (child.n, child.q))

    def make_root(self, node: PlainNode) -> None:
        node.parent = None
        self.root = node
        mixed = [self.mixed(child.p, len(node.children)) for child in node.children]
        for child, p in zip(node.children, mixed, strict=True):
            child.p = p / sum(mixed)

    # ---- one iteration
    def iterate(self) -> None:
        node, path = self.root, [self.root]
        while node.children:
            self.maybe_add_child(node)
            node = max(node.children, key=lambda child: self.score(node, child))
            path.append(node)
        answer = self.done + tuple(t for inner in path[1:] for t in inner.tokens)
        tail = self.roll_out(node, answer)
        value = self.judge(self.cut(self.text(answer + tail)))
        if self.end(answer) is None:
            self.expand(node, answer)
        self.back_up(path, value, answer, tail)
        self.iterations += 1

    def score(self, parent: PlainNode, child: PlainNode) -> float:
        # All values lie in [-1, 1] and the official record of the extremes starts there, so it never moves.
        worth = 0.0 if child.n == 0 else (child.q + 1.0) / (2.0 + 1e-5)
        return worth + self.rain.c_puct * child.p * math.sqrt(parent.n) / (1.0 + child.n)

    def back_up(self, path: list[PlainNode], value: float, answer: Path, tail: Path) -> None:
        parts = [node.tokens for node in path[1:]]
        for depth in range(len(path) - 1, -1, -1):
            node = path[depth]
            node.n += 1
            node.fn += 1
            if depth and self.rain.embedder is not None:
                own = tuple(t for part in parts[depth - 1 :] for t in part)
                x = self.embed(self.prompt + answer + tail, own + tail)
                node.mean = x if node.mean is None else node.mean + (x - node.mean) / node.fn
                self.credit(node, value)
            node.q += (value - node.q) / node.n

    def credit(self, node: PlainNode, value: float) -> None:
        assert node.parent is not None
        assert node.mean is not None
        for other in node.parent.children:
            if other is node or other.mean is None:
                continue
            cosine = float(node.mean @ other.mean / (np.linalg.norm(node.mean) * np.linalg.norm(other.mean)))
            if cosine >= self.rain.similarity_threshold:
                weight = self.rain.similarity_weight * cosine
                other.q = (other.q * other.n + weight * value) / (other.n + weight)
                other.n += weight
                self.credited += 1

    # ---- children
    def expand(self, node: PlainNode, answer: Path) -> None:
        length = self.set_length(node.step)
        if length == 1:
            top = self.shaped(self.prompt + answer, self.rain.first_top_k, self.rain.expansion_temperature)
            node.pool = [((token,), p) for token, p in top]
        else:
            node.pool = self.sets(answer, length, self.rain.num_samples, self.rain.max_tries, EXPAND)
        total = sum(p for _, p in node.pool)
        for tokens, p in node.pool:
            prior = self.mixed(p / total, len(node.pool)) if node.parent is None else p / total
            node.children.append(PlainNode(node, tokens, node.step + 1, prior))

    def maybe_add_child(self, node: PlainNode) -> None:
        kids, rain = node.children, self.rain
        if not rain.dynamic_children or rain.embedder is None or not 2 <= len(kids) < rain.max_children:
            return
        means = [kid.mean for kid in kids if kid.mean is not None]
        if len(means) < len(kids) or max(kid.q for kid in kids) >= rain.dynamic_value:
            return
        if np.linalg.norm(np.var(np.stack(means), axis=0, ddof=1)) >= rain.dynamic_variance * len(kids[0].tokens):
            return
        answer, length = self.answer_of(node), self.set_length(node.step)
        if length == 1:
            top = self.shaped(self.prompt + answer, len(kids) + 1, 1.0)
            pool: list[tuple[Path, float]] = [((token,), p) for token, p in top]
        else:
            purpose = name_draw(DYNAMIC, node.asked)
            node.pool = self.sets(answer, length, 1, rain.dynamic_tries, purpose) + node.pool
            pool = node.pool[: len(kids) + 1]
        node.asked += 1
        total, known = sum(p for _, p in pool), {kid.tokens for kid in kids}
        for tokens, p in pool:
            if tokens not in known:
                prior = self.mixed(p / total, len(pool)) if node.parent is None else p / total
                kids.append(PlainNode(node, tokens, node.step + 1, prior))
                known.add(tokens)
                self.added += 1

    def sets(self, answer: Path, length: int, wanted: int, tries: int, purpose: int) -> list[tuple[Path, float]]:
        greedy, p_greedy = self.chain(answer, length, purpose, -1)
        found: dict[Path, float] = {}
        for attempt in range(tries):
            if len(found) == wanted:
                break
            tokens, p = self.chain(answer, length, purpose, attempt)
            if tokens != greedy and tokens not in found:
                found[tokens] = p
        if found:
            p_greedy = max(min(p_greedy, sum(found.values())), max(found.values()) + min(found.values()))
        return [(greedy, p_greedy), *found.items()]

    def chain(self, answer: Path, length: int, purpose: int, attempt: int) -> tuple[Path, float]:
        tokens: Path = ()
        joint = 1.0
        while len(tokens) < length and (not tokens or self.end(answer + tokens) is None):
            shaped = self.shaped(self.prompt + answer + tokens, self.rain.top_k, self.rain.expansion_temperature)
            if attempt < 0:
                token, p = shaped[0]
            else:
                token, p = self.draw(shaped, name_draw(self.name(answer + tokens), purpose, attempt + 1))
            tokens += (token,)
            joint *= p
        return tokens, joint

    # ---- the language model
    def roll_out(self, node: PlainNode, answer: Path) -> Path:
        tail: Path = ()
        while self.end(answer + tail) is None:
            so_far = self.request.prompt_text + self.text(answer + tail)
            if self.rain.rollout_stop and so_far.endswith(tuple(self.rain.rollout_stop)):
                break
            shaped = self.shaped(self.prompt + answer + tail, 0, 1.0)
            token, _ = self.draw(shaped, name_draw(self.name(answer), ROLLOUT, node.rolled, len(tail)))
            tail += (token,)
        node.rolled += 1
        return tail

    def shaped(self, path: Path, top: int, temperature: float) -> list[tuple[int, float]]:
        """(token, probability): the `top` most likely, likeliest first; all, in order of ids, for 0."""
        logits = self.at(path).astype(np.float64) / temperature
        ids = list(range(len(logits)))
        if top:
            ids = sorted(ids, key=lambda i: (-logits[i], i))[:top]
        weights = np.exp(logits[ids] - logits.max())
        return list(zip(ids, (weights / weights.sum()).tolist(), strict=True))

    def draw(self, shaped: Sequence[tuple[int, float]], name: int) -> tuple[int, float]:
        level = uniforms([self.request.seed], [name])[0]
        mass = 0.0
        for token, p in shaped:
            mass += p
            if mass > level:
                return token, p
        return shaped[-1]

    def name(self, answer: Path) -> int:
        state = 0
        for value in [*repr(None).encode(), *(token + 1 for token in self.prompt + answer)]:
            state = mix(state, value)
        return state

    def at(self, path: Path) -> Row:
        self.need(path)
        return self.model.logits(path)

    def need(self, path: Path) -> None:
        while path and path not in self.needed:
            self.needed.add(path)
            path = path[:-1]

    # ---- verdicts and vectors
    def judge(self, text: str) -> float:
        if text not in self.scores:
            self.scores[text] = self.ask(text)
            self.evaluations += 1
        return self.scores[text]

    def ask(self, text: str) -> float:
        evaluator = self.rain.evaluator
        if isinstance(evaluator, CallableEvaluator):
            return float(evaluator.function([(self.request.prompt, text)])[0])
        assert isinstance(evaluator, SelfEvaluation)
        t = evaluator.template
        right = []
        for question, good in ((t.good_first, 0), (t.good_second, 1)):
            if question is not None:
                asked = t.header + t.turn.replace("{prompt}", self.request.prompt) + text + question
                row = self.at(tuple(self.codec.encode(asked)))
                spelled = [row[self.codec.encode(asked + letter)[-1]] for letter in t.letters]
                right.append(spelled[good] > spelled[1 - good])
        return 2.0 * float(np.mean(right)) - 1.0

    def embed(self, path: Path, own: Path) -> Row:
        embedder = self.rain.embedder
        if isinstance(embedder, TextEmbedder):
            vector = np.asarray(embedder.function([self.codec.decode(own)]), dtype=np.float64)[0]
        else:
            assert isinstance(embedder, HiddenStates)
            self.need(path)
            vector = self.mean_state(path, len(path) - len(own), len(path))
            if embedder.center:
                vector = vector - self.mean_state(path, max(0, len(self.prompt) - 16), len(self.prompt))
        return vector / np.linalg.norm(vector)  # type: ignore[no-any-return]

    def mean_state(self, path: Path, start: int, end: int) -> Row:
        states = [self.model.hidden(path[: i + 1]).astype(np.float64) for i in range(start, end)]
        return np.mean(states, axis=0)  # type: ignore[no-any-return]

    # ---- texts
    def text(self, answer: Path) -> str:
        if answer and answer[-1] in self.last_tokens:
            answer = answer[:-1]
        text = self.codec.continuation(self.prompt, answer)
        return text[: min([len(text), *(text.find(stop) for stop in self.stops if stop in text)])]

    def cut(self, text: str) -> str:
        last = max([text.rfind(mark) for mark in self.rain.keep_after_last], default=-1)
        return text if last < 0 else text[: last + 1]

    def end(self, answer: Path) -> str | None:
        if answer and answer[-1] in self.codec.eos_token_ids:
            return "eos"
        if answer and answer[-1] in self.request.stop_token_ids:
            return "stop"
        if any(stop in self.codec.continuation(self.prompt, answer) for stop in self.stops):
            return "stop"
        return "length" if len(answer) >= self.request.max_new_tokens else None

    def answer_of(self, node: PlainNode) -> Path:
        parts: list[Path] = []
        while node.parent is not None:
            parts.append(node.tokens)
            node = node.parent
        return self.done + tuple(t for part in reversed(parts) for t in part)

    def mixed(self, p: float, k: int) -> float:
        return (1.0 - self.rain.root_prior_mix) * p + self.rain.root_prior_mix / k

    def set_length(self, step: int) -> int:
        return [*self.rain.set_lengths, *[self.rain.set_lengths[-1]] * step][step]

    def export(self, node: PlainNode) -> dict[str, Any]:
        """As raindecode records it, less slots and texts."""
        numbers = {"prior": node.p if node is not self.root else 1.0, "visits": node.n, "value": node.q}
        kids = [self.export(child) for child in node.children]
        return {"tokens": list(node.tokens), "direct_visits": node.fn, **numbers, "children": kids}
