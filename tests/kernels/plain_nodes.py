"""RAIN's search tree as plain Python objects, written from the description of the official procedure and not from the
kernels: one object per node, children in a list, one call per path node. Slow; the tests' second opinion."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass
class Margins:
    """How close a run came to a decision that rounding could flip."""

    cosine: float = math.inf
    variance: float = math.inf
    score: float = math.inf


@dataclass(eq=False)
class Node:
    """A node: n (fractional visits), fn (direct visits), q, p, and the mean embedding of its paths."""

    parent: Node | None
    prior: float
    n: float = 0.0
    fn: int = 0
    q: float = 0.0
    mean: Vector | None = None
    set_length: int = 1
    children: list[Node] = field(default_factory=list)


@dataclass
class PlainSearch:
    """One tree. `number` turns a Python float into the precision wanted (float, or numpy.float32)."""

    number: Callable[[float], float] = float
    c_puct: float = 2.0
    weight: float = 0.2
    threshold: float = 0.95
    mix: float = 0.25
    variance: float = 0.03
    max_children: int = 20
    margins: Margins = field(default_factory=Margins)

    def __post_init__(self) -> None:
        self.root = Node(None, self.number(0.0), self.number(0.0), 0, self.number(0.0))
        self.low, self.high = self.number(-1.0), self.number(1.0)

    def select(self, new_child: Callable[[Node], float | None]) -> list[Node]:
        """Walk to a leaf; where RAIN asks for one more child, `new_child` gives its prior or None."""
        path = [self.root]
        while path[-1].children:
            node = path[-1]
            if self._lacks_variety(node):
                prior = new_child(node)
                if prior is not None:
                    node.children.append(self._child(node, prior))
            scores = [self._score(node, child) for child in node.children]
            best = max(range(len(scores)), key=scores.__getitem__)
            gaps = [float(scores[best]) - float(s) for s in scores if s != scores[best]]
            self.margins.score = min([self.margins.score, *gaps])
            path.append(node.children[best])
        return path

    def expand(self, node: Node, priors: list[float], set_length: int) -> None:
        """Give a leaf its children; at the root the priors are mixed with uniform ones."""
        one, mix = self.number(1.0), self.number(self.mix)
        for prior in priors:
            p = self.number(prior)
            if node is self.root:
                p = (one - mix) * p + mix / self.number(len(priors))
            node.children.append(self._child(node, p))
        node.set_length = set_length

    def backup(self, path: list[Node], value: float, texts: list[Vector | None]) -> None:
        """Leaf to root; texts[j] embeds what follows path[j]'s parent, None at the root."""
        g = self.number(value)
        for node, x in zip(reversed(path), reversed(texts), strict=True):
            node.n = node.n + self.number(1.0)
            node.fn += 1
            if node.parent is not None:
                assert x is not None
                node.mean = x if node.mean is None else node.mean + (x - node.mean) / node.fn
                self._credit_siblings(node, g)
            node.q = node.q + (g - node.q) / node.n
            if node.parent is not None:
                self.low, self.high = min(self.low, node.q), max(self.high, node.q)

    def best(self) -> Node:
        """Most visits, then value, then first."""
        return max(self.root.children, key=lambda c: (c.n, c.q))

    def reroot(self, node: Node) -> None:
        """`node` becomes the root; its children's priors are mixed again and normalised."""
        node.parent = None
        self.root = node
        if not node.children:
            return
        one, mix, k = self.number(1.0), self.number(self.mix), self.number(len(node.children))
        total = self.number(0.0)
        for child in node.children:
            child.prior = (one - mix) * child.prior + mix / k
            total = total + child.prior
        for child in node.children:
            child.prior = child.prior / total

    def cosine(self, a: Vector, b: Vector) -> float:
        """Cosine of two mean embeddings."""
        return float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b)))

    def _child(self, parent: Node, prior: float) -> Node:
        zero = self.number(0.0)
        return Node(parent, self.number(prior), zero, 0, zero)

    def _score(self, parent: Node, child: Node) -> float:
        worth = self.number(0.0)
        if child.n != 0:
            worth = (child.q - self.low) / (self.high - self.low + self.number(1e-5))
        root = self.number(math.sqrt(parent.n))
        return worth + self.number(self.c_puct) * child.prior * root / (self.number(1.0) + child.n)

    def _credit_siblings(self, node: Node, g: float) -> None:
        assert node.parent is not None
        assert node.mean is not None
        for other in node.parent.children:
            if other is node or other.mean is None:
                continue
            cosine = self.cosine(node.mean, other.mean)
            self.margins.cosine = min(self.margins.cosine, abs(cosine - self.threshold))
            if cosine >= self.threshold:
                w = self.number(self.weight) * self.number(cosine)
                total = other.n + w
                other.q = (other.q * other.n + w * g) / total
                other.n = total

    def _lacks_variety(self, node: Node) -> bool:
        kids = node.children
        means = [kid.mean for kid in kids if kid.mean is not None]
        if not 2 <= len(kids) < self.max_children or len(means) < len(kids) or max(k.q for k in kids) >= 0:
            return False
        spread = float(np.linalg.norm(np.stack(means).var(axis=0, ddof=1)))
        limit = self.variance * node.set_length
        self.margins.variance = min(self.margins.variance, abs(spread - limit) / limit)
        return spread < limit
