"""Which leaves the search will come to next: the search itself, played on a copy of its statistics with guessed verdicts.

A wrong guess costs forwards and nothing else: the search takes the results it asks for, in its own order.
"""

from __future__ import annotations

from raindecode.search.leaf_work import LeafWork, LeafWorks
from raindecode.search.rain_tree import SearchNode, normalised

_LONGEST = 24  # iterations played at most


def start_ahead(
    works: LeafWorks, remaining: int, room: int, *, doubted: bool = False, beyond: bool = False
) -> list[LeafWork]:
    """Start up to `room` works on the leaves that come next.

    Args:
        remaining: iterations the search has for its present root, the next one included.
        doubted: play on as if the next verdict were not what is guessed.
        beyond: where the search goes on below a leaf whose children are not known yet, play on as if what it finds there were
            as good as the leaf, up to where it turns to others (counting visits under way, as in WU-UCT).
    """
    rain, tree = works.rain, works.tree
    statistics, nodes = tree.statistics.clone(), tree.nodes()
    started: list[LeafWork] = []
    unknown: set[int] = set()  # leaves whose children are not known yet
    skip: int | None = None
    for _ in range(_LONGEST):
        slots, needs_child = statistics.select(skip)
        if needs_child:  # which child the dynamic rule will add is not known; the others stay likely
            skip = slots[-1]
            continue
        skip, leaf = None, nodes[slots[-1]]
        below = slots[-1] in unknown
        if below and not beyond:
            break
        work = leaf.work or leaf.result
        if work is None:
            if len(started) == room:
                break
            work = leaf.work = LeafWork(works, leaf)
            started.append(work)
        value = work.value
        if value is None:
            value = -guess(leaf) if doubted else guess(leaf)
            doubted = False
        if below:
            statistics.backup(slots, value)
        else:
            if work.candidates is not None and work is not leaf.result:
                first = statistics.expand(slots[-1], normalised(work.candidates), len(work.candidates[0].tokens))
                for k, candidate in enumerate(work.candidates):
                    nodes[first + k] = leaf.child_ahead(candidate.tokens)
            elif not works.ended(leaf):
                unknown.add(slots[-1])
            statistics.backup(slots, value, work.embeddings(len(slots)))
        remaining -= 1
        best = statistics.best_child()
        if best is None:
            continue
        if remaining <= 0 or (best.direct_visits > rain.min_visits and best.value > rain.value_threshold):
            if works.ended(nodes[best.slot]) or best.slot in unknown:
                break
            unknown.difference_update(statistics.reroot(best.slot))
            remaining = rain.iterations(statistics.node(statistics.root).direct_visits)
    return started


def guess(leaf: SearchNode) -> float:
    """The score of a leaf that has none: that of the nearest node above which has one, or a good one."""
    above = leaf.parent
    while above is not None:
        if above.score is not None:
            return above.score
        if above.work is not None and above.work.value is not None:
            return above.work.value
        above = above.parent
    return 1.0
