"""Candidate token sets of a RAIN expansion: one greedy chain and sampled ones, advanced together."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from raindecode.engine.branch import Branch, Ledger
from raindecode.engine.rng import name_draw
from raindecode.engine.sampler import Filter
from raindecode.engine.types import Draw, Got, Want

if TYPE_CHECKING:
    from raindecode.search.rain import RAIN


Ends: TypeAlias = Callable[[tuple[int, ...]], bool]


class Candidate(NamedTuple):
    """A token set with its joint probability under the filtered distribution, not normalised over the sets."""

    tokens: tuple[int, ...]
    prob: float


def first_tokens(branch: Branch, count: int, temperature: float) -> Generator[Any, Any, list[Candidate]]:
    """The most likely single tokens, probabilities at `temperature` renormalised over them (depth 0)."""
    answers: list[Got] = yield [Want(branch, top=count, keep=True)]
    probs = [p ** (1.0 / temperature) for p in answers[0].top_probs]
    total = sum(probs) if temperature != 1.0 else 1.0
    return [Candidate((t,), p / total) for t, p in zip(answers[0].top_ids, probs, strict=True)]


def candidate_sets(
    rain: RAIN, seed: int, branch: Branch, length: int, *, samples: int, tries: int, purpose: int, ends: Ends, ledger: Ledger,
) -> Generator[Any, Any, list[Candidate]]:  # fmt: skip
    """One greedy set and up to `samples` distinct sampled ones, in `tries` attempts.

    `ends` says whether a path of chain tokens ends the answer; such a chain stops there. `ledger` counts what they run.

    Tries run in waves as large as the number still wanted, which chooses what one try after another would. The greedy
    set's probability is clamped to [max P_s + min P_s, sum P_s] over the sampled sets, the lower bound winning (official
    code); it comes first.
    """
    greedy: Candidate | None = None
    distinct: dict[tuple[int, ...], float] = {}
    tried = 0
    while greedy is None or (len(distinct) < samples and tried < tries):
        wave = min(samples - len(distinct), tries - tried)
        names = [-1] * (greedy is None) + list(range(tried, tried + wave))
        chains = yield from _chains(rain, seed, branch, length, names, purpose, ends, ledger)
        tried += wave
        if greedy is None:
            greedy = chains.pop(0)
        for chain in chains:
            if chain.tokens != greedy.tokens:
                distinct.setdefault(chain.tokens, chain.prob)
    prob = greedy.prob
    if distinct:
        probs = distinct.values()
        prob = max(min(prob, sum(probs)), max(probs) + min(probs))
    return [Candidate(greedy.tokens, prob), *(Candidate(t, p) for t, p in distinct.items())]


def _chains(
    rain: RAIN, seed: int, branch: Branch, length: int, names: list[int], purpose: int, ends: Ends, ledger: Ledger,
) -> Generator[Any, Any, list[Candidate]]:  # fmt: skip
    """Chains of `length` tokens after `branch`, cut where the answer ends, one per name; -1 names the greedy one.

    Chains share a branch while their tokens agree. The last token of a chain is not run: nothing needs it yet.
    """
    shape = Filter(temperature=rain.expansion_temperature, top_k=rain.top_k)
    probs = [1.0] * len(names)
    done: dict[int, tuple[int, ...]] = {}
    groups: dict[tuple[int, ...], tuple[Branch, list[int]]] = {(): (branch, list(range(len(names))))}
    while groups:
        wants = []
        for at, members in groups.values():
            here = name_draw(at.hash, purpose)
            draws = [Draw(shape, seed, name_draw(here, names[i] + 1), greedy=names[i] < 0) for i in members]
            wants.append(Want(at, draws=draws, keep=True))
        answers: list[Got] = yield wants
        following: dict[tuple[int, ...], tuple[Branch, list[int]]] = {}
        for (tokens, (at, members)), answer in zip(groups.items(), answers, strict=True):
            for i, drawn in zip(members, answer.drawn, strict=True):
                probs[i] *= drawn.prob
                longer = (*tokens, drawn.token)
                if len(longer) == length or ends(longer):
                    done[i] = longer
                elif longer in following:
                    following[longer][1].append(i)
                else:
                    fork = at.fork(reserve=length - len(tokens), ledger=ledger)
                    fork.append([drawn.token])
                    following[longer] = (fork, [i])
            if at is not branch:
                at.release()
        groups = following
    return [Candidate(done[i], probs[i]) for i in range(len(names))]
