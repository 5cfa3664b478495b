"""Task: a search in progress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raindecode.engine.branch import Ledger
from raindecode.engine.types import Got, HostCall, Search, Want, Yielded


class Task:
    """A search in progress with its accounts. `result` or `error` is set when `done`."""

    def __init__(self, search: Search, ledger: Ledger, tag: Any = None) -> None:
        self.search = search
        self.ledger = ledger
        self.tag = tag
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False
        self.paused = False
        self.cancelled = False
        self.wants: Sequence[Want] = ()
        self.answers: list[Got | None] = []
        self.host: HostCall | None = None

    def cancel(self) -> None:
        """End the request at the next step; its slots are freed and `error` is RequestCancelled."""
        self.cancelled = True

    def expect(self, wanted: Yielded) -> None:
        """Note what the search waits for.

        Raises:
            TypeError, ValueError, RuntimeError: the engine cannot answer it.
        """
        self.host = wanted if isinstance(wanted, HostCall) else None
        self.wants = () if isinstance(wanted, HostCall) else tuple(wanted)
        self.answers = [None] * len(self.wants)
        for want in self.wants:
            want.branch.live()
            if want.needs_logits and not want.branch.length:
                raise ValueError("a search wants logits after a branch without tokens: append at least one token first")
            if want.rows_from is not None and not 0 <= want.rows_from < want.branch.length:
                raise ValueError(
                    f"a search wants rows from position {want.rows_from} of a branch of {want.branch.length} tokens: "
                    "give a position of the branch"
                )
