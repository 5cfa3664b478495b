"""The model's share of one RAIN iteration: all that evaluating a leaf asks of it.

It depends on the leaf's tokens, the number of its visit and the request's seed alone, so it may be done before the search
comes to the leaf: the result is the same, and what it counts is booked when the search uses it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raindecode.engine.branch import Branch, Ledger, Tab
from raindecode.engine.rng import name_draw
from raindecode.engine.sampler import Filter
from raindecode.engine.types import Draw, Got, Search, Want
from raindecode.search.answer import Answer
from raindecode.search.context import SearchContext, together
from raindecode.search.crew import Crew
from raindecode.search.embedder import Paths
from raindecode.search.rain_sets import Candidate, candidate_sets, first_tokens
from raindecode.search.rain_tree import RainTree, SearchNode

if TYPE_CHECKING:
    from raindecode.search.rain import RAIN

ROLLOUT, EXPAND, DYNAMIC = 1, 2, 3  # purposes, part of every draw's name
Steps = Generator[Any, Any, Any]


class Verdict:
    """The evaluator's score of one text, asked for once however many leaves lead to it."""

    def __init__(self, request: Ledger) -> None:
        self.tab = Tab(request)
        self.score: float | None = None
        self.error: Exception | None = None


class LeafWorks:
    """What all works of one request have in common.

    Attributes:
        verdicts: by text, under way or done.
        used: texts whose verdicts the search has used.
        news: whether anything ended since the owner last looked.
    """

    def __init__(self, rain: RAIN, context: SearchContext, tree: RainTree) -> None:
        self.rain = rain
        self.context = context
        self.tree = tree
        self.answer = Answer(rain, context)
        self.verdicts: dict[str, Verdict] = {}
        self.used: set[str] = set()
        self.news = True
        self.crew = Crew()

    def ended(self, node: SearchNode) -> bool:
        """Whether the answer ends with `node`. Decided once per node."""
        if node.end_reason is SearchNode.UNDECIDED:
            node.end_reason = self.answer.end_reason(self.tree.path_tokens(node))
        return node.end_reason is not None

    def sets(self, node: SearchNode, tab: Tab, *, samples: int, tries: int, purpose: int) -> Steps:
        """Candidate sets behind a node."""
        path = self.tree.path_tokens(node)
        tab.ran = True
        sets = yield from candidate_sets(
            self.rain,
            self.context.request.seed,
            self.tree.branch(node),
            self.rain.set_length(node.step),
            samples=samples,
            tries=tries,
            purpose=purpose,
            ends=lambda tokens: self.answer.chain_ends(path, tokens),
            ledger=tab,
        )
        return sets


class LeafWork:
    """Evaluation of one leaf at one visit.

    Attributes:
        candidates: the leaf's token sets; None until they are known, and for a leaf that ends the answer.
        value: the evaluator's score; None until it is known.
        error: why there is none.
    """

    def __init__(self, works: LeafWorks, leaf: SearchNode) -> None:
        self.leaf = leaf
        self.candidates: list[Candidate] | None = None
        self.value: float | None = None
        self.error: Exception | None = None
        self._works = works
        self._path = leaf.path()
        self._text = ""
        self._verdict: Verdict | None = None
        self._rows: Tensor | None = None
        request = works.context.ledger
        self._rolling, self._embedding, self._expanding = Tab(request), Tab(request), Tab(request)
        jobs = [self._guarded(self._evaluate())]
        if not works.ended(leaf):
            jobs.append(self._guarded(self._expand()))
        self._open = dict.fromkeys(jobs)
        for job in jobs:
            works.crew.start(job)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return not self._open

    def cancel(self) -> None:
        """Give the work up."""
        for job in list(self._open):
            self._works.crew.cancel(job)
        self._open.clear()

    def embeddings(self, levels: int) -> Tensor | None:
        """[levels, dimension] for the last `levels` nodes of the path, the first of them without an embedding."""
        if self._rows is None or levels < 2:
            return None
        rows = self._rows[len(self._rows) - (levels - 1) :]
        return torch.cat([rows.new_zeros(1, rows.shape[1]), rows])

    def use(self, levels: int) -> tuple[float, bool]:
        """Book what the work ran. The value, and whether it is the first use of its text's verdict.

        Raises:
            whatever the evaluator or the embedder raised.
        """
        if self.error is not None:
            raise self.error
        assert self.value is not None
        assert self._verdict is not None
        used = [self._rolling, self._expanding] + ([self._embedding] if levels > 1 else [])
        if any(tab.ran for tab in used):
            self._works.tree.book(self.leaf)
        for tab in (*used, self._verdict.tab):
            tab.book()
        first = self._text not in self._works.used
        self._works.used.add(self._text)
        return self.value, first

    def _guarded(self, job: Steps) -> Search:
        """A job that never fails: its failure is the work's, and is met when the work is used."""
        me: list[Search] = []

        def run() -> Steps:
            try:
                yield from job
            except Exception as error:
                self.error = self.error or error
            finally:
                self._open.pop(me[0], None)
                self._works.news = True

        me.append(run())
        return me[0]

    def _expand(self) -> Steps:
        """The candidate sets of the leaf with joint probabilities; single tokens at the start of the answer."""
        works, rain = self._works, self._works.rain
        if rain.set_length(self.leaf.step) == 1:
            self._expanding.ran = True
            branch = works.tree.branch(self.leaf)
            found = yield from first_tokens(branch, rain.first_top_k, rain.expansion_temperature)
        else:
            found = yield from works.sets(
                self.leaf, self._expanding, samples=rain.num_samples, tries=rain.max_tries, purpose=EXPAND
            )
        self.candidates = found

    def _evaluate(self) -> Steps:
        """Roll the leaf out, judge the text, embed the path."""
        works = self._works
        tokens = works.tree.path_tokens(self.leaf)
        rollout = yield from self._rollout(tokens)
        self._text = works.answer.kept(works.answer.text(tokens + rollout))
        jobs: list[Steps] = [self._judge()]
        if len(self._path) > 1 and works.rain.embedder is not None:
            jobs.append(self._embed(rollout))
        value, *_ = yield from together(*jobs)
        self.value = value

    def _rollout(self, tokens: list[int]) -> Steps:
        """Sample on from the leaf until punctuation, the end of the answer, or the token limit."""
        works = self._works
        branch: Branch | None = None
        rollout: list[int] = []
        source = works.tree.branch(self.leaf)
        while not works.answer.rollout_ends(tokens + rollout):
            self._rolling.ran = True
            at = source if branch is None else branch
            # Named by the leaf, not by the growing path: else a child on the rollout's way would repeat it word for word.
            counter = name_draw(source.hash, ROLLOUT, self.leaf.visits, len(rollout))
            draw = Draw(Filter(), works.context.request.seed, counter)
            answers: list[Got] = yield [Want(at, draws=[draw], keep=True)]
            if branch is None:
                branch = source.fork(reserve=16, ledger=self._rolling)
            token = answers[0].drawn[0].token
            rollout.append(token)
            branch.append([token])
        if branch is not None:
            branch.release()
        return rollout

    def _judge(self) -> Steps:
        """The score of the text: known, being asked for by another leaf, or asked for now."""
        works, text = self._works, self._text
        while (found := works.verdicts.get(text)) is not None:
            self._verdict = found
            if found.error is not None:
                raise found.error
            if found.score is not None:
                return found.score
            yield []
        self._verdict = mine = works.verdicts[text] = Verdict(works.context.ledger)
        evaluator: Any = works.rain.evaluator
        context = replace(works.context, ledger=mine.tab)
        try:
            mine.score = yield from evaluator.evaluate(context, context.request.prompt, text)
        except Exception as error:
            mine.error = error
            raise
        finally:
            if mine.score is None and mine.error is None:
                del works.verdicts[text]  # this work was given up: another that waits asks itself
        return mine.score

    def _embed(self, rollout: list[int]) -> Steps:
        """One row per node below the root: the text from its first token to the rollout's end."""
        works, embedder = self._works, self._works.rain.embedder
        assert embedder is not None
        branch = works.tree.branch(self.leaf).fork(ledger=self._embedding)
        branch.append(rollout)
        parts = [node.tokens for node in self._path[1:]]
        starts, at = [], branch.length - len(rollout) - sum(map(len, parts))
        for part in parts:
            starts.append(at)
            at += len(part)

        def texts() -> list[str]:
            return [works.context.codec.decode([t for p in parts[i:] for t in p] + rollout) for i in range(len(parts))]

        context = replace(works.context, ledger=self._embedding)
        rows = yield from embedder.embed(context, Paths(branch, starts, texts))
        self._rows = rows.float().contiguous()
        branch.release()
