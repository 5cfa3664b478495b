"""Plain sampling whose answers are scored as they finish."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

from raindecode.mixture import Mix
from raindecode.search.context import SearchContext
from raindecode.search.evaluator import Evaluator
from raindecode.search.sampling import Sampling
from raindecode.types import Completion


@dataclass(frozen=True)
class Scored:
    """Decode with `sampling`, then ask `evaluator` about the whole answer, in the same request: its prompts share forwards.

    The score is the completion's value. A model that judges is always the unedited reference, whatever gave the answer, so
    that scores of different mixtures can be compared.

    Attributes:
        evaluator: None leaves the answers without a score.
    """

    sampling: Sampling
    evaluator: Evaluator | None = None

    def search(self, context: SearchContext) -> Generator[Any, Any, Completion]:
        """Decode and score one request."""
        completion = yield from self.sampling.search(context)
        if self.evaluator is None:
            return completion
        for branch in list(context.ledger.branches):
            branch.release()  # the answer is there: leave its room to the judge
        request = context.request
        reference = Mix((1.0,) + (0.0,) * (len(request.mix.weights) - 1))
        judging = replace(context, request=replace(request, mix=reference), judge_edits=None)
        score = yield from self.evaluator.evaluate(judging, request.prompt, completion.text)
        return replace(completion, value=score, stats=context.stats(evaluations=1))
