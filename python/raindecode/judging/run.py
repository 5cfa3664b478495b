"""Runs a judge over items: every verdict is handed on as it comes, and a judge that only fails is not asked to the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
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

    def take(at: int, outcome: Verdict | JudgeError) -> None:
        nonlocal failures
        found[at] = outcome
        failures = 0 if isinstance(outcome, Verdict) else failures + 1
        if isinstance(outcome, Verdict) and on_verdict is not None:
            on_verdict(at, outcome)

    display = ProgressDisplay.choose(progress, len(items), searching=False, what="verdicts")
    with display, closing(judge.judge(items)) as outcomes:
        try:
            for at, outcome in outcomes:
                take(at, outcome)
                display.finished(at)
                if failures == MOST_FAILURES < len(items):
                    raise JudgeUnavailableError(
                        f"{failures} items in a row got no verdict; the last, {items[at].name}: {outcome}"
                    )
        except KeyboardInterrupt as stopped:
            with suppress(StopIteration, KeyboardInterrupt):  # what has been answered by now is not thrown away
                take(*outcomes.throw(stopped))
                for at, outcome in outcomes:
                    take(at, outcome)
            raise
    lost = JudgeError("the judge gave this item no verdict at all")
    return [lost if one is None else one for one in found]
