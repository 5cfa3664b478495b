"""Runs a judge over items: every verdict is handed on as it comes, and a judge that only fails is not asked to the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Final

from raindecode.errors import JudgeError, JudgeUnavailableError
from raindecode.judging.judges import Judge
from raindecode.judging.rubric import Item
from raindecode.judging.verdicts import Verdict
from raindecode.progress import ProgressDisplay

MOST_FAILURES: Final = 10
"""So many failures in a row, without a verdict between them, end the run: the next 900 would cost as much and fail too."""


def judge_all(
    judge: Judge, items: Sequence[Item], on_verdict: Callable[[int, Verdict], None] | None = None, *,
    progress: bool | None = None,
) -> list[Verdict | JudgeError]:  # fmt: skip
    """Judge all items.

    Args:
        on_verdict: called with (position in `items`, verdict) as soon as there is one.
        progress: as in Decoder.generate.
    Returns:
        A verdict per item, or why there is none.

    Raises:
        JudgeUnavailableError: the judge cannot be asked, or failed MOST_FAILURES times in a row. Verdicts given by then have
            been handed to `on_verdict`.
    """
    found: list[Verdict | JudgeError | None] = [None] * len(items)
    failures = 0
    display = ProgressDisplay.choose(progress, len(items), searching=False, what="verdicts")
    with display, closing(judge.judge(items)) as outcomes:
        for at, outcome in outcomes:
            found[at] = outcome
            if isinstance(outcome, Verdict):
                failures = 0
                if on_verdict is not None:
                    on_verdict(at, outcome)
            else:
                failures += 1
            display.finished(at)
            if failures == MOST_FAILURES < len(items):
                raise JudgeUnavailableError(
                    f"{failures} items in a row got no verdict; the last, {items[at].name}: {outcome}"
                )
    lost = JudgeError("the judge gave this item no verdict at all")
    return [lost if one is None else one for one in found]
