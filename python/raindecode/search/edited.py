"""Edits of hidden states around any search: decided before its first token, held until its last."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from raindecode.engine.types import Search, Want
from raindecode.hidden_edits import Site
from raindecode.mixture import Mix
from raindecode.search.context import SearchContext


class Searches(Protocol):
    """What decodes a request: Sampling, RAIN or Scored."""

    def search(self, context: SearchContext) -> Search: ...


def search_edited(context: SearchContext, search: Searches) -> Search:
    """Run a search under its request's edits; its result."""
    if context.request.edits is None:
        context.keep_prompt()
        return search.search(context)
    return _edited(context, search)


def _edited(context: SearchContext, search: Searches) -> Generator[Any, Any, Any]:
    edited = yield from with_edits(context)
    return (yield from search.search(edited))


def with_edits(context: SearchContext) -> Generator[Any, Any, SearchContext]:
    """The context of a request with its edits ready: what is edited is decided by the prompt where an edit asks for that."""
    plan, ids = context.request.edits, context.request.prompt_ids
    if plan is None:
        context.keep_prompt()
        return context
    num_models = len(context.request.mix.weights)
    wants = []
    for model, sites in plan.queries.items():
        context.engine.models[model][0].check_places(sites)
        alone = Mix(tuple(float(i == model) for i in range(num_models)))
        branch = context.engine.open(context.ledger, ids, alone)
        wants.append(Want(branch, taps=sites, taps_from=len(ids) - 1))
    answers = (yield wants) if wants else ()
    states: dict[int, dict[Site, Tensor]] = {}
    for model, want, answer in zip(plan.queries, wants, answers, strict=True):
        want.branch.release()
        states[model] = dict(zip(want.taps, answer.tapped, strict=True))
    rows, judge = plan.schedule(len(ids), states)
    engine, ledger = context.engine, context.ledger
    edited = replace(context, edits=engine.hold(ledger, rows), judge_edits=engine.hold(ledger, judge))
    edited.keep_prompt()
    return edited
