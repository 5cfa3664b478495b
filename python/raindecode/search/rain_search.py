"""The RAIN procedure for one request: inner search, self-evaluation, outer moves with rewind.

One iteration selects a leaf, rolls it out to the next punctuation mark, has the text judged, expands the leaf and backs
the verdict up. What the model does for a leaf (leaf_work.py) depends on the leaf alone; while the search waits for one,
the leaves it is likely to come to next (forecast.py) are worked on in the same forwards. The search itself goes on one
iteration after the other, so what it finds does not depend on how far ahead is worked. Differences from the official
script, all of them repairs, are listed in docs/methods/rain.md.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from raindecode.engine.branch import Tab
from raindecode.engine.rng import name_draw
from raindecode.engine.types import Got, Want
from raindecode.search.context import SearchContext
from raindecode.search.forecast import guess, start_ahead
from raindecode.search.leaf_work import DYNAMIC, LeafWork, LeafWorks
from raindecode.search.rain_sets import Candidate
from raindecode.search.rain_tree import RainTree, SearchNode
from raindecode.types import Completion, FinishReason, TokenLogprob

if TYPE_CHECKING:
    from raindecode.search.rain import RAIN

Steps = Generator[Any, Any, Any]
# Rows of a forward that `width="auto"` fills when there is nothing better to do, and the most leaves it works on at once.
_AUTO_ROWS, _AUTO_WIDTH = 256, 24
_ADAPT = 0.2  # how fast doubt follows the verdicts
# Rows run per token needed above which nothing is done for verdicts that are not as guessed, and for leaves further off.
_WASTE, _WASTE_BEYOND = 1.3, 1.5


class RainSearch:
    """State of one search. `run` is the generator the engine drives."""

    def __init__(self, rain: RAIN, context: SearchContext) -> None:
        self.rain = rain
        self.context = context
        self.tree = RainTree(rain, context)
        self.works = LeafWorks(rain, context, self.tree)
        self.committed: list[int] = []
        self.iterations = 0
        self.evaluations = 0
        self.value: float | None = None
        self._remaining = 0  # iterations left for this root
        self._ahead: list[LeafWork] = []  # works started ahead that are not done
        self._doubt = 0.25  # share of verdicts that were not as guessed, lately
        self._shown = 0

    # ---- outer loop -----------------------------------------------------------------------------------------------
    def run(self) -> Generator[Any, Any, Completion]:
        """Move after move until the answer ends."""
        try:
            return (yield from self._moves())
        finally:
            self.works.crew.close()
            self.tree.close()

    def _moves(self) -> Generator[Any, Any, Completion]:
        trees: list[dict[str, Any]] = []
        statistics, reason = self.tree.statistics, None
        while reason is None:
            self._remaining = self.rain.iterations(statistics.node(statistics.root).direct_visits)
            while self._remaining > 0:
                yield from self._iteration()
                self._remaining -= 1
                best = statistics.best_child()
                if best is None or (
                    best.direct_visits > self.rain.min_visits and best.value > self.rain.value_threshold
                ):
                    break
            best = statistics.best_child()
            if best is None:
                reason = self._end_reason(self.tree.root) or "length"
                break
            node = self.tree.node(best.slot)
            if self.rain.record_tree:
                trees.append(self.tree.export(node, self.works.answer.text))
            self.committed += node.tokens
            if self.context.on_token is not None:
                for token in node.tokens:
                    self.context.on_token(TokenLogprob(token, math.nan), [])
            self.value = best.value
            reason = self._end_reason(node)
            for work in self.tree.reroot(node):
                work.cancel()
            self._announce(final=reason is not None)
        return self._completion(reason, trees if self.rain.record_tree else None)

    # ---- one iteration --------------------------------------------------------------------------------------------
    def _iteration(self) -> Steps:
        """Select, evaluate, expand, back up."""
        path = yield from self._select()
        leaf = path[-1]
        # A leaf that ends the answer has no rollout: its verdict and embeddings stay what they were.
        work = leaf.result
        if work is None:
            expected = guess(leaf)
            work = yield from self._work(leaf)
            leaf.score, asked = work.use(len(path))
            self._doubt += _ADAPT * (abs(leaf.score - expected) / 2 - self._doubt)
            self.evaluations += asked
            if work.candidates is not None:
                self.tree.expand(leaf, work.candidates)
            elif self.works.ended(leaf):
                leaf.result = work
        assert leaf.score is not None
        self.context.ledger.measure()
        self.tree.backup(path, leaf.score, work.embeddings(len(path)))
        leaf.visits += 1
        self.iterations += 1
        self.works.news = True
        if self.context.on_progress is not None:
            self.context.on_progress(len(self.committed), self.iterations)

    def _select(self) -> Steps:
        """Descend by PUCT, adding a child where the dynamic rule asks for one. The nodes from the root to the leaf."""
        asked: SearchNode | None = None
        while True:
            path, needs_child = self.tree.select(skip=asked)
            if not needs_child:
                return path
            asked = path[-1]
            yield from self._add_child(asked)

    def _work(self, leaf: SearchNode) -> Generator[Any, Any, LeafWork]:
        """The finished work on a leaf, done ahead or now."""
        work = leaf.work or LeafWork(self.works, leaf)
        leaf.work = work
        while not work.done:
            yield from self._advance()
        leaf.work = None
        return work

    def _advance(self) -> Steps:
        """One round of everything under way, on the leaves that come next, too."""
        self._ahead = [work for work in self._ahead if not work.done]
        room = self._width() - 1 - len(self._ahead)
        if room > 0 and self.works.news:
            likely = room - self._unlikely(room)
            self._ahead += start_ahead(self.works, self._remaining, likely, beyond=self._spare(_WASTE_BEYOND))
            if likely < room:
                self._ahead += start_ahead(self.works, self._remaining, room - likely, doubted=True)
            self.works.news = False
        yield from self.works.crew.advance()

    def _unlikely(self, room: int) -> int:
        """How many leaves to work on that come next if a verdict is not what is guessed."""
        return round(self._doubt * room) if self._spare(_WASTE) else 0

    def _spare(self, waste: float) -> bool:
        """Whether no more rows were run than `waste` times those needed so far."""
        ledger = self.context.ledger
        return ledger.tokens_charged <= waste * ledger.tokens_processed

    def _width(self) -> int:
        """Leaves to work on at once."""
        engine, ledger = self.context.engine, self.context.ledger
        if 4 * ledger.kv_tokens_peak * engine.num_running > engine.tree.num_slots:
            return 1  # what is worked on ahead holds K/V
        if self.rain.width != "auto":
            return self.rain.width
        rows = engine.num_running * (self.rain.num_samples + 2)
        return max(1, min(_AUTO_WIDTH, _AUTO_ROWS // rows))

    def _add_child(self, node: SearchNode) -> Steps:
        """The dynamic rule (`checkadd`): at most one more child, its prior normalised with the others' at hand."""
        tab, found, failed = Tab(self.context.ledger), [], []

        def job() -> Steps:
            try:
                found.append((yield from self._pool(node, tab)))
            except Exception as error:
                failed.append(error)

        self.works.crew.start(job())
        while not found and not failed:
            yield from self._advance()
        if failed:
            raise failed[0]
        self.tree.book(node)
        tab.book()
        node.dynamic += 1
        pool: list[Candidate] = found[0]
        total = sum(c.prob for c in pool)
        for candidate in pool:
            if not self.tree.has_child(node, candidate.tokens):
                self.tree.add_child(node, candidate.tokens, candidate.prob / total)
                return

    def _pool(self, node: SearchNode, tab: Tab) -> Generator[Any, Any, list[Candidate]]:
        """Candidates for one more child of `node`."""
        count = self.tree.num_children(node)
        if self.rain.set_length(node.step) == 1:
            answers: list[Got] = yield [Want(self.tree.branch(node), top=count + 1, keep=True)]
            return [Candidate((t,), p) for t, p in zip(answers[0].top_ids, answers[0].top_probs, strict=True)]
        purpose = name_draw(DYNAMIC, node.dynamic)
        fresh = yield from self.works.sets(node, tab, samples=1, tries=self.rain.dynamic_tries, purpose=purpose)
        node.candidates = fresh + node.candidates
        return node.candidates[: count + 1]

    # ---- the answer -----------------------------------------------------------------------------------------------
    def _end_reason(self, node: SearchNode) -> FinishReason | None:
        """Why the answer ends with `node`, None while it goes on."""
        self.works.ended(node)
        reason: FinishReason | None = node.end_reason
        return reason

    def _announce(self, *, final: bool) -> None:
        """Stream the text that can no longer change."""
        if self.context.on_text is None:
            return
        text = self.works.answer.visible(self.committed, final=final)
        if len(text) > self._shown:
            self.context.on_text(text[self._shown :])
            self._shown = len(text)

    def _completion(self, reason: FinishReason | None, trees: list[dict[str, Any]] | None) -> Completion:
        assert reason is not None
        request = self.context.request
        return Completion(
            prompt=request.prompt,
            text=self.works.answer.visible(self.committed, final=True),
            token_ids=self.committed,
            finish_reason=reason,
            seed=request.seed,
            stats=self.context.stats(iterations=self.iterations, evaluations=self.evaluations),
            value=self.value,
            tree=trees,
        )
