"""The RAIN procedure for one request: inner search, self-evaluation, outer moves with rewind.

One iteration selects a leaf, rolls it out to the next punctuation mark, has the text judged, expands the leaf and backs
the verdict up. Rollout, candidate chains and evaluation advance in the same forwards. Differences from the official
script, all of them repairs, are listed in docs/methods/rain.md.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raindecode.engine.branch import Branch
from raindecode.engine.rng import name_draw
from raindecode.engine.sampler import Filter
from raindecode.engine.types import Draw, Got, Want
from raindecode.search.context import SearchContext, together
from raindecode.search.embedder import Paths
from raindecode.search.rain_sets import Candidate, candidate_sets, first_tokens
from raindecode.search.rain_tree import RainTree, SearchNode
from raindecode.text import find_stop
from raindecode.types import Completion, FinishReason

if TYPE_CHECKING:
    from raindecode.search.rain import RAIN

ROLLOUT, EXPAND, DYNAMIC = 1, 2, 3  # purposes, part of every draw's name
_STOP_LOOKBACK = 12  # tokens a stop string may span
Steps = Generator[Any, Any, Any]


class RainSearch:
    """State of one search. `run` is the generator the engine drives."""

    def __init__(self, rain: RAIN, context: SearchContext) -> None:
        self.rain = rain
        self.context = context
        self.request = context.request
        self.tree = RainTree(rain, context)
        self.stops = tuple(dict.fromkeys(rain.stop + context.request.stop))
        self.verdicts: dict[str, float] = {}
        self.committed: list[int] = []
        self.iterations = 0
        self.evaluations = 0
        self.value: float | None = None
        self._shown = 0

    # ---- outer loop -----------------------------------------------------------------------------------------------
    def run(self) -> Generator[Any, Any, Completion]:
        """Move after move until the answer ends."""
        trees: list[dict[str, Any]] = []
        reason: FinishReason | None = None
        while reason is None:
            inherited = self.tree.root_visits()
            limit = max(self.rain.max_iterations, inherited + self.rain.min_new_iterations)
            for _ in range(inherited, limit):
                yield from self._iteration()
                best = self.tree.best_child()
                if best is None or (
                    best.direct_visits > self.rain.min_visits and best.value > self.rain.value_threshold
                ):
                    break
            best = self.tree.best_child()
            if best is None:
                reason = self._end_reason(self.tree.root) or "length"
                break
            if self.rain.record_tree:
                trees.append(self.tree.export(best.node, self._text))
            self.committed += best.node.tokens
            self.value = best.value
            reason = self._end_reason(best.node)
            self.tree.reroot(best.node)
            self._announce(final=reason is not None)
        return self._completion(reason, trees if self.rain.record_tree else None)

    # ---- one iteration --------------------------------------------------------------------------------------------
    def _iteration(self) -> Steps:
        """Select, evaluate, expand, back up."""
        path = yield from self._select()
        leaf = path[-1]
        ended = self._end_reason(leaf) is not None
        jobs: list[Steps] = [self._evaluate(path)]
        if not ended:
            jobs.append(self._expansion(leaf))
        results = yield from together(*jobs)
        value, embedding = results[0]
        if len(results) > 1:
            self.tree.expand(leaf, results[1])
        self.context.ledger.measure()
        self.tree.backup(path, value, embedding)
        leaf.visits += 1
        self.iterations += 1
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

    def _add_child(self, node: SearchNode) -> Steps:
        """The dynamic rule (`checkadd`): at most one more child, its prior normalised with the others' at hand."""
        count = self.tree.num_children(node)
        branch = self._branch(node)
        if self.rain.set_length(node.step) == 1:
            answers: list[Got] = yield [Want(branch, top=count + 1, keep=True)]
            pool = [Candidate((t,), p) for t, p in zip(answers[0].top_ids, answers[0].top_probs, strict=True)]
        else:
            purpose = name_draw(DYNAMIC, node.dynamic)
            fresh = yield from self._sets(node, samples=1, tries=self.rain.dynamic_tries, purpose=purpose)
            node.candidates = fresh + node.candidates
            pool = node.candidates[: count + 1]
        node.dynamic += 1
        total = sum(c.prob for c in pool)
        for candidate in pool:
            if not self.tree.has_child(node, candidate.tokens):
                self.tree.add_child(node, candidate.tokens, candidate.prob / total)
                return

    def _expansion(self, leaf: SearchNode) -> Steps:
        """The candidate sets of a leaf with joint probabilities; single tokens at the start of the answer."""
        rain = self.rain
        if rain.set_length(leaf.step) == 1:
            return (yield from first_tokens(self._branch(leaf), rain.first_top_k, rain.expansion_temperature))
        return (yield from self._sets(leaf, samples=rain.num_samples, tries=rain.max_tries, purpose=EXPAND))

    def _sets(self, node: SearchNode, *, samples: int, tries: int, purpose: int) -> Steps:
        path = self.tree.path_tokens(node)
        room, tail = self.request.max_new_tokens - len(path), path[-_STOP_LOOKBACK:]
        sets = yield from candidate_sets(
            self.rain,
            self.request.seed,
            self._branch(node),
            self.rain.set_length(node.step),
            samples=samples,
            tries=tries,
            purpose=purpose,
            ends=lambda tokens: len(tokens) >= room or self._closes(tail, tokens),
        )
        return sets

    def _closes(self, tail: list[int], tokens: tuple[int, ...]) -> bool:
        """Whether the last of `tokens`, behind `tail`, ends the answer."""
        codec = self.context.codec
        if tokens[-1] in codec.eos_token_ids or tokens[-1] in self.request.stop_token_ids:
            return True
        return bool(self.stops) and find_stop(codec.decode([*tail, *tokens][-_STOP_LOOKBACK:]), self.stops) >= 0

    def _evaluate(self, path: list[SearchNode]) -> Steps:
        """Roll the leaf out, judge the text, embed the path: (value, embeddings or None)."""
        leaf = path[-1]
        tokens = self.committed + [t for node in path[1:] for t in node.tokens]
        rollout = yield from self._rollout(leaf, tokens)
        jobs: list[Steps] = [self._verdict(self._kept(self._text(tokens + rollout)))]
        if len(path) > 1 and self.rain.embedder is not None:
            jobs.append(self._embed(path, rollout))
        results = yield from together(*jobs)
        return results[0], results[1] if len(results) > 1 else None

    def _rollout(self, leaf: SearchNode, tokens: list[int]) -> Steps:
        """Sample on from the leaf until punctuation, the end of the answer, or the token limit."""
        branch: Branch | None = None
        rollout: list[int] = []
        source = self._branch(leaf)
        while not self._rollout_ends(tokens + rollout):
            at = source if branch is None else branch
            # Named by the leaf, not by the growing path: else a child on the rollout's way would repeat it word for word.
            counter = name_draw(source.hash, ROLLOUT, leaf.visits, len(rollout))
            answers: list[Got] = yield [Want(at, draws=[Draw(Filter(), self.request.seed, counter)], keep=True)]
            if branch is None:
                branch = source.fork(reserve=16)
            token = answers[0].drawn[0].token
            rollout.append(token)
            branch.append([token])
        if branch is not None:
            branch.release()
        return rollout

    def _rollout_ends(self, tokens: list[int]) -> bool:
        if self._ended(tokens) is not None:
            return True
        text = (self.request.prompt_text + self._text(tokens))[-1:]
        return bool(self.rain.rollout_stop) and text in self.rain.rollout_stop

    def _verdict(self, text: str) -> Steps:
        """The evaluator's score of the answer so far, cached by text."""
        if text not in self.verdicts:
            evaluator: Any = self.rain.evaluator
            self.verdicts[text] = yield from evaluator.evaluate(self.context, self.request.prompt, text)
            self.evaluations += 1
        return self.verdicts[text]

    def _embed(self, path: list[SearchNode], rollout: list[int]) -> Steps:
        """[len(path), dimension]: row j embeds the text from path[j]'s first token to the rollout's end; row 0 is unused."""
        embedder = self.rain.embedder
        assert embedder is not None
        branch = self._branch(path[-1]).fork()
        branch.append(rollout)
        parts = [node.tokens for node in path[1:]]
        starts, at = [], branch.length - len(rollout) - sum(map(len, parts))
        for part in parts:
            starts.append(at)
            at += len(part)

        def texts() -> list[str]:
            return [self.context.codec.decode([t for p in parts[i:] for t in p] + rollout) for i in range(len(parts))]

        rows: Tensor = yield from embedder.embed(self.context, Paths(branch, starts, texts))
        branch.release()
        return torch.cat([torch.zeros(1, rows.shape[1]), rows])

    # ---- the answer -----------------------------------------------------------------------------------------------
    def _branch(self, node: SearchNode) -> Branch:
        return self.tree.branch(node)

    def _text(self, tokens: list[int]) -> str:
        """Answer text of generated tokens, cut at a stop string; tokens that end the answer are not text."""
        if tokens and (tokens[-1] in self.context.codec.eos_token_ids or tokens[-1] in self.request.stop_token_ids):
            tokens = tokens[:-1]
        text = self.context.codec.continuation(self.request.prompt_ids, tokens)
        at = find_stop(text, self.stops)
        return text if at < 0 else text[:at]

    def _end_reason(self, node: SearchNode) -> FinishReason | None:
        """Why the answer ends with `node`, None while it goes on. Decided once per node."""
        if node.end_reason is _UNDECIDED:
            node.end_reason = self._ended(self.tree.path_tokens(node))
        reason: FinishReason | None = node.end_reason
        return reason

    def _ended(self, tokens: list[int]) -> FinishReason | None:
        if not tokens:
            return None
        if not self.context.codec.eos_token_ids.isdisjoint(tokens):
            return "eos"
        if not self.request.stop_token_ids.isdisjoint(tokens):
            return "stop"
        if find_stop(self.context.codec.continuation(self.request.prompt_ids, tokens), self.stops) >= 0:
            return "stop"
        return "length" if len(tokens) >= self.request.max_new_tokens else None

    def _announce(self, *, final: bool) -> None:
        """Stream the text that can no longer change."""
        if self.context.on_text is None:
            return
        text = self._final_text() if final else self._text(self.committed)
        hold = 0 if final else max((len(s) for s in self.stops), default=1) - 1
        if final or not self.rain.keep_after_last:
            # A character whose bytes are not all there yet reads U+FFFD and may still change.
            upto = len(text) if final else min(len(text) - hold, len(text.rstrip("\ufffd")))
            if upto > self._shown:
                self.context.on_text(text[self._shown : upto])
                self._shown = upto

    def _final_text(self) -> str:
        return self._kept(self._text(self.committed))

    def _kept(self, text: str) -> str:
        """What `keep_after_last` leaves of an answer."""
        last = max((text.rfind(c) for c in self.rain.keep_after_last), default=-1)
        return text[: last + 1] if last >= 0 else text

    def _completion(self, reason: FinishReason, trees: list[dict[str, Any]] | None) -> Completion:
        return Completion(
            prompt=self.request.prompt,
            text=self._final_text(),
            token_ids=self.committed,
            finish_reason=reason,
            seed=self.request.seed,
            stats=self.context.stats(iterations=self.iterations, evaluations=self.evaluations),
            value=self.value,
            tree=trees,
        )


_UNDECIDED = SearchNode.UNDECIDED
